"""``sapper tunnel serve`` and ``sapper expose``: one command on each side exposes a web server."""

from __future__ import annotations

import functools
import http.server
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest

from sapper.cli._tunnel import Told, _matrix
from sapper.cli.tunnel import _lease_file
from sapper.testing import throwaway_certificates
from sapper.tunnel import events
from support import programs
from support.programs import event, free_port

SAPPER = [sys.executable, "-m", "sapper.cli"]


def started(*arguments: str, **environment: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return programs.started(*SAPPER, *arguments, stderr=subprocess.PIPE, **environment)


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
    serve = ("tunnel", "serve", "--port", str(free_port()), "--state", str(state), "--json")
    with started(*serve, "--host", "127.0.0.1") as server:
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
    leases = json.loads((state / f"tunnel-leases-127.0.0.1-{port}.json").read_text())["leases"]
    assert [one["port"] for one in leases] == [public]
    assert token not in json.dumps(leases)


def test_several_services_with_the_ports_that_they_ask_for(web: int, tmp_path: Path) -> None:
    path = tmp_path / "web"
    serve = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path), "--json")
    with started(*serve, "--ask-ports", "20000-29999", "--ask-host", "127.0.0.2") as server:
        port = event(server.stdout, "main-server-start")["port"]
        token = (tmp_path / "tunnel-token").read_text().strip()
        services = (str(web), f"page=127.0.0.1:{web}@20000-29999", f"unix:{path}@127.0.0.2:20000-29999")
        expose = ("expose", *services, "--to", f"127.0.0.1:{port}", "--bytes-per-second", "1000000", "--json")
        with started(*expose, SAPPER_TUNNEL_TOKEN=token) as client:
            said = event(client.stdout, "authentication-acknowledged")["services"]
            assert [one["name"] for one in said] == ["", "page", f"unix:{path}"]
            assert all(20_000 <= one["port"] <= 29_999 for one in said[1:])
            for one in said[:2]:
                with urllib.request.urlopen(f"http://127.0.0.1:{one['port']}/page", timeout=20) as page:
                    assert page.read() == b"seen through a tunnel"
            # It is there, and nothing is behind it: the reset may come before we look.
            with suppress(ConnectionResetError), socket.create_connection(("127.0.0.2", said[2]["port"]), 20):
                pass
            client.send_signal(signal.SIGINT)
            assert client.wait(20) == 0
        refused = ("expose", f"{web}@80", "--to", f"127.0.0.1:{port}")
        with started(*refused, SAPPER_TUNNEL_TOKEN=token) as client:
            assert client.wait(20) == 10
            assert client.stderr is not None
            assert "port 80 is not one that this server gives" in client.stderr.read()


def test_the_first_start_prints_the_client_s_command(tmp_path: Path) -> None:
    with started("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path)) as server:
        assert server.stderr is not None
        said = [server.stderr.readline(), server.stderr.readline()]
        token = (tmp_path / "tunnel-token").read_text().strip()
        assert f"SAPPER_TUNNEL_TOKEN={token} sapper expose 3000 --to HOST:" in said[1].replace("'", "")


def test_a_running_server_says_how_it_is(web: int, tmp_path: Path) -> None:
    place = f"unix:{tmp_path / 'figures'}"
    serve = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path / "state"))
    with started(*serve, "--metrics", place, "--metrics", "127.0.0.1:0", "--json") as server:
        at_unix, at_tcp = event(server.stdout, "metrics")["addresses"]
        port = event(server.stdout, "main-server-start")["port"]
        assert at_unix == place
        assert "0 clients, 0 visitors" in _status(at_tcp)
        token = (tmp_path / "state" / "tunnel-token").read_text().strip()
        expose = ("expose", str(web), "--to", f"127.0.0.1:{port}", "--json")
        with started(*expose, SAPPER_TUNNEL_TOKEN=token) as client:
            public = event(client.stdout, "authentication-acknowledged")["assigned_port"]
            with urllib.request.urlopen(f"http://127.0.0.1:{public}/page", timeout=20) as page:
                assert page.read() == b"seen through a tunnel"
            # The visit is over for the visitor before the server has counted it.
            said = _until(at_unix, lambda clients: [one["opened"] for one in clients] == [1])
            (tunnel,) = said["tunnels"]["tunnel"]["clients"]
            assert (tunnel["port"], tunnel["connected"], tunnel["opened"]) == (public, True, 1)
            assert token not in json.dumps(said)
            shown = _status(at_tcp)
            assert str(public) in shown
            assert tunnel["client_address"].partition(":")[0] in shown
            with urllib.request.urlopen(f"http://{at_tcp}/metrics", timeout=20) as answer:
                figures = answer.read().decode()
            assert 'sapper_tunnel_clients{server="tunnel"} 1\n' in figures
            assert f'sapper_tunnel_visits_total{{server="tunnel",port="{public}"}} 1\n' in figures
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    assert not (tmp_path / "figures").exists()


