"""Options of a tunnel's two ends, readable from TOML. Not here: credentials, TLS, filters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from sapper import _native
from sapper._options import Options, config_error

__all__ = ["ClientOptions", "ServerOptions"]

_Seconds = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Strict(), Field(ge=1, le=1_000_000)]
_Port = Annotated[int, Strict(), Field(ge=1, le=65_535)]


class _Common(Options):
    handshake_timeout: _Seconds = 10.0
    """Seconds for connecting, for the TLS handshake and for W3PTUNL's, each."""
    grace: _Seconds = 60.0
    """Seconds that streams outlive the connection between the two ends, where both are of our own kind."""
    overflow: Literal["pause", "reset"] = "pause"
    """What happens where an end takes less than it is sent, beyond the bound: the tunnel is read no further
    until there is room, or the stream that holds most is reset."""
    linger: _Seconds = 5.0
    """Seconds of silence for which the close of a visitor who sends no more is held back with an original
    client, which knows no half-close."""

    def _common(self) -> _native.TunnelCommonDict:
        return {
            "handshake_timeout": self.handshake_timeout,
            "grace": self.grace,
            "overflow": self.overflow,
            "linger": self.linger,
        }


class ServerOptions(_Common):
    """Options of a server.

    Raises:
        ConfigError: A value is wrong; ``field`` names it.
    """

    host: str | None = None
    """Where the main port listens. ``None``: every address where there is a filter, else loopback alone."""
    visitor_host: str | None = None
    """Where public ports listen. ``None``: as the main port."""
    public_ports: tuple[_Port, _Port] = (10_000, 32_767)
    """First and last public port; twice the same is a fixed one. The default is below the ports that systems
    give to outgoing connections, so that a client finds its port free again."""
    filter_timeout: _Seconds = 10.0
    """Seconds that a filter has for an answer; none means no."""
    allow_visitors: tuple[str, ...] | None = None
    """Who may visit: addresses, networks (``10.0.0.0/8``), wildcards (``192.168.*``), ranges
    (``10.0.0.5-10.0.0.9``). ``None`` is everybody."""
    deny_visitors: tuple[str, ...] = ()
    """Who may not, whatever ``allow_visitors`` says."""
    visitor_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Visits of one address (IPv6: of one /64) a second, to all tunnels together; ``None`` is no limit."""
    visitor_burst: _Count = 20
    """How many of them may come at once after a pause."""
    max_clients: _Count = 1_024
    """Clients at a time; more wait to be accepted."""
    max_visitors: _Count = 4_096
    """Visitors of one client at a time; more wait to be accepted."""
    lease_file: Path | None = None
    """Where it is kept which public port belongs to whom, so that a restart changes nothing."""
    lease_time: _Seconds = 604_800.0
    """Seconds for which a port belongs to a client that is not there, while there are others."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.public_ports[0] > self.public_ports[1]:
            raise config_error("public_ports", "the first is above the last")
        return self


class ClientOptions(_Common):
    """Options of a client.

    Raises:
        ConfigError: A value is wrong; ``field`` names it.
    """

    reconnect: bool = True
    """Whether it connects again when the connection is gone or refused."""
    reconnect_delay: tuple[_Seconds, _Seconds] = (0.5, 30.0)
    """First and longest pause before it connects again: doubled each time, the second half by chance."""
    dial_timeout: _Seconds = 10.0
    """Seconds that the service has to answer."""
    send_proxy: Literal["v1", "v2"] | None = None
    """The version of the PROXY header by which the service hears who visits; ``None``: it hears nothing.
    Servers of the original do not tell who visits: then the header says that it is not known."""
    lease: str | None = None
    """A name whose public port this client gets at our own servers, whatever its credentials are. Who else
    uses it takes the port over."""
