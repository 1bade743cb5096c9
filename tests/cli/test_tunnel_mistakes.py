"""What is wrong with what is typed for a tunnel, or written in its files, and how both go together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from sapper.cli import app
from sapper.cli._lean import _takers
from sapper.tunnel import Limits, VisitorLimits
from support import programs
from support.programs import event

SAPPER = [sys.executable, "-m", "sapper.cli"]


def started(*arguments: str, **environment: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return programs.started(*SAPPER, *arguments, stderr=subprocess.PIPE, **environment)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("expose", "3000", "--to", "nowhere"), "to"),
        (("expose", "x", "--to", "host:1"), "SERVICE"),
        (("expose", "1@9-8", "--to", "host:1"), "SERVICE"),
        (("expose", f"unix:{'x' * 108}", "--to", "h:1"), "SERVICE: a Unix socket's name has 1 to 107 bytes"),
        (("expose", f"a=unix:{'x' * 108}", "--to", "h:1"), "SERVICE: a Unix socket's name has 1 to 107"),
        (("expose", "a=1", "a=2", "--to", "host:1"), "SERVICE"),
        (("tunnel", "serve", "--ask-ports", "x"), "ask-ports"),
        (("tunnel", "serve", "--port", "0", "--ask-host", "x"), "--ask-host"),
        (("tunnel", "serve", "--public-ports", "9-1"), "public"),
        (("tunnel", "serve", "--cert", "x"), "--key"),
        (("tunnel", "serve", "--visitor-key", "x"), "--visitor-cert"),
        (("tunnel", "serve", "--visitor-max-tls", "1.2"), "--visitor-cert"),
        (("tunnel", "serve", "--allow-client", "x"), "--allow-client"),
        (("tunnel", "serve", "--ocsp", "require"), "--ocsp"),
        (("expose", "1", "--to", "h:1", "--pin", "x"), "--pin"),
        (("expose", "1", "--to", "h:1", "--allow", "x"), "--allow"),
        (("expose", "1", "--to", "h:1", "--client-auth", "required"), "--client-auth"),
        (("tunnel", "serve", "--port", "0", "--allow", "10.0.0.0/33"), "--allow"),
        (("tunnel", "serve", "--port", "0", "--deny", "nobody"), "--deny"),
        (("tunnel", "serve", "--visitor-burst", "5"), "visitor-burst"),
        (("tunnel", "serve", "--visitor-rate", "0"), "--visitor-rate"),
        (("expose", "1", "--to", "host:1", "--send-proxy", "v3"), "--send-proxy"),
        (("expose", "1", "--to", "host:1", "--lease", ""), "--lease: must be 1 to 256 bytes"),
        (("expose", "1", "--to", "host:0"), "--to: must be from 1 to 65535"),
        (("expose", "1", "--to", "host:1", "--scheme", ""), "--scheme: "),
        (("expose", "1", "--to", "host:1", "--scheme", "ht tp"), "--scheme: "),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], field: str, tmp_path: Path) -> None:
    more = ("--state", str(tmp_path)) if arguments[0] == "tunnel" else ()
    done = subprocess.run(
        [*SAPPER, *arguments, *more], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert field in done.stderr


@pytest.mark.parametrize(
    ("table", "text", "field"),
    [
        ("tunnel", 'deny_visitors = ["10.0.0.0/33"]', "deny_visitors.0: "),
        ("tunnel", 'asked_hosts = ["x"]', "asked_hosts.0: 'x' is no IP address"),
        ("tunnel", 'host = "192.0.2.1"\nport = 0\nvisitor_rate = 0', "visitor_rate: "),
        ("tunnel", 'token_file = "nothere"', "token_file: cannot read "),
        ("tunnel", 'lease_file = "nothere/leases"', "lease_file: "),
        ("expose", 'server = "h:1"\nservice = 1\nreconnect_delay = [0, 1]', "reconnect_delay.0: "),
        ("expose", 'server = "h:1"\nservice = 1\ntoken_file = "nothere"', "token_file: cannot read "),
        ("expose", f'server = "h:1"\nservice = 1\nlease = "{"l" * 257}"', "lease: must be 1 to 256 bytes"),
        ("expose", 'server = "h:0"\nservice = 1', "server: must be from 1 to 65535"),
        ("expose", 'server = "h:1"\nservice = "h:0"', "service: must be from 1 to 65535"),
        ("expose", 'server = "h:1"\nservice = "0"', "service: must be from 1 to 65535"),
        ("expose", 'service = 1\n[expose.tunnels.a]\nserver = "h:0"', "tunnels.a.server: must be from 1 to"),
        ("expose", 'server = "h:1"\nservices = ["3000@70000"]', "services.0.public_port: must be from 1 to"),
    ],
)
def test_mistakes_of_a_file_have_its_names(table: str, text: str, field: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"[{table}]\n{text}\n")
    command = (
        ("tunnel", "serve", "--port", "0", "--state", str(tmp_path)) if table == "tunnel" else ("expose",)
    )
    done = subprocess.run(
        [*SAPPER, *command, "--config", str(config)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert f"--config: [{table}] {field}" in " ".join(done.stderr.split())


def work_of(*arguments: str) -> Any:
    """What a command line asks for."""
    found: list[Any] = []
    _takers.append(found.append)
    try:
        app(list(arguments), standalone_mode=False)
    finally:
        _takers.pop()
    (work,) = found
    return work


def test_a_limit_that_is_typed_leaves_the_others_of_the_file(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        "[tunnel]\nport = 0\nclients = [{}]\n[tunnel.visitor_limits]\nvisitors = 1\nbytes_per_second = 5\n"
        "[tunnel.service_limits]\nvisits_per_second = 5.0\nvisit_burst = 6\n"
        '[expose]\nserver = "h:1"\nservice = 1\n[expose.limits]\ntotal_visits = 2\nvisitors = 3\n'
    )
    where = ("--config", str(config))
    typed = ("--visitor-bytes-per-second", "7", "--service-bytes-per-second", "8")
    served = work_of("tunnel", "serve", *where, *typed, "--state", str(tmp_path)).config
    assert served.visitor_limits == VisitorLimits(visitors=1, bytes_per_second=7)
    assert served.service_limits == Limits(visits_per_second=5.0, visit_burst=6, bytes_per_second=8)
    exposed = work_of("expose", *where, "--max-visitors", "9").config[""]
    assert exposed.limits == Limits(total_visits=2, visitors=9)


def test_a_file_without_an_enabled_tunnel_is_told(tmp_path: Path) -> None:
    config = tmp_path / "tunnels.json"
    config.write_text(json.dumps([{"name": "a", "enabled": False, "localServicePort": 1}]))
    with started("expose", "--config", str(config)) as client:
        assert client.stderr is not None
        assert client.stderr.readline().startswith("no tunnel is enabled")
        client.send_signal(signal.SIGTERM)
        assert client.wait(20) == 0
    with started("expose", "--config", str(config), "--json") as client:
        event(client.stdout, "idle")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"localServicePort": 0}, "tunnels.0.localServicePort: input should be greater than or equal to 1"),
        ({"serverHost": "a b"}, "tunnels.0.serverHost: 'a b' is no host name"),
        ({"authenticationCredentials": {"x": "x" * 70_000}}, "tunnels.0.authenticationCredentials: "),
        ("[", "{path} is not JSON: "),
        ("[" * 100_000, "{path} is nested too deep"),
    ],
)
def test_mistakes_of_the_watcher_s_file_have_its_names(said: Any, told: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    whole = {"name": "web", "localServicePort": 1, "serverHost": "localhost", "serverPort": 1}
    config.write_text(said if isinstance(said, str) else json.dumps([{**whole, **said}]))
    done = subprocess.run(
        [*SAPPER, "expose", "--config", str(config)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert f"--config: {told.format(path=config)}" in " ".join(done.stderr.split())


def test_a_file_that_is_nested_too_deep_is_a_mistake(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"[expose]\nservice = {'[' * 100_000}\n")
    for command in ("expose", "tunnel serve", "proxy"):
        done = subprocess.run(
            [*SAPPER, *command.split(), "--config", str(config)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, "nested too deep" in done.stderr) == (2, True), done.stderr


def test_what_is_typed_is_named_as_it_was_typed(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[tunnel]\ndeny_visitors = ["10.0.0.1"]\n')
    serve = ("tunnel", "serve", "--port", "0", "--state", str(tmp_path), "--config", str(config))
    done = subprocess.run(
        [*SAPPER, *serve, "--deny", "nobody"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "error: --deny: " in done.stderr


@pytest.mark.parametrize("option", ["--allow", "--deny"])
def test_what_is_no_text_is_named(option: str, tmp_path: Path) -> None:
    serve = ("tunnel", "serve", "--host", "127.0.0.1", "--port", "0", "--state", str(tmp_path))
    done = subprocess.run([*SAPPER, *serve, option, b"\xff"], capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"error: {option}: ".encode() in done.stderr


def test_a_token_that_is_no_text_is_named_by_its_variable() -> None:
    expose = ("expose", "3000", "--to", "127.0.0.1:1", "--no-reconnect")
    said = {**os.environb, b"SAPPER_TUNNEL_TOKEN": b"\xff"}
    done = subprocess.run([*SAPPER, *expose], capture_output=True, timeout=60, check=False, env=said)
    assert done.returncode == 2
    assert b"error: SAPPER_TUNNEL_TOKEN: is not UTF-8" in done.stderr


def test_an_empty_list_of_clients_lets_nobody_in_for_the_token(tmp_path: Path) -> None:
    config, folder = tmp_path / "server.toml", tmp_path / "state"
    text = '[tunnel]\nport = 0\nhost = "127.0.0.1"\n'
    config.write_text(f"{text}clients = []\n")
    serve = ("tunnel", "serve", "--config", str(config), "--state", str(folder))
    done = subprocess.run([*SAPPER, *serve], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2, done
    assert "[tunnel] clients: lets nobody in: leave it out" in done.stderr
    assert not (folder / "tunnel-token").exists()
    (tmp_path / "token").write_text("secret")
    config.write_text(f'{text}clients = [{{ id = "a" }}]\n')
    with started(*serve, "--json") as server:
        event(server.stdout, "main-server-start")
        config.write_text(f"{text}clients = []\n")
        server.send_signal(signal.SIGHUP)
        assert "clients: lets nobody in" in event(server.stdout, "reload")["error"]["message"]
        # Whose token is named may come.
        config.write_text(f'{text}clients = []\ntoken_file = "token"\n')
        server.send_signal(signal.SIGHUP)
        assert event(server.stdout, "reload")["error"] is None
