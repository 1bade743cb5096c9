"""Runs what ``sapper tunnel serve`` and ``sapper expose`` say, and tells what happens.

Not here: options, which are :mod:`sapper.cli.tunnel`'s; when streams and sessions end, which is native.
Nothing here loads typer or rich: it stays for as long as it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from sapper import _notify
from sapper.cli._limits import raise_limit
from sapper.cli._output import error_values, log_told, say, tell_json
from sapper.cli._reloading import Files, read_again, reloading
from sapper.errors import ConfigError, CredentialsRejected, SapperError
from sapper.tunnel import events

if TYPE_CHECKING:
    from sapper.tunnel._plain import ClientPlan, ServerPlan
    from sapper.tunnel.config import ClientConfig, ServerConfig
    from sapper.tunnel.fleet import Fleet

__all__ = ["TOKEN_VARIABLE", "Told", "run_clients", "run_server"]

#: Where a client's token is read from: a command line is seen by every user of the machine.
TOKEN_VARIABLE = "SAPPER_TUNNEL_TOKEN"  # noqa: S105 - a name


class Told:
    """Tells what happens: lines for people on standard error, or JSON lines on standard output.

    Args:
        as_json: Whether programs read it.
        scheme: What a public address begins with; ``None``: ``https`` where the server says that visitors
            speak TLS, else ``http``.
        qr: Whether the public address is shown as a QR code too; ``None``: where a terminal is.
    """

    def __init__(self, *, as_json: bool, scheme: str | None = None, qr: bool | None = None) -> None:
        self.as_json = as_json
        self._scheme = scheme
        self._qr = sys.stderr.isatty() if qr is None else qr
        #: Clients whose server ended the connection in order: no error says why they connect again.
        self._left: set[str] = set()

    def note(self, event: str, *lines: str, **values: Any) -> None:
        """Something happened to the program itself."""
        if self.as_json:
            tell_json({"event": event, **values})
        elif lines:
            say(*lines)

    def reloaded(self, error: SapperError | None) -> None:
        """A configuration was read again."""
        text = f"not reloaded, what was there stays in use: {error}" if error else "reloaded"
        self.note("reload", text, error=error_values(error) if error is not None else None)

    def event(self, event: events.TunnelEvent, name: str = "", first: str = "") -> None:
        """Something happened to a tunnel.

        Args:
            event: What.
            name: That of one of several clients.
            first: What is told for the name of a first service that has none, where there are others.
        """
        urls = self._urls(event) if isinstance(event, events.AuthenticationAcknowledged) else ()
        if self.as_json:
            values = {"event": event.name, **({"tunnel": name} if name else {}), **_values(event)}
            for _, url in urls[:1]:
                values |= {"url": url, "qr": _matrix(url)}
            tell_json(values)
        elif urls:
            for service, url in urls:
                called = service or (first if len(urls) > 1 else "")
                whose = "".join(f"{one}: " for one in (name, called) if one)
                say(f"{whose}exposed at {url}")
                if self._qr:
                    say(*_blocks(_matrix(url)))
        elif (line := _line(event)) is not None:
            if isinstance(event, events.TunnelReconnectQueued) and name in self._left:
                line = f"the other end closed the connection; {line}"
            say(f"{name}: {line}" if name else line)
        if isinstance(event, events.TunnelDisconnected) and not event.had_error:
            self._left.add(name)
        elif isinstance(event, events.TunnelReconnectQueued | events.TunnelError):
            self._left.discard(name)

    def _urls(self, event: events.AuthenticationAcknowledged) -> tuple[tuple[str, str], ...]:
        """Each service with its public address."""
        host = event.client_connection.tunnel_server_host
        scheme = self._scheme or ("https" if event.secure else "http")
        return tuple(
            (one.name, f"{scheme}://{_joined(one.host or host, one.port)}") for one in event.services
        )


async def run_server(
    config: ServerConfig | ServerPlan,
    again: Callable[[], ServerConfig],
    files: Files,
    *,
    token: str | None,
    metrics: tuple[str, ...],
    drain: float,
    told: Told,
) -> bool:
    """Runs a server to its end.

    Args:
        config: What it does.
        again: Reads that anew, for SIGHUP and where a file has changed.
        files: The files that it comes from.
        token: What a client has to say, for the command that is shown.
        metrics: Where figures are asked for.
        drain: Seconds that the end gives to open streams.
        told: Hears what happens.

    Returns:
        Whether it was told to end at once, by a second signal.

    Raises:
        SapperError: What ended it, where it was not stopped.
    """
    raise_limit()
    server = config.server()
    heard = server.events()

    async def reload() -> None:
        changed = await read_again(again)
        await changed.reload(server)
        with watched.pop_all():
            _watch_tls(watched, told, changed.tls, changed.visitor_tls)

    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(log_told(told.note if told.as_json else None))
        places = await _figures(stack, metrics, tunnels={"tunnel": server})
        port = await server.start(config.port)
        if places:
            told.note("metrics", *(f"figures at {one}" for one in places), addresses=places)
        if not told.as_json and token is not None:
            ask_tls = " --tls" if config.tls is not None else ""
            command = f"{TOKEN_VARIABLE}={shlex.quote(token)} sapper expose 3000 --to HOST:{port}{ask_tls}"
            told.note("command", "A client exposes its port 3000 with:", f"  {command}")
        watched = stack.enter_context(contextlib.ExitStack())
        _watch_tls(watched, told, config.tls, config.visitor_tls)
        cut = _hear_signals(server.stop, drain)
        await stack.enter_async_context(reloading(reload, told.reloaded, ready="reloaded", files=files))
        _notify.ready(f"listening at port {port}")
        async for event in heard:
            told.event(event)
    return _finish(server.error, cut)


async def run_clients(
    configs: Mapping[str, ClientConfig | ClientPlan],
    again: Callable[[], Mapping[str, ClientConfig]],
    files: Files,
    *,
    metrics: tuple[str, ...],
    drain: float,
    told: Told,
) -> bool:
    """Runs clients to their end; the arguments are those of :func:`run_server`.

    Raises:
        SapperError: What ended one of them, where it was not stopped.
    """
    from sapper.tunnel.fleet import Fleet

    raise_limit()

    def hear(name: str, event: events.TunnelEvent) -> None:
        # What ends the only one is told at the end, with what to do about it.
        if name or told.as_json or not isinstance(event, events.GenericError):
            running = fleet.clients.get(name)
            told.event(event, name, running._first() if running else "")

    fleet = Fleet(configs, hear, drain=drain)

    def idle(wanted: Mapping[str, Any]) -> None:
        if not wanted:
            text = "no tunnel is enabled: nothing is exposed until the configuration has one"
            told.note("idle", text)

    async def reload() -> None:
        changed = await read_again(again)
        await fleet.reload(changed)
        idle(changed)
        with watched.pop_all():
            _watch_tls(watched, told, *(one.tls for one in changed.values()))

    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(log_told(told.note if told.as_json else None))
        places = await _figures(stack, metrics, tunnel_clients=_Named(fleet))
        if places:
            told.note("metrics", *(f"figures at {one}" for one in places), addresses=places)
        await fleet.start()
        watched = stack.enter_context(contextlib.ExitStack())
        _watch_tls(watched, told, *(one.tls for one in configs.values()))
        cut = _hear_signals(fleet.stop, drain)
        await stack.enter_async_context(reloading(reload, told.reloaded, ready="reloaded", files=files))
        _notify.ready("exposing")
        idle(configs)
        await fleet.wait_closed()
    error, failed = fleet.error, fleet.failed
    if (
        isinstance(error, CredentialsRejected)
        and error.context.alert is None
        and failed
        and not failed.said()
    ):
        error = CredentialsRejected(f"{error.message}; it was told no token", error.context)
        error.add_note(f"say the server's token: {TOKEN_VARIABLE}=…, --token-file, or token_file in --config")
    return _finish(error, cut)


async def _figures(stack: contextlib.AsyncExitStack, addresses: tuple[str, ...], **what: Any) -> list[str]:
    """Answers for figures; where."""
    if not addresses:
        return []
    from sapper.metrics import MetricsServer  # proxies and bridges come with it

    servers = [MetricsServer(address, **what) for address in addresses]
    return [(await stack.enter_async_context(one)).address for one in servers]


class _Named(Mapping[str, Any]):
    """The clients that run, as figures name them: one without a name is ``tunnel``."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def __getitem__(self, name: str) -> Any:
        return {one or "tunnel": client for one, client in self._fleet.clients.items()}[name]

    def __iter__(self) -> Any:
        return iter([one or "tunnel" for one in self._fleet.clients])

    def __len__(self) -> int:
        return len(self._fleet.clients)


