"""Upgrades in place on streams: both roles against each other, injected bytes, deadlines, mistakes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest

from sapper import pump, tls
from sapper.errors import (
    CertificateError,
    ConfigError,
    HandshakeDeadline,
    IncompatiblePeer,
    RemoteProtocolError,
    SapperError,
)
from sapper.stream import memory_pair
from sapper.tls import Credentials
from support.certs import Certificates

PSK = Credentials.psk("x", bytes(range(32)))

GREETINGS = {"smtp": (b"220 mail ready\r\n", b"220 localhost ESMTP\r\n"),
             "imap": (b"* OK ready\r\n", b"* OK IMAP4rev1 ready\r\n")}  # fmt: skip


@pytest.mark.parametrize("upgrade", ["postgres", "smtp", "imap"])
async def test_both_roles_of_a_stream_agree(
    any_loop: str, leak_check: None, certs: Certificates, upgrade: Any
) -> None:
    one, other = memory_pair()
    async with asyncio.timeout(30):
        client, server = await asyncio.gather(
            tls.start_client(
                one,
                credentials=Credentials.none(roots=certs.ca.cert),
                server_hostname=certs.name,
                upgrade=upgrade,
            ),
            tls.start_server(
                other,
                credentials=Credentials.certificate(certs.server.cert, certs.server.key),
                upgrade=upgrade,
            ),
        )
        service, program = GREETINGS.get(upgrade, (b"", b""))
        # The service greets, as it would; the program's greeting is another one.
        server.write(service + b"what follows")
        assert await client.readexactly(len(program)) == program
        assert await client.readexactly(12) == b"what follows"
        client.write(b"payload")
        assert await server.readexactly(7) == b"payload"
        await asyncio.gather(client.aclose(), server.aclose())


async def test_tls_at_once_agrees_on_its_protocol(leak_check: None, certs: Certificates) -> None:
    identity = Credentials.certificate(certs.server.cert, certs.server.key)
    roots = Credentials.none(roots=certs.ca.cert)
    for server_upgrade in ("postgres", "postgres-direct"):
        one, other = memory_pair()
        client, server = await asyncio.gather(
            tls.start_client(one, credentials=roots, server_hostname=certs.name, upgrade="postgres-direct"),
            tls.start_server(other, credentials=identity, upgrade=server_upgrade),
        )
        assert client.info.alpn == server.info.alpn == b"postgresql"
        await asyncio.gather(client.aclose(), server.aclose())
    one, other = memory_pair()
    made, refused = await asyncio.gather(
        tls.start_client(one, credentials=roots, server_hostname=certs.name),
        tls.start_server(other, credentials=identity, upgrade="postgres"),
        return_exceptions=True,
    )
    assert isinstance(refused, IncompatiblePeer)
    assert refused.reason == "no_alpn"
    if isinstance(made, tls.TlsStream):  # in TLS 1.3 a client is done before the server has looked
        with pytest.raises(SapperError):
            await made.read()
        made.abort()
        with contextlib.suppress(SapperError):
            await made.wait_closed()


@pytest.mark.parametrize("upgrade", ["postgres", "postgres-direct"])
async def test_a_reload_and_sessions_reach_those_with_an_upgrade(
    leak_check: None, certs: Certificates, tmp_path: Path, upgrade: Any
) -> None:
    """An upgrade brings its own application protocol, and is the same configuration all the same."""
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    log, capture = tmp_path / "log", tmp_path / "capture"

    def write(identity: Any) -> None:
        chain.write_bytes(identity.cert)
        key.write_bytes(identity.key)

    write(certs.server)
    config = tls.TlsConfig(
        credentials=Credentials.certificate(chain, key), key_log_file=log, capture_file=capture
    )
    client = tls.TlsConfig(roots=certs.ca.cert)

    async def visit(port: int) -> tuple[bytes | None, bool]:
        options: Any = {"credentials": client, "server_hostname": certs.name, "upgrade": upgrade}
        async with await tls.connect("127.0.0.1", port, **options) as stream:
            assert await stream.read(5) == b"hello"
            assert stream.info.alpn == b"postgresql"
            return stream.info.peer_certificate, stream.info.resumed

    async def greet(stream: tls.TlsStream) -> None:
        stream.write(b"hello")
        await stream.drain()
        await stream.read()

    async with (
        asyncio.timeout(30),
        tls.listen(("127.0.0.1", 0), credentials=config, upgrade=upgrade) as server,
    ):
        serving = asyncio.create_task(server.serve(greet))
        assert await visit(server.port) == (certs.server.cert_der, False)
        assert await visit(server.port) == (certs.server.cert_der, True)
        write(certs.rsa_server)
        assert config.reload()
        assert await visit(server.port) == (certs.rsa_server.cert_der, False)
        write(certs.untrusted)
        assert config.reload()
        with pytest.raises(CertificateError):
            await visit(server.port)
        serving.cancel()
    assert len({line.split()[1] for line in log.read_text().splitlines()}) == 4, "a log of four connections"
    assert capture.stat().st_size > 0


@pytest.mark.parametrize(
    ("upgrade", "said", "answer"),
    [
        ("smtp", b"EHLO x\r\nSTARTTLS\r\nMAIL FROM:<evil@example>\r\n", b"Ready"),
        ("imap", b"a STARTTLS\r\nb LOGIN evil evil\r\n", b"begin TLS"),
        ("postgres", b"\0\0\0\x08\x04\xd2\x16\x2f\0\0\0\x09\0\x03\0\0\0", b"S"),
    ],
)
async def test_commands_in_clear_behind_the_request_are_refused(
    leak_check: None, upgrade: Any, said: bytes, answer: bytes
) -> None:
    """CVE-2011-0411. Given as what was read already, so that they lie together for certain."""
    near, far = socket.socketpair()
    with near:
        with pytest.raises(RemoteProtocolError) as injected:
            await tls.start_server(far, credentials=PSK, upgrade=upgrade, initial_data=said)
        assert injected.value.reason == "early_data"
        near.settimeout(10)
        heard = b""
        with contextlib.suppress(ConnectionResetError):
            while data := near.recv(1000):
                heard += data
        assert answer not in heard, "nobody is told that TLS begins"


async def test_answers_in_clear_behind_the_last_one_are_refused(leak_check: None) -> None:
    """CVE-2021-23222."""
    near, far = socket.socketpair()
    with near:
        near.sendall(b"SR\0\0\0\x08\0\0\0\0")
        with pytest.raises(RemoteProtocolError) as injected:
            await tls.start_client(far, credentials=PSK, server_hostname="x", upgrade="postgres")
        assert injected.value.reason == "early_data"


async def test_a_server_without_tls_is_none(leak_check: None) -> None:
    for upgrade, said in (
        ("postgres", b"N"),
        ("smtp", b"220 x\r\n250 nothing here\r\n"),
        ("imap", b"* PREAUTH in\r\n"),
    ):
        near, far = socket.socketpair()
        with near:
            near.sendall(said)
            with pytest.raises((IncompatiblePeer, RemoteProtocolError)) as refused:
                await tls.start_client(far, credentials=PSK, server_hostname="x", upgrade=upgrade)  # type: ignore[arg-type]
            assert refused.value.reason in ("no_tls", "early_data")


async def test_silence_meets_the_deadline_on_either_side(leak_check: None) -> None:
    for start in (tls.start_client, tls.start_server):
        near, far = socket.socketpair()
        with near, pytest.raises(HandshakeDeadline):
            await start(far, credentials=PSK, upgrade="smtp", handshake_timeout=0.2)
    # Inside too: a service that does not greet.
    one, other = memory_pair()
    client, server = await asyncio.gather(
        tls.start_client(one, credentials=PSK, upgrade="smtp", handshake_timeout=2.0),
        tls.start_server(other, credentials=PSK, upgrade="smtp", handshake_timeout=2.0),
    )
    with pytest.raises(HandshakeDeadline):
        await server.read()
    for stream in (client, server):
        stream.abort()
        with contextlib.suppress(SapperError):
            await stream.wait_closed()


async def test_a_listener_upgrades(leak_check: None) -> None:
    async with (
        asyncio.timeout(30),
        tls.listen(("127.0.0.1", 0), credentials=PSK, upgrade="postgres") as server,
    ):
        client = await tls.connect("127.0.0.1", server.port, credentials=PSK, upgrade="postgres")
        accepted = await server.accept()
        client.write(b"hello")
        assert await accepted.readexactly(5) == b"hello"
        await asyncio.gather(client.aclose(), accepted.aclose())


async def test_what_makes_no_sense_is_named() -> None:
    near, far = socket.socketpair()
    with near, far:
        for options in ({"upgrade": "gopher"}, {"upgrade": "smtp", "framing": "u16"}):
            with pytest.raises(ConfigError) as wrong:
                tls.create_bridge(socket=near.fileno(), sink=far.fileno(), credentials=PSK, **options)  # type: ignore[arg-type]
            assert wrong.value.field == "upgrade"
        with pytest.raises(ConfigError) as wrong:
            pump.connect(near.fileno(), far.fileno(), options=pump.PumpOptions(upgrade="smtp"))
        assert wrong.value.field == "upgrade"
        with pytest.raises(ConfigError) as wrong:
            await tls.start_server(near.fileno(), credentials=PSK, upgrade="mysql")
        assert wrong.value.reason == "two_sided"
    with pytest.raises(ConfigError) as wrong:
        tls.listen(("127.0.0.1", 0), credentials=PSK, upgrade="mysql")
    assert wrong.value.reason == "two_sided"
