"""GnuTLS's command line client and server as peers: certificates and pre-shared keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sapper.tls as tls
from support import traffic
from support.certs import Certificates
from support.programs import free_port, run_program

pytestmark = pytest.mark.needs("gnutls-cli", "gnutls-serv")

KEY = bytes(range(100, 132))
VERSIONS = ["TLSv1.2", "TLSv1.3"]
PRIORITY = {"TLSv1.2": "NORMAL:-VERS-ALL:+VERS-TLS1.2", "TLSv1.3": "NORMAL:-VERS-ALL:+VERS-TLS1.3"}
# TLS 1.2 has suites of plain PSK; TLS 1.3 always wants a fresh key exchange beside it.
PSK_PRIORITY = {
    "TLSv1.2": PRIORITY["TLSv1.2"] + ":-KX-ALL:+PSK",
    "TLSv1.3": PRIORITY["TLSv1.3"] + ":-KX-ALL:+ECDHE-PSK",
}


def echo_server(*flags: Any) -> tuple[int, Any]:
    port = free_port()
    return port, run_program("gnutls-serv", "--echo", "--port", str(port), *flags, port=port)


def check_echo(us: Any) -> None:
    # The echo server takes what it reads at once as one command, so each line waits for its answer; and it
    # prints each, so there are no more than fit the pipe that nobody reads meanwhile.
    for turn in range(60):
        line = traffic.payload(turn + 1, turn).hex().encode() + b"\n"
        us.inner.sendall(line)
        assert traffic.receive_exactly(us.inner, len(line)) == line


@pytest.mark.parametrize("version", VERSIONS)
def test_certificates_to_gnutls_serv(certs: Certificates, inside: Any, version: str) -> None:
    port, program = echo_server(
        *("--x509certfile", certs.server.cert_path, "--x509keyfile", certs.server.key_path),
        *("--priority", PRIORITY[version]),
    )
    credentials = tls.Credentials.none(roots=certs.ca.cert)
    with (
        program,
        inside(socket=f"tcp://127.0.0.1:{port}", server_hostname=certs.name, credentials=credentials) as us,
    ):
        assert us.bridge.handshake_sync().version == version
        us.bridge.start()
        check_echo(us)


@pytest.mark.parametrize("version", VERSIONS)
def test_psk_to_gnutls_serv(tmp_path: Path, inside: Any, version: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"device:{KEY.hex()}\n")
    port, program = echo_server("--pskpasswd", keys, "--priority", PSK_PRIORITY[version])
    config = tls.TlsConfig(
        credentials=tls.Credentials.psk(identity="device", key=KEY), min_version=version, max_version=version
    )
    with program, inside(socket=f"tcp://127.0.0.1:{port}", credentials=config) as us:
        assert us.bridge.handshake_sync().version == version
        us.bridge.start()
        check_echo(us)


@pytest.mark.parametrize("version", VERSIONS)
def test_certificates_from_gnutls_cli(certs: Certificates, inside: Any, accepted: Any, version: str) -> None:
    connection, peer = accepted(
        lambda port: run_program(
            *("gnutls-cli", "--port", str(port), "--x509cafile", certs.ca.cert_path),
            *("--verify-hostname", certs.name, "--sni-hostname", certs.name),
            *("--priority", PRIORITY[version], "127.0.0.1"),
        )
    )
    ours = tls.Credentials.certificate(certs.server.cert, certs.server.key)
    with inside(socket=connection, server_side=True, credentials=ours) as us:
        assert us.bridge.handshake_sync().version == version
        us.bridge.start()
        check_lines(us, peer)


@pytest.mark.parametrize("version", VERSIONS)
def test_psk_from_gnutls_cli(inside: Any, accepted: Any, version: str) -> None:
    connection, peer = accepted(
        lambda port: run_program(
            *("gnutls-cli", "--port", str(port), "--pskusername", "device", "--pskkey", KEY.hex()),
            *("--priority", PSK_PRIORITY[version], "127.0.0.1"),
        )
    )
    config = tls.TlsConfig(
        credentials=tls.Credentials.psk(identity="device", key=KEY), min_version=version, max_version=version
    )
    with inside(socket=connection, server_side=True, credentials=config) as us:
        assert us.bridge.handshake_sync().version == version
        us.bridge.start()
        check_lines(us, peer)


def check_lines(us: Any, peer: Any) -> None:
    """The client reads its terminal line by line, so the conversation is one of lines."""
    peer.wait_for(b"Simple Client Mode")
    for turn in range(20):
        line = traffic.payload(500, turn).hex().encode() + b"\n"
        peer.send(line)
        assert traffic.receive_exactly(us.inner, len(line)) == line
        us.inner.sendall(line[::-1].strip() + b"\n")
        peer.wait_for(line[::-1].strip())
