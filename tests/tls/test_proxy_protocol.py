"""PROXY headers: believed from trusted networks only, written with what is known of the client."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sapper import errors
from sapper.tls import Credentials, Proxy, TlsConfig
from sapper.tls.proxy import ConnectionEvent, ProxyEvent
from support.certs import Certificates
from support.proxies import LATEST, connect, ends, own, trusting, until
from support.services import echo, say

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
#: TLVs (HAProxy's proxy-protocol.txt, 2.2).
ALPN, AUTHORITY, SSL, SSL_VERSION, SSL_CN = 0x01, 0x02, 0x20, 0x21, 0x22


def tlvs(data: bytes) -> dict[int, bytes]:
    found = {}
    while data:
        kind, size = data[0], struct.unpack("!H", data[1:3])[0]
        found[kind], data = data[3 : 3 + size], data[3 + size :]
    return found


def header_v2(body: bytes, family: int, command: int = 0x21) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(body)) + body


@pytest.fixture
def service() -> Iterator[socket.socket]:
    """A listening socket: the test looks itself at what comes."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        one.settimeout(LATEST)
        yield one


def to(service: socket.socket) -> str:
    return f"127.0.0.1:{service.getsockname()[1]}"


def shake(address: str, certs: Certificates, alpn: str | None = None) -> ssl.SSLSocket:
    context = trusting(certs, certs.client)
    if alpn is not None:
        context.set_alpn_protocols([alpn])
    return context.wrap_socket(connect(address), server_hostname="localhost")


@pytest.mark.parametrize("more", [{}, {"client_auth": "optional"}, {"danger": True}])
async def test_version_2_does_not_call_verified_what_nobody_verified(
    certs: Certificates, service: socket.socket, more: dict[str, Any]
) -> None:
    shown = "danger" in more
    asked = {"danger_accept_any_certificate": True, "client_auth": "required"}
    offered = {"roots": certs.ca.cert, **more} if more else {}
    tls = own(certs.server, **(asked if shown else offered))
    context = trusting(certs, certs.client if shown else None)
    async with Proxy(listen="127.0.0.1:0", to=to(service), tls=tls, send_proxy="v2") as proxy:
        plain = connect(proxy.addresses[0])
        client = await asyncio.to_thread(context.wrap_socket, plain, server_hostname="localhost")
        with client:
            behind, _ = service.accept()
            with behind, behind.makefile("rb") as read:
                head = await asyncio.to_thread(read.read, 16)
                body = await asyncio.to_thread(read.read, struct.unpack("!H", head[14:])[0])
    said = tlvs(body[12:])
    assert said[SSL][0] & 0b111 == (0b111 if shown else 0b001)
    assert said[SSL][1:5] != b"\0\0\0\0"


async def test_version_2_tells_the_client_and_its_tls(certs: Certificates, service: socket.socket) -> None:
    tls = own(certs.server, roots=certs.ca.cert, alpn=("h2", "x"))
    async with Proxy(listen="127.0.0.1:0", to=to(service), tls=tls, send_proxy="v2") as proxy:
        client = await asyncio.to_thread(shake, proxy.addresses[0], certs, "x")
        with client:
            client.sendall(b"payload")
            behind, _ = service.accept()
            with behind, behind.makefile("rb") as read:
                head = await asyncio.to_thread(read.read, 16)
                assert head[:14] == SIGNATURE + b"\x21\x11", "PROXY, TCP over IPv4"
                body = await asyncio.to_thread(read.read, struct.unpack("!H", head[14:])[0])
                assert await asyncio.to_thread(read.read, 7) == b"payload"
            source, destination = client.getsockname(), client.getpeername()
    addresses = socket.inet_aton(source[0]) + socket.inet_aton(destination[0])
    assert body[:12] == addresses + struct.pack("!HH", source[1], destination[1])
    said = tlvs(body[12:])
    assert (said[ALPN], said[AUTHORITY]) == (b"x", b"localhost")
    assert said[SSL][0] & 0b111 == 0b111, "TLS, a certificate now, and one in this session"
    assert said[SSL][1:5] == b"\0\0\0\0", "verified"
    inner = tlvs(said[SSL][5:])
    assert (inner[SSL_VERSION], inner[SSL_CN]) == (b"TLSv1.3", b"client.test")


async def test_version_1_tells_the_client(service: socket.socket) -> None:
    async with Proxy(listen="127.0.0.1:0", to=to(service), send_proxy="v1") as proxy:
        with connect(proxy.addresses[0]) as client:
            client.sendall(b"payload")
            behind, _ = service.accept()
            with behind, behind.makefile("rb") as read:
                line = await asyncio.to_thread(read.readline)
                assert await asyncio.to_thread(read.read, 7) == b"payload"
            ours, theirs = client.getsockname(), client.getpeername()
    assert line == f"PROXY TCP4 127.0.0.1 127.0.0.1 {ours[1]} {theirs[1]}\r\n".encode()


