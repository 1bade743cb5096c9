"""Endpoints by name: what a string or a small frozen dataclass says about one end of a bridge.

========================================  =====================================================
text                                      what it is
========================================  =====================================================
``tcp://host:port``                       a TCP connection (happy eyeballs over IPv6 and IPv4)
``tcp-listen://[::]:443``                 one connection that is accepted
``tls://host:port?alpn=h2``               TLS over TCP, as client
``tls-listen://[::]:443``                 TLS over TCP, as server
``unix:/path``, ``unix-listen:/path``     a Unix stream socket
``dgram:/path?bind=/own``                 a Unix datagram socket: packets
``seqpacket:/path``                       a Unix seqpacket socket: packets
``udp://host:port?bind=[::]:0``           a connected UDP socket: packets
``tun:name?mtu=1280&address=fd00::1/64``  a TUN interface: IP packets
``tap:name``                              a TAP interface: Ethernet frames
``fd:3``, ``fd:3,4``                      a descriptor, or one to read and one to write
``stdio:``                                standard input and output
``file:/path?mode=w``                     a file
``null:``, ``counter:``                   throws everything away; the second counts packets
========================================  =====================================================

:func:`parse` reads them, ``str()`` writes them, and both agree. An IPv6 address stands in brackets.

Not here: objects that a program already has (sockets, transports); those go to
:func:`sapper.tls.create_bridge` as they are.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self
from urllib.parse import parse_qsl, quote, unquote, unquote_to_bytes, urlencode

from sapper import _arguments
from sapper._mistakes import unused
from sapper._options import config_error
from sapper.errors import ConfigError

__all__ = [
    "Counter",
    "Endpoint",
    "Fd",
    "File",
    "Null",
    "Seqpacket",
    "Stdio",
    "Tap",
    "Tcp",
    "TcpListen",
    "Tls",
    "TlsListen",
    "Tun",
    "Udp",
    "Unix",
    "UnixDatagram",
    "UnixListen",
    "parse",
]

#: What stands before each packet of a TUN: nothing, Linux packet information, the macOS utun word,
#: or the 10 bytes of a virtio-net header.
TunHeader = Literal["none", "pi", "utun", "vnet"]
_MAX_INTERFACE_NAME = 15
#: What IPv4 asks of every link (RFC 791).
_SMALLEST_MTU = 68
_LARGEST_DESCRIPTOR = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One end of a bridge, described and not opened yet."""

    scheme: ClassVar[str] = ""
    #: Whether it carries whole packets rather than a stream of bytes; ``None``: known when it is opened.
    packets: ClassVar[bool | None] = False

    def __str__(self) -> str:
        return f"{self.scheme}:{self._body()}{self._query()}"

    def _body(self) -> str:
        return ""

    def _query(self) -> str:
        pairs: list[tuple[str, str]] = []
        for one in fields(self):
            write = one.metadata.get("write")
            value = getattr(self, one.name)
            if write is not None and value != one.default:
                pairs += [(one.metadata.get("name", one.name), text) for text in write(value)]
        return (
            "?" + urlencode(pairs, quote_via=quote, safe="/:[],+", errors="surrogateescape") if pairs else ""
        )

    @classmethod
    def _parse(cls, body: str, options: list[tuple[str, str]]) -> Self:
        return cls(**cls._read_body(body), **cls._read_options(options))

    @classmethod
    def _read_body(cls, body: str) -> dict[str, Any]:
        if body:
            raise ValueError(f"nothing may follow {cls.scheme}:")
        return {}

    @classmethod
    def _read_options(cls, options: list[tuple[str, str]]) -> dict[str, Any]:
        known = {one.metadata.get("name", one.name): one for one in fields(cls) if "read" in one.metadata}
        values: dict[str, Any] = {}
        for name, text in options:
            one = known.get(name)
            if one is None:
                takes = f"its options are {', '.join(known)}" if known else "it takes no options"
                raise ValueError(f"{cls.scheme}: has no option {name!r}; {takes}")
            if one.metadata.get("many"):
                values[one.name] = (*values.get(one.name, ()), *one.metadata["read"](text))
            elif one.name in values:
                raise ValueError(f"the option {name} is given twice")
            else:
                values[one.name] = one.metadata["read"](text)
        return values


