"""One direction only: what passes, and that TLS's own messages are heard all the same."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sapper.errors import RemoteProtocolError, SapperError
from sapper.testing import throwaway_certificates
from sapper.tls import Bridge, Credentials, TlsConfig, create_bridge
from support import traffic
from support.bridges import PSK, Pair, Wire, pair, receive, running, send

UNEXPECTED_MESSAGE, BAD_RECORD_MAC = 10, 20


@pytest.fixture(params=["certificate", "psk"])
def credentials(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a pair for each of the engines."""
    if request.param == "psk":
        return {"credentials": PSK}
    made = throwaway_certificates("localhost")
    return {
        # As a configuration, so that a second connection can resume the first one's session.
        "credentials": TlsConfig(credentials=Credentials.none(roots=made.authority)),
        "server_hostname": "localhost",
        "server": {"credentials": TlsConfig(credentials=made.server_credentials())},
    }


async def ended(two: Pair) -> SapperError | None:
    """What ended the client."""
    async with asyncio.timeout(20):
        try:
            await two.client.wait_closed()
        except SapperError as error:
            return error
    return None


@asynccontextmanager
async def heard(two: Pair) -> AsyncIterator[None]:
    """Leaves when something that happens within has come to the client."""
    before = two.client.stats().transport.receive_calls
    yield
    async with asyncio.timeout(20):
        while two.client.stats().transport.receive_calls == before:
            await asyncio.sleep(0.001)


async def test_encrypting_goes_on_through_key_updates_and_the_peers_end(
    credentials: dict[str, Any], leak_check: None
) -> None:
    async with running(pair(direction="encrypt-only", **credentials)) as two:
        await send(two.client_end, b"first")
        assert await receive(two.server_end, 5) == b"first"
        await two.server.update_keys()
        await two.client.update_keys()
        await send(two.client_end, b"under new keys")
        assert await receive(two.server_end, 14) == b"under new keys"
        # The peer's close_notify ends its direction, in which nothing came anyway; ours goes on.
        async with heard(two):
            two.server_end.shutdown(socket.SHUT_WR)
        await send(two.client_end, b"last")
        assert await receive(two.server_end, 4) == b"last"
        two.client_end.shutdown(socket.SHUT_WR)
        assert await receive(two.server_end, 1) == b""
        assert await ended(two) is None
        assert two.client.stats().decapsulate.bytes == 0


async def test_encrypting_keeps_the_tickets_that_come(credentials: dict[str, Any]) -> None:
    """What shows that a ticket was heard: the next connection resumes with it."""
    if "server" not in credentials:
        pytest.skip("pre-shared keys need no tickets: they are resumption already")
    resumed = []
    for _ in range(2):
        async with running(pair(direction="encrypt-only", **credentials)) as two:
            await send(two.client_end, b"x")
            await receive(two.server_end, 1)
            resumed.append((await two.client.handshake()).resumed)
            # The tickets lie in front of the peer's end.
            async with heard(two):
                two.server_end.shutdown(socket.SHUT_WR)
    assert resumed == [False, True]


async def test_encrypting_takes_no_data_and_says_so_to_the_peer(
    credentials: dict[str, Any], leak_check: None
) -> None:
    async with running(pair(direction="encrypt-only", **credentials)) as two:
        await send(two.server_end, b"not wanted")
        error = await ended(two)
        assert isinstance(error, RemoteProtocolError), error
        assert (error.phase, error.context.direction) == ("transfer", "decapsulate")
        assert (error.context.alert, error.context.alert_received) == (UNEXPECTED_MESSAGE, False)
        assert await receive(two.client_end, 1) == b"", "nothing of it reaches the sink"
        with pytest.raises(SapperError) as caught:
            await two.server.wait_closed()
        heard = caught.value.context
        assert (heard.alert, heard.alert_received) == (UNEXPECTED_MESSAGE, True)


@pytest.mark.parametrize("direction", ["encrypt-only", "decrypt-only"])
async def test_an_alert_of_the_peers_is_heard(
    direction: str, credentials: dict[str, Any], leak_check: None
) -> None:
    wire = Wire()
    async with running(pair(wire=wire.ends, direction=direction, **credentials)) as two:
        wire.corrupt()
        if direction == "encrypt-only":
            await send(two.client_end, b"arrives with a wrong bit")
        else:  # it sends nothing but TLS's own messages
            await two.client.update_keys()
        error = await ended(two)
        assert error is not None
        assert (error.context.alert, error.context.alert_received) == (BAD_RECORD_MAC, True)
        with pytest.raises(SapperError) as caught:
            await two.server.wait_closed()
        assert caught.value.reason == "bad_record_mac"
    wire.join()


