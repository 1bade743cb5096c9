"""A bridge whose inner end is in the hand of the test, for conversations with foreign programs."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

import sapper.tls as tls
from support import traffic
from support.programs import Program


@dataclass
class Inside:
    """A running bridge and the socket that is its cleartext end."""

    bridge: tls.Bridge
    inner: socket.socket
    errors: list[BaseException] = field(default_factory=list)

    def exchange(self, program: Program, size: int = 300_000) -> None:
        """Moves bytes both ways at once between the inner end and a program's standard input and output."""
        up, down = traffic.payload(size, 1), traffic.payload(size, 2)
        # A mark that ends with a line's end: programs that print may wait for one.
        mark = b"<<end of what went up>>\n"
        jobs = [
            traffic.Background(lambda: self.inner.sendall(up + mark)),
            traffic.Background(lambda: program.send(down)),
            # Read meanwhile: such programs do one thing at a time, and wait for whoever reads them.
            traffic.Background(lambda: program.wait_for(mark, seconds=30)),
        ]
        received = traffic.receive_exactly(self.inner, size)
        for job in jobs:
            job.join()
        assert traffic.digest(received) == traffic.digest(down)
        assert up + mark in program.output


@pytest.fixture
def inside() -> Callable[..., contextlib.AbstractContextManager[Inside]]:
    """Makes a bridge with a socket pair as its sink, and ends it with the test."""

    @contextlib.contextmanager
    def make(**options: Any) -> Iterator[Inside]:
        ours, theirs = socket.socketpair()
        with ours:
            errors: list[BaseException] = []
            bridge = tls.create_bridge(sink=theirs, on_error=errors.append, **options)
            try:
                yield Inside(bridge, ours, errors)
            finally:
                bridge.stop()
                with contextlib.suppress(Exception):
                    bridge.wait_closed_sync(20)

    return make


@pytest.fixture
def accepted() -> Iterator[Callable[[Callable[[int], Any]], tuple[socket.socket, Any]]]:
    """Listens, starts a client program with the port, and gives the accepted connection."""
    with contextlib.ExitStack() as stack:

        def accept(start: Callable[[int], Any]) -> tuple[socket.socket, Any]:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                program = stack.enter_context(start(listener.getsockname()[1]))
                listener.settimeout(20)
                connection, _ = listener.accept()
                return connection, program

        yield accept
