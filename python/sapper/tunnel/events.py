"""What happens to a tunnel, one frozen dataclass per event.

The names (``.name``, hyphens kept) are those of W3PTUNL's original: ``server.on("tunnel-created", …)``. Not
here: how events are heard; that is :mod:`sapper.tunnel.hearing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sapper.errors import SapperError
from sapper.events import EventsLost as AnyEventsLost

#: A field is called ``bytes``.
Bytes = bytes

__all__ = [
    "AuthenticationAcknowledged",
    "AuthenticationCredentialsSent",
    "ClientAuthenticationFailed",
    "ClientConnected",
    "ClientConnection",
    "ClientDisconnected",
    "ClientError",
    "ClientProtocolConfirmed",
    "ClientResumed",
    "ClientTunnel",
    "DataEvent",
    "DataFromService",
    "DataFromVisitor",
    "DataToService",
    "DataToVisitor",
    "EventsLost",
    "GenericError",
    "MainServerEnd",
    "MainServerError",
    "MainServerStart",
    "PublicService",
    "ServiceConnected",
    "ServiceDisconnected",
    "ServiceError",
    "StreamEnd",
    "TunnelAddress",
    "TunnelClientEnd",
    "TunnelConnectionEstablished",
    "TunnelCreated",
    "TunnelDestroyed",
    "TunnelDisconnected",
    "TunnelError",
    "TunnelEvent",
    "TunnelProtocolConfirmed",
    "TunnelReconnectQueued",
    "VisitorConnected",
    "VisitorDisconnected",
    "VisitorError",
]


@dataclass(frozen=True, slots=True)
class TunnelAddress:
    """Where visitors come in.

    Attributes:
        port: The public port.
    """

    port: int


@dataclass(frozen=True, slots=True)
class PublicService:
    """A service of a client, and where its visitors come in.

    Attributes:
        name: What it is called; empty for the client's own.
        port: Its public port.
        host: Where that is, where it is not the host at which the client found the server: the server's
            ``visitor_host``, or one that the client asked for.
    """

    name: str
    port: int
    host: str | None = None


@dataclass(frozen=True, slots=True)
class ClientTunnel:
    """One client of a server and its tunnel.

    Attributes:
        id: The connection's, counted from 1 at each server. A tunnel has that of the connection that made
            it, and keeps it when its client comes back over another one.
        client_address: Where the client comes from.
        authentication_credentials: What it said of itself; ``None`` before its handshake. Not in ``repr``.
        tunnel_address: Where visitors of its first service come in; ``None`` before it has a port.
        negotiated: Whether the client is one of our own kind.
        services: All of its services, once they have their ports.
        lease: The name whose ports it wants, where it says one; said behind its credentials.
    """

    id: int
    client_address: str
    # Who keeps something for each tunnel needs a hash; what JSON says has none.
    authentication_credentials: Mapping[str, Any] | None = field(default=None, repr=False, hash=False)
    tunnel_address: TunnelAddress | None = None
    negotiated: bool = False
    services: tuple[PublicService, ...] = ()
    lease: str | None = None


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """A visitor, or the connection to the service that serves one.

    Attributes:
        number: Counted from 1 in each tunnel.
        visitor_address: Where the visitor comes from; an original server does not say.
        service: The name of the service; empty for the client's own.
    """

    number: int
    visitor_address: str | None = None
    service: str = ""


@dataclass(frozen=True, slots=True)
class ClientConnection:
    """A client's way to its server.

    Attributes:
        tunnel_server_host: The server.
        tunnel_server_port: Its main port.
        secure: Whether TLS is spoken.
    """

    tunnel_server_host: str
    tunnel_server_port: int
    secure: bool


@dataclass(frozen=True, slots=True)
class TunnelEvent:
    """Any of them."""

    name: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class EventsLost(TunnelEvent, AnyEventsLost):
    """Events that did not fit the queue.

    Attributes:
        count: How many.
    """

    name: ClassVar[str] = "events-lost"


@dataclass(frozen=True, slots=True)
class GenericError(TunnelEvent):
    """Something failed that belongs to no client of a server; or what ended a client."""

    name: ClassVar[str] = "error"
    err: SapperError


@dataclass(frozen=True, slots=True)
class MainServerStart(TunnelEvent):
    """The server takes clients."""

    name: ClassVar[str] = "main-server-start"
    port: int
    secure: bool


@dataclass(frozen=True, slots=True)
class MainServerEnd(TunnelEvent):
    """The server is closed. Always its last event."""

    name: ClassVar[str] = "main-server-end"


@dataclass(frozen=True, slots=True)
class MainServerError(TunnelEvent):
    """The server cannot go on."""

    name: ClassVar[str] = "main-server-error"
    err: SapperError


@dataclass(frozen=True, slots=True)
class ClientConnected(TunnelEvent):
    """Somebody connected to the main port: once for each ``id``, as :class:`ClientDisconnected`."""

    name: ClassVar[str] = "client-connected"
    client_tunnel: ClientTunnel


@dataclass(frozen=True, slots=True)
class ClientProtocolConfirmed(TunnelEvent):
    """It speaks W3PTUNL."""

    name: ClassVar[str] = "client-protocol-confirmed"
    client_tunnel: ClientTunnel


@dataclass(frozen=True, slots=True)
class ClientAuthenticationFailed(TunnelEvent):
    """The filter did not let it in."""

    name: ClassVar[str] = "client-authentication-failed"
    client_tunnel: ClientTunnel


@dataclass(frozen=True, slots=True)
class ClientError(TunnelEvent):
    """It did not get a tunnel."""

    name: ClassVar[str] = "client-error"
    client_tunnel: ClientTunnel
    err: SapperError


@dataclass(frozen=True, slots=True)
class ClientDisconnected(TunnelEvent):
    """A connection to the main port is gone. Where its session can go on, its visitors wait.

    Attributes:
        client_tunnel: What is known of its client; ``id`` is the connection's, from :class:`ClientConnected`.
        session: The ``id`` of the tunnel that it carried; ``None`` where it was none's.
    """

    name: ClassVar[str] = "client-disconnected"
    client_tunnel: ClientTunnel
    session: int | None = None


@dataclass(frozen=True, slots=True)
class ClientResumed(TunnelEvent):
    """A client came back to its session, and its visitors go on.

    Attributes:
        client_tunnel: The session, by the ``id`` that :class:`TunnelCreated` had; where its client is now.
        connection: The ``id`` of the connection that carries it from now on, from :class:`ClientConnected`.
    """

    name: ClassVar[str] = "client-resumed"
    client_tunnel: ClientTunnel
    connection: int


@dataclass(frozen=True, slots=True)
class TunnelCreated(TunnelEvent):
    """Visitors may come."""

    name: ClassVar[str] = "tunnel-created"
    client_tunnel: ClientTunnel
    client_authentication_credentials: Mapping[str, Any] | None = field(repr=False, hash=False)
    secure: bool


@dataclass(frozen=True, slots=True)
class TunnelDestroyed(TunnelEvent):
    """The public port is closed."""

    name: ClassVar[str] = "tunnel-destroyed"
    client_tunnel: ClientTunnel


@dataclass(frozen=True, slots=True)
class TunnelError(TunnelEvent):
    """The connection between the two ends failed.

    Attributes:
        err: Why.
        client_tunnel: Whose, at a server.
        client_connection: Which, at a client.
    """

    name: ClassVar[str] = "tunnel-error"
    err: SapperError
    client_tunnel: ClientTunnel | None = None
    client_connection: ClientConnection | None = None


@dataclass(frozen=True, slots=True)
class VisitorConnected(TunnelEvent):
    """A visitor came."""

    name: ClassVar[str] = "visitor-connected"
    client_tunnel: ClientTunnel
    visitor: StreamEnd


@dataclass(frozen=True, slots=True)
class VisitorDisconnected(TunnelEvent):
    """A visitor is gone."""

    name: ClassVar[str] = "visitor-disconnected"
    client_tunnel: ClientTunnel
    visitor: StreamEnd


@dataclass(frozen=True, slots=True)
class VisitorError(TunnelEvent):
    """A visitor's connection or its service broke.

    Without a ``visitor`` it never got a stream: it was not let in, or its TLS handshake failed.
    """

    name: ClassVar[str] = "visitor-error"
    client_tunnel: ClientTunnel
    visitor: StreamEnd | None
    err: SapperError


@dataclass(frozen=True, slots=True)
class DataEvent(TunnelEvent):
    """Payload moved. Who asked with ``payload=True`` gets a copy of the first bytes; its size is bounded.

    Attributes:
        bytes: How many bytes moved since the last such event.
        payload: The first of them, where they were asked for.
    """

    bytes: int
    payload: Bytes | None = field(repr=False, kw_only=True, default=None)

    @property
    def lost(self) -> int:
        """Bytes that are not in ``payload``, though they were asked for."""
        return 0 if self.payload is None else self.bytes - len(self.payload)


@dataclass(frozen=True, slots=True)
class DataFromVisitor(DataEvent):
    """So many bytes came since the last such event of the visitor."""

    name: ClassVar[str] = "data-from-visitor"
    client_tunnel: ClientTunnel
    visitor: StreamEnd


@dataclass(frozen=True, slots=True)
class DataToVisitor(DataEvent):
    """So many bytes went since the last such event of the visitor."""

    name: ClassVar[str] = "data-to-visitor"
    client_tunnel: ClientTunnel
    visitor: StreamEnd


@dataclass(frozen=True, slots=True)
class TunnelConnectionEstablished(TunnelEvent):
    """The client is connected to the server."""

    name: ClassVar[str] = "tunnel-connection-established"
    client_connection: ClientConnection


@dataclass(frozen=True, slots=True)
class AuthenticationCredentialsSent(TunnelEvent):
    """The client said who it is."""

    name: ClassVar[str] = "authentication-credentials-sent"
    client_connection: ClientConnection
    authentication_credentials: Mapping[str, Any] = field(repr=False, hash=False)


@dataclass(frozen=True, slots=True)
class TunnelProtocolConfirmed(TunnelEvent):
    """The server speaks W3PTUNL."""

    name: ClassVar[str] = "tunnel-protocol-confirmed"
    client_connection: ClientConnection


@dataclass(frozen=True, slots=True)
class AuthenticationAcknowledged(TunnelEvent):
    """Visitors may come.

    Attributes:
        assigned_port: The public port of the first service.
        services: All of them.
        secure: Whether visitors speak TLS to the server's public ports, as far as it says; one of the
            original does not.
    """

    name: ClassVar[str] = "authentication-acknowledged"
    client_connection: ClientConnection
    assigned_port: int
    services: tuple[PublicService, ...] = ()
    secure: bool = False


@dataclass(frozen=True, slots=True)
class TunnelDisconnected(TunnelEvent):
    """The connection to the server is gone."""

    name: ClassVar[str] = "tunnel-disconnected"
    client_connection: ClientConnection
    had_error: bool


@dataclass(frozen=True, slots=True)
class TunnelReconnectQueued(TunnelEvent):
    """The client connects again in so many seconds."""

    name: ClassVar[str] = "tunnel-reconnect-queued"
    timeout: float


@dataclass(frozen=True, slots=True)
class TunnelClientEnd(TunnelEvent):
    """The client is closed. Always its last event."""

    name: ClassVar[str] = "tunnel-client-end"


@dataclass(frozen=True, slots=True)
class ServiceConnected(TunnelEvent):
    """The service answered, for a visitor."""

    name: ClassVar[str] = "service-connected"
    service: StreamEnd


@dataclass(frozen=True, slots=True)
class ServiceDisconnected(TunnelEvent):
    """The connection to the service is gone."""

    name: ClassVar[str] = "service-disconnected"
    service: StreamEnd


@dataclass(frozen=True, slots=True)
class ServiceError(TunnelEvent):
    """The service could not be reached, or its connection broke."""

    name: ClassVar[str] = "service-error"
    service: StreamEnd
    err: SapperError


@dataclass(frozen=True, slots=True)
class DataToService(DataEvent):
    """So many bytes went since the last such event of the connection."""

    name: ClassVar[str] = "data-to-service"
    service: StreamEnd


@dataclass(frozen=True, slots=True)
class DataFromService(DataEvent):
    """So many bytes came since the last such event of the connection."""

    name: ClassVar[str] = "data-from-service"
    service: StreamEnd
