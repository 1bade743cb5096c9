"""A bridge that was ready ends before payload flows: while its sink is awaited, or a superframe's hello."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from sapper.errors import (
    CloseDeadline,
    ConnectDeadline,
    ConnectionLost,
    HandshakeDeadline,
    SapperError,
)
from sapper.tls import Bridge
from support.bridges import Pair, closing, pair, receive

pytestmark = pytest.mark.usefixtures("leak_check")

LISTENS: dict[str, Any] = {"client_sink": "tcp-listen://127.0.0.1:0"}
SAYS_HELLO: dict[str, Any] = {
    "client_sink": "counter:",
    "framing": "superframe",
    "server": {"framing": "raw"},
}

ENDS: dict[str, Callable[[Bridge], object]] = {
    "stop": lambda bridge: bridge.stop(),
    "a short drain": lambda bridge: bridge.stop(drain=0.01),
    "aclose": lambda bridge: asyncio.ensure_future(bridge.aclose()),
}


async def started(two: Pair) -> None:
    """The peer is one that moves bytes, and takes a hello for some."""
    await asyncio.gather(two.client.handshake(), two.server.handshake())
    two.server.start()
    two.client.start()
    assert two.client.state == "ready"


async def end_of(bridge: Bridge) -> SapperError | None:
    with suppress(SapperError):
        await bridge.wait_closed()
    return bridge.error


async def peer_s_end(two: Pair) -> SapperError | None:
    two.server_end.setblocking(False)
    # What lay unread would break the peer's own sink off.
    with suppress(ConnectionError):
        while await asyncio.get_running_loop().sock_recv(two.server_end, 100):
            pass
    two.server_end.close()
    return await end_of(two.server)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("waits", ["for its sink", "for a hello"])
async def test_its_peer_hears_close_notify(waits: str, end: str, any_loop: str) -> None:
    options = LISTENS if waits == "for its sink" else SAYS_HELLO
    with closing(pair(close_timeout=0.01, **options)) as two:
        async with asyncio.timeout(20):
            await started(two)
            if waits == "for a hello":
                assert await receive(two.server_end, 8) == b"SAPPERSF"
            ending = ENDS[end](two.client)
            # A hello in time would have had what waits delivered; where nobody came, nobody misses it.
            late = waits == "for a hello" and end != "stop"
            assert type(await end_of(two.client)) is (CloseDeadline if late else type(None))
            assert await peer_s_end(two) is None
            if isinstance(ending, asyncio.Future):
                await asyncio.gather(ending, return_exceptions=True)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({**LISTENS, "accept_timeout": 0.05}, ConnectDeadline),
        ({**SAYS_HELLO, "handshake_timeout": 2.0}, HandshakeDeadline),
    ],
    ids=["nobody comes", "no hello"],
)
async def test_so_does_it_after_a_deadline(options: dict[str, Any], kind: type[SapperError]) -> None:
    with closing(pair(**options)) as two:
        async with asyncio.timeout(20):
            await started(two)
            assert type(await end_of(two.client)) is kind
            assert await peer_s_end(two) is None


@pytest.mark.parametrize("options", [LISTENS, SAYS_HELLO], ids=["sink", "hello"])
async def test_one_that_is_broken_off_says_nothing(options: dict[str, Any]) -> None:
    with closing(pair(**options)) as two:
        async with asyncio.timeout(20):
            await started(two)
            two.client.abort()
            await end_of(two.client)
            assert type(await peer_s_end(two)) is ConnectionLost


async def test_a_cdtunnel_s_greeting_that_is_given_up_ends_so_too() -> None:
    with closing(pair(client_sink="counter:", framing="ipv6", server={"framing": "raw"})) as two:
        async with asyncio.timeout(20):
            await asyncio.gather(two.client.handshake(), two.server.handshake())
            two.server.start()
            greeting = asyncio.ensure_future(two.client.cdtunnel_handshake(1280))
            assert await receive(two.server_end, 8) == b"CDTunnel"
            two.client.stop()
            with suppress(SapperError):
                await greeting
            assert await peer_s_end(two) is None