def _option(
    default: Any,
    read: Callable[[str], Any],
    write: Callable[[Any], list[str]] = lambda value: [str(value)],
    *,
    name: str | None = None,
    many: bool = False,
) -> Any:
    metadata: dict[str, Any] = {"read": read, "write": write, "many": many}
    if name is not None:
        metadata["name"] = name
    return field(default=default, metadata=metadata)


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")
        return text

    return read


def _check_word(value: object, name: str, *words: str) -> None:
    if not isinstance(value, str):
        raise _arguments.wrong_type(name, "text", value)
    if value not in words:
        raise config_error(name, f"{value!r} is none of {', '.join(words)}")


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise ValueError(f"{text!r} is no whole number from {low} to {high}")
        return int(text)

    return read


def _switch(text: str) -> bool:
    return _one_of("on", "off")(text) == "on"


def split_address(text: str, default_host: str | None = None) -> tuple[str, int]:
    """``host:port`` with an IPv6 address in brackets.

    Raises:
        ValueError: It is not that.
    """
    match = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*)):([0-9]{1,5})", text)
    if match is None and (url := _of_url(text)) is not None:
        raise ValueError(f"{text!r} is a URL: write host:port, here {url[1]}")
    if match is None:
        raise ValueError(f"{text!r} is not host:port (an IPv6 address stands in brackets: [::1]:443)")
    if match[1] is not None:
        try:
            ipaddress.IPv6Address(match[1])
        except ValueError:
            raise ValueError(f"{match[1]!r} in brackets is no IPv6 address") from None
        host = match[1]
    else:
        host = unquote(match[2]) or (default_host or "")
    if not host:
        raise ValueError(f"{text!r} names no host")
    return host, _whole(0, 65535)(match[3])


def _of_url(text: str) -> tuple[str, str] | None:
    """The scheme and ``host:port`` of a web address, with the port that it does not say."""
    url = re.fullmatch(r"(https?)://([^/?#@]+)(?:[/?#].*)?", text)
    if url is None:
        return None
    says_port = re.search(r":[0-9]+$", url[2]) is not None
    return url[1], url[2] if says_port else f"{url[2]}:{443 if url[1] == 'https' else 80}"


def secure_url(text: str) -> str | None:
    """``host:port`` of an ``https://`` address; ``None`` where it is none."""
    url = _of_url(text)
    return url[1] if url is not None and url[0] == "https" else None


def check_host(value: object, name: str = "host") -> None:
    """Refuses what no look-up can find and no address is."""
    _arguments.host_name(value, name)


def join_address(host: str, port: int) -> str:
    """The opposite of :func:`split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{quote(host, safe='')}:{port}"


def _must_be_text(field: str, text: str) -> None:
    """Refuses halves of characters, which nothing outside of Python can be given."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise config_error(field, f"{text!r} holds half a character") from None


@dataclass(frozen=True, slots=True)
class _HostPort(Endpoint):
    host: str
    """Name or address."""
    port: int
    """Port, 1 to 65535; a listener's may be 0."""

    def __post_init__(self) -> None:
        check_host(self.host)
        _arguments.whole(self.port, "port", 0, 65535)
        if self.port == 0 and not self.scheme.endswith("-listen"):
            raise config_error("port", "nobody can be reached at port 0", "out_of_range")

    def _body(self) -> str:
        return f"//{join_address(self.host, self.port)}"

    @classmethod
    def _read_body(cls, body: str) -> dict[str, Any]:
        if not body.startswith("//"):
            raise ValueError(f"is written {cls.scheme}://host:port")
        host, port = split_address(
            body[2:].removesuffix("/"), "::" if cls.scheme.endswith("-listen") else None
        )
        return {"host": host, "port": port}


@dataclass(frozen=True, slots=True)
class Tcp(_HostPort):
    """A TCP connection; a name is tried over IPv6 and IPv4 side by side."""

    scheme: ClassVar[str] = "tcp"


@dataclass(frozen=True, slots=True)
class TcpListen(_HostPort):
    """A TCP listener of which one connection is accepted; port 0 lets the system choose."""

    scheme: ClassVar[str] = "tcp-listen"


