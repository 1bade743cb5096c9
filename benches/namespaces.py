"""Network namespaces of the bench, with names of their own, removed in every case."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benches.children import BenchError, run
from benches.programs import program

_numbers = itertools.count()


class Namespace:
    """One network namespace; it and its devices go with the `with` block."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise BenchError("network namespaces need root")
        if not Path("/dev/net/tun").exists():
            raise BenchError("there is no /dev/net/tun")
        self.name = f"sapper-bench-{os.getpid()}-{next(_numbers)}"

    def __enter__(self) -> Self:
        run([program("ip"), "netns", "add", self.name])
        try:
            self.ip("link", "set", "lo", "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        run([program("ip"), "netns", "del", self.name])

    def ip(self, *words: str) -> str:
        """`ip` inside."""
        return run([program("ip"), "-n", self.name, *words])

    def command(self, command: Sequence[str | Path]) -> list[str | Path]:
        """The same command inside; it keeps its process id and its inherited fds."""
        return [program("ip"), "netns", "exec", self.name, *command]

    def add_tun(self, name: str, mtu: int, address: str) -> None:
        """A TUN that a pump will attach to. No link-local addresses: they only bring noise."""
        self.ip("tuntap", "add", "dev", name, "mode", "tun")
        self.ip("link", "set", name, "mtu", str(mtu), "addrgenmode", "none")
        self.ip("address", "add", address, "dev", name, "nodad")
        self.ip("link", "set", name, "up")


def join(near: Namespace, far: Namespace, near_address: str, far_address: str) -> None:
    """A veth pair between two namespaces."""
    near.ip("link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", far.name)
    for namespace, address in ((near, near_address), (far, far_address)):
        namespace.ip("address", "add", address, "dev", "wire")
        namespace.ip("link", "set", "wire", "up")
