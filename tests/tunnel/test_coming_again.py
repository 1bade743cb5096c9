"""When a client comes again: its pauses grow until a tunnel stood; a refusal says if it may help."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from sapper.errors import (
    ConnectError,
    CredentialsRejected,
    HandshakeDeadline,
    IncompatiblePeer,
    PolicyDenied,
    SapperError,
)
from sapper.tunnel import ClientOptions, TunnelClient, events
from support.tunnels import CREDENTIALS, LATEST, Cutter, Service, client, echo, says, server, until, visit
from support.w3ptunl import DATA, frame, message, read_message

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Answer = Callable[[Stream, asyncio.Event], Awaitable[None]]
FIRST = 0.1
# What a client calls long: a tunnel that stood so long has worked.
LONG = 1.1


@asynccontextmanager
async def answering(answer: Answer, acknowledged: asyncio.Event) -> AsyncIterator[int]:
    """A server's port, at which each client gets that answer and the end behind it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await read_message(reader)
            await answer((reader, writer), acknowledged)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client gave up
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as there:
        yield there.sockets[0].getsockname()[1]


async def pauses(answer: Answer, number: int, handshake_timeout: float = LATEST) -> list[float]:
    """How long a client wants to wait after each of its first connections."""
    acknowledged = asyncio.Event()
    async with answering(answer, acknowledged) as port:
        options = ClientOptions(reconnect_delay=(FIRST, 30.0), handshake_timeout=handshake_timeout)
        client = TunnelClient("127.0.0.1", port, 9, CREDENTIALS, options=options)
        client.on("authentication-acknowledged", lambda event: acknowledged.set())
        heard = client.events()
        await client.start()
        found: list[float] = []
        async with asyncio.timeout(LATEST):
            async for event in heard:
                if isinstance(event, events.TunnelReconnectQueued):
                    acknowledged.clear()
                    found.append(event.timeout)
                    if len(found) == number:
                        break
        await client.stop()
        return found


def grow(found: list[float]) -> bool:
    """The second half of a pause is by chance: two that follow each other do not overlap."""
    return all(FIRST / 2 * 2**n <= pause <= FIRST * 2**n for n, pause in enumerate(found))


async def test_an_attempt_that_only_takes_long_has_not_worked(leak_check: None) -> None:
    async def nothing(stream: Stream, acknowledged: asyncio.Event) -> None:
        await stream[0].read()

    found = await pauses(nothing, 2, handshake_timeout=LONG)
    assert grow(found), found


async def test_a_handshake_without_a_tunnel_has_not_worked(leak_check: None) -> None:
    """A server of ours that offers, and does not say which ports there are."""

    async def offer(stream: Stream, acknowledged: asyncio.Event) -> None:
        stream[1].write(message({"port": 4_711, "sapper": {"versions": [1, 1], "capabilities": 31}}))
        await asyncio.sleep(LONG)  # the time that counts, if anything does

    found = await pauses(offer, 2)
    assert grow(found), found


async def test_a_client_that_is_refused_for_good_has_no_session_that_waits(leak_check: None) -> None:
    async with Service(echo) as local, server() as ours, Cutter(ours.port or 0) as network:
        port = ours.port or 0
        async with client(port, local.port) as there, client(network.port, local.port) as cut:
            one, other = await visit(there.assigned_port or 0), await visit(cut.assigned_port or 0)
            await says(one, b"one")
            await says(other, b"other")
            network.refuses = True
            network.cut()
            await until(lambda: [one.connected for one in ours.status()].count(False) == 1, "the cut")
            # Nobody with other credentials ends it.
            with pytest.raises(CredentialsRejected):
                await TunnelClient("127.0.0.1", port, 9, {"id": "somebody"}).connect()
            assert [one.streams for one in ours.status()] == [1, 1]
            ours.connection_filter = lambda credentials: False
            network.refuses = False
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(other[0].read(1), LATEST)
            # Whoever is there is not asked again.
            await says(one, b"one")
            assert [one.connected for one in ours.status()] == [True]
            for _, writer in (one, other):
                writer.close()


HELLO = 0x10
SESSION = bytes(range(16))


