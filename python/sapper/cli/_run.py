"""Runs the bridge of ``sapper bridge`` and tells what happens, for people or for programs."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Collection, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import IO, Any

from rich.live import Live

from sapper import _native
from sapper._mistakes import unused
from sapper._options import config_error
from sapper._takeover import Taken
from sapper.cli._lines import is_behind
from sapper.cli._names import named, of_file
from sapper.cli._output import (
    canvas,
    error_values,
    fail,
    log_told,
    say,
    stats_table,
    stats_values,
    tell_json,
)
from sapper.endpoint import (
    Endpoint,
    Fd,
    File,
    Seqpacket,
    Tcp,
    TcpListen,
    Tls,
    TlsListen,
    Udp,
    Unix,
    UnixListen,
)
from sapper.errors import ClosedError, ErrorKind, SapperError
from sapper.metrics import MetricsServer
from sapper.pump import Pump, PumpOptions, connect
from sapper.tls import Bridge, HandshakeInfo, TlsConfig, create_bridge
from sapper.tls.config import asks_clients

__all__ = ["Report", "run"]


class Report:
    """Tells what happens, in the form that was asked for."""

    def __init__(self, json_to: IO[str] | None, *, quiet: bool, interval: float | None) -> None:
        self._json_to = json_to
        self._quiet = quiet
        self._stream = sys.stderr
        self._console = canvas()
        usual = 1.0 if self._console.is_terminal and json_to is None and not quiet else 0.0
        self._interval = usual if interval is None else interval

    @property
    def as_json(self) -> bool:
        """Whether a program reads along."""
        return self._json_to is not None

    def note(self, event: str, text: str, **values: Any) -> None:
        """Something happened."""
        if self._json_to is not None:
            tell_json({"event": event, **values}, self._json_to)
        elif not self._quiet:
            say(text)

    def handshake(self, info: HandshakeInfo | None) -> None:
        """Both ends are open."""
        if info is None:
            self.note("open", "open")
            return
        alpn = _text(info.alpn)
        words = (info.version, info.cipher_suite, info.group, alpn and f"ALPN {alpn}")
        self.note(
            "handshake",
            ", ".join(word for word in words if word),
            version=info.version,
            cipher_suite=info.cipher_suite,
            group=info.group,
            alpn=alpn,
            engine=info.engine,
            resumed=info.resumed,
            psk_identity=info.psk_identity,
            server_name=info.server_name,
        )

    async def figures(self, pump: Pump) -> None:
        """Shows figures until cancelled."""
        if not self._interval:
            return
        if self._json_to is not None:
            while True:
                await asyncio.sleep(self._interval)
                tell_json({"event": "stats", **stats_values(pump.stats())}, self._json_to)
        before = pump.stats()
        if not self._console.is_terminal:
            while True:
                await asyncio.sleep(self._interval)
                now = pump.stats()
                self._console.print(stats_table(now, before))
                before = now
        with Live(stats_table(before), console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                await asyncio.sleep(self._interval)
                if is_behind(self._stream):
                    continue  # a held terminal shows the newest once it is let go, not all of them
                now = pump.stats()
                live.update(stats_table(now, before), refresh=True)
                before = now

    def closed(self, pump: Pump, error: SapperError | None) -> None:
        """It is over."""
        stats = pump.stats()
        if self._json_to is not None:
            said = error_values(error) if error is not None else None
            tell_json({"event": "closed", "error": said, "stats": stats_values(stats)}, self._json_to)
        elif not self._quiet and stats.running > 0:
            self._console.print(stats_table(stats))


def _text(word: bytes | None) -> str | None:
    return word.decode("utf-8", "backslashreplace") if word is not None else None


class _Cut:
    """What signals asked for."""

    asked = False
    twice = False


async def run(
    ends: tuple[Endpoint, Endpoint],
    tls: TlsConfig | None,
    server_name: str | None,
    options: PumpOptions,
    drain: float,
    report: Report,
    metrics: tuple[str, ...] = (),
    words: Mapping[str, str] | None = None,
    in_file: Collection[str] = (),
) -> int:
    """Runs a bridge to its end and gives the exit code.

    Args:
        ends: What was typed, in its order.
        tls: The configuration of TLS, where one was given.
        server_name: The name to check.
        options: How payload moves.
        drain: Seconds that the first signal gives.
        report: Hears what happens.
        metrics: Where figures are asked for.
        words: What options of TLS are called here.
        in_file: The options that a file says, and nothing else.
    """
    network, inner = _in_order(ends)
    the_network, the_sink = ("B", "A") if network is not ends[0] else ("A", "B")
    names = {**(words or {}), "socket": the_network, "network": the_network, "sink": the_sink}
    try:
        pump, told = _make(network, inner, tls, server_name, options)
    except SapperError as failure:
        if (failure.field or "").split(".")[0] in in_file:
            raise of_file(failure, "bridge") from None
        raise named(failure, names) from None
    try:
        servers = [MetricsServer(address, pumps={"bridge": pump}) for address in metrics]
    except SapperError as failure:
        raise named(failure, {"address": "--metrics"}) from None
    async with AsyncExitStack() as stack:
        stack.enter_context(log_told(report.note if report.as_json else None))
        for server in servers:
            await stack.enter_async_context(server)
        told = told if network is ends[0] else (told[1], told[0])
        figures = [server.address for server in servers]
        return await _run(told, pump, drain, report, names, figures)


async def _run(
    ends: tuple[Endpoint, Endpoint],
    pump: Pump,
    drain: float,
    report: Report,
    names: dict[str, str],
    figures: list[str],
) -> int:
    cut = _stop_on_signals(pump, drain, report)
    error: SapperError | None = None
    text = f"{ends[0]} <-> {ends[1]}" + "".join(f", figures at {one}" for one in figures)
    report.note("opening", text, a=str(ends[0]), b=str(ends[1]), **({"metrics": figures} if figures else {}))
    try:
        if isinstance(pump, Bridge):
            report.handshake(await pump.handshake())
        else:
            await pump.open()
            report.handshake(None)
        pump.start()
        showing = asyncio.create_task(report.figures(pump))
        try:
            await pump.wait_closed()
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
    except ClosedError:
        if not cut.asked:  # otherwise: stopped while it was opening
            raise
    except SapperError as failure:
        error = named(failure, names)
        _who_waited(error, ends)
    await pump.stop()
    report.closed(pump, error)
    if cut.twice:
        return 130
    if error is None:
        return 0
    # With --json the last line has told it.
    return error.kind.exit_code if report.as_json else fail(error, as_json=False)


def _who_waited(error: SapperError, ends: tuple[Endpoint, Endpoint]) -> None:
    """A connection that was awaited, not made: what is usual to try is about the other case."""
    at_fault = dict(zip("AB", ends, strict=True)).get(error.field or "")
    # A descriptor is connected already, or listens.
    if error.kind is ErrorKind.CONNECT_DEADLINE and isinstance(
        at_fault, TcpListen | TlsListen | UnixListen | Fd
    ):
        error.add_note("check that the peer connects to this address, or wait longer: --accept-timeout")


def _stop_on_signals(pump: Pump, drain: float, report: Report) -> _Cut:
    """The first Ctrl-C (or SIGTERM) drains, the second cuts."""
    cut = _Cut()

    def heard() -> None:
        if cut.asked:
            cut.twice = True
            pump.stop()
            return
        cut.asked = True
        text = f"stopping: {drain:g} s to deliver what waits (Ctrl-C again ends at once)"
        report.note("stopping", text, drain=drain)
        pump.stop(drain)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, heard)
    return cut


def _in_order(ends: tuple[Endpoint, Endpoint]) -> tuple[Endpoint, Endpoint]:
    """The network's end first: the one under TLS, or the one that carries bytes."""
    a, b = ends
    tls = [isinstance(one, Tls | TlsListen) for one in ends]
    if (tls[1] and not tls[0]) or (not any(tls) and a.packets and not b.packets):
        return b, a
    return a, b


