"""The tables of ``sapper tunnel status``, from what a server and a client say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sapper.cli._tunnel_status import _tables
from support.programs import event, started

SAPPER = [sys.executable, "-m", "sapper.cli"]


def service(name: str, port: int) -> dict[str, Any]:
    counts = {"visitors": 1, "visits": 2, "sent": 300, "received": 4000, "refused": 3, "paused": 0, "cut": 1}
    return {"name": name, "port": port, **counts}


def client(*services: dict[str, Any]) -> dict[str, Any]:
    visitor = {
        "number": 1,
        "visitor_address": "192.0.2.7:77",
        "service": services[-1]["name"] if services else "",
        "age": 2.0,
        "from_visitor": 1,
        "to_visitor": 2,
    }
    counts = {
        "streams": 2,
        "opened": 3,
        "sent": 1,
        "received": 2,
        "sent_rate": 3,
        "received_rate": 4,
        "held": 5,
    }
    where = {"id": 1, "port": 20_001, "client_address": "192.0.2.1:5", "connected": True, "rtt": 0.001}
    return {**where, **counts, "visitors": [visitor], "services": [*services]}


def shown(said: dict[str, Any], width: int = 200) -> list[list[str]]:
    console = Console(highlight=False, width=width)
    with console.capture() as capture:
        console.print(_tables(said))
    return [line.split() for line in capture.get().splitlines()]


def test_a_server_s_clients_services_and_visitors() -> None:
    one = client(service("", 20_001), service("second", 20_002))
    lines = shown({"tunnels": {"tunnel": {"listen": ["[::]:9000"], "clients": [one]}}, "tunnel_clients": {}})
    assert " ".join(lines[0]) == "server at [::]:9000: 1 client, 2 visitors"
    assert lines[2][:3] == ["20001", "192.0.2.1:5", "yes"]
    assert ["20002", "second", "1", "2", "300", "B", "4.00", "kB", "3", "1"] in lines
    assert ["20002", "192.0.2.7:77", "2.00", "s", "1", "B", "2", "B"] in lines
    assert lines[-1] == ["and", "1", "more"]


def test_a_narrow_terminal_cuts_nothing() -> None:
    one = client(service("", 20_001), service("second", 20_002))
    long = "[2001:db8:1111:2222:3333:4444:5555:6666]:54321"
    one["client_address"] = one["visitors"][0]["visitor_address"] = long
    said = {"tunnels": {"tunnel": {"listen": ["[::]:9000"], "clients": [one]}}, "tunnel_clients": {}}
    lines = shown(said, width=80)
    assert lines[2] == ["20001", long, "yes", "1.00", "ms"]
    assert ["20002", long] in [line[:2] for line in lines]
    assert lines[4] == ["20001", "2", "3", "1", "B,", "3", "B/s", "2", "B,", "4", "B/s", "5", "B"]
    assert "…" not in str(lines)


def test_one_service_without_a_name_needs_no_table() -> None:
    said = {**client(service("", 20_001)), "server": "tunnel.example:9000"}
    lines = shown({"tunnels": {}, "tunnel_clients": {"tunnel": said}})
    assert " ".join(lines[0]) == "client tunnel of tunnel.example:9000"
    assert not any("service" in line for line in lines)


def test_a_client_without_a_port_is_not_there() -> None:
    said = {**client(), "server": "h:1", "port": None, "visitors": []}
    lines = shown({"tunnels": {}, "tunnel_clients": {"tunnel": said}})
    assert lines[2][:2] == ["-", "no"]


def test_nothing_runs() -> None:
    assert shown({"tunnels": {}, "tunnel_clients": {}}) == [["no", "tunnel", "runs", "there"]]


def test_names_and_addresses_are_no_markup() -> None:
    one = client(service("[/bold]web", 20_001))
    one["client_address"] = one["visitors"][0]["visitor_address"] = "[fd77::1]:5"
    lines = shown({"tunnels": {"t": {"listen": ["[fd77::1]:9000"], "clients": [one]}}, "tunnel_clients": {}})
    assert " ".join(lines[0]) == "server at [fd77::1]:9000: 1 client, 2 visitors"
    assert lines[2][1] == "[fd77::1]:5"
    assert any("[/bold]web" in line for line in lines)
    lines = shown({"tunnels": {}, "tunnel_clients": {"[red]": {**client(), "server": "[fd77::1]:1"}}})
    assert " ".join(lines[0]) == "client [red] of [fd77::1]:1"


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["tables", "json"])
def test_who_watches_without_a_terminal_hears_at_once_and_may_leave(
    tmp_path: Path, form: tuple[str, ...]
) -> None:
    serve = ("tunnel", "serve", "--port", "0", "--host", "127.0.0.1", "--state", str(tmp_path), "--json")
    with started(*SAPPER, *serve, "--metrics", f"unix:{tmp_path}/figures") as server:
        event(server.stdout, "main-server-start")
        watch = ("tunnel", "status", f"unix:{tmp_path}/figures", "--watch", "--interval", "0.1", *form)
        with started(*SAPPER, *watch, stderr=subprocess.PIPE) as watching:
            assert watching.stdout is not None
            assert watching.stderr is not None
            answers = [line for line in (watching.stdout.readline() for _ in range(3)) if line.strip()]
            assert len(answers) >= 2
            assert answers[0] == answers[1]
            watching.stdout.close()
            assert watching.wait(20) == 0
            assert watching.stderr.read() == ""
            watching.stderr.close()
