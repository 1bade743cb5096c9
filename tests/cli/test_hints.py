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
from sapper.cli._hints import HINTS, hint, offered
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
    for kind in HINTS:
        named = set(re.findall(r"--[a-z][a-z0-9-]*", hint(kind, options) or ""))
        assert named <= options, (kind, named - options)


def test_every_option_in_a_hint_is_some_command_s() -> None:
    known = set[str]().union(*(offered(words) for words in commands()))
    for parts in HINTS.values():
        for part in parts:
            assert isinstance(part, str) or set(part[1:]) <= known, part


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
