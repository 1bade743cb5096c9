"""``sapper tunnel serve`` and ``sapper expose``: one command on each side exposes a web server."""

from __future__ import annotations

import functools
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

SAPPER = [sys.executable, "-m", "sapper.cli"]


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*SAPPER, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def event(stream: IO[str] | None, name: str) -> dict[str, Any]:
    """The next event of that name."""
    assert stream is not None
    for line in stream:
        values: dict[str, Any] = json.loads(line)
        if values["event"] == name:
            return values
    raise AssertionError(f"it ended without {name}")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[int]:
    """A web server on a free port of this machine."""
    (tmp_path / "page").write_text("seen through a tunnel")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_one_command_on_each_side(web: int, tmp_path: Path) -> None:
    state = tmp_path / "state"
    serve = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(state), "--json")
    with started(*serve) as server:
        port = event(server.stdout, "main-server-start")["port"]
        token = (state / "tunnel-token").read_text().strip()
        assert (state / "tunnel-token").stat().st_mode & 0o077 == 0
        expose = ("expose", str(web), "--to", f"127.0.0.1:{port}", "--json")
        with started(*expose, SAPPER_TUNNEL_TOKEN=token) as client:
            public = event(client.stdout, "authentication-acknowledged")["assigned_port"]
            with urllib.request.urlopen(f"http://127.0.0.1:{public}/page", timeout=20) as page:
                assert page.read() == b"seen through a tunnel"
            created = event(server.stdout, "tunnel-created")
            assert token not in json.dumps(created)
            client.send_signal(signal.SIGINT)
            assert client.wait(20) == 0
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    leases = json.loads((state / "tunnel-leases.json").read_text())["leases"]
    assert [one["port"] for one in leases] == [public]
    assert token not in json.dumps(leases)


def test_the_first_start_prints_the_client_s_command(tmp_path: Path) -> None:
    with started("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path)) as server:
        assert server.stderr is not None
        said = [server.stderr.readline(), server.stderr.readline()]
        token = (tmp_path / "tunnel-token").read_text().strip()
        assert f"SAPPER_TUNNEL_TOKEN={token} sapper expose 3000 --to HOST:" in said[1].replace("'", "")


def test_another_token_is_refused(tmp_path: Path) -> None:
    with started(
        "tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path), "--json"
    ) as server:
        port = event(server.stdout, "main-server-start")["port"]
        with started("expose", "9", "--to", f"127.0.0.1:{port}", SAPPER_TUNNEL_TOKEN="wrong") as client:
            assert client.wait(20) == 9
            assert client.stderr is not None
            assert "rejected" in client.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("expose", "3000", "--to", "nowhere"), "to"),
        (("expose", "x", "--to", "host:1"), "SERVICE"),
        (("tunnel", "serve", "--public-ports", "9-1"), "public"),
        (("tunnel", "serve", "--cert", "x"), "cert"),
        (("tunnel", "serve", "--port", "0", "--allow", "10.0.0.0/33"), "--allow"),
        (("tunnel", "serve", "--port", "0", "--deny", "nobody"), "--deny"),
        (("tunnel", "serve", "--visitor-burst", "5"), "visitor-burst"),
        (("tunnel", "serve", "--visitor-rate", "0"), "visitor_rate"),
        (("expose", "1", "--to", "host:1", "--send-proxy", "v3"), "--send-proxy"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], field: str, tmp_path: Path) -> None:
    more = ("--state", str(tmp_path)) if arguments[0] == "tunnel" else ()
    done = subprocess.run(
        [*SAPPER, *arguments, *more], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert field in done.stderr
