"""The proposal's shapes, both drafts and their server twins, with the errors of each."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from typing import Any

import pytest

from sapper.errors import (
    ApiMisuseError,
    CertificateError,
    ClosedError,
    ConfigError,
    ConnectionLost,
    NotStartedError,
    SapperError,
)
from sapper.stream import ByteStream, memory_pair
from sapper.tls import Credentials
from sapper.tls.handshake import Acceptor, ClientHandshake, Connector, FutureStreams, ServerHandshake
from support.certs import Certificates

PSK = Credentials.psk("x", bytes(range(32)))


def believing(certs: Certificates) -> Any:
    return Credentials.none(roots=certs.ca.cert)


def proving(certs: Certificates) -> Any:
    return Credentials.certificate(certs.server.cert, certs.server.key)


# -- the first draft -----------------------------------------------------------------------------------


async def test_a_handshake_gives_a_connection_and_two_halves(
    any_loop: str, leak_check: None, certs: Certificates
) -> None:
    one, other = memory_pair()
    (client, tls_input, tls_output), (server, server_input, server_output) = await asyncio.gather(
        ClientHandshake(certs.name, one, one, credentials=believing(certs)).finish(),
        ServerHandshake(other, other, credentials=proving(certs)).finish(),
    )
    assert (client.info.version, server.info.server_name) == ("TLSv1.3", certs.name)
    assert client.info.peer_certificate == certs.server.cert_der
    assert await client.channel_binding() == await server.channel_binding()
    material = await client.export_keying_material("EXPERIMENTAL sapper", 16)
    assert material == await server.export_keying_material("EXPERIMENTAL sapper", 16)
    tls_output.write(b"GET /")
    await tls_output.drain()
    client.close_output()
    client.close_notify()  # the explainer's name for it; again is allowed
    assert await server_input.read() == b"GET /"
    server_output.write(b"answer")
    server_output.close()
    buffer = bytearray(6)
    assert await tls_input.readinto(buffer) == 6
    assert bytes(buffer) == b"answer"
    assert await tls_input.read(1) == b""
    for half in (tls_input, tls_output, server_input):
        half.close()
    await asyncio.gather(client.aclose(), server.aclose())


async def test_halves_of_one_direction_each_lie_underneath(leak_check: None, certs: Certificates) -> None:
    """Pipes, then a reader and a writer of asyncio's, then the halves of another session."""
    to_server, to_client = os.pipe(), os.pipe()
    shaken = await asyncio.gather(
        ClientHandshake(certs.name, to_client[0], to_server[1], credentials=believing(certs)).finish(),
        ServerHandshake(to_server[0], to_client[1], credentials=proving(certs)).finish(),
    )
    for number in (*to_server, *to_client):
        os.close(number)
    await hello(*shaken)
    near, far = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=near)
    shaken = await asyncio.gather(
        ClientHandshake(certs.name, reader, writer, credentials=believing(certs)).finish(),
        ServerHandshake(far, far, credentials=proving(certs)).finish(),
    )
    (_, *client_halves), (_, *server_halves) = shaken
    inside = await asyncio.gather(
        ClientHandshake(certs.name, *client_halves, credentials=believing(certs)).finish(),
        ServerHandshake(*server_halves, credentials=proving(certs)).finish(),
    )
    await hello(*inside)


async def hello(client: Any, server: Any) -> None:
    client[2].write(b"hello")
    assert await server[1].read(5) == b"hello"
    await asyncio.gather(client[0].aclose(), server[0].aclose())


async def test_the_future_says_nothing_then_the_streams_then_an_error(leak_check: None) -> None:
    one, other = memory_pair()
    future = ClientHandshake("x", one, one, credentials=PSK).finish()
    assert isinstance(future, FutureStreams)
    assert future.get() is None
    server = await ServerHandshake(other, other, credentials=PSK).finish()
    await future.subscribe()
    got = future.get()
    assert got is not None
    with pytest.raises(ApiMisuseError):
        future.get()
    with pytest.raises(ApiMisuseError):
        await future
    await hello(got, server)


async def test_finish_uses_the_handshake_up() -> None:
    one, other = memory_pair()
    handshake = ClientHandshake("x", one, one, credentials=PSK)
    future = handshake.finish()
    with pytest.raises(ApiMisuseError) as again:
        handshake.finish()
    assert again.value.reason == "consumed"
    await hello(*await asyncio.gather(future, ServerHandshake(other, other, credentials=PSK).finish()))


