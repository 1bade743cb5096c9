"""How connections of visitors and services end: whole where both sides ended them, with a reset where
anything else did. A protocol whose end is the connection's takes a clean end for the whole.
"""

from __future__ import annotations

import asyncio
import fcntl
import random
import socket
import ssl
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tunnel import TunnelClient, TunnelServer
from support.tunnel_ends import Tunnel
from support.tunnels import CREDENTIALS, LATEST, Service, client, server, until, visit
from support.w3ptunl import DATA, OriginalClient, frame, message, read_frame, read_message

Visitor = tuple[asyncio.StreamReader, asyncio.StreamWriter]
# More than systems and windows hold between service and visitor: who has got it has waited for the rest.
SOME = 1_000_000


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A file without an end."""
    while True:
        writer.write(bytes(65_536))
        await writer.drain()


@asynccontextmanager
async def in_the_middle(port: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[Visitor]:
    """A visitor who has got something of a file."""
    async with asyncio.timeout(LATEST):
        name = None if tls is None else "localhost"
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname=name)
        await reader.readexactly(SOME)
    yield reader, writer
    writer.transport.abort()


async def is_broken_off(visitor: Visitor) -> None:
    """Reads to the end, which is none."""

    async def read() -> None:
        while await visitor[0].read(65_536):
            pass

    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(read(), LATEST)


# -- forced ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lease", [None, "one"], ids=["its own session", "a lease"])
async def test_a_client_that_is_killed_and_started_again(lease: str | None, tmp_path: Path) -> None:
    async with Service(pour) as service, Tunnel(service.port, tmp_path, client={"lease": lease}) as tunnel:
        async with in_the_middle(tunnel.public) as visitor:
            await tunnel.kill_client()
            await tunnel.start_client()
            await is_broken_off(visitor)
        async with in_the_middle(tunnel.public):
            pass


async def test_a_client_that_is_killed_and_does_not_come_back(tmp_path: Path) -> None:
    async with Service(pour) as service, Tunnel(service.port, tmp_path, server={"grace": 0.2}) as tunnel:
        async with in_the_middle(tunnel.public) as visitor:
            await tunnel.kill_client()
            await is_broken_off(visitor)


async def test_a_server_that_is_killed(tmp_path: Path) -> None:
    async with Service(pour) as service, Tunnel(service.port, tmp_path) as tunnel:
        async with in_the_middle(tunnel.public) as visitor:
            reader, writer = await visit(tunnel.public)
            await tunnel.kill_server()
            await is_broken_off(visitor)
            await is_broken_off((reader, writer))
            writer.close()


async def test_a_client_that_is_killed_breaks_off_towards_its_service(tmp_path: Path) -> None:
    got: list[int] = []
    ends: list[BaseException | None] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                got.append(len(data))
            ends.append(None)
        except ConnectionError as error:
            ends.append(error)

    async with Service(take) as service, Tunnel(service.port, tmp_path) as tunnel:
        _reader, writer = await visit(tunnel.public)
        writer.write(bytes(SOME))
        await until(lambda: sum(got) == SOME, "an upload that is not over")
        await tunnel.kill_client()
        await until(lambda: ends, "the service's news")
        assert isinstance(ends[0], ConnectionResetError)
        writer.transport.abort()


@pytest.mark.parametrize("drain", [0.0, 0.1], ids=["at once", "a drain that runs out"])
@pytest.mark.parametrize("end", ["client", "server"])
@pytest.mark.parametrize("over_tls", [False, True], ids=["plain", "tls"])
async def test_an_end_that_is_stopped(
    end: str, drain: float, over_tls: bool, made: ThrowawayCertificates, leak_check: None
) -> None:
    given = {"visitor_tls": made.server_credentials()} if over_tls else {}
    tls = ssl.create_default_context(cadata=made.authority.decode()) if over_tls else None
    async with Service(pour) as service, server(**given) as ours:
        async with client(ours.port or 0, service.port) as exposed:
            async with in_the_middle(exposed.assigned_port or 0, tls) as visitor:
                stopped: TunnelClient | TunnelServer = exposed if end == "client" else ours
                stopping = asyncio.create_task(stopped.stop(drain=drain))
                await is_broken_off(visitor)
                await asyncio.wait_for(stopping, LATEST)


async def is_sent_away(port: int) -> None:
    """Whoever comes to this public port now: its server or its client drains."""
    async with asyncio.timeout(LATEST):
        while True:
            try:
                reader, writer = await visit(port)
                gone = await reader.read(1) == b""
                writer.transport.abort()
            except ConnectionError:
                return
            if gone:
                return


@pytest.mark.parametrize("again", [0.0, 0.1])
@pytest.mark.parametrize("drain", [3_600.0, float("inf")])
@pytest.mark.parametrize("end", ["client", "server"])
async def test_a_drain_that_is_cut_short(end: str, drain: float, again: float, leak_check: None) -> None:
    async with Service(pour) as service, server() as ours, client(ours.port or 0, service.port) as exposed:
        public = exposed.assigned_port or 0
        async with in_the_middle(public) as visitor:
            stopped: TunnelClient | TunnelServer = exposed if end == "client" else ours
            stopping = asyncio.create_task(stopped.stop(drain=drain))
            await is_sent_away(public)
            await asyncio.wait_for(stopped.stop(drain=again), LATEST)
            await is_broken_off(visitor)
            await asyncio.wait_for(stopping, LATEST)


async def test_a_longer_drain_makes_nothing_later(leak_check: None) -> None:
    async with Service(pour) as service, server() as ours, client(ours.port or 0, service.port) as exposed:
        public = exposed.assigned_port or 0
        async with in_the_middle(public) as visitor:
            stopping = asyncio.create_task(ours.stop(drain=0.5))
            await is_sent_away(public)
            await asyncio.wait_for(ours.stop(drain=3_600.0), LATEST)
            await is_broken_off(visitor)
            await asyncio.wait_for(stopping, LATEST)


async def test_a_lease_that_another_takes_over(leak_check: None) -> None:
    async with Service(pour) as service, server() as ours:
        given: dict[str, Any] = {"options": {"lease": "x", "reconnect": False}}
        async with client(ours.port or 0, service.port, **given) as first:
            public = first.assigned_port or 0
            async with in_the_middle(public) as visitor:
                async with client(ours.port or 0, service.port, **given) as second:
                    assert second.assigned_port == public
                    await is_broken_off(visitor)


async def test_a_client_that_breaks_the_protocol(leak_check: None) -> None:
    async with server() as ours:
        reader, writer = await asyncio.open_connection("127.0.0.1", ours.port or 0)
        async with asyncio.timeout(LATEST):
            writer.write(message(CREDENTIALS))
            public = (await read_message(reader))["port"]
            visiting, visitor = await visit(public)
            stream, _, _ = await read_frame(reader)
            writer.write(frame(stream, DATA, b"a part"))
            assert await visiting.readexactly(6) == b"a part"
        writer.write(b"\0\0\0\1")
        await is_broken_off((visiting, visitor))
        visitor.close()
        writer.close()


# -- orderly ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ours", "original", "tls"])
async def test_every_byte_and_a_clean_end_again_and_again(
    way: str, made: ThrowawayCertificates, leak_check: None
) -> None:
    """Of all lengths, with and without a half-close of the visitor, and whoever reads late."""
    chance = random.Random(8)
    payload = chance.randbytes(400_000)

    async def give(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = int(await reader.readline())
        writer.write(payload[:length])
        await writer.drain()
        if length % 2:
            writer.write_eof()
            assert await reader.read() == b""

    given = {"visitor_tls": made.server_credentials()} if way == "tls" else {}
    tls = ssl.create_default_context(cadata=made.authority.decode()) if way == "tls" else None
    async with Service(give) as service, server(**given) as ours:

        async def fetch(port: int, length: int, half_close: bool) -> None:
            name = None if tls is None else "localhost"
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname=name)
            writer.write(b"%d\n" % length)
            if half_close and tls is None:
                writer.write_eof()
            assert await reader.read() == payload[:length]
            writer.close()

        async def fetch_many(port: int) -> None:
            for _ in range(15):
                lengths = [chance.randrange(400_000) for _ in range(20)]
                async with asyncio.timeout(LATEST):
                    await asyncio.gather(*(fetch(port, n, n % 3 == 0) for n in lengths))
            await until(lambda: ours.status()[0].streams == 0 and service.open == 0, "their ends")

        if way == "original":
            peer = OriginalClient(service.port)
            async with asyncio.timeout(LATEST):
                public = await peer.connect("127.0.0.1", ours.port or 0, CREDENTIALS)
            await fetch_many(public)
            await peer.close()
        else:
            async with client(ours.port or 0, service.port) as exposed:
                await fetch_many(exposed.assigned_port or 0)


async def test_what_the_system_holds_at_an_orderly_end_outlives_both_ends(leak_check: None) -> None:
    """The visitor reads when nobody is there any more but the system."""
    payload = random.Random(9).randbytes(100_000)

    async def give(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        writer.write(payload)
        await writer.drain()

    async with Service(give) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            with socket.socket() as visitor:
                # Less than the payload fits: the rest waits at the server's socket, which takes 256 KiB.
                visitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
                visitor.connect(("127.0.0.1", exposed.assigned_port or 0))
                visitor.shutdown(socket.SHUT_WR)
                await until(lambda: ours.status()[0].received == len(payload), "the payload's way")
                await until(lambda: ours.status()[0].streams == 0, "the stream's end")
                await exposed.stop(drain=0)
                await ours.stop(drain=0)
                assert await asyncio.to_thread(rest, visitor) == payload


@pytest.mark.parametrize("way", ["ours", "original"])
async def test_who_reads_late_gets_all_of_a_client_that_left_in_order(way: str, leak_check: None) -> None:
    """The system takes no more of it, so that the server has the rest when the client is gone."""
    chance = random.Random(10)
    payload = bytearray()
    given = asyncio.Event()

    async def give(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not ours.status() or not ours.status()[0].held:
            payload.extend(chance.randbytes(65_536))
            writer.write(payload[-65_536:])
            await until(lambda: ours.status() and ours.status()[0].received == len(payload), "its way")
        given.set()

    async with Service(give) as service, server() as ours:
        mine = TunnelClient("127.0.0.1", ours.port or 0, service.port, CREDENTIALS)
        peer = OriginalClient(service.port)
        async with asyncio.timeout(LATEST):
            if way == "ours":
                public = await mine.connect()
            else:
                public = await peer.connect("127.0.0.1", ours.port or 0, CREDENTIALS)
        with socket.socket() as visitor:
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            visitor.connect(("127.0.0.1", public))
            visitor.shutdown(socket.SHUT_WR)
            await asyncio.wait_for(given.wait(), LATEST)
            if way == "ours":
                await mine.stop(drain=LATEST)
            else:
                await until(lambda: service.open == 0 and not peer.sockets, "the close")
                await peer.close()
            await until(lambda: not ours.status(), "the tunnel's end")
            if way == "ours":
                async with client(ours.port or 0, service.port) as next_one:
                    assert next_one.assigned_port == public, "it is free meanwhile"
            assert await asyncio.to_thread(rest, visitor) == payload


async def test_a_client_closes_its_connection_in_order(leak_check: None) -> None:
    """Not with a reset, which would throw away what is on its way to the server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        mine = TunnelClient("127.0.0.1", listener.getsockname()[1], 9, CREDENTIALS)
        connecting = asyncio.create_task(mine.connect())
        carrier, _ = await asyncio.to_thread(listener.accept)
        with carrier:
            carrier.settimeout(LATEST)
            carrier.sendall(message({"port": 4_711}))
            await asyncio.wait_for(connecting, LATEST)
            stopping = asyncio.create_task(mine.stop())
            await asyncio.to_thread(rest, carrier)
            carrier.sendall(frame(7, DATA, bytes(200_000)))
            await until(lambda: unsent(carrier) == 0, "the last words' way")
            assert carrier.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        await asyncio.wait_for(stopping, LATEST)


