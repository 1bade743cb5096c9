"""Files that are there once: ``<(…)`` of a shell, and what descriptors and FIFOs give."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sapper.testing import throwaway_certificates
from support import programs
from support.programs import event

SAPPER = [sys.executable, "-m", "sapper.cli"]


@contextmanager
def piped(text: str) -> Iterator[str]:
    """The name of a descriptor that gives this, and then its end."""
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    os.write(writing, text.encode())
    os.close(writing)
    try:
        yield f"/dev/fd/{reading}"
    finally:
        os.close(reading)


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*SAPPER, *arguments],
        close_fds=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    # One that waits for a pipe says nothing, ever.
    alarm = threading.Timer(60, process.kill)
    alarm.start()
    try:
        yield process
    finally:
        alarm.cancel()
        process.kill()
        process.communicate()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Where it is, and its token."""
    command = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path), "--json")
    with programs.started(*SAPPER, *command, stderr=subprocess.PIPE) as process:
        port = event(process.stdout, "main-server-start")["port"]
        yield f"127.0.0.1:{port}", (tmp_path / "tunnel-token").read_text().strip()


@pytest.mark.parametrize("how", ["--token-file", "--credentials", "--config"])
def test_a_client_reads_a_pipe_once(how: str, server: tuple[str, str]) -> None:
    place, token = server
    text = {
        "--token-file": token,
        "--credentials": json.dumps({"token": token}),
        "--config": f'[expose]\nserver = "{place}"\nservice = 9\n',
    }[how]
    more = () if how == "--config" else ("9", "--to", place)
    with (
        piped(text) as name,
        started("expose", *more, how, name, "--json", SAPPER_TUNNEL_TOKEN=token) as client,
    ):
        assert event(client.stdout, "authentication-acknowledged")["services"]
        # Read again, it is what it was.
        client.send_signal(signal.SIGHUP)
        assert event(client.stdout, "reload")["error"] is None


def test_a_wrong_token_by_a_pipe_is_a_wrong_token(server: tuple[str, str]) -> None:
    with piped("wrong") as name, started("expose", "9", "--to", server[0], f"--token-file={name}") as client:
        _, said = client.communicate(timeout=30)
    assert client.returncode == 9, said
    assert "rejected" in said


@pytest.mark.parametrize("kind", ["descriptor", "fifo"])
def test_a_server_reads_a_key_s_pipe_once(kind: str, tmp_path: Path) -> None:
    chain, secret = throwaway_certificates("localhost").server
    (tmp_path / "cert").write_bytes(chain)
    key = secret.decode()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    if kind == "fifo":
        threading.Thread(target=fifo.write_text, args=(key,), daemon=True).start()
    with (
        piped(key) as name,
        started(
            *("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path), "--json"),
            *("--cert", str(tmp_path / "cert"), "--key", str(fifo) if kind == "fifo" else name),
        ) as process,
    ):
        assert event(process.stdout, "main-server-start")["secure"]
