"""Options of a tunnel's two ends, readable from TOML. Not here: credentials, TLS, filters."""

from __future__ import annotations

import re
import unicodedata
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, Strict, model_validator

from sapper import _native
from sapper._arguments import host_name, said_path, socket_path, text, whole, wrong_type
from sapper._mistakes import shown, unused
from sapper._options import Options, config_error
from sapper.endpoint import split_address

__all__ = ["ClientOptions", "Limits", "ServerOptions", "Service", "VisitorLimits"]

#: Kinds of characters that names do not hold, and those that turn the direction of text (Unicode UAX #9).
_NOT_SHOWN = frozenset({"Cc", "Zl", "Zp"})
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

_Seconds = Annotated[float, Strict(), Field(ge=0)]
_Pause = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
_Rate = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Strict(), Field(ge=1, le=1_000_000)]
_Bytes = Annotated[int, Strict(), Field(ge=1, le=2**63 - 1)]
_Port = Annotated[int, Strict(), Field(ge=1, le=65_535)]
_Flag = Annotated[bool, Strict()]


def _is_text(said: str) -> str:
    return text(said, "")


def _is_path(path: Path) -> Path:
    return said_path(path, "")


def _is_socket(path: Path) -> Path:
    return socket_path(path, "")


def _is_address(said: str) -> str:
    try:
        ip_address(text(said, ""))
    except ValueError:
        raise config_error(None, f"{shown(said)} is no IP address") from None
    return said


def _is_said(value: object) -> object:
    if value == "":
        raise config_error(None, "must not be empty")
    return value


def _is_host(value: object) -> object:
    return host_name(_is_said(value), "") if isinstance(value, str) else value


