"""The tunnel: any TCP service of a machine, reached through a public port of another one.

- :class:`TunnelServer`: takes clients, gives each a public port. :class:`TunnelClient`: exposes a service.
- :mod:`sapper.tunnel.events`: what happens, by W3PTUNL's names.

Both speak W3PTUNL with the peers that are deployed, and more with each other.
"""

from sapper.tunnel.client import TunnelClient
from sapper.tunnel.options import ClientOptions, Limits, ServerOptions, Service, VisitorLimits
from sapper.tunnel.server import (
    ConnectionFilter,
    ServiceFilter,
    ServiceRequest,
    TunnelServer,
    VisitorFilter,
)
from sapper.tunnel.status import ClientStatus, ServiceStatus, TunnelStatus, VisitorStatus

__all__ = [
    "ClientOptions",
    "ClientStatus",
    "ConnectionFilter",
    "Limits",
    "ServerOptions",
    "Service",
    "ServiceFilter",
    "ServiceRequest",
    "ServiceStatus",
    "TunnelClient",
    "TunnelServer",
    "TunnelStatus",
    "VisitorFilter",
    "VisitorLimits",
    "VisitorStatus",
]
