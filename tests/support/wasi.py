"""Guests that are compiled, the host for them, and a server over TLS that behaves as a test wants.

``make wasi`` builds the host and the guests; where that was not done the tests of this folder are
skipped with that reason, in CI too: they have a target of their own.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.certs import Certificates, Identity
from support.needs import ROOT

__all__ = ["FOLDER", "guest", "tls_server"]

FOLDER = ROOT / "target/wasm32-wasip2/release"


def guest(name: str) -> Path:
    """The file of a guest; ends the test as skipped where there is none."""
    pytest.importorskip("sapper_wasi", reason="sapper-wasi is not built: make wasi")
    for path in (FOLDER / f"{name}.wasm", FOLDER / "examples" / f"{name}.wasm"):
        if path.exists():
            return path
    pytest.skip(f"the guest {name} is not built: make wasi")


def echo(stream: ssl.SSLSocket) -> None:
    """Sends back what comes, and ends as the client does."""
    while data := stream.recv(65536):
        stream.sendall(data)
    stream.unwrap()


def say(stream: ssl.SSLSocket) -> None:
    """Says something and ends in order."""
    stream.sendall(b"0123456789")
    stream.unwrap()


def cut(stream: ssl.SSLSocket) -> None:
    """Says something and ends without close_notify."""
    stream.sendall(b"0123456789")
    stream.shutdown(socket.SHUT_WR)
    with contextlib.suppress(OSError):
        stream.recv(1)


def swallow(stream: ssl.SSLSocket) -> None:
    """Reads to the client's end, then says how much that was, in as many bytes as a million has zeroes."""
    count = 0
    while data := stream.recv(65536):
        count += len(data)
    stream.sendall(b"%d" % count)
    stream.unwrap()


BEHAVIOURS: dict[str, Callable[[ssl.SSLSocket], None]] = {
    "echo": echo,
    "say": say,
    "cut": cut,
    "swallow": swallow,
}


@contextlib.contextmanager
def tls_server(
    behaviour: str,
    identity: Identity,
    *,
    clients: Certificates | None = None,
    heard: list[Any] | None = None,
    resumed: list[bool] | None = None,
) -> Iterator[int]:
    """CPython's ssl on 127.0.0.1; its port.

    Args:
        behaviour: One of the functions above.
        identity: Its certificate.
        clients: Ask clients for a certificate of this authority.
        heard: Gets each client's certificate, or the error that its handshake or its stream ended with.
        resumed: Gets whether each handshake resumed a session.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.cert_path, identity.key_path)
    if clients is not None:
        context.load_verify_locations(clients.ca.cert_path)
        context.verify_mode = ssl.CERT_REQUIRED
    heard = heard if heard is not None else []
    resumed = resumed if resumed is not None else []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(raw: socket.socket) -> None:
        raw.settimeout(30)
        try:
            with context.wrap_socket(raw, server_side=True, suppress_ragged_eofs=False) as stream:
                heard.append(stream.getpeercert())
                resumed.append(bool(stream.session_reused))
                BEHAVIOURS[behaviour](stream)
        except OSError as error:
            heard.append(error)
        finally:
            raw.close()

    threads: list[threading.Thread] = []

    def accept() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:  # it was shut down
                return
            threads.append(threading.Thread(target=serve, args=(raw,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join(10)
        for thread in threads:
            thread.join(40)
            assert not thread.is_alive(), "a connection of the guest is still open"
