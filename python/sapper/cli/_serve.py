"""Runs the proxy of ``sapper proxy``, tells what happens, and asks a running one how it is."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
import socket
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from sapper import _notify
from sapper._options import config_error
from sapper.cli._limits import raise_limit
from sapper.cli._output import (
    amount,
    duration,
    error_values,
    fail,
    log_told,
    now,
    plain,
    say,
    tell_json,
    write_json,
)
from sapper.cli._reloading import read_again, reloading
from sapper.endpoint import split_address
from sapper.errors import ConnectError, ErrorContext, RemoteProtocolError, SapperError
from sapper.metrics import MetricsServer
from sapper.tls import Proxy, ProxyOptions
from sapper.tls.proxy import ConnectionEvent, ProxyEvent, ReloadEvent

__all__ = ["Journal", "ask", "serve", "show_status"]

#: Seconds that a status may take.
_STATUS_DEADLINE = 10.0
#: Connections that a status shows to people.
_SHOWN = 20


class Journal:
    """Tells what happens: lines for people on standard error, or JSON lines on standard output."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self._quiet = quiet

    def note(self, event: str, text: str, *, bad: bool = False, **values: Any) -> None:
        """Something happened."""
        if self.as_json:
            tell_json({"time": now(), "event": event, **values})
        elif bad or not self._quiet:
            say(text)

    def event(self, event: ProxyEvent) -> None:
        """What the proxy tells."""
        if isinstance(event, ConnectionEvent):
            self._connection(event)
        elif isinstance(event, ReloadEvent):
            self.reloaded(event.error)
        else:
            self.note("lost", f"{event.count} events were lost", bad=True, count=event.count)

    def reloaded(self, error: SapperError | None) -> None:
        """Certificates or options were read again."""
        said = error_values(error) if error is not None else None
        text = f"not reloaded, what was there stays in use: {error}" if error else "reloaded"
        self.note("reload", text, bad=error is not None, error=said)

    def _connection(self, event: ConnectionEvent) -> None:
        one = event.connection
        words = [f"{one.client} {event.outcome}"]
        if one.server_name:
            words.append(one.server_name)
        if one.upstream:
            words.append(f"-> {one.upstream}")
        values = {
            "id": one.id,
            "client": one.client,
            "local": one.local,
            "upstream": one.upstream,
            "server_name": one.server_name,
            "tls_version": one.version,
            "cipher_suite": one.cipher_suite,
            "alpn": one.alpn.decode("utf-8", "backslashreplace") if one.alpn is not None else None,
            "resumed": one.resumed,
            "client_cn": one.client_cn,
            "seconds": round(one.age, 6),
            "to_upstream": one.to_upstream,
            "to_client": one.to_client,
        }
        error = error_values(event.error) if event.error is not None else None
        text = " ".join(words) + (f": {event.error}" if event.error is not None else "")
        self.note("connection", text, bad=error is not None, outcome=event.outcome, **values, error=error)


async def serve(
    options: ProxyOptions, again: Callable[[], ProxyOptions], metrics: tuple[str, ...], journal: Journal
) -> int:
    """Runs a proxy to its end and gives the exit code.

    Args:
        options: What it does.
        again: Reads them anew, for SIGHUP.
        metrics: Where figures are asked for.
        journal: Hears what happens.
    """
    raise_limit()
    proxy = Proxy(options, on_event=journal.event)
    asked = cut = False
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(log_told(journal.note if journal.as_json else None))
        servers = [MetricsServer(address, proxies={"proxy": proxy}) for address in metrics]
        for server in servers:
            await stack.enter_async_context(server)
        addresses = await proxy.start()
        figures = [server.address for server in servers]
        where = ", ".join(addresses)
        text = f"listening at {where}" + "".join(f", figures at {one}" for one in figures)

        def stop() -> None:
            nonlocal asked, cut
            asked, cut = True, asked
            drain = 0.0 if cut else proxy.options.drain_timeout
            proxy.stop(drain)
            _notify.stopping("draining")
            still = proxy.stats().open
            text = f"stopping: {drain:g} s for {still} open connections (again ends at once)"
            journal.note("stopping", text, drain=drain, open=still)

        async def reload() -> None:
            await proxy.reload(await read_again(again))

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        error: SapperError | None = None
        async with reloading(reload, journal.reloaded, ready=f"listening at {where}"):
            # Who reads that may send a signal at once.
            journal.note("listening", text, listen=list(addresses), metrics=figures)
            _notify.ready(f"listening at {where}")
            try:
                await proxy.wait_closed()
            except SapperError as failure:
                error = failure
        stats = proxy.stats()
        moved = f"{amount(stats.to_upstream)} in, {amount(stats.to_client)} out"
        said = error_values(error) if error is not None else None
        journal.note(
            "closed",
            f"closed: {stats.accepted} connections, {moved}",
            accepted=stats.accepted,
            ended=dict(stats.ended),
            to_upstream=stats.to_upstream,
            to_client=stats.to_client,
            error=said,
        )
    if error is not None:
        return error.kind.exit_code if journal.as_json else fail(error, as_json=False)
    return 130 if cut else 0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_STATUS_DEADLINE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_STATUS_DEADLINE)
        self.sock.connect(self._path)


