"""Who is welcome: rules on the peer's certificate, wherever a server is made, and a policy's refusal."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sapper import tls
from sapper.errors import ConfigError, CredentialsRejected, PolicyDenied, SapperError
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, PeerRules, TlsConfig
from sapper.tls.handshake import Acceptor, ServerHandshake
from sapper.tunnel import TunnelServer
from support.certs import Certificates
from support.handshakes import meet, told
from support.traffic import Background

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


@pytest.mark.parametrize(
    ("rules", "welcome"),
    [
        ([{"dns": "client.test"}], True),
        ([{"dns": ["*.test"], "cn": ["client.test"]}], True),
        ([{"dns": ["other.test"]}, {"cn": "client.test"}], True),
        ([{"dns": ["other.test"]}], False),
        ([{"dns": ["*.test"], "ou": ["office"]}], False),
        ([{"ip": "10.0.0.0/8"}, {"uri": "spiffe://*"}, {"email": "me@test"}], False),
    ],
)
def test_rules_decide_who_is_welcome(
    certs: Certificates, tmp_path: Path, rules: list[dict[str, Any]], welcome: bool
) -> None:
    server = TlsConfig(
        credentials=Credentials.certificate(certs.server.cert, certs.server.key, roots=certs.ca.cert),
        peer_rules=[PeerRules(**rule) for rule in rules],
    )
    client = Credentials.certificate(certs.client.cert, certs.client.key, roots=certs.ca.cert)
    if welcome:
        meet(client, server, certs.name)
        return
    with pytest.raises(PolicyDenied) as caught:
        meet(client, server, certs.name)
    assert caught.value.reason == "not_allowed"
    assert caught.value.context.alert == 49
    assert "client.test" in str(caught.value)


def test_a_pin_in_a_rule_is_the_peers_own_key(certs: Certificates) -> None:
    def server(pin: bytes) -> TlsConfig:
        return TlsConfig(
            credentials=Credentials.certificate(certs.server.cert, certs.server.key, roots=certs.ca.cert),
            peer_rules=[PeerRules(pin=(pin,))],
        )

    client = Credentials.certificate(certs.client.cert, certs.client.key, roots=certs.ca.cert)
    meet(client, server(certs.client.pin), certs.name)
    with pytest.raises(PolicyDenied):
        meet(client, server(certs.ca.pin), certs.name)


def test_a_client_has_rules_too(certs: Certificates) -> None:
    server = Credentials.certificate(certs.server.cert, certs.server.key)
    client = TlsConfig(roots=certs.ca.cert, peer_rules=[PeerRules(ip=("127.0.0.0/8",), dns=("localhost",))])
    meet(client, server, certs.name)
    client = TlsConfig(roots=certs.ca.cert, peer_rules=[PeerRules(ip=("10.0.0.0/8",))])
    with pytest.raises(PolicyDenied):
        meet(client, server, certs.name)


async def serve(how: str, server: TlsConfig, near: socket.socket, far: socket.socket) -> None:
    """Takes the configuration into a server's use in every way there is."""
    match how:
        case "create_bridge":
            tls.create_bridge(socket=near, sink=far, credentials=server, server_side=True)
        case "start_server":
            await tls.start_server(near, credentials=server)
        case "listen":
            tls.listen(("127.0.0.1", 0), credentials=server)
        case "ServerHandshake":
            await ServerHandshake(near, near, credentials=server).finish()
        case "Acceptor":
            Acceptor(server)
        case "Proxy":
            await tls.Proxy(listen="127.0.0.1:0", to="127.0.0.1:1", tls=server).start()
        case "route":
            way = tls.Route(names=("a.test",), to=("127.0.0.1:1",), tls=server)
            await tls.Proxy(listen="127.0.0.1:0", routes=(way,)).start()
        case "TunnelServer":
            await TunnelServer(tls=server).start(0)