class _Cut:
    """Whether a second signal came."""

    asked = again = False


def _hear_signals(stop: Callable[[float], Awaitable[None]], drain: float) -> _Cut:
    """The first Ctrl-C (or SIGTERM) lets open streams end, the second ends at once."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Future[None]] = set()
    cut = _Cut()

    def heard() -> None:
        cut.asked, cut.again = True, cut.asked
        _notify.stopping("draining")
        task = asyncio.ensure_future(stop(0.0 if cut.again else drain))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, heard)
    return cut


def _finish(error: SapperError | None, cut: _Cut) -> bool:
    if error is not None:
        raise error
    return cut.again


def _watch_tls(stack: contextlib.ExitStack, told: Told, *configs: Any) -> None:
    """Certificates are read again when their files change."""
    for config in {id(one): one for one in configs if not isinstance(one, bool | None)}.values():
        with contextlib.suppress(ConfigError):  # nothing in it came from a file
            stack.enter_context(config.watch(told.reloaded))


def _line(event: events.TunnelEvent) -> str | None:
    match event:
        case events.MainServerStart(port=port, secure=secure):
            return f"listening at port {port}{' with TLS' if secure else ''}"
        case events.TunnelCreated(client_tunnel=one):
            ports = ", ".join(f"{each.port} {each.name}".rstrip() for each in one.services)
            return f"client {one.id} ({one.client_address}): public port {ports}"
        case events.ClientDisconnected(client_tunnel=one, session=session):
            return f"client {session or one.id} ({one.client_address}): gone"
        case events.ClientResumed(client_tunnel=one):
            return f"client {one.id} ({one.client_address}): back"
        case events.ClientError(client_tunnel=one, err=err):
            return f"client {one.id} ({one.client_address}): {err}"
        case events.TunnelError(err=err):
            return f"tunnel: {err}"
        case events.GenericError(err=err):
            return f"error: {err}"
        case events.MainServerError(err=err):
            return f"the server ends: {err}"
        case events.TunnelReconnectQueued(timeout=pause):
            return f"connecting again in {pause:.1f} s"
        case events.ServiceError(err=err):
            return f"service: {err}"
        case events.EventsLost(count=count):
            return f"{count} events were lost"
        case _:
            return None


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _values(event: events.TunnelEvent) -> dict[str, Any]:
    """An event for programs, without credentials."""

    def plain(value: Any) -> Any:
        if isinstance(value, SapperError):
            return error_values(value)
        if is_dataclass(value):
            return {one.name: plain(getattr(value, one.name)) for one in fields(value) if one.repr}
        if isinstance(value, tuple):
            return [plain(one) for one in value]
        return value

    found = plain(event)
    return found if isinstance(found, dict) else {}


def _matrix(text: str) -> list[str]:
    """A QR code: a text for each row, ``1`` for a dark module, without the light border that it needs."""
    import segno

    code = segno.make(text, error="m", micro=False)
    return ["".join("1" if dark else "0" for dark in row) for row in code.matrix]


def _blocks(rows: list[str]) -> list[str]:
    """A QR code for a terminal, two rows in a line: light modules are drawn, so that it is right on black."""
    width = len(rows[0]) + 8
    light = "0" * width
    framed = [light] * 4 + [f"0000{row}0000" for row in rows] + [light] * 4
    if len(framed) % 2:
        framed.append(light)
    cells = {("0", "0"): "█", ("0", "1"): "▀", ("1", "0"): "▄", ("1", "1"): " "}
    pairs = zip(framed[::2], framed[1::2], strict=True)
    return ["".join(cells[pair] for pair in zip(upper, lower, strict=True)) for upper, lower in pairs]
