"""What may lie under a TLS stream, and what a stream may be put under."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from sapper import tls
from sapper.errors import (
    ApiMisuseError,
    BusyError,
    ClosedError,
    ConfigError,
    ConnectionLost,
    SapperError,
)
from sapper.pump import connect as join
from sapper.stream import memory_pair
from sapper.tls import Credentials, TlsStream
from support.certs import Certificates

PSK = Credentials.psk("x", bytes(range(32)))


async def two(one: Any, other: Any, **options: Any) -> tuple[TlsStream, TlsStream]:
    return await asyncio.gather(
        tls.start_client(one, credentials=PSK, **options), tls.start_server(other, credentials=PSK)
    )


async def exchange(client: TlsStream, server: TlsStream, size: int = 500_000) -> None:
    """Some both ways, then an orderly end of both."""
    client.write(b"q" * size)
    client.write_eof()
    assert await server.read() == b"q" * size
    server.write(b"a" * size)
    assert await client.readexactly(size) == b"a" * size
    await asyncio.gather(client.aclose(), server.aclose())


@asynccontextmanager
async def closing(*streams: TlsStream) -> AsyncIterator[None]:
    async with asyncio.timeout(30):
        try:
            yield
        finally:
            for stream in streams:
                stream.abort()
            await asyncio.gather(*(stream.wait_closed() for stream in streams), return_exceptions=True)


async def test_tcp_by_name(any_loop: str, leak_check: None, certs: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        accepting = asyncio.to_thread(listener.accept)
        connecting = asyncio.create_task(
            tls.connect("localhost", port, credentials=Credentials.none(roots=certs.ca.cert))
        )
        peer, _ = await accepting
        server = await tls.start_server(
            peer, credentials=Credentials.certificate(certs.server.cert, certs.server.key)
        )
        client = await connecting
    async with closing(client, server):
        await exchange(client, server)


async def test_a_unix_socket_by_path(leak_check: None, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        connecting = asyncio.create_task(tls.start_client(f"unix:{path}", credentials=PSK))
        peer, _ = await asyncio.to_thread(listener.accept)
        server = await tls.start_server(peer, credentials=PSK)
        client = await connecting
    async with closing(client, server):
        await exchange(client, server)


async def test_pipes_and_descriptors_stay_the_callers(leak_check: None) -> None:
    to_server, to_client = os.pipe(), os.pipe()
    client, server = await two((to_client[0], to_server[1]), (to_server[0], to_client[1]))
    async with closing(client, server):
        client.write(b"through pipes")
        assert await server.readexactly(13) == b"through pipes"
    for number in (*to_server, *to_client):
        os.close(number)
    near, far = socket.socketpair()
    with near, far:
        client, server = await two(near.fileno(), far.fileno())
        async with closing(client, server):
            await exchange(client, server)


async def test_a_reader_and_writer_with_what_they_hold(any_loop: str, leak_check: None) -> None:
    near, far = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=near)
    far.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(far, b"220 go ahead\r\n")
    # The server's handshake begins while the client still reads lines.
    assert await reader.readline() == b"220 go ahead\r\n"
    writer.write(b"STARTTLS\r\n")
    assert await loop.sock_recv(far, 100) == b"STARTTLS\r\n"
    client, server = await two((reader, writer), far)
    async with closing(client, server):
        await exchange(client, server)


async def test_initial_data_is_the_beginning_of_the_ciphertext(leak_check: None) -> None:
    near, far = socket.socketpair()
    far.setblocking(False)
    shaking = asyncio.create_task(tls.start_client(near, credentials=PSK))
    begun = await asyncio.get_running_loop().sock_recv(far, 10)
    server = await tls.start_server(far, credentials=PSK, initial_data=begun)
    client = await shaking
    async with closing(client, server):
        await exchange(client, server)


async def test_a_transport_without_a_descriptor(leak_check: None) -> None:
    """Its ciphertext passes Python, and nothing else changes."""
    near, far = socket.socketpair()
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=near)
    hidden = Hidden(transport)
    client, server = await two(hidden, far)
    async with closing(client, server):
        await exchange(client, server)
    transport.abort()
    await asyncio.sleep(0)


class Hidden(asyncio.Transport):
    """A transport that keeps its descriptor to itself."""

    def __init__(self, inner: asyncio.Transport) -> None:
        super().__init__()
        self._inner = inner

    def __getattribute__(self, name: str) -> Any:
        if name in ("_inner", "get_extra_info", "__class__"):
            return super().__getattribute__(name)
        return getattr(self._inner, name)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


async def test_tls_in_tls(any_loop: str, leak_check: None) -> None:
    near, far = socket.socketpair()
    outer_client, outer_server = await two(near, far)
    outer_client.write(b"CONNECT\n")
    assert await outer_server.readline() == b"CONNECT\n"
    client, server = await two(outer_client, outer_server)
    async with closing(client, server):
        with pytest.raises(ClosedError) as gone:
            await outer_client.read(1)
        assert gone.value.reason == "taken"
        with pytest.raises(ClosedError):
            outer_client.write(b"x")
        await exchange(client, server, 2_000_000)
    # The session underneath ends with the one on top.
    await asyncio.gather(outer_client.wait_closed(), outer_server.wait_closed(), return_exceptions=True)
    assert outer_client._session().state == "closed"


async def test_tls_in_tls_takes_what_was_read_already() -> None:
    near, far = socket.socketpair()
    outer_client, outer_server = await two(near, far)
    shaking = asyncio.create_task(tls.start_client(outer_client, credentials=PSK))
    begun = await outer_server.readexactly(5)
    outer_server._held[:0] = begun  # as readuntil() does with what it looked at
    server = await tls.start_server(outer_server, credentials=PSK)
    client = await shaking
    async with closing(client, server):
        await exchange(client, server)


async def test_three_sessions_deep() -> None:
    client, server = await two(*memory_pair())
    for _ in range(2):
        client, server = await two(client, server)
    async with closing(client, server):
        await exchange(client, server)


async def test_a_stream_can_be_a_bridges_end(leak_check: None) -> None:
    """What a program began to read goes on natively: nobody copies bytes in Python."""
    client, server = await two(*memory_pair())
    client.write(b"first line\nthe rest")
    assert await server.readline() == b"first line\n"
    near, far = socket.socketpair()
    far.setblocking(False)
    pump = join(server, near)
    pump.start()
    async with closing(client):
        loop = asyncio.get_running_loop()
        data = b""
        while len(data) < 8:
            data += await loop.sock_recv(far, 100)
        assert data == b"the rest"
        await loop.sock_sendall(far, b"answer")
        assert await client.readexactly(6) == b"answer"
        far.close()
        assert await client.read() == b""
    await asyncio.gather(pump.wait_closed(), server.wait_closed(), return_exceptions=True)


async def test_what_cannot_be_taken_names_its_argument(leak_check: None) -> None:
    one, other = memory_pair()
    reading = asyncio.create_task(one.read(1))
    await asyncio.sleep(0)
    with pytest.raises(ConfigError) as wrong:
        await tls.start_client(one, credentials=PSK)
    assert (wrong.value.field, wrong.value.reason) == ("stream", "busy")
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    one.write(b"x" * 500_000)
    with pytest.raises(ConfigError):
        tls.create_bridge(socket=one, sink="null:", credentials=PSK)
    with pytest.raises(ConfigError):
        await tls.start_client(other, credentials=PSK, initial_data="text")  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as wrong:
        await tls.start_client(3.5, credentials=PSK)  # type: ignore[arg-type]
    assert wrong.value.field == "stream"
    one.abort()
    with pytest.raises(ConfigError) as wrong:
        await tls.start_client(one, credentials=PSK)
    assert wrong.value.reason == "closed"
    other.close()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with pytest.raises(ConfigError):
        await tls.start_server(memory_pair()[0], credentials=server_context)  # type: ignore[arg-type]


async def test_after_a_wrong_argument_nothing_was_taken() -> None:
    one, other = memory_pair()
    with pytest.raises(ConfigError):
        await tls.start_client(one, credentials=PSK, handshake_timeout=-1)
    one.write(b"still ours")
    assert await other.readexactly(10) == b"still ours"
    one.close()
    other.close()


async def test_bytes_behind_the_goodbye_come_back(leak_check: None, certs: Certificates) -> None:
    """A protocol that goes back to cleartext after TLS: what was read too far is not lost."""
    near, far = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs.server.cert_path, certs.server.key_path)

    def serve() -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = context.wrap_bio(incoming, outgoing, server_side=True)
        while True:
            try:
                session.do_handshake()
                break
            except ssl.SSLWantReadError:
                far.sendall(outgoing.read())
                incoming.write(far.recv(65_536))
        far.sendall(outgoing.read())
        session.write(b"last words")
        with suppress(ssl.SSLWantReadError):
            session.unwrap()
        far.sendall(outgoing.read() + b"250 cleartext again\r\n")
        far.close()

    serving = asyncio.create_task(asyncio.to_thread(serve))
    client = await tls.start_client(
        near, credentials=Credentials.none(roots=certs.ca.cert), server_hostname=certs.name
    )
    assert await client.read() == b"last words"
    await serving
    await client.aclose()
    assert await client.unused_data() == b"250 cleartext again\r\n"


async def test_unused_data_is_given_to_who_asks_while_the_end_comes(leak_check: None) -> None:
    for turn in range(150):
        client, server = await two(*socket.socketpair())
        server.write_eof()
        client.write_eof()
        # A bridge ends within such a time, and asks at each moment of it meet the one where it hears no more.
        moment = time.perf_counter() + turn * 3e-6
        while time.perf_counter() < moment:
            pass
        given = None
        while given is None:
            try:
                given = await client.unused_data()
            except ClosedError as error:
                raise AssertionError("what there is is lost") from error
            except ApiMisuseError:  # it has not ended
                await asyncio.sleep(0)
        assert given == b""
        await asyncio.gather(client.aclose(), server.aclose())


async def test_who_closes_hears_of_a_reset_that_lost_what_was_written(
    leak_check: None, certs: Certificates
) -> None:
    """The reset is seen by who reads, and nobody reads any more: all the same bytes were to be delivered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = asyncio.create_task(asyncio.to_thread(listener.accept))
        connecting = asyncio.create_task(
            tls.connect(*listener.getsockname(), credentials=PSK, close_timeout=3600.0)
        )
        peer, _ = await accepting
        kept = peer.dup()
        server, client = await asyncio.gather(tls.start_server(peer, credentials=PSK), connecting)
        client.write(b"x" * 30_000_000)
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.abort()
        await server.wait_closed()
        kept.close()
        with pytest.raises(ConnectionLost):
            await client.aclose()