async def test_dropping_both_halves_ends_in_order() -> None:
    one, other = memory_pair()
    client, server = await asyncio.gather(
        ClientHandshake("x", one, one, credentials=PSK).finish(),
        ServerHandshake(other, other, credentials=PSK).finish(),
    )
    client[2].write(b"all of it")
    client[2].close()
    client[1].close()
    assert client[0].stream.is_closing()
    assert await server[1].read() == b"all of it"
    await asyncio.gather(client[0].aclose(), server[0].aclose())


@pytest.mark.parametrize("turns", [0, 1, 5])
async def test_a_dropped_future_ends_its_handshake_and_says_nothing(
    any_loop: str, leak_check: None, caplog: pytest.LogCaptureFixture, turns: int
) -> None:
    near, far = socket.socketpair()
    far.setblocking(False)
    loop = asyncio.get_running_loop()
    began = loop.time()
    future = ClientHandshake("x", near, near, credentials=PSK, handshake_timeout=60.0).finish()
    for _ in range(turns):
        await asyncio.sleep(0)
    del future
    with far:
        async with asyncio.timeout(30):
            while await loop.sock_recv(far, 65_536):
                pass
    assert loop.time() - began < 60, "not by its deadline"
    assert not caplog.records


async def test_a_dropped_future_leaves_no_failure_and_no_connection(
    leak_check: None, caplog: pytest.LogCaptureFixture
) -> None:
    near, far = socket.socketpair()
    failing = ClientHandshake("x", near, near, credentials=PSK).finish()
    far.close()
    await failing.subscribe()
    del failing
    one, other = memory_pair()
    client = ClientHandshake("x", one, one, credentials=PSK).finish()
    server = await ServerHandshake(other, other, credentials=PSK).finish()
    await client.subscribe()
    del client
    assert await server[1].read() == b"", "closed in order"
    await server[0].aclose()
    gc.collect()
    await asyncio.sleep(0)
    assert not caplog.records


async def test_a_wrong_name_fails_with_a_word_about_the_certificate(certs: Certificates) -> None:
    one, other = memory_pair()
    client, server = await asyncio.gather(
        ClientHandshake("elsewhere.example", one, one, credentials=believing(certs)).finish(),
        ServerHandshake(other, other, credentials=proving(certs)).finish(),
        return_exceptions=True,
    )
    assert isinstance(client, CertificateError)
    assert "certificate" in str(client)
    if isinstance(server, SapperError):
        return
    assert not isinstance(server, BaseException)
    server[0].stream.abort()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "not a name",
        "-dash.example",
        "a..b",
        "x" * 64 + ".example",
        "ä.example",
        # What might be taken for an address, and an address of a zone.
        "999.1.1.1",
        "127.1",
        "0x7f.1",
        "2130706433",
        "name.1",
        "fe80::1%lo",
    ],
)
async def test_an_invalid_name_is_refused_before_a_byte_is_sent(name: str) -> None:
    one, other = memory_pair()
    with pytest.raises(ConfigError) as invalid:
        await ClientHandshake(name, one, one, credentials=PSK).finish()
    assert (invalid.value.message, invalid.value.reason) == ("invalid server name", "invalid_name")
    one.write(b"still ours")
    assert await other.read(100) == b"still ours"
    one.close()
    other.close()


@pytest.mark.parametrize("name", ["1.example", "a.1b", "1-2", "fe80::1", "192.0.2.1", "under_score.example."])
async def test_what_native_code_takes_for_a_name_is_one(name: str) -> None:
    one, other = memory_pair()
    handshake = ClientHandshake(name, one, one, credentials=PSK).finish()
    async with asyncio.timeout(20):
        assert (await other.read(1)) == b"\x16"
        other.abort()
        with pytest.raises(SapperError) as ended:
            await handshake
    assert not isinstance(ended.value, ConfigError)


# -- the second draft ----------------------------------------------------------------------------------


class Ends:
    """A connector and an acceptor, wired to each other, with the cleartext ends in our hands."""

    def __init__(self, client: Any = None, server: Any = None, at_client: ByteStream | None = None) -> None:
        self.connector, self.acceptor = Connector(client or PSK), Acceptor(server or PSK)
        self.to_client, client_cleartext = memory_pair()
        self.to_server, server_cleartext = memory_pair()
        self.client_out, self.client_sent = self.connector.send(client_cleartext)
        self.server_out, self.server_sent = self.acceptor.send(server_cleartext)
        self.from_client, self.client_received = self.connector.receive(at_client or self.server_out)
        self.from_server, self.server_received = self.acceptor.receive(self.client_out)

    async def shake(self, name: str = "x") -> Any:
        return await asyncio.gather(
            self.connector.connect(name), self.acceptor.accept(), return_exceptions=True
        )

    async def over(self) -> None:
        """Drops everything, and waits until it is given back."""
        for stream in (self.to_client, self.to_server, self.from_client, self.from_server):
            stream.abort()
        await asyncio.gather(self.connector.wait_closed(), self.acceptor.wait_closed())

    def results(self) -> tuple[asyncio.Future[None], ...]:
        return self.client_sent, self.server_sent, self.client_received, self.server_received


