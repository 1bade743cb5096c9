"""With peers of the original, in both roles: each row of what it gets wrong is right with it too."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from sapper.errors import ConnectionLost, CredentialsRejected
from sapper.tunnel import ClientOptions, ClientStatus, TunnelClient, TunnelStatus, events
from support.tunnels import CREDENTIALS, LATEST, Service, asked, client, echo, server, until, visit
from support.w3ptunl import (
    CLOSE,
    DATA,
    MAGIC,
    OriginalClient,
    OriginalServer,
    frame,
    message,
    read_frame,
    read_message,
)

MUCH = 50_000_000


@asynccontextmanager
async def original_client(port: int, service_port: int) -> AsyncIterator[tuple[OriginalClient, int]]:
    peer = OriginalClient(service_port)
    try:
        async with asyncio.timeout(LATEST):
            public = await peer.connect("127.0.0.1", port, CREDENTIALS)
        yield peer, public
    finally:
        await peer.close()


@asynccontextmanager
async def original_server() -> AsyncIterator[OriginalServer]:
    peer = OriginalServer(CREDENTIALS)
    await peer.start()
    try:
        yield peer
    finally:
        await peer.close()


# -- the wire ------------------------------------------------------------------------------------------


async def test_an_original_client_is_served(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with original_client(ours.port or 0, service.port) as (peer, public):
            payload = random.Random(1).randbytes(300_000)
            assert await asked(public, payload, end=False) == payload
            assert isinstance(peer.answer["port"], int)
            assert {kind for _, kind, _ in peer.frames} <= {DATA, CLOSE}, "nothing else reaches it"
            ids = [stream for stream, _, _ in peer.frames]
            assert all(1 <= one <= 2**32 - 2 for one in ids)


async def test_tls_at_an_original_plain_server(leak_check: None) -> None:
    async with original_server() as peer:
        ours = TunnelClient(
            "127.0.0.1", peer.port, 9, CREDENTIALS, tls=True, options=ClientOptions(reconnect=False)
        )
        with pytest.raises(ConnectionLost, match="perhaps the port is plain: connect without TLS"):
            await asyncio.wait_for(ours.connect(), LATEST)


async def test_an_original_server_gets_the_credentials_as_they_are(leak_check: None) -> None:
    async with Service(echo) as service, original_server() as peer:
        async with client(peer.port, service.port) as ours:
            assert peer.seen == [CREDENTIALS]
            assert ours.assigned_port == peer.public_port
            payload = random.Random(2).randbytes(300_000)
            assert await asked(peer.public_port, payload, end=False) == payload


@pytest.mark.parametrize("length", [0, 1, 4, 67_108_865, 2**32 - 1])
async def test_lengths_that_lie_end_the_connection(length: int) -> None:
    async with Service(echo) as service, server() as ours:
        heard = ours.events()
        async with original_client(ours.port or 0, service.port) as (peer, _):
            assert peer.carrier is not None
            peer.carrier.write(length.to_bytes(4, "big"))
            await asyncio.wait_for(peer.ended.wait(), LATEST)
        async with asyncio.timeout(LATEST):
            async for event in heard:
                if isinstance(event, events.TunnelError):
                    assert "Declared message length" in event.err.message
                    break


async def test_a_frame_of_64_mib_streams_through() -> None:
    received = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        while data := await reader.read(1 << 20):
            received += len(data)

    async with Service(count) as service, original_server() as peer:
        async with client(peer.port, service.port) as ours:
            assert peer.carrier is not None
            size = 67_108_864 - 5
            peer.carrier.write((size + 5).to_bytes(4, "big") + (77).to_bytes(4, "big") + b"\x01")
            most = 0
            block = bytes(1 << 20)
            left = size
            while left:
                n = min(left, len(block))
                peer.carrier.write(block[:n])
                await peer.carrier.drain()
                left -= n
                most = max(most, ours.status().held)
            await until(lambda: received == size, "the whole frame")
            assert most < 8_000_000, "it was put together"


# -- what the original gets wrong ------------------------------------------------------------------------


async def test_a_download_is_whole_behind_a_close(leak_check: None) -> None:
    payload = random.Random(3).randbytes(MUCH)

    async def give(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(payload)
        await writer.drain()

    async with Service(give) as service, server() as ours:
        async with original_client(ours.port or 0, service.port) as (_, public):
            reader, writer = await visit(public)
            got = hashlib.sha256()
            size = 0
            while data := await asyncio.wait_for(reader.read(65_536), LATEST):
                got.update(data)
                size += len(data)
            writer.close()
            assert (size, got.digest()) == (MUCH, hashlib.sha256(payload).digest())


async def test_an_upload_is_whole_behind_a_close_of_an_original_server(leak_check: None) -> None:
    payload = random.Random(4).randbytes(5_000_000)
    got = b""
    done = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        got = await reader.read()
        done.set()

    async with Service(take) as service, original_server() as peer, client(peer.port, service.port):
        _, writer = await visit(peer.public_port)
        writer.write(payload)
        await writer.drain()
        writer.close()
        await asyncio.wait_for(done.wait(), LATEST)
        assert got == payload


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize("role", ["server", "client"])
async def test_a_short_upload_arrives(size: int, role: str, leak_check: None) -> None:
    got: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read())

    async with Service(take) as service:
        if role == "server":
            async with server() as ours, original_client(ours.port or 0, service.port) as (_, public):
                await _upload(public, bytes(size))
                await until(lambda: got, "the upload")
        else:
            async with original_server() as peer, client(peer.port, service.port):
                await _upload(peer.public_port, bytes(size))
                await until(lambda: got, "the upload")
    assert got == [bytes(size)]


async def _upload(port: int, payload: bytes) -> None:
    _, writer = await visit(port)
    writer.write(payload)
    await writer.drain()
    writer.close()


async def test_a_visitor_who_ended_its_direction_hears_the_answer(leak_check: None) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readexactly(100)
        writer.write(asked * 50)
        await writer.drain()

    async with Service(answer) as service, server() as ours:
        async with original_client(ours.port or 0, service.port) as (_, public):
            assert len(await asked(public, b"q" * 100)) == 5_000


async def test_a_service_that_speaks_first_is_heard(leak_check: None) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 ready\r\n")
        await writer.drain()
        await reader.read()

    async with Service(greet) as service, server() as ours:
        async with original_client(ours.port or 0, service.port) as (_, public):
            reader, writer = await visit(public)
            assert await asyncio.wait_for(reader.readline(), LATEST) == b"220 ready\r\n"
            writer.close()


async def test_late_data_does_not_dial_again(leak_check: None) -> None:
    async with Service(echo) as service, original_server() as peer, client(peer.port, service.port):
        carrier = peer.carrier
        assert carrier is not None
        carrier.write(frame(9, DATA, b"hello"))
        await until(lambda: (9, DATA, 5) in peer.received, "the echo")
        carrier.write(frame(9, CLOSE))
        carrier.write(frame(9, DATA, b"late"))
        carrier.write(frame(11, DATA, b"another"))
        await until(lambda: (11, DATA, 7) in peer.received, "the other stream")
        assert service.connections == 2


async def test_a_stalled_visitor_of_an_original_client_costs_a_bounded_amount(leak_check: None) -> None:
    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(bytes(65_536))
            await writer.drain()

    async with Service(pour) as service, server() as ours:
        async with original_client(ours.port or 0, service.port) as (_, public):
            reader, writer = await visit(public)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: ours.status() and ours.status()[0].held >= 1_000_000, "the bound")
            # It comes to rest: the service would pour for ever.
            before = -1
            async with asyncio.timeout(LATEST):
                while (now := ours.status()[0].received) != before:
                    before = now
                    await asyncio.sleep(0.1)
            assert ours.status()[0].held < 3_000_000
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            await asyncio.wait_for(reader.readexactly(2_000_000), LATEST)
            await until(lambda: ours.status()[0].received > before, "more")
            writer.close()


async def test_a_client_that_leaves_while_it_is_looked_at_leaves_nothing(leak_check: None) -> None:
    asked_about, decide = asyncio.Event(), asyncio.Event()

    async def slow(credentials: dict[str, object]) -> bool:
        asked_about.set()
        await decide.wait()
        return True

    async with server(connection_filter=slow) as ours:
        heard = ours.events()
        _reader, writer = await asyncio.open_connection("127.0.0.1", ours.port)
        writer.write(message(CREDENTIALS))
        await asyncio.wait_for(asked_about.wait(), LATEST)
        writer.transport.abort()
        names = []
        async with asyncio.timeout(LATEST):
            async for event in heard:
                names.append(event.name)
                if event.name == "client-disconnected":
                    break
        decide.set()
        assert "tunnel-created" not in names
        # The next one is decided on behind it.
        async with asyncio.timeout(LATEST), original_client(ours.port or 0, 9) as (_, public):
            async for event in heard:
                if isinstance(event, events.TunnelCreated):
                    break
            else:
                pytest.fail("the server ended")
            assert [one.id for one in ours.status()] == [event.client_tunnel.id]
            assert event.client_tunnel.tunnel_address == events.TunnelAddress(public)


async def test_a_second_handshake_while_the_filter_decides_is_refused(leak_check: None) -> None:
    asked_about, decide = asyncio.Event(), asyncio.Event()

    async def slow(credentials: dict[str, object]) -> bool:
        asked_about.set()
        await decide.wait()
        return True

    async with server(connection_filter=slow) as ours:
        reader, writer = await asyncio.open_connection("127.0.0.1", ours.port)
        writer.write(message(CREDENTIALS))
        await asyncio.wait_for(asked_about.wait(), LATEST)
        writer.write(message(CREDENTIALS))
        assert await asyncio.wait_for(reader.read(), LATEST) == b""
        decide.set()
        writer.close()
        assert ours.status() == ()


async def test_three_bytes_hold_no_place(leak_check: None) -> None:
    async with server(options={"handshake_timeout": 0.2}) as ours:
        heard = ours.events()
        reader, writer = await asyncio.open_connection("127.0.0.1", ours.port)
        writer.write(MAGIC[:3])
        with suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), LATEST) == b""
        writer.close()
        async with asyncio.timeout(LATEST):
            async for event in heard:
                if isinstance(event, events.ClientError):
                    assert event.err.kind == "handshake_deadline"
                    break


async def test_a_rejected_client_is_told(leak_check: None) -> None:
    async with server() as ours:
        heard = ours.events()
        reader, writer = await asyncio.open_connection("127.0.0.1", ours.port)
        writer.write(message({"id": "another"}))
        said = await asyncio.wait_for(read_message(reader), LATEST)
        assert said == {
            "error": {"code": "rejected", "message": "Client rejected by connection filter", "retry": False}
        }
        assert await asyncio.wait_for(reader.read(), LATEST) == b""
        writer.close()
        names = []
        async with asyncio.timeout(LATEST):
            async for event in heard:
                names.append(event.name)
                if event.name == "client-disconnected":
                    break
        assert names[-3:] == ["client-authentication-failed", "client-error", "client-disconnected"]

        mine = TunnelClient("127.0.0.1", ours.port or 0, 9, {"id": "another"})
        with pytest.raises(CredentialsRejected, match="rejected by connection filter"):
            await asyncio.wait_for(mine.connect(), LATEST)


async def test_an_original_server_that_refuses_is_asked_again_with_longer_pauses(leak_check: None) -> None:
    async with original_server() as peer:
        mine = TunnelClient(
            "127.0.0.1", peer.port, 9, {"id": "wrong"}, options=ClientOptions(reconnect_delay=(0.02, 0.16))
        )
        heard = mine.events()
        await mine.start()
        pauses = []
        async with asyncio.timeout(LATEST):
            async for event in heard:
                if isinstance(event, events.TunnelReconnectQueued):
                    pauses.append(event.timeout)
                    if len(pauses) == 6:
                        break
        await mine.stop()
        for pause, whole in zip(pauses, [0.02, 0.04, 0.08, 0.16, 0.16, 0.16], strict=True):
            assert whole / 2 <= pause <= whole
        assert len(set(pauses)) == 6, "chance spreads them"


# -- order of events -----------------------------------------------------------------------------------


async def test_the_order_of_events(leak_check: None) -> None:
    async with Service(echo) as service, original_server() as peer:
        async with server() as ours:
            heard = ours.events(data=True)
            async with original_client(ours.port or 0, service.port) as (_, public):
                assert await asked(public, b"x", end=False) == b"x"
                await until(lambda: _served(ours.status()[0]), "the visitor's end")
        server_names = [event.name async for event in heard]
        mine = TunnelClient("127.0.0.1", peer.port, service.port, CREDENTIALS)
        heard_too = mine.events(data=True)
        await mine.start()
        await asyncio.wait_for(peer.created.wait(), LATEST)
        assert await asked(peer.public_port, b"x", end=False) == b"x"
        await until(lambda: _served(mine.status()), "the visitor's end")
        await mine.stop()
        client_names = [event.name async for event in heard_too]
    assert [name for name in server_names if not name.startswith("data-")] == [
        "client-connected",
        "client-protocol-confirmed",
        "tunnel-created",
        "visitor-connected",
        "visitor-disconnected",
        "client-disconnected",
        "tunnel-destroyed",
        "main-server-end",
    ]
    assert {"data-from-visitor", "data-to-visitor"} <= set(server_names)
    assert [name for name in client_names if not name.startswith("data-")] == [
        "tunnel-connection-established",
        "authentication-credentials-sent",
        "tunnel-protocol-confirmed",
        "authentication-acknowledged",
        "service-connected",
        "service-disconnected",
        "tunnel-disconnected",
        "tunnel-client-end",
    ]
    assert {"data-from-service", "data-to-service"} <= set(client_names)


def _served(status: TunnelStatus | ClientStatus) -> bool:
    return (status.opened, status.streams) == (1, 0)


async def test_one_byte_goes_before_bulk_that_waits(leak_check: None) -> None:
    """Where the carrier takes nothing, little waits in front of it, in the system too: a word of another
    visitor comes before nearly all that a bulk stream has to say."""
    async with server() as ours:
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        link.connect(("127.0.0.1", ours.port or 0))
        reader, writer = await asyncio.open_connection(sock=link, limit=4_096)
        writer.write(message(CREDENTIALS))
        public = (await asyncio.wait_for(read_message(reader), LATEST))["port"]
        _, bulk = await visit(public)
        first, kind, payload = await asyncio.wait_for(read_frame(reader), LATEST)
        assert (kind, payload) == (DATA, b""), "so that a service can speak first"
        bulk.write(bytes(30_000_000))
        seen = -1
        while (now := ours.status()[0].sent) > seen:
            seen = now
            await asyncio.sleep(0.2)  # until nothing moves
        _, ping = await visit(public)
        ping.write(b"?")
        await until(lambda: ours.status()[0].streams == 2, "its stream")
        before = 0
        while True:
            stream, _, payload = await asyncio.wait_for(read_frame(reader), LATEST)
            if stream != first and payload == b"?":
                break
            before += len(payload)
        assert 0 < before < 700_000, f"{before} bytes go before one"
        for one in (writer, bulk, ping):
            one.transport.abort()


async def test_a_connection_to_nobody(leak_check: None) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        async with server() as ours, original_client(ours.port or 0, port) as (peer, public):
            with suppress(ConnectionError):
                reader, writer = await visit(public)
                assert await asyncio.wait_for(reader.read(), LATEST) == b""
                writer.close()
            await until(lambda: peer.dials == 1, "the dial")
