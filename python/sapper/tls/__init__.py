"""TLS: credentials, configuration, and the bridge that moves payload natively.

- :class:`Credentials` and :class:`TlsConfig`: what both ends prove and believe.
- :func:`create_bridge`: TLS over one endpoint, cleartext at another, no byte in Python.
"""

from sapper.tls.bridge import Bridge, CdTunnelParameters, HandshakeInfo, Peer, create_bridge
from sapper.tls.config import Credentials, PeerRules, TlsConfig
from sapper.tls.reload import TlsWatch

__all__ = [
    "Bridge",
    "CdTunnelParameters",
    "Credentials",
    "HandshakeInfo",
    "Peer",
    "PeerRules",
    "TlsConfig",
    "TlsWatch",
    "create_bridge",
]
