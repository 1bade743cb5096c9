"""SIGTERM to a tunnel's command: what visitors had sent before reaches a service that is slow to take it."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from support import programs
from support.programs import event

SAPPER = [sys.executable, "-m", "sapper.cli"]
LATEST = 20.0
PIECE = 65_536
# Frames that are not acknowledged yet are less.
ENOUGH = 10_000


def started(*arguments: str, **environment: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return programs.started(*SAPPER, *arguments, "--json", stderr=None, **environment)


def rest(one: socket.socket) -> bytes:
    parts = []
    while part := one.recv(PIECE):
        parts.append(part)
    return b"".join(parts)


def status(place: str) -> dict[str, int]:
    with urllib.request.urlopen(f"http://{place}/status", timeout=LATEST) as answer:
        found: dict[str, int] = json.load(answer)["tunnel_clients"]["tunnel"]
    return found


def said_more_than_is_taken(visitor: socket.socket, place: str) -> bytes:
    """What a visitor said until the client had some of it that the service did not take, and its end."""
    chance, sent = random.Random(14), b""
    while status(place)["held"] < ENOUGH:
        sent += chance.randbytes(PIECE)
        visitor.sendall(sent[-PIECE:])
        latest = time.monotonic() + LATEST
        while status(place)["received"] < len(sent):
            assert time.monotonic() < latest
    visitor.shutdown(socket.SHUT_WR)
    return sent


@contextmanager
def echo() -> Iterator[int]:
    """A service that says what it hears; its port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                while data := self.request.recv(PIECE):
                    self.request.sendall(data)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as service:
        thread = threading.Thread(target=service.serve_forever)
        thread.start()
        try:
            yield service.server_address[1]
        finally:
            service.shutdown()
            thread.join()


@pytest.mark.parametrize("ends", ["serve", "expose"])
def test_sigterm_with_a_service_that_is_slow(ends: str, tmp_path: Path) -> None:
    where = ("--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path))
    drain = "0.5" if ends == "serve" else "20"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        listener.settimeout(LATEST)
        local = str(listener.getsockname()[1])
        with started("tunnel", "serve", *where, "--drain", drain) as server:
            port = event(server.stdout, "main-server-start")["port"]
            to = ("--to", f"127.0.0.1:{port}", "--metrics", "127.0.0.1:0", "--drain", "20")
            token = (tmp_path / "tunnel-token").read_text().strip()
            with started("expose", local, *to, SAPPER_TUNNEL_TOKEN=token) as client:
                (place,) = event(client.stdout, "metrics")["addresses"]
                public = event(client.stdout, "authentication-acknowledged")["assigned_port"]
                with socket.create_connection(("127.0.0.1", public), LATEST) as visitor:
                    service, _ = listener.accept()
                    with service:
                        service.settimeout(LATEST)
                        sent = said_more_than_is_taken(visitor, place)
                        if ends == "serve":
                            # Its drain is over, and then the client is told to end as well.
                            server.send_signal(signal.SIGTERM)
                            assert server.wait(LATEST) == 0
                            event(client.stdout, "tunnel-disconnected")
                            with pytest.raises(ConnectionResetError):
                                visitor.recv(1)
                        client.send_signal(signal.SIGTERM)
                        assert rest(service) == sent
                        if ends == "expose":
                            service.sendall(b"an answer")
                            service.shutdown(socket.SHUT_WR)
                            assert rest(visitor) == b"an answer"
                    assert client.wait(LATEST) == 0


def is_sent_away(port: int) -> None:
    """Whoever comes to this public port now: its server or its client drains."""
    latest = time.monotonic() + LATEST
    while time.monotonic() < latest:
        try:
            with socket.create_connection(("127.0.0.1", port), LATEST) as one:
                one.sendall(b"x")
                if not one.recv(1):
                    return
        except ConnectionError:
            return
    raise AssertionError("a visitor comes in")


@pytest.mark.parametrize("ends", ["serve", "expose"])
def test_a_second_sigterm(ends: str, tmp_path: Path) -> None:
    where = ("--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path))
    with echo() as local, started("tunnel", "serve", *where, "--drain", "3600") as server:
        to = f"127.0.0.1:{event(server.stdout, 'main-server-start')['port']}"
        token = (tmp_path / "tunnel-token").read_text().strip()
        arguments = ("expose", str(local), "--to", to, "--drain", "3600")
        with started(*arguments, SAPPER_TUNNEL_TOKEN=token) as client:
            public = event(client.stdout, "authentication-acknowledged")["assigned_port"]
            with socket.create_connection(("127.0.0.1", public), LATEST) as visitor:
                visitor.sendall(b"x")
                assert visitor.recv(1) == b"x"
                ended = server if ends == "serve" else client
                ended.send_signal(signal.SIGTERM)
                is_sent_away(public)
                ended.send_signal(signal.SIGTERM)
                assert ended.wait(LATEST) == 130
                with pytest.raises(ConnectionResetError):
                    visitor.recv(1)