async def test_bytes_flow_and_ends_are_results(any_loop: str, leak_check: None, certs: Certificates) -> None:
    async with asyncio.timeout(30):
        ends = Ends(believing(certs), proving(certs))
        client, server = await ends.shake(certs.name)
        assert (client.version, server.server_name) == ("TLSv1.3", certs.name)
        payload = os.urandom(1_000_000)
        ends.to_client.write(payload)
        assert await ends.from_server.readexactly(len(payload)) == payload
        ends.to_client.write_eof()  # says close_notify
        assert await ends.from_server.read() == b""
        await ends.server_received
        ends.to_server.write(b"the other direction goes on")
        assert await ends.from_client.readexactly(27) == b"the other direction goes on"
        ends.to_server.close()
        assert await ends.from_client.read() == b""
        await asyncio.gather(*ends.results())
        await ends.over()


async def test_readers_of_asyncio_feed_it(leak_check: None) -> None:
    near, far = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=near)
    async with asyncio.timeout(30):
        connector, acceptor = Connector(PSK), Acceptor(PSK)
        cleartext, mine = memory_pair()
        client_out, sent = connector.send(reader)
        server_out, _ = acceptor.send(cleartext)
        from_client, _ = connector.receive(server_out)
        from_server, received = acceptor.receive(client_out)
        await asyncio.gather(connector.connect("x"), acceptor.accept())
        far.sendall(b"from asyncio")
        far.shutdown(socket.SHUT_WR)
        assert await from_server.read() == b"from asyncio"
        await received
        mine.close()
        assert await from_client.read() == b""
        await sent  # its ciphertext was carried natively: until the connection's end
        await asyncio.gather(connector.wait_closed(), acceptor.wait_closed())
    for stream in (from_client, from_server):
        stream.close()
    writer.close()
    await writer.wait_closed()
    far.close()


@pytest.mark.parametrize("kind", [ConnectionResetError, ValueError])
async def test_a_reader_that_fails_is_no_end(kind: type[Exception], leak_check: None) -> None:
    reader = asyncio.StreamReader()
    async with asyncio.timeout(30):
        connector, acceptor = Connector(PSK), Acceptor(PSK)
        cleartext, mine = memory_pair()
        client_out, sent = connector.send(reader)
        server_out, _ = acceptor.send(cleartext)
        from_client, _ = connector.receive(server_out)
        from_server, received = acceptor.receive(client_out)
        await asyncio.gather(connector.connect("x"), acceptor.accept())
        reader.feed_data(b"half")
        assert await from_server.readexactly(4) == b"half"
        reader.set_exception(kind("of whoever feeds it"))
        with pytest.raises(ConnectionLost):
            await from_server.read()
        for result in (sent, received):
            with pytest.raises(ConnectionLost):
                await result
        for stream in (mine, from_client, from_server):
            stream.abort()
        await asyncio.gather(connector.wait_closed(), acceptor.wait_closed())


async def test_configured_twice_gives_a_closed_stream_and_the_error() -> None:
    connector = Connector(PSK)
    for configure, word in ((connector.send, "send"), (connector.receive, "receive")):
        first, _ = configure(memory_pair()[0])
        second, result = configure(memory_pair()[0])
        assert isinstance(second, ByteStream)
        with pytest.raises(ClosedError):
            await second.read(1)
        with pytest.raises(ApiMisuseError) as twice:
            await result
        assert twice.value.message == f"{word} already configured"
        assert not first.is_closing()
        first.close()


async def test_connect_before_it_is_configured_says_what_is_missing() -> None:
    for verb in ("connect", "accept"):
        one: Any = Connector(PSK) if verb == "connect" else Acceptor(PSK)
        arguments = ("x",) if verb == "connect" else ()
        with pytest.raises(NotStartedError) as missing:
            await getattr(one, verb)(*arguments)
        assert missing.value.message == f"send() must be called before {verb}()"
        half, _ = one.send(memory_pair()[0])
        with pytest.raises(NotStartedError) as missing:
            await getattr(one, verb)(*arguments)
        assert missing.value.message == f"receive() must be called before {verb}()"
        half.close()


