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


@pytest.mark.parametrize("command", ["proxy", "serve", "expose"])
@pytest.mark.parametrize("what", ["certificate", "config"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_ends_are_heard(
    command: str, what: str, tmp_path: Path
) -> None:
    """A FIFO that nobody writes to would be waited for without an end."""
    made = throwaway_certificates("localhost")
    for name, content in zip(("chain.pem", "key.pem"), made.server, strict=True):
        (tmp_path / name).write_bytes(content)
    own = 'kind = "certificate"\nchain = "chain.pem"\nkey = "key.pem"\n'
    text = {
        "proxy": f'[proxy]\nlisten = "127.0.0.1:0"\nto = "127.0.0.1:1"\n[proxy.tls.credentials]\n{own}',
        "serve": f'[tunnel]\nport = 0\nhost = "127.0.0.1"\n[tunnel.tls.credentials]\n{own}',
        "expose": f'[expose]\nserver = "127.0.0.1:1"\nservice = 9\n[expose.tls.credentials]\n{own}',
    }[command]
    (tmp_path / "sapper.toml").write_text(text)
    words = {
        "proxy": ("proxy",),
        "serve": ("tunnel", "serve", "--state", str(tmp_path)),
        "expose": ("expose",),
    }[command]
    begins = {
        "proxy": "listening",
        "serve": "main-server-start",
        "expose": "tunnel-reconnect-queued",
    }[command]
    named = tmp_path / ("chain.pem" if what == "certificate" else "sapper.toml")
    with started(
        *words, "--config", str(tmp_path / "sapper.toml"), "--json", SAPPER_TUNNEL_TOKEN="x"
    ) as process:
        event(process.stdout, begins)
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "fifo").replace(named)
        process.send_signal(signal.SIGHUP)
        error = event(process.stdout, "reload")["error"]
        assert "it is no regular file" in error["message"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
