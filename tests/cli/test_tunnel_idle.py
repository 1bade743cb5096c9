"""What the tunnel's commands keep loaded while they serve: nothing that reads options."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from sapper.cli._output import say
from support import programs
from support.programs import event

#: The command, which says at its end what it has loaded. The child that reads the command line keeps silent.
PROGRAM = """
import atexit, json, os, sys
mine = os.getpid()
def tell():
    if os.getpid() == mine:
        print(json.dumps({"event": "loaded", "modules": sorted(sys.modules)}), flush=True)
atexit.register(tell)
from sapper.cli import main
main()
"""
HEAVY = {
    "typer",
    "rich",
    "pydantic",
    "pydantic_core",
    "sapper.tls",
    "sapper._options",
    "sapper.tunnel.options",
}
TOKEN = {"SAPPER_TUNNEL_TOKEN": "a token"}


def started(*arguments: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return programs.started(sys.executable, "-c", PROGRAM, *arguments, "--json", stderr=None, **TOKEN)


def loaded(process: subprocess.Popen[str], number: int = signal.SIGINT) -> set[str]:
    """Ends a command; what of the heavy ones it had loaded."""
    process.send_signal(number)
    found = HEAVY & set(event(process.stdout, "loaded")["modules"])
    assert process.wait(20) == 0
    return found


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., Any]:
    """Starts a server that takes everybody."""

    def start(*arguments: str) -> Any:
        where = ("--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path / "state"))
        return started("tunnel", "serve", *where, *arguments)

    return start


def toml(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("how", ["plain", "options", "file"])
def test_an_idle_server_keeps_nothing_that_reads_options(
    how: str, serve: Callable[..., Any], tmp_path: Path
) -> None:
    given = {
        "plain": ("--danger-allow-anonymous",),
        "options": (
            "--public-ports",
            "20000-29999",
            "--client-bytes-per-second",
            "1000",
            "--allow",
            "127.0.0.1",
        ),
        "file": ("--config", toml(tmp_path / "c.toml", "[tunnel]\nservice_limits = { visitors = 3 }\n")),
    }[how]
    with serve(*given) as server:
        event(server.stdout, "main-server-start")
        assert not loaded(server)


@pytest.mark.parametrize("how", ["plain", "options", "services", "file"])
def test_an_idle_client_keeps_nothing_that_reads_options(
    how: str, serve: Callable[..., Any], tmp_path: Path
) -> None:
    with serve("--danger-allow-anonymous") as server:
        at = f"127.0.0.1:{event(server.stdout, 'main-server-start')['port']}"
        file = toml(tmp_path / "c.toml", f'[expose.tunnels.one]\nserver = "{at}"\nservice = 3000\n')
        given = {
            "plain": ("3000", "--to", at),
            "options": ("3000", "--to", at, "--lease", "mine", "--max-visitors", "3", "--send-proxy", "v2"),
            "services": ("3000", "second=3001", "unix:/nowhere", "--to", at),
            "file": ("--config", file),
        }[how]
        with started("expose", *given) as client:
            told = event(client.stdout, "authentication-acknowledged")
            names = ["", "second", "unix:/nowhere"] if how == "services" else [""]
            assert [one["name"] for one in told["services"]] == names
            assert not loaded(client)


def test_a_configuration_is_read_again_with_all_that_it_takes(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    config = tmp_path / "c.toml"
    with serve("--config", toml(config, '[tunnel]\nallow_visitors = ["127.0.0.1"]\n')) as server:
        event(server.stdout, "main-server-start")
        for text, field in [
            ("max_visitors = 7", None),
            ("max_visitors = 0", "--config"),
            (f"asked_hosts = {'[' * 100_000}", "--config"),
            ("grace = 3", None),
        ]:
            # It looks by itself, and is to see the whole.
            Path(toml(tmp_path / "new", f"[tunnel]\n{text}\n")).replace(config)
            error = event(server.stdout, "reload")["error"]
            assert (error and error["field"]) == field
        assert "pydantic" in loaded(server, signal.SIGTERM)


def test_a_mistake_ends_it_as_ever(serve: Callable[..., Any]) -> None:
    for arguments, code in [(("expose",), 2), (("expose", "--help"), 0), (("expose", "--nothing"), 2)]:
        with started(*arguments) as process:
            assert process.wait(20) == code
    with serve("--public-ports", "9-8") as server:
        assert server.wait(20) == 2


def test_what_a_peer_says_does_not_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    say("one", "two \x1b[2J\r\x9b1A\x07 ende\u0301")
    assert capsys.readouterr().err == "one\ntwo \\x1b[2J\\r\\x9b1A\\x07 ende\u0301\n"


def test_what_a_peer_says_begins_no_line_and_turns_none_around(capsys: pytest.CaptureFixture[str]) -> None:
    say("refused x\nerror: forged\u2028gpj\u202e.exe, \u05e9\u05dc\u05d5\u05dd")
    shown = "refused x\\nerror: forged\\u2028gpj\\u202e.exe, \u05e9\u05dc\u05d5\u05dd\n"
    assert capsys.readouterr().err == shown
