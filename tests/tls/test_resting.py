"""A bridge that has shaken hands and that nobody starts: its clock, its peer's end, what came meanwhile."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress
from typing import Any

import pytest

from sapper.errors import ApiMisuseError, ClosedError, ConnectionLost, IdleDeadline, SapperError, TlsError
from sapper.tls import Bridge, Credentials, create_bridge
from support.bridges import PSK, Pair, pair, receive, send
from support.certs import Certificates
from support.enemies import Enemy

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.fixture(params=["certificate", "psk"])
def ends(request: pytest.FixtureRequest, certs: Certificates) -> dict[str, Any]:
    """What the two have, for each engine."""
    if request.param == "psk":
        return {"credentials": PSK}
    return {
        "credentials": Credentials.none(roots=certs.ca.cert),
        "server_hostname": certs.name,
        "server": {"credentials": Credentials.certificate(certs.server.cert, certs.server.key)},
    }


async def shaken(two: Pair) -> Pair:
    async with asyncio.timeout(20):
        await asyncio.gather(two.client.handshake(), two.server.handshake())
    assert (two.client.state, two.server.state) == ("ready", "ready")
    return two


async def ended(bridge: Bridge) -> SapperError | None:
    """What ended it."""
    async with asyncio.timeout(20):
        with suppress(SapperError):
            await bridge.wait_closed()
    return bridge.error


async def let_go(two: Pair) -> None:
    for end in (two.client_end, two.server_end):
        end.close()
    for bridge in (two.client, two.server):
        with suppress(SapperError):
            await bridge.stop()


async def test_the_idle_deadline_applies(any_loop: str, ends: dict[str, Any]) -> None:
    two = await shaken(pair(idle_timeout=0.2, **ends))
    error = await ended(two.client)
    assert type(error) is IdleDeadline
    assert error.phase == "transfer"
    await let_go(two)


async def test_a_peer_that_breaks_off_is_noticed(any_loop: str, ends: dict[str, Any]) -> None:
    two = await shaken(pair(**ends))
    two.server.abort()
    error = await ended(two.client)
    assert type(error) is ConnectionLost, repr(error)
    assert (error.phase, error.reason) == ("transfer", "truncated")
    await let_go(two)


async def test_a_start_that_crosses_the_error_is_no_mistake(any_loop: str, ends: dict[str, Any]) -> None:
    """Whoever starts a bridge cannot know that its peer went a moment ago: the error is told as always."""
    heard = list[SapperError]()
    two = await shaken(pair(on_error=heard.append, **ends))
    two.server.abort()
    await ended(two.client)
    two.client.start()
    with pytest.raises(ApiMisuseError):
        two.client.start()
    await two.client.wait_closed()
    assert heard == [two.client.error]
    await let_go(two)


async def test_a_server_notices_it_too(ends: dict[str, Any]) -> None:
    two = await shaken(pair(**ends))
    two.client.abort()
    assert type(await ended(two.server)) is ConnectionLost
    await let_go(two)


async def test_a_peer_that_says_goodbye_has_nobody_for_ever(ends: dict[str, Any]) -> None:
    wait = 2.0  # longer than a busy machine needs for a handshake
    two = await shaken(pair(handshake_timeout=wait, **ends))
    await two.server.stop()
    assert await ended(two.client) is None
    with pytest.raises(ClosedError):
        two.client.start()
    await let_go(two)


async def test_a_start_that_comes_in_time_passes_the_end_on(ends: dict[str, Any]) -> None:
    two = await shaken(pair(**ends))
    await two.server.stop()
    two.client.start()
    assert await receive(two.client_end, 1) == b""
    await let_go(two)


async def test_what_came_before_the_start_is_delivered(any_loop: str, ends: dict[str, Any]) -> None:
    early = bytes(range(256)) * 1000
    two = await shaken(pair(**ends))
    two.server.start()
    await send(two.server_end, early)
    two.server_end.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(20):
        while two.server.stats().encapsulate.bytes < len(early):
            await asyncio.sleep(0.005)
    two.client.start()
    assert await receive(two.client_end, len(early) + 1) == early
    await let_go(two)


async def test_packets_that_came_before_the_start_are_delivered(ends: dict[str, Any]) -> None:
    two = await shaken(pair(socket.SOCK_DGRAM, framing="u16", **ends))
    two.server.start()
    await send(two.server_end, b"first")
    await send(two.server_end, b"second")
    async with asyncio.timeout(20):
        while two.server.stats().encapsulate.packets < 2:
            await asyncio.sleep(0.005)
    two.client.start()
    assert await receive(two.client_end, 5) == b"first"
    assert await receive(two.client_end, 6) == b"second"
    await let_go(two)


async def test_an_alert_is_told_at_once(certs: Certificates) -> None:
    near, far = socket.socketpair()
    heard = list[SapperError]()
    bridge = create_bridge(
        socket=near,
        sink="null:",
        credentials=Credentials.none(roots=certs.ca.cert),
        server_hostname=certs.name,
        on_error=heard.append,
    )
    with far:
        enemy = Enemy(certs, far)
        await asyncio.gather(bridge.handshake(), asyncio.to_thread(enemy.handshake))
        far.sendall(enemy.complaint())
        error = await ended(bridge)
        assert isinstance(error, TlsError)
        assert error.alert == 20  # bad_record_mac
    assert heard == [error]


def test_a_tls_sink_is_watched_too(certs: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near, far = socket.socketpair()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certs.server.cert_path, certs.server.key_path)

        async def both() -> None:
            loop = asyncio.get_running_loop()
            bridge = create_bridge(
                socket=near,
                sink=f"tls://127.0.0.1:{listener.getsockname()[1]}",
                sink_credentials=Credentials.none(roots=certs.ca.cert),
                sink_hostname=certs.name,
                credentials=PSK,
            )
            other = create_bridge(socket=far, sink="null:", credentials=PSK, server_side=True)

            def serve() -> None:
                accepted, _ = listener.accept()
                accepted.settimeout(20)
                context.wrap_socket(accepted, server_side=True).close()  # says no goodbye

            async with asyncio.timeout(20):
                await asyncio.gather(bridge.handshake(), other.handshake(), loop.run_in_executor(None, serve))
            error = await ended(bridge)
            assert type(error) is ConnectionLost
            assert error.direction == "encapsulate", "what a sink says is on its way to the network"
            with suppress(SapperError):
                await other.stop()

        asyncio.run(both())