async def test_decrypting_sends_nothing_and_goes_on_through_key_updates(
    credentials: dict[str, Any], leak_check: None
) -> None:
    async with running(pair(direction="decrypt-only", **credentials)) as two:
        await send(two.client_end, b"stays here")
        await send(two.server_end, b"first")
        assert await receive(two.client_end, 5) == b"first"
        await two.server.update_keys()
        await two.client.update_keys()
        await send(two.server_end, b"under new keys")
        assert await receive(two.client_end, 14) == b"under new keys"
        two.server_end.shutdown(socket.SHUT_WR)
        assert await ended(two) is None
        assert await receive(two.server_end, 1) == b"", "an end, and not a byte before it"
        assert two.client.stats().encapsulate.bytes == 0


async def test_two_of_one_direction_each_fit_together(leak_check: None) -> None:
    async with running(pair(direction="encrypt-only", server={"direction": "decrypt-only"})) as two:
        data = bytes(range(256)) * 4_000
        sending = asyncio.create_task(send(two.client_end, data))
        assert await receive(two.server_end, len(data)) == data
        await sending
        two.client_end.shutdown(socket.SHUT_WR)
        assert await receive(two.server_end, 1) == b""
        assert await ended(two) is None


@pytest.mark.parametrize("others", ["duplex", "the mirror"])
@pytest.mark.parametrize("direction", ["encrypt-only", "decrypt-only"])
async def test_superframes_go_one_way(
    direction: str, others: str, credentials: dict[str, Any], leak_check: None
) -> None:
    """Both ends say hello, whichever way packets go."""
    there = traffic.udp_packet("fd00::1", "fd00::2", b"there")
    encrypts = direction == "encrypt-only"
    mirror = "decrypt-only" if encrypts else "encrypt-only"
    options = {**credentials, "framing": "superframe", "direction": direction}
    options["server"] = {
        **options.pop("server", {}),
        "direction": mirror if others == "the mirror" else others,
    }
    async with running(pair(socket.SOCK_DGRAM, **options)) as two:
        sender, receiver = two.client_end, two.server_end
        if not encrypts:
            sender, receiver = receiver, sender
        await send(sender, there)
        assert await receive(receiver, len(there)) == there
        if others == "duplex" and encrypts:
            await send(two.server_end, there)
            error = await ended(two)
            assert isinstance(error, RemoteProtocolError), error
            assert (error.context.alert, error.context.alert_received) == (UNEXPECTED_MESSAGE, False)


async def test_a_superframe_behind_the_hello_is_data(leak_check: None) -> None:
    """Also where both come in one record."""
    near, far = socket.socketpair()
    raw, hand = socket.socketpair()
    bridge = create_bridge(
        socket=near, sink="counter:", credentials=PSK, framing="superframe", direction="encrypt-only"
    )
    peer = create_bridge(socket=far, sink=raw, credentials=PSK, server_side=True)
    packet = traffic.udp_packet("10.0.0.1", "10.0.0.2", b"not wanted")
    hello = b"SAPPERSF" + struct.pack(">BBHI", 1, 1, 0, 65_535)
    with hand:
        hand.sendall(hello + struct.pack(">I", 10 + len(packet)) + bytes(10) + packet)
        await asyncio.gather(bridge.handshake(), peer.handshake())
        peer.start()
        bridge.start()
        async with asyncio.timeout(20):
            with pytest.raises(RemoteProtocolError, match="only encrypts"):
                await bridge.wait_closed()
        await asyncio.gather(peer.stop(), return_exceptions=True)


@asynccontextmanager
async def delivered_unread(most: int) -> AsyncIterator[tuple[Bridge, socket.socket]]:
    """A bridge that handed all to its sink's system and left the sink's words unread; and who reads there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Most of it stays with the bridge's system until the reader reads.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sink = socket.create_connection(listener.getsockname())
        reader, _ = listener.accept()
    near, far = socket.socketpair()
    sender, fed = socket.socketpair()
    with reader, sender:
        reader.sendall(b"nobody reads this")
        reader.settimeout(20)
        server = create_bridge(
            socket=near, sink=sink, credentials=PSK, server_side=True, direction="decrypt-only"
        )
        client = create_bridge(socket=far, sink=fed, credentials=PSK, direction="encrypt-only")
        async with asyncio.timeout(20), server, client:
            server.start()
            client.start()
            await asyncio.to_thread(sender.sendall, bytes(most))
            sender.shutdown(socket.SHUT_WR)
            await client.wait_closed()
            while server.stats().decapsulate.bytes < most:
                await asyncio.sleep(0.001)
            yield server, reader


async def test_all_arrives_where_words_of_the_sink_lie_unread(leak_check: None) -> None:
    """TCP throws away what it has still to send where it is closed with bytes to read."""
    most = 400_000
    async with delivered_unread(most) as (server, reader):
        await asyncio.sleep(0.1)  # where it does not wait it has closed its socket by then
        arrived = await asyncio.to_thread(traffic.receive_all, reader)
        await server.wait_closed()
    assert len(arrived) == most


@pytest.mark.parametrize("stopped", [False, True], ids=["of itself", "stopped"])
async def test_a_sink_that_never_reads_does_not_keep_a_bridge(stopped: bool, leak_check: None) -> None:
    async with delivered_unread(400_000) as (server, _):
        if stopped:
            await server.stop()
        await server.wait_closed()
        assert server.state == "closed"
