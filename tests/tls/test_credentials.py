"""What each end proves and believes: PKCS#12, several certificates, reload, rules, revocation, resumption."""

from __future__ import annotations

import asyncio
import copy
import datetime
import os
import pickle
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.serialization import pkcs12

from sapper import tls
from sapper.errors import (
    ApiMisuseError,
    CertificateError,
    ConfigError,
    CredentialsRejected,
    PolicyDenied,
    SapperError,
    UnknownPeer,
)
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, PeerRules, TlsConfig
from sapper.tls.config import FileBytes
from sapper.tls.handshake import Acceptor, ServerHandshake
from sapper.tunnel import TunnelServer
from support.certs import Certificates, Identity
from support.traffic import Background

pytestmark = pytest.mark.usefixtures("leak_check")


def meet(
    client: TlsConfig | Credentials, server: TlsConfig | Credentials, name: str | None = "localhost"
) -> tuple[tls.HandshakeInfo, tls.HandshakeInfo]:
    """One handshake in memory and one byte each way, so that tickets have arrived."""
    near, far = socket.socketpair()
    near_sink, near_end = socket.socketpair()
    far_sink, far_end = socket.socketpair()
    ours = tls.create_bridge(socket=near, sink=near_sink, credentials=client, server_hostname=name)
    theirs = tls.create_bridge(socket=far, sink=far_sink, credentials=server, server_side=True)
    results: list[tls.HandshakeInfo] = []
    refused: list[SapperError] = []

    def answer() -> None:
        try:
            results.append(theirs.handshake_sync())
            theirs.start()
        except SapperError as error:
            refused.append(error)

    try:
        background = Background(answer)
        try:
            mine = ours.handshake_sync()
            ours.start()
            with suppress(BrokenPipeError):  # refused after our own handshake was done
                near_end.sendall(b"x")
            background.join()
            if refused:
                raise refused[0]
            far_end.settimeout(20)
            near_end.settimeout(20)
            assert far_end.recv(1) == b"x"
            far_end.sendall(b"y")
            assert near_end.recv(1) == b"y"
        except (SapperError, OSError) as error:
            background.join()
            # Whoever said no has more to tell than who was told.
            raise next((one for one in refused if not told(one)), error) from None
        return mine, results[0]
    finally:
        for bridge in (ours, theirs):
            bridge.stop()
        for end in (near_end, far_end):
            end.close()
        for bridge in (ours, theirs):
            with suppress(SapperError):
                bridge.wait_closed_sync(20)


def told(error: SapperError) -> bool:
    return error.context.alert_received


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


# -- where certificates come from ---------------------------------------


def a_pkcs12_file(identity: Identity, certs: Certificates, password: bytes | None) -> bytes:
    encryption: Any = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    return pkcs12.serialize_key_and_certificates(
        b"x", identity.private_key, identity.certificate, [certs.ca.certificate], encryption
    )


@pytest.mark.parametrize("password", [None, "opensesame"])
def test_a_pkcs12_file_works_as_file_and_as_bytes(
    certs: Certificates, tmp_path: Path, password: str | None
) -> None:
    content = a_pkcs12_file(certs.server, certs, password.encode() if password else None)
    (tmp_path / "server.p12").write_bytes(content)
    client = Credentials.none(roots=certs.ca.cert)
    for given in (content, tmp_path / "server.p12"):
        info, _ = meet(client, Credentials.pkcs12(given, password), certs.name)
        assert info.peer_certificates == (certs.server.cert_der, certs.ca.cert_der)
    (tmp_path / "tls.toml").write_text(
        f'[credentials]\nkind = "pkcs12"\nfile = "server.p12"\npassword = "{password or ""}"\n'
    )
    meet(client, TlsConfig.from_toml(tmp_path / "tls.toml"), certs.name)


def test_a_pkcs12_file_that_does_not_open_is_named(certs: Certificates) -> None:
    content = a_pkcs12_file(certs.server, certs, b"opensesame")
    for given, password, field in [
        (content, "wrong", "credentials.password"),
        (content, None, "credentials.password"),
        (b"garbage", None, "credentials.file"),
    ]:
        with pytest.raises(ConfigError) as caught:
            TlsConfig(credentials=Credentials.pkcs12(given, password))
        assert caught.value.field == field
        assert "opensesame" not in str(caught.value)
    assert "opensesame" not in repr(Credentials.pkcs12(content, "opensesame"))


