"""Child processes of the bench: started with inherited fds, waited for with a deadline, always ended."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parent.parent
END_SECONDS = 3.0
"""How long a child has after SIGTERM before it is killed."""


class BenchError(Exception):
    """A measurement could not be made; the message says which and why."""


class Child:
    """One running program. Its stderr goes to a file, so that it never waits for us to read it."""

    def __init__(
        self, command: Sequence[str | Path], fds: Iterable[int], environment: dict[str, str] | None
    ) -> None:
        self.name = _name_of([str(part) for part in command])
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by end)
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            pass_fds=tuple(fds),
            start_new_session=True,  # Ctrl-C reaches the bench alone, which then ends its children
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": _python_path(), **(environment or {})},
            text=True,
        )

    @property
    def pid(self) -> int:
        """The process id; `ip netns exec` keeps it."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def failed(self) -> bool:
        """Whether it ended by itself with an error."""
        return (self._process.poll() or 0) > 0

    @property
    def complaint(self) -> str:
        """The end of what it said on stderr."""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace").strip()[-800:]

    def cpu_seconds(self) -> float:
        """Processor time so far, all threads, user and kernel."""
        return time.clock_gettime(
            (~self.pid << 3) | 2
        )  # the id of a process clock, as clock_getcpuclockid makes it

    def first_line(self, seconds: float) -> str:
        """The first line of its output, for programs that say when they are ready."""
        assert self._process.stdout is not None
        limit = time.monotonic() + seconds
        os.set_blocking(self._process.stdout.fileno(), False)
        line = ""
        while not line.endswith("\n"):
            line += self._process.stdout.readline()
            if not self.running:
                raise BenchError(f"{self.name} ended early: {self.complaint}")
            if time.monotonic() > limit:
                raise BenchError(f"{self.name} was not ready within {seconds:.0f} s: {self.complaint}")
            time.sleep(0.01)
        return line

    def result(self, seconds: float) -> str:
        """Its whole output, when it ends by itself within the deadline and without an error."""
        try:
            out, _ = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{self.name} did not end within {seconds:.0f} s: {self.complaint}") from None
        if self._process.returncode:
            # iperf3 -J complains on stdout.
            raise BenchError(f"{self.name} failed: {self.complaint or out[-800:]}")
        return out

    def end(self) -> None:
        """SIGTERM, and SIGKILL if it does not follow."""
        if self.running:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._stderr.close()


class Children:
    """Programs that end with the `with` block, whatever ends it."""

    def __init__(self) -> None:
        self._started: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, BenchError):
            # The one that failed is usually not the one that noticed.
            for child in self._started:
                if child.failed and child.complaint not in str(error):
                    error.add_note(f"{child.name}: {child.complaint}")
        for child in reversed(self._started):
            child.end()
        self._started.clear()

    def start(
        self,
        command: Sequence[str | Path],
        fds: Iterable[int] = (),
        environment: dict[str, str] | None = None,
    ) -> Child:
        """Starts a program; `fds` are inherited under the same numbers."""
        child = Child(command, fds, environment)
        self._started.append(child)
        return child


def run(command: Sequence[str | Path], seconds: float = 60.0) -> str:
    """Runs a short program to its end and gives its output."""
    with Children() as children:
        return children.start(command).result(seconds)


def wait_until(ready: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Polls a condition of another process that cannot be waited for otherwise."""
    limit = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > limit:
            raise BenchError(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(0.02)


def _name_of(words: list[str]) -> str:
    """The program's name without its options, for messages."""
    if words[1:3] == ["netns", "exec"]:
        words = words[4:]
    if len(words) > 2 and words[1] == "-m":
        return words[2]
    return Path(words[0]).name


def _python_path() -> str:
    """The checkout, for `python -m benches.…` in any interpreter, and what the caller had."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])
