"""The examples of README.md run as they stand there and print what stands below them."""

from __future__ import annotations

import os
import re
import shlex
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from support import programs
from support.needs import ROOT
from support.services import echo

# A block of Python, and directly after it what it prints; an ellipsis stands for anything within a line.
BLOCKS = re.compile(r"^```python\n(.*?)^```\n+(?:^```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
README = (ROOT / "README.md").read_text()
EXAMPLES = BLOCKS.findall(README)


def test_there_are_five_examples_each_with_its_output() -> None:
    assert len(EXAMPLES) == 5
    assert all(expected for _, expected in EXAMPLES)


@pytest.mark.parametrize(("code", "expected"), EXAMPLES, ids=range(1, len(EXAMPLES) + 1))
def test_an_example_prints_what_is_shown(code: str, expected: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    pattern = ".*".join(re.escape(part) for part in expected.split("…"))
    assert re.fullmatch(pattern, done.stdout), f"printed {done.stdout!r}, README shows {expected!r}"


def test_the_commands_put_tls_before_a_service(tmp_path: Path) -> None:
    """As they stand there, with other ports and in a folder of the test's."""
    block = re.search(r"^```console\n(sapper tls dev-cert .*?)^```", README, re.MULTILINE | re.DOTALL)
    assert block is not None
    make, serve = (shlex.split(line) for line in block[1].splitlines())
    folder = Path(sys.executable).parent
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "NO_COLOR": "1"}
    subprocess.run([folder / make[0], *make[1:]], cwd=tmp_path, env=environment, timeout=50, check=True)

    port = programs.free_port()
    with echo() as service:
        instead = {":8443": f":{port}", "localhost:8080": service.to}
        assert set(instead) < set(serve)
        files = {name: str(tmp_path / name) for name in ("localhost.pem", "localhost.key")}
        words = [(instead | files).get(word, word) for word in serve[1:]]
        with programs.run_program(folder / serve[0], *words, env=environment, port=port):
            context = ssl.create_default_context(cafile=str(tmp_path / "sapper/dev-ca/authority.pem"))
            raw = socket.create_connection(("127.0.0.1", port), timeout=20)
            with context.wrap_socket(raw, server_hostname="localhost") as client:
                client.sendall(b"behind TLS\n")
                with client.makefile("rb") as answers:
                    assert (answers.readline(), answers.readline()) == (b"echo\n", b"behind TLS\n")


def test_the_two_commands_are_there() -> None:
    for command in ("make run", "make test"):
        assert re.search(rf"^    {command}\b", README, re.MULTILINE)
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")
