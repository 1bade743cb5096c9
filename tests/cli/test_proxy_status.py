"""The tables of ``sapper proxy status``, from what a proxy says; and whom it asks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from rich.console import Console

from sapper.cli._output import fail, plain
from sapper.cli._serve import _connections, _summary, ask
from sapper.errors import PolicyDenied, RemoteProtocolError
from sapper.metrics import MetricsServer
from sapper.tls import Proxy
from sapper.tunnel import ServerOptions, TunnelServer


def proxy(**values: Any) -> dict[str, Any]:
    counts = {"open": 1, "accepted": 2, "resumed": 0, "handshaking": 0, "to_upstream": 3, "to_client": 4}
    tables = {"ended": {}, "upstream_failures": {}, "handshakes": {"TLSv1.3": 1}}
    times = {"handshake_p50": 0.001, "handshake_p99": 0.002}
    return {"state": "running", "listen": ["127.0.0.1:8443"], **counts, **tables, **times, **values}


def connection(**values: Any) -> dict[str, Any]:
    counts = {"age": 1.0, "to_upstream": 1, "to_client": 2}
    names = {
        "client": "127.0.0.1:1",
        "client_cn": None,
        "server_name": None,
        "upstream": None,
        "version": None,
    }
    return {**names, **counts, **values}


def drawn(what: Any) -> str:
    console = Console(highlight=False, emoji=False, width=200)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_addresses_are_no_markup() -> None:
    shown = drawn(_summary(proxy(listen=["[fd77::1]:18443"], upstream_failures={"[fd77::2]:80": 3})))
    assert "[fd77::1]:18443" in shown
    assert "[fd77::2]:80 3" in shown
    shown = drawn(_connections([connection(client="[fd77::3]:1", upstream="[fd77::2]:80")]))
    assert "[fd77::3]:1" in shown
    assert "[fd77::2]:80" in shown


def test_names_that_a_client_chose_are_no_markup() -> None:
    names = {"client_cn": "[/bold]x", "server_name": "[red]"}
    shown = drawn(_connections([connection(**names)]))
    assert "127.0.0.1:1 ([/bold]x)" in shown
    assert "[red]" in shown


def test_what_a_client_chose_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    assert drawn(_connections([connection(client_cn="a\x1b[2Jb")])).count("a\\x1b[2Jb") == 1
    rows = drawn(_connections([connection(client="/run/x\n127.0.0.1:1 forged \u202e")]))
    assert len(rows.splitlines()) == len(drawn(_connections([connection(client="/run/x")])).splitlines())
    assert "/run/x\\n127.0.0.1:1 forged \\u202e" in rows
    assert plain("a\udcffb").plain == "a\\udcffb"
    fail(PolicyDenied("no rule fits \x1b[2J[fd77::1]"), as_json=False)
    assert "no rule fits \\x1b[2J[fd77::1]" in capsys.readouterr().err


async def test_another_one_of_ours_is_told_apart() -> None:
    proxy = Proxy(listen="127.0.0.1:0", to="127.0.0.1:1")
    server = TunnelServer(options=ServerOptions(host="127.0.0.1"))
    async with MetricsServer("127.0.0.1:0", tunnels={"tunnel": server}) as tunnels:
        with pytest.raises(RemoteProtocolError, match=r"no proxy answers at .*: a tunnel does"):
            await asyncio.to_thread(ask, tunnels.address, "proxy", "proxies")
        said = await asyncio.to_thread(ask, tunnels.address, "tunnel", "tunnels", "tunnel_clients")
        assert list(said["tunnels"]) == ["tunnel"]
    async with MetricsServer("127.0.0.1:0", proxies={"web": proxy}) as proxies:
        with pytest.raises(RemoteProtocolError, match=r"no tunnel answers at .*: a proxy does"):
            await asyncio.to_thread(ask, proxies.address, "tunnel", "tunnels", "tunnel_clients")
        assert list((await asyncio.to_thread(ask, proxies.address, "proxy", "proxies"))["proxies"]) == ["web"]
    async with MetricsServer("127.0.0.1:0") as nothing:
        with pytest.raises(RemoteProtocolError, match="no proxy answers"):
            await asyncio.to_thread(ask, nothing.address, "proxy", "proxies")
        # A client that has no tunnels as things are.
        await asyncio.to_thread(ask, nothing.address, "tunnel", "tunnels", "tunnel_clients")