def test_a_running_client_says_how_it_is(web: int, tmp_path: Path) -> None:
    serve = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path / "state"))
    with started(*serve, "--json") as server:
        port = event(server.stdout, "main-server-start")["port"]
        token = (tmp_path / "state" / "tunnel-token").read_text().strip()
        expose = ("expose", str(web), "--to", f"127.0.0.1:{port}", "--json", "--metrics", "127.0.0.1:0")
        with started(*expose, SAPPER_TUNNEL_TOKEN=token) as client:
            (place,) = event(client.stdout, "metrics")["addresses"]
            public = event(client.stdout, "authentication-acknowledged")["assigned_port"]
            with socket.create_connection(("127.0.0.1", public), 20) as visitor:
                connected = event(client.stdout, "service-connected")
                here = ":".join(map(str, visitor.getsockname()))
                assert connected["service"]["visitor_address"] == here
                said = json.loads(_status(place, "--json"))["tunnel_clients"]["tunnel"]
                assert (said["server"], said["port"], said["streams"]) == (f"127.0.0.1:{port}", public, 1)
                assert [one["visitor_address"] for one in said["visitors"]] == [here]
                shown = _status(place)
                assert here in shown
                assert f"client tunnel of 127.0.0.1:{port}" in shown
                with urllib.request.urlopen(f"http://{place}/metrics", timeout=20) as answer:
                    figures = answer.read().decode()
                assert 'sapper_tunnel_client_exposed{client="tunnel"} 1\n' in figures
                assert 'sapper_tunnel_client_visitors{client="tunnel"} 1\n' in figures
                assert token not in figures + shown + json.dumps(said)


def test_a_status_tells_services_apart(web: int, tmp_path: Path) -> None:
    place = f"unix:{tmp_path / 'figures'}"
    serve = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path / "state"))
    with started(*serve, "--metrics", place, "--json") as server:
        port = event(server.stdout, "main-server-start")["port"]
        token = (tmp_path / "state" / "tunnel-token").read_text().strip()
        config = tmp_path / "expose.toml"
        config.write_text(
            f'[expose]\nserver = "127.0.0.1:{port}"\n'
            f'services = [{web}, {{ port = {web}, name = "second" }}]\n'
        )
        expose = ("expose", "--config", str(config), "--json", "--metrics", "127.0.0.1:0")
        with started(*expose, SAPPER_TUNNEL_TOKEN=token) as client:
            (at_client,) = event(client.stdout, "metrics")["addresses"]
            told = event(client.stdout, "authentication-acknowledged")["services"]
            public = {one["name"]: one["port"] for one in told}
            with socket.create_connection(("127.0.0.1", public["second"]), 20) as visitor:
                assert event(client.stdout, "service-connected")["service"]["service"] == "second"
                here = ":".join(map(str, visitor.getsockname()))
                for said in (
                    json.loads(_status(place, "--json"))["tunnels"]["tunnel"]["clients"][0],
                    json.loads(_status(at_client, "--json"))["tunnel_clients"]["tunnel"],
                ):
                    assert [one["visitors"] for one in said["services"]] == [0, 1]
                    (one,) = said["visitors"]
                    assert (one["service"], one["visitor_address"]) == ("second", here)
                for shown in (_status(place), _status(at_client)):
                    assert any(
                        line.startswith(f"{public['second']} ") and here in line
                        for line in shown.splitlines()
                    )
                with urllib.request.urlopen(f"http://{at_client}/metrics", timeout=20) as answer:
                    figures = answer.read().decode()
                labels = 'client="tunnel",service="second"'
                assert f"sapper_tunnel_client_service_visitors{{{labels}}} 1\n" in figures


