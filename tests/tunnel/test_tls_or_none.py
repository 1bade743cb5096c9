"""One side speaks TLS and the other does not: both are told, whoever made the other one."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sapper.errors import ConnectionLost, IncompatiblePeer, SapperError
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tunnel import ClientOptions, TunnelClient, events
from support.tunnels import CREDENTIALS, LATEST, Service, client, echo, first_of, server, visit
from support.w3ptunl import OriginalClient, OriginalServer

ONCE = ClientOptions(reconnect=False)


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates()


@pytest.fixture(scope="module")
def served(made: ThrowawayCertificates, tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """For a server of Python's own."""
    folder = tmp_path_factory.mktemp("served")
    for name, data in zip(("chain.pem", "key.pem"), made.server, strict=True):
        (folder / name).write_bytes(data)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "chain.pem", folder / "key.pem")
    return context


async def error_of(port: int, **values: Any) -> SapperError:
    """Why our client gets no tunnel there."""
    ours = TunnelClient("localhost", port, 9, CREDENTIALS, options=ONCE, **values)
    with pytest.raises(SapperError) as caught:
        await asyncio.wait_for(ours.connect(), LATEST)
    return caught.value


@pytest.mark.parametrize("none", [False, None])
async def test_who_asks_for_none_speaks_none(none: bool | None, leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port, tls=none) as exposed:
            assert exposed.assigned_port


@asynccontextmanager
async def answers(with_: bytes, *, reset: bool = False) -> AsyncIterator[int]:
    """A server that hears a little, says that, and closes; with what it did not read, it resets."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(7)
        writer.write(with_)
        await writer.drain()
        if reset:
            writer.transport.abort()
        else:
            writer.write_eof()
            await reader.read()

    async with Service(serve) as one:
        yield one.port


ALERT = b"\x15\x03\x01\x00\x02\x02\x46"


async def test_a_port_that_has_worked_speaks_no_tls(leak_check: None) -> None:
    async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1_000)
        writer.close()

    async with Service(echo) as service, server() as ours:
        port = ours.port or 0
        async with client(port, service.port) as exposed:
            heard = exposed.events()
            await ours.stop()
            closing = await asyncio.start_server(closes, "127.0.0.1", port)
            text = ""
            async with asyncio.timeout(LATEST):
                while "before it answered" not in text:
                    text = (await first_of(heard, events.TunnelError)).err.message
            assert "TLS" not in text
            closing.close()


@pytest.mark.parametrize("reset", [False, True], ids=["ends", "resets"])
async def test_a_server_that_closes_without_a_word_to_our_plain_client(reset: bool, leak_check: None) -> None:
    async with answers(b"", reset=reset) as port:
        error = await error_of(port)
    assert isinstance(error, ConnectionLost)
    assert "; perhaps the port speaks TLS: connect with TLS, or turn TLS off at the server" in error.message
    assert "does not let this client in" in error.message


async def test_an_original_server_with_tls_and_our_plain_client(served: ssl.SSLContext) -> None:
    peer = OriginalServer(CREDENTIALS)
    error = await error_of(await peer.start(served))
    await peer.close()
    assert "the port speaks TLS: connect with TLS" in error.message, error


async def test_a_server_that_answers_our_plain_client_with_an_alert(leak_check: None) -> None:
    async with answers(ALERT) as port:
        error = await error_of(port)
    assert isinstance(error, IncompatiblePeer)
    assert error.reason == "plain_at_tls_port"


@pytest.mark.parametrize("reset", [False, True], ids=["ends", "resets"])
async def test_a_server_that_closes_without_a_word_to_our_client_with_tls(
    reset: bool, leak_check: None
) -> None:
    async with answers(b"", reset=reset) as port:
        error = await error_of(port, tls=True)
    assert isinstance(error, ConnectionLost)
    assert "perhaps the port is plain: connect without TLS, or turn TLS on at the server" in error.message


async def test_a_server_that_answers_our_client_with_tls_in_plain_words(leak_check: None) -> None:
    async with answers(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        error = await error_of(port, tls=True)
    assert isinstance(error, IncompatiblePeer)
    assert error.reason == "not_tls"
    assert error.message.endswith("(HTTP); connect without TLS, or turn TLS on at the server")


async def test_a_server_that_closes_behind_tls_did_not_miss_it(
    made: ThrowawayCertificates, served: ssl.SSLContext
) -> None:
    peer = OriginalServer({"id": "another"})
    error = await error_of(await peer.start(served), ca=made.authority)
    await peer.close()
    assert isinstance(error, ConnectionLost)
    assert "perhaps it does not let this client in" in error.message
    assert "speaks TLS" not in error.message


async def test_an_original_client_at_our_port_with_tls(made: ThrowawayCertificates, leak_check: None) -> None:
    async with server(tls=made.server_credentials()) as ours:
        heard = ours.events()
        peer = OriginalClient(9)
        with pytest.raises(ValueError, match="tls_required"):
            await asyncio.wait_for(peer.connect("127.0.0.1", ours.port or 0, CREDENTIALS), LATEST)
        error = (await first_of(heard, events.ClientError)).err
        assert (type(error), error.reason) == (IncompatiblePeer, "plain_at_tls_port")
        await peer.close()


async def test_an_original_client_with_tls_at_our_plain_port(leak_check: None) -> None:
    async with server() as ours:
        heard = ours.events()
        context = ssl.create_default_context()
        with pytest.raises(ssl.SSLError, match=r"(?i)unexpected.message"):
            await asyncio.wait_for(
                OriginalClient(9).connect("localhost", ours.port or 0, CREDENTIALS, context), LATEST
            )
        error = (await first_of(heard, events.ClientError)).err
        assert (type(error), error.reason) == (IncompatiblePeer, "tls_at_plain_port")


# -- visitors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "heard"),
    [(b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n"), (b"PING\r\n", b"\x15\x03\x01\x00\x02")],
    ids=["http", "another"],
)
async def test_a_plain_visitor_at_a_public_port_with_tls(
    said: bytes, heard: bytes, made: ThrowawayCertificates, leak_check: None
) -> None:
    async with Service(echo) as local, server(visitor_tls=made.server_credentials()) as ours:
        async with client(ours.port or 0, local.port) as exposed:
            told = ours.events()
            reader, writer = await visit(exposed.assigned_port or 0)
            writer.write(said)
            assert (await asyncio.wait_for(reader.read(), LATEST)).startswith(heard)
            writer.close()
            error = (await first_of(told, events.VisitorError)).err
            assert (type(error), error.reason) == (IncompatiblePeer, "not_tls")
            assert error.message.endswith("; visit the port with TLS, or turn TLS off at public ports")
            assert local.connections == 0


async def no(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A plain service that does not understand."""
    await reader.read(1)
    writer.write(b"-ERR unknown command\r\n")
    writer.write_eof()
    await reader.read()


