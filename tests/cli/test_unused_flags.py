"""No flag is accepted and passed over: for each of each command there is a case in which it is refused by its
name, or a reason why it always has its use. A new flag without an entry here fails.

Flags of TLS are one list (:mod:`sapper.cli._tls_options`), and which end has a use for which is looked at in
``test_tls_flags.py``; here, that they are refused where no TLS is spoken.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from sapper import cli
from sapper.cli import _run
from sapper.cli._tls_options import TLS_OPTIONS
from sapper.errors import ConfigError
from sapper.testing import throwaway_certificates

ALWAYS = "it says what is done wherever it is typed"
#: TLS belongs to this end whatever else is typed: where nothing else asks for it, the flag does.
ASKS = "it asks for TLS"

STREAMS = ("bridge", "tcp-listen://127.0.0.1:0", "null:")
GIVEN = ("bridge", "null:", "counter:", "--framing", "u16")
PROXY = ("proxy", "127.0.0.1:0", "127.0.0.1:1")
SERVE = ("tunnel", "serve")
EXPOSE = ("expose", "3000", "--to", "localhost:9000")

#: By command: what has no use for the flag, with the flag; or why there is nothing.
FLAGS: dict[tuple[str, ...], dict[str, tuple[str, ...] | str]] = {
    ("bridge",): {
        **dict.fromkeys(("--config", "--framing", "--direction", "--metrics", "--json", "--stats"), ALWAYS),
        **dict.fromkeys(("--idle-timeout", "--drain"), ALWAYS),
        "--server-name": (*STREAMS, "--server-name", "a.test"),
        "--upgrade": (*STREAMS, "--upgrade", "smtp"),
        "--sink-framing": (*STREAMS, "--sink-framing", "u16"),
        "--max-packet": (*STREAMS, "--max-packet", "1000"),
        "--records-per-write": (*STREAMS, "--records-per-write", "3"),
        "--resync": (*STREAMS, "--resync"),
        "--tap": (*STREAMS, "--tap", "/nowhere/tap"),
        "--tap-filter": (*STREAMS, "--tap-filter", "tcp"),
        "--tap-max-bytes": (*STREAMS, "--tap-max-bytes", "1000"),
        "--connect-timeout": (*GIVEN, "--connect-timeout", "1"),
        "--accept-timeout": (*GIVEN, "--accept-timeout", "1"),
        "--handshake-timeout": (*STREAMS, "--handshake-timeout", "1"),
        "--quiet": (*STREAMS, "--quiet", "--json"),
    },
    ("proxy", "run"): {
        **dict.fromkeys(("--config", "--route", "--metrics", "--log-connections", "--json"), ALWAYS),
        **dict.fromkeys(("--max-connections", "--rate", "--connect-timeout", "--idle-timeout"), ALWAYS),
        "--drain": ALWAYS,
        "--upgrade": (*PROXY, "--upgrade", "smtp"),
        "--pass-through": ("proxy", "--config", "FILE", "--pass-through"),
        "--send-proxy": ("proxy", "--config", "FILE", "--send-proxy", "v1"),
        "--keep-source": ("proxy", "--config", "FILE", "--keep-source"),
        "--upstream-upgrade": ("proxy", "--config", "FILE", "--upstream-upgrade", "smtp"),
        "--upstream-name": (*PROXY, "--upstream-name", "a.test"),
        "--proxy-from": (*PROXY, "--proxy-from", "unix"),
        "--transparent": ("proxy", "unix:/nowhere/x", "127.0.0.1:1", "--transparent"),
        "--max-handshakes": (*PROXY, "--max-handshakes", "7"),
        "--burst": (*PROXY, "--burst", "7"),
        "--handshake-timeout": (*PROXY, "--handshake-timeout", "7"),
        "--quiet": (*PROXY, "--quiet", "--json"),
    },
    ("proxy", "status"): {"--json": ALWAYS},
    ("tunnel", "serve"): {
        **dict.fromkeys(("--port", "--host", "--visitor-host", "--public-ports", "--ask-ports"), ALWAYS),
        **dict.fromkeys(("--ask-host", "--allow", "--deny", "--visitor-rate", "--config", "--drain"), ALWAYS),
        **dict.fromkeys(("--visitor-bytes-per-second", "--client-bytes-per-second"), ALWAYS),
        **dict.fromkeys(("--service-bytes-per-second", "--danger-allow-anonymous"), ALWAYS),
        **dict.fromkeys(("--metrics", "--json"), ALWAYS),
        # Nothing is kept elsewhere, even where nothing is kept.
        "--state": ALWAYS,
        "--visitor-burst": (*SERVE, "--visitor-burst", "7"),
    },
    ("tunnel", "status"): {
        **dict.fromkeys(("--json", "--watch"), ALWAYS),
        "--interval": ("tunnel", "status", "127.0.0.1:1", "--interval", "2"),
    },
    ("expose",): {
        **dict.fromkeys(("--to", "--config", "--token-file", "--credentials", "--lease"), ALWAYS),
        **dict.fromkeys(("--send-proxy", "--bytes-per-second", "--max-visitors", "--reconnect"), ALWAYS),
        **dict.fromkeys(("--scheme", "--drain", "--metrics", "--json"), ALWAYS),
        "--tls": ASKS,
        "--server-name": (*EXPOSE, "--server-name", "a.test"),
        "--qr": (*EXPOSE, "--qr", "--json"),
    },
    ("demo",): dict.fromkeys(("--seconds", "--keep", "--json"), ALWAYS),
    ("tls", "dev-cert"): dict.fromkeys(
        ("--out", "--ca-dir", "--days", "--new-ca", "--force", "--json"), ALWAYS
    ),
    ("wasi", "run"): dict.fromkeys(
        (
            *("--allow-net", "--tls", "--env", "--dir", "--timeout", "--handshake-timeout", "--fuel"),
            *("--memory", "--json"),
        ),
        ALWAYS,
    ),
    ("version",): {"--json": ALWAYS},
}

#: In front of which flags of TLS stand, and those that are called otherwise.
TLS_FLAGS = {
    ("bridge",): {""},
    ("proxy", "run"): {"", "upstream-"},
    ("tunnel", "serve"): {"", "visitor-"},
    ("expose",): {""},
}
RENAMED = {"--allow-client", "--ca"}


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name, one in inner.items():
        yield from leaves(one, (*path, name))


def test_each_flag_of_each_command_is_here() -> None:
    found = dict(leaves(get_command(cli.app)))
    assert found.keys() == FLAGS.keys()
    for path, command in found.items():
        flags = {max(one.opts, key=len) for one in command.params if one.param_type_name == "option"}
        of_tls = {f"--{prefix}{one.name}" for prefix in TLS_FLAGS.get(path, ()) for one in TLS_OPTIONS}
        assert flags - of_tls - RENAMED - {"--help"} <= FLAGS[path].keys() <= flags, path


def refusal(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> ConfigError:
    monkeypatch.setattr(sys, "argv", ["sapper", *words])
    with pytest.raises(ConfigError) as caught:
        cli._read()
    return caught.value


CASES = [
    (flag, words) for flags in FLAGS.values() for flag, words in flags.items() if not isinstance(words, str)
]


@pytest.mark.parametrize(("flag", "words"), CASES, ids=[" ".join(words) for _, words in CASES])
def test_a_flag_without_a_use_is_refused_by_its_name(
    flag: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text('[proxy]\nlisten = "127.0.0.1:0"\nto = "127.0.0.1:1"\n')
    error = refusal(tuple(str(file) if word == "FILE" else word for word in words), monkeypatch)
    assert (error.field, error.reason) == (flag, "unused"), error


@pytest.mark.parametrize("one", TLS_OPTIONS, ids=[one.name for one in TLS_OPTIONS])
def test_flags_of_tls_are_refused_where_none_is_spoken(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With clients of a proxy, and in a tunnel, they ask for it."""
    flag, value = f"--{one.name}", [] if one.kind is bool else [VALUES.get(one.name, "/nowhere")]
    error = refusal((*STREAMS, flag, *value), monkeypatch)
    assert (error.field, error.reason) == (flag, "unused"), error
    if one.role != "server":
        error = refusal((*PROXY, f"--upstream-{one.name}", *value), monkeypatch)
        # Files that are not there, and halves, are told first.
        assert (error.field or "").startswith("--upstream-")


