"""Where a TLS server listens (addresses, Unix sockets, what listens already), and which options fit that.

Not here: what is listened for (:mod:`sapper.tls.listener`).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sapper import _arguments, _native, endpoint
from sapper._mistakes import unused
from sapper._options import config_error
from sapper._takeover import must_be_open

__all__ = ["ListenAddress", "where_to_listen"]

#: Where to listen: ``(host, port)``, ``"tcp-listen://[::]:443"``, ``"unix-listen:/path"``, a socket or
#: descriptor that listens already, or several of these.
ListenAddress = (
    tuple[str | None, int]
    | str
    | endpoint.TcpListen
    | endpoint.UnixListen
    | socket.socket
    | int
    | Sequence[socket.socket | int]
)

Begin = Callable[[_native.Mailbox, int], _native.Listener]

#: What is listened at, and which options have a use there.
_KINDS = {
    "tcp": "a TCP port",
    "path": "a path of a Unix socket",
    "abstract": "a Unix socket",
    "adopted": "a socket that listens already",
}
_ONLY_AT = {
    "backlog": ("tcp", "path", "abstract"),
    "reuse_port": ("tcp",),
    "unix_mode": ("path",),
    "replace_stale": ("path",),
    "keepalive": ("tcp", "adopted"),
}
_USUAL = {
    "backlog": 1024,
    "reuse_port": False,
    "unix_mode": None,
    "replace_stale": False,
    "keepalive": None,
}


def where_to_listen(address: ListenAddress, values: _native.ListenerDict) -> tuple[Begin, Callable[[], None]]:
    """How to begin, and what to do with what the caller gave once that has worked.

    Raises:
        ConfigError: It is nothing to listen at, or an option has no use there.
    """
    begin, own, kind = _where(address, values)
    for name, where in _ONLY_AT.items():
        said: object = values[name]  # type: ignore[literal-required]
        if said != _USUAL[name] and kind not in where:
            raise unused(name, f"is for {' or '.join(_KINDS[one] for one in where)}")
    return begin, own


def _where(address: ListenAddress, values: _native.ListenerDict) -> tuple[Begin, Callable[[], None], str]:
    if isinstance(address, str):
        parsed = endpoint.parse(address, field="address")
        if not isinstance(parsed, endpoint.TcpListen | endpoint.UnixListen):
            raise config_error("address", f"{address!r} is nothing to listen at", "not_a_listener")
        address = parsed
    if isinstance(address, endpoint.UnixListen):
        path = address.path
        kind = "abstract" if path.startswith("@") else "path"
        return lambda mailbox, key: _native.Listener.unix(path, values, mailbox, key), _nothing, kind
    if isinstance(address, endpoint.TcpListen):
        address = (address.host, address.port)
    if isinstance(address, tuple) and len(address) == 2 and isinstance(address[0], str | None):
        return _tcp(address[0], address[1], values), _nothing, "tcp"
    if isinstance(address, socket.socket | int):
        return *_adopted([address], values), "adopted"
    several: object = address
    if isinstance(several, bytes | bytearray | memoryview) or not isinstance(several, Iterable):
        raise _arguments.wrong_type("address", "an address or what listens", several)
    return *_adopted(list(address), values), "adopted"


def _tcp(host: str | None, port: object, values: _native.ListenerDict) -> Begin:
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= 65_535:
        raise config_error("address", "a port is a whole number from 0 to 65535")
    where = None if host in (None, "", "::") else host
    if where is not None:
        endpoint.check_host(where, "address")
    return lambda mailbox, key: _native.Listener.tcp(where, port, values, mailbox, key)


def _adopted(given: Sequence[Any], values: _native.ListenerDict) -> tuple[Begin, Callable[[], None]]:
    numbers: list[int] = []
    for one in given:
        number = one.fileno() if isinstance(one, socket.socket) else one
        if not isinstance(number, int) or isinstance(number, bool):
            raise config_error(
                "address", f"must be an address or what listens, not {type(one).__name__}", "wrong_type"
            )
        must_be_open(number, "address")
        numbers.append(number)
    if not numbers:
        raise config_error("address", "names nothing to listen at")

    def own() -> None:
        for one in given:
            if isinstance(one, socket.socket):
                os.close(one.detach())

    return lambda mailbox, key: _native.Listener.adopt(numbers, values, mailbox, key), own


def _nothing() -> None:
    return None