def _ports(value: object) -> int | tuple[int, int] | None:
    """One, or the first and the last. By hand: of a union a mistake is told with the names of its types."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        return whole(value, "", 1, 65_535)
    if len(value) != 2:
        raise config_error(None, "must be a port, or the first and the last one", "wrong_type")
    return whole(value[0], "", 1, 65_535), whole(value[1], "", 1, 65_535)


def _holds_port(path: Path) -> Path:
    """One in which ``{port}`` is replaced: that is done in text."""
    if "{port}" in str(path):
        text(str(path), "")
    return path


def _at_most(most: int) -> AfterValidator:
    """What a server passes over where it is longer."""

    def check(said: str) -> str:
        if not 1 <= len(text(said, "").encode()) <= most:
            raise config_error(None, f"must be 1 to {most} bytes long", "out_of_range")
        return said

    return AfterValidator(check)


def _is_printable(name: str) -> str:
    """It goes into logs and labels."""
    if any(unicodedata.category(each) in _NOT_SHOWN or each in _TURNS for each in name):
        raise config_error(None, "must not hold control characters, nor any that turn the direction of text")
    return name


def _is_ranges(given: object) -> object:
    """A single range is written as one in a list, too."""
    if isinstance(given, list | tuple) and given and all(type(each) is int for each in given):
        raise config_error(None, "is a list of ranges, as in [[8000, 8999]]", "wrong_type")
    return given


_Text = Annotated[str, AfterValidator(_is_text)]
_Path = Annotated[Path, AfterValidator(_is_path)]
_Socket = Annotated[Path, AfterValidator(_is_socket)]
_Address = Annotated[str, AfterValidator(_is_address)]
_Host = Annotated[str, BeforeValidator(_is_host)]
_Ports = Annotated[int | tuple[int, int] | None, PlainValidator(_ports)]


class VisitorLimits(Options):
    """What visitors from one address may do, to all tunnels together.

    One IPv6 address is its /64. A limit that is ``None`` is none.

    Raises:
        ConfigError: A value is wrong; ``field`` names it.
    """

    bytes_per_second: _Bytes | None = None
    """Bytes a second in each direction, of all visits of the address. Beyond it the bytes wait."""
    total_bytes: _Bytes | None = None
    """Bytes of one visit, both directions together. Behind the last one it is reset."""
    visitors: _Count | None = None
    """Visits at a time. More are reset."""

    def _native(self) -> _native.TunnelLimitsDict:
        return {
            "bytes_per_second": self.bytes_per_second,
            "total_bytes": self.total_bytes,
            "visitors": self.visitors,
            "visits": None,
            "total_visits": None,
        }


class Limits(Options):
    """What may pass through a client, or to a service. A limit that is ``None`` is none.

    Raises:
        ConfigError: A value is wrong; ``field`` names it.
    """

    bytes_per_second: _Bytes | None = None
    """Bytes a second in each direction, of all visitors. Beyond it the bytes wait; visitors take turns."""
    total_bytes: _Bytes | None = None
    """Bytes in all, both directions together. Behind the last one all visitors are reset."""
    visitors: _Count | None = None
    """Visitors at a time. More are reset."""
    visits_per_second: _Rate | None = None
    """Visits a second. More are reset."""
    visit_burst: _Count = 20
    """How many of them may come at once after a pause."""
    total_visits: _Bytes | None = None
    """Visits in all. More are reset."""

    @model_validator(mode="after")
    def _nothing_unused(self) -> Self:
        if self.visits_per_second is None:
            self._needs("visit_burst", "belongs to visits_per_second, which is not given")
        return self

    def _native(self) -> _native.TunnelLimitsDict:
        rate = self.visits_per_second
        return {
            "bytes_per_second": self.bytes_per_second,
            "total_bytes": self.total_bytes,
            "visitors": self.visitors,
            "visits": None if rate is None else (rate, self.visit_burst),
            "total_visits": self.total_visits,
        }


class Service(Options):
    """A service that a client exposes: a port of this machine, of another one, or a Unix socket.

    Raises:
        ConfigError: A value is wrong; ``field`` names it.
    """

    port: _Port | None = None
    """The service's port, on 127.0.0.1 or ::1, whichever listens; or at ``host``."""
    host: _Host | None = None
    """The service's host, where it is not this machine."""
    path: Annotated[_Socket | None, BeforeValidator(_is_said)] = None
    """A Unix socket instead of a port."""
    name: Annotated[str, _at_most(128), AfterValidator(_is_printable)] | None = None
    """What the server calls it, and whose public port it gets again. Without one the first service of a
    client is the client's own, and each other one is called as its address."""
    public_port: _Ports = None
    """The public port to ask for, or the first and the last that will do. ``None``: any of the server's."""
    public_host: _Address | None = None
    """The address at which the public port is to listen. ``None``: where the server's do."""
    limits: Limits = Limits()
    """What may pass to it; this end sees to that, whatever the server allows. Limits in all are of the
    client's whole life."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.port is None) == (self.path is None):
            raise config_error("port", "a port or a path is needed, and one of them alone")
        if self.path is not None and self.host is not None:
            raise unused("host", "a Unix socket has no host")
        if isinstance(self.public_port, tuple) and self.public_port[0] > self.public_port[1]:
            raise config_error("public_port", "the first is above the last")
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what the command line takes: ``[NAME=]SERVICE[@[ADDRESS:]PORT[-PORT]]``.

        Args:
            text: ``3000``, ``host:3000`` or ``unix:/path``; ``db=5432@8432``, ``3000@8000-8099``,
                ``3000@[::1]:8080``.

        Raises:
            ConfigError: It is none.
        """
        if not isinstance(rest := text, str):
            raise wrong_type("text", "text", rest)
        given: dict[str, Any] = {}
        if named := re.fullmatch(r"([\w.-]+)=(.+)", rest):
            given["name"], rest = named.groups()
        if asked := re.fullmatch(r"(.+)@(?:([\d.]+|\[[\da-fA-F:.]+\]):)?(\d+)(?:-(\d+))?", rest):
            rest, host, first, last = asked.groups()
            given["public_host"] = host and host.strip("[]")
            given["public_port"] = int(first) if last is None else (int(first), int(last))
        if rest.startswith("unix:"):
            given["path"] = rest.removeprefix("unix:")
        elif rest.isascii() and rest.isdigit():
            given["port"] = int(rest)
        else:
            try:
                given["host"], given["port"] = split_address(rest)
            except ValueError as error:
                raise config_error(None, str(error)) from None
        return cls(**given)

    @property
    def address(self) -> str:
        """Where it is, as the command line says it: ``3000``, ``host:3000``, ``unix:/path``."""
        if self.path is not None:
            return f"unix:{self.path}"
        if self.host is None:
            return str(self.port)
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def _native(self, first: bool) -> _native.TunnelServiceDict:
        port = self.public_port
        return {
            "name": self.name or ("" if first else self.address),
            "host": self.host,
            "port": self.port or 0,
            "path": None if self.path is None else str(self.path),
            "public_ports": (port, port) if isinstance(port, int) else port,
            "public_host": self.public_host,
            "limits": self.limits._native(),
        }


class _Common(Options):
    handshake_timeout: _Seconds = 10.0
    """Seconds for connecting, for the TLS handshake and for W3PTUNL's, each."""
    grace: _Seconds = 60.0
    """Seconds that streams outlive the connection between the two ends, where both are of our own kind."""
    overflow: Literal["pause", "reset"] = "pause"
    """What happens where an end takes less than it is sent, beyond the bound: the tunnel is read no further
    until there is room, or the stream that holds most is reset."""

    def _common(self, linger: float = 0.0) -> _native.TunnelCommonDict:
        return {
            "handshake_timeout": self.handshake_timeout,
            "grace": self.grace,
            "overflow": self.overflow,
            "linger": linger,
        }