def rest(one: socket.socket) -> bytes:
    one.settimeout(LATEST)
    with one.makefile("rb") as whole:
        return whole.read()


def unsent(one: socket.socket) -> int:
    """Bytes that the peer's system has not confirmed."""
    return int.from_bytes(fcntl.ioctl(one, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


async def test_a_visitor_who_leaves_while_its_service_is_dialled_leaves_in_order(leak_check: None) -> None:
    """Nothing was begun that could be taken for a part."""
    ends: list[bytes | BaseException] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            ends.append(await reader.read())
        except ConnectionError as error:
            ends.append(error)

    accepted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def original(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        # The first frame makes the client dial; the second one is there before the service has answered.
        writer.write(message({"port": 4_711}) + frame(7, DATA) + frame(7, 2))
        accepted.set_result(writer)

    peer = await asyncio.start_server(original, "127.0.0.1", 0)
    async with Service(listen) as service:
        async with client(peer.sockets[0].getsockname()[1], service.port):
            await until(lambda: ends, "the service's news")
            assert ends == [b""]
        (await accepted).close()
    peer.close()


async def test_a_visitor_whose_tls_fails_hears_why(made: ThrowawayCertificates, leak_check: None) -> None:
    """The alert is not thrown away with the connection."""
    context = ssl.create_default_context(cadata=made.authority.decode())
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES128-SHA")  # which no server of ours takes
    async with Service(pour) as service, server(visitor_tls=made.server_credentials()) as ours:
        async with client(ours.port or 0, service.port) as exposed:
            for _ in range(50):
                with pytest.raises(ssl.SSLError, match="ALERT"):
                    await asyncio.wait_for(
                        asyncio.open_connection(
                            "localhost", exposed.assigned_port or 0, ssl=context, server_hostname="localhost"
                        ),
                        LATEST,
                    )
