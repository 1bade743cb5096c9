"""Two bridges face to face in one process, and what moves through them."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from sapper.errors import SapperError
from sapper.tls import Bridge, Credentials, create_bridge
from support.traffic import Background

PSK = Credentials.psk("x", bytes(range(32)))


@dataclass
class Pair:
    """Two bridges face to face, and the other ends of their sinks."""

    client: Bridge
    server: Bridge
    client_end: socket.socket
    server_end: socket.socket


def pair(
    kind: int = socket.SOCK_STREAM,
    server: dict[str, Any] | None = None,
    *,
    wire: tuple[Any, Any] | None = None,
    client_sink: Any = None,
    **options: Any,
) -> Pair:
    """A client and a server, over a wire of its own where none is given.

    Args:
        kind: What kind of socket both sinks are.
        server: Options of the server alone.
        wire: What each of the two takes as its network.
        client_sink: The client's sink, in place of a socket; nothing is at the client's end then.
        options: The client's; the server has the same credentials and framing.
    """
    options.setdefault("credentials", PSK)
    near, far = wire or socket.socketpair()
    own_sink, client_end = socket.socketpair(socket.AF_UNIX, kind)
    if client_sink is None:
        client_sink = own_sink
    else:
        own_sink.close()
    server_sink, server_end = socket.socketpair(socket.AF_UNIX, kind)
    shared: dict[str, Any] = {name: options[name] for name in ("credentials", "framing") if name in options}
    return Pair(
        create_bridge(socket=near, sink=client_sink, **options),
        create_bridge(socket=far, sink=server_sink, **{**shared, **(server or {})}, server_side=True),
        client_end,
        server_end,
    )


@contextmanager
def closing(two: Pair) -> Iterator[Pair]:
    try:
        yield two
    finally:
        for bridge in (two.client, two.server):
            bridge.stop()
        for end in (two.client_end, two.server_end):
            end.close()
        for bridge in (two.client, two.server):
            with suppress(SapperError):
                bridge.wait_closed_sync(20)


@asynccontextmanager
async def running(two: Pair) -> AsyncIterator[Pair]:
    """Both started, and both closed in the end."""
    try:
        await asyncio.gather(two.client.handshake(), two.server.handshake())
        two.client.start()
        two.server.start()
        yield two
    finally:
        for end in (two.client_end, two.server_end):
            end.close()
        for bridge in (two.client, two.server):
            with suppress(SapperError):
                await bridge.stop()


async def send(end: socket.socket, data: bytes) -> None:
    end.setblocking(False)
    await asyncio.get_running_loop().sock_sendall(end, data)


async def receive(end: socket.socket, size: int) -> bytes:
    end.setblocking(False)
    async with asyncio.timeout(20):
        data = b""
        while len(data) < size:
            more = await asyncio.get_running_loop().sock_recv(end, size - len(data))
            if not more:
                break
            data += more
        return data


class Wire:
    """What lies between two bridges, in the hand of the test: it passes on what each of them says."""

    def __init__(self) -> None:
        (self.near, ours), (self.far, theirs) = socket.socketpair(), socket.socketpair()
        self._corrupt = threading.Event()
        self._held = (ours, theirs)
        self._jobs = [
            Background(lambda: self._pass_on(ours, theirs, self._corrupt)),
            Background(lambda: self._pass_on(theirs, ours, threading.Event())),
        ]

    @property
    def ends(self) -> tuple[socket.socket, socket.socket]:
        """For the two bridges."""
        return self.near, self.far

    def corrupt(self) -> None:
        """Turns one bit of what the near bridge says next."""
        self._corrupt.set()

    def join(self) -> None:
        """Waits until both bridges have ended."""
        for job in self._jobs:
            job.join()
        for end in self._held:
            end.close()

    def _pass_on(self, source: socket.socket, destination: socket.socket, corrupt: threading.Event) -> None:
        with suppress(ConnectionError):
            while data := source.recv(65_536):
                if corrupt.is_set():
                    corrupt.clear()
                    data = data[:-1] + bytes([data[-1] ^ 1])
                destination.sendall(data)
            destination.shutdown(socket.SHUT_WR)
