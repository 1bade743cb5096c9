"""Shows what ``sapper tunnel status`` is told by a server or a client that runs."""

from __future__ import annotations

import contextlib
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from sapper.cli._output import amount, duration, plain, write_json

__all__ = ["show_status"]

#: Visitors that are shown to people.
_SHOWN = 20
#: Columns that stay whole in a narrow terminal; the others take more lines there.
_WHOLE = ("port", "client", "visitor")


def show_status(address: str, *, as_json: bool, watch: float | None) -> None:
    """Asks a server or a client that runs and shows its answer; every ``watch`` seconds until Ctrl-C.

    Raises:
        ConnectError: Nobody answers there.
        RemoteProtocolError: What answers is none of ours.
    """
    from sapper.cli._serve import ask

    def said() -> dict[str, Any]:
        return ask(address, "tunnel", "tunnels", "tunnel_clients")

    console = Console(highlight=False, emoji=False)
    if watch is None:
        if as_json:
            write_json(said())
        else:
            console.print(_tables(said()))
        return
    import time

    with contextlib.suppress(KeyboardInterrupt):
        if as_json:
            while True:
                write_json(said())
                time.sleep(watch)
        if not console.is_terminal:  # a pipe or a file: nothing there can be drawn over
            while True:
                console.print(_tables(said()), "")
                time.sleep(watch)
        from rich.live import Live

        with Live(_tables(said()), console=console, auto_refresh=False) as shown:
            while True:
                time.sleep(watch)
                shown.update(_tables(said()), refresh=True)


def _tables(said: dict[str, Any]) -> Group:
    parts: list[Any] = []
    for server in said["tunnels"].values():
        clients = server["clients"]
        count = sum(one["streams"] for one in clients)
        where = ", ".join(server["listen"])
        counted = f"{_counted(len(clients), 'client')}, {_counted(count, 'visitor')}"
        parts.append(plain(f"server at {where}: {counted}"))
        if clients:
            parts += [_places(clients), _clients(clients)]
        parts += _services(clients) + _visitors(clients, count)
    for name, client in said["tunnel_clients"].items():
        parts.append(plain(f"client {name} of {client['server']}"))
        client["connected"] = client["port"] is not None
        parts.append(_clients([client], "server"))
        parts += _services([client], "server") + _visitors([client], client["streams"])
    return Group(*parts or ["no tunnel runs there"])


def _places(clients: list[dict[str, Any]]) -> Table:
    """Where a server's clients are; a table of its own, because an address may be half a terminal."""
    table = _table("port", "client", "there", "round trip")
    for one in clients:
        table.add_row(_port(one["port"]), plain(one["client_address"]), *_there(one))
    return table


def _clients(clients: list[dict[str, Any]], other: str = "client") -> Table:
    where = ("there", "round trip") if other == "server" else ()
    table = _table("port", *where, "visitors", "visits", f"to {other}", f"from {other}", "in memory")
    for one in clients:
        table.add_row(
            _port(one["port"]),
            *(_there(one) if where else ()),
            f"{one['streams']:,}",
            f"{one['opened']:,}",
            *(f"{amount(one[way])}, {amount(one[f'{way}_rate'])}/s" for way in ("sent", "received")),
            amount(one["held"]),
        )
    return table


def _services(clients: list[dict[str, Any]], other: str = "client") -> list[Any]:
    """Those of clients that have more than one of their own."""
    services = [one for client in clients for one in client["services"]]
    if not any(one["name"] for one in services):
        return []
    names = ("port", "service", "visitors", "visits")
    table = _table(*names, f"to {other}", f"from {other}", "sent away", "cut")
    for one in services:
        table.add_row(
            _port(one["port"]),
            plain(one["name"] or "-"),
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
    table = _table("port", "visitor", "here for", "from it", "to it")
    for client, one in shown:
        ports = {service["name"]: service["port"] for service in client["services"]}
        table.add_row(
            _port(ports.get(one["service"], client["port"])),
            plain(one["visitor_address"] or "not known"),
            duration(one["age"]),
            amount(one["from_visitor"]),
            amount(one["to_visitor"]),
        )
    more = count - len(shown)
    return [table, *([f"and {more:,} more"] if more > 0 else [])]


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=name in _WHOLE, overflow="fold")
    return table


def _there(one: dict[str, Any]) -> tuple[str, str]:
    return "yes" if one["connected"] else "no", "-" if one["rtt"] is None else duration(one["rtt"])


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _port(port: int | None) -> str:
    return str(port) if port else "-"
