"""The programs of docs/tunnel.md run as they stand there, but for addresses, ports and a path."""

from __future__ import annotations

import ast
import re
import runpy
import socket
import sys
from pathlib import Path

from support.needs import ROOT
from support.programs import Program, run_program
from support.tunnels import Service, asked, echo

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tunnel.md").read_text(), re.DOTALL)


def program(tmp_path: Path, number: int, **instead: str) -> Path:
    text = SNIPPETS[number]
    for before, after in instead.items():
        pattern = {"host": r"tunnel\.example", "path": "/run/app.sock"}.get(
            before, rf"\b{before.lstrip('_')}\b"
        )
        text, count = re.subn(pattern, after, text)
        assert count, pattern
    ast.parse(text)
    path = tmp_path / f"{number}.py"
    path.write_text(text)
    return path


async def test_each_of_them_runs(tmp_path: Path) -> None:
    assert len(SNIPPETS) == 3
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = "from sapper.tunnel import ServerOptions, TunnelServer\n"
    loopback = '"allowed-client", options=ServerOptions(host="127.0.0.1"))'
    server = SNIPPETS[0].replace("from sapper.tunnel import TunnelServer\n", own)
    server = server.replace('"allowed-client")', loopback).replace("9000", str(port))
    (tmp_path / "server.py").write_text(server)
    async with Service(echo) as service:
        there = {"host": "127.0.0.1", "_9000": str(port), "_3000": str(service.port)}
        one = program(tmp_path, 1, **there)
        several = program(tmp_path, 2, **there, _5432=str(service.port), path=str(tmp_path / "socket"))
        with run_program(sys.executable, "-u", tmp_path / "server.py", port=port) as serving:
            for script, many in ((one, 1), (several, 3)):
                with run_program(sys.executable, "-u", script) as client:
                    ports = exposed(client)
                    assert len(ports) == many
                    for public in ports[:2]:
                        assert await asked(public, b"through it") == b"through it"
                serving.wait_for(b"public port %d" % ports[0], seconds=20)


def exposed(client: Program) -> list[int]:
    """Its public ports."""
    said = client.wait_for(rb"exposed at public ports?([ 0-9]+)\n", seconds=20)
    return [int(port) for port in said[1].split()]


def test_the_example_compares_any_text() -> None:
    known = runpy.run_path(str(ROOT / "examples/tunnel.py"))["known"]
    assert known({"name": "alice", "token": "swordfish"})
    for token in ("Schwertfisch", "Schlüssel", "\ud800", None, 7):
        assert not known({"name": "alice", "token": token})
