"""Foreign programs as peers: started, waited for until they listen, ended by their process id."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Self

from support import needs

_PORTS = range(15_000, 30_000)


def own_ports() -> range:
    """Those that are this process's own to look for free ones: tests may run in several side by side."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    size = len(_PORTS) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return _PORTS[worker * size : (worker + 1) * size]


def free_port(host: str = "127.0.0.1", kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port that was free a moment ago: for programs that cannot take a listening socket.

    None of those that the kernel gives to whoever connects without naming one: it would not stay free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in random.sample(own_ports(), 100):
        with socket.socket(family, kind) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise AssertionError(f"no port of {host} is free")


@contextlib.contextmanager
def started(*command: str, stderr: int | None = None, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A program whose lines are read as they come; it does not outlive this."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **environment}
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


class Program:
    """A running program with what it has printed so far (both outputs as one)."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self.stdin: IO[bytes] = process.stdin
        self.output = b""
        self._stdout = process.stdout
        os.set_blocking(self._stdout.fileno(), False)

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def send(self, data: bytes) -> None:
        """Writes to its standard input."""
        view = memoryview(data)
        while view:
            view = view[self.stdin.write(view) :]

    def wait_for(self, pattern: bytes, seconds: float = 30) -> re.Match[bytes]:
        """Reads its output until the pattern is in it; ends the test when it does not come."""
        deadline = time.monotonic() + seconds
        compiled = re.compile(pattern, re.DOTALL)
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while True:
                found = compiled.search(self.output)
                if found:
                    return found
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"{self._said()}: no {pattern!r} within {seconds} s")
                if not selector.select(left):
                    continue
                chunk = self._stdout.read(65536)
                if chunk == b"":
                    raise AssertionError(f"{self._said()}: ended without {pattern!r}")
                self.output += chunk or b""

    def wait_for_port(self, port: int, host: str = "127.0.0.1", seconds: float = 30) -> None:
        """Waits until the kernel lists the port as listening, without a connection that the program sees."""
        deadline = time.monotonic() + seconds
        while not listening(port):
            if self.process.poll() is not None:
                self._drain()
                raise AssertionError(f"{self._said()}: ended before it listened on {host}:{port}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{self._said()}: does not listen on {host}:{port}")
            time.sleep(0.01)  # between two looks at the kernel's table

    def wait(self, seconds: float = 30) -> int:
        """Waits for its end by itself; the exit status."""
        self._drain(seconds)
        return self.process.wait(timeout=seconds)

    def _drain(self, seconds: float = 1) -> None:
        """Reads to the end of its output, or for so long."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0 and selector.select(left):
                chunk = self._stdout.read(65536)
                if chunk == b"":
                    return
                self.output += chunk or b""

    def _said(self) -> str:
        said = self.output[-2000:].decode(errors="replace")
        return f"{self.process.args!r} (status {self.process.poll()}) said {said!r}"

    def stop(self) -> None:
        """Ends it, gently first."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(timeout=10)
        # After its end: a thread that still writes to it holds the pipe until then.
        with contextlib.suppress(OSError):
            self.stdin.close()
        self._stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


@contextlib.contextmanager
def run_program(
    *arguments: str | os.PathLike[str],
    namespace: str | None = None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    port: int | None = None,
) -> Iterator[Program]:
    """Runs a program, in a namespace if one is named, and ends it whatever happens.

    Args:
        arguments: The program and its arguments. It is looked up; where it is missing the test is skipped.
        namespace: A network namespace to run it in.
        env: More environment variables.
        pass_fds: Descriptors that it inherits.
        port: Wait until it listens there.
    """
    path = needs.program(os.fspath(arguments[0]))
    command = [path, *(os.fspath(a) for a in arguments[1:])]
    if namespace is not None:
        command = [needs.program("ip"), "netns", "exec", namespace, *command]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        env={**os.environ, **(env or {})},
        pass_fds=pass_fds,
        # A Ctrl-C in the terminal is for pytest, which then ends the program in order.
        process_group=0,
        preexec_fn=_default_signals,
    )
    with Program(process) as program:
        if port is not None:
            program.wait_for_port(port)
        yield program


def _default_signals() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def listening(port: int, namespace_pid: int | str = "self") -> bool:
    """Whether anything in the network namespace of this process listens on a TCP port."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{namespace_pid}/net/{table}") as lines:
            for line in lines:
                fields = line.split()
                if len(fields) > 3 and fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                    return True
    return False


def event(stream: IO[str] | None, name: str) -> dict[str, Any]:
    """The next event of that name that a command says with ``--json``."""
    assert stream is not None
    for line in stream:
        values: dict[str, Any] = json.loads(line)
        if values["event"] == name:
            return values
    raise AssertionError(f"it ended without {name}")
