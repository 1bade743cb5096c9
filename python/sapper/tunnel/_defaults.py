"""What a tunnel's options are where none are given.

The models that check options (:mod:`sapper.tunnel.options`) take a third of the memory of a process with an
idle tunnel; a program that gives none does not load them. Its values are those of the models, by a test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from sapper._arguments import wrong_type
from sapper._mistakes import config_error

if TYPE_CHECKING:
    from sapper import _native
    from sapper.tunnel.options import ClientOptions, ServerOptions

__all__ = [
    "ClientDefaults",
    "CommonDefaults",
    "NoLimits",
    "PlainLimits",
    "PlainService",
    "ServerDefaults",
    "client_options",
    "credentials_text",
    "one_service",
    "server_options",
]


#: Bytes of a handshake, by the original's wire format.
LONGEST_HANDSHAKE = 65_536


@dataclass(frozen=True)
class NoLimits:
    """What limits are that limit nothing."""

    def _native(self) -> _native.TunnelLimitsDict:
        return {
            "bytes_per_second": None,
            "total_bytes": None,
            "visitors": None,
            "visits": None,
            "total_visits": None,
        }


@dataclass(frozen=True)
class PlainLimits(NoLimits):
    """Limits that were checked, as the binding takes them."""

    values: _native.TunnelLimitsDict

    def _native(self) -> _native.TunnelLimitsDict:
        return self.values


@dataclass(frozen=True)
class CommonDefaults:
    """Of both ends."""

    handshake_timeout: float = 10.0
    grace: float = 60.0
    overflow: Literal["pause", "reset"] = "pause"

    def _common(self, linger: float = 0.0) -> _native.TunnelCommonDict:
        return {
            "handshake_timeout": self.handshake_timeout,
            "grace": self.grace,
            "overflow": self.overflow,
            "linger": linger,
        }


@dataclass(frozen=True)
class ServerDefaults(CommonDefaults):
    """Of a server."""

    host: str | None = None
    visitor_host: str | None = None
    public_ports: tuple[int, int] = (10_000, 32_767)
    asked_ports: tuple[tuple[int, int], ...] | None = None
    asked_hosts: tuple[str, ...] = ()
    max_services: int = 64
    linger: float = 5.0
    filter_timeout: float = 10.0
    allow_visitors: tuple[str, ...] | None = None
    deny_visitors: tuple[str, ...] = ()
    visitor_rate: float | None = None
    visitor_burst: int = 20
    max_clients: int = 1_024
    max_handshakes: int = 256
    max_visitors: int = 4_096
    max_streams: int = 65_536
    visitor_limits: NoLimits = NoLimits()
    client_limits: NoLimits = NoLimits()
    service_limits: NoLimits = NoLimits()
    lease_file: Path | None = None
    lease_time: float = 604_800.0
    danger_shared_leases: bool = False


@dataclass(frozen=True)
class ClientDefaults(CommonDefaults):
    """Of a client."""

    reconnect: bool = True
    reconnect_delay: tuple[float, float] = (0.5, 30.0)
    dial_timeout: float = 10.0
    send_proxy: Literal["v1", "v2"] | None = None
    max_streams: int = 16_384
    limits: NoLimits = NoLimits()
    lease: str | None = None


@dataclass(frozen=True)
class PlainService:
    """One of several services that was checked, as the binding takes it."""

    values: _native.TunnelServiceDict

    def _native(self, first: bool) -> _native.TunnelServiceDict:
        """Whether it is the first was known when it was checked."""
        del first
        return self.values


def server_options(given: ServerOptions | ServerDefaults | None) -> ServerOptions:
    """The options, or what has the same names and their defaults.

    Raises:
        ConfigError: They are none.
    """
    if given is None:
        return cast("ServerOptions", ServerDefaults())
    if isinstance(given, ServerDefaults):  # checked elsewhere
        return cast("ServerOptions", given)
    from sapper.tunnel.options import ServerOptions

    if not isinstance(given, ServerOptions):
        raise wrong_type("options", "ServerOptions", given)
    return given


def client_options(given: ClientOptions | ClientDefaults | None) -> ClientOptions:
    """The same for a client.

    Raises:
        ConfigError: They are none.
    """
    if given is None:
        return cast("ClientOptions", ClientDefaults())
    if isinstance(given, ClientDefaults):
        return cast("ClientOptions", given)
    from sapper.tunnel.options import ClientOptions

    if not isinstance(given, ClientOptions):
        raise wrong_type("options", "ClientOptions", given)
    return given


def credentials_text(given: Mapping[str, Any], name: str) -> str:
    """What a client says of itself, as it travels.

    Raises:
        ConfigError: JSON cannot say it, or it is longer than a handshake.
    """
    try:
        said = json.dumps(dict(given), separators=(",", ":"), allow_nan=False)
        json.loads(said, object_pairs_hook=_each_once)
    except (TypeError, ValueError):
        raise config_error(name, "JSON cannot say this") from None
    except RecursionError:
        raise config_error(name, "is nested too deep") from None
    if len(said) > LONGEST_HANDSHAKE:
        raise config_error(
            name, f"the handshake has {len(said)} bytes, maximum is {LONGEST_HANDSHAKE}", "out_of_range"
        )
    return said


def _each_once(pairs: list[tuple[str, Any]]) -> None:
    """JSON's names are text: 1 and "1" are the same, and who reads that hears of one of them."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError


def one_service(host: str | None, port: int | None, path: str | None) -> _native.TunnelServiceDict:
    """A client's only service, as the binding takes it."""
    return {
        "name": "",
        "host": host,
        "port": port or 0,
        "path": path,
        "public_ports": None,
        "public_host": None,
        "limits": NoLimits()._native(),
    }
