"""The tunnel's client: exposes a local service through a server's public port."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

from sapper import _native
from sapper._arguments import flag, host_name, named, seconds, socket_path, text, whole, wrong_type
from sapper._loop import running_post
from sapper._mistakes import config_error, shown, unused
from sapper._own_thread import in_own_thread
from sapper.errors import ClosedError, ConfigError
from sapper.tunnel import events
from sapper.tunnel._defaults import (
    ClientDefaults,
    PlainService,
    client_options,
    credentials_text,
    one_service,
)
from sapper.tunnel.hearing import _CLIENT, TunnelObject, end_of, public_services
from sapper.tunnel.status import ClientStatus, VisitorStatus, client_status, visitor_status

if TYPE_CHECKING:
    from sapper.tls.config import Credentials, Material, TlsConfig
    from sapper.tunnel.options import ClientOptions, Service

__all__ = ["TunnelClient"]

logger = logging.getLogger("sapper")

#: Seconds of the longest pause that a server reckons with.
LONGEST_PAUSE = ClientDefaults.reconnect_delay[1]


class TunnelClient(TunnelObject):
    """Exposes a service of this machine at a server's public port.

    Args:
        tunnel_server_host: The server.
        tunnel_server_port: Its main port.
        local_service_port: The service's port, reached on 127.0.0.1 or ::1, whichever listens; or at
            ``local_service_host``.
        authentication_credentials: What the client says of itself: a mapping that JSON can say.
        local_service_host: The service's host, where it is not this machine.
        local_service_path: A Unix socket instead of a port.
        services: Several services instead, each with a public port of its own. Servers of the original take
            one.
        tls: TLS to the server: ``True``, credentials of a client, or a :class:`~sapper.tls.TlsConfig`.
            ``None`` is none, as ``False``.
        ca: Whom to believe about the server's certificate: PEM, DER, or a file; the system's authorities
            without it. It asks for TLS.
        server_hostname: Name to check, where it is not ``tunnel_server_host``.
        danger_accept_any_certificate: Believe any server (the original's ``rejectUnauthorized: false``).
        options: Further options.

    Raises:
        ConfigError: A value is wrong.
    """

    _kinds = _CLIENT
    #: What the constructor was told.
    _SETTINGS = ("_host", "_port", "_services", "_credentials", "_said", "_tls", "_name", "_options")

    def __init__(
        self,
        tunnel_server_host: str,
        tunnel_server_port: int,
        local_service_port: int | None = None,
        authentication_credentials: Mapping[str, Any] | None = None,
        *,
        local_service_host: str | None = None,
        local_service_path: str | PathLike[str] | None = None,
        services: Iterable[Service] | None = None,
        tls: TlsConfig | Credentials | bool | None = False,
        ca: Material | None = None,
        server_hostname: str | None = None,
        danger_accept_any_certificate: bool = False,
        options: ClientOptions | None = None,
    ) -> None:
        super().__init__()
        self._host = host_name(tunnel_server_host, "tunnel_server_host")
        self._port = whole(tunnel_server_port, "tunnel_server_port", 1, 65_535)
        self._services = _exposed(local_service_port, local_service_host, local_service_path, services)
        given: object = {} if authentication_credentials is None else authentication_credentials
        if not isinstance(given, Mapping):
            raise config_error("authentication_credentials", "must be a mapping", "wrong_type")
        self._credentials: dict[str, Any] = dict(given)
        self._said = credentials_text(self._credentials, "authentication_credentials")
        self._tls = _client_tls(tls, ca, flag(danger_accept_any_certificate, "danger_accept_any_certificate"))
        if self._tls is None and server_hostname is not None:
            raise unused("server_hostname", "is checked by TLS, which is not asked for")
        self._name = None if server_hostname is None else named(server_hostname, "server_hostname")
        self._options = client_options(options)

    def __repr__(self) -> str:
        return f"TunnelClient({self._host!r}, {self._port}, credentials redacted)"

    @property
    def server(self) -> str:
        """The server's address: ``"tunnel.example:9000"``."""
        return _joined(self._host, self._port)

    def _first(self) -> str:
        """Where its first service is, as the command line says it."""
        one = self._services[0]
        if one["path"] is not None:
            return f"unix:{one['path']}"
        return str(one["port"]) if one["host"] is None else _joined(one["host"], one["port"])

    @property
    def assigned_port(self) -> int | None:
        """The public port of the first service, while there is one."""
        return self.status().port

    @property
    def assigned_ports(self) -> tuple[int, ...]:
        """The public ports of all services in their order, while there are some."""
        return tuple(service.port for service in self.status().services)

    async def start(self) -> None:
        """Starts it, and returns before it is connected: events say how that goes.

        One that failed to start, or to :meth:`connect`, may be started again.

        Raises:
            ApiMisuseError: It was started already.
        """
        mailbox, key = self._begin()
        self._warn_of_pauses()
        try:
            self._native = _native.TunnelClient(
                self._values(),
                self._wanted,
                mailbox,
                key,
            )
        except BaseException:
            self._not_begun()
            raise

    async def reload(self, like: TunnelClient | None = None) -> None:
        """Does from now on what another client would do; no stream is cut.

        Limits are others at once. The address of a service is another from the next visitor on; the server,
        credentials and all else are from the next connection to the server on, services of other names and
        other ports to ask for from the next session on.

        Args:
            like: Another client, which is not started. Without it the files of the TLS configuration are read
                again.

        Raises:
            ConfigError: ``like`` is no such client.
            ClosedError: This client does not run.
        """
        native = self._native
        if not isinstance(native, _native.TunnelClient):
            raise ClosedError("the client does not run")
        if like is None:
            if self._tls is not None:
                await in_own_thread(self._tls.reload)
            return
        given: object = like
        if not isinstance(given, TunnelClient) or given._started:
            raise config_error("like", "must be a client that is not started", "wrong_type")
        native.reload(like._values())
        for name in self._SETTINGS:
            setattr(self, name, getattr(like, name))
        self._warn_of_pauses()

    def _warn_of_pauses(self) -> None:
        """A server that was killed keeps ports for those who come as soon as they do by default."""
        longest = self._options.reconnect_delay[1]
        if self._options.reconnect and longest > LONGEST_PAUSE:
            logger.warning(
                "sapper: reconnect_delay lets this tunnel's client wait %g s: a server that was killed keeps "
                "its public port only for who comes within %g s or so",
                longest,
                LONGEST_PAUSE,
            )

    def _values(self) -> _native.TunnelClientDict:
        """As the binding takes it."""
        options = self._options
        return {
            "host": self._host,
            "port": self._port,
            "services": self._services,
            "credentials": self._said,
            "tls": None if self._tls is None else (self._tls.for_client("tls."), self._name or self._host),
            "lease": options.lease,
            "reconnect": options.reconnect_delay if options.reconnect else None,
            "dial_timeout": options.dial_timeout,
            "send_proxy": options.send_proxy,
            "max_streams": options.max_streams,
            "limits": options.limits._native(),
            "common": options._common(),
        }

    async def connect(self) -> int:
        """Starts it and waits for the public port.

        Returns:
            The public port of the first service.

        If cancelled, the client is stopped.

        Raises:
            SapperError: It ended before it had one.
        """
        stream = self.events()
        try:
            await self.start()
        except BaseException:
            self._forget(stream)
            raise
        try:
            async for event in stream:
                if isinstance(event, events.AuthenticationAcknowledged):
                    return event.assigned_port
        except BaseException:
            if self._native is not None:
                self._native.stop(0.0)
            raise
        finally:
            self._forget(stream)
        if self._error is None:
            raise ClosedError("the client was stopped")
        self._again = True
        raise self._error

    async def stop(self, drain: float = 0.0) -> None:
        """Ends it and waits until everything is closed.

        Args:
            drain: Seconds that open streams have to end by themselves. Called again, it can only be sooner.

        If cancelled, it goes on ending.
        """
        seconds(drain, "drain")
        if self._native is not None:
            self._native.stop(drain)
            await running_post().call(self._native.wait_closed)

    def status(self) -> ClientStatus:
        """The client as of now."""
        if not isinstance(self._native, _native.TunnelClient):
            return ClientStatus(None, 0, 0, 0, 0, 0, 0, 0, None, 0, 0.0)
        return client_status(self._native.stats())

    def visitors(self, *, most: int = 1000) -> tuple[VisitorStatus, ...]:
        """Its visitors as of now, those who came first, at most so many."""
        whole(most, "most", 0, 1_000_000)
        if not isinstance(self._native, _native.TunnelClient):
            return ()
        return tuple(visitor_status(one, at_client=True) for one in self._native.visitors(most))

    async def __aenter__(self) -> Self:
        if self._native is None:
            await self.connect()
        return self

    def _event(self, values: dict[str, Any]) -> events.TunnelEvent | None:
        name = values["name"]
        kind: Callable[..., events.TunnelEvent] | None = _CLIENT.get(name)
        if kind is None:
            return None
        if name == "error":
            return events.GenericError(values["error"])
        if name == "service-error":
            return events.ServiceError(end_of(values) or events.StreamEnd(0), values["error"])
        if name.startswith("data-"):
            return kind(values["bytes"], end_of(values), payload=values["payload"])
        if name.startswith("service-"):
            return kind(end_of(values))
        if name == "tunnel-reconnect-queued":
            return events.TunnelReconnectQueued(values["seconds"])
        if name == "tunnel-client-end":
            return events.TunnelClientEnd()
        way = events.ClientConnection(self._host, self._port, self._tls is not None)
        if name == "authentication-credentials-sent":
            return events.AuthenticationCredentialsSent(way, self._credentials)
        if name == "authentication-acknowledged":
            services = public_services(values["services"])
            return events.AuthenticationAcknowledged(way, values["port"], services, values["secure"])
        if name == "tunnel-disconnected":
            return events.TunnelDisconnected(way, values["error"] is not None)
        if name == "tunnel-error":
            return events.TunnelError(values["error"], client_connection=way)
        return kind(way)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _exposed(
    port: int | None, host: str | None, path: str | PathLike[str] | None, services: Iterable[Service] | None
) -> list[_native.TunnelServiceDict]:
    if services is None:
        if (port is None) == (path is None):
            raise config_error("local_service_port", "a port or a path is needed, and one of them alone")
        if path is not None and host is not None:
            raise unused("local_service_host", "a Unix socket has no host")
        service = one_service(
            None if host is None else host_name(host, "local_service_host"),
            None if port is None else whole(port, "local_service_port", 1, 65_535),
            None if path is None else str(socket_path(path, "local_service_path")),
        )
        return [service]
    for name, value in (
        ("local_service_port", port),
        ("local_service_host", host),
        ("local_service_path", path),
    ):
        if value is not None:
            raise config_error(name, "and services do not go together")
    if not isinstance(services, Iterable):
        raise wrong_type("services", "several of Service", services)
    several: list[object] = list(services)
    if not several:
        raise config_error("services", "must be at least one")
    found = []
    for at, one in enumerate(several):
        if not isinstance(one, PlainService):
            from sapper.tunnel.options import Service

            if not isinstance(one, Service):
                raise config_error(f"services.{at}", "must be a Service", "wrong_type")
        found.append(one._native(first=at == 0))
        # A path need not be text; the name that a service has of it goes to the server.
        text(found[at]["name"], f"services.{at}.name")
        if any(found[at]["name"] == other["name"] for other in found[:at]):
            raise config_error(
                f"services.{at}.name", f"{shown(found[at]['name'])} is the name of another one"
            )
    return found


def _client_tls(
    tls: TlsConfig | Credentials | bool | None, ca: Material | None, accept_any: bool
) -> TlsConfig | None:
    tls = False if tls is None else tls
    if tls is False and ca is None and not accept_any:
        return None
    from sapper.tls.config import TlsConfig

    if isinstance(tls, bool):
        if ca is not None and accept_any:
            raise config_error("danger_accept_any_certificate", "says to ask nobody, but ca is given")
        try:
            return TlsConfig(roots=ca, danger_accept_any_certificate=accept_any)
        except ConfigError as error:
            raise config_error("ca", error.message, error.reason) from None
    if ca is not None or accept_any:
        name = "ca" if ca is not None else "danger_accept_any_certificate"
        raise config_error(name, "belongs into the TlsConfig that is given")
    return TlsConfig.of(tls, field="tls")
