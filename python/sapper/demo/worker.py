"""The two processes of a demonstration; started by :func:`sapper.demo.run_scene`, not by people.

A worker reads one line of JSON from its standard input (what to do, with which inherited descriptors),
prints lines of JSON, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sapper.demo import INTERVAL, SUITE, asyncio_pump, tun
from sapper.testing import Load
from sapper.tls import Credentials, TlsConfig, create_bridge

__all__: list[str] = []


def _print(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


async def _standard_input() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def _tell_until_the_end(commands: asyncio.StreamReader, values: Callable[[], dict[str, Any]]) -> None:
    """Prints values at the interval until standard input ends."""
    ended = asyncio.ensure_future(commands.read())
    while not ended.done():
        await asyncio.wait([ended], timeout=INTERVAL)
        _print(values())


async def _far(spec: dict[str, Any], commands: asyncio.StreamReader) -> None:
    """The TLS peer, the load and its measure."""
    in_tun = spec["scene"] == "tun"
    sink: Any = tun.far_sink() if in_tun else socket.socket(fileno=spec["sink"])
    ends = spec["far_end"], spec["near_end"]
    chain, key = (part.encode() for part in spec["server"])
    # One suite, so that both pumps do the same work: left alone, asyncio asks for another than Sapper does.
    config = TlsConfig(
        credentials=Credentials.certificate(chain, key), min_version="TLSv1.3", cipher_suites=(SUITE,)
    )
    bridge = create_bridge(
        socket=socket.socket(fileno=spec["tcp"]),
        sink=sink,
        credentials=config,
        server_side=True,
        framing=spec["framing"],
    )
    async with bridge:
        await bridge.handshake()
        bridge.start()
        if in_tun:
            ends = await asyncio.to_thread(tun.inner_connection, spec)
        _print({"ready": True})
        await commands.readline()
        unit, size = spec["unit"], spec["size"]
        meters = {
            "encapsulate": Load.meter(ends[0], unit, size),
            "decapsulate": Load.meter(ends[1], unit, size),
        }
        sources = [Load.source(end, unit, size, rate=spec["rate"]) for end in ends]
        await _tell_until_the_end(
            commands, lambda: {name: asdict(one.stats()) for name, one in meters.items()}
        )
        for load in (*sources, *meters.values()):
            load.stop()
        bridge.stop()


async def _near(spec: dict[str, Any], commands: asyncio.StreamReader) -> None:
    """The pump that is looked at."""
    tcp = socket.socket(fileno=spec["tcp"])
    in_tun = spec["scene"] == "tun"
    sink: Any = tun.near_sink(spec) if in_tun else socket.socket(fileno=spec["sink"])
    if spec["pump"] == "asyncio":
        pump = await asyncio_pump.start(tcp, sink, spec["authority"], spec["framing"])
        if in_tun:
            await asyncio.to_thread(tun.send_inner_socket, spec)
        _print({"tls": pump.tls})
        await _tell_until_the_end(commands, lambda: {"records": 0, "packets": tun.packets() if in_tun else 0})
        pump.close()
        return
    bridge = create_bridge(
        socket=tcp,
        sink=sink,
        credentials=Credentials.none(roots=spec["authority"].encode()),
        server_hostname="localhost",
        framing=spec["framing"],
    )
    async with bridge:
        info = await bridge.handshake()
        bridge.start()
        if in_tun:
            await asyncio.to_thread(tun.send_inner_socket, spec)
        _print({"tls": f"{info.version}, {info.cipher_suite}"})

        def told() -> dict[str, Any]:
            stats = bridge.stats()
            records = stats.transport.records_received + stats.transport.records_sent
            # As they would lie on a wire: the kernel counts a large one once.
            return {"records": records, "packets": stats.encapsulate.packets + stats.decapsulate.packets}

        await _tell_until_the_end(commands, told)
        bridge.stop()


async def _main(role: str) -> None:
    spec = json.loads(sys.stdin.readline())
    if spec["scene"] == "tun":
        tun.enter_new_namespace()  # before the first native thread: they inherit it
    commands = await _standard_input()
    await (_far if role == "far" else _near)(spec, commands)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
