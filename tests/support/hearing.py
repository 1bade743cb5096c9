"""The two ways to hear of a bridge's error: from the call that waits, or from the call-back. Never both."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any

import pytest

from sapper.errors import (
    AuthenticationError,
    ConnectionLost,
    IncompatiblePeer,
    RemoteProtocolError,
    SapperError,
    TlsError,
)
from sapper.tls import Bridge, Credentials
from support.certs import Certificates

KEY = b"a key that nobody may ever read!"
PSK = Credentials.psk("an identity", KEY)
#: What bytes from a peer may raise, and nothing else.
FROM_A_PEER = (RemoteProtocolError, IncompatiblePeer, TlsError, AuthenticationError, ConnectionLost)
#: A deadline under test, and within how long everything has to be over even on a busy machine.
SOON, LATEST = 0.15, 25.0


class Hearing:
    """Call-backs that keep what they are told."""

    def __init__(self) -> None:
        self.errors: list[SapperError] = []
        self.closed = threading.Event()
        self.closings = 0

    def on_close(self) -> None:
        self.closings += 1
        self.closed.set()

    def options(self) -> dict[str, Any]:
        return {"on_error": self.errors.append, "on_close": self.on_close}


def failure(bridge: Bridge, hearing: Hearing, way: str) -> SapperError | None:
    """Runs a bridge to its end and gives the one error, after it made sure that there is only one."""
    raised: list[SapperError] = []
    try:
        if way == "handshake":
            bridge.handshake_sync()
        bridge.start()
    except SapperError as error:
        raised.append(error)
    assert hearing.closed.wait(LATEST), f"it does not end: {bridge.state}"
    bridge.wait_closed_sync(LATEST)  # raises nothing: it was told
    assert bridge.state == "closed"
    told = raised + hearing.errors
    assert len(told) <= 1, f"told more than once: {told}"
    assert hearing.closings == 1
    assert bridge.error is (told[0] if told else None)
    return told[0] if told else None


@pytest.fixture(params=["handshake", "start"])
def way(request: pytest.FixtureRequest) -> str:
    """Whether ``handshake()`` is called, which raises, or only ``start()``, which tells ``on_error``."""
    return str(request.param)


def drain(end: socket.socket) -> bytes:
    """All that comes until the other side ends."""
    received = b""
    end.settimeout(LATEST)
    with suppress(ConnectionResetError):
        while chunk := end.recv(65_536):
            received += chunk
    return received


@pytest.fixture(params=["certificate", "psk"])
def engine(request: pytest.FixtureRequest) -> str:
    """Which of the two engines is under attack."""
    return str(request.param)


def both(certs: Certificates, engine: str) -> tuple[Credentials, Credentials]:
    """What an honest client and an honest server have."""
    if engine == "psk":
        return PSK, PSK
    return Credentials.none(roots=certs.ca.cert), Credentials.certificate(certs.server.cert, certs.server.key)


def role(certs: Certificates, engine: str, is_server: bool) -> dict[str, Any]:
    """The options of the bridge under attack."""
    client, server = both(certs, engine)
    if is_server:
        return {"credentials": server, "server_side": True}
    return {"credentials": client, "server_hostname": None if engine == "psk" else certs.name}
