"""One handshake of two configurations in memory, and what came of it."""

from __future__ import annotations

import socket
from contextlib import suppress

from sapper import tls
from sapper.errors import SapperError
from sapper.tls import Credentials, TlsConfig
from support.traffic import Background


def meet(
    client: TlsConfig | Credentials, server: TlsConfig | Credentials, name: str | None = "localhost"
) -> tuple[tls.HandshakeInfo, tls.HandshakeInfo]:
    """One handshake in memory and one byte each way, so that tickets have arrived."""
    near, far = socket.socketpair()
    near_sink, near_end = socket.socketpair()
    far_sink, far_end = socket.socketpair()
    ours = tls.create_bridge(socket=near, sink=near_sink, credentials=client, server_hostname=name)
    theirs = tls.create_bridge(socket=far, sink=far_sink, credentials=server, server_side=True)
    results: list[tls.HandshakeInfo] = []
    refused: list[SapperError] = []

    def answer() -> None:
        try:
            results.append(theirs.handshake_sync())
            theirs.start()
        except SapperError as error:
            refused.append(error)

    try:
        background = Background(answer)
        try:
            mine = ours.handshake_sync()
            ours.start()
            with suppress(BrokenPipeError):  # refused after our own handshake was done
                near_end.sendall(b"x")
            background.join()
            if refused:
                raise refused[0]
            far_end.settimeout(20)
            near_end.settimeout(20)
            assert far_end.recv(1) == b"x"
            far_end.sendall(b"y")
            assert near_end.recv(1) == b"y"
        except (SapperError, OSError) as error:
            background.join()
            # Whoever said no has more to tell than who was told.
            raise next((one for one in refused if not told(one)), error) from None
        return mine, results[0]
    finally:
        for bridge in (ours, theirs):
            bridge.stop()
        for end in (near_end, far_end):
            end.close()
        for bridge in (ours, theirs):
            with suppress(SapperError):
                bridge.wait_closed_sync(20)


def told(error: SapperError) -> bool:
    return error.context.alert_received
