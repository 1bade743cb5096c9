"""Who is welcome, keys that are asked for, renegotiation, early data: with foreign programs."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import ipaddress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import sapper.tls as tls
from sapper.errors import PolicyDenied, UnknownPeer
from support import traffic
from support.certs import Certificates
from support.hearing import FROM_A_PEER
from support.programs import Program, free_port, run_program

pytestmark = pytest.mark.needs("openssl")

VERSIONS = ["TLSv1.2", "TLSv1.3"]
FLAG = {"TLSv1.2": "-tls1_2", "TLSv1.3": "-tls1_3"}
KEY = bytes(range(50, 82))


class Somebody:
    """A client's certificate that has a name of each kind."""

    def __init__(self, certs: Certificates, folder: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        names = [(NameOID.COMMON_NAME, "worker 7"), (NameOID.ORGANIZATIONAL_UNIT_NAME, "production")]
        alternatives: list[x509.GeneralName] = [
            x509.DNSName("seven.workers.test"),
            x509.UniformResourceIdentifier("spiffe://test/ns/workers/7"),
            x509.RFC822Name("seven@workers.test"),
            x509.IPAddress(ipaddress.ip_address("10.1.2.3")),
            x509.IPAddress(ipaddress.ip_address("2001:db8::7")),
        ]
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(*name) for name in names]))
            .issuer_name(certs.ca.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .sign(certs.ca.private_key, hashes.SHA256())
        )
        self.chain, self.key = folder / "somebody.pem", folder / "somebody.key"
        self.chain.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        self.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        spki = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.pin = hashlib.sha256(spki).hexdigest()


# For each kind of rule: what fits, and what does not.
RULES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "dns": ({"dns": "*.workers.test"}, {"dns": "*.test"}),
    "uri": ({"uri": "spiffe://test/ns/workers/*"}, {"uri": "spiffe://test/ns/workers"}),
    "email": ({"email": "seven@workers.test"}, {"email": "eight@workers.test"}),
    "ip": ({"ip": "10.0.0.0/8"}, {"ip": "11.0.0.0/8"}),
    "ipv6": ({"ip": "2001:db8::/32"}, {"ip": "2001:db9::/32"}),
    "cn": ({"cn": "worker 7"}, {"cn": "worker"}),
    "ou": ({"ou": "production"}, {"ou": "office"}),
    "pin": ({"pin": ""}, {"pin": "00" * 32}),
    "all of them": ({"dns": "*.workers.test", "ou": "production"}, {"dns": "*.workers.test", "ou": "x"}),
}


def rule(values: dict[str, str], somebody: Somebody) -> tls.PeerRules:
    return tls.PeerRules.from_mapping({name: value or somebody.pin for name, value in values.items()})


def server(certs: Certificates, **more: Any) -> tls.TlsConfig:
    return tls.TlsConfig(
        credentials=tls.Credentials.certificate(certs.server.cert, certs.server.key, roots=certs.ca.cert),
        **more,
    )