async def test_the_header_lies_outside_of_tls_to_the_service(certs: Certificates) -> None:
    """The service reads the header first and then shakes hands."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs.server.cert_path, certs.server.key_path)
    with socket.create_server(("127.0.0.1", 0)) as service:
        service.settimeout(LATEST)

        def serve() -> bytes:
            behind, _ = service.accept()
            with behind:
                line = b""
                while not line.endswith(b"\r\n"):
                    line += behind.recv(1)
                with context.wrap_socket(behind, server_side=True) as inner:
                    return line + inner.recv(5)

        proxy = Proxy(
            listen="127.0.0.1:0",
            to=f"tls://localhost:{service.getsockname()[1]}",
            upstream_tls=TlsConfig(roots=certs.ca.cert),
            send_proxy="v1",
        )
        async with proxy:
            serving = asyncio.create_task(asyncio.to_thread(serve))
            with connect(proxy.addresses[0]) as client:
                client.sendall(b"hello")
                got = await serving
    assert got.startswith(b"PROXY TCP4 127.0.0.1 ")
    assert got.endswith(b"\r\nhello")


@pytest.mark.parametrize("pieces", [1, 7, 1000])
@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_a_trusted_one_is_believed(
    certs: Certificates, service: socket.socket, version: str, pieces: int
) -> None:
    """Also when it comes byte by byte; what it said goes on to the service, TLS follows it."""
    said = b"PROXY TCP6 2001:db8::1 2001:db8::2 4711 443\r\n"
    if version == "v2":
        ends_of_it = [socket.inet_pton(socket.AF_INET6, text) for text in ("2001:db8::1", "2001:db8::2")]
        tlv = b"\xe0\x00\x03own"
        said = header_v2(b"".join(ends_of_it) + struct.pack("!HH", 4711, 443) + tlv, 0x21)
    events: list[ProxyEvent] = []
    proxy = Proxy(
        listen="127.0.0.1:0",
        to=to(service),
        tls=own(certs.server),
        proxy_from="127.0.0.0/8",
        send_proxy="v1",
        log_connections=True,
        on_event=events.append,
    )
    async with proxy:
        with connect(proxy.addresses[0]) as raw:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(said), pieces):
                raw.sendall(said[at : at + pieces])
            client = await asyncio.to_thread(trusting(certs).wrap_socket, raw, server_hostname="localhost")
            with client:
                client.sendall(b"x")
                behind, _ = service.accept()
                with behind, behind.makefile("rb") as read:
                    line = await asyncio.to_thread(read.readline)
                    assert proxy.connections()[0].client == "[2001:db8::1]:4711"  # while it is there
        await until(lambda: [one for one in events if isinstance(one, ConnectionEvent)], "the end is told")
    assert line == b"PROXY TCP6 2001:db8::1 2001:db8::2 4711 443\r\n"


async def test_a_strangers_header_is_payload() -> None:
    with echo() as service:
        async with Proxy(listen="127.0.0.1:0", to=service.to, proxy_from="192.0.2.0/24") as proxy:
            with connect(proxy.addresses[0]) as one:
                line = b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n"
                assert await asyncio.to_thread(say, one, line) == b"echo\n" + line
                assert proxy.stats().errors == {}


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 99999\r\n",
        b"PROXY " + b"x" * 200,
        SIGNATURE + b"\x31\x11\x00\x00",
        SIGNATURE + b"\x21\x11\xff\xff",
        header_v2(b"\0" * 12, 0x12),  # datagrams
        header_v2(b"\0" * 3, 0x11),
    ],
)
async def test_a_trusted_network_that_sends_none_is_refused(said: bytes) -> None:
    events: list[ProxyEvent] = []
    with echo() as service:
        options: dict[str, Any] = {"proxy_from": "127.0.0.1", "on_event": events.append}
        async with Proxy(listen="127.0.0.1:0", to=service.to, **options) as proxy:
            with connect(proxy.addresses[0]) as one, contextlib.suppress(OSError):
                assert await asyncio.to_thread(say, one, said) == b""
            await until(lambda: ends(events, "proxy_header"), "it is told")
    assert isinstance(ends(events, "proxy_header")[0].error, errors.RemoteProtocolError)


async def test_a_health_check_speaks_for_itself_and_the_rate_is_of_the_named(tmp_path: Path) -> None:
    """LOCAL keeps the socket's addresses; one trusted proxy stands for many clients."""
    with echo() as service:
        proxy = Proxy(
            listen=f"unix:{tmp_path / 'own'}", to=service.to, proxy_from="unix", rate=0.001, burst=1
        )
        async with proxy:

            async def ask(header: bytes) -> bytes:
                with connect(str(tmp_path / "own")) as one, contextlib.suppress(OSError):
                    return await asyncio.to_thread(say, one, header + b"x")
                return b""

            assert await ask(header_v2(b"", 0x00, 0x20)) == b"echo\nx"
            assert await ask(header_v2(b"junk", 0xFF, 0x20)) == b"echo\nx", "what it says is discarded"
            for address in ("192.0.2.1", "192.0.2.2"):
                line = f"PROXY TCP4 {address} 192.0.2.9 1 2\r\n".encode()
                assert await ask(line) == b"echo\nx"
                assert await ask(line) == b""


async def test_two_proxies_in_a_row_tell_the_first_client(
    certs: Certificates, service: socket.socket
) -> None:
    """Ours writes what ours reads."""
    inner = Proxy(listen="127.0.0.1:0", to=to(service), proxy_from="127.0.0.1", send_proxy="v2")
    async with inner:
        outer = Proxy(
            listen="127.0.0.1:0",
            to=inner.addresses[0],
            tls=TlsConfig(
                credentials=Credentials.certificate(certs.server.cert, certs.server.key),
                roots=certs.ca.cert,
            ),
            send_proxy="v2",
        )
        async with outer:
            client = await asyncio.to_thread(shake, outer.addresses[0], certs)
            with client:
                client.sendall(b"x")
                behind, _ = service.accept()
                with behind, behind.makefile("rb") as read:
                    head = await asyncio.to_thread(read.read, 16)
                    body = await asyncio.to_thread(read.read, struct.unpack("!H", head[14:])[0])
                port = client.getsockname()[1]
    assert struct.unpack("!H", body[8:10]) == (port,)
    assert tlvs(tlvs(body[12:])[SSL][5:])[SSL_CN] == b"client.test"