_SERVERS = ("create_bridge", "start_server", "listen", "ServerHandshake", "Acceptor", "Proxy", "route")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"roots": "system"},
        {"roots": True, "client_auth": "off"},
        {"roots": True, "client_auth": "optional"},
    ],
)
@pytest.mark.parametrize("how", [*_SERVERS, "TunnelServer"])
async def test_rules_that_a_client_without_a_certificate_gets_past_are_refused(
    certs: Certificates, how: str, more: dict[str, Any]
) -> None:
    given = {**more, "roots": certs.ca.cert} if more.get("roots") is True else more
    server = TlsConfig(
        credentials=Credentials.certificate(certs.server.cert, certs.server.key),
        peer_rules=[PeerRules(cn=("alice",))],
        **given,
    )
    near, far = socket.socketpair()
    with near, far:
        with pytest.raises(ConfigError) as caught:
            await serve(how, server, near, far)
        assert near.fileno() >= 0, "nothing was taken"
    # The proxy's TLS is one table of its options, with a name of its own.
    assert caught.value.field == {"Proxy": "tls.", "route": "routes.0.tls."}.get(how, "") + "peer_rules"


@pytest.mark.parametrize("how", [*_SERVERS, "TunnelServer"])
async def test_what_is_for_a_client_alone_is_refused_at_a_server(certs: Certificates, how: str) -> None:
    credentials = Credentials.certificate(certs.server.cert, certs.server.key)
    server = TlsConfig(credentials=credentials, danger_legacy_renegotiation=True)
    near, far = socket.socketpair()
    with near, far:
        with pytest.raises(ConfigError) as caught:
            await serve(how, server, near, far)
        assert near.fileno() >= 0, "nothing was taken"
    table = {"Proxy": "tls.", "route": "routes.0.tls."}.get(how, "")
    assert caught.value.field == f"{table}danger_legacy_renegotiation"


def test_the_peer_policys_refusal_is_access_denied(certs: Certificates, made: ThrowawayCertificates) -> None:
    near, far = socket.socketpair()
    sinks = [socket.socketpair() for _ in range(2)]
    ours = tls.create_bridge(
        socket=near, sink=sinks[0][0], credentials=made.client_credentials(), server_hostname="localhost"
    )
    theirs = tls.create_bridge(
        socket=far,
        sink=sinks[1][0],
        credentials=made.server_credentials(ask_clients=True),
        server_side=True,
        peer_policy=lambda peer: False,
    )
    errors: list[SapperError] = []

    def refuse() -> None:
        with pytest.raises(PolicyDenied) as caught:
            theirs.handshake_sync()
        errors.append(caught.value)

    background = Background(refuse)
    with suppress(SapperError):
        ours.handshake_sync()
        ours.start()
    with pytest.raises(CredentialsRejected) as caught:
        ours.wait_closed_sync(20)
    background.join()
    assert errors[0].context.alert == caught.value.context.alert == 49
    assert told(caught.value)
    for bridge in (ours, theirs):
        bridge.stop()
        with suppress(SapperError):
            bridge.wait_closed_sync(20)
    for _, end in sinks:
        end.close()


@pytest.mark.parametrize("name", ["bücher.example", "*.bücher.example"])
def test_a_name_is_said_as_certificates_have_it(name: str) -> None:
    with pytest.raises(ConfigError, match=r"xn--bcher-kva\.example' in a certificate") as caught:
        PeerRules(dns=(name,))
    assert caught.value.field == "dns"
    PeerRules(dns=("*.xn--bcher-kva.example",))


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (PeerRules(dns=("a.test", "b.test.")), "dns.1"),
        (PeerRules(dns=("10.0.0.1",)), "dns.0"),
        (PeerRules(email=("nodomain",)), "email.0"),
        (PeerRules(email=("*@a.test",)), "email.0"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_fits_no_certificate_is_refused(rule: PeerRules, field: str, certs: Certificates) -> None:
    with pytest.raises(ConfigError, match="fits no certificate") as caught:
        TlsConfig(roots=certs.ca.cert, peer_rules=(rule,)).native  # noqa: B018 - checks it
    assert caught.value.field == f"peer_rules.0.{field}"
