"""openssl s_client and s_server as peers: certificates and pre-shared keys, TLS 1.2 and 1.3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import sapper.tls as tls
from sapper.errors import CertificateError, CredentialsRejected
from support import traffic
from support.certs import Certificates
from support.programs import free_port, run_program

pytestmark = pytest.mark.needs("openssl")

KEY = bytes(range(32))
VERSIONS = ["TLSv1.2", "TLSv1.3"]
FLAG = {"TLSv1.2": "-tls1_2", "TLSv1.3": "-tls1_3"}


def psk_flags(version: str, suite: str | None, identity: str = "device") -> list[str]:
    flags = ["-psk", KEY.hex(), "-psk_identity", identity, FLAG[version]]
    if version == "TLSv1.2":
        flags += ["-cipher", f"{suite or 'PSK-AES256-GCM-SHA384'}:@SECLEVEL=0"]
    else:
        flags += ["-ciphersuites", suite or "TLS_AES_128_GCM_SHA256"]
    return flags


def server(*flags: Any) -> tuple[int, Any]:
    port = free_port()
    return port, run_program(
        "openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-naccept", "1", "-quiet", *flags, port=port
    )


def client(*flags: Any) -> Callable[[int], Any]:
    return lambda port: run_program("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-quiet", *flags)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("key", ["server", "rsa_server"])
def test_certificates_to_s_server(certs: Certificates, inside: Any, version: str, key: str) -> None:
    theirs = getattr(certs, key)
    port, program = server("-cert", theirs.cert_path, "-key", theirs.key_path, FLAG[version])
    with (
        program as peer,
        inside(
            socket=f"tcp://127.0.0.1:{port}",
            server_hostname=certs.name,
            credentials=tls.Credentials.none(roots=certs.ca.cert),
        ) as us,
    ):
        info = us.bridge.handshake_sync()
        assert info.version == version
        assert info.peer_certificate == theirs.cert_der
        us.bridge.start()
        us.exchange(peer)
        assert us.bridge.stats().facts["transport.tls.engine"] == "rustls"


@pytest.mark.parametrize("version", VERSIONS)
def test_certificates_from_s_client(certs: Certificates, inside: Any, accepted: Any, version: str) -> None:
    connection, peer = accepted(
        client(
            *("-CAfile", certs.ca.cert_path, "-verify_return_error", "-verify_hostname", certs.name),
            *("-servername", certs.name, FLAG[version]),
        )
    )
    ours = tls.Credentials.certificate(certs.server.cert, certs.server.key)
    with inside(socket=connection, server_side=True, credentials=ours) as us:
        assert us.bridge.handshake_sync().version == version
        us.bridge.start()
        us.exchange(peer)


@pytest.mark.parametrize("version", VERSIONS)
def test_mutual_certificates(certs: Certificates, inside: Any, version: str) -> None:
    port, program = server(
        *("-cert", certs.server.cert_path, "-key", certs.server.key_path, FLAG[version]),
        *("-Verify", "1", "-verify_return_error", "-CAfile", certs.ca.cert_path),
    )
    ours = tls.Credentials.certificate(certs.client.cert, certs.client.key, roots=certs.ca.cert)
    with (
        program as peer,
        inside(socket=f"tcp://127.0.0.1:{port}", server_hostname=certs.name, credentials=ours) as us,
    ):
        us.bridge.handshake_sync()
        us.bridge.start()
        us.exchange(peer)


@pytest.mark.parametrize(
    ("version", "suite"),
    [
        ("TLSv1.2", "PSK-AES256-GCM-SHA384"),
        ("TLSv1.2", "PSK-AES128-GCM-SHA256"),
        ("TLSv1.2", "PSK-AES256-CBC-SHA384"),
        ("TLSv1.2", "PSK-AES128-CBC-SHA256"),
        ("TLSv1.2", "PSK-AES256-CBC-SHA"),
        ("TLSv1.2", "PSK-AES128-CBC-SHA"),
        ("TLSv1.3", "TLS_AES_128_GCM_SHA256"),
        ("TLSv1.3", "TLS_CHACHA20_POLY1305_SHA256"),
    ],
)
@pytest.mark.parametrize("server_side", [False, True], ids=["to-s_server", "from-s_client"])
def test_psk(inside: Any, accepted: Any, version: str, suite: str, server_side: bool) -> None:
    config = tls.TlsConfig(
        credentials=tls.Credentials.psk(identity="device", key=KEY),
        min_version=version,
        max_version=version,
        danger_legacy_suites="CBC" in suite,
    )
    flags = psk_flags(version, suite)
    if server_side:
        connection, peer = accepted(client(*flags))
        with inside(socket=connection, server_side=True, credentials=config) as us:
            check_psk(us, peer, version, suite)
    else:
        port, program = server("-nocert", *flags)
        with program as peer, inside(socket=f"tcp://127.0.0.1:{port}", credentials=config) as us:
            check_psk(us, peer, version, suite)


def check_psk(us: Any, peer: Any, version: str, suite: str) -> None:
    info = us.bridge.handshake_sync()
    assert info.version == version
    assert info.peer_certificate is None
    us.bridge.start()
    us.exchange(peer)
    facts = us.bridge.stats().facts
    assert facts["transport.tls.engine"] == "openssl"
    assert facts["transport.tls.cipher_suite"] == info.cipher_suite


@pytest.mark.parametrize("server_side", [False, True], ids=["to-s_server", "from-s_client"])
def test_psk_with_an_empty_identity(inside: Any, accepted: Any, server_side: bool) -> None:
    config = tls.TlsConfig(
        credentials=tls.Credentials.psk(identity="", key=KEY), min_version="TLSv1.2", max_version="TLSv1.2"
    )
    flags = psk_flags("TLSv1.2", None, identity="")
    if server_side:
        connection, peer = accepted(client(*flags))
        with inside(socket=connection, server_side=True, credentials=config) as us:
            us.bridge.handshake_sync()
            us.bridge.start()
            us.exchange(peer)
    else:
        port, program = server("-nocert", *flags)
        with program as peer, inside(socket=f"tcp://127.0.0.1:{port}", credentials=config) as us:
            us.bridge.handshake_sync()
            us.bridge.start()
            us.exchange(peer)


@pytest.mark.parametrize("version", VERSIONS)
def test_another_key_is_an_alert(inside: Any, version: str) -> None:
    port, program = server("-nocert", *psk_flags(version, None))
    other = tls.TlsConfig(
        credentials=tls.Credentials.psk(identity="device", key=bytes(32)),
        min_version=version,
        max_version=version,
    )
    with (
        program,
        inside(socket=f"tcp://127.0.0.1:{port}", credentials=other) as us,
        pytest.raises(CredentialsRejected, match="pre-shared key is probably another one") as refused,
    ):
        us.bridge.handshake_sync()
    assert refused.value.phase == "handshake"
    assert refused.value.context.alert_received


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("expired", "expired"),
        ("not_yet", "not_yet_valid"),
        ("wrong_name", "wrong_name"),
        ("untrusted", "unknown_issuer"),
    ],
)
def test_a_bad_certificate_is_refused_with_its_reason(
    certs: Certificates, inside: Any, which: str, reason: str
) -> None:
    bad = getattr(certs, which)
    port, program = server("-cert", bad.cert_path, "-key", bad.key_path)
    with (
        program,
        inside(
            socket=f"tcp://127.0.0.1:{port}",
            server_hostname=certs.name,
            credentials=tls.Credentials.none(roots=certs.ca.cert),
        ) as us,
        pytest.raises(CertificateError) as refused,
    ):
        us.bridge.handshake_sync()
    assert refused.value.reason == reason


def test_key_updates_of_the_peer_are_followed(certs: Certificates, inside: Any) -> None:
    # Without -quiet the first letter of a line from standard input is a command: K asks us for one too.
    port = free_port()
    program = run_program(
        *("openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-naccept", "1", "-tls1_3"),
        *("-cert", certs.server.cert_path, "-key", certs.server.key_path),
        port=port,
    )
    with (
        program as peer,
        inside(
            socket=f"tcp://127.0.0.1:{port}",
            server_hostname=certs.name,
            credentials=tls.Credentials.none(roots=certs.ca.cert),
        ) as us,
    ):
        us.bridge.handshake_sync()
        us.bridge.start()
        for turn in range(5):
            # It takes all that it reads at once as one command, so what follows waits for its answer.
            peer.output = b""
            peer.send(b"K\n")
            peer.wait_for(b"SSL_do_handshake -> 1")
            line = f"after key update {turn}\n".encode()
            peer.send(line)
            assert traffic.receive_exactly(us.inner, len(line)) == line
            us.inner.sendall(line.upper())
            peer.wait_for(line.upper())
        assert us.errors == []