VALUES = {
    "client-auth": "optional",
    "ocsp": "require",
    "min-tls": "1.3",
    "max-tls": "1.2",
    "ticket-lifetime": "60",
    "cipher-suite": "TLS_AES_128_GCM_SHA256",
    "group": "X25519",
    "alpn": "h2",
    "pin": "ab" * 32,
    "allow": "cn:x",
    "roots": "system",
}


def test_what_a_file_says_is_told_as_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bridge.toml"
    for line in ("max_packet = 1000", "policy_timeout = 1.0", "handshake_timeout = 1.0"):
        file.write_text(f"[bridge]\n{line}\n")
        error = refusal((*STREAMS, "--config", str(file)), monkeypatch)
        assert (error.field, error.reason) == ("--config", "unused")
        assert error.message.startswith(f"[bridge] {line.split()[0]}: ")


def test_what_a_file_says_of_tls_is_told_as_the_files_beside_what_is_typed(
    monkeypatch: pytest.MonkeyPatch, files: Path
) -> None:
    typed = ("tls://127.0.0.1:1", "null:", "--psk-identity", "x", "--psk-file", f"{files}/psk")
    for line in (
        "danger_accept_any_certificate = true",
        'ocsp = "require"',
        'cipher_suites = ["AES128-SHA"]',
    ):
        (files / "bridge.toml").write_text(f"[tls]\n{line}\n")
        error = refusal(("bridge", *typed, "--config", f"{files}/bridge.toml"), monkeypatch)
        assert error.field == "--config", error
        assert error.message.startswith(f"[tls] {line.split()[0]}"), error
    (files / "proxy.toml").write_text(
        '[proxy]\nlisten = ":0"\nto = "127.0.0.1:1"\n[proxy.tls]\ngroups = ["X25519MLKEM768"]\n'
    )
    own = ("--cert", f"{files}/chain.pem", "--key", f"{files}/key.pem")
    error = refusal(("proxy", *own, "--max-tls", "1.2", "--config", f"{files}/proxy.toml"), monkeypatch)
    assert error.field == "--config", error
    assert error.message.startswith("[proxy.tls] groups.0: "), error


