"""Options by name of TLS streams, said once for every function that takes them.

:class:`SessionOptions` are those of every stream, :class:`ServerOptions` of one whose way to the peer is
still to be made, :class:`ClientOptions` of clients. Not here: what TLS itself proves and believes
(:mod:`sapper.tls.config`), and where a listener listens (:mod:`sapper.tls.listener`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from sapper import _arguments, _native
from sapper._mistakes import unused
from sapper.pump_options import PumpOptions, Upgrade, check_policy, options_from
from sapper.tls.bridge import PeerPolicy
from sapper.tls.config import Credentials, TlsConfig

__all__ = ["ClientOptions", "ServerOptions", "SessionOptions"]


class SessionOptions(TypedDict, total=False):
    """Options of every TLS stream. ``None`` is the default."""

    peer_policy: PeerPolicy | None
    """Asked about the peer after its verification and before any data: plain or async. Any answer but True
    within ``policy_timeout``, and any failure, means no."""
    handshake_timeout: float | None
    """Seconds for TLS and the policy together (30; of a listener's connections 10)."""
    idle_timeout: float | None
    """Seconds without a byte in either direction after which the connection ends (never)."""
    close_timeout: float | None
    """Seconds within which :meth:`~sapper.tls.TlsStream.close` delivers what was written (2)."""
    policy_timeout: float | None
    """Seconds for the policy's answer (5)."""
    upgrade: Upgrade | None
    """What the protocol says in clear before TLS: ``"postgres"``, ``"smtp"``, ``"imap"``, …"""


class ServerOptions(SessionOptions, total=False):
    """Options of a stream whose way to the peer may still have to be made."""

    connect_timeout: float | None
    """Seconds for making the connection (30)."""


class ClientOptions(ServerOptions, total=False):
    """Options of a client's stream."""

    credentials: Credentials | TlsConfig | None
    """:class:`~sapper.tls.Credentials`, or a :class:`~sapper.tls.TlsConfig` with all options. ``None`` checks
    the server against the system's roots."""
    server_hostname: str | None
    """Name to check in the server's certificate; ``None`` is the host, where there is one."""
    early_data: bytes
    """First bytes of the connection, sent before the handshake (0-RTT) where an earlier session allows it.
    **Whoever sees them can send them again**, so they must not matter twice; the TlsConfig allows them by
    ``danger_early_data``. ``info.early_data`` tells what became of them."""
    resend_early_data: bool
    """Send ``early_data`` after the handshake where it could not be sent early, or was rejected (False)."""


#: Those that are a pump's.
_OF_PUMPS = (
    "connect_timeout",
    "handshake_timeout",
    "idle_timeout",
    "close_timeout",
    "policy_timeout",
    "upgrade",
)


def known(function: str, kind: type, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuses a name that is no option, as Python does where they are written out, and values of other types.

    Raises:
        TypeError: A name is none.
        ConfigError: A value is of a type that the option never has.
    """
    for name in given:
        if name not in kind.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    if (hostname := given.get("server_hostname")) is not None:
        _arguments.text(hostname, "server_hostname")
    _arguments.callback(given.get("peer_policy"), "peer_policy")
    return given


def check_connecting(options: PumpOptions, way: _native.Endpoint) -> None:
    """Refuses a time for connecting where the stream is given; a default that is written down is none.

    Raises:
        ConfigError: There is one.
    """
    usual = PumpOptions.model_fields["connect_timeout"].default
    if options.connect_timeout != usual and not way.connects():
        raise unused("connect_timeout", "there is nothing to connect to: the stream is given")


def pump_options(given: Mapping[str, Any]) -> PumpOptions:
    """The part of them that is a pump's.

    Raises:
        ConfigError: A value is wrong.
    """
    options = options_from(None, {name: given.get(name) for name in _OF_PUMPS})
    check_policy(options, given.get("peer_policy"))
    return options
