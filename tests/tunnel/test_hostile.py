"""Strangers at both ports: floods, slow ones, lengths that lie, ends that take nothing. Others are served
meanwhile, and nothing of them is left."""

from __future__ import annotations

import asyncio
import math
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest

from sapper.errors import ConnectError, RemoteProtocolError
from sapper.testing import throwaway_certificates
from sapper.tunnel import ClientOptions, HandshakeStatus, TunnelClient, TunnelServer, events
from support.tunnel_ends import End
from support.tunnels import (
    CREDENTIALS,
    LATEST,
    Cutter,
    Service,
    asked,
    client,
    come,
    echo,
    first_of,
    server,
    until,
    visit,
)
from support.w3ptunl import DATA, MAGIC, OriginalClient, frame, message, read_message

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

# The beginning of a client's hello of TLS 1.3, and of requests of other protocols.
OPENINGS = (
    b"",
    b"W",
    MAGIC,
    MAGIC + b"\0\0",
    bytes.fromhex("160301007a010000760303"),
    b"GET / HTTP/1.1\r\n",
    b"\0" * 64,
)


@asynccontextmanager
async def strangers(port: int, number: int, *openings: bytes) -> AsyncIterator[list[Stream]]:
    """So many connections, each with one of the openings said."""
    openings = openings or OPENINGS
    there: list[Stream] = []
    try:
        for n in range(number):
            reader, writer = await visit(port)
            writer.write(openings[n % len(openings)])
            there.append((reader, writer))
        yield there
    finally:
        for _, writer in there:
            writer.transport.abort()


async def sent_away(reader: asyncio.StreamReader) -> None:
    """Waits for the end of a connection, in whichever way it comes."""
    with suppress(ConnectionError):
        while await asyncio.wait_for(reader.read(65_536), LATEST):
            pass


async def drip(writer: asyncio.StreamWriter, payload: bytes) -> None:
    """Says a byte at a time, for as long as it is let: what a deadline per read would never end."""
    with suppress(ConnectionError):
        for byte in payload:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.01)  # being slow is what it is about


async def client_error(heard: Any) -> events.ClientError:
    async with asyncio.timeout(LATEST):
        async for event in heard:
            if isinstance(event, events.ClientError):
                return event
    raise AssertionError("the events ended")


# -- the main port -------------------------------------------------------------------------------------


async def test_a_flood_at_the_main_port_holds_up_no_client(leak_check: None) -> None:
    async with Service(echo) as service, server(options={"handshake_timeout": 1.0}) as ours:
        async with strangers(ours.port or 0, 300) as there:
            async with client(ours.port or 0, service.port) as exposed:
                assert await asked(exposed.assigned_port or 0, b"in spite of them") == b"in spite of them"
                assert len(ours.status()) == 1, "nobody else has a tunnel"
                await asyncio.gather(*(sent_away(reader) for reader, _ in there))
                assert await asked(exposed.assigned_port or 0, b"and after") == b"and after"


@pytest.mark.parametrize("opening", [b"", MAGIC + b"\0\0"], ids=["silent", "speaking"])
async def test_strangers_in_every_place_give_way_to_a_client(opening: bytes, leak_check: None) -> None:
    """No deadline helps: it is an hour away."""
    options = {"max_clients": 1, "max_handshakes": 4, "handshake_timeout": 3_600.0}
    async with Service(echo) as service, server(options=options) as ours:
        async with strangers(ours.port or 0, 40, opening) as there:
            ends = [asyncio.create_task(sent_away(reader)) for reader, _ in there]
            await until(lambda: sum(end.done() for end in ends) == 36, "the end of all but four")
            async with client(ours.port or 0, service.port) as exposed:
                assert await asked(exposed.assigned_port or 0, b"in spite of them") == b"in spite of them"
                await until(lambda: sum(end.done() for end in ends) == 37, "the end of one more")
                # A stranger may see its end before its place is counted as free.
                last = HandshakeStatus(under_way=3, gave_way=37)
                await until(lambda: ours.handshakes() == last, "the place of one more")
        await asyncio.gather(*ends)
        await until(lambda: ours.handshakes().under_way == 0, "the end of the strangers")


