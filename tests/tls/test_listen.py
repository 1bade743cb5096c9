"""A TLS server: connections as an iterator and to a handler, bounds, failed handshakes, the end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sapper import tls
from sapper.errors import (
    ApiMisuseError,
    BindError,
    ClosedError,
    ConfigError,
    HandshakeDeadline,
    PolicyDenied,
    ResourceLimit,
    SapperError,
)
from sapper.events import Closed, HandshakeFailed
from sapper.tls import Credentials, TlsListener, TlsStream, listen

PSK = Credentials.psk("x", bytes(range(32)))
LOCAL = ("127.0.0.1", 0)


async def echo(stream: TlsStream) -> None:
    while data := await stream.read(65_536):
        stream.write(data)
        await stream.drain()


@contextlib.asynccontextmanager
async def serving(listener: TlsListener, handler: Any = echo) -> AsyncIterator[TlsListener]:
    async with asyncio.timeout(30), listener:
        task = asyncio.create_task(listener.serve(handler))
        try:
            yield listener
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def visit(port: int, data: bytes = b"hello") -> bytes:
    async with await tls.connect("127.0.0.1", port, credentials=PSK) as stream:
        stream.write(data)
        stream.write_eof()
        return await stream.read()


async def test_a_handler_serves_many_at_once(any_loop: str, leak_check: None) -> None:
    async with serving(listen(LOCAL, credentials=PSK)) as server:
        assert server.addresses == (f"127.0.0.1:{server.port}",)
        answers = await asyncio.gather(*(visit(server.port, b"%d" % n * 50_000) for n in range(20)))
        assert answers == [b"%d" % n * 50_000 for n in range(20)]
        assert (server.stats().accepted, server.stats().handshakes, server.stats().failed) == (20, 20, 0)


async def test_credentials_that_are_none_for_a_server_are_told_at_once(leak_check: None) -> None:
    for useless in (Credentials.none(), tls.TlsConfig()):
        with pytest.raises(ConfigError) as caught:
            listen(LOCAL, credentials=useless)
        assert caught.value.field == "credentials"


async def test_as_an_iterator(any_loop: str, leak_check: None) -> None:
    async with asyncio.timeout(30), listen(LOCAL, credentials=PSK) as server:
        visits = [asyncio.create_task(visit(server.port)) for _ in range(3)]
        served = 0
        async for stream in server:
            async with stream:
                await echo(stream)
            served += 1
            if served == 3:
                break
        assert await asyncio.gather(*visits) == [b"hello"] * 3


async def test_closing_ends_the_iterator_behind_what_was_accepted(leak_check: None) -> None:
    async with asyncio.timeout(30):
        server = await listen(LOCAL, credentials=PSK)
        visitor = await tls.connect("127.0.0.1", server.port, credentials=PSK)
        while not server._ready:
            await asyncio.sleep(0)
        server.close()
        await server.wait_closed()
        streams = [stream async for stream in server]
        assert len(streams) == 1
        with pytest.raises(ClosedError):
            await server.accept()
        for stream in (visitor, *streams):
            await stream.aclose()
        with pytest.raises(ClosedError):
            await listen_again(server)


async def listen_again(server: TlsListener) -> None:
    server._native = None
    await server.start()


async def test_python_clients(leak_check: None, certs: Any) -> None:
    context = ssl.create_default_context(cafile=certs.ca.cert_path)
    credentials = Credentials.certificate(certs.server.cert, certs.server.key)
    async with serving(listen(LOCAL, credentials=credentials)) as server:
        reader, writer = await asyncio.open_connection("localhost", server.port, ssl=context)
        writer.write(b"from asyncio")
        assert await reader.readexactly(12) == b"from asyncio"
        writer.close()
        await writer.wait_closed()


async def test_who_says_nothing_holds_nobody_up(leak_check: None) -> None:
    """Ten times as many slow handshakes as there may be: everybody else gets in, long before then."""
    async with serving(listen(LOCAL, credentials=PSK, max_handshakes=4, handshake_timeout=600.0)) as server:
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
        while server.stats().failed < 36:
            await asyncio.sleep(0)
        for _ in range(5):
            assert await visit(server.port) == b"hello"
        for one in silent:
            one.close()


async def test_handshakes_are_bounded_the_oldest_gives_way_and_the_others_meet_their_deadline(
    leak_check: None,
) -> None:
    async with serving(listen(LOCAL, credentials=PSK, max_handshakes=2, handshake_timeout=2.0)) as server:
        events = server.events()
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        while server.stats().pending < 2:
            await asyncio.sleep(0)
        assert await visit(server.port) == b"hello"
        first, second = [await anext(events), await anext(events)]
        assert isinstance(first, HandshakeFailed)
        assert isinstance(first.error, ResourceLimit)
        assert first.error.reason == "too_many_handshakes"
        assert first.peer == f"127.0.0.1:{silent[0].getsockname()[1]}"
        assert isinstance(second, HandshakeFailed)
        assert isinstance(second.error, HandshakeDeadline)
        assert server.stats().accepted == 3
        assert server.stats().failed == 2
        for one in silent:
            one.close()


async def test_handshakes_give_way_where_all_connections_are_taken(leak_check: None) -> None:
    most: dict[str, Any] = {"max_connections": 3, "handshake_timeout": 600.0}
    async with serving(listen(LOCAL, credentials=PSK, **most)) as server:
        events = server.events()
        async with await tls.connect("127.0.0.1", server.port, credentials=PSK) as served:
            while server.stats().handshakes < 1:  # until then it would give way too
                await asyncio.sleep(0)
            silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
            for _ in range(3):
                assert await visit(server.port) == b"hello"
            first = await anext(events)
            assert isinstance(first, HandshakeFailed)
            assert isinstance(first.error, ResourceLimit)
            assert first.error.reason == "too_many_connections"
            served.write(b"still there")
            served.write_eof()
            assert await served.read() == b"still there"
        for one in silent:
            one.close()


async def test_failed_handshakes_are_events_and_never_end_the_loop(leak_check: None) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with serving(listen(LOCAL, credentials=PSK)) as server:
        events = server.events()
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\x16\x03\x01\x00\x05garbage"):
            with socket.create_connection(("127.0.0.1", server.port)) as stranger:
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
                failure = await anext(events)
            assert isinstance(failure, HandshakeFailed)
            assert isinstance(failure.error, SapperError)
        with pytest.raises(SapperError):
            await tls.connect("127.0.0.1", server.port, credentials=Credentials.psk("x", b"another key" * 4))
        assert isinstance(await anext(events), HandshakeFailed)
        assert await visit(server.port) == b"hello"
        assert server.stats().failed == 4
    assert complaints == []
    assert isinstance(await anext(events), Closed)
    with pytest.raises(StopAsyncIteration):
        await anext(events)


async def test_a_policy_keeps_peers_out() -> None:
    async def no(_peer: tls.Peer) -> bool:
        return False

    async with serving(listen(LOCAL, credentials=PSK, peer_policy=no)) as server:
        events = server.events()
        with pytest.raises(SapperError):
            await visit(server.port)
        failure = await anext(events)
        assert isinstance(failure, HandshakeFailed)
        assert isinstance(failure.error, PolicyDenied)


async def test_open_connections_are_bounded(leak_check: None) -> None:
    async with serving(listen(LOCAL, credentials=PSK, max_connections=1)) as server:
        first = await tls.connect("127.0.0.1", server.port, credentials=PSK)
        second = asyncio.create_task(visit(server.port))
        while not server.stats().limit_pauses:
            await asyncio.sleep(0)
        assert server.stats().accepted == 1
        await first.aclose()
        assert await second == b"hello"


async def test_a_failing_handler_is_told_and_the_others_go_on(leak_check: None) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    async def picky(stream: TlsStream) -> None:
        if await stream.readexactly(5) == b"break":
            raise ZeroDivisionError
        stream.write(b"fine")

    async with serving(listen(LOCAL, credentials=PSK), picky) as server:
        with pytest.raises(SapperError):  # aborted: no orderly end
            await visit(server.port, b"break")
        assert await visit(server.port) == b"fine"
    assert [type(one["exception"]) for one in complaints] == [ZeroDivisionError]


async def test_a_drain_lets_handlers_finish_and_cancels_who_does_not(leak_check: None) -> None:
    go, cancelled = asyncio.Event(), []

    async def handler(stream: TlsStream) -> None:
        try:
            word = await stream.readexactly(4)
            await go.wait()
            if word == b"long":
                await asyncio.Event().wait()
            stream.write(b"done")
        except asyncio.CancelledError:
            cancelled.append(stream)
            raise

    async with asyncio.timeout(30):
        server = await listen(LOCAL, credentials=PSK)
        task = asyncio.create_task(server.serve(handler))
        short, long = [await tls.connect("127.0.0.1", server.port, credentials=PSK) for _ in range(2)]
        short.write(b"shrt")
        long.write(b"long")
        while len(server._handling) < 2:
            await asyncio.sleep(0)
        closing = asyncio.create_task(server.aclose(drain=0.5))
        await server.wait_closed()
        go.set()
        assert await short.read() == b"done"
        await closing
        await task
        assert len(cancelled) == 1
        with pytest.raises(SapperError):
            await long.read()
        await asyncio.gather(short.aclose(), long.aclose(), return_exceptions=True)


async def test_a_handler_that_closes_its_listener_does_not_wait_for_itself(
    leak_check: None, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(stream: TlsStream) -> None:
        await server.aclose(drain=60)
        stream.write(b"closed")

    async with asyncio.timeout(30):
        server = await listen(LOCAL, credentials=PSK)
        task = asyncio.create_task(server.serve(handler))
        assert await visit(server.port) == b"closed"
        await task
    assert not caplog.records


async def test_a_stranger_who_does_not_finish_his_handshake_holds_up_no_end(
    leak_check: None, caplog: pytest.LogCaptureFixture
) -> None:
    for drain in (60.0, 0.05):
        async with asyncio.timeout(30):
            server = await listen(LOCAL, credentials=PSK, handshake_timeout=60)
            task = asyncio.create_task(server.serve(echo))
            with socket.create_connection(("127.0.0.1", server.port)) as stranger:
                stranger.send(b"\x16")
                while not server._shaking:
                    await asyncio.sleep(0.001)
                await server.aclose(drain=drain)
                await task
    assert not caplog.records, "no connection was left"


async def test_unix_sockets_and_sockets_that_listen_already(leak_check: None, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with serving(listen(f"unix-listen:{path}", credentials=PSK, unix_mode=0o600)) as server:
        assert path.stat().st_mode & 0o777 == 0o600
        assert server.addresses == (str(path),)
        with pytest.raises(ApiMisuseError):
            _ = server.port
        async with await tls.start_client(f"unix:{path}", credentials=PSK) as stream:
            stream.write(b"x")
            assert await stream.read(1) == b"x"
    assert not path.exists()
    ours, theirs = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in (ours, theirs)]
    with theirs:
        async with serving(listen([ours, theirs.fileno()], credentials=PSK)) as server:
            assert ours.fileno() == -1
            assert len(server.addresses) == 2
            assert [await visit(port) for port in ports] == [b"hello"] * 2
        assert theirs.getsockname()[1] == ports[1]


async def test_every_address_of_this_machine() -> None:
    async with serving(listen("tcp-listen://[::]:0", credentials=PSK)) as server:
        assert await visit(server.port) == b"hello"


async def test_what_is_wrong_is_named(leak_check: None) -> None:
    for address, options, field in [
        (("127.0.0.1", 70_000), {}, "address"),
        ("tcp://127.0.0.1:1", {}, "address"),
        ([], {}, "address"),
        (["text"], {}, "address"),
        (LOCAL, {"max_handshakes": 0}, "max_handshakes"),
        (LOCAL, {"max_connections": 0}, "max_connections"),
        (LOCAL, {"backlog": -1}, "backlog"),
        (LOCAL, {"handshake_timeout": 0.0}, "handshake_timeout"),
        (LOCAL, {"keepalive": 0.1}, "keepalive"),
    ]:
        with pytest.raises(ConfigError) as wrong:
            await listen(address, credentials=PSK, **options)  # type: ignore[arg-type]
        assert wrong.value.field == field
    with socket.create_server(LOCAL) as taken, pytest.raises(BindError):
        await listen(("127.0.0.1", taken.getsockname()[1]), credentials=PSK)
    near, far = socket.socketpair()
    with near, far, pytest.raises(ConfigError):
        await listen(near.fileno(), credentials=PSK)


async def test_a_cancelled_accept_loses_no_connection(leak_check: None) -> None:
    async with asyncio.timeout(30), listen(LOCAL, credentials=PSK) as server:
        for _ in range(3):
            accepting = asyncio.create_task(server.accept())
            await asyncio.sleep(0)
            client = await tls.connect("127.0.0.1", server.port, credentials=PSK)
            accepting.cancel()
            try:
                stream = await accepting
            except asyncio.CancelledError:
                stream = await server.accept()
            client.write(b"x")
            assert await stream.read(1) == b"x"
            await asyncio.gather(client.aclose(), stream.aclose())


async def test_leaving_closes_what_nobody_fetched(leak_check: None) -> None:
    async with asyncio.timeout(30):
        async with listen(LOCAL, credentials=PSK) as server:
            client = await tls.connect("127.0.0.1", server.port, credentials=PSK)
            while not server._ready:
                await asyncio.sleep(0)
        with pytest.raises(SapperError):
            await client.read()
        client.abort()