def _check_protocols(value: object) -> None:
    if not isinstance(value, tuple):
        raise _arguments.wrong_type("alpn", "a tuple of names", value)
    for name in value:
        if not 1 <= len(_arguments.text(name, "alpn").encode()) <= 255 or "," in name:
            raise config_error("alpn", "a protocol's name has 1 to 255 bytes and no comma")


def _protocols(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if any(not 1 <= len(name) <= 255 for name in names):
        raise ValueError("a protocol's name has 1 to 255 characters")
    return names


@dataclass(frozen=True, slots=True)
class Tls(_HostPort):
    """TLS over TCP, as client. Credentials come from the bridge's ``credentials``."""

    scheme: ClassVar[str] = "tls"
    alpn: tuple[str, ...] = _option((), _protocols, lambda value: [",".join(value)])
    """Application protocols, best first."""
    server_name: str | None = _option(None, str)
    """Name to check and to send, where it is not the host."""

    def __post_init__(self) -> None:
        _HostPort.__post_init__(self)
        _check_protocols(self.alpn)
        if self.server_name is not None:
            check_host(self.server_name, "server_name")


@dataclass(frozen=True, slots=True)
class TlsListen(_HostPort):
    """TLS over one accepted TCP connection, as server."""

    scheme: ClassVar[str] = "tls-listen"
    alpn: tuple[str, ...] = _option((), _protocols, lambda value: [",".join(value)])
    """Application protocols, best first."""

    def __post_init__(self) -> None:
        _HostPort.__post_init__(self)
        _check_protocols(self.alpn)


@dataclass(frozen=True, slots=True)
class Udp(_HostPort):
    """A connected UDP socket: each datagram is a packet."""

    scheme: ClassVar[str] = "udp"
    packets: ClassVar[bool | None] = True
    bind: tuple[str, int] | None = _option(None, split_address, lambda value: [join_address(*value)])
    """Own address; ``None`` lets the system choose."""

    def __post_init__(self) -> None:
        _HostPort.__post_init__(self)
        bind: object = self.bind
        if bind is None:
            return
        if not (isinstance(bind, tuple) and len(bind) == 2):
            raise _arguments.wrong_type("bind", "(address, port)", bind)
        try:
            ipaddress.ip_address(_arguments.text(bind[0], "bind"))
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise config_error("bind", f"{bind[0]!r} is no address of this machine", "host") from None
        _arguments.whole(bind[1], "bind", 0, 65535)


def _check_path(value: object, name: str) -> bytes:
    if not isinstance(value, str):
        raise _arguments.wrong_type(name, "text", value)
    if not value:
        raise config_error(name, "a path is empty")
    if "\0" in value:
        raise config_error(name, "a path holds a zero byte")
    try:
        return os.fsencode(value)
    except UnicodeEncodeError:
        raise config_error(name, "holds a character that is none (a lone surrogate)", "not_text") from None


def _check_socket_name(value: object, name: str = "path") -> None:
    """A Unix socket's name is short; an abstract one begins after its @."""
    length = len(_check_path(value, name).removeprefix(b"@"))
    if not 0 < length <= _arguments.MAX_UNIX_NAME:
        raise config_error(
            name,
            f"a Unix socket's name has 1 to {_arguments.MAX_UNIX_NAME} bytes, not {length}",
            "out_of_range",
        )


@dataclass(frozen=True, slots=True)
class _Path(Endpoint):
    path: str
    """Path in the file system."""

    def __post_init__(self) -> None:
        _check_path(self.path, "path")

    def _body(self) -> str:
        return quote(os.fsencode(self.path), safe="/@:+,=~ ")

    @classmethod
    def _read_body(cls, body: str) -> dict[str, Any]:
        path = os.fsdecode(unquote_to_bytes(os.fsencode(body)))
        if path.startswith("//"):
            path = "/" + path.lstrip("/")  # unix:///path is how others write it
        if not path:
            raise ValueError(f"is written {cls.scheme}:/path")
        return {"path": path}


@dataclass(frozen=True, slots=True)
class _Socket(_Path):
    path: str
    """Path in the file system; one that begins with ``@`` is an abstract name (Linux)."""

    def __post_init__(self) -> None:
        _check_socket_name(self.path)


@dataclass(frozen=True, slots=True)
class Unix(_Socket):
    """A connection to a Unix stream socket."""

    scheme: ClassVar[str] = "unix"


@dataclass(frozen=True, slots=True)
class UnixListen(_Socket):
    """A Unix stream listener of which one connection is accepted; the path is removed afterwards."""

    scheme: ClassVar[str] = "unix-listen"


@dataclass(frozen=True, slots=True)
class UnixDatagram(_Socket):
    """A Unix datagram socket: each datagram is a packet."""

    scheme: ClassVar[str] = "dgram"
    packets: ClassVar[bool | None] = True
    bind: str | None = _option(None, str)
    """Own path, without which the other side cannot answer."""

    def __post_init__(self) -> None:
        _Socket.__post_init__(self)
        if self.bind is not None:
            _check_socket_name(self.bind, "bind")


@dataclass(frozen=True, slots=True)
class Seqpacket(_Socket):
    """A Unix seqpacket socket: a connection that keeps whole packets."""

    scheme: ClassVar[str] = "seqpacket"
    packets: ClassVar[bool | None] = True


@dataclass(frozen=True, slots=True)
class File(_Path):
    """A file, FIFO or device by its path."""

    scheme: ClassVar[str] = "file"
    mode: Literal["r", "w", "a", "r+"] = _option("r", _one_of("r", "w", "a", "r+"))
    """``"r"`` reads, ``"w"`` replaces, ``"a"`` appends, ``"r+"`` reads and writes."""

    def __post_init__(self) -> None:
        _Path.__post_init__(self)
        _check_word(self.mode, "mode", "r", "w", "a", "r+")


@dataclass(frozen=True, slots=True)
class Fd(Endpoint):
    """A descriptor of this process by its number. It is duplicated: the caller keeps and closes its own."""

    scheme: ClassVar[str] = "fd"
    packets: ClassVar[bool | None] = None
    read: int
    """The descriptor, or the one to read from."""
    write: int | None = None
    """The one to write to, where it is another."""
    header: TunHeader | None = _option(None, _one_of("none", "pi", "utun", "vnet"))  # noqa: RUF009
    """What stands before each packet of an adopted TUN; ``None`` asks the kernel."""

    def __post_init__(self) -> None:
        _arguments.whole(self.read, "read", 0, _LARGEST_DESCRIPTOR)
        if self.write is not None:
            _arguments.whole(self.write, "write", 0, _LARGEST_DESCRIPTOR)
        if self.header is not None:
            _check_word(self.header, "header", "none", "pi", "utun", "vnet")
            if self.write is not None:
                raise unused("header", "is for one descriptor: a pair carries bytes, not packets")

    def _body(self) -> str:
        return str(self.read) if self.write is None else f"{self.read},{self.write}"

    @classmethod
    def _read_body(cls, body: str) -> dict[str, Any]:
        numbers = [_whole(0, _LARGEST_DESCRIPTOR)(text) for text in body.split(",")]
        if len(numbers) > 2:
            raise ValueError("is written fd:3, or fd:3,4 for one to read and one to write")
        return dict(zip(("read", "write"), numbers, strict=False))


@dataclass(frozen=True, slots=True)
class Stdio(Endpoint):
    """Standard input and output."""

    scheme: ClassVar[str] = "stdio"


def _networks(text: str) -> tuple[str, ...]:
    try:
        plain = unquote(text)
        if "/" not in plain:
            raise ValueError  # a network of one address is hardly what is meant
        return (str(ipaddress.ip_interface(plain)),)
    except ValueError:
        raise ValueError(
            f"{text!r} is no address with a prefix length, like 10.0.0.1/24 or fd00::1/64"
        ) from None


@dataclass(frozen=True, slots=True)
class _Interface(Endpoint):
    packets: ClassVar[bool | None] = True
    name: str = ""
    """The interface's name; empty lets the system choose."""
    mtu: int | None = _option(None, _whole(_SMALLEST_MTU, 65535))
    """Its MTU in bytes; ``None`` leaves it."""
    addresses: tuple[str, ...] = _option((), _networks, list, name="address", many=True)
    """Addresses with prefix lengths to give it."""
    offload: bool = _option(default=True, read=_switch, write=lambda value: ["on" if value else "off"])
    """Whether the kernel may hand over packets of up to 64 KB."""

    def __post_init__(self) -> None:
        name = _arguments.text(self.name, "name")
        # With %d in it the system chooses a number.
        strange = re.search(r"[/:\s\0]", name) or name in (".", "..") or "%" in name.replace("%d", "", 1)
        if len(name.encode()) > _MAX_INTERFACE_NAME or strange:
            raise config_error(
                "name",
                f"an interface's name has at most {_MAX_INTERFACE_NAME} characters, no / or : or space",
            )
        if self.mtu is not None:
            _arguments.whole(self.mtu, "mtu", _SMALLEST_MTU, 65535)
        _arguments.flag(self.offload, "offload")
        if not isinstance(self.addresses, tuple):
            raise _arguments.wrong_type(
                "addresses", "a tuple of addresses with prefix lengths", self.addresses
            )
        _must_be_text("name", self.name)
        for address in self.addresses:
            try:
                _networks(_arguments.text(address, "addresses"))
            except ConfigError:
                raise
            except ValueError as error:
                raise config_error("addresses", str(error)) from None

    def _body(self) -> str:
        return quote(self.name, safe="")

    @classmethod
    def _read_body(cls, body: str) -> dict[str, Any]:
        return {"name": unquote(body)}


@dataclass(frozen=True, slots=True)
class Tun(_Interface):
    """A TUN interface: IP packets. One that exists is opened, else it is made (which needs CAP_NET_ADMIN)."""

    scheme: ClassVar[str] = "tun"


@dataclass(frozen=True, slots=True)
class Tap(_Interface):
    """A TAP interface: Ethernet frames. One that exists is opened, else it is made."""

    scheme: ClassVar[str] = "tap"


@dataclass(frozen=True, slots=True)
class Null(Endpoint):
    """Takes every byte and gives none."""

    scheme: ClassVar[str] = "null"


@dataclass(frozen=True, slots=True)
class Counter(Endpoint):
    """Takes and counts every packet and gives none."""

    scheme: ClassVar[str] = "counter"
    packets: ClassVar[bool | None] = True


_SCHEMES: dict[str, type[Endpoint]] = {
    one.scheme: one
    for one in (
        Tcp, TcpListen, Tls, TlsListen, Unix, UnixListen, UnixDatagram, Seqpacket, Udp, Tun, Tap, Fd, Stdio,
        File, Null, Counter,
    )
}  # fmt: skip

#: Interface names that nothing else is called: they may stand without ``tun:``.
_BARE_INTERFACE = re.compile(r"(?P<scheme>tun|tap|utun)[0-9]+")


def parse(text: str, *, field: str = "endpoint") -> Endpoint:
    """Reads an endpoint.

    Args:
        text: As in the table above. A bare ``tun0`` or ``tap0`` is the interface of that name.
        field: Name of the argument to blame in an error.

    Raises:
        ConfigError: It is no endpoint; the message says what was expected.
    """
    _arguments.text(field, "field")
    if not isinstance(text, str):
        raise _arguments.wrong_type(field, "text like tcp://host:port", text)
    if (bare := _BARE_INTERFACE.fullmatch(text)) is not None:
        return Tap(name=text) if bare["scheme"] == "tap" else Tun(name=text)
    scheme, colon, rest = text.partition(":")
    kind = _SCHEMES.get(scheme) if colon else None
    if kind is None:
        raise config_error(
            field,
            f"{text!r} is no endpoint: it begins with one of {', '.join(f'{s}:' for s in _SCHEMES)}",
            "scheme",
        )
    body, _, query = rest.partition("?")
    try:
        options = (
            # A plus sign is itself here: only forms write a space with it.
            parse_qsl(
                query.replace("+", "%2B"),
                keep_blank_values=True,
                strict_parsing=True,
                errors="surrogateescape",
            )
            if query
            else []
        )
        return kind._parse(body, options)
    except ConfigError as error:
        raise config_error(field, f"{text!r}: {error}", error.reason) from None
    except UnicodeEncodeError:
        why = "holds a character that is none (a lone surrogate)"
        raise config_error(field, f"{text!r} {why}", "not_text") from None
    except ValueError as error:
        raise config_error(field, f"{text!r}: {error}") from None
