"""Commands that serve, whose lines nobody reads: pipes that are full and stay so."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from sapper.cli import _lines
from support import programs
from support.certs import Certificates

#: Beyond any machine's slowness; a command that waits for its reader takes longer than any time.
LATEST = 30.0


def fill(pipe: int) -> int:
    """Writes until nothing more fits; how much."""
    os.set_blocking(pipe, False)
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += os.write(pipe, b"." * 1024)
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += os.write(pipe, b".")
    os.set_blocking(pipe, True)
    return filled


def _connects(port: int) -> None:
    until = time.monotonic() + LATEST
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), LATEST).close()
        except ConnectionRefusedError:
            assert time.monotonic() < until, "it does not even listen"
            time.sleep(0.02)
        else:
            return


def _hears(pid: int) -> None:
    """Waits until it has a handler for SIGTERM: before that the system ends it."""
    until = time.monotonic() + LATEST
    while True:
        status = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
        if int(status, 16) >> (signal.SIGTERM - 1) & 1:
            return
        assert time.monotonic() < until
        time.sleep(0.02)


def proxy(port: int, folder: Path, certs: Certificates) -> list[str]:
    own = ["--cert", str(certs.server.cert_path), "--key", str(certs.server.key_path)]
    return ["proxy", f"127.0.0.1:{port}", "127.0.0.1:1", *own, "--log-connections", "--drain", "1"]


def bridge(port: int, folder: Path, certs: Certificates) -> list[str]:
    return ["bridge", f"tcp-listen://127.0.0.1:{port}", "null:", "--stats", "0.01"]


def server(port: int, folder: Path, certs: Certificates) -> list[str]:
    return ["tunnel", "serve", "--port", str(port), "--state", str(folder / "state"), "--drain", "1"]


@pytest.mark.parametrize("as_json", [False, True], ids=["people", "json"])
@pytest.mark.parametrize("command", [proxy, bridge, server])
def test_it_serves_and_ends_where_its_pipe_is_full(
    command: Callable[[int, Path, Certificates], list[str]],
    certs: Certificates,
    tmp_path: Path,
    *,
    as_json: bool,
) -> None:
    port = programs.free_port()
    words = [*command(port, tmp_path, certs), *(["--json"] if as_json else [])]
    reading, writing = os.pipe()
    try:
        fill(writing)
        running = subprocess.Popen(
            [sys.executable, "-m", "sapper.cli", *words], stdout=writing, stderr=writing
        )
        try:
            _connects(port)
            _hears(running.pid)
            running.send_signal(signal.SIGTERM)
            assert running.wait(LATEST) == 0
        finally:
            running.kill()
            running.wait()
    finally:
        os.close(reading)
        os.close(writing)


@pytest.fixture
def full_error(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Standard error is a pipe that is full: its reading end, and what fills it."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "__stderr__", stream)
        monkeypatch.setattr(_lines, "_streams", {})
        yield reading, fill(writing)
        os.close(reading)
        _lines.finish()  # what still writes there has nobody to read it, and ends


def test_what_has_no_room_is_counted_and_told(full_error: tuple[int, int]) -> None:
    reading, filled = full_error
    assert sys.__stderr__ is not None
    line = "x" * 999 + "\n"
    for _ in range(2 * _lines.MOST // len(line)):
        _lines.put(line, sys.__stderr__, lambda count: json.dumps({"lost": count}) + "\n")
    heard = b""
    while b"lost" not in heard:  # now somebody reads
        heard += os.read(reading, 1 << 16)
    *told, last = heard[filled:].decode().splitlines()
    assert all(one + "\n" == line for one in told)
    assert len(told) + json.loads(last)["lost"] == 2 * _lines.MOST // len(line)
    _lines.put("and on\n", sys.__stderr__, str)
    assert os.read(reading, 100) == b"and on\n"


def test_the_end_waits_for_who_reads_and_not_for_who_does_not(
    full_error: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lines, "AT_THE_END", 0.05)
    assert sys.__stderr__ is not None
    _lines.put("nobody\n", sys.__stderr__, str)
    _lines.finish()
    assert not _lines.is_told(sys.__stderr__)


def _status(path: Path) -> float:
    """Seconds that the bridge says it runs."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(LATEST)
        asking.connect(str(path))
        asking.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: asking.recv(1 << 16), b""))
    status = json.loads(answer.partition(b"\r\n\r\n")[2])
    return float(status["pumps"]["bridge"]["running"])


def test_a_table_on_a_held_terminal_holds_up_nothing(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    path, figures, end = tmp_path / "inner", tmp_path / "figures", b"one byte from the network"
    with socket.create_server(("127.0.0.1", 0)) as far:
        words = [f"unix-listen:{path}", f"tcp://127.0.0.1:{far.getsockname()[1]}", "--drain", "1"]
        words += ["--stats", "0.01", "--metrics", f"unix:{figures}"]
        running = subprocess.Popen(
            [sys.executable, "-m", "sapper.cli", "bridge", *words],
            stderr=slave,
            env={**os.environ, "TERM": "xterm"},
        )
        try:
            far.settimeout(LATEST)
            with socket.socket(socket.AF_UNIX) as near:
                until = time.monotonic() + LATEST
                while near.connect_ex(str(path)):
                    assert time.monotonic() < until, "it does not even listen"
                    time.sleep(0.02)
                near.settimeout(LATEST)
                network = far.accept()[0]
                with network:
                    drawn = b""
                    while b"bytes/s" not in drawn:
                        drawn += os.read(master, 1 << 16)
                    termios.tcflow(slave, termios.TCOOFF)  # Ctrl-S
                    held_at = _status(figures)
                    # So long that it draws, were it let, many times.
                    while _status(figures) < held_at + 0.5:
                        network.sendall(end)
                        assert near.recv(len(end), socket.MSG_WAITALL) == end
                    running.send_signal(signal.SIGTERM)
                    assert running.wait(LATEST) == 0
        finally:
            running.kill()
            running.wait()
            os.close(master)
            os.close(slave)


ANSWERS = pytest.mark.parametrize("words", [("version",), ("version", "--json"), ("--help",)], ids=" ".join)


def answer(words: tuple[str, ...], stdout: IO[str] | int) -> subprocess.CompletedProcess[str]:
    """What a command does that has only to answer."""
    command = [sys.executable, "-m", "sapper.cli", *words]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


@ANSWERS
def test_an_answer_that_cannot_be_written_is_an_error(words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = answer(words, full)
    assert done.returncode == 4, done
    assert "standard output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@ANSWERS
def test_an_answer_whose_reader_has_left_is_no_defect(words: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = answer(words, writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
