"""The tunnel's server: clients connect to its main port, each gets a public port for its visitors."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Self

from sapper import _native
from sapper._arguments import callback as check_callback
from sapper._arguments import flag, seconds, whole
from sapper._loop import running_post
from sapper._mistakes import config_error, shown
from sapper._own_thread import in_own_thread
from sapper.errors import ClosedError, SapperError
from sapper.tunnel import events
from sapper.tunnel._defaults import server_options
from sapper.tunnel.hearing import _SERVER, TunnelObject, answer_later, credentials_of, end_of, tunnel_of
from sapper.tunnel.status import (
    HandshakeStatus,
    TunnelStatus,
    VisitorStatus,
    tunnel_status,
    visitor_status,
)

if TYPE_CHECKING:
    from sapper.tls.config import Credentials, TlsConfig
    from sapper.tunnel.options import ServerOptions

__all__ = ["ConnectionFilter", "ServiceFilter", "ServiceRequest", "TunnelServer", "VisitorFilter"]

logger = logging.getLogger("sapper")

#: Decides about a client by its credentials; only True lets it in.
ConnectionFilter = Callable[[dict[str, Any]], bool | Awaitable[bool]]

#: Decides about a visitor by the tunnel, whose ``tunnel_address`` is here where the visitor came in, and the
#: visitor's address (``host:port``); only True lets it in.
VisitorFilter = Callable[[events.ClientTunnel, str], bool | Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class ServiceRequest:
    """A service that a client wants to expose.

    Attributes:
        name: What it is called; empty for the client's own.
        ports: First and last public port that will do; ``None``: any.
        host: The address at which its public port is to listen; ``None``: the server's.
    """

    name: str
    ports: tuple[int, int] | None
    host: str | None


#: Decides about what a client of our own kind wants to expose, all of it together; only True lets it.
ServiceFilter = Callable[[events.ClientTunnel, tuple[ServiceRequest, ...]], bool | Awaitable[bool]]

#: Without a filter everybody may have a tunnel: then only this machine is everybody.
LOOPBACK = "localhost"

#: Seconds that the name of a host may take to be looked up.
LOOK_UP = 10.0


class TunnelServer(TunnelObject):
    """Gives each client that connects a public port, and passes its visitors on to it.

    Args:
        connection_filter: Decides about each client by its credentials, synchronously or not. It may be
            replaced while the server runs. Without one everybody who reaches the main port gets a tunnel,
            so the server listens on loopback alone, and at no other address that a client asks for.
        visitor_filter: Decides about each visitor when it connects, synchronously or not, after the lists of
            addresses among the options. Everybody may visit without one. It may be replaced while the
            server runs.
        service_filter: Decides about the services of each client of our own kind and the public ports that
            they ask for, synchronously or not, within what the options allow. All of that is granted without
            one. It may be replaced while the server runs.
        tls: TLS at the main port: credentials of a server, or a :class:`~sapper.tls.TlsConfig`.
        visitor_tls: The same at public ports.
        options: Further options.
        danger_allow_anonymous: Listen beyond loopback though there is no filter.

    Raises:
        ConfigError: A value is wrong, or there is no filter and ``host``, ``visitor_host`` or one of
            ``asked_hosts`` is not loopback.
    """

    _kinds = _SERVER

    def __init__(
        self,
        connection_filter: ConnectionFilter | None = None,
        *,
        visitor_filter: VisitorFilter | None = None,
        service_filter: ServiceFilter | None = None,
        tls: TlsConfig | Credentials | None = None,
        visitor_tls: TlsConfig | Credentials | None = None,
        options: ServerOptions | None = None,
        danger_allow_anonymous: bool = False,
    ) -> None:
        super().__init__()
        self._options = server_options(options)
        self._tls = None if tls is None else _config_of(tls, "tls")
        self._visitor_tls = None if visitor_tls is None else _config_of(visitor_tls, "visitor_tls")
        self._anonymous = flag(danger_allow_anonymous, "danger_allow_anonymous")
        self._visitor_filter: VisitorFilter | None = None
        self._service_filter: ServiceFilter | None = None
        self.visitor_filter = visitor_filter
        self.service_filter = service_filter
        self._filter: ConnectionFilter | None = None
        self._addresses: tuple[str, ...] = ()
        self._port: int | None = None
        #: Where it listens, since it was started: the main port as asked for, its host, that of public ports.
        self._place: tuple[int, str | None, str | None] | None = None
        self._reloading = asyncio.Lock()
        self.connection_filter = connection_filter

    @property
    def connection_filter(self) -> ConnectionFilter | None:
        """Decides about each client that comes from now on."""
        return self._filter

    @connection_filter.setter
    def connection_filter(self, value: ConnectionFilter | None) -> None:
        check_callback(value, "connection_filter")
        if value is None and self._filter is not None and self._started and not self._anonymous:
            text = "a server that lets everybody in listens on loopback alone: start another one"
            raise config_error("connection_filter", text)
        before, self._filter = self._filter, value
        try:
            self._hosts()
        except BaseException:
            self._filter = before
            raise

    @property
    def visitor_filter(self) -> VisitorFilter | None:
        """Decides about each visitor that comes from now on."""
        return self._visitor_filter

    @visitor_filter.setter
    def visitor_filter(self, value: VisitorFilter | None) -> None:
        check_callback(value, "visitor_filter")
        self._visitor_filter = value
        self._meet()

    @property
    def service_filter(self) -> ServiceFilter | None:
        """Decides about the services of each client that comes from now on."""
        return self._service_filter

    @service_filter.setter
    def service_filter(self, value: ServiceFilter | None) -> None:
        check_callback(value, "service_filter")
        self._service_filter = value
        self._meet()

    def _meet(self) -> None:
        """A running server hears of what has changed."""
        if isinstance(self._native, _native.TunnelServer):
            self._native.reload(self._values())

    def _hosts(self) -> tuple[str | None, str | None]:
        """Where the main port and the public ports listen."""
        options = self._options
        if self._filter is not None or self._anonymous:
            return options.host, options.host if options.visitor_host is None else options.visitor_host
        asked = [("asked_hosts", host) for host in options.asked_hosts]
        for name, host in [("host", options.host), ("visitor_host", options.visitor_host), *asked]:
            if host is not None and not _is_loopback(host):
                raise config_error(
                    name,
                    f"{shown(host)} is not loopback, and without a connection_filter everybody is let in",
                )
        host = options.host or LOOPBACK
        return host, options.visitor_host or host

    @property
    def port(self) -> int | None:
        """The main port, once it listens."""
        return self._port

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the main port listens."""
        return self._addresses

    @property
    def running(self) -> bool:
        """Whether it listens."""
        return self._port is not None and self._native is not None

    async def start(self, port: int = 9000) -> int:
        """Listens.

        Args:
            port: The main port; 0 takes a free one.

        Returns:
            The main port.

        If cancelled, the server is stopped. One that failed to start may be started again.

        Raises:
            ApiMisuseError: It was started already.
            BindError: The port cannot be had.
            ConfigError: The file of leases cannot be read or written, ``visitor_host`` is no address of this
                machine, or an entry of a list of addresses is none.
        """
        whole(port, "port", 0, 65_535)
        host, visitor_host = self._hosts()
        # The main port's host is found out about by listening there.
        if not self._started and visitor_host is not None and visitor_host != host:
            await _can_have_visitors(visitor_host)
        mailbox, key = self._begin()
        self._place = (port, host, visitor_host)
        try:
            native = self._native = _native.TunnelServer(
                self._values(),
                self._wanted,
                mailbox,
                key,
            )
        except BaseException:
            self._not_begun()
            raise
        assert self._begun is not None  # noqa: S101 - _begin made it
        try:
            self._addresses = tuple(await self._begun)
        except SapperError:  # it is closed
            self._again = True
            raise
        except BaseException:
            native.stop(0.0)
            raise
        self._port = int(self._addresses[0].rpartition(":")[2])
        return self._port

    async def reload(
        self,
        options: ServerOptions | None = None,
        *,
        visitor_filter: VisitorFilter | EllipsisType | None = ...,
        tls: TlsConfig | Credentials | EllipsisType | None = ...,
        visitor_tls: TlsConfig | Credentials | EllipsisType | None = ...,
    ) -> None:
        """Does otherwise from now on; no stream is cut.

        Clients and visitors that come meet what is given here; who is there keeps what it began with, but for
        limits, which hold at once. Without arguments the files of its TLS configurations are read again.

        Args:
            options: All of them. ``host``, ``max_clients``, ``max_handshakes``, ``max_streams`` and
                ``lease_file`` have to be what they were: they need another server.
            visitor_filter: ``...`` is the one that it has; so for the next two.
            tls: TLS at the main port.
            visitor_tls: TLS at public ports.

        Raises:
            ConfigError: A value is wrong; what was there stays in use.
            ClosedError: The server does not run.
        """
        native = self._native
        if not isinstance(native, _native.TunnelServer):
            raise ClosedError("the server does not run")
        if options is None and visitor_filter is ... and tls is ... and visitor_tls is ...:
            for config in {id(one): one for one in (self._tls, self._visitor_tls)}.values():
                if config is not None:
                    await in_own_thread(config.reload)
            return
        # One that waits for a look-up does not come behind a later one.
        async with self._reloading:
            await self._exchange(native, options, visitor_filter, tls, visitor_tls)

    async def _exchange(
        self,
        native: _native.TunnelServer,
        options: ServerOptions | None,
        visitor_filter: VisitorFilter | EllipsisType | None,
        tls: TlsConfig | Credentials | EllipsisType | None,
        visitor_tls: TlsConfig | Credentials | EllipsisType | None,
    ) -> None:
        if self._native is not native:
            raise ClosedError("the server does not run")
        if options is not None:
            server_options(options)
            if options.visitor_host not in (None, self._options.visitor_host):
                await _can_have_visitors(options.visitor_host)
                if self._native is not native:
                    raise ClosedError("the server does not run")
        if visitor_filter is not ...:
            check_callback(visitor_filter, "visitor_filter")
        kept = (self._options, self._visitor_filter, self._tls, self._visitor_tls, self._place)
        try:
            if options is not None:
                self._options, before = options, self._options
                port, host, visitor_host = self._place or (0, None, None)
                if options.host != before.host:
                    raise config_error("host", "cannot be changed while the server runs")
                _, elsewhere = self._hosts()
                if options.visitor_host != before.visitor_host:
                    visitor_host = elsewhere
                self._place = (port, host, visitor_host)
            if visitor_filter is not ...:
                self._visitor_filter = visitor_filter
            if tls is not ...:
                self._tls = None if tls is None else _config_of(tls, "tls")
            if visitor_tls is not ...:
                self._visitor_tls = None if visitor_tls is None else _config_of(visitor_tls, "visitor_tls")
            native.reload(self._values())
        except BaseException:
            (self._options, self._visitor_filter, self._tls, self._visitor_tls, self._place) = kept
            raise

    def _values(self) -> _native.TunnelServerDict:
        """As the binding takes it."""
        options = self._options
        port, host, visitor_host = self._place or (0, None, None)
        return {
            "host": host,
            "port": port,
            "visitor_host": visitor_host,
            "public_ports": options.public_ports,
            "asked_ports": None if options.asked_ports is None else [*options.asked_ports],
            "asked_hosts": [*options.asked_hosts],
            "max_services": options.max_services,
            "tls": None if self._tls is None else self._tls.for_server("tls."),
            "visitor_tls": None
            if self._visitor_tls is None
            else self._visitor_tls.for_server("visitor_tls."),
            "filter": options.filter_timeout,
            "visitor_filter": None if self._visitor_filter is None else options.filter_timeout,
            "service_filter": None if self._service_filter is None else options.filter_timeout,
            "allow_visitors": None if options.allow_visitors is None else [*options.allow_visitors],
            "deny_visitors": [*options.deny_visitors],
            "visitor_rate": None
            if options.visitor_rate is None
            else (options.visitor_rate, options.visitor_burst),
            "max_clients": options.max_clients,
            "max_handshakes": options.max_handshakes,
            "max_visitors": options.max_visitors,
            "max_streams": options.max_streams,
            "visitor_limits": options.visitor_limits._native(),
            "client_limits": options.client_limits._native(),
            "service_limits": options.service_limits._native(),
            "lease_file": options.lease_file,
            "lease_time": options.lease_time,
            "danger_shared_leases": options.danger_shared_leases,
            "common": options._common(options.linger),
        }

    async def stop(self, drain: float = 0.0) -> None:
        """Ends it and waits until everything is closed; a server that is closed stays so.

        Args:
            drain: Seconds that open streams have to end by themselves. New visitors and clients are not
                taken meanwhile. Called again, it can only be sooner.

        If cancelled, it goes on ending.
        """
        seconds(drain, "drain")
        if self._native is not None:
            self._native.stop(drain)
            await running_post().call(self._native.wait_closed)

    def status(self) -> tuple[TunnelStatus, ...]:
        """Every tunnel as of now."""
        if not isinstance(self._native, _native.TunnelServer):
            return ()
        return tuple(tunnel_status(one) for one in self._native.tunnels())

    def visitors(self, tunnel: int | None = None, *, most: int = 1000) -> tuple[VisitorStatus, ...]:
        """Visitors as of now, those who came first.

        Args:
            tunnel: The ``id`` of a tunnel; ``None``: of all.
            most: So many at most.

        Raises:
            ConfigError: One of them is no such number.
        """
        whole(most, "most", 0, 1_000_000)
        if tunnel is not None:
            whole(tunnel, "tunnel", 0, 2**64 - 1)
        if not isinstance(self._native, _native.TunnelServer):
            return ()
        return tuple(visitor_status(one) for one in self._native.visitors(tunnel, most))

    def handshakes(self) -> HandshakeStatus:
        """Connections whose clients are not let in yet."""
        if not isinstance(self._native, _native.TunnelServer):
            return HandshakeStatus(0, 0)
        return HandshakeStatus(*self._native.handshakes())

    async def __aenter__(self) -> Self:
        if not self.running:
            await self.start()
        return self

    def _event(self, values: dict[str, Any]) -> events.TunnelEvent | None:
        name = values["name"]
        kind: Callable[..., events.TunnelEvent] | None = _SERVER.get(name)
        if kind is None:
            return None
        if name == "main-server-start":
            return events.MainServerStart(values["port"], values["secure"])
        if name == "main-server-end":
            return events.MainServerEnd()
        if name in ("main-server-error", "error"):
            return kind(values["error"])
        tunnel = tunnel_of(values)
        if name == "tunnel-created":
            return events.TunnelCreated(tunnel, tunnel.authentication_credentials, values["secure"])
        if name == "tunnel-error":
            return events.TunnelError(values["error"], tunnel)
        if name == "client-error":
            return events.ClientError(tunnel, values["error"])
        if name == "client-disconnected":
            return events.ClientDisconnected(tunnel, values["session"])
        if name == "client-resumed":
            return events.ClientResumed(tunnel, values["connection"])
        if name == "visitor-error":
            return events.VisitorError(tunnel, end_of(values), values["error"])
        if name.startswith("data-"):
            return kind(values["bytes"], tunnel, end_of(values), payload=values["payload"])
        if name.startswith("visitor-"):
            return kind(tunnel, end_of(values))
        return kind(tunnel)

    def _ask(self, question: _native.Question) -> None:
        subject = question.subject
        try:
            answer = self._decide(subject)
        except BaseException as error:
            question.give_up()
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            logger.exception("sapper: a filter of the tunnel failed: nobody is let in by that")
            return
        if isinstance(answer, Awaitable):
            assert self._post is not None  # noqa: S101 - it hears
            self._post.run(answer_later, question, answer, self._options.filter_timeout)
        else:
            question.answer(answer is True)

    def _decide(self, subject: Mapping[str, Any]) -> bool | Awaitable[bool]:
        if "visitor" in subject:
            about_visitors = self._visitor_filter
            # Taken away while the question was on its way: everybody may visit.
            return about_visitors is None or about_visitors(tunnel_of(subject), subject["visitor"])
        if "asked" in subject:
            about_services = self._service_filter
            wanted = tuple(ServiceRequest(*one) for one in subject["asked"])
            return about_services is None or about_services(tunnel_of(subject), wanted)
        about_clients = self._filter
        return True if about_clients is None else about_clients(credentials_of(subject["credentials"]))


def _config_of(tls: TlsConfig | Credentials, field: str) -> TlsConfig:
    from sapper.tls.config import TlsConfig

    return TlsConfig.of(tls, field=field)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == LOOPBACK


async def _can_have_visitors(host: str) -> None:
    """Finds out whether public ports can be there: later only the first client is told."""
    error: OSError | UnicodeError = OSError("it has no address")
    try:
        async with asyncio.timeout(LOOK_UP):
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except TimeoutError:
        raise config_error("visitor_host", f"looking {shown(host)} up took more than {LOOK_UP:g} s") from None
    except (OSError, UnicodeError) as failed:  # the latter: a part of the name is too long
        found, error = [], failed
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as place:
                place.bind(address)
        except OSError as failed:
            error = failed
        else:
            return  # one is enough: a name may have addresses of a family that the machine does not have
    why = getattr(error, "strerror", None) or error
    raise config_error("visitor_host", f"public ports cannot be at {shown(host)}: {why}")
