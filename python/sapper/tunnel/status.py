"""What a tunnel does as of now. Not here: what happens to it, which is :mod:`sapper.tunnel.events`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sapper import _native

__all__ = [
    "ClientStatus",
    "HandshakeStatus",
    "ServiceStatus",
    "TunnelStatus",
    "VisitorStatus",
    "client_status",
    "service_statuses",
    "tunnel_status",
    "visitor_status",
]


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One service of a client as of now.

    Attributes:
        name: What it is called; empty for the client's own.
        port: Its public port.
        visitors: Visitors now.
        visits: Visitors since the tunnel began.
        sent: Bytes to the other end of the tunnel.
        received: Bytes from it.
        refused: Visitors that were sent away, for whatever reason.
        paused: Times that a visitor's bytes waited for a limit of bytes a second.
        cut: Visitors whose bytes in all were used up.
    """

    name: str
    port: int
    visitors: int
    visits: int
    sent: int
    received: int
    refused: int
    paused: int
    cut: int


@dataclass(frozen=True, slots=True)
class TunnelStatus:
    """One tunnel as of now.

    Attributes:
        id: The client's number.
        client_address: Where it comes from.
        port: The public port of its first service.
        negotiated: Whether it is one of our own kind.
        connected: Whether it is there; its visitors wait where it is not.
        streams: Visitors now.
        opened: Visitors since the beginning.
        sent: Bytes to the client.
        received: Bytes from it.
        sent_rate: Bytes a second to the client, over the last one or two.
        received_rate: The same of bytes from it.
        held: Bytes in memory.
        rtt: Seconds of a round trip to the client, where it is known.
        resumes: How often the session went on over a new connection.
        age: Seconds since the tunnel was made.
        services: Each of its services.
    """

    id: int
    client_address: str
    port: int
    negotiated: bool
    connected: bool
    streams: int
    opened: int
    sent: int
    received: int
    sent_rate: int
    received_rate: int
    held: int
    rtt: float | None
    resumes: int
    age: float
    services: tuple[ServiceStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class ClientStatus:
    """A client as of now.

    Attributes:
        port: The public port of its first service, while it has one.
        streams: Visitors now.
        opened: Visitors since its session began.
        sent: Bytes to the server.
        received: Bytes from it.
        sent_rate: Bytes a second to the server, over the last one or two.
        received_rate: The same of bytes from it.
        held: Bytes in memory.
        rtt: Seconds of a round trip to the server, where it is known.
        resumes: How often the session went on over a new connection.
        age: Seconds since it was started.
        services: Each of its services, while they are exposed.
    """

    port: int | None
    streams: int
    opened: int
    sent: int
    received: int
    sent_rate: int
    received_rate: int
    held: int
    rtt: float | None
    resumes: int
    age: float
    services: tuple[ServiceStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class HandshakeStatus:
    """Connections to a server whose clients are not let in yet, as of now.

    Attributes:
        under_way: How many there are.
        gave_way: How many ended because there were ``max_handshakes``, since the server began.
    """

    under_way: int
    gave_way: int


@dataclass(frozen=True, slots=True)
class VisitorStatus:
    """One visitor as of now.

    Attributes:
        tunnel: The ``id`` of its tunnel at a server; 0 at a client.
        number: Counted from 1 in each tunnel, as in events.
        visitor_address: Where it comes from; an original server does not say.
        service: The name of the service that it came to; empty for the client's own.
        age: Seconds since it came.
        from_visitor: Bytes from it.
        to_visitor: Bytes to it.
    """

    tunnel: int
    number: int
    visitor_address: str | None
    service: str
    age: float
    from_visitor: int
    to_visitor: int


def visitor_status(one: _native.TunnelVisitorDict, *, at_client: bool = False) -> VisitorStatus:
    """As the binding tells it. What a client reads from its service is for the visitor."""
    read, written = one["from_socket"], one["to_socket"]
    ways = (written, read) if at_client else (read, written)
    return VisitorStatus(one["tunnel"], one["number"], one["address"], one["service"], one["age"], *ways)


def tunnel_status(one: _native.TunnelStatusDict) -> TunnelStatus:
    """As the binding tells it."""
    return TunnelStatus(
        id=one["id"],
        client_address=one["client"],
        port=one["port"],
        negotiated=one["negotiated"],
        connected=one["connected"],
        streams=one["streams"],
        opened=one["opened"],
        sent=one["sent"],
        received=one["received"],
        sent_rate=one["sent_rate"],
        received_rate=one["received_rate"],
        held=one["held"],
        rtt=one["rtt"],
        resumes=one["resumes"],
        age=one["age"],
        services=service_statuses(one["services"]),
    )


def client_status(one: _native.TunnelClientStatsDict) -> ClientStatus:
    """As the binding tells it."""
    return ClientStatus(
        port=one["port"],
        streams=one["streams"],
        opened=one["opened"],
        sent=one["sent"],
        received=one["received"],
        sent_rate=one["sent_rate"],
        received_rate=one["received_rate"],
        held=one["held"],
        rtt=one["rtt"],
        resumes=one["resumes"],
        age=one["age"],
        services=service_statuses(one["services"]),
    )


def service_statuses(services: Iterable[_native.TunnelServiceStatsDict]) -> tuple[ServiceStatus, ...]:
    """What native code says of services."""
    return tuple(
        ServiceStatus(
            name=one["name"],
            port=one["port"],
            visitors=one["visitors"],
            visits=one["visits"],
            sent=one["sent"],
            received=one["received"],
            refused=one["refused"],
            paused=one["paused"],
            cut=one["cut"],
        )
        for one in services
    )