async def not_a_word(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A plain service that leaves."""
    await reader.read(1)
    writer.write_eof()
    await reader.read()


@pytest.mark.parametrize(("plain", "words"), [(no, "answers without it"), (not_a_word, "without a word")])
async def test_a_visitor_with_tls_at_a_service_without_it(plain: Any, words: str, leak_check: None) -> None:
    async with Service(plain) as local, server() as ours, client(ours.port or 0, local.port) as exposed:
        at_server, at_client = ours.events(), exposed.events()
        context = ssl.create_default_context()
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("localhost", exposed.assigned_port, ssl=context)
        for told in (
            await first_of(at_server, events.VisitorError),
            await first_of(at_client, events.ServiceError),
        ):
            assert (type(told.err), told.err.reason) == (IncompatiblePeer, "tls_at_plain_port")
            assert words in told.err.message
            assert "turn TLS on at public ports" in told.err.message


async def test_a_visitor_with_tls_at_a_service_with_it(
    made: ThrowawayCertificates, served: ssl.SSLContext, leak_check: None
) -> None:
    """The tunnel passes it on, and nobody complains."""

    async def hears(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(5))
        await reader.read()
        writer.close()

    secure = await asyncio.start_server(hears, "127.0.0.1", 0, ssl=served)
    async with secure, server() as ours:
        async with client(ours.port or 0, secure.sockets[0].getsockname()[1]) as exposed:
            heard = ours.events()
            known = ssl.create_default_context(cadata=made.authority.decode())
            async with asyncio.timeout(LATEST):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", exposed.assigned_port, ssl=known, server_hostname="localhost"
                )
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                writer.close()
                async for event in heard:
                    assert not isinstance(event, events.VisitorError)
                    if isinstance(event, events.VisitorDisconnected):
                        break