def test_more_that_has_no_use_is_refused(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    client = ("bridge", "tls://127.0.0.1:1", "null:")
    psk = (*client, "--psk-identity", "x", "--psk-file", f"{files}/psk")
    for flag, words in (
        # Nobody draws what nobody may see.
        ("--quiet", (*STREAMS, "--quiet", "--stats", "1")),
        ("--danger-accept-any-certificate", (*psk, "--danger-accept-any-certificate")),
        # No other sink comes later here.
        ("--records-per-write", (*GIVEN, "--direction", "decrypt-only", "--records-per-write", "3")),
        ("--danger-legacy-renegotiation", (*client, "--danger-legacy-renegotiation", "--min-tls", "1.3")),
    ):
        error = refusal(words, monkeypatch)
        assert (error.field, error.reason) == (flag, "unused"), error


@pytest.fixture
def files(tmp_path: Path) -> Path:
    made = throwaway_certificates("localhost")
    chain, key = made.server
    (tmp_path / "chain.pem").write_bytes(chain)
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "roots.pem").write_bytes(made.authority)
    (tmp_path / "psk").write_text("00" * 32)
    return tmp_path


#: For one end, in a file and as flags.
OF_THE_OTHER_END: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("client", "client_auth", '"required"', ("--client-auth", "required")),
    ("client", "ticket_lifetime", "60.0", ("--ticket-lifetime", "60")),
    ("server", "ocsp", '"require"', ("--ocsp", "require")),
    ("server", "danger_ignore_server_name", "true", ("--danger-ignore-server-name",)),
    ("server", "roots", '"roots.pem"', ("--client-auth", "off", "--roots", "roots.pem")),
    ("server", "pins", f'["{"ab" * 32}"]', ("--client-auth", "off", "--pin", "ab" * 32)),
    ("server", "danger_accept_any_certificate", "true", ("--danger-accept-any-certificate",)),
]