def s_client(certs: Certificates, version: str, *flags: Any) -> Any:
    return lambda port: run_program(
        *("openssl", "s_client", "-connect", f"127.0.0.1:{port}", FLAG[version]),
        *("-CAfile", certs.ca.cert_path, "-servername", certs.name, *flags),
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", RULES)
def test_rules_on_s_client(
    certs: Certificates, tmp_path: Path, inside: Any, accepted: Any, version: str, kind: str
) -> None:
    somebody = Somebody(certs, tmp_path)
    flags = ("-cert", somebody.chain, "-key", somebody.key)
    fits, does_not = (rule(values, somebody) for values in RULES[kind])
    connection, peer = accepted(s_client(certs, version, *flags))
    with inside(
        socket=connection, server_side=True, credentials=server(certs, peer_rules=(does_not, fits))
    ) as us:
        us.bridge.handshake_sync()
        us.bridge.start()
        us.inner.sendall(b"you are welcome\n")
        peer.wait_for(b"you are welcome")
    connection, peer = accepted(s_client(certs, version, *flags))
    with inside(socket=connection, server_side=True, credentials=server(certs, peer_rules=(does_not,))) as us:
        with pytest.raises(PolicyDenied) as caught:
            us.bridge.handshake_sync()
        assert (caught.value.reason, caught.value.context.alert) == ("not_allowed", 49)
        peer.wait_for(b"alert number 49")


@pytest.mark.needs("gnutls-cli")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("how", ["rule", "policy", "late policy"])
def test_gnutls_hears_that_it_may_not(
    certs: Certificates, tmp_path: Path, inside: Any, accepted: Any, version: str, how: str
) -> None:
    somebody = Somebody(certs, tmp_path)

    async def never(_: tls.Peer) -> bool:
        await asyncio.Event().wait()
        return True

    policies: dict[str, dict[str, Any]] = {
        "rule": {},
        "policy": {"peer_policy": lambda peer: not peer.certificates},
        "late policy": {"peer_policy": never, "policy_timeout": 0.2},
    }
    rules = (tls.PeerRules(ou=("office",)),) if how == "rule" else ()
    connection, peer = accepted(
        lambda port: run_program(
            *("gnutls-cli", "--port", str(port), "--x509cafile", certs.ca.cert_path),
            *("--x509certfile", somebody.chain, "--x509keyfile", somebody.key),
            *("--verify-hostname", certs.name, "--sni-hostname", certs.name),
            *("--priority", f"NORMAL:-VERS-ALL:+VERS-{version.replace('v', '')}", "127.0.0.1"),
        )
    )
    with inside(
        socket=connection, server_side=True, credentials=server(certs, peer_rules=rules), **policies[how]
    ) as us:
        with pytest.raises(PolicyDenied) as caught:
            us.bridge.handshake_sync()
        assert caught.value.context.alert == 49
        peer.wait_for(rb"\[49\]: Access was denied")
        us.inner.settimeout(10)
        assert us.inner.recv(1) == b"", "nothing of it reached the program"


@pytest.mark.needs("gnutls-cli")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("program", ["openssl", "gnutls-cli"])
def test_a_key_that_is_asked_for(inside: Any, accepted: Any, version: str, program: str) -> None:
    asked: list[bytes] = []

    def finder(identity: bytes) -> bytes | None:
        asked.append(identity)
        return KEY if identity == b"device 7" else None

    config = tls.TlsConfig(credentials=tls.Credentials.psk_lookup(finder))

    def client(identity: str) -> Any:
        if program == "openssl":
            suites = ("-cipher", "PSK-AES256-GCM-SHA384") if version == "TLSv1.2" else ()
            return lambda port: run_program(
                *("openssl", "s_client", "-connect", f"127.0.0.1:{port}", FLAG[version], *suites),
                *("-psk_identity", identity, "-psk", KEY.hex()),
            )
        exchange = "+PSK" if version == "TLSv1.2" else "+ECDHE-PSK"
        priority = f"NORMAL:-VERS-ALL:+VERS-{version.replace('v', '')}:-KX-ALL:{exchange}"
        return lambda port: run_program(
            *("gnutls-cli", "--port", str(port), "--pskusername", identity, "--pskkey", KEY.hex()),
            *("--priority", priority, "127.0.0.1"),
        )

    connection, peer = accepted(client("device 7"))
    with inside(socket=connection, server_side=True, credentials=config) as us:
        assert us.bridge.handshake_sync().psk_identity == "device 7"
        us.bridge.start()
        us.inner.sendall(b"known here\n")
        peer.wait_for(b"known here")
    connection, _ = accepted(client("device 8"))
    with (
        inside(socket=connection, server_side=True, credentials=config) as us,
        pytest.raises(UnknownPeer),
    ):
        us.bridge.handshake_sync()
    assert asked == [b"device 7", b"device 8"]


@pytest.mark.parametrize("engine", ["rustls", "openssl"])
@pytest.mark.parametrize("asked_by", ["s_client", "s_server"])
def test_a_renegotiation_is_refused_and_the_next_is_served(
    certs: Certificates, inside: Any, accepted: Any, engine: str, asked_by: str
) -> None:
    more: dict[str, Any] = {"danger_legacy_suites": engine == "openssl", "max_version": "TLSv1.2"}
    as_client = tls.TlsConfig(roots=certs.ca.cert, **more)
    as_server = tls.TlsConfig(
        credentials=tls.Credentials.certificate(certs.server.cert, certs.server.key), **more
    )
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            if asked_by == "s_client":
                connection, peer = accepted(s_client(certs, "TLSv1.2"))
                options: dict[str, Any] = {
                    "socket": connection,
                    "server_side": True,
                    "credentials": as_server,
                }
                command, told = b"R\n", rb"RENEGOTIATING.*(no.renegotiation|alert)"
            else:
                options, peer = to_s_server(stack, certs, as_client, "-tls1_2")
                command, told = b"r\n", rb"SSL_do_handshake -> .*(no.renegotiation|error|ERROR|alert)"
            with inside(**options) as us:
                assert us.bridge.handshake_sync().engine == engine
                us.bridge.start()
                us.inner.sendall(b"before it\n")
                peer.wait_for(b"before it")
                peer.send(command)
                peer.wait_for(told)
            for error in us.errors:
                assert isinstance(error, FROM_A_PEER), error


def to_s_server(
    stack: contextlib.ExitStack, certs: Certificates, config: tls.TlsConfig, *flags: str
) -> tuple[dict[str, Any], Program]:
    """A running s_server, and the options of a bridge to it."""
    port = free_port()
    program = run_program(
        *("openssl", "s_server", "-accept", f"127.0.0.1:{port}", *flags),
        *("-cert", certs.server.cert_path, "-key", certs.server.key_path),
        port=port,
    )
    peer = stack.enter_context(program)
    options = {
        "socket": f"tcp://127.0.0.1:{port}",
        "server_hostname": certs.name,
        "credentials": config,
    }
    return options, peer


def test_early_data_is_neither_offered_nor_taken(
    certs: Certificates, tmp_path: Path, inside: Any, accepted: Any
) -> None:
    (tmp_path / "early").write_bytes(b"before anybody agreed to it")
    session = tmp_path / "session.pem"
    theirs = ("-cert", certs.server.cert_path, "-key", certs.server.key_path)
    config = tls.TlsConfig(roots=certs.ca.cert)
    port = free_port()
    with run_program(
        "openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-early_data", *theirs, port=port
    ) as peer:
        # Our client resumes there, and sends none.
        for resumed in (False, True):
            with inside(
                socket=f"tcp://127.0.0.1:{port}", server_hostname=certs.name, credentials=config
            ) as us:
                assert us.bridge.handshake_sync().resumed is resumed
                us.bridge.start()
                us.inner.sendall(b"after it\n")
                peer.wait_for(b"after it")
                # What it says comes behind its tickets.
                peer.send(b"a line\n")
                assert traffic.receive_exactly(us.inner, 7) == b"a line\n"
            peer.wait_for(b"No early data received")
            assert b"Early data received:" not in peer.output
            peer.output = b""
    # A session with which somebody else would take early data. What s_client says of tickets it may
    # keep for itself until its end.
    port = free_port()
    other_server = run_program(
        "openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-early_data", *theirs, port=port
    )
    with other_server as peer, s_client(certs, "TLSv1.3", "-sess_out", session)(port) as other:
        other.send(b"a word\n")
        peer.wait_for(b"a word")
        peer.send(b"an answer\n")
        other.wait_for(b"an answer")
        other.send(b"Q\n")
        other.wait()
        assert b"Max Early Data: 16384" in other.output
    ours = tls.TlsConfig(credentials=tls.Credentials.certificate(certs.server.cert, certs.server.key))
    connection, peer = accepted(
        s_client(certs, "TLSv1.3", "-sess_in", session, "-early_data", tmp_path / "early")
    )
    with inside(socket=connection, server_side=True, credentials=ours) as us:
        us.bridge.handshake_sync()
        us.bridge.start()
        us.inner.sendall(b"only after the handshake\n")
        peer.wait_for(b"only after the handshake")
        assert b"Early data was rejected" in peer.output
        peer.send(b"a line\n")
        assert traffic.receive_exactly(us.inner, 7) == b"a line\n", "no early byte came before it"
    # Tickets of ours announce none, so nobody tries.
    connection, peer = accepted(s_client(certs, "TLSv1.3"))
    with inside(socket=connection, server_side=True, credentials=ours) as us:
        us.bridge.handshake_sync()
        us.bridge.start()
        us.inner.sendall(b"behind the tickets\n")
        peer.wait_for(b"behind the tickets")
        peer.send(b"Q\n")
        peer.wait()
        assert b"Max Early Data: 0" in peer.output


@pytest.mark.parametrize("peer_is_server", [True, False])
def test_our_key_updates_are_followed(
    certs: Certificates, inside: Any, accepted: Any, peer_is_server: bool
) -> None:
    with contextlib.ExitStack() as stack:
        if peer_is_server:
            config = tls.TlsConfig(roots=certs.ca.cert)
            options, peer = to_s_server(stack, certs, config, "-tls1_3", "-quiet")
        else:
            connection, peer = accepted(s_client(certs, "TLSv1.3", "-quiet"))
            config = tls.TlsConfig(
                credentials=tls.Credentials.certificate(certs.server.cert, certs.server.key)
            )
            options = {"socket": connection, "server_side": True, "credentials": config}
        with inside(**options) as us:
            us.bridge.handshake_sync()
            us.bridge.start()
            for turn in range(5):
                asyncio.run(us.bridge.update_keys())
                us.inner.sendall(f"under key {turn}\n".encode())
                peer.wait_for(f"under key {turn}".encode())
                line = f"answer {turn}\n".encode()
                peer.send(line)
                assert traffic.receive_exactly(us.inner, len(line)) == line
            assert us.errors == []
