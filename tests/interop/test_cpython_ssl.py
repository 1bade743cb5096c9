"""CPython's own ssl as the peer: certificates in this process, pre-shared keys in a newer interpreter."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

import sapper.tls as tls
from support import needs, traffic
from support.certs import Certificates
from support.programs import free_port, run_program

PEERS = Path(__file__).parent / "peers"
VERSIONS = ["TLSv1.2", "TLSv1.3"]
KEY = bytes(range(50, 82))


def only(context: ssl.SSLContext, version: str) -> ssl.SSLContext:
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    return context


def echo(context: ssl.SSLContext, connection: socket.socket, **options: Any) -> traffic.Background:
    def run() -> None:
        connection.settimeout(20)
        with context.wrap_socket(connection, **options) as peer:
            while data := peer.recv(65536):
                peer.sendall(data)
            peer.unwrap()

    return traffic.Background(run)


def check(us: Any, version: str) -> None:
    assert us.bridge.handshake_sync().version == version
    us.bridge.start()
    data = traffic.payload(2_000_000)
    job = traffic.Background(lambda: us.inner.sendall(data))
    assert traffic.digest(traffic.receive_exactly(us.inner, len(data))) == traffic.digest(data)
    job.join()
    # Our end of file becomes close_notify, the peer's close_notify becomes an end of file.
    us.inner.shutdown(socket.SHUT_WR)
    assert traffic.receive_all(us.inner) == b""
    us.bridge.wait_closed_sync(20)
    assert us.errors == []


@pytest.mark.parametrize("version", VERSIONS)
def test_certificates_to_a_server(certs: Certificates, inside: Any, version: str) -> None:
    context = only(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), version)
    context.load_cert_chain(certs.server.cert_path, certs.server.key_path)
    ours, theirs = socket.socketpair()
    peer = echo(context, theirs, server_side=True)
    credentials = tls.Credentials.none(roots=certs.ca.cert)
    with inside(socket=ours, server_hostname=certs.name, credentials=credentials) as us:
        check(us, version)
    peer.join()


@pytest.mark.parametrize("version", VERSIONS)
def test_certificates_from_a_client(certs: Certificates, inside: Any, version: str) -> None:
    context = only(ssl.create_default_context(cadata=certs.ca.cert.decode()), version)
    context.set_alpn_protocols(["x", "sapper-test"])
    ours, theirs = socket.socketpair()
    peer = echo(context, theirs, server_hostname=certs.name)
    config = tls.TlsConfig(
        credentials=tls.Credentials.certificate(certs.server.cert, certs.server.key), alpn=("sapper-test",)
    )
    with inside(socket=ours, server_side=True, credentials=config) as us:
        info = us.bridge.handshake_sync()
        assert info.alpn == b"sapper-test"
        assert info.server_name == certs.name
        check(us, version)
    peer.join()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("identity", ["device", ""])
def test_psk_to_a_server(inside: Any, version: str, identity: str) -> None:
    if version == "TLSv1.3" and not identity:
        return  # TLS 1.3 forbids an empty identity; that the option is refused is tested with the options
    interpreter = needs.python("3.13")
    port = free_port()
    arguments = ("server", str(port), version, identity, KEY.hex())
    with run_program(interpreter, PEERS / "psk_echo.py", *arguments, port=port) as peer:
        config = psk(identity, version)
        with inside(socket=f"tcp://127.0.0.1:{port}", credentials=config) as us:
            check(us, version)
        assert peer.wait() == 0
        assert b"orderly end" in peer.output


@pytest.mark.parametrize("version", VERSIONS)
def test_psk_from_a_client(inside: Any, accepted: Any, version: str) -> None:
    interpreter = needs.python("3.13")
    connection, peer = accepted(
        lambda port: run_program(
            interpreter, PEERS / "psk_echo.py", "client", str(port), version, "device", KEY.hex()
        )
    )
    with inside(socket=connection, server_side=True, credentials=psk("device", version)) as us:
        assert us.bridge.handshake_sync().psk_identity == "device"
        check(us, version)
    assert peer.wait() == 0
    assert b"orderly end" in peer.output


def psk(identity: str, version: str) -> tls.TlsConfig:
    return tls.TlsConfig(
        credentials=tls.Credentials.psk(identity=identity, key=KEY), min_version=version, max_version=version
    )


async def test_a_session_of_another_hash_is_no_hindrance(certs: Certificates) -> None:
    """OpenSSL's client leaves a session of another hash than our suite's out of its second hello."""
    context = ssl.create_default_context(cafile=str(certs.ca.cert_path))

    def visit(port: int, session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, str]:
        near = socket.create_connection(("127.0.0.1", port))
        with context.wrap_socket(near, server_hostname=certs.name, session=session) as peer:
            peer.settimeout(20)
            peer.sendall(b"x")
            assert peer.recv(1) == b"x"
            cipher = peer.cipher()
            assert cipher is not None
            kept = peer.session
            peer.unwrap().close()
            return kept, cipher[0]

    async def echo_one(stream: tls.TlsStream) -> None:
        stream.write(await stream.readexactly(1))
        await stream.read()

    session = None
    # The second one asks for a group of which the client sends no share at first.
    for options in ({"cipher_suites": ["TLS_AES_128_GCM_SHA256"]}, {"groups": ["secp384r1"]}):
        config = tls.TlsConfig(
            credentials=tls.Credentials.certificate(certs.server.cert, certs.server.key), **options
        )
        async with tls.listen(("127.0.0.1", 0), credentials=config) as listener:
            serving = asyncio.create_task(listener.serve(echo_one))
            session, suite = await asyncio.to_thread(visit, listener.port, session)
            assert suite.endswith("SHA256")
            serving.cancel()