async def test_a_goodbye_that_finds_nobody_is_no_wait(leak_check: None, certs: Certificates) -> None:
    """Both ends say theirs at once: the peer's TCP answers ours with a reset, and confirms nothing."""
    listener = tls.listen(
        ("127.0.0.1", 0),
        credentials=Credentials.certificate(certs.server.cert, certs.server.key),
        close_timeout=3600.0,
    )
    await listener

    def leave() -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=str(certs.ca.cert_path))
        session = context.wrap_bio(incoming, outgoing, server_hostname=certs.name)
        with socket.create_connection(("127.0.0.1", listener.port)) as near:
            while True:
                try:
                    session.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    near.sendall(outgoing.read())
                    incoming.write(near.recv(65_536))
            with suppress(ssl.SSLWantReadError):
                session.unwrap()
            near.sendall(outgoing.read())

    leaving = asyncio.create_task(asyncio.to_thread(leave))
    server = await anext(aiter(listener))
    await leaving
    async with asyncio.timeout(20):
        assert await server.read() == b""
        await server.aclose()
    await listener.aclose()


# -- memory pairs by themselves ----------------------------------------------------------------------


async def test_a_memory_pair_is_two_ends_of_one_stream(any_loop: str, leak_check: None) -> None:
    one, other = memory_pair()
    sent = os.urandom(1_000_000)
    one.write(sent)
    assert await other.readexactly(len(sent)) == sent
    reading = asyncio.create_task(one.readline())
    await asyncio.sleep(0)
    other.write(b"line\n")
    assert await reading == b"line\n"
    one.close()
    assert await other.read() == b""
    other.write(b"nobody reads this")
    await other.aclose()
    one, other = memory_pair()
    one.abort()
    with pytest.raises(ConnectionLost):
        await other.read(1)
    other.close()


async def test_closing_wakes_who_reads() -> None:
    one, other = memory_pair()
    reading = asyncio.create_task(one.read(1))
    await asyncio.sleep(0)
    one.close()
    with pytest.raises(SapperError):
        await reading
    with pytest.raises((ClosedError, BusyError)):
        await one.read(1)
    other.close()
