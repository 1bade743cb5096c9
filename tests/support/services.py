"""Plain services for proxies: an echo that can be held back, on threads of its own, ended with its block."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Echo", "echo", "read_all", "say"]


class Echo:
    """A service that tells its name and then sends back what it gets."""

    def __init__(self, name: bytes, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        self.name = name
        self._listener = listener
        self._context = context
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._ending = False
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    @property
    def port(self) -> int:
        """Its TCP port."""
        port: int = self._listener.getsockname()[1]
        return port

    @property
    def to(self) -> str:
        """As a proxy takes it."""
        if self._listener.family == socket.AF_UNIX:
            return f"unix:{self._listener.getsockname()}"
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self._listener.accept()
            except OSError:  # it was shut down
                return
            with self._lock:
                self._open.add(one)
                if self._ending:
                    one.close()
                    return
                thread = threading.Thread(target=self._serve, args=(one,))
                self._threads.append(thread)
            thread.start()

    def _serve(self, one: socket.socket) -> None:
        raw = one
        try:
            if self._context is not None:
                one = self._context.wrap_socket(one, server_side=True)
            one.sendall(self.name + b"\n")
            while data := one.recv(65536):
                one.sendall(data)
            if isinstance(one, ssl.SSLSocket):
                one.unwrap()
            else:
                one.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        finally:
            with self._lock:
                self._open.discard(raw)
            one.close()

    def close(self) -> None:
        """Ends it and its connections."""
        with self._lock:
            self._ending = True
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def echo(
    name: bytes = b"echo",
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    path: Path | None = None,
    context: ssl.SSLContext | None = None,
) -> Iterator[Echo]:
    """A service on a free port, or on a path; with a context it speaks TLS."""
    if path is not None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
    else:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    listener.listen(64)
    service = Echo(name, listener, context)
    try:
        yield service
    finally:
        service.close()


def read_all(one: socket.socket) -> bytes:
    """Everything until the end."""
    data = b""
    while chunk := one.recv(65536):
        data += chunk
    return data


def say(one: socket.socket, data: bytes) -> bytes:
    """Sends, ends our direction, and gives everything that comes (plain sockets)."""
    one.sendall(data)
    one.shutdown(socket.SHUT_WR)
    return read_all(one)
