"""Two machines in one: network namespaces joined by a cable, removed whatever happens."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from support import needs

T = TypeVar("T")

_numbers = itertools.count()
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Namespace:
    """One of the two, with its addresses on the cable."""

    name: str
    interface: str
    ipv4: str
    ipv6: str

    def run(self, *command: str, check: bool = True, seconds: float = 30) -> str:
        """Runs a short command inside and gives what it printed."""
        done = subprocess.run(
            [needs.program("ip"), "netns", "exec", self.name, *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command} in {self.name}: status {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def ip(self, arguments: str) -> str:
        """`ip` inside, its arguments as one string."""
        return self.run("ip", *arguments.split())

    def call(self, function: Callable[[], T]) -> T:
        """Calls a function on a thread that is inside; what it opens stays inside, on any thread."""
        results: list[T] = []
        errors: list[BaseException] = []

        def inside() -> None:
            try:
                enter(self.name)
                results.append(function())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=inside, name=f"in-{self.name}")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]


def enter(name: str) -> None:
    """Moves the calling thread into a namespace for the rest of its life."""
    import ctypes

    fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"setns {name}: {os.strerror(error)}")
    finally:
        os.close(fd)


@contextlib.contextmanager
def two_namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """A pair of namespaces, each with loopback up and its end of the cable addressed (IPv4 and IPv6)."""
    needs.check("namespaces")
    number = next(_numbers)
    stem = f"sapper{os.getpid()}x{number}"
    left = Namespace(f"{stem}l", "cable", "10.77.0.1", "fd77::1")
    right = Namespace(f"{stem}r", "cable", "10.77.0.2", "fd77::2")
    ip = needs.program("ip")

    def run(arguments: str) -> None:
        done = subprocess.run([ip, *arguments.split()], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise AssertionError(f"ip {arguments}: {done.stderr.strip()}")

    try:
        for side in (left, right):
            run(f"netns add {side.name}")
        run(f"link add cable netns {left.name} type veth peer name cable netns {right.name}")
        for side in (left, right):
            side.ip("link set lo up")
            side.ip(f"address add {side.ipv4}/24 dev cable")
            # No duplicate address detection: there is nobody else, and it takes a second.
            side.ip(f"address add {side.ipv6}/64 dev cable nodad")
            side.ip("link set cable up")
        yield left, right
    finally:
        for side in (left, right):
            subprocess.run([ip, "netns", "delete", side.name], capture_output=True, check=False)
