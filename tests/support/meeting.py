"""Two bridges that meet in memory, to see that a configuration is (still) good for something."""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sapper import tls
from sapper.errors import SapperError
from sapper.tls import Credentials, TlsConfig
from support import traffic
from support.traffic import Background


class Connected:
    """A client's bridge and a server's, both running, with the ends that their programs hold."""

    def __init__(
        self,
        client: TlsConfig | Credentials,
        server: TlsConfig | Credentials,
        name: str | None,
    ) -> None:
        near, far = socket.socketpair()
        near_sink, self.near = socket.socketpair()
        far_sink, self.far = socket.socketpair()
        self._client = tls.create_bridge(
            socket=near, sink=near_sink, credentials=client, server_hostname=name, handshake_timeout=20
        )
        self._server = tls.create_bridge(
            socket=far, sink=far_sink, credentials=server, server_side=True, handshake_timeout=20
        )
        answering = Background(self._server.handshake_sync)
        try:
            self.info = self._client.handshake_sync()
        except SapperError:
            with suppress(SapperError):
                answering.join()
            raise
        answering.join()
        self._client.start()
        self._server.start()

    def exchange(self, size: int = 100_000) -> None:
        """Bytes both ways, which must arrive as they were."""
        for source, target, seed in ((self.near, self.far, 1), (self.far, self.near, 2)):
            sent = traffic.payload(size, seed)
            sending = Background(functools.partial(source.sendall, sent))
            assert traffic.receive_exactly(target, size) == sent
            sending.join()

    def close(self) -> None:
        """Ends both and waits for it."""
        for bridge in (self._client, self._server):
            bridge.stop()
        for end in (self.near, self.far):
            end.close()
        for bridge in (self._client, self._server):
            with suppress(SapperError):
                bridge.wait_closed_sync(10)


@contextmanager
def connected(
    client: TlsConfig | Credentials, server: TlsConfig | Credentials, name: str | None = "localhost"
) -> Iterator[Connected]:
    """A connection, closed in the end whatever happened."""
    both = object.__new__(Connected)
    try:
        both.__init__(client, server, name)  # type: ignore[misc]
        yield both
    finally:
        both.close()


def works(
    client: TlsConfig | Credentials, server: TlsConfig | Credentials, name: str | None = "localhost"
) -> None:
    """The service is up: a handshake, bytes both ways."""
    with connected(client, server, name) as both:
        both.exchange(1000)
