"""No flag is accepted and passed over: for each of each command there is a case in which it is refused by its
name, or a reason why it always has its use. A new flag without an entry here fails.

Flags of TLS are one list (:mod:`sapper.cli._tls_options`), and which end has a use for which is looked at in
``test_tls_flags.py``; here, that they are refused where no TLS is spoken.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from sapper import cli
from sapper.cli._tls_options import TLS_OPTIONS
from sapper.errors import ConfigError

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
    "ocsp": "check",
    "min-tls": "1.3",
    "max-tls": "1.3",
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


def test_the_exit_code_is_that_of_options() -> None:
    words = [sys.executable, "-m", "sapper.cli", *STREAMS, "--max-packet", "1000"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --max-packet: is about packets")
    assert "--framing" in done.stderr