class ServerOptions(_Common):
    """Options of a server.

    Raises:
        ConfigError: A value is wrong; ``field`` names it.
    """

    host: _Host | None = None
    """Where the main port listens. ``None``: every address where there is a filter, else loopback alone.
    ``::`` is every address too, those of IPv4 included."""
    visitor_host: _Host | None = None
    """Where public ports listen, with the same words. ``None``: as the main port."""
    public_ports: tuple[_Port, _Port] = (10_000, 32_767)
    """First and last public port; twice the same is a fixed one. The default is below the ports that systems
    give to outgoing connections, so that a client finds its port free again."""
    asked_ports: Annotated[tuple[tuple[_Port, _Port], ...] | None, BeforeValidator(_is_ranges)] = None
    """Public ports that a client may ask for, first and last each; an empty one allows none. ``None``: those
    of ``public_ports``. A port outside of those is given to nobody who does not ask for it."""
    asked_hosts: tuple[_Address, ...] = ()
    """Addresses at which a client may ask its public ports to listen, besides ``visitor_host``."""
    max_services: _Count = 64
    """Services of one client; with more it gets none."""
    linger: _Seconds = 5.0
    """Seconds of silence for which the close of a visitor who sends no more is held back with an original
    client, which knows no half-close."""
    filter_timeout: _Seconds = 10.0
    """Seconds that a filter has for an answer. Without one nobody is let in, and who is ours comes again."""
    allow_visitors: tuple[_Text, ...] | None = None
    """Who may visit: addresses, networks (``10.0.0.0/8``), wildcards (``192.168.*``), ranges
    (``10.0.0.5-10.0.0.9``). ``None`` is everybody."""
    deny_visitors: tuple[_Text, ...] = ()
    """Who may not, whatever ``allow_visitors`` says."""
    visitor_rate: _Rate | None = None
    """Visits of one address (IPv6: of one /64) a second, to all tunnels together; ``None`` is no limit."""
    visitor_burst: _Count = 20
    """How many of them may come at once after a pause."""
    max_clients: _Count = 1_024
    """Clients at a time, those included whose session waits for them; more are refused, and come again."""
    max_handshakes: _Count = 256
    """Connections whose client is not let in yet, at a time. Beyond that one gives way to the newcomer: of
    the address that has most of them the one that said least, the oldest of those."""
    max_visitors: _Count = 4_096
    """Visitors of one client at a time; more wait to be accepted."""
    max_streams: _Count = 65_536
    """Visitors of all clients at a time; more are reset."""
    visitor_limits: VisitorLimits = VisitorLimits()
    """What visitors from one address may do."""
    client_limits: Limits = Limits()
    """What may pass for one client: all tunnels, now and later, with the same credentials."""
    service_limits: Limits = Limits()
    """What may pass to one service. Limits in all are of one tunnel."""
    lease_file: Annotated[_Path, AfterValidator(_holds_port)] | None = None
    """Where it is kept which public port belongs to whom, so that a restart changes nothing. ``{port}`` in
    it is the main port. One server alone has it at a time."""
    lease_time: _Seconds = 604_800.0
    """Seconds for which a port belongs to a client that is not there, while there are others."""
    danger_shared_leases: _Flag = False
    """A client's ``lease`` is a name that whoever is let in may use, and take its ports over. Without this it
    is a name among the client's own credentials."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.public_ports[0] > self.public_ports[1]:
            raise config_error("public_ports", "the first is above the last")
        for number, (first, last) in enumerate(self.asked_ports or ()):
            if first > last:
                raise config_error(f"asked_ports.{number}", "the first is above the last")
        if self.visitor_rate is None:
            self._needs("visitor_burst", "belongs to visitor_rate, which is not given")
        return self


class ClientOptions(_Common):
    """Options of a client.

    Raises:
        ConfigError: A value is wrong; ``field`` names it.
    """

    reconnect: _Flag = True
    """Whether it connects again when the connection is gone or refused."""
    reconnect_delay: tuple[_Pause, _Pause] = (0.5, 30.0)
    """First and longest pause before it connects again: doubled each time, the second half by chance. A
    server that was killed keeps the public port only for who comes within 30 s or so."""
    dial_timeout: _Seconds = 10.0
    """Seconds that the service has to answer."""
    send_proxy: Literal["v1", "v2"] | None = None
    """The version of the PROXY header by which the service hears who visits; ``None``: it hears nothing.
    Servers of the original do not tell who visits: then the header says that it is not known."""
    max_streams: Annotated[int, Strict(), Field(ge=1, le=16_384)] = 16_384
    """Visitors of all services at a time; our own servers reset more."""
    limits: Limits = Limits()
    """What may pass to all services together; this end sees to that, whatever the server allows."""
    lease: Annotated[str, _at_most(256)] | None = None
    """A name, of 256 bytes at most, whose public port this client gets at our own servers. Who else uses it
    with the same credentials takes the port over."""

    @model_validator(mode="after")
    def _longer_and_longer(self) -> Self:
        first, longest = self.reconnect_delay
        if first > longest:
            raise config_error("reconnect_delay", "the first pause is above the longest")
        if not self.reconnect:
            self._needs("reconnect_delay", "it does not connect again: reconnect is off")
            self._needs("grace", "nothing outlives the connection: reconnect is off")
        return self
