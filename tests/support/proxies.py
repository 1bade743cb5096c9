"""What tests of the proxy share: configurations, clients, and waiting for what other threads bring about."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

from sapper.tls import Credentials, TlsConfig
from sapper.tls.proxy import ConnectionEvent, ProxyEvent
from support.certs import Certificates, Identity

__all__ = ["LATEST", "connect", "ends", "own", "trusting", "until"]

#: Within how long everything has to be over, even on a busy machine.
LATEST = 25.0


def own(identity: Identity, **more: Any) -> TlsConfig:
    return TlsConfig(credentials=Credentials.certificate(identity.cert_path, identity.key_path), **more)


def trusting(certs: Certificates, client: Identity | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certs.ca.cert_path))
    if client is not None:
        context.load_cert_chain(client.cert_path, client.key_path)
    return context


def connect(address: str) -> socket.socket:
    """A plain connection to where a proxy says that it listens."""
    if address.startswith("/"):
        one = socket.socket(socket.AF_UNIX)
        one.settimeout(LATEST)
        one.connect(address)
        return one
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host.strip("[]"), int(port)), timeout=LATEST)


async def until(condition: Callable[[], object], what: str) -> None:
    """Waits for a condition that other threads bring about."""
    deadline = time.monotonic() + LATEST
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        await asyncio.sleep(0.005)  # between two looks


def ends(events: list[ProxyEvent], outcome: str) -> list[ConnectionEvent]:
    return [one for one in events if isinstance(one, ConnectionEvent) and one.outcome == outcome]