def _one_way(a: Endpoint, b: Endpoint, options: PumpOptions) -> PumpOptions:
    """A file is opened to be read or to be written: where nobody says a direction, that says it."""
    if "direction" in options.model_fields_set:
        return options
    gives = [isinstance(end, File) and end.mode == "r" for end in (a, b)]
    takes = [isinstance(end, File) and end.mode in ("w", "a") for end in (a, b)]
    to_network, from_network = gives[1] or takes[0], gives[0] or takes[1]
    if to_network == from_network:  # neither, or two files that do not fit: the pump says so
        return options
    return options.model_copy(update={"direction": "encrypt-only" if to_network else "decrypt-only"})


def _must_have_use(a: Endpoint, b: Endpoint, options: PumpOptions) -> None:
    """Refuses what only another sink would have a use for: here none comes later."""
    listens = (TcpListen, TlsListen, UnixListen, Fd)  # a descriptor may
    if options.accept_timeout is not None and not any(isinstance(one, listens) for one in (a, b)):
        raise unused("accept_timeout", "is for an end that listens, and none does")
    written = (a.packets is not True and options.direction != "decrypt-only") or (
        b.packets is not True and options.direction != "encrypt-only"
    )
    if options.records_per_write != type(options).model_fields["records_per_write"].default and not written:
        raise unused("records_per_write", "no packets are written into a stream")
    usual = type(options).model_fields["connect_timeout"].default
    # A name to listen at may have to be looked up.
    if options.connect_timeout != usual and not any(
        isinstance(one, Tcp | Tls | Unix | Seqpacket | Udp | TcpListen | TlsListen) for one in (a, b)
    ):
        raise unused("connect_timeout", "there is nothing to connect to")