def test_a_status_goes_on_until_it_is_stopped(tmp_path: Path) -> None:
    place = f"unix:{tmp_path / 'figures'}"
    serve = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path / "state"))
    with started(*serve, "--metrics", place, "--json") as server:
        event(server.stdout, "main-server-start")
        with started("tunnel", "status", place, "--json", "--watch", "--interval", "0.1") as watching:
            assert watching.stdout is not None
            lines = [json.loads(watching.stdout.readline()) for _ in range(3)]
            assert [one["tunnels"]["tunnel"]["clients"] for one in lines] == [[], [], []]
            watching.send_signal(signal.SIGINT)
            assert watching.wait(20) == 0


def test_the_public_address_is_where_visitors_come_in(web: int, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.2", 0)) as probe:
        asked = probe.getsockname()[1]
    where = ("--port", "0", "--host", "127.0.0.1", "--visitor-host", "127.0.0.3", "--ask-host", "127.0.0.2")
    ports = ("--ask-ports", str(asked), "--state", str(tmp_path / "state"))
    with started("tunnel", "serve", *where, *ports, "--json") as server:
        port = event(server.stdout, "main-server-start")["port"]
        token = (tmp_path / "state" / "tunnel-token").read_text().strip()
        expose = ("expose", f"web={web}@127.0.0.2:{asked}", str(web), "--to", f"localhost:{port}")
        with started(*expose, SAPPER_TUNNEL_TOKEN=token) as client:
            assert client.stderr is not None
            assert client.stderr.readline() == f"web: exposed at http://127.0.0.2:{asked}\n"
            url = client.stderr.readline().rpartition(" ")[2].strip()
            assert url.startswith("http://127.0.0.3:")
            with urllib.request.urlopen(url, timeout=20) as page:
                assert page.status == 200
        with started(*expose, "--json", SAPPER_TUNNEL_TOKEN=token) as client:
            told = event(client.stdout, "authentication-acknowledged")
            assert told["url"] == f"http://127.0.0.2:{asked}"
            assert [one["host"] for one in told["services"]] == ["127.0.0.2", "127.0.0.3"]


def test_the_public_address_is_told_for_programs_and_for_telephones(web: int, tmp_path: Path) -> None:
    serve = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path / "state"))
    with started(*serve, "--json") as server:
        port = event(server.stdout, "main-server-start")["port"]
        token = (tmp_path / "state" / "tunnel-token").read_text().strip()
        expose = ("expose", str(web), "--to", f"127.0.0.1:{port}")
        with started(*expose, "--json", "--scheme", "tcp", SAPPER_TUNNEL_TOKEN=token) as client:
            told = event(client.stdout, "authentication-acknowledged")
            assert not told["secure"]
            assert told["url"] == f"tcp://127.0.0.1:{told['assigned_port']}"
            size = len(told["qr"])
            assert size >= 21
            assert all(len(row) == size and set(row) <= {"0", "1"} for row in told["qr"])
            finder = ["1111111", "1000001", "1011101", "1011101", "1011101", "1000001", "1111111"]
            assert [row[:7] for row in told["qr"][:7]] == finder
            assert [row[-7:] for row in told["qr"][:7]] == finder
        with started(*expose, "--qr", SAPPER_TUNNEL_TOKEN=token) as client:
            assert client.stderr is not None
            assert client.stderr.readline().startswith("exposed at http://127.0.0.1:")
            drawn = [client.stderr.readline().rstrip("\n") for _ in range(size // 2 + 4)]
            assert {len(line) for line in drawn} == {size + 8}
            assert set("".join(drawn)) == set("█▀▄ ")
            assert drawn[0] == drawn[1] == "█" * (size + 8), "a light border"


def test_the_public_address_is_https_where_visitors_speak_tls(web: int, tmp_path: Path) -> None:
    made = throwaway_certificates("localhost")
    chain, key, state = tmp_path / "chain.pem", tmp_path / "key.pem", tmp_path / "state"
    for path, text in zip((chain, key), made.server, strict=True):
        path.write_bytes(text)
    serve = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(state), "--json")
    with started(*serve, "--visitor-cert", str(chain), "--visitor-key", str(key)) as server:
        port = event(server.stdout, "main-server-start")["port"]
        token = (state / "tunnel-token").read_text().strip()
        expose = ("expose", str(web), "--to", f"localhost:{port}")
        with started(*expose, "--json", SAPPER_TUNNEL_TOKEN=token) as client:
            told = event(client.stdout, "authentication-acknowledged")
            assert told["secure"]
            assert told["url"] == f"https://localhost:{told['assigned_port']}"
            assert told["qr"] == _matrix(told["url"])
            trust = ssl.create_default_context(cadata=made.authority.decode())
            with urllib.request.urlopen(told["url"] + "/page", timeout=20, context=trust) as page:
                assert page.read() == b"seen through a tunnel"
        with started(*expose, "--scheme", "wss", "--no-qr", SAPPER_TUNNEL_TOKEN=token) as client:
            assert client.stderr is not None
            assert client.stderr.readline().startswith("exposed at wss://localhost:")


def _is_sent_away(port: int) -> bool:
    """Whether a visitor hears nothing but the end."""
    try:
        with socket.create_connection(("127.0.0.1", port), 20) as visitor:
            visitor.sendall(b"GET /page HTTP/1.0\r\n\r\n")
            return visitor.recv(1) == b""
    except ConnectionError:
        return True


def test_both_ends_by_their_files(web: int, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("knock-knock")
    config = tmp_path / "tunnel.toml"

    def write(server: str, client: str = "") -> None:
        beside = tmp_path / "new.toml"
        beside.write_text(
            f"""
[tunnel]
port = 0
host = "127.0.0.1"
token_file = "token"
{server}
[expose]
server = "127.0.0.1:{port}"
token_file = "token"
{client}
"""
        )
        beside.replace(config)

    port = 1
    write("", f"service = {web}")
    with started("tunnel", "serve", "--config", str(config), "--json") as server:
        port = event(server.stdout, "main-server-start")["port"]
        write("", f"service = {web}")
        assert event(server.stdout, "reload")["error"] is None, "a change of the file is enough"
        with started("expose", "--config", str(config), "--json") as client:
            public = event(client.stdout, "authentication-acknowledged")["assigned_port"]
            with socket.create_connection(("127.0.0.1", public), 20) as visitor:
                write('deny_visitors = ["127.0.0.0/8"]', f"service = {web}")
                assert event(server.stdout, "reload")["error"] is None
                assert event(client.stdout, "reload")["error"] is None
                assert _is_sent_away(public)
                write("denyvisitors = []", f"service = {web}")
                told = event(server.stdout, "reload")["error"]
                assert told["field"] == "--config"
                assert "denyvisitors" in told["message"]
                visitor.sendall(b"GET /page HTTP/1.0\r\n\r\n")
                with visitor.makefile("rb") as answer:
                    assert answer.read().endswith(b"seen through a tunnel"), "its stream is still there"
                write("", f"service = {web}")
                server.send_signal(signal.SIGHUP)
                assert event(server.stdout, "reload")["error"] is None
            with urllib.request.urlopen(f"http://127.0.0.1:{public}/page", timeout=20) as page:
                assert page.read() == b"seen through a tunnel"
            client.send_signal(signal.SIGTERM)
            assert client.wait(20) == 0
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


def test_several_tunnels_of_one_file(web: int, tmp_path: Path) -> None:
    state = tmp_path / "state"
    serve = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(state), "--json")
    with started(*serve) as server:
        port = event(server.stdout, "main-server-start")["port"]
        token = (state / "tunnel-token").read_text().strip()
        tunnels = [
            {
                "enabled": name != "c",
                "name": name,
                "localServicePort": web,
                "authenticationCredentials": {"token": token},
                "tls": {"enabled": False},
            }
            for name in "abc"
        ]
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"serverHost": "127.0.0.1", "serverPort": port, "tunnels": tunnels}))
        with started("expose", "--config", str(config), "--json") as client:
            told = [event(client.stdout, "authentication-acknowledged") for _ in range(2)]
            assert {one["tunnel"] for one in told} == {"a", "b"}
            for one in told:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{one['assigned_port']}/page", timeout=20
                ) as page:
                    assert page.read() == b"seen through a tunnel"
            client.send_signal(signal.SIGTERM)
            assert client.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("expose",), "say what to expose"),
        (("expose", "3000", "--to", "nowhere"), "--to"),
        (("expose", "nothing", "--to", "h:1"), "SERVICE"),
        (("expose", "3000", "--to", "h:1", "--ca", "/nowhere.pem"), "--ca"),
        (("expose", "3000", "--to", "h:1", "--token-file", "/nowhere"), "--token-file"),
        (("expose", "--config", "/nowhere.toml"), "--config"),
        (("tunnel", "serve", "--config", "/nowhere.toml"), "--config"),
        (("tunnel", "serve", "--public-ports", "9-1"), "--public-ports"),
        (("tunnel", "serve", "--visitor-burst", "3"), "--visitor-burst"),
    ],
)
def test_a_mistake_is_told_in_the_words_of_the_command_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    command = [*SAPPER, *arguments, *(("--state", str(tmp_path)) if arguments[0] == "tunnel" else ())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr


def test_nobody_answers_a_status(tmp_path: Path) -> None:
    done = _asked(f"unix:{tmp_path / 'nobody'}")
    assert done.returncode != 0
    assert "no tunnel answers" in done.stderr


def _until(place: str, holds: Callable[[list[dict[str, Any]]], bool]) -> dict[str, Any]:
    """The first status whose clients are as they should be."""
    latest = time.monotonic() + 20
    while True:
        said: dict[str, Any] = json.loads(_status(place, "--json"))
        if holds(said["tunnels"]["tunnel"]["clients"]):
            return said
        assert time.monotonic() < latest, said


def _asked(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*SAPPER, "tunnel", "status", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _status(*arguments: str) -> str:
    done = _asked(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_who_says_no_token_hears_of_that(tmp_path: Path) -> None:
    serve = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path), "--json")
    with started(*serve) as server:
        port = event(server.stdout, "main-server-start")["port"]
        with started("expose", "9", "--to", f"127.0.0.1:{port}", SAPPER_TUNNEL_TOKEN="") as client:
            _, said = client.communicate(timeout=20)
            assert client.returncode == 9
            assert "it was told no token" in said
            assert "SAPPER_TUNNEL_TOKEN=…, --token-file" in said.replace("\n", " ")
            assert "certificate" not in said


def test_another_token_is_refused(tmp_path: Path) -> None:
    with started(
        "tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path), "--json"
    ) as server:
        port = event(server.stdout, "main-server-start")["port"]
        with started("expose", "9", "--to", f"127.0.0.1:{port}", SAPPER_TUNNEL_TOKEN="wrong") as client:
            assert client.wait(20) == 9
            assert client.stderr is not None
            said = client.stderr.read()
            assert "rejected" in said
            assert "no token" not in said


def test_people_hear_of_errors_too(web: int, tmp_path: Path) -> None:
    state = tmp_path / "state"
    serve = ("tunnel", "serve", "--port", str(free_port()), "--host", "127.0.0.1", "--state", str(state))
    with started(*serve) as server:
        assert server.stderr is not None
        said = "".join(server.stderr.readline() for _ in range(3))
        port = said.rpartition("listening at port ")[2].strip()
        token = (state / "tunnel-token").read_text().strip()
        # Leases cannot be written any more.
        (state / f"tunnel-leases-127.0.0.1-{port}.json.new").mkdir()
        with started(
            "expose", str(web), "--to", f"127.0.0.1:{port}", "--json", SAPPER_TUNNEL_TOKEN=token
        ) as client:
            event(client.stdout, "authentication-acknowledged")
            told = next(line for line in server.stderr if "error" in line)
            assert "error: lease_file: " in told


def test_services_without_names_are_told_alike(web: int, tmp_path: Path) -> None:
    serve = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path), "--json")
    with started(*serve) as server:
        port = event(server.stdout, "main-server-start")["port"]
        token = (tmp_path / "tunnel-token").read_text().strip()
        expose = ("expose", str(web), f"localhost:{web}", "--to", f"127.0.0.1:{port}", "--no-qr")
        with started(*expose, SAPPER_TUNNEL_TOKEN=token) as client:
            assert client.stderr is not None
            said = [client.stderr.readline().partition(": exposed at http://127.0.0.1:")[0] for _ in range(2)]
            assert said == [str(web), f"localhost:{web}"]


