"""What a program of the bridge rows is asked to do and how it reports; shared by ours and asyncio's.

Standard library only: the peers' interpreter need not have anything else.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benches.memory import allocated, allow_many_fds, resident

_WARM_IDLE = 100
#: Pairs before the clock runs.
WARM_CYCLES = 20


@dataclass(frozen=True)
class Work:
    """The arguments."""

    mode: str
    count: int
    port: int
    key: bytes
    roots: str
    certificate: str
    private_key: str
    server_name: str
    drain: float


def parse_work(doc: str | None) -> Work:
    """Reads the arguments that every program of these rows takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("idle", "cycles"))
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key", default="", help="pre-shared key in hex; without it the certificate files")
    parser.add_argument("--roots", default="")
    parser.add_argument("--certificate", default="")
    parser.add_argument("--private-key", default="")
    parser.add_argument("--server-name", default="localhost")
    parser.add_argument("--drain", type=float, default=0.0, help="seconds for stop(); 0 stops at once")
    given = parser.parse_args()
    return Work(**{**vars(given), "key": bytes.fromhex(given.key)})


async def print_idle(work: Work, open_one: Callable[[], Awaitable[object]]) -> None:
    """Opens a hundred to warm pools and threads, then `count` more, and prints what one of these costs."""
    allow_many_fds()
    kept = [await open_one() for _ in range(_WARM_IDLE)]
    resident_before, allocated_before = resident(), allocated()
    kept += [await open_one() for _ in range(work.count)]
    print(
        json.dumps(
            {
                "resident": (resident() - resident_before) / work.count,
                "allocated": (allocated() - allocated_before) / work.count,
                "open": len(kept),
            }
        ),
        flush=True,
    )


async def print_cycles(work: Work, one: Callable[[], Awaitable[None]]) -> None:
    """Runs a few to warm up, then `count`, and prints the time of one."""
    for _ in range(WARM_CYCLES):
        await one()
    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in range(work.count):
        await one()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    print(json.dumps({"seconds": wall / work.count, "cpu_seconds": cpu / work.count}), flush=True)
