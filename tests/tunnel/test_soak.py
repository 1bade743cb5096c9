"""Much, and for long: ten thousand streams at a time, twenty thousand visits; both ends are then as before.

Only in `make soak`. Both ends and the service are processes of their own: each has the descriptors of its
half, and what is left behind is seen where it is.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from support.tunnel_ends import End, Tunnel, more_descriptors
from support.tunnels import LATEST, visit

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

STREAMS = 10_000
VISITS = 20_000
AT_ONCE = 100
# Allocators keep some of what is freed; what grows with the number of streams is more than this.
MOST_GROWTH = 16 << 20

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def tunnel_of_processes(folder: Path) -> AsyncIterator[Tunnel]:
    service = await End.start("service")
    try:
        async with Tunnel(service.port, folder, server={"max_visitors": 16_000}) as tunnel:
            yield tunnel
    finally:
        await service.stop()


async def say(stream: Stream, word: bytes) -> None:
    """A word, and its echo."""
    reader, writer = stream
    writer.write(word)
    assert await asyncio.wait_for(reader.readexactly(len(word)), 3 * LATEST) == word


async def hold(tunnel: Tunnel, number: int) -> list[int]:
    """Holds so many streams open through a cut of the link; the memory of both ends meanwhile."""
    there: list[Stream] = []
    try:
        while len(there) < number:
            some = await asyncio.gather(*(visit(tunnel.public) for _ in range(AT_ONCE)))
            await asyncio.gather(*(say(one, b"%d" % n) for n, one in enumerate(some, len(there))))
            there.extend(some)
        await tunnel.served(lambda status: status["streams"] == number)
        memory = [(await end.ask())["memory"] for end in (tunnel.server, tunnel.client)]
        await tunnel.cut_for(0.1)
        await asyncio.gather(*(say(one, b"again %d" % n) for n, one in enumerate(there)))
    finally:
        for _, writer in there:
            writer.close()
    await tunnel.served(lambda status: status["streams"] == 0)
    await ended(tunnel)
    return memory


async def ended(tunnel: Tunnel) -> None:
    """Waits until the client has no streams left either."""
    async with asyncio.timeout(LATEST):
        while (await tunnel.client.ask())["tunnels"][0]["streams"]:
            await asyncio.sleep(0.02)  # between two looks


async def nothing_is_left(tunnel: Tunnel, before: list[dict[str, int]]) -> None:
    for name, end, was in zip(("server", "client"), (tunnel.server, tunnel.client), before, strict=True):
        async with asyncio.timeout(LATEST):
            while (now := await end.ask())["descriptors"] > was["descriptors"]:
                await asyncio.sleep(0.02)  # between two looks
        assert now["threads"] <= was["threads"], name
        growth = now["memory"] - was["memory"]
        print(
            f"{name}: {now['descriptors']} descriptors, {now['threads']} threads, {growth / 2**20:+.1f} MiB"
        )
        assert growth < MOST_GROWTH, f"the {name} grew by {growth} bytes"


async def test_ten_thousand_streams(tmp_path: Path) -> None:
    more_descriptors()
    async with tunnel_of_processes(tmp_path) as tunnel:
        await hold(tunnel, 100)
        idle = [(await end.ask())["memory"] for end in (tunnel.server, tunnel.client)]
        memory = await hold(tunnel, STREAMS)
        for name, now, was in zip(("server", "client"), memory, idle, strict=True):
            print(f"{name}: {(now - was) / STREAMS:.0f} bytes for a stream")
        # The first time the tables of the streams grow to their size, which they keep.
        before = [await end.ask() for end in (tunnel.server, tunnel.client)]
        await hold(tunnel, STREAMS)
        await nothing_is_left(tunnel, before)


async def test_twenty_thousand_visits(tmp_path: Path) -> None:
    more_descriptors()
    chance = random.Random(1)
    async with tunnel_of_processes(tmp_path) as tunnel:
        await visits(tunnel, 2_000, chance)
        before = [await end.ask() for end in (tunnel.server, tunnel.client)]
        for _ in range(10):
            await visits(tunnel, VISITS // 10, chance)
            await tunnel.cut_for(0.01)
        await nothing_is_left(tunnel, before)


async def visits(tunnel: Tunnel, number: int, chance: random.Random) -> None:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(manner: int, size: int) -> None:
        async with gate:
            await come_and_go(tunnel.public, manner, size)

    await asyncio.gather(*(one(n % 4, chance.randrange(60_000)) for n in range(number)))
    await tunnel.served(lambda status: status["streams"] == 0)
    await ended(tunnel)


async def come_and_go(port: int, manner: int, size: int) -> None:
    """A visit that ends in one of the ways in which visits end."""
    reader, writer = await visit(port)
    payload = b"e" + bytes(size)
    if manner == 0:  # in order
        writer.write(payload)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(-1), LATEST) == payload
    elif manner == 1:  # the service breaks it off
        writer.write(b"r")
        with suppress(ConnectionResetError):
            await asyncio.wait_for(reader.read(), LATEST)
    elif manner == 2:  # the visitor does
        writer.write(payload)
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
    writer.close()  # at once, in the fourth
