"""TLS as a stream: reading, writing, both ends, cancellation, errors; on asyncio and uvloop."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
import socket
import ssl
import time
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any
from unittest.mock import Mock, patch

import pytest

from sapper import tls
from sapper._joining import build
from sapper.errors import (
    BusyError,
    CertificateError,
    CloseDeadline,
    ClosedError,
    ConfigError,
    ConnectionLost,
    CredentialsRejected,
    HandshakeDeadline,
    IdleDeadline,
    PolicyDenied,
    SapperError,
)
from sapper.stream import ByteStream, memory_pair
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, TlsStream
from sapper.tls.bridge import Bridge
from sapper.tls.transport import create_connection, open_connection

PSK = Credentials.psk("x", bytes(range(32)))


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


async def two(
    client: Any = None, server: Any = None, under: tuple[Any, Any] | None = None, **options: Any
) -> tuple[TlsStream, TlsStream]:
    one, other = under or memory_pair()
    return await asyncio.gather(
        tls.start_client(one, credentials=client or PSK, **options),
        tls.start_server(other, credentials=server or client or PSK),
    )


@asynccontextmanager
async def pair(*args: Any, **options: Any) -> AsyncIterator[tuple[TlsStream, TlsStream]]:
    async with asyncio.timeout(30):
        client, server = await two(*args, **options)
        try:
            yield client, server
        finally:
            client.abort()
            server.abort()
            for one in (client, server):
                with suppress(SapperError):
                    await one.wait_closed()


# -- bytes -------------------------------------------------------------------------------------------


async def test_bytes_go_both_ways(any_loop: str, leak_check: None, made: ThrowawayCertificates) -> None:
    credentials = made.client_credentials(), made.server_credentials(ask_clients=True)
    async with pair(*credentials, server_hostname="localhost") as (client, server):
        assert (client.info.version, client.info.engine) == ("TLSv1.3", "rustls")
        assert server.info.server_name == "localhost"
        assert server.info.peer_certificate is not None
        client.write(b"question")
        await client.drain()
        assert await server.read(100) == b"question"
        server.write(b"answer")
        server.write_eof()
        assert await client.read() == b"answer"
        assert await client.read() == b""
        assert client.at_eof()
        client.write(b"after the answer")  # half-closed: our direction goes on
        assert await server.readexactly(16) == b"after the answer"
        async with asyncio.timeout(20):
            while client.stats().encapsulate.bytes < 24:  # they are counted when they have gone
                await asyncio.sleep(0.005)


async def test_much_arrives_unchanged_and_a_slow_reader_holds_the_writer(leak_check: None) -> None:
    payload = random.Random(1).randbytes(5_000_000)
    async with pair() as (client, server):
        client.write(payload)
        draining = asyncio.create_task(client.drain())
        # Nobody reads: what native memory on the way takes is bounded, the rest waits in Python.
        done, _ = await asyncio.wait([draining], timeout=0.3)
        assert not done
        received = hashlib.sha256()
        left = len(payload)
        buffer = bytearray(100_000)
        while left:
            n = await server.readinto(buffer)
            received.update(memoryview(buffer)[:n])
            left -= n
        await draining
        assert received.digest() == hashlib.sha256(payload).digest()


async def test_write_copies_what_may_change(leak_check: None) -> None:
    async with pair() as (client, server):
        mutable = bytearray(b"a" * 1_000_000)
        client.write(mutable)
        mutable[:] = b"b" * len(mutable)
        client.write(memoryview(b"cc")[::1])
        assert await server.readexactly(1_000_002) == b"a" * 1_000_000 + b"cc"
        with pytest.raises(ConfigError):
            client.write("text")  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            client.write(memoryview(b"abcd")[::2])


async def test_the_ways_to_read(any_loop: str) -> None:
    async with pair() as (client, server):
        client.write(b"line one\nline two\r\n\r\nexactly12345rest")
        assert await server.readline() == b"line one\n"
        assert await server.readuntil(b"\r\n\r\n") == b"line two\r\n\r\n"
        assert await server.readexactly(7) == b"exactly"
        assert await server.read(0) == b""
        small = bytearray(3)
        assert await server.readinto(small) == 3
        assert small == b"123"
        client.write(b"more")
        client.write_eof()
        assert await server.read() == b"45restmore"
        with pytest.raises(asyncio.IncompleteReadError) as ended:
            await server.readexactly(1)
        assert (ended.value.partial, ended.value.expected) == (b"", 1)
        assert await server.readline() == b""
        server.writelines([b"a\n", bytearray(b"b\n"), b"c"])
        server.write_eof()
        assert [line async for line in client] == [b"a\n", b"b\n", b"c"]


async def test_at_eof_takes_nothing_from_a_read_that_waits() -> None:
    one, other = memory_pair()
    assert one._door is not None
    reading = asyncio.create_task(one.read(100))
    await asyncio.sleep(0)
    with patch.object(one, "_door", Mock(wraps=one._door, available=lambda: 0)):  # they come a moment later
        other.write(b"in order")
        assert not one.at_eof()
    assert await reading == b"in order"
    one.close()
    other.close()


async def test_readinto_refuses_a_buffer_whatever_was_fetched_before() -> None:
    one, other = memory_pair()
    for fetched in (False, True):
        other.write(b"line\nrest")
        if fetched:
            assert await one.readline() == b"line\n"
        for buffer in (bytearray(), b"read only", memoryview(bytearray(10))[::2], "text"):
            with pytest.raises(ConfigError):  # 0 would be the end
                await one.readinto(buffer)  # type: ignore[arg-type]
        assert await one.read(100) == (b"rest" if fetched else b"line\nrest")
    one.close()
    other.close()


async def test_who_answers_a_peer_that_ended_and_broke_off_hears_that_it_is_lost(leak_check: None) -> None:
    async with pair() as (client, server):
        client.write(b"question")
        client.write_eof()
        assert await server.read() == b"question"
        client.abort()
        with suppress(SapperError):
            await client.wait_closed()
        server.write(b"x" * 100_000)  # native memory takes all of it
        with pytest.raises(ConnectionLost):
            await server.aclose()


async def test_the_end_in_the_middle_gives_what_there_was() -> None:
    async with pair() as (client, server):
        client.write(b"only this")
        client.write_eof()
        with pytest.raises(asyncio.IncompleteReadError) as ended:
            await server.readexactly(100)
        assert ended.value.partial == b"only this"
        server.write(b"no separator")
        server.write_eof()
        with pytest.raises(asyncio.IncompleteReadError) as ended:
            await client.readuntil(b"\n")
        assert ended.value.partial == b"no separator"


async def test_a_line_without_an_end_is_bounded() -> None:
    async with pair() as (client, server):
        client.write(b"x" * 200_000)
        with pytest.raises(asyncio.LimitOverrunError):
            await server.readline()
        assert len(await server.readexactly(200_000)) == 200_000  # nothing was thrown away


async def test_random_pieces_are_one_stream() -> None:
    random_source = random.Random(7)
    payload = random_source.randbytes(1_500_000)

    async def send(stream: TlsStream) -> None:
        at = 0
        while at < len(payload):
            n = random_source.choice([1, 10, 1000, 70_000, 300_000])
            stream.write(payload[at : at + n])
            at += n
            if random_source.random() < 0.5:
                await stream.drain()
        stream.write_eof()
        await stream.drain()

    async with pair() as (client, server):
        sending = asyncio.create_task(send(client))
        received = bytearray()
        readers = random.Random(8)
        while True:
            match readers.randrange(3):
                case 0:
                    data = await server.read(readers.choice([1, 100, 65_536]))
                case 1:
                    buffer = bytearray(readers.choice([1, 5_000, 100_000]))
                    data = bytes(buffer[: await server.readinto(buffer)])
                case _:
                    try:
                        data = await server.readexactly(readers.choice([1, 3_000, 400_000]))
                    except asyncio.IncompleteReadError as end:
                        data = end.partial
            received += data
            if not data and server.at_eof():
                break
        await sending
        assert received == payload


# -- cancellation, misuse ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["read", "readexactly", "readuntil", "readinto", "read to the end"])
async def test_a_cancelled_read_loses_nothing(any_loop: str, way: str) -> None:
    async with pair() as (client, server):
        client.write(b"first half, ")
        await client.drain()
        buffer = bytearray(100)
        reads: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
            "read": lambda: server.read(100),
            "readexactly": lambda: server.readexactly(24),
            "readuntil": lambda: server.readuntil(b"."),
            "readinto": lambda: server.readinto(buffer),
            "read to the end": lambda: server.read(),
        }
        if way in ("read", "readinto"):  # they end with what is there: have them wait
            assert await server.readexactly(12) == b"first half, "
        reading: asyncio.Task[Any] = asyncio.create_task(reads[way]())
        while server._reader is None:
            await asyncio.sleep(0)
        client.write(b"second half.")
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        expected = b"second half." if way in ("read", "readinto") else b"first half, second half."
        assert await server.readexactly(len(expected)) == expected


async def test_cancelling_at_the_moment_of_arrival_loses_nothing() -> None:
    async with pair() as (client, server):
        sent = received = 0
        for delay in range(60):
            reading = asyncio.create_task(server.read(100))
            client.write(b"x" * 10)
            sent += 10
            for _ in range(delay):
                await asyncio.sleep(0)
            reading.cancel()
            with suppress(asyncio.CancelledError):
                received += len(await reading)
        client.write_eof()
        received += len(await server.read())
        assert received == sent


async def test_two_reads_at_a_time_are_refused() -> None:
    async with pair() as (client, server):
        reading = asyncio.create_task(server.read(10))
        while server._reader is None:
            await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await server.read(10)
        client.write(b"x")
        assert await reading == b"x"


async def test_who_never_drains_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapper.stream.WRITE_LIMIT", 1_000_000)
    async with pair() as (client, _server):

        def write_without_end() -> None:
            for _ in range(1000):
                client.write(b"x" * 100_000)

        with pytest.raises(BusyError) as refused:
            write_without_end()
        assert refused.value.reason == "write_limit"


async def test_after_the_end_of_our_direction_nothing_is_written() -> None:
    async with pair() as (client, server):
        client.write_eof()
        client.write_eof()
        with pytest.raises(ClosedError):
            client.write(b"x")
        server.close()
        with pytest.raises(ClosedError):
            server.write(b"x")
        with pytest.raises(ClosedError):
            server.write_eof()
        with pytest.raises(ClosedError):
            await server.read(1)
        server.close()


# -- ends and errors -------------------------------------------------------------------------------------


async def test_close_delivers_what_was_written(any_loop: str, leak_check: None) -> None:
    async with pair() as (client, server):
        client.write(b"y" * 700_000)
        client.close()
        assert client.is_closing()
        data, _ = await asyncio.gather(server.read(), client.wait_closed())
        assert len(data) == 700_000


async def test_close_does_not_wait_for_a_peer_that_goes_on_sending() -> None:
    async with pair(close_timeout=3600.0) as (client, server):
        server.write(b"z" * 3_000_000)
        await client.read(10)
        async with asyncio.timeout(20):
            await client.aclose()


async def test_a_peer_that_reads_nothing_holds_close_no_longer_than_its_time(leak_check: None) -> None:
    async with pair(close_timeout=0.3) as (client, _server):
        client.write(b"z" * 5_000_000)
        async with asyncio.timeout(20):
            client.close()
            # What was written has not arrived, whether it waited in native memory or in Python.
            with pytest.raises(CloseDeadline, match=r"at least \d+ bytes are lost") as late:
                await client.wait_closed()
        assert late.value.phase == "close"


async def test_who_gives_a_close_no_time_wants_nothing_delivered(leak_check: None) -> None:
    async with pair(close_timeout=0.0) as (client, _server):
        client.write(b"z" * 5_000_000)
        async with asyncio.timeout(20):
            await client.aclose()


async def test_an_end_without_goodbye_is_an_error_behind_the_bytes(any_loop: str) -> None:
    async with cut_cable() as (client, cut):
        assert await client.readexactly(5) == b"hello"
        cut()
        with pytest.raises(ConnectionLost) as lost:
            await client.read(10)
        assert lost.value.reason == "truncated"
        with pytest.raises(ConnectionLost):
            await client.read(10)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_handshake_that_is_given_up_looks_like_no_orderly_end(
    version: ssl.TLSVersion, made: ThrowawayCertificates, monkeypatch: pytest.MonkeyPatch, leak_check: None
) -> None:
    """The peer is done with it, and we before we hear so: it must not read an empty answer."""
    bridges: list[Bridge] = []

    def noted(*args: Any, **options: Any) -> Bridge:
        bridges.append(build(*args, **options))
        return bridges[-1]

    monkeypatch.setattr("sapper.tls.stream.build", noted)
    near, far = socket.socketpair()
    server = made.server_credentials()
    task = asyncio.create_task(tls.start_server(near, credentials=server))
    while not bridges:
        await asyncio.sleep(0)
    context = ssl.create_default_context(cadata=made.authority.decode())
    context.maximum_version = version
    far.settimeout(20)
    # This thread is the loop's, which hears of nothing meanwhile.
    with context.wrap_socket(far, server_hostname="localhost", suppress_ragged_eofs=False) as client:
        until = time.monotonic() + 20
        while bridges[0].state != "ready":
            assert time.monotonic() < until
            time.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await bridges[0].wait_closed()
        with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
            client.recv(1)


@asynccontextmanager
async def cut_cable() -> AsyncIterator[tuple[TlsStream, Any]]:
    """A client whose way to the server goes through two sockets that a test cuts."""
    near, far = socket.socketpair()
    ours, theirs = socket.socketpair()

    async def carry(source: socket.socket, sink: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, 65_536):
            await loop.sock_sendall(sink, data)

    far.setblocking(False)
    theirs.setblocking(False)
    carrying = [asyncio.create_task(carry(far, theirs)), asyncio.create_task(carry(theirs, far))]
    client, server = await two(under=(near, ours))
    server.write(b"hello")

    def cut() -> None:
        for task in carrying:
            task.cancel()
        far.close()

    try:
        yield client, cut
    finally:
        cut()
        await asyncio.gather(*carrying, return_exceptions=True)
        theirs.close()
        client.abort()
        server.abort()
        await asyncio.gather(client.wait_closed(), server.wait_closed(), return_exceptions=True)


async def test_abort_is_no_orderly_end(leak_check: None) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(listener.getsockname())
    far, _ = listener.accept()
    listener.close()
    async with pair(under=(near, far)) as (client, server):
        server.write(b"before")
        assert await client.readexactly(6) == b"before"
        server.abort()
        with pytest.raises(ConnectionLost):
            await client.read(1)


async def test_an_exception_in_the_block_aborts() -> None:
    async with pair() as (client, server):
        with pytest.raises(ZeroDivisionError):
            async with client:
                raise ZeroDivisionError
        assert client.is_closing()
        with pytest.raises(ConnectionLost):
            await server.read()


async def test_silence_meets_the_idle_deadline() -> None:
    async with pair(idle_timeout=0.2) as (client, _server):
        with pytest.raises(IdleDeadline):
            await client.read(1)
        with pytest.raises(IdleDeadline):
            await client.drain()


async def test_a_writer_hears_of_a_peer_that_is_gone() -> None:
    async with pair() as (client, server):
        server.abort()
        await asyncio.gather(server.wait_closed(), return_exceptions=True)

        async def write_without_end() -> None:
            while True:
                client.write(b"x" * 100_000)
                await client.drain()

        with pytest.raises(SapperError):
            await write_without_end()


async def test_a_forgotten_stream_warns_and_ends() -> None:
    client, server = await two()
    await asyncio.sleep(0)  # the loop itself holds the last result for one more turn
    kept = [client]
    del client
    with pytest.warns(ResourceWarning, match="unclosed"):
        kept.clear()
    async with asyncio.timeout(20):
        assert await server.read() == b""
        await server.aclose()


async def test_handshake_errors_are_raised_and_leave_nothing(
    any_loop: str, leak_check: None, made: ThrowawayCertificates
) -> None:
    for client, server, hostname, expected in [
        (made.client_credentials(), made.server_credentials(), "elsewhere", CertificateError),
        (PSK, Credentials.psk("x", b"other" * 8), None, CredentialsRejected),
    ]:
        one, other = memory_pair()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outcome = await asyncio.gather(
                tls.start_client(one, credentials=client, server_hostname=hostname),
                tls.start_server(other, credentials=server),
                return_exceptions=True,
            )
        assert any(isinstance(error, expected) for error in outcome), outcome
        assert all(isinstance(error, SapperError) for error in outcome), outcome


async def test_a_peer_that_says_nothing_meets_the_deadline(leak_check: None) -> None:
    near, far = socket.socketpair()
    with far, pytest.raises(HandshakeDeadline):
        await tls.start_client(near, credentials=PSK, handshake_timeout=0.15)


async def test_cancelling_the_handshake_leaves_nothing(leak_check: None) -> None:
    near, far = socket.socketpair()
    with far:
        shaking = asyncio.create_task(tls.start_client(near, credentials=PSK))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        shaking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await shaking


async def test_a_policy_decides(made: ThrowawayCertificates) -> None:
    async def no(_peer: tls.Peer) -> bool:
        return False

    one, other = memory_pair()
    denied, client = await asyncio.gather(
        tls.start_server(one, credentials=PSK, peer_policy=no),
        tls.start_client(other, credentials=PSK),
        return_exceptions=True,
    )
    assert isinstance(denied, PolicyDenied)
    # In TLS 1.3 the client was done before the server decided; it hears of it from its first read.
    assert isinstance(client, TlsStream)
    with pytest.raises(CredentialsRejected):
        await client.read(1)
    client.abort()


# -- keys -------------------------------------------------------------------------------------------------


async def test_exporter_and_new_keys(made: ThrowawayCertificates) -> None:
    async with pair(made.client_credentials(), made.server_credentials(), server_hostname="localhost") as (
        client,
        server,
    ):
        ours = await client.export_keying_material("EXPERIMENTAL sapper", 32, b"context")
        assert ours == await server.export_keying_material("EXPERIMENTAL sapper", 32, b"context")
        assert len(ours) == 32
        assert await client.channel_binding() == await server.channel_binding()
        assert client.info.server_end_point == server.info.server_end_point is not None
        await client.update_keys()
        client.write(b"under new keys")
        assert await server.readexactly(14) == b"under new keys"


async def test_what_python_libraries_ask(made: ThrowawayCertificates) -> None:
    listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    near = socket.create_connection(listener.getsockname()[:2])
    far, _ = listener.accept()
    listener.close()
    peer = near.getpeername()
    credentials = made.client_credentials(), made.server_credentials(ask_clients=True)
    async with pair(*credentials, under=(near, far), server_hostname="localhost") as (client, server):
        assert client.get_extra_info("peername") == peer
        assert client.get_extra_info("sockname") == server.get_extra_info("peername")
        session = client.get_extra_info("ssl_object")
        assert session.version() == "TLSv1.3"
        assert session.getpeercert(True) == client.info.peer_certificate
        assert ("DNS", "localhost") in client.get_extra_info("peercert")["subjectAltName"]
        assert session.cipher()[2] in (128, 256)
        assert client.get_extra_info("socket").family == socket.AF_INET6
        assert client.get_extra_info("nothing", 5) == 5


def test_without_a_loop_there_is_no_stream() -> None:
    with pytest.raises(SapperError):
        ByteStream()
    with pytest.raises(SapperError):
        memory_pair()


def test_streams_of_other_loops_are_not_left_open() -> None:
    async def make() -> ByteStream:
        return memory_pair()[0]

    stream = asyncio.run(make())
    assert not stream.is_closing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del stream
        gc.collect()


async def test_a_name_that_is_no_option_is_refused_as_python_does(made: ThrowawayCertificates) -> None:
    """Options are said once, in a typed dictionary: a typing error is found without a type checker too."""
    identity: Any = Credentials.certificate(*made.server)
    calls: dict[str, Callable[[], Any]] = {
        "connect": lambda: tls.connect("127.0.0.1", 1, conect_timeout=1.0),  # type: ignore[call-arg]
        "start_client": lambda: tls.start_client(("127.0.0.1", 1), limit=1),  # type: ignore[call-arg]
        # A server's clients say whom they want.
        "start_server": lambda: tls.start_server(
            ("127.0.0.1", 1),
            credentials=identity,
            server_hostname="x",  # type: ignore[call-arg]
        ),
        "create_connection": lambda: create_connection(asyncio.Protocol, "127.0.0.1", 1, ssl=None),  # type: ignore[call-arg]
        "open_connection": lambda: open_connection("127.0.0.1", 1, ssl=None),  # type: ignore[call-arg]
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument"):
            await call()
    with pytest.raises(TypeError, match=r"^listen\(\) got an unexpected keyword argument 'connect_timeout'"):
        tls.listen(("127.0.0.1", 0), credentials=identity, connect_timeout=1.0)  # type: ignore[call-arg]