def test_what_came_from_a_file_equals_its_bytes_and_survives_a_copy(
    certs: Certificates, tmp_path: Path
) -> None:
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(certs.server.cert)
    key.write_bytes(certs.server.key)
    one = Credentials.certificate(chain, key)
    assert one == Credentials.certificate(certs.server.cert, certs.server.key)
    again = copy.deepcopy(one)
    assert again == one
    roots = pickle.loads(pickle.dumps(Credentials.none(roots=chain)))
    assert roots.roots.path == chain
    assert isinstance(again.chain, FileBytes)
    assert again.chain.path == chain
    config = TlsConfig(credentials=again)
    chain.write_bytes(certs.client.cert)
    key.write_bytes(certs.client.key)
    assert config.reload()


# -- several certificates -----------------------------------------------


def test_a_server_shows_the_certificate_of_the_name_that_is_asked_for(
    certs: Certificates, tmp_path: Path
) -> None:
    other = certs.wrong_name  # for elsewhere.test
    (tmp_path / "tls.toml").write_text(
        f'[credentials]\nkind = "certificate"\nchain = "{certs.server.cert_path}"\n'
        f'key = "{certs.server.key_path}"\n[[more_credentials]]\nkind = "certificate"\n'
        f'chain = "{other.cert_path}"\nkey = "{other.key_path}"\nnames = ["elsewhere.test", "*.wild.test"]\n'
    )
    server = TlsConfig.from_toml(tmp_path / "tls.toml")
    client = TlsConfig(danger_accept_any_certificate=True)
    for name, expected in [
        (certs.name, certs.server),
        ("elsewhere.test", other),
        ("a.wild.test", other),
        ("unknown.test", certs.server),
        ("127.0.0.1", certs.server),
    ]:
        info, theirs = meet(client, server, name)
        assert info.peer_certificate == expected.cert_der, name
        assert theirs.server_name == (None if name[0].isdigit() else name)
        assert info.server_end_point == theirs.server_end_point is not None


