"""What other libraries ask of a TLS connection, by the names of Python's ``ssl``: views, no session.

:class:`TlsSession` stands where asyncio's transports have their ``ssl_object``; :class:`SocketView` where
they have their socket. Both only answer questions: keys and descriptor are the data plane's.
"""

from __future__ import annotations

import errno
import socket
import time
from typing import Any

from sapper import _native
from sapper.errors import ApiMisuseError, ErrorContext
from sapper.tls.bridge import HandshakeInfo

__all__ = ["SocketView", "TlsSession"]

_AES_128, _OTHERS = 128, 256


class TlsSession:
    """Answers like an ``ssl.SSLObject`` what was agreed on."""

    def __init__(self, info: HandshakeInfo) -> None:
        self.info = info

    def version(self) -> str:
        """``"TLSv1.2"`` or ``"TLSv1.3"``."""
        return self.info.version

    def cipher(self) -> tuple[str, str, int]:
        """Name of the suite (IANA's), version, and bits of its key."""
        suite = self.info.cipher_suite
        return suite, self.info.version, _AES_128 if "_128_" in suite else _OTHERS

    def compression(self) -> None:
        """Never any."""

    def selected_alpn_protocol(self) -> str | None:
        """The agreed application protocol."""
        return self.info.alpn.decode("ascii", "replace") if self.info.alpn is not None else None

    def getpeercert(self, binary_form: bool = False) -> bytes | dict[str, Any] | None:
        """The peer's certificate: in DER, or as a dictionary like that of ``ssl``.

        Args:
            binary_form: DER rather than a dictionary.
        """
        der = self.info.peer_certificate
        if der is None or binary_form:
            return der
        return describe_certificate(der)

    @property
    def session_reused(self) -> bool:
        """Whether an earlier session was resumed."""
        return self.info.resumed

    @property
    def server_hostname(self) -> str | None:
        """The name that the client asked for (servers)."""
        return self.info.server_name

    @property
    def context(self) -> None:
        """There is no ``ssl.SSLContext`` behind it."""

    def get_channel_binding(self, cb_type: str = "tls-unique") -> bytes | None:
        """``"tls-server-end-point"``; ``"tls-exporter"`` is :meth:`sapper.tls.TlsStream.channel_binding`.

        Args:
            cb_type: The kind of binding.
        """
        if cb_type == "tls-server-end-point":
            return self.info.server_end_point
        raise ApiMisuseError(
            f"a view gives no channel binding {cb_type}: use channel_binding() of the stream",
            ErrorContext(reason="view"),
        )


class SocketView:
    """Answers for a socket that is the data plane's: family, type and addresses."""

    def __init__(self, local: str | None, peer: str | None) -> None:
        self._local, self._peer = _address(local), _address(peer)
        six = ":" in self._local[0] if self._local else False
        #: Address family.
        self.family = socket.AF_INET6 if six else socket.AF_INET if self._local else socket.AF_UNIX
        #: Always a stream.
        self.type = socket.SOCK_STREAM
        #: TCP, or none.
        self.proto = socket.IPPROTO_TCP if self._local else 0

    def getsockname(self) -> tuple[Any, ...] | str:
        """Our address."""
        return self._local or ""

    def getpeername(self) -> tuple[Any, ...] | str:
        """The peer's address."""
        return self._peer or ""

    def setsockopt(self, level: int, name: int, value: int | bytes | None) -> None:
        """TCP_NODELAY, which is on already. Everything else is refused: keepalive is a listener's option.

        Raises:
            OSError: Another option, or that one off.
        """
        nodelay = (level, name) == (socket.IPPROTO_TCP, socket.TCP_NODELAY)
        if not (nodelay and value and self.proto == socket.IPPROTO_TCP):
            raise OSError(errno.ENOPROTOOPT, "the socket is the data plane's: it keeps its options")

    def fileno(self) -> int:
        """-1: the descriptor is not Python's."""
        return -1


def extra_info(session: TlsSession, local: str | None, peer: str | None, name: str, default: Any) -> Any:
    """A transport's ``get_extra_info``."""
    values: dict[str, Any] = {
        "peername": lambda: _address(peer),
        "sockname": lambda: _address(local),
        "ssl_object": lambda: session,
        "peercert": session.getpeercert,
        "cipher": session.cipher,
        "compression": session.compression,
        "socket": lambda: SocketView(local, peer),
        "tls_info": lambda: session.info,
    }
    found = values.get(name)
    value = found() if found is not None else None
    return default if value is None else value


def _address(text: str | None) -> tuple[Any, ...] | None:
    if text is None:
        return None
    host, _, port = text.rpartition(":")
    if host.startswith("["):
        # As a socket gives it: address, port, flow label, scope.
        address, _, scope = host[1:-1].partition("%")
        return address, int(port), 0, int(scope) if scope.isdigit() else 0
    return host, int(port)


def describe_certificate(der: bytes) -> dict[str, Any]:
    """A certificate as ``ssl.SSLSocket.getpeercert`` shows it."""
    said: dict[str, Any] = dict(_native.describe_certificate(der))
    said["notBefore"], said["notAfter"] = _date(said["notBefore"]), _date(said["notAfter"])
    del said["signatureAlgorithm"]
    if not said["subjectAltName"]:
        del said["subjectAltName"]
    return said


def _date(seconds: int) -> str:
    at = time.gmtime(seconds)
    months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
    clock = f"{at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02}"
    return f"{months[at.tm_mon - 1]} {at.tm_mday:2} {clock} {at.tm_year} GMT"
