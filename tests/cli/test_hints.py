"""What a command says to try next: in options that it has itself."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from sapper.cli import app
from sapper.cli._hints import HINTS, OF_REASON, hint, offered
from sapper.errors import ErrorKind
from support.tunnels import server

SAPPER = [sys.executable, "-m", "sapper.cli"]


def commands(command: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command, as it is called."""
    command = get_command(app) if command is None else command
    if words:
        yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_a_hint_names_options_of_its_command_alone(words: tuple[str, ...]) -> None:
    options = offered((*words, "an argument", "--an-option"))
    for kind, reason in (*((one, None) for one in HINTS), *OF_REASON):
        named = set(re.findall(r"--[a-z][a-z0-9-]*", hint(kind, options, reason) or ""))
        assert named <= options, (kind, named - options)


def test_every_option_in_a_hint_is_some_command_s() -> None:
    known = set[str]().union(*(offered(words) for words in commands()))
    for parts in (*HINTS.values(), *OF_REASON.values()):
        for part in parts:
            assert isinstance(part, str) or set(part[1:]) <= known, part


def test_what_no_option_mends_names_none() -> None:
    for reason in ("expired", "not_yet_valid", "revoked"):
        said = hint(ErrorKind.CERTIFICATE, offered(("bridge",)), reason)
        assert said is not None
        assert "--" not in said
    assert "--roots" not in (hint(ErrorKind.CERTIFICATE, offered(("bridge",)), "wrong_name") or "")


def test_hints_of_the_tunnel_s_client() -> None:
    options = offered(("expose", "3000"))
    assert "--ca" in (hint(ErrorKind.CERTIFICATE, options) or "")
    assert "--token-file" in (hint(ErrorKind.CREDENTIALS_REJECTED, options) or "")
    assert "SAPPER_TUNNEL_TOKEN" in (hint(ErrorKind.CREDENTIALS_REJECTED, options) or "")
    assert "--tls" in (hint(ErrorKind.HANDSHAKE_DEADLINE, options) or "")
    wrong_token = hint(ErrorKind.CREDENTIALS_REJECTED, options, "refused") or ""
    assert "--token-file" in wrong_token
    assert "--cert" not in wrong_token
    assert "--psk-identity" not in wrong_token
    bridge = offered(("bridge",))
    assert "--roots" in (hint(ErrorKind.CERTIFICATE, bridge) or "")
    assert "--handshake-timeout" in (hint(ErrorKind.HANDSHAKE_DEADLINE, bridge) or "")
    assert "TOKEN" not in (hint(ErrorKind.CREDENTIALS_REJECTED, bridge) or "")


async def test_a_wrong_token_has_nothing_to_do_with_tls() -> None:
    async with server() as ours:
        expose = ("expose", "3000", "--to", f"127.0.0.1:{ours.port}", "--no-reconnect")
        said = {**os.environ, "SAPPER_TUNNEL_TOKEN": "wrong"}
        done = await asyncio.to_thread(
            subprocess.run, [*SAPPER, *expose], capture_output=True, text=True, timeout=60, env=said
        )
    assert done.returncode == 9
    assert "try: compare the token" in done.stderr
    assert "--cert" not in done.stderr
    assert "--psk" not in done.stderr


def test_a_hint_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
    expose = ("expose", "3000", "--to", f"127.0.0.1:{port}", "--no-reconnect")
    done = subprocess.run([*SAPPER, *expose], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 5
    assert "try: check that the peer listens there" in done.stderr


def hints_of(*arguments: str) -> list[str]:
    done = subprocess.run([*SAPPER, *arguments], capture_output=True, text=True, timeout=60, check=False)
    return [line for line in done.stderr.splitlines() if line.startswith("try: ")]


@pytest.mark.parametrize("way", ["A", "B"])
@pytest.mark.parametrize("listener", ["tcp-listen://127.0.0.1:0", "unix-listen:{folder}/socket"])
def test_where_nobody_came_the_peer_is_to_come(listener: str, way: str, tmp_path: Path) -> None:
    ends = [listener.format(folder=tmp_path), "null:"]
    bridge = ("bridge", *(ends if way == "A" else ends[::-1]), "--accept-timeout", "0.1")
    (told,) = hints_of(*bridge)
    assert "--accept-timeout" in told
    assert "--connect-timeout" not in told


def test_a_way_that_is_not_found_in_time_is_to_be_made() -> None:
    told = hint(ErrorKind.CONNECT_DEADLINE, offered(("bridge",))) or ""
    assert "--connect-timeout" in told
    assert "--accept-timeout" not in told


def test_a_name_that_is_not_found_is_to_be_checked() -> None:
    told = hint(ErrorKind.CONNECT, offered(("bridge",)), "name") or ""
    assert "name" in told
    assert "listens" not in told


def test_a_guest_s_limits_are_no_limits_of_the_system() -> None:
    options = offered(("wasi", "run"))
    assert hint(ErrorKind.RESOURCE_LIMIT, options, "fuel") == "give it more: --fuel"
    assert hint(ErrorKind.RESOURCE_LIMIT, options, "memory") == "give it more: --memory"
    assert "--json" in (hint(ErrorKind.RESOURCE_LIMIT, options, "capture") or "")
    assert "ulimit" in (hint(ErrorKind.RESOURCE_LIMIT, options) or "")