def test_a_default_in_a_file_is_as_if_it_were_not_there(web: int, tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text('[tunnel]\nport = 0\nhost = "127.0.0.1"\ndanger_allow_anonymous = false\n')
    serve = ("tunnel", "serve", "--config", str(config), "--state", str(tmp_path / "state"))
    with started(*serve) as server:
        assert server.stderr is not None
        said = [server.stderr.readline(), server.stderr.readline()]
        token = (tmp_path / "state" / "tunnel-token").read_text().strip()
        assert token in said[1]
        port = said[1].rpartition(":")[2].strip()
        expose = ("expose", str(web), "--to", f"127.0.0.1:{port}", "--json")
        with started(*expose, SAPPER_TUNNEL_TOKEN=token) as client:
            assert event(client.stdout, "authentication-acknowledged")["assigned_port"]


def test_a_connection_that_ends_in_order_is_told_before_the_next_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = Told(as_json=False, qr=False)
    way = events.ClientConnection("host", 9000, False)
    for had_error in (False, True):
        told.event(events.TunnelDisconnected(way, had_error))
        told.event(events.TunnelReconnectQueued(1.0))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "the other end closed the connection; connecting again in 1.0 s"
    assert second == "connecting again in 1.0 s", "its error was told"


def test_two_servers_of_one_user_keep_their_own_leases(web: int, tmp_path: Path) -> None:
    serve = ("tunnel", "serve", "--host", "127.0.0.1", "--state", str(tmp_path), "--json")

    def exposed(port: int, *more: str) -> int:
        token = (tmp_path / "tunnel-token").read_text().strip()
        expose = ("expose", *(more or (str(web),)), "--to", f"127.0.0.1:{port}", "--json")
        with started(*expose, SAPPER_TUNNEL_TOKEN=token) as client:
            said = event(client.stdout, "authentication-acknowledged")
            client.send_signal(signal.SIGINT)
            assert client.wait(20) == 0
        return int(said["assigned_port"])

    ports = [free_port(), free_port()]
    first, second = (("--port", str(port)) for port in ports)
    with started(*serve, *first) as one, started(*serve, *second) as other:
        for each in (one, other):
            event(each.stdout, "main-server-start")
        before = [exposed(port, f"web{port}={web}") for port in ports]
        for port in ports:  # the change is on the disk before the servers are killed
            _kept(tmp_path / f"tunnel-leases-127.0.0.1-{port}.json")
    with started(*serve, *first) as one, started(*serve, *second) as other:
        for each in (one, other):
            event(each.stdout, "main-server-start")
        assert [exposed(port, f"web{port}={web}") for port in ports] == before


def _kept(path: Path) -> None:
    latest = time.monotonic() + 20
    while not json.loads(path.read_text())["leases"]:
        assert time.monotonic() < latest
        time.sleep(0.02)


def test_leases_of_an_earlier_version_are_taken_over(tmp_path: Path) -> None:
    lease = {"port": 12345, "token": "01" * 32, "client": None, "service": 0, "seen": int(time.time())}
    earlier = tmp_path / "tunnel-leases.json"
    earlier.write_text(json.dumps({"version": 1, "leases": [lease]}))
    port = free_port()
    serve = ("tunnel", "serve", "--host", "127.0.0.1", "--state", str(tmp_path), "--json")
    with started(*serve, "--port", str(port)) as server:
        event(server.stdout, "main-server-start")
        now = json.loads((tmp_path / f"tunnel-leases-127.0.0.1-{port}.json").read_text())
        assert now["version"] == 2
        assert [one["port"] for one in now["leases"]] == [12345]
        assert now["leases"][0]["token"] != lease["token"], "its tokens have a key now"
        assert not earlier.exists()


def test_a_file_of_leases_is_one_server_s(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text('[tunnel]\nport = 0\nhost = "127.0.0.1"\nlease_file = "leases"\n')
    serve = ("tunnel", "serve", "--config", str(config), "--state", str(tmp_path / "state"), "--json")
    with started(*serve) as server:
        event(server.stdout, "main-server-start")
        second = subprocess.run([*SAPPER, *serve], capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 2
        assert "lease_file" in second.stderr
        assert "another server's" in second.stderr


def test_a_server_whose_port_is_another_each_time_leaves_no_file_of_leases(tmp_path: Path) -> None:
    serve = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path), "--json")
    with started(*serve) as server:
        event(server.stdout, "main-server-start")
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tunnel-token"]


def test_two_servers_with_the_same_port_at_different_addresses(tmp_path: Path) -> None:
    serve = ("tunnel", "serve", "--port", str(free_port()), "--state", str(tmp_path), "--json")
    with started(*serve, "--host", "127.0.0.1") as one, started(*serve, "--host", "127.0.0.2") as other:
        for each in (one, other):
            event(each.stdout, "main-server-start")


@pytest.mark.parametrize(
    ("host", "name"), [(None, "tunnel-leases-9.json"), ("::1", "tunnel-leases-::1-9.json")]
)
def test_the_usual_file_of_leases(host: str | None, name: str, tmp_path: Path) -> None:
    assert _lease_file(tmp_path, host, 9) == tmp_path / name
    assert _lease_file(tmp_path, host, 0) is None