async def test_what_is_wrong_before_the_server_s_hello_costs_a_connection_and_not_the_session(
    leak_check: None,
) -> None:
    """A server that goes on and on with streams of the tunnel that it makes for an original client."""
    offer = message({"port": 4_711, "sapper": {"versions": [1, 1], "capabilities": 31}})
    asked_for: list[tuple[int, bytes]] = []

    async def serve(stream: Stream, acknowledged: asyncio.Event) -> None:
        reader, writer = stream
        writer.write(offer)
        length, _, kind = struct.unpack(">IIB", await reader.readexactly(9))
        hello = await reader.readexactly(length - 5)
        assert kind == HELLO
        asked_for.append((struct.unpack(">H", hello[2:4])[0], hello[20:36]))
        if len(asked_for) == 1:
            ours = struct.pack(">BBHIIII", 1, 1, 0, 31, 65_536, 100, 65_536) + SESSION + bytes(range(32))
            writer.write(frame(0, HELLO, ours + bytes(8) + b'{"port":4711,"ports":[4711]}'))
            await acknowledged.wait()
        elif len(asked_for) == 2:
            for one in range(1_025):
                writer.write(frame(2 + 2 * one, DATA))
            await writer.drain()
            assert await reader.read() == b"", "it ends"

    found: list[events.TunnelError] = []
    async with answering(serve, made := asyncio.Event()) as port:
        options = ClientOptions(reconnect_delay=(0.02, 0.05))
        mine = TunnelClient("127.0.0.1", port, 9, CREDENTIALS, options=options)
        mine.on("authentication-acknowledged", lambda event: made.set())
        mine.on("tunnel-error", found.append)
        await mine.start()
        await until(lambda: len(asked_for) == 3, "a third connection")
        await mine.stop()
    assert asked_for == [(0, bytes(16)), (1, SESSION), (1, SESSION)]
    # How the first connection ended is the network's matter.
    assert [one for one in found if "a Data frame is not allowed now" in str(one.err)]


@pytest.mark.parametrize("stands", [LONG, 0.0], ids=["long", "not long"])
async def test_after_a_tunnel_that_stood_the_pauses_are_short_again(stands: float, leak_check: None) -> None:
    async def serve(stream: Stream, acknowledged: asyncio.Event) -> None:
        stream[1].write(message({"port": 4_711}))
        await acknowledged.wait()
        await asyncio.sleep(stands)  # the time that counts

    found = await pauses(serve, 3)
    if stands:
        assert max(found) <= FIRST, found
    else:
        assert grow(found), found


REFUSALS = {
    "tls_required": (False, IncompatiblePeer, "plain_at_tls_port"),
    "services": (False, IncompatiblePeer, "services"),
    "rejected": (False, CredentialsRejected, "refused"),
    "a word of later": (False, PolicyDenied, "refused"),
    "a word of then": (True, ConnectError, "refused"),
    "too_many_clients": (True, ConnectError, "too_many_clients"),
}


@pytest.mark.parametrize("code", REFUSALS)
async def test_a_refusal_says_whether_it_may_help_to_come_again(code: str, leak_check: None) -> None:
    retry, kind, reason = REFUSALS[code]

    async def refuse(stream: Stream, acknowledged: asyncio.Event) -> None:
        stream[1].write(message({"error": {"code": code, "message": "no", "retry": retry}}))

    async with answering(refuse, asyncio.Event()) as port:
        # Of a client that comes again only a refusal for good is an error.
        options = ClientOptions(reconnect=not retry)
        client = TunnelClient("127.0.0.1", port, 9, CREDENTIALS, options=options)
        with pytest.raises(SapperError) as caught:
            await asyncio.wait_for(client.connect(), LATEST)
    assert type(caught.value) is kind
    assert (caught.value.reason, caught.value.retryable) == (reason, retry)


async def test_a_deadline_is_told_as_it_was_given(leak_check: None) -> None:
    async def nothing(stream: Stream, acknowledged: asyncio.Event) -> None:
        await stream[0].read()

    async with answering(nothing, asyncio.Event()) as port:
        options = ClientOptions(reconnect=False, handshake_timeout=0.3)
        with pytest.raises(HandshakeDeadline, match=r"did not answer within 0\.3 s"):
            await TunnelClient("127.0.0.1", port, 9, CREDENTIALS, options=options).connect()
    async with server(options={"handshake_timeout": 0.3}) as ours, asyncio.timeout(LATEST):
        heard = ours.events()
        _reader, writer = await visit(ours.port or 0)
        async for event in heard:
            if isinstance(event, events.ClientError):
                assert "took more than 0.3 s" in str(event.err)
                break
        writer.close()
