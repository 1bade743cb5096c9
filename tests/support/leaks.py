"""What a test leaves behind: descriptors, threads, native tasks, counted before and after."""

from __future__ import annotations

import functools
import gc
import os
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import uvloop

import sapper.tls
from sapper import _native


def open_fds() -> dict[int, str]:
    """The process's own descriptors with what each one is."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the one that listed the folder
    return found


def thread_names() -> Counter[str]:
    """The names of all threads of the process, native ones too, without the shared I/O threads."""
    names: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/task"):
        try:
            name = Path(f"/proc/self/task/{entry}/comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if not name.startswith(("sapper-io-", "libuv-worker")):  # both are made once for the process
            names[name] += 1
    return names


@dataclass(frozen=True)
class Snapshot:
    """What there is at one moment."""

    fds: dict[int, str]
    threads: Counter[str]
    python_threads: int
    native_tasks: int

    @classmethod
    def take(cls) -> Self:
        """Counts now, after a garbage collection."""
        gc.collect()
        return cls(open_fds(), thread_names(), threading.active_count(), _native.live_tasks())

    def differences(self, later: Snapshot) -> list[str]:
        """What is there later and was not before."""
        said = []
        # By number and by target: a descriptor that was closed and opened anew as something else shows.
        before, after = Counter(self.fds.values()), Counter(later.fds.values())
        if len(later.fds) > len(self.fds):
            said.append(f"descriptors: {dict(after - before)}")
        if more := later.threads - self.threads:
            said.append(f"threads: {dict(more)}")
        if later.native_tasks > self.native_tasks:
            said.append(f"native tasks: {self.native_tasks} before, {later.native_tasks} after")
        return said


@functools.cache
def warm_up() -> None:
    """Starts what a process has once and keeps: the I/O threads, the modules that are loaded late."""
    uvloop.new_event_loop().close()
    ours, theirs = socket.socketpair()
    with theirs:
        bridge = sapper.tls.create_bridge(
            socket=ours, sink="null:", credentials=sapper.tls.Credentials.psk(identity="warm", key=b"k" * 32)
        )
        bridge.start()
        bridge.stop()
        bridge.wait_closed_sync()


def assert_nothing_left(before: Snapshot, seconds: float = 20) -> None:
    """Ends the test with a failure if something is left after this long.

    A thread that has returned may still be in the kernel's table for a moment; hence the deadline.
    """
    deadline = time.monotonic() + seconds
    while left := before.differences(Snapshot.take()):
        if time.monotonic() > deadline:
            raise AssertionError("left behind: " + "; ".join(left))
        time.sleep(0.01)  # between two looks at the kernel's tables