async def test_strangers_are_gone_after_the_deadline(leak_check: None) -> None:
    async with server(options={"max_handshakes": 40, "handshake_timeout": 0.3}) as ours:
        heard = ours.events()
        async with strangers(ours.port or 0, 40, b"") as there:
            await asyncio.gather(*(sent_away(reader) for reader, _ in there))
            assert (await client_error(heard)).err.kind == "handshake_deadline"
            none = HandshakeStatus(under_way=0, gave_way=0)
            await until(lambda: ours.handshakes() == none, "the places of all of them")


async def test_strangers_from_one_address_push_out_only_each_other(leak_check: None) -> None:
    async with server(options={"max_handshakes": 4, "handshake_timeout": 3_600.0}) as ours:
        heard = ours.events()
        slow = await visit(ours.port or 0)
        await until(lambda: ours.handshakes().under_way == 1, "the slow client")
        there = [await come(ours.port or 0, "127.0.0.2") for _ in range(20)]
        assert (await client_error(heard)).err.context.reason == "too_many_handshakes"
        await asyncio.gather(*(sent_away(reader) for reader, _ in there[:17]))
        slow[1].write(message(CREDENTIALS))
        assert "port" in await read_message(slow[0])
        for _, writer in (slow, *there):
            writer.transport.abort()


async def test_clients_beyond_those_that_there_may_be_are_refused_and_come_again(leak_check: None) -> None:
    async with Service(echo) as service, server(options={"max_clients": 1}) as ours:
        port = ours.port or 0
        async with Cutter(port) as network, client(network.port, service.port) as first:
            original = OriginalClient(service.port)
            with pytest.raises(ValueError, match="too_many_clients"):
                await original.connect("127.0.0.1", port, {**CREDENTIALS, "n": 2})
            await original.close()
            given: Any = {"options": ClientOptions(reconnect_delay=(0.05, 0.2))}
            second = TunnelClient("127.0.0.1", port, service.port, {**CREDENTIALS, "n": 2}, **given)
            heard = second.events()
            coming = asyncio.create_task(second.connect())
            async with asyncio.timeout(LATEST):
                async for event in heard:
                    if isinstance(event, events.TunnelReconnectQueued):
                        break
            # The one that is there comes back to its session, though every place is taken: one of them by it.
            network.cut()
            await until(lambda: ours.status()[0].resumes == 1, "the client that was cut")
            assert await asked(first.assigned_port or 0, b"back") == b"back"
            await first.stop()
            public = await asyncio.wait_for(coming, LATEST)
            assert await asked(public, b"its turn") == b"its turn"
            await second.stop()


async def test_a_session_that_only_waits_gives_way_to_a_newcomer(leak_check: None) -> None:
    """The one without visitors that has waited longest, once its client had time to come back."""
    async with (
        Service(echo) as service,
        server(options={"max_clients": 3}) as ours,
        AsyncExitStack() as ends,
    ):
        gone: list[int] = []
        ours.on("tunnel-destroyed", lambda event: gone.append(event.client_tunnel.tunnel_address.port))
        links, ports = [], []
        for number in range(3):
            link = await ends.enter_async_context(Cutter(ours.port or 0))
            said = {**CREDENTIALS, "n": number}
            there = await ends.enter_async_context(client(link.port, service.port, credentials=said))
            links.append(link)
            ports.append(there.assigned_port or 0)
        reader, writer = await visit(ports[0])
        writer.write(b"before ")
        assert await asyncio.wait_for(reader.readexactly(7), LATEST) == b"before "
        for link, port in zip(links, ports, strict=True):
            link.refuses = True
            link.cut()
            await until(lambda port=port: not {one.port: one for one in ours.status()}[port].connected)  # type: ignore[misc]
        said = {**CREDENTIALS, "n": 9}
        async with client(ours.port or 0, service.port, credentials=said) as newcomer:
            assert gone == [ports[1]]
            assert await asked(newcomer.assigned_port or 0, b"a place") == b"a place"
            links[0].refuses = False
            writer.write(b"and after")
            assert await asyncio.wait_for(reader.readexactly(9), LATEST) == b"and after"
            # The place of the newcomer is nobody's now, and the port is still that of who gave way.
            await newcomer.stop()
            links[1].refuses = False
            await until(lambda: ports[1] in {one.port for one in ours.status()}, "who gave way")
        writer.close()