@pytest.mark.parametrize("name", ["not a name", "127.1", "fe80::1%lo"])
async def test_an_invalid_name_fails_both_results(leak_check: None, name: str) -> None:
    connector = Connector(PSK)
    (cleartext, mine), (ciphertext, wire) = memory_pair(), memory_pair()
    out, sent = connector.send(cleartext)
    plain, received = connector.receive(ciphertext)
    with pytest.raises(ConfigError) as invalid:
        await connector.connect(name)
    assert invalid.value.message == "invalid server name"
    for result in (sent, received):
        with pytest.raises(ConfigError):
            await result
    with pytest.raises(ApiMisuseError):
        await connector.connect("x")
    for stream in (out, plain, mine, wire, cleartext, ciphertext):
        stream.abort()


async def test_a_wrong_certificate_fails_both_results(leak_check: None, certs: Certificates) -> None:
    async with asyncio.timeout(30):
        ends = Ends(believing(certs), proving(certs))
        client, _ = await ends.shake("elsewhere.example")
        assert isinstance(client, CertificateError)
        assert "certificate" in str(client)
        for result in (ends.client_sent, ends.client_received):
            with pytest.raises(CertificateError):
                await result
        with pytest.raises(SapperError):
            await ends.from_client.read(1)
        await ends.over()


async def test_ciphertext_that_is_cut_off_is_no_end(leak_check: None) -> None:
    """The same bytes with and without close_notify behind them."""
    async with asyncio.timeout(30):
        ends, wire = await with_a_wire()
        ends.to_server.write(b"all that came")
        assert await ends.from_client.readexactly(13) == b"all that came"
        wire.to_client.close()  # an end, and no close_notify
        with pytest.raises(ConnectionLost) as cut:
            await ends.from_client.read(1)
        assert cut.value.reason == "truncated"
        with pytest.raises(ConnectionLost):
            await ends.client_received
        await wire.stop()
        await ends.over()


class Wire:
    """Ciphertext between a server and a client, carried by the test."""

    def __init__(self, source: ByteStream, to_client: ByteStream) -> None:
        self._source, self.to_client = source, to_client
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._carry())

    async def _carry(self) -> None:
        while data := await self._source.read(65_536):
            self.to_client.write(data)

    async def stop(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._source.close()


async def with_a_wire() -> tuple[Ends, Wire]:
    to_client, at_client = memory_pair()
    ends = Ends(at_client=at_client)
    wire = Wire(ends.server_out, to_client)
    wire.start()
    for outcome in await ends.shake():
        if isinstance(outcome, BaseException):
            raise outcome
    return ends, wire


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_a_dropped_half_fails_who_writes_to_it(leak_check: None, how: str) -> None:
    async with asyncio.timeout(30):
        ends = Ends()
        await ends.shake()
        getattr(ends.from_server, how)()  # the server's program wants no more

        async def write_without_end() -> None:
            while True:
                ends.to_client.write(b"x" * 100_000)
                await ends.to_client.drain()
                await asyncio.sleep(0)

        with pytest.raises(SapperError):
            await write_without_end()
        with pytest.raises(SapperError):
            await ends.server_received
        await ends.over()


async def test_a_half_that_is_dropped_before_its_end_has_a_result(leak_check: None) -> None:
    async with asyncio.timeout(30):
        ends = Ends()
        await ends.shake()
        ends.from_server.close()  # nobody writes to it any more
        ends.to_client.write_eof()
        ends.to_server.write_eof()
        await asyncio.gather(ends.connector.wait_closed(), ends.acceptor.wait_closed())
        ends.from_client.close()  # and its end was not read
        for result in (ends.server_received, ends.client_received):
            with pytest.raises(ClosedError):
                await result
        await ends.over()


async def test_a_cancelled_connect_ends_everything(leak_check: None) -> None:
    connector = Connector(PSK)
    (cleartext, mine), (ciphertext, wire) = memory_pair(), memory_pair()
    out, sent = connector.send(cleartext)
    plain, received = connector.receive(ciphertext)
    connecting = asyncio.create_task(connector.connect("x"))
    assert await out.read(5)  # its hello
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    for result in (sent, received):
        with pytest.raises(ClosedError):
            await result
    for stream in (out, plain, mine, wire):
        stream.abort()
    await connector.wait_closed()