def _make(
    a: Endpoint, b: Endpoint, tls: TlsConfig | None, server_name: str | None, options: PumpOptions
) -> tuple[Pump, tuple[Endpoint, Endpoint]]:
    """The pump, and its ends as they are told."""
    options = _one_way(a, b, options)
    _must_have_use(a, b, options)
    if not isinstance(a, Tls | TlsListen):
        if tls is not None:
            raise of_file(unused(None, "no end is a tls: or tls-listen: endpoint"), "tls")
        if server_name is not None:
            raise unused("server_hostname", "needs a tls: endpoint")
        first, second = _listening(a), _listening(b)
        return connect(first, second, options=options), (_told(first), _told(second))
    if server_name is not None and not any(isinstance(one, Tls) for one in (a, b)):
        raise unused("server_hostname", "is for a tls: endpoint: a server's clients say which name they want")
    if isinstance(a, TlsListen) and (tls is None or tls.credentials.kind == "none"):
        raise config_error(
            "credentials", "a tls-listen: endpoint needs --cert and --key, or a pre-shared key"
        )
    first, second = _listening(a), _listening(b)
    ours, the_sinks = (_for_role(one, tls) for one in ((a, b), (b, a)))
    bridge = create_bridge(
        socket=first,
        sink=second,
        credentials=ours,
        server_hostname=server_name if isinstance(a, Tls) else None,
        sink_credentials=the_sinks if isinstance(b, Tls | TlsListen) else None,
        sink_hostname=server_name if isinstance(b, Tls) else None,
        options=options,
    )
    return bridge, (_told(first), _told(second))


def _for_role(ends: tuple[Endpoint, Endpoint], tls: TlsConfig | None) -> TlsConfig | None:
    """The options of TLS for the first of both ends: of a client's the other one has no use."""
    here, there = ends
    if tls is None or not (isinstance(here, TlsListen) and isinstance(there, Tls)):
        return tls
    others: dict[str, Any] = {
        name: TlsConfig.model_fields[name].default
        for name in ("danger_legacy_renegotiation", "danger_ignore_server_name", "ocsp")
    }
    if not asks_clients(tls):
        # Whom to believe is said about the service alone.
        names = ("roots", "pins", "crls", "peer_rules", "danger_accept_any_certificate")
        others |= {name: TlsConfig.model_fields[name].default for name in names}
    changes = {name: value for name, value in others.items() if getattr(tls, name) != value}
    return tls.model_copy(update=changes) if changes else tls


class _Listening:
    """A listener whose port the system chose: it listens already, so that the port can be told."""

    def __init__(self, end: TcpListen | TlsListen) -> None:
        self._socket = _listen(end.host)
        host, port = self._socket.getsockname()[:2]
        self.end = replace(end, host=host, port=port)

    def _hand_over(self, name: str) -> Taken:
        native = _native.Endpoint.fd(self._socket.fileno(), None, None, name)
        tls = self.end if isinstance(self.end, TlsListen) else None
        return Taken(native, None, tls, commit=self._socket.close, undo=self._socket.close)


def _listen(host: str) -> socket.socket:
    if host == "::" and socket.has_dualstack_ipv6():
        return socket.create_server((host, 0), family=socket.AF_INET6, dualstack_ipv6=True)
    if host == "::":
        return socket.create_server(("0.0.0.0", 0))
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    return socket.create_server(address[:2], family=family)


def _listening(end: Endpoint) -> Any:
    """The end as it is given to the API: with port 0 a socket that listens."""
    if isinstance(end, TcpListen | TlsListen) and end.port == 0:
        # What stands in the way is said in the words of the API, which tries again.
        with suppress(OSError):
            return _Listening(end)
    return end


def _told(end: Any) -> Endpoint:
    told: Endpoint = end.end if isinstance(end, _Listening) else end
    return told
