"""What each end proves and believes: PKCS#12, files and bytes, several certificates, mistakes in them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import pkcs12

from sapper.errors import ConfigError
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, TlsConfig
from sapper.tls.config import FileBytes
from support.certs import Certificates, Identity
from support.handshakes import meet

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


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
    "more", [{"roots": "system"}, {"pins": (bytes(32),)}, {"names": ["a.test", "not a name"]}]
)
def test_a_further_certificate_is_checked(certs: Certificates, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        TlsConfig(
            credentials=Credentials.certificate(certs.server.cert, certs.server.key),
            more_credentials=[Credentials.certificate(certs.wrong_name.cert, certs.wrong_name.key, **more)],
        )
    field = "names.1" if "names" in more else next(iter(more))
    assert caught.value.field == f"more_credentials.0.{field}"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"peer_rules": [{"dns": "a.test"}, {}]}, "peer_rules.1"),
        ({"peer_rules": [{"dns": ["a.test", "*"]}]}, "peer_rules.0.dns.1"),
        ({"peer_rules": [{"uri": "*"}]}, "peer_rules.0.uri.0"),
        ({"peer_rules": [{"cn": ["", "x"]}]}, "peer_rules.0.cn.0"),
        ({"peer_rules": [{"cn": "x"}, {"ip": "10.0.0.0/40"}]}, "peer_rules.1.ip.0"),
        ({"peer_rules": [{"pin": "00"}]}, "peer_rules.0.pin.0"),
        ({"peer_rules": [{"name": "x"}]}, "peer_rules.0.name"),
        ({"crls": ["/no/such/file"]}, "crls.0"),
        ({"crls": [b"garbage"]}, "crls.0"),
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