async def test_a_client_that_is_started_again_takes_the_place_that_it_had() -> None:
    async with Service(echo) as service, server(options={"max_clients": 1}) as ours:
        given: dict[str, Any] = {"port": ours.port, "service": service.port, "credentials": CREDENTIALS}
        dead = await End.start("client", **given, options={})
        await dead.kill()
        await until(lambda: not ours.status()[0].connected, "the end of its connection")
        # Another one with its credentials is not the same: it waits until the session's grace is over.
        other = TunnelClient(
            "127.0.0.1", ours.port or 0, 9, CREDENTIALS, options=ClientOptions(reconnect=False)
        )
        with pytest.raises(ConnectError) as raised:
            await asyncio.wait_for(other.connect(), LATEST)
        assert raised.value.context.reason == "too_many_clients"
        async with client(ours.port or 0, service.port) as again:
            assert again.assigned_port == dead.port
            assert await asked(dead.port, b"again") == b"again"


@pytest.mark.parametrize(
    "opening",
    [
        MAGIC + struct.pack(">I", 60_000) + b'{"id":"' + b"x" * 5_000,
        MAGIC + struct.pack(">I", 10_000) + b" " * 5_000,
    ],
    ids=["text", "blanks"],
)
async def test_a_client_that_drips_meets_the_deadline(opening: bytes, leak_check: None) -> None:
    async with server(options={"handshake_timeout": 0.4}) as ours:
        heard = ours.events()
        reader, writer = await visit(ours.port or 0)
        dripping = asyncio.create_task(drip(writer, opening))
        error = await client_error(heard)
        assert error.err.kind == "handshake_deadline"
        await sent_away(reader)
        writer.transport.abort()
        await dripping


async def test_a_tls_hello_that_drips_meets_the_deadline(leak_check: None) -> None:
    made = throwaway_certificates("localhost")
    async with server(tls=made.server_credentials(), options={"handshake_timeout": 0.4}) as ours:
        heard = ours.events()
        reader, writer = await visit(ours.port or 0)
        # A record of 500 bytes whose hello never ends.
        dripping = asyncio.create_task(drip(writer, bytes.fromhex("16030101f4010001f00303") + bytes(400)))
        assert (await client_error(heard)).err.kind == "handshake_deadline"
        await sent_away(reader)
        writer.transport.abort()
        await dripping


@pytest.mark.parametrize("length", [65_537, 67_108_864, 67_108_865, 2**32 - 1])
async def test_a_handshake_that_is_too_long_is_refused_by_its_length(length: int, leak_check: None) -> None:
    async with server(options={"handshake_timeout": 3_600.0}) as ours:
        heard = ours.events()
        reader, writer = await visit(ours.port or 0)
        writer.write(MAGIC + struct.pack(">I", length))
        assert (await client_error(heard)).err.kind == "remote_protocol"
        await sent_away(reader)
        writer.close()


@pytest.mark.parametrize(
    ("kind", "length"),
    [(0x10, 67_108_864), (0x10, 65_537 + 5), (0x11, 14), (0x20, 1_100), (0x00, 6), (0x7F, 6)],
    ids=["hello", "long hello", "ping", "open", "kind 0", "unknown kind"],
)
async def test_frames_that_lie_behind_the_handshake(kind: int, length: int, leak_check: None) -> None:
    """The answer offers our own frames: a peer that uses them falsely is sent away at its header."""
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port, credentials={**CREDENTIALS, "n": 1}) as exposed:
            reader, writer = await visit(ours.port or 0)
            writer.write(message(CREDENTIALS))
            assert (await asyncio.wait_for(reader.readexactly(7), LATEST)) == MAGIC
            writer.write(struct.pack(">IIB", length, 0, kind))
            await sent_away(reader)
            writer.close()
            assert await asked(exposed.assigned_port or 0, b"others go on") == b"others go on"
            await until(lambda: len(ours.status()) == 1, "the end of its tunnel")


# -- public ports --------------------------------------------------------------------------------------


