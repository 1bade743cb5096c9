"""One TlsConfig: the same in Python, in TOML and on the command line, option by option."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sapper.cli import app
from sapper.errors import ConfigError, SapperError
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, PeerRules, TlsConfig

PIN = "ab" * 32
#: A client's end and a server's, so that every option has a use.
BOTH_ENDS = ("tls://localhost:1", "tls-listen://localhost:1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the cases name: relative in TOML, absolute elsewhere."""
    folder = tmp_path_factory.mktemp("everywhere")
    one: ThrowawayCertificates = throwaway_certificates("localhost")
    two = throwaway_certificates("other.test")
    contents = {"chain": one.server[0], "key": one.server[1], "roots": one.authority, "short": b"0011"}
    for name, content in {**contents, "chain2": two.server[0], "key2": two.server[1]}.items():
        (folder / name).write_bytes(content)
    return folder


# For each option: Python's arguments, lines of TOML, words of the command line. `@` is the folder.
CASES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "credentials": (
        {"credentials": lambda f: Credentials.certificate(f / "chain", f / "key")},
        '[tls.credentials]\nkind = "certificate"\nchain = "chain"\nkey = "key"',
        ["--cert", "@/chain", "--key", "@/key"],
    ),
    "more_credentials": (
        {
            "credentials": lambda f: Credentials.certificate(f / "chain", f / "key"),
            "more_credentials": lambda f: (Credentials.certificate(f / "chain2", f / "key2"),),
        },
        (
            '[tls.credentials]\nkind = "certificate"\nchain = "chain"\nkey = "key"\n'
            '[[tls.more_credentials]]\nkind = "certificate"\nchain = "chain2"\nkey = "key2"'
        ),
        ["--cert", "@/chain", "--key", "@/key", "--more-cert", "@/chain2", "--more-key", "@/key2"],
    ),
    "roots": ({"roots": lambda f: f / "roots"}, 'roots = "roots"', ["--roots", "@/roots"]),
    "pins": ({"pins": (PIN,)}, f'pins = ["{PIN}"]', ["--pin", PIN]),
    "client_auth": (
        {"roots": lambda f: f / "roots", "client_auth": "optional"},
        'roots = "roots"\nclient_auth = "optional"',
        ["--roots", "@/roots", "--client-auth", "optional"],
    ),
    "peer_rules": (
        {"roots": lambda f: f / "roots", "peer_rules": (PeerRules(dns=("a.test",)), PeerRules(ou=("x",)))},
        'roots = "roots"\n[[tls.peer_rules]]\ndns = "a.test"\n[[tls.peer_rules]]\nou = ["x"]',
        ["--roots", "@/roots", "--allow", "dns:a.test", "--allow", "ou:x"],
    ),
    "crls": (
        {"crls": lambda f: (f / "crl",), "roots": lambda f: f / "roots"},
        'crls = ["crl"]\nroots = "roots"',
        ["--crl", "@/crl", "--roots", "@/roots"],
    ),
    "ocsp": ({"ocsp": "require"}, 'ocsp = "require"', ["--ocsp", "require"]),
    "min_version": ({"min_version": "TLSv1.3"}, 'min_version = "TLSv1.3"', ["--min-tls", "1.3"]),
    "max_version": ({"max_version": "TLSv1.2"}, 'max_version = "TLSv1.2"', ["--max-tls", "1.2"]),
    "cipher_suites": (
        {"cipher_suites": ("TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256")},
        'cipher_suites = ["TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256"]',
        ["--cipher-suite", "TLS_AES_256_GCM_SHA384", "--cipher-suite", "TLS_AES_128_GCM_SHA256"],
    ),
    "groups": (
        {"groups": ("x25519", "secp256r1")},
        'groups = ["x25519", "secp256r1"]',
        ["--group", "x25519", "--group", "secp256r1"],
    ),
    "alpn": ({"alpn": ("h2", "http/1.1")}, 'alpn = ["h2", "http/1.1"]', ["--alpn", "h2,http/1.1"]),
    "resumption": ({"resumption": False}, "resumption = false", ["--no-resumption"]),
    "ticket_lifetime": ({"ticket_lifetime": 60.0}, "ticket_lifetime = 60.0", ["--ticket-lifetime", "60"]),
    "key_log_file": ({"key_log_file": lambda f: f / "log"}, 'key_log_file = "log"', ["--key-log", "@/log"]),
    "capture_file": ({"capture_file": lambda f: f / "cap"}, 'capture_file = "cap"', ["--capture", "@/cap"]),
    "danger_short_psk": (
        {"credentials": Credentials.psk("x", "0011"), "danger_short_psk": True},
        'danger_short_psk = true\n[tls.credentials]\nkind = "psk"\nidentity = "x"\nkey_file = "short"',
        ["--psk-identity", "x", "--psk-file", "@/short", "--danger-short-psk"],
    ),
    **{
        f"danger_{name}": (
            {f"danger_{name}": True},
            f"danger_{name} = true",
            [f"--danger-{name.replace('_', '-')}"],
        )
        for name in (
            *("accept_any_certificate", "ignore_server_name", "legacy_renegotiation"),
            *("security_level_0", "legacy_suites", "ignore_truncation"),
        )
    },
}


