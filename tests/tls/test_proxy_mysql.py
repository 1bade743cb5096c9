"""MySQL through the proxy with hostile and broken ends: all is told, and the next one is served.

With the real programs: tests/interop/test_upgrades.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sapper import tls
from sapper.tls import Credentials, Proxy
from sapper.tls.proxy import ProxyEvent
from support.certs import Certificates
from support.proxies import connect, ends, own, until

SSL, PROTOCOL_41 = 0x0800, 0x0200
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def packet(sequence: int, payload: bytes) -> bytes:
    return struct.pack("<I", len(payload))[:3] + bytes([sequence]) + payload


#: Version 10, thread, salt, filler, capabilities, and what a client does not look at here.
GREETING = packet(0, b"\n9.9-fake\0" + bytes(4) + b"saltsalt\0" + struct.pack("<H", PROTOCOL_41) + bytes(20))
PLAIN = struct.pack("<IIB", PROTOCOL_41, 1 << 24, 45) + bytes(23) + b"somebody\0\0"
LOG_IN = struct.pack("<IIB", PROTOCOL_41 | SSL, 1 << 24, 45) + bytes(23) + b"somebody\0\0"
OK = packet(2, b"\0\0\0\2\0\0\0")


async def serve_well(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Greets, takes the log-in, and sends back what it gets."""
    for byte in GREETING:  # in as many pieces as there are bytes
        writer.write(bytes([byte]))
        await writer.drain()
    head = await reader.readexactly(4)
    assert head[3] == 1, "the number of a log-in without TLS"
    log_in = await reader.readexactly(int.from_bytes(head[:3], "little"))
    assert not struct.unpack_from("<H", log_in)[0] & SSL
    writer.write(OK + b"what follows")
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()


@asynccontextmanager
async def fake(serve: Callable[..., Coroutine[Any, Any, None]]) -> AsyncIterator[str]:
    """A service, as a proxy takes it."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await serve(reader, writer)

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def log_in(address: str, certs: Certificates) -> tls.TlsStream:
    """A client's part, in clear and under TLS, until the server's OK."""
    reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
    greeting = await reader.readexactly(len(GREETING))
    assert struct.unpack_from("<H", greeting, GREETING.index(struct.pack("<H", PROTOCOL_41), 20))[0] & SSL
    writer.write(packet(1, LOG_IN[:32]))
    stream = await tls.start_client(
        (reader, writer), credentials=Credentials.none(roots=certs.ca.cert), server_hostname="localhost"
    )
    stream.write(packet(2, LOG_IN))
    assert await stream.readexactly(len(OK)) == packet(3, OK[4:])
    return stream


def all_that_comes(one: socket.socket) -> bytes:
    """Until the end, of whichever kind."""
    data = b""
    with contextlib.suppress(OSError):
        while chunk := one.recv(65_536):
            data += chunk
    return data


def options(certs: Certificates, events: list[ProxyEvent], **more: Any) -> dict[str, Any]:
    return {
        "listen": "127.0.0.1:0",
        "tls": own(certs.server),
        "upgrade": "mysql",
        "on_event": events.append,
        "handshake_timeout": 3.0,
        **more,
    }


async def test_a_log_in_cut_anywhere(certs: Certificates, leak_check: None) -> None:
    events: list[ProxyEvent] = []
    async with asyncio.timeout(60), fake(serve_well) as to, Proxy(**options(certs, events), to=to) as proxy:
        streams = await asyncio.gather(*(log_in(proxy.addresses[0], certs) for _ in range(10)))
        for stream in streams:
            assert await stream.readexactly(12) == b"what follows"
            stream.write(b"payload" * 10_000)
            assert await stream.readexactly(70_000) == b"payload" * 10_000
            await stream.aclose()
        assert events == []


#: What a client says behind the greeting, and the word under which its end is told.
CLIENTS: dict[str, tuple[bytes, str | None]] = {
    "leaves": (b"", "truncated"),
    "leaves in a packet": (packet(1, LOG_IN)[:20], "truncated"),
    "asks for no TLS": (packet(1, PLAIN), "no_tls"),
    "speaks HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "other_protocol"),
    "a packet without end": (b"\xff\xff\xff\1" + bytes(1000), "other_protocol"),
    "a wrong number": (packet(7, LOG_IN[:32]), "other_protocol"),
    "more in clear": (packet(1, LOG_IN[:32]) + packet(2, LOG_IN), "early_data"),
    "garbage for a hello": (packet(1, LOG_IN[:32]) + b"\x16\x03\x01\x00\x05hello", None),
}


@pytest.mark.parametrize("case", CLIENTS)
async def test_a_client_that_is_none(certs: Certificates, leak_check: None, case: str) -> None:
    said, reason = CLIENTS[case]
    events: list[ProxyEvent] = []
    async with asyncio.timeout(60), fake(serve_well) as to, Proxy(**options(certs, events), to=to) as proxy:
        with connect(proxy.addresses[0]) as one:
            assert (await asyncio.to_thread(one.recv, 4, socket.MSG_WAITALL))[3] == 0
            one.sendall(said)
            if case.startswith("leaves"):
                one.shutdown(socket.SHUT_WR)
            await asyncio.to_thread(all_that_comes, one)
        await until(lambda: ends(events, "handshake"), "it is told")
        (told,) = ends(events, "handshake")
        assert told.error is not None
        if reason is not None:
            assert told.error.reason == reason, told.error
        await (await log_in(proxy.addresses[0], certs)).aclose()


async def greets_for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"\xff\xff\0\0" + bytes(65_535))
        await writer.drain()


async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def is_no_database(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mail ready\r\n")
    await reader.read()


async def has_no_room(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(packet(0, b"\xff\x10\x04Too many connections"))
    await reader.read()


async def leaves(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GREETING[:30])


@pytest.mark.parametrize("serve", [greets_for_ever, says_nothing, is_no_database, has_no_room, leaves])
async def test_a_service_that_is_none(certs: Certificates, leak_check: None, serve: Any) -> None:
    """Its client hears the end, or the service's own refusal, and nothing else in clear."""
    events: list[ProxyEvent] = []
    async with asyncio.timeout(60), fake(serve) as to, Proxy(**options(certs, events), to=to) as proxy:
        with connect(proxy.addresses[0]) as one:
            heard = await asyncio.to_thread(all_that_comes, one)
            assert heard == (
                b"" if serve is not has_no_room else packet(0, b"\xff\x10\x04Too many connections")
            )
        await until(lambda: ends(events, "handshake"), "it is told")


async def test_services_that_do_not_answer_are_passed_over(certs: Certificates) -> None:
    events: list[ProxyEvent] = []
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        closed = f"127.0.0.1:{nobody.getsockname()[1]}"
    async with asyncio.timeout(60), fake(serve_well) as to:
        async with Proxy(**options(certs, events), to=(closed, to)) as proxy:
            await (await log_in(proxy.addresses[0], certs)).aclose()
            await until(lambda: ends(events, "retry"), "it is told")
