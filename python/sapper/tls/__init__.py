"""TLS: credentials, configuration, streams, and the bridge that moves payload natively.

- :class:`Credentials` and :class:`TlsConfig`: what both ends prove and believe.
- :func:`connect`, :func:`start_client`, :func:`start_server`: TLS as a stream that a program reads and
  writes.
- :func:`listen`: a server of such streams.
- :func:`create_bridge`: TLS over one endpoint, cleartext at another, no byte in Python.
- :class:`Proxy`: TLS in front of services, or to them, for any number of connections, no byte in Python.
"""

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
