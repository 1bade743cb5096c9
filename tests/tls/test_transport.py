"""TLS as an asyncio transport and as an anyio stream: the rules of both."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import weakref
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute

from sapper import tls
from sapper.errors import CloseDeadline, ConfigError, ConnectionLost, SapperError
from sapper.stream import memory_pair
from sapper.tls import Credentials, TlsStream
from sapper.tls.byte_stream import TlsByteStream
from sapper.tls.transport import TlsTransport, create_connection, open_connection

PSK = Credentials.psk("x", bytes(range(32)))


class Recorder(asyncio.Protocol):
    """Keeps what it hears."""

    def __init__(self, keep_open: bool = True) -> None:
        self.keep_open = keep_open
        self.heard: list[str] = []
        self.data = bytearray()
        self.transport: Any = None
        self.error: Exception | None = None
        self.news = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.heard.append("made")

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.news.set()

    def eof_received(self) -> bool:
        self.heard.append("eof")
        self.news.set()
        return self.keep_open

    def pause_writing(self) -> None:
        self.heard.append("pause")

    def resume_writing(self) -> None:
        self.heard.append("resume")
        self.news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.heard.append("lost")
        self.error = exc
        self.news.set()

    async def until(self, what: Any) -> None:
        async with asyncio.timeout(20):
            while not what():
                self.news.clear()
                await self.news.wait()


@contextlib.asynccontextmanager
async def connected(
    protocol: Any = None, **options: Any
) -> AsyncIterator[tuple[TlsTransport, Any, TlsStream]]:
    one, other = memory_pair()
    (transport, made), server = await asyncio.gather(
        create_connection(lambda: protocol or Recorder(), stream=one, credentials=PSK, **options),
        tls.start_server(other, credentials=PSK),
    )
    async with asyncio.timeout(30):
        try:
            yield transport, made, server
        finally:
            transport.abort()
            server.abort()
            with contextlib.suppress(SapperError):
                await server.wait_closed()
            with contextlib.suppress(SapperError):
                await transport.stream.wait_closed()
            await asyncio.sleep(0)


async def test_bytes_both_ways_and_the_end_of_each(any_loop: str, leak_check: None) -> None:
    async with connected() as (transport, protocol, server):
        transport.write(b"hello")
        transport.writelines([b" and", bytearray(b" more")])
        assert await server.readexactly(14) == b"hello and more"
        server.write(b"answer")
        server.write_eof()
        await protocol.until(lambda: "eof" in protocol.heard)
        assert protocol.data == b"answer"
        transport.write(b"half-closed")
        transport.write_eof()
        assert await server.read() == b"half-closed"
        await protocol.until(lambda: "lost" in protocol.heard)
        assert (protocol.heard, protocol.error) == (["made", "eof", "lost"], None)


async def test_an_end_that_the_protocol_does_not_keep_open_closes(leak_check: None) -> None:
    async with connected(Recorder(keep_open=False)) as (transport, protocol, server):
        server.write(b"last")
        server.write_eof()
        await protocol.until(lambda: "lost" in protocol.heard)
        assert protocol.data == b"last"
        assert protocol.heard == ["made", "eof", "lost"]
        assert transport.is_closing()
        assert await server.read() == b""


async def test_paused_reading_holds_the_peer_back(leak_check: None) -> None:
    async with connected() as (transport, protocol, server):
        transport.pause_reading()
        assert not transport.is_reading()
        server.write(b"x" * 4_000_000)
        draining = asyncio.create_task(server.drain())
        done, _ = await asyncio.wait([draining], timeout=0.3)
        assert not done
        assert protocol.data == b""
        transport.resume_reading()
        await protocol.until(lambda: len(protocol.data) == 4_000_000)
        await draining


async def test_a_transport_without_a_variable_lives_on_behind_a_large_write(leak_check: None) -> None:
    lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    class Writer(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            transport.write(b"x" * 2_000_000)  # type: ignore[attr-defined]

        def connection_lost(self, exc: Exception | None) -> None:
            lost.set_result(exc)

    one, other = memory_pair()
    async with asyncio.timeout(30):
        made, server = await asyncio.gather(
            create_connection(Writer, stream=one, credentials=PSK), tls.start_server(other, credentials=PSK)
        )
        assert await server.readexactly(2_000_000) == b"x" * 2_000_000
        transport = weakref.ref(made[0])
        while made[0].get_write_buffer_size():
            await asyncio.sleep(0.001)
        del made
        gc.collect()
        assert transport() is not None
        server.write_eof()
        assert await server.read() == b""
        assert await lost is None
        await server.aclose()


async def test_a_full_transport_pauses_its_protocol(leak_check: None) -> None:
    async with connected() as (transport, protocol, server):
        transport.set_write_buffer_limits(high=1000, low=100)
        assert transport.get_write_buffer_limits() == (100, 1000)
        while "pause" not in protocol.heard:
            transport.write(b"y" * 100_000)
        assert transport.get_write_buffer_size() > 1000
        transport.write(b"z" * 100_000)
        assert protocol.heard.count("pause") == 1
        reading = asyncio.create_task(server.read())
        await protocol.until(lambda: "resume" in protocol.heard)
        assert transport.get_write_buffer_size() <= 100
        transport.close()
        assert (await reading).endswith(b"z" * 100_000)
        with pytest.raises(ValueError, match="high"):
            transport.set_write_buffer_limits(high=1, low=2)


async def test_close_delivers_and_abort_does_not(any_loop: str, leak_check: None) -> None:
    async with connected() as (transport, protocol, server):
        transport.write(b"d" * 1_000_000)
        transport.close()
        transport.write(b"too late: ignored, as asyncio does")
        assert len(await server.read()) == 1_000_000
        await protocol.until(lambda: "lost" in protocol.heard)
        assert protocol.error is None
    async with connected() as (transport, protocol, server):
        transport.abort()
        await protocol.until(lambda: "lost" in protocol.heard)
        with pytest.raises(ConnectionLost):
            await server.read()


async def test_who_closed_hears_that_what_was_written_did_not_arrive(leak_check: None) -> None:
    async with connected(close_timeout=0.3) as (transport, protocol, _server):
        transport.write(b"d" * 5_000_000)
        transport.close()
        await protocol.until(lambda: "lost" in protocol.heard)
        assert isinstance(protocol.error, CloseDeadline)


async def test_a_broken_connection_is_told_behind_its_bytes(leak_check: None) -> None:
    async with connected() as (_transport, protocol, server):
        server.write(b"before")
        await protocol.until(lambda: protocol.data == b"before")
        server.abort()
        await protocol.until(lambda: "lost" in protocol.heard)
        assert isinstance(protocol.error, ConnectionLost)
        assert "eof" not in protocol.heard


async def test_a_buffered_protocol(leak_check: None) -> None:
    class Buffered(asyncio.BufferedProtocol):
        def __init__(self) -> None:
            self.buffer = bytearray(10_000)
            self.data = bytearray()
            self.ended = asyncio.Event()

        def get_buffer(self, _hint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, n: int) -> None:
            self.data += self.buffer[:n]

        def eof_received(self) -> None:
            self.ended.set()

    async with connected(Buffered()) as (_transport, protocol, server):
        server.write(b"b" * 500_000)
        server.write_eof()
        await protocol.ended.wait()
        assert protocol.data == b"b" * 500_000


async def test_a_protocol_that_fails_loses_its_connection(leak_check: None) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    class Failing(Recorder):
        def data_received(self, data: bytes) -> None:
            raise ZeroDivisionError

    async with connected(Failing()) as (_transport, protocol, server):
        server.write(b"x")
        await protocol.until(lambda: "lost" in protocol.heard)
        with pytest.raises(ConnectionLost):
            await server.read()
    assert [type(one["exception"]) for one in complaints] == [ZeroDivisionError]


async def test_another_protocol_takes_over(leak_check: None) -> None:
    async with connected() as (transport, first, server):
        server.write(b"first")
        await first.until(lambda: first.data == b"first")
        second = Recorder()
        transport.set_protocol(second)
        assert transport.get_protocol() is second
        server.write(b"second")
        await second.until(lambda: second.data == b"second")
        assert first.data == b"first"
        with pytest.raises(TypeError):
            transport.write("text")  # type: ignore[arg-type]
        transport.write_eof()
        with pytest.raises(RuntimeError):
            transport.write(b"x")


async def test_asyncios_own_reader_and_writer(any_loop: str, leak_check: None) -> None:
    one, other = memory_pair()
    (reader, writer), server = await asyncio.gather(
        open_connection(stream=one, credentials=PSK), tls.start_server(other, credentials=PSK)
    )
    writer.write(b"line\n" * 100_000)
    draining = asyncio.create_task(writer.drain())
    assert await server.readexactly(500_000) == b"line\n" * 100_000
    await draining
    server.write(b"answer\n")
    assert await reader.readline() == b"answer\n"
    assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
    # TLS in TLS through the pair: what the reader holds comes along.
    inner_client, inner_server = await asyncio.gather(
        tls.start_client((reader, writer), credentials=PSK), tls.start_server(server, credentials=PSK)
    )
    inner_client.write(b"inside")
    assert await inner_server.readexactly(6) == b"inside"
    await asyncio.gather(inner_client.aclose(), inner_server.aclose())


async def test_what_is_wrong_is_named() -> None:
    for options in ({}, {"host": "x"}, {"host": "x", "port": 1, "stream": 3}):
        with pytest.raises(ConfigError):
            await create_connection(Recorder, **options)

    def broken() -> asyncio.Protocol:
        raise ZeroDivisionError

    one, other = memory_pair()
    made, server = await asyncio.gather(
        create_connection(broken, stream=one, credentials=PSK),
        tls.start_server(other, credentials=PSK),
        return_exceptions=True,
    )
    assert isinstance(made, ZeroDivisionError)
    if isinstance(server, TlsStream):
        with pytest.raises(ConnectionLost):
            await server.read()
        server.abort()
    else:  # the end came before its handshake was done
        assert isinstance(server, ConnectionLost)


# -- anyio -------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def anyio_pair(under: Any = None) -> AsyncIterator[tuple[TlsByteStream, TlsByteStream]]:
    one, other = under or memory_pair()
    client, server = await asyncio.gather(
        tls.start_client(one, credentials=PSK), tls.start_server(other, credentials=PSK)
    )
    with anyio.fail_after(30):
        async with TlsByteStream(client) as near, TlsByteStream(server, server_side=True) as far:
            yield near, far


async def test_anyio_ends_are_exceptions(any_loop: str, leak_check: None) -> None:
    async with anyio_pair() as (near, far):
        await near.send(b"hello")
        for none in (0, -1):
            with pytest.raises(ValueError, match="max_bytes"):
                await far.receive(none)
        assert await far.receive(3) == b"hel"
        assert await far.receive() == b"lo"
        await near.send_eof()
        for _ in range(2):
            with pytest.raises(anyio.EndOfStream):
                await far.receive()
        await far.send(b"still")
        assert await near.receive() == b"still"
        with pytest.raises(anyio.ClosedResourceError):
            await near.send(b"x")
        await far.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await far.receive()
        with pytest.raises(anyio.ClosedResourceError):
            await far.send(b"x")
        with pytest.raises(anyio.ClosedResourceError):
            await far.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await near.receive()
        await far.aclose()


async def test_anyio_iterates_over_pieces_and_a_large_send_waits(leak_check: None) -> None:
    async with anyio_pair() as (near, far):

        async def send() -> None:
            await near.send(b"p" * 3_000_000)
            await near.send_eof()

        async with anyio.create_task_group() as group:
            group.start_soon(send)
            assert sum([len(piece) async for piece in far]) == 3_000_000


async def test_anyio_two_tasks_at_one_end_are_refused() -> None:
    async with anyio_pair() as (near, far):
        async with anyio.create_task_group() as group:
            group.start_soon(far.receive)
            while far.stream._reader is None:
                await asyncio.sleep(0)
            with pytest.raises(anyio.BusyResourceError):
                await far.receive()
            await near.send(b"x")
        sending = asyncio.create_task(near.send(b"x" * 3_000_000))
        while not near._sending:
            await asyncio.sleep(0)
        with pytest.raises(anyio.BusyResourceError):
            await near.send(b"y")
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        near.stream.abort()


async def test_anyio_cancellation_loses_nothing_and_yields_first() -> None:
    async with anyio_pair() as (near, far):
        with anyio.move_on_after(0.05) as scope:
            await far.receive()
        assert scope.cancelled_caught
        await near.send(b"there")
        with anyio.CancelScope() as cancelled:
            cancelled.cancel()
            await far.receive()
        assert await far.receive() == b"there"


async def test_anyio_a_broken_connection_says_why() -> None:
    async with anyio_pair() as (near, far):
        near.stream.abort()
        with pytest.raises(anyio.BrokenResourceError) as broken:
            await far.receive()
        assert isinstance(broken.value.__cause__, ConnectionLost)


async def test_anyio_attributes() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    near_socket = socket.create_connection(listener.getsockname())
    far_socket, _ = listener.accept()
    listener.close()
    local, remote = near_socket.getsockname(), near_socket.getpeername()
    async with anyio_pair((near_socket, far_socket)) as (near, far):
        assert near.extra(TLSAttribute.tls_version) == "TLSv1.3"
        assert near.extra(TLSAttribute.server_side) is False
        assert far.extra(TLSAttribute.server_side) is True
        assert near.extra(TLSAttribute.alpn_protocol) is None
        assert near.extra(SocketAttribute.local_address) == local
        assert near.extra(SocketAttribute.remote_port) == remote[1]
        assert near.extra(SocketAttribute.raw_socket, None) is None