@pytest.mark.parametrize(("role", "name", "value", "flags"), OF_THE_OTHER_END)
def test_what_is_for_the_other_end_is_refused_in_a_file_as_it_is_as_a_flag(
    role: str,
    name: str,
    value: str,
    flags: tuple[str, ...],
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files)
    credentials = ("--cert", "chain.pem", "--key", "key.pem")
    ends = ("tls://127.0.0.1:1", "null:") if role == "client" else ("tls-listen://127.0.0.1:0", "null:")
    own = ("--roots", "roots.pem") if role == "client" else credentials
    error = refusal(("bridge", *ends, *own, *flags), monkeypatch)
    assert error.reason == "unused"
    assert error.field in flags
    lines = ["[tls]", f"{name} = {value}"]
    if "off" in flags:
        lines.append('client_auth = "off"')
    lines += ['roots = "roots.pem"'] if role == "client" else []
    lines += (
        ["[tls.credentials]", 'kind = "certificate"', 'chain = "chain.pem"', 'key = "key.pem"']
        if role == "server"
        else []
    )
    (files / "bridge.toml").write_text("\n".join(lines))
    error = refusal(("bridge", *ends, "--config", "bridge.toml"), monkeypatch)
    assert (error.field, error.reason) == ("--config", "unused"), error
    assert error.message.startswith(f"[tls] {name}: "), error


@pytest.mark.parametrize(
    "words",
    [
        ("tls://127.0.0.1:1", "--roots", "roots.pem", "--client-auth", "off"),
        ("tls://127.0.0.1:1", "--roots", "roots.pem", "--ticket-lifetime", "21600"),
        ("tls://127.0.0.1:1", "--psk-identity", "x", "--psk-file", "psk", "--ocsp", "off"),
        ("tls://127.0.0.1:1", "--psk-identity", "x", "--psk-file", "psk", "--client-auth", "off"),
        (*("tls-listen://127.0.0.1:0", "--cert", "chain.pem", "--key", "key.pem", "--ocsp", "off"),),
        ("tcp://127.0.0.1:1", "--min-tls", "1.2", "--max-tls", "1.3"),
        ("tcp-listen://127.0.0.1:0", "--quiet", "--stats", "0"),
    ],
)
def test_a_default_that_is_typed_counts_as_left_out(
    words: tuple[str, ...], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    made: list[object] = []

    async def caught(*given: object) -> int:
        made.append(given)
        ends, tls, name, options = given[:4]
        pump, _ = _run._make(*_run._in_order(ends), tls, name, options)  # type: ignore[arg-type]
        pump.stop()
        return 0

    monkeypatch.setattr(importlib.import_module("sapper.cli.bridge"), "run", caught)
    monkeypatch.setattr(sys, "argv", ["sapper", "bridge", words[0], "null:", *words[1:]])
    cli._read()
    assert made


def test_the_exit_code_is_that_of_options() -> None:
    words = [sys.executable, "-m", "sapper.cli", *STREAMS, "--max-packet", "1000"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --max-packet: is about packets")
    assert "--framing" in done.stderr