def show_status(address: str, *, as_json: bool) -> None:
    """Asks a running proxy and shows its answer.

    Raises:
        ConnectError: Nobody answers there.
        RemoteProtocolError: What answers is no proxy of ours.
    """
    status = ask(address, "proxy", "proxies")
    if as_json:
        write_json(status)
        return
    console = Console(highlight=False, emoji=False)
    for proxy in status["proxies"].values():
        console.print(_summary(proxy))
        if proxy["connections"]:
            console.print(_connections(proxy["connections"]))
            if (more := proxy["open"] - _SHOWN) > 0:
                console.print(f"and {more} more")


#: Who answers, by what they have a status of.
_WHO = {"proxies": "a proxy", "pumps": "a bridge", "tunnels": "a tunnel", "tunnel_clients": "a tunnel"}


def ask(address: str, what: str, *keys: str) -> dict[str, Any]:
    """The status of what runs there; each of ``keys`` is where a ``what`` says its own.

    Raises:
        ConnectError: Nobody answers there.
        RemoteProtocolError: What answers is none of ours, or another one.
    """
    connection: http.client.HTTPConnection
    if address.startswith("unix:"):
        connection = _UnixConnection(address.removeprefix("unix:").removeprefix("//"))
    else:
        try:
            host, port = split_address(f":{address}" if address.isdecimal() else address, "127.0.0.1")
        except ValueError as error:
            raise config_error("ADDRESS", str(error)) from None
        connection = http.client.HTTPConnection(host, port, timeout=_STATUS_DEADLINE)
    try:
        with contextlib.closing(connection):
            connection.request("GET", "/status")
            answer = connection.getresponse()
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        context = ErrorContext(errno=getattr(error, "errno", None))
        raise ConnectError(f"no {what} answers at {address}: {error}", context) from error
    status: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        status = json.loads(content)
    if answer.status != 200 or not isinstance(status, dict) or not status.keys() >= set(keys):
        raise RemoteProtocolError(f"what answers at {address} is no {what} (status {answer.status})")
    others = [who for key, who in _WHO.items() if status.get(key)]
    # Clients of tunnels come and go: where nobody is, one may be there later.
    if not any(status[key] for key in keys) and (others or "tunnel_clients" not in keys):
        does = f": {others[0]} does" if others else ""
        raise RemoteProtocolError(f"no {what} answers at {address}{does}")
    return status


def _summary(proxy: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    ended = ", ".join(f"{name} {count:,}" for name, count in sorted(proxy["ended"].items()))
    failures = ", ".join(f"{name} {count:,}" for name, count in sorted(proxy["upstream_failures"].items()))
    shaken = ", ".join(f"{name} {count:,}" for name, count in sorted(proxy["handshakes"].items()))
    for name, text in (
        ("state", proxy["state"]),
        ("listens at", ", ".join(proxy["listen"])),
        ("connections", f"{proxy['open']:,} open, {proxy['accepted']:,} accepted"),
        ("ended", ended or "-"),
        ("handshakes", f"{shaken or '-'}; resumed {proxy['resumed']:,}; under way {proxy['handshaking']:,}"),
        ("handshake time", f"{duration(proxy['handshake_p50'])}, 99 %: {duration(proxy['handshake_p99'])}"),
        ("services failed", failures or "-"),
        ("payload", f"{amount(proxy['to_upstream'])} to services, {amount(proxy['to_client'])} to clients"),
    ):
        table.add_row(name, plain(text))
    return table


def _connections(connections: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("client", "name", "service", "TLS", "age", "in", "out"):
        table.add_column(name)
    for one in connections[:_SHOWN]:
        table.add_row(
            plain(one["client"] + (f" ({one['client_cn']})" if one["client_cn"] else "")),
            plain(one["server_name"] or "-"),
            plain(one["upstream"] or "-"),
            plain(one["version"] or "-"),
            duration(one["age"]),
            amount(one["to_upstream"]),
            amount(one["to_client"]),
        )
    return table
