"""The tunnel: any TCP service of a machine, reached through a public port of another one.

- :class:`TunnelServer`: takes clients, gives each a public port. :class:`TunnelClient`: exposes a service.
- :mod:`sapper.tunnel.events`: what happens, by W3PTUNL's names.

Both speak W3PTUNL with the peers that are deployed, and more with each other.
"""

from typing import TYPE_CHECKING, Any

from sapper.tunnel.client import TunnelClient
from sapper.tunnel.server import (
    ConnectionFilter,
    ServiceFilter,
    ServiceRequest,
    TunnelServer,
    VisitorFilter,
)
from sapper.tunnel.status import (
    ClientStatus,
    HandshakeStatus,
    ServiceStatus,
    TunnelStatus,
    VisitorStatus,
)

if TYPE_CHECKING:
    from sapper.tunnel.options import ClientOptions, Limits, ServerOptions, Service, VisitorLimits

__all__ = [
    "ClientOptions",
    "ClientStatus",
    "ConnectionFilter",
    "HandshakeStatus",
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

#: Where the names are that are loaded when somebody asks: what checks options is large.
_LATER = dict.fromkeys(("ClientOptions", "Limits", "ServerOptions", "Service", "VisitorLimits"), "options")


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return found
