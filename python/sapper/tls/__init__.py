"""TLS: credentials, configuration, streams, and the bridge that moves payload natively.

- :class:`Credentials` and :class:`TlsConfig`: what both ends prove and believe.
- :func:`connect`, :func:`start_client`, :func:`start_server`: TLS as a stream that a program reads and
  writes.
- :func:`listen`: a server of such streams.
- :func:`create_bridge`: TLS over one endpoint, cleartext at another, no byte in Python.
- :class:`Proxy`: TLS in front of services, or to them, for any number of connections, no byte in Python.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sapper.tls.bridge import Bridge, CdTunnelParameters, HandshakeInfo, Peer, create_bridge
    from sapper.tls.config import Credentials, PeerRules, TlsConfig
    from sapper.tls.listener import TlsListener, listen
    from sapper.tls.proxy import Proxy
    from sapper.tls.proxy_options import ProxyOptions, Route
    from sapper.tls.reload import TlsWatch
    from sapper.tls.stream import TlsStream, connect, start_client, start_server

__all__ = [
    "Bridge",
    "CdTunnelParameters",
    "Credentials",
    "HandshakeInfo",
    "Peer",
    "PeerRules",
    "Proxy",
    "ProxyOptions",
    "Route",
    "TlsConfig",
    "TlsListener",
    "TlsStream",
    "TlsWatch",
    "connect",
    "create_bridge",
    "listen",
    "start_client",
    "start_server",
]

#: Where each name is, loaded when somebody asks: a configuration does not cost listeners and proxies.
_HOME = {
    "Bridge": "bridge",
    "CdTunnelParameters": "bridge",
    "Credentials": "config",
    "HandshakeInfo": "bridge",
    "Peer": "bridge",
    "PeerRules": "config",
    "Proxy": "proxy",
    "ProxyOptions": "proxy_options",
    "Route": "proxy_options",
    "TlsConfig": "config",
    "TlsListener": "listener",
    "TlsStream": "stream",
    "TlsWatch": "reload",
    "connect": "stream",
    "create_bridge": "bridge",
    "listen": "listener",
    "start_client": "stream",
    "start_server": "stream",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