async def test_a_flood_at_a_public_port(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            for _ in range(4):
                async with strangers(public, 100):
                    assert await asked(public, b"in spite of them") == b"in spite of them"
            await until(lambda: ours.status()[0].streams == 0, "the end of all streams")
            await until(lambda: exposed.status().streams == 0 and service.open == 0, "the service's ends")
            assert ours.status()[0].held < 100_000


async def test_visitors_that_drip_hold_up_nobody(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            slow = [await visit(public) for _ in range(50)]
            dripping = [asyncio.create_task(drip(writer, bytes(1_000))) for _, writer in slow]
            await until(lambda: ours.status()[0].streams == 50, "all of them")
            for n in range(20):
                payload = bytes([n]) * 50_000
                assert await asked(public, payload) == payload
            for _, writer in slow:
                writer.transport.abort()
            await asyncio.gather(*dripping)
            await until(lambda: service.open == 0, "the service's ends")


@pytest.mark.parametrize("reading", ["visitors", "service"])
async def test_four_hundred_that_take_nothing_stop_nobody(leak_check: None, reading: str) -> None:
    """More than the windows of as many streams that take what they get, in either direction."""
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        match await reader.read(1):
            case b"g":  # give: as much as anybody takes
                with suppress(ConnectionError):
                    for _ in range(16):
                        writer.write(bytes(65_536))
                        await writer.drain()
            case b"t":  # take nothing more
                await over.wait()
            case first:
                writer.write(first)
                await echo(reader, writer)

    async with Service(serve) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            here, there = await visit(public)
            taken: list[socket.socket] = []
            while len(taken) < 400:
                for _ in range(50):
                    one = socket.create_connection(("127.0.0.1", public))
                    one.setblocking(False)
                    one.send(b"g" if reading == "visitors" else b"t")
                    taken.append(one)
                # Not more at a time than the service's queue has room for.
                await until(lambda: service.connections > len(taken), "those who come")
            if reading == "service":
                for one in taken:
                    with suppress(BlockingIOError):
                        while one.send(bytes(65_536)):
                            await asyncio.sleep(0)
            held = -1
            while held != (held := ours.status()[0].held + exposed.status().held) or held == 0:
                await asyncio.sleep(0.5)  # until nothing moves any more
            async with asyncio.timeout(LATEST):
                for n in range(20):
                    there.write(bytes([n]))
                    assert await here.readexactly(1) == bytes([n])
                    payload = bytes([n + 128]) * 50_000
                    assert await asked(public, payload) == payload
            assert held <= 128 << 20
            assert ours.status()[0].resumes == 0
            for one in taken:
                one.close()
            over.set()
            there.close()
            await until(lambda: service.open == 0, "the service's ends")


async def test_visitors_beyond_the_limit_wait_for_their_place(leak_check: None) -> None:
    async with Service(echo) as service, server(options={"max_visitors": 3}) as ours:
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            idle = [await visit(public) for _ in range(3)]
            await until(lambda: ours.status()[0].streams == 3, "their streams")
            waits = asyncio.create_task(asked(public, b"patience"))
            for _, writer in idle[1:]:
                writer.write(b"x")
                writer.write_eof()
            assert await waits == b"patience"
            assert service.connections == 4, "nobody came in twice"
            for _, writer in idle:
                writer.close()


async def test_a_visitor_whose_tls_drips_reaches_nothing(leak_check: None) -> None:
    made = throwaway_certificates("localhost")
    given = {"visitor_tls": made.server_credentials(), "options": {"handshake_timeout": 0.4}}
    async with Service(echo) as service, server(**given) as ours:
        heard = ours.events()
        async with client(ours.port or 0, service.port) as exposed:
            reader, writer = await visit(exposed.assigned_port or 0)
            dripping = asyncio.create_task(drip(writer, bytes.fromhex("16030101f4010001f00303") + bytes(400)))
            async with asyncio.timeout(LATEST):
                async for event in heard:
                    if isinstance(event, events.VisitorError):
                        assert event.err.kind == "handshake_deadline"
                        break
            await sent_away(reader)
            writer.transport.abort()
            await dripping
            assert service.connections == 0


# -- ends that take nothing ----------------------------------------------------------------------------


async def pour(writer: asyncio.StreamWriter) -> None:
    """Sends for as long as somebody takes it."""
    with suppress(ConnectionError):
        while True:
            writer.write(bytes(65_536))
            await writer.drain()


async def comes_to_rest(ours: TunnelServer) -> int:
    """Waits until nothing moves any more; how much is held then."""
    before, same = -1, 0
    async with asyncio.timeout(LATEST):
        while same < 20:
            await asyncio.sleep(0.01)  # between two looks
            status = ours.status()[0]
            now = status.sent + status.received
            same = same + 1 if now == before else 0
            before = now
    return ours.status()[0].held


async def test_a_service_that_takes_nothing_costs_its_window(leak_check: None) -> None:
    taking = asyncio.Event()

    async def take_later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readexactly(1) == b"e":
            await echo(reader, writer)
            return
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await taking.wait()

    async with Service(take_later) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            _, writer = await visit(public)
            writer.write(b"s")
            pouring = asyncio.create_task(pour(writer))
            assert await comes_to_rest(ours) < 5_000_000, "what was not acknowledged is 4 MiB at most"
            assert exposed.status().held < 18_000_000, "a window grows to 16 MiB at most"
            assert not pouring.done(), "its sender is held up, nobody else"
            assert await asked(public, b"e" + b"y" * 100_000) == b"y" * 100_000
            writer.transport.abort()
            await pouring
            taking.set()
            await until(lambda: ours.status()[0].held < 100_000, "the memory's return")


async def test_a_client_that_reads_nothing_costs_a_bounded_amount(leak_check: None) -> None:
    async with server() as ours:
        reader, writer = await visit(ours.port or 0)
        writer.write(message(CREDENTIALS))
        await asyncio.wait_for(reader.readexactly(11), LATEST)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: ours.status(), "its tunnel")
        visitors = [await visit(ours.status()[0].port) for _ in range(8)]
        pouring = [asyncio.create_task(pour(one)) for _, one in visitors]
        await until(lambda: ours.status()[0].streams == 8, "the visitors")
        assert await comes_to_rest(ours) < 5_000_000
        writer.transport.abort()
        for one, _ in visitors:
            await sent_away(one)
        await asyncio.gather(*pouring)
        for _, end in visitors:
            end.close()
        await until(lambda: not ours.status(), "the tunnel's end")


@pytest.mark.parametrize("stream", [1, 77, 2**32 - 2])
async def test_an_original_client_that_answers_strangers_is_none(stream: int, leak_check: None) -> None:
    """It has every id from its server: frames of streams that were never opened are not the original's."""
    async with Service(echo) as service, server() as ours:
        seen: list[events.TunnelError] = []
        ours.on("tunnel-error", seen.append)
        peer = OriginalClient(service.port)
        async with asyncio.timeout(LATEST):
            public = await peer.connect("127.0.0.1", ours.port or 0, CREDENTIALS)
        assert await asked(public, b"served", end=False) == b"served"
        (opened, *_) = peer.frames[0]
        assert peer.carrier is not None
        peer.carrier.write(frame(opened, DATA, b"late") + frame(stream, DATA, b"who?" * 1_000))
        await until(lambda: not ours.status(), "the tunnel's end")
        await until(lambda: seen, "its error")
        assert isinstance(seen[0].err, RemoteProtocolError)
        assert str(stream) in str(seen[0].err)
        await peer.close()


async def test_visitors_that_reset_at_once(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            for _ in range(200):
                with socket.socket() as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    one.connect(("127.0.0.1", public))
            assert await asked(public, b"after them") == b"after them"
            await until(lambda: ours.status()[0].streams == 0 and service.open == 0, "their ends")


async def test_credentials_are_read_as_javascript_reads_them(leak_check: None) -> None:
    body = b'{"half": "\\ud800", "large": 1e999, "long": -%s, "small": 12}' % (b"9" * 6_000)
    said = {"half": "\ud800", "large": math.inf, "long": -math.inf, "small": 12}
    heard: list[Any] = []

    def hear(credentials: dict[str, Any]) -> bool:
        heard.append(credentials)
        return True

    async with server(connection_filter=hear) as ours, asyncio.timeout(LATEST):
        created = ours.events()
        reader, writer = await asyncio.open_connection("127.0.0.1", ours.port or 0)
        writer.write(MAGIC + struct.pack(">I", len(body)) + body)
        assert (await read_message(reader))["port"]
        assert heard == [said]
        tunnel = (await first_of(created, events.TunnelCreated)).client_tunnel
        assert tunnel.authentication_credentials == said
        writer.close()