@pytest.mark.parametrize(
    "more",
    [{"roots": "system"}, {"pins": (bytes(32),)}, {"names": ["not a name"]}],
)
def test_a_further_certificate_is_checked(certs: Certificates, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        TlsConfig(
            credentials=Credentials.certificate(certs.server.cert, certs.server.key),
            more_credentials=[Credentials.certificate(certs.wrong_name.cert, certs.wrong_name.key, **more)],
        )
    assert caught.value.field == f"more_credentials.0.{next(iter(more))}"


# -- reload -------------------------------------------------------------


class Files:
    """A server's files, which tests replace."""

    def __init__(self, folder: Path, made: ThrowawayCertificates) -> None:
        self.folder = folder
        self.write(*made.server)
        self.config = TlsConfig(credentials=Credentials.certificate(folder / "chain.pem", folder / "key.pem"))

    def write(self, chain: bytes, key: bytes) -> None:
        (self.folder / "chain.pem").write_bytes(chain)
        (self.folder / "key.pem").write_bytes(key)


def test_a_reload_changes_new_connections_and_garbage_changes_nothing(
    tmp_path: Path, made: ThrowawayCertificates
) -> None:
    files, second = Files(tmp_path, made), throwaway_certificates("localhost")
    assert files.config.reload() is False
    meet(Credentials.none(roots=made.authority), files.config)
    files.write(b"garbage", b"garbage")
    with pytest.raises(ConfigError) as caught:
        files.config.reload()
    assert caught.value.field == "credentials.chain"
    assert str(tmp_path / "chain.pem") in str(caught.value)
    meet(Credentials.none(roots=made.authority), files.config)
    files.write(*second.server)
    assert files.config.reload() is True
    meet(Credentials.none(roots=second.authority), files.config)
    with pytest.raises(CertificateError):
        meet(Credentials.none(roots=made.authority), files.config)


@pytest.mark.parametrize("broken", ["chain.pem", "key.pem", "both.p12", "roots.pem", "list.pem"])
def test_what_is_wrong_with_a_file_names_the_file(
    tmp_path: Path, made: ThrowawayCertificates, broken: str
) -> None:
    Files(tmp_path, made)
    (tmp_path / "roots.pem").write_bytes(made.authority)
    (tmp_path / broken).write_bytes(b"garbage")
    roots = tmp_path / "roots.pem"
    pair = Credentials.certificate(tmp_path / "chain.pem", tmp_path / "key.pem", roots=roots)
    options: dict[str, Any] = {"credentials": pair}
    if broken == "both.p12":
        options = {"credentials": Credentials.pkcs12(tmp_path / "both.p12", "password")}
    elif broken == "list.pem":
        options = {"credentials": Credentials.none(roots=roots), "crls": [tmp_path / "list.pem"]}
    with pytest.raises(ConfigError) as caught:
        TlsConfig(**options)
    assert str(tmp_path / broken) in str(caught.value)


def test_a_pipe_is_read_once_and_in_place_of_a_file_it_keeps_nobody(
    tmp_path: Path, made: ThrowawayCertificates
) -> None:
    """As a shell's ``--cert <(...)``; and a reload neither waits at a pipe nor reads a device without end."""
    reading, writing = os.pipe()
    os.write(writing, made.server[0])
    os.close(writing)
    (tmp_path / "key.pem").write_bytes(made.server[1])
    piped = TlsConfig(credentials=Credentials.certificate(f"/dev/fd/{reading}", tmp_path / "key.pem"))
    os.close(reading)
    assert piped.reload() is False
    meet(Credentials.none(roots=made.authority), piped)

    files = Files(tmp_path, made)
    for replaced in (lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")):
        (tmp_path / "chain.pem").unlink()
        replaced(tmp_path / "chain.pem")
        with pytest.raises(ConfigError, match="no regular file"):
            files.config.reload()
    meet(Credentials.none(roots=made.authority), files.config)


async def test_a_watch_reads_the_file_of_a_pre_shared_key_again(tmp_path: Path) -> None:
    (tmp_path / "tls.toml").write_text('[credentials]\nkind = "psk"\nidentity = "x"\nkey_file = "the.key"\n')
    (tmp_path / "the.key").write_text("00" * 32)
    config = TlsConfig.from_toml(tmp_path / "tls.toml")
    heard: asyncio.Queue[SapperError | None] = asyncio.Queue()
    async with asyncio.timeout(30):
        with config.watch(on_reload=heard.put_nowait):
            (tmp_path / "the.key").write_text("0011")
            error = await heard.get()
            assert isinstance(error, ConfigError)
            assert error.field == "credentials.key_file"
            assert str(tmp_path / "the.key") in str(error)
            await asyncio.to_thread(meet, Credentials.psk("x", "00" * 32), config)
            (tmp_path / "the.key").write_text("11" * 32 + "\n")
            assert await heard.get() is None
            await asyncio.to_thread(meet, Credentials.psk("x", "11" * 32), config)


@pytest.mark.parametrize("read", [lambda path: Credentials.certificate(path, path), TlsConfig.from_toml])
def test_a_device_without_end_is_no_file(read: Callable[[str], object]) -> None:
    with pytest.raises(ConfigError, match="File too large"):
        read("/dev/zero")


async def test_a_watch_tells_the_event_loop_of_good_and_bad_files(
    any_loop: str, tmp_path: Path, made: ThrowawayCertificates
) -> None:
    files, second = Files(tmp_path, made), throwaway_certificates("localhost")
    heard: asyncio.Queue[SapperError | None] = asyncio.Queue()
    async with asyncio.timeout(30):
        with files.config.watch(on_reload=heard.put_nowait):
            files.write(b"garbage", made.server[1])
            error = await heard.get()
            assert isinstance(error, ConfigError)
            assert error.field == "credentials.chain"
            await asyncio.to_thread(meet, Credentials.none(roots=made.authority), files.config)
            files.write(*second.server)
            assert await heard.get() is None
            await asyncio.to_thread(meet, Credentials.none(roots=second.authority), files.config)


def test_a_watch_works_without_an_event_loop(
    tmp_path: Path, made: ThrowawayCertificates, caplog: pytest.LogCaptureFixture
) -> None:
    files, second = Files(tmp_path, made), throwaway_certificates("localhost")
    heard = threading.Event()
    with files.config.watch(on_reload=lambda error: heard.set() if error is None else None) as watch:
        files.write(*second.server)
        assert heard.wait(30)
    watch.close()  # again, which does nothing
    meet(Credentials.none(roots=second.authority), files.config)


def test_only_files_can_be_watched(made: ThrowawayCertificates) -> None:
    with pytest.raises(ConfigError, match="no file"):
        TlsConfig(credentials=made.server_credentials()).watch()


# -- rules on the peer --------------------------------------------------


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


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"peer_rules": [{}]}, "peer_rules"),
        ({"peer_rules": [{"dns": "*"}]}, "peer_rules"),
        ({"peer_rules": [{"ip": "10.0.0.0/40"}]}, "peer_rules"),
        ({"peer_rules": [{"pin": "00"}]}, "peer_rules.0.pin.0"),
        ({"peer_rules": [{"name": "x"}]}, "peer_rules.0.name"),
        ({"crls": ["/no/such/file"]}, "crls.0"),
        ({"crls": [b"garbage"]}, "crls"),
        ({"ocsp": "maybe"}, "ocsp"),
        ({"ticket_lifetime": 0}, "ticket_lifetime"),
        ({"ticket_lifetime": 86_400}, "ticket_lifetime"),
        ({"more_credentials": [{"kind": "none"}]}, "more_credentials.0.kind"),
    ],
)
def test_a_mistake_names_its_field(made: ThrowawayCertificates, values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TlsConfig.from_mapping({"roots": made.authority, **values})
    assert caught.value.field == field


# -- revocation ---------------------------------------------------------


def a_list(authority: Identity, *revoked: Identity) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now - datetime.timedelta(hours=1))
        .next_update(now + datetime.timedelta(days=1))
        .add_extension(x509.CRLNumber(1), critical=False)
    )
    for one in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(one.certificate.serial_number)
            .revocation_date(now - datetime.timedelta(hours=1))
            .build()
        )
    signed = builder.sign(authority.private_key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def test_a_list_that_changes_takes_effect_at_the_reload(certs: Certificates, tmp_path: Path) -> None:
    (tmp_path / "list.pem").write_bytes(a_list(certs.ca))
    (tmp_path / "tls.toml").write_text(
        f'crls = ["list.pem"]\nroots = "{certs.ca.cert_path}"\n[credentials]\nkind = "certificate"\n'
        f'chain = "{certs.server.cert_path}"\nkey = "{certs.server.key_path}"\n'
    )
    server = TlsConfig.from_toml(tmp_path / "tls.toml")
    client = TlsConfig(
        credentials=Credentials.certificate(certs.client.cert, certs.client.key, roots=certs.ca.cert)
    )
    meet(client, server, certs.name)
    assert meet(client, server, certs.name)[1].resumed
    (tmp_path / "list.pem").write_bytes(a_list(certs.ca, certs.client))
    assert server.reload()
    # A ticket from before lets nobody in.
    with pytest.raises(CertificateError) as caught:
        meet(client, server, certs.name)
    assert caught.value.reason == "revoked"
    (tmp_path / "list.pem").write_bytes(a_list(certs.other_ca))
    assert server.reload()
    with pytest.raises(CertificateError) as caught:
        meet(client, server, certs.name)
    assert caught.value.reason == "revocation_unknown"


# -- resumption, groups, bindings ---------------------------------------


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_sessions_are_resumed_unless_one_end_does_not_want_it(
    made: ThrowawayCertificates, version: str
) -> None:
    def configs(**options: Any) -> tuple[TlsConfig, TlsConfig]:
        both = {"min_version": version, "max_version": version}
        return (
            TlsConfig(roots=made.authority, **both),
            TlsConfig(credentials=made.server_credentials(), **both, **options),
        )

    client, server = configs()
    assert [one.resumed for one in meet(client, server)] == [False, False]
    assert [one.resumed for one in meet(client, server)] == [True, True]
    # Another name is another session, and so is another configuration.
    assert not meet(TlsConfig(roots=made.authority), server)[0].resumed
    client, server = configs(resumption=False)
    assert not any(one.resumed for _ in range(2) for one in meet(client, server))
    client, server = configs()
    kept = {name: getattr(client, name) for name in TlsConfig.model_fields}
    client = TlsConfig(**{**kept, "resumption": False})
    assert not any(one.resumed for _ in range(2) for one in meet(client, server))


def test_the_hybrid_group_comes_first(made: ThrowawayCertificates) -> None:
    info, _ = meet(made.client_credentials(), made.server_credentials())
    assert info.group == "X25519MLKEM768"
    server = TlsConfig(credentials=made.server_credentials(), groups=["x25519"])
    assert meet(made.client_credentials(), server)[0].group == "X25519"


def test_the_end_point_of_a_server_is_the_same_at_both_ends(certs: Certificates) -> None:
    for identity in (certs.server, certs.rsa_server):
        server = Credentials.certificate(identity.cert, identity.key, roots=certs.ca.cert)
        client = Credentials.certificate(certs.client.cert, certs.client.key, roots=certs.ca.cert)
        ours, theirs = meet(client, server, certs.name)
        expected = identity.certificate.fingerprint(hashes.SHA256())
        assert ours.server_end_point == theirs.server_end_point == expected
    key = Credentials.psk("x", bytes(range(32)))
    assert meet(key, key)[0].server_end_point is None


async def test_the_exporter_binding_is_the_same_at_both_ends_and_nowhere_else(
    made: ThrowawayCertificates,
) -> None:
    async def binding(version: str) -> tuple[bytes, bytes]:
        near, far = socket.socketpair()
        sinks = [socket.socketpair() for _ in range(2)]
        client = TlsConfig(roots=made.authority, max_version=version)
        ours = tls.create_bridge(
            socket=near, sink=sinks[0][0], credentials=client, server_hostname="localhost"
        )
        theirs = tls.create_bridge(
            socket=far, sink=sinks[1][0], credentials=made.server_credentials(), server_side=True
        )
        async with ours, theirs:
            await asyncio.gather(ours.handshake(), theirs.handshake())
            try:
                return await ours.channel_binding(), await theirs.channel_binding()
            finally:
                for _, end in sinks:
                    end.close()

    one, two = await binding("TLSv1.3"), await binding("TLSv1.3")
    assert one[0] == one[1]
    assert two[0] == two[1] != one[0]
    assert len(one[0]) == 32
    with pytest.raises(SapperError, match=r"TLS 1\.3"):
        await binding("TLSv1.2")


def test_the_peer_policys_refusal_is_access_denied(certs: Certificates, made: ThrowawayCertificates) -> None:
    near, far = socket.socketpair()
    sinks = [socket.socketpair() for _ in range(2)]
    ours = tls.create_bridge(
        socket=near,
        sink=sinks[0][0],
        credentials=made.client_credentials(),
        server_hostname="localhost",
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


# -- pre-shared keys that are asked for ---------------------------------

KEY = bytes(range(32))


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("key", [KEY, KEY.hex(), bytearray(KEY)], ids=["bytes", "text", "bytearray"])
def test_a_server_asks_for_the_key(version: str, key: Any) -> None:
    asked = []

    def finder(identity: bytes) -> Any:
        asked.append(identity)
        assert threading.current_thread().name == "sapper-callbacks"
        return key

    server = TlsConfig(credentials=Credentials.psk_lookup(finder))
    client = TlsConfig(credentials=Credentials.psk("device 7", KEY), max_version=version)
    _, theirs = meet(client, server, None)
    assert theirs.psk_identity == "device 7"
    assert theirs.version == version
    assert asked == [b"device 7"]


def _fails(identity: bytes) -> bytes:
    raise OSError("the database is away")


@pytest.mark.parametrize(
    "finder",
    [lambda _: None, lambda _: "no hex", lambda _: 7, lambda _: b"short", _fails],
    ids=["nobody", "no hex", "no key", "short", "failure"],
)
def test_whoever_is_not_found_is_not_let_in(finder: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = Credentials.psk_lookup(finder)
    with pytest.raises(UnknownPeer):
        meet(Credentials.psk("x", KEY), server, None)


async def test_an_async_look_up_runs_on_the_event_loop_of_its_configuration(any_loop: str) -> None:
    async def finder(identity: bytes) -> bytes | None:
        await asyncio.sleep(0)
        assert asyncio.get_running_loop() is loop
        return KEY if identity == b"x" else None

    async def never(identity: bytes) -> bytes | None:
        await asyncio.Event().wait()
        return KEY

    loop = asyncio.get_running_loop()
    server = TlsConfig(credentials=Credentials.psk_lookup(finder))
    await asyncio.to_thread(meet, Credentials.psk("x", KEY), server, None)
    with pytest.raises(UnknownPeer):
        await asyncio.to_thread(meet, Credentials.psk("y", KEY), server, None)
    server = TlsConfig(credentials=Credentials.psk_lookup(never, timeout=0.1))
    with pytest.raises(UnknownPeer):
        await asyncio.to_thread(meet, Credentials.psk("x", KEY), server, None)


async def test_the_thread_that_must_answer_cannot_block() -> None:
    near, far = socket.socketpair()
    sink, end = socket.socketpair()
    with near, end:
        bridge = tls.create_bridge(
            socket=far, sink=sink, credentials=Credentials.psk_lookup(lambda _: KEY), server_side=True
        )
        with pytest.raises(ApiMisuseError) as caught:
            bridge.handshake_sync()
        assert caught.value.reason == "would_deadlock"
        await bridge.stop()


def test_a_look_up_is_a_servers(made: ThrowawayCertificates) -> None:
    with pytest.raises(ConfigError):
        Credentials.psk_lookup("no function")  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        Credentials.psk_lookup(lambda _: KEY, timeout=0)
    client = TlsConfig(credentials=Credentials.psk_lookup(lambda _: KEY))
    near, far = socket.socketpair()
    with near, far:
        with pytest.raises(ConfigError) as caught:
            tls.create_bridge(socket=near, sink=far, credentials=client)
        assert caught.value.field == "credentials"
