"""Shows what ``sapper tunnel status`` is told by a server or a client that runs."""

from __future__ import annotations

import contextlib
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from sapper.cli._output import amount, duration, write_json

__all__ = ["show_status"]

#: Visitors that are shown to people.
_SHOWN = 20


def show_status(address: str, *, as_json: bool, watch: float | None) -> None:
    """Asks a server or a client that runs and shows its answer; every ``watch`` seconds until Ctrl-C.

    Raises:
        ConnectError: Nobody answers there.
        RemoteProtocolError: What answers is none of ours.
    """
    from sapper.cli._serve import ask

    def said() -> dict[str, Any]:
        return ask(address, "tunnel", "tunnels")

    if watch is None:
        if as_json:
            write_json(said())
        else:
            Console(highlight=False).print(_tables(said()))
        return
    import time

    with contextlib.suppress(KeyboardInterrupt):
        if as_json:
            while True:
                write_json(said())
                time.sleep(watch)
        from rich.live import Live

        with Live(_tables(said()), console=Console(highlight=False), auto_refresh=False) as shown:
            while True:
                time.sleep(watch)
                shown.update(_tables(said()), refresh=True)


def _tables(said: dict[str, Any]) -> Group:
    parts: list[Any] = []
    for server in said["tunnels"].values():
        clients = server["clients"]
        count = sum(one["streams"] for one in clients)
        where = ", ".join(server["listen"])
        parts.append(f"server at {where}: {len(clients):,} clients, {count:,} visitors")
        if clients:
            parts.append(_clients(clients))
        parts += _services(clients) + _visitors(clients, count)
    for name, client in said["tunnel_clients"].items():
        parts.append(f"client {name} of {client['server']}")
        client["connected"] = client["port"] is not None
        parts.append(_clients([client], "server"))
        parts += _services([client], "server") + _visitors([client], client["streams"])
    return Group(*parts or ["no tunnel runs there"])


def _clients(clients: list[dict[str, Any]], other: str = "client") -> Table:
    table = Table(box=None, pad_edge=False)
    names = ("port", *(("client",) if other == "client" else ()), "there", "visitors", "visits")
    for name in (*names, f"to {other}", f"from {other}", "rates", "in memory", "round trip"):
        table.add_column(name)
    for one in clients:
        table.add_row(
            _port(one["port"]),
            *((escape(one["client_address"]),) if other == "client" else ()),
            "yes" if one["connected"] else "no",
            f"{one['streams']:,}",
            f"{one['opened']:,}",
            amount(one["sent"]),
            amount(one["received"]),
            f"{amount(one['sent_rate'])}/s, {amount(one['received_rate'])}/s",
            amount(one["held"]),
            "-" if one["rtt"] is None else duration(one["rtt"]),
        )
    return table


def _services(clients: list[dict[str, Any]], other: str = "client") -> list[Any]:
    """Those of clients that have more than one of their own."""
    services = [one for client in clients for one in client["services"]]
    if not any(one["name"] for one in services):
        return []
    table = Table(box=None, pad_edge=False)
    for name in ("port", "service", "visitors", "visits", f"to {other}", f"from {other}", "sent away", "cut"):
        table.add_column(name)
    for one in services:
        table.add_row(
            _port(one["port"]),
            escape(one["name"] or "-"),
            *(f"{one[name]:,}" for name in ("visitors", "visits")),
            amount(one["sent"]),
            amount(one["received"]),
            *(f"{one[name]:,}" for name in ("refused", "cut")),
        )
    return [table]


def _visitors(clients: list[dict[str, Any]], count: int) -> list[Any]:
    shown = [(client, one) for client in clients for one in client["visitors"]][:_SHOWN]
    if not shown:
        return []
    table = Table(box=None, pad_edge=False)
    for name in ("port", "visitor", "here for", "from visitor", "to visitor"):
        table.add_column(name)
    for client, one in shown:
        ports = {service["name"]: service["port"] for service in client["services"]}
        table.add_row(
            _port(ports.get(one["service"], client["port"])),
            escape(one["visitor_address"] or "not known"),
            duration(one["age"]),
            amount(one["from_visitor"]),
            amount(one["to_visitor"]),
        )
    more = count - len(shown)
    return [table, *([f"and {more:,} more"] if more > 0 else [])]


def _port(port: int | None) -> str:
    return str(port) if port else "-"