def test_there_is_a_case_for_each_option() -> None:
    # Early data is for streams that a program reads, which the command line has none of.
    assert set(CASES) == set(TlsConfig.model_fields) - {"danger_early_data"}


def fields(config: TlsConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in TlsConfig.model_fields}


def on_the_command_line(words: list[str], monkeypatch: pytest.MonkeyPatch) -> TlsConfig:
    """What the command makes of them, instead of using it."""
    made = []

    async def caught(ends: object, tls: TlsConfig, *more: object) -> int:
        made.append(tls)
        return 0

    monkeypatch.setattr(sys.modules["sapper.cli.bridge"], "run", caught)
    monkeypatch.delenv("SAPPER_KEY_PASSWORD", raising=False)
    result = CliRunner().invoke(app, ["bridge", *BOTH_ENDS, *words])
    assert result.exit_code == 0, (result.output, result.exception)
    return made[0]


@pytest.mark.parametrize("option", CASES)
def test_an_option_is_the_same_everywhere(
    option: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if option == "crls":
        (folder / "crl").write_bytes(_empty_list(folder))
    arguments, toml, words = CASES[option]
    python = TlsConfig(
        **{
            name: value(folder) if callable(value) and not isinstance(value, type) else value
            for name, value in arguments.items()
        }
    )
    (folder / "tls.toml").write_text(f"[tls]\n{toml}\n")
    text = TlsConfig.from_toml(folder / "tls.toml", table="tls")
    typed = on_the_command_line([word.replace("@", str(folder)) for word in words], monkeypatch)
    filed = on_the_command_line(["--config", str(folder / "tls.toml")], monkeypatch)
    assert fields(python) == fields(text) == fields(typed) == fields(filed)
    assert getattr(python, option) != TlsConfig.model_fields[option].default


def _empty_list(folder: Path) -> bytes:
    """A list of a throw-away authority cannot be had without its key: one of another will do here."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    roots = x509.load_pem_x509_certificate((folder / "roots").read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(roots.subject)
        .last_update(now)
        .next_update(now + datetime.timedelta(days=1))
        .add_extension(x509.CRLNumber(1), critical=False)
    )
    made = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


MISTAKES: dict[str, tuple[dict[str, Any], str, list[str], str]] = {
    "groups": ({"groups": ("none",)}, 'groups = ["none"]', ["--group", "none"], "--group"),
    "client_auth": (
        {"client_auth": "required"},
        'client_auth = "required"',
        ["--client-auth", "required"],
        "--roots",
    ),
    "ticket_lifetime": (
        {"ticket_lifetime": 0.0},
        "ticket_lifetime = 0.0",
        ["--ticket-lifetime", "0"],
        "--ticket-lifetime",
    ),
    "capture_file": (
        {"capture_file": "/no/such/folder/x"},
        'capture_file = "/no/such/folder/x"',
        ["--capture", "/no/such/folder/x"],
        "--capture",
    ),
}


def test_what_is_for_a_client_alone_is_kept_from_the_server_beside_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ends of a bridge have one configuration on the command line."""
    made: dict[str, Any] = {}

    class Made(Exception):
        pass

    def caught(**arguments: Any) -> None:
        made.update(arguments)
        raise Made

    monkeypatch.setattr(sys.modules["sapper.cli._run"], "create_bridge", caught)
    own = ["--cert", str(folder / "chain"), "--key", str(folder / "key")]
    words = ["bridge", *BOTH_ENDS, *own, "--danger-legacy-renegotiation"]
    assert isinstance(CliRunner().invoke(app, words).exception, Made)
    flags = {name: made[name].danger_legacy_renegotiation for name in ("credentials", "sink_credentials")}
    assert flags == {"credentials": True, "sink_credentials": False}


@pytest.mark.parametrize("option", MISTAKES)
def test_a_mistake_is_named_in_the_words_of_who_made_it(option: str, tmp_path: Path) -> None:
    arguments, toml, words, named = MISTAKES[option]
    with pytest.raises(ConfigError) as in_python:
        TlsConfig(**arguments)
    (tmp_path / "tls.toml").write_text(f"[tls]\n{toml}\n")
    with pytest.raises(ConfigError) as in_toml:
        TlsConfig.from_toml(tmp_path / "tls.toml", table="tls")
    assert in_python.value.field == in_toml.value.field
    result = CliRunner().invoke(app, ["bridge", *BOTH_ENDS, *words])
    assert isinstance(result.exception, SapperError), result.output
    assert result.exception.field == named, json.dumps(str(result.exception))
