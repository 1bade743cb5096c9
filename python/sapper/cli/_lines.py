"""Writes what a command tells without waiting for who reads it.

A pipe that nobody reads is full in the end, and a terminal can be held: a program that serves must not wait
there. So each stream has a bounded queue and a thread that writes from it. What finds no room is counted, and
the count is told once there is room again.

Not here: what is told, and in which form (:mod:`sapper.cli._output`). Streams that are not this process's own
(a test's) are written to at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import IO

__all__ = ["Patient", "finish", "have_streams", "is_behind", "is_told", "leave_unread", "put"]

#: Characters that wait for one stream: a thousand connections that end at once are told, and a reader that
#: is further behind than that reads nothing.
MOST = 512 * 1024
#: Seconds that the end gives to what waits.
AT_THE_END = 1.0

_streams: dict[int, _Lines] = {}


def have_streams() -> None:
    """Gives standard streams that were closed when we began (``2>&-``) a place where nobody reads."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - as long as the process


def leave_unread() -> None:
    """Gives standard output such a place too, where who read it is gone.

    What is left in its buffer would be tried again at the end.
    """
    sys.stdout = sys.__stdout__ or sys.stdout  # typer has put something around it
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def put(text: str, stream: IO[str], lost: Callable[[int], str]) -> None:
    """Has whole lines written.

    Args:
        text: The lines, with their ends.
        stream: Where to.
        lost: Makes the line that says how many were lost.

    Raises:
        OSError: It is not this process's own stream, and cannot be written to.
    """
    if stream is not sys.__stdout__ and stream is not sys.__stderr__:
        stream.write(text)
        stream.flush()
        return
    fd = stream.fileno()
    if fd not in _streams:
        stream.flush()
        _streams[fd] = _Lines(fd, stream.encoding, lost)
    _streams[fd].put(text)


def is_told(stream: IO[str]) -> bool:
    """Whether lines for this stream go through :func:`put`: what is told last comes behind them."""
    return stream in (sys.__stdout__, sys.__stderr__) and stream.fileno() in _streams


def is_behind(stream: IO[str]) -> bool:
    """Whether what was told before still waits to be written."""
    return is_told(stream) and _streams[stream.fileno()].is_behind


class Patient(io.TextIOBase):
    """A stream to draw on whose writer waits for nobody: what is written goes through :func:`put`."""

    def __init__(self, stream: IO[str], lost: Callable[[int], str]) -> None:
        """Says for which stream; the other argument is :func:`put`'s."""
        self._stream = stream
        self._lost = lost

    def write(self, text: str) -> int:
        put(text, self._stream, self._lost)
        return len(text)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        encoding: str = getattr(self._stream, "encoding", "utf-8")
        return encoding


def finish() -> None:
    """Gives what waits a moment to be written; what is left is lost."""
    until = monotonic() + AT_THE_END
    while _streams:
        _, lines = _streams.popitem()
        lines.wait(until)


class _Lines:
    """One stream's queue and its thread."""

    def __init__(self, fd: int, encoding: str, lost: Callable[[int], str]) -> None:
        self._fd = fd
        self._encoding = encoding
        self._lost_line = lost
        self._changed = threading.Condition()
        self._waiting: deque[str] = deque()
        self._size = 0
        self._lost = 0
        self._is_writing = False
        # Where nobody reads it never ends, and must not hold up the end of the process.
        threading.Thread(target=self._run, name="sapper-lines", daemon=True).start()

    def put(self, text: str) -> None:
        with self._changed:
            if self._size + len(text) > MOST:
                self._lost += 1
                return
            self._waiting.append(text)
            self._size += len(text)
            self._changed.notify_all()

    @property
    def is_behind(self) -> bool:
        with self._changed:
            return bool(self._waiting or self._is_writing)

    def wait(self, until: float) -> None:
        """Until all is written, or that moment."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._is_writing), until - monotonic())

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting)
                text = "".join(self._waiting)
                if self._lost:
                    text += self._lost_line(self._lost)
                self._waiting.clear()
                self._size, self._lost, self._is_writing = 0, 0, True
            # Nobody reads any more, or the disk is full: the lines are lost, and what tells them goes on.
            with contextlib.suppress(OSError):
                _write_all(self._fd, text.encode(self._encoding, "backslashreplace"))


def _write_all(fd: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:  # whoever shares it says that nobody waits there
            select.select([], [fd], [])
