"""What a program of the stream row does with a reader and a writer, ours or asyncio's: they have one shape.

Standard library only: the peers' interpreter need not have anything else.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

_PIECE = 256 * 1024
_WRITE = bytes(64 * 1024)


class Reader(Protocol):
    """What is used of a reader."""

    async def read(self, n: int = -1) -> bytes: ...

    async def readexactly(self, n: int) -> bytes: ...


class Writer(Protocol):
    """What is used of a writer."""

    def write(self, data: bytes) -> None: ...

    async def drain(self) -> None: ...


@dataclass(frozen=True)
class Work:
    """The arguments."""

    mode: str
    port: int
    seconds: float
    warm: float
    roots: str
    server_name: str


def parse_work(doc: str | None) -> Work:
    """Reads the arguments that the programs of this row take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("receive", "send", "echo"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warm", type=float, required=True)
    parser.add_argument("--roots", required=True)
    parser.add_argument("--server-name", default="localhost")
    return Work(**vars(parser.parse_args()))


async def print_work(work: Work, reader: Reader, writer: Writer) -> None:
    """Warms up, works for the time that was asked for, prints one line of JSON."""
    step = {"receive": _receive, "send": _send, "echo": _echo}[work.mode]
    await _for(work.warm, step, reader, writer)
    began, cpu = time.perf_counter(), time.process_time()
    steps, units = await _for(work.seconds, step, reader, writer)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    figures = {"rate": units / wall, "cpu": cpu / units if units else 0.0}
    if work.mode == "echo":
        steps.sort()
        figures |= {"p50": steps[len(steps) // 2], "p99": steps[len(steps) * 99 // 100]}
    print(json.dumps(figures), flush=True)


async def _for(
    seconds: float, step: Callable[[Reader, Writer], Awaitable[int]], reader: Reader, writer: Writer
) -> tuple[list[float], int]:
    times, units, end = [], 0, time.perf_counter() + seconds
    now = time.perf_counter()
    while now < end:
        units += await step(reader, writer)
        before, now = now, time.perf_counter()
        times.append(now - before)
    return times, units


async def _receive(reader: Reader, _: Writer) -> int:
    data = await reader.read(_PIECE)
    if not data:
        raise EOFError("the far end has ended")
    return len(data)


async def _send(_: Reader, writer: Writer) -> int:
    writer.write(_WRITE)
    await writer.drain()
    return len(_WRITE)


async def _echo(reader: Reader, writer: Writer) -> int:
    writer.write(b"x")
    await writer.drain()
    return len(await reader.readexactly(1))
