"""TLS options: a mistake names its field, secrets stay secret, files read alike."""

from __future__ import annotations

import pickle
import ssl
from pathlib import Path

import pytest

from sapper.errors import ConfigError, SapperError
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, TlsConfig, create_bridge
from support.certs import Certificates

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


PSK_HEX = "00112233445566778899aabbccddeeff"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"min_version": "TLSv1.1"}, "min_version"),
        ({"min_version": "TLSv1.3", "max_version": "TLSv1.2"}, "min_version"),
        ({"cipher_suites": ("TLS_AES_128_GCM_SHA256", "TLS_NO_SUCH_SUITE")}, "cipher_suites.1"),
        ({"groups": ("X25519", "nonsense")}, "groups.1"),
        ({"alpn": ("h2", "")}, "alpn.1"),
        ({"client_auth": "maybe"}, "client_auth"),
        ({"roots": b"nonsense"}, "roots"),
        ({"roots": "/no/such/file"}, "roots"),
        ({"pins": ("00",)}, "pins.0"),
        ({"pins": (b"short",)}, "pins.0"),
        ({"danger": True}, "danger"),
        ({"credentials": {"kind": "psk", "identity": "x"}}, "credentials.key"),
        ({"credentials": {"kind": "psk", "identity": "x", "key": "no hex"}}, "credentials.key"),
        (
            {
                "credentials": {
                    "kind": "psk",
                    "identity": "a",
                    "key": "00" * 16,
                    "identities": {"b": "11" * 16},
                }
            },
            "credentials.identity",
        ),
        ({"credentials": {"kind": "certificate", "chain": b"x"}}, "credentials.key"),
        ({"credentials": {"kind": "nonsense"}}, "credentials.kind"),
        ({"credentials": {}}, "credentials.kind"),
        ({"credentials": 5}, "credentials"),
    ],
)
def test_a_mistake_names_its_field(values: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TlsConfig.from_mapping(values)
    assert caught.value.field == field


def test_a_key_must_belong_to_its_certificate(certs: Certificates, made: ThrowawayCertificates) -> None:
    with pytest.raises(ConfigError) as caught:
        TlsConfig(credentials=Credentials.certificate(made.server[0], made.client[1]))
    assert caught.value.field == "credentials.key"


def test_a_short_or_empty_pre_shared_key_is_refused() -> None:
    for key in (b"", b"short"):
        with pytest.raises(ConfigError) as caught:
            TlsConfig(credentials=Credentials.psk("x", key))
        assert caught.value.field == "credentials.key"
    TlsConfig(credentials=Credentials.psk("x", b"short"), danger_short_psk=True)


def test_roots_are_given_in_one_place(made: ThrowawayCertificates) -> None:
    with pytest.raises(ConfigError) as caught:
        TlsConfig(credentials=made.client_credentials(), roots=made.authority)
    assert caught.value.field == "roots"
    with pytest.raises(ConfigError) as caught:
        TlsConfig(roots=made.authority, danger_accept_any_certificate=True)
    assert caught.value.field == "danger_accept_any_certificate"


def test_the_credentials_choose_the_engine(made: ThrowawayCertificates) -> None:
    assert TlsConfig(credentials=made.server_credentials()).native.engine == "rustls"
    assert TlsConfig(credentials=Credentials.psk("x", KEY)).native.engine == "openssl"


def test_a_python_context_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        create_bridge(socket=0, sink=0, credentials=ssl.create_default_context())  # type: ignore[arg-type]
    assert (caught.value.field, caught.value.reason) == ("credentials", "ssl_context")


def test_secrets_never_show(made: ThrowawayCertificates) -> None:
    hidden = [KEY.hex(), repr(KEY), str(KEY), made.server[1].decode().splitlines()[1], "opensesame"]
    shown = [
        Credentials.psk("x", KEY),
        Credentials.psks({"a": KEY, "b": KEY.hex()}),
        Credentials.certificate(*made.server),
        Credentials.certificate(*made.server, password="opensesame"),
        TlsConfig(credentials=Credentials.psk("x", KEY)),
        TlsConfig(credentials=made.server_credentials()),
        made,
    ]
    for one in shown:
        for text in (repr(one), str(one)):
            assert not any(secret in text for secret in hidden), text
    for wrong in ({"key": KEY.hex() + "zz"}, {"key": [KEY]}):
        with pytest.raises(ConfigError) as caught:
            TlsConfig.from_mapping({"credentials": {"kind": "psk", "identity": "x", **wrong}})
        assert not any(secret in str(caught.value) for secret in hidden)


def test_a_configuration_is_dumped_without_its_secrets(made: ThrowawayCertificates) -> None:
    """Warnings are errors in these tests."""
    chain, key = made.server
    for credentials, secret in (
        (Credentials.psk("x", KEY), KEY.hex()),
        (Credentials.certificate(chain, key, roots=made.authority), key.decode().splitlines()[1]),
        (Credentials.none(roots=made.authority), KEY.hex()),
    ):
        config = TlsConfig(credentials=credentials)
        assert TlsConfig(**config.model_dump()) == config
        assert secret not in config.model_dump_json()
        assert secret not in str(config.model_dump())


@pytest.mark.parametrize(
    "credentials",
    [
        {"kind": "certificate", "chain": "chain.pem", "key": "MC4CAQAwBQYDK2VwBCIEICGpQY2UvUk4eAZu"},
        {"kind": "pkcs12", "file": "MC4CAQAwBQYDK2VwBCIEICGpQY2UvUk4eAZu"},
        {"kind": "psk", "identity": "x", "key_file": "MC4CAQAwBQYDK2VwBCIEICGpQY2UvUk4eAZu"},
    ],
    ids=lambda values: str(values["kind"]),
)
def test_a_key_in_the_place_of_its_files_name_is_not_repeated(
    credentials: dict[str, str], tmp_path: Path, made: ThrowawayCertificates
) -> None:
    (tmp_path / "chain.pem").write_bytes(made.server[0])
    file = tmp_path / "tls.toml"
    lines = [f'{name} = "{value}"' for name, value in credentials.items()]
    file.write_text("\n".join(["[credentials]", *lines]))
    with pytest.raises(ConfigError, match="No such file") as caught:
        TlsConfig.from_toml(file)
    assert "MC4CAQ" not in str(caught.value)
    file.write_text(file.read_text().replace("MC4CAQAwBQYDK2VwBCIEICGpQY2UvUk4eAZu", "missing.pem"))
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        TlsConfig.from_toml(file)


def test_a_toml_file_gives_the_same_options(tmp_path: Path, made: ThrowawayCertificates) -> None:
    (tmp_path / "chain.pem").write_bytes(made.client[0])
    (tmp_path / "key.pem").write_bytes(made.client[1])
    (tmp_path / "roots.pem").write_bytes(made.authority)
    (tmp_path / "psk.hex").write_text(KEY.hex() + "\n")
    file = tmp_path / "tls.toml"
    file.write_text(
        'alpn = ["h2"]\n[credentials]\nkind = "certificate"\n'
        'chain = "chain.pem"\nkey = "key.pem"\nroots = "roots.pem"\n'
    )
    assert TlsConfig.from_toml(file) == TlsConfig(alpn=(b"h2",), credentials=made.client_credentials())
    file.write_text('[my.tls.credentials]\nkind = "psk"\nidentity = "x"\nkey_file = "psk.hex"\n')
    assert TlsConfig.from_toml(file, table="my.tls") == TlsConfig(credentials=Credentials.psk("x", KEY))
    file.write_text(f'[credentials]\nkind = "psk"\nidentity = "x"\nkey = "{KEY.hex()}"\n')
    assert TlsConfig.from_toml(file) == TlsConfig(credentials=Credentials.psk("x", KEY))


def test_files_and_bytes_and_text_are_the_same(tmp_path: Path, made: ThrowawayCertificates) -> None:
    chain, key = made.server
    (tmp_path / "c.pem").write_bytes(chain)
    (tmp_path / "k.pem").write_bytes(key)
    same = [
        Credentials.certificate(chain, key),
        Credentials.certificate(chain.decode(), key.decode()),
        Credentials.certificate(tmp_path / "c.pem", str(tmp_path / "k.pem")),
    ]
    assert same[0] == same[1] == same[2]
    with pytest.raises(ConfigError, match="cannot read") as caught:
        Credentials.certificate(tmp_path / "none.pem", key)
    assert caught.value.field == "chain"


def test_an_encrypted_key_needs_its_password(certs: Certificates) -> None:
    identity = certs.server
    encrypted = identity.encrypted_key(b"opensesame")
    TlsConfig(credentials=Credentials.certificate(identity.cert, encrypted, password="opensesame"))
    for password in (None, "wrong"):
        with pytest.raises(ConfigError) as caught:
            TlsConfig(credentials=Credentials.certificate(identity.cert, encrypted, password=password))
        assert caught.value.field == "credentials.password"
        assert "opensesame" not in str(caught.value)


def test_errors_of_the_native_side_can_be_pickled() -> None:
    with pytest.raises(SapperError) as caught:
        TlsConfig(cipher_suites=("nonsense",))
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.context == caught.value.context
