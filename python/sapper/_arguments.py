"""Arguments of calls: each function gives the value, or a ConfigError that names the argument.

Not here: options models, which are checked by pydantic (:mod:`sapper._options`), and what only native code
can tell.
"""

from __future__ import annotations

import math
import os
import re
import socket
from pathlib import Path
from typing import Any, Protocol

from sapper._mistakes import config_error, shown
from sapper.errors import ConfigError

__all__ = [
    "MAX_UNIX_NAME",
    "callback",
    "data",
    "file_path",
    "flag",
    "host_name",
    "named",
    "said_path",
    "seconds",
    "socket_path",
    "text",
    "whole",
    "wrong_type",
]

#: Bytes of a Unix socket's name that the system takes.
MAX_UNIX_NAME = 107


#: Characters of a whole host name, and of each of its parts.
_MAX_HOST, _MAX_LABEL = 253, 63

#: Named here: where they are asked for, `int | float` would be made anew each time.
_BYTES = (bytes, bytearray, memoryview)
_NUMBER = (int, float)


class _Call(Protocol):
    def __call__(self, *args: Any) -> object: ...


def wrong_type(name: str | None, wanted: str, value: object) -> ConfigError:
    """The error of a value of another type; the value itself is not repeated."""
    return config_error(name, f"must be {wanted}, not {type(value).__name__}", "wrong_type")


def text(value: object, name: str | None) -> str:
    """Text that can be written down as UTF-8."""
    if not isinstance(value, str):
        raise wrong_type(name, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise config_error(name, "holds a character that is none (a lone surrogate)", "not_text") from None
    return value


def named(value: object, name: str) -> str:
    """Text that says something: a host, a name."""
    if not text(value, name):
        raise config_error(name, "must not be empty")
    return str(value)


def host_name(value: object, name: str) -> str:
    """A host's name or address. Refuses what no look-up can find and no address is."""
    host = text(value, name)
    if not host:
        raise config_error(name, "an address needs a host")
    if ":" in host:
        import ipaddress  # few need it

        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise config_error(name, f"{shown(host)} is no IPv6 address", "host") from None
        return host
    labels = host.removesuffix(".").split(".")
    known = all(re.fullmatch(r"[\w-]+", label) and len(label) <= _MAX_LABEL for label in labels)
    if not known or len(host.removesuffix(".")) > _MAX_HOST:
        raise config_error(name, f"{shown(host)} is no host name", "host")
    if re.fullmatch(r"[0-9.]+", host):
        try:
            socket.inet_aton(host)
        except OSError:
            raise config_error(name, f"{shown(host)} is no IPv4 address", "host") from None
    return host


def whole(value: object, name: str, low: int, high: int) -> int:
    """A whole number within bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, "a whole number", value)
    if not low <= value <= high:
        raise config_error(name, f"must be from {low} to {high}", "out_of_range")
    return value


def seconds(value: object, name: str) -> float:
    """Seconds from 0."""
    if isinstance(value, bool) or not isinstance(value, _NUMBER):
        raise wrong_type(name, "a number of seconds", value)
    if not value >= 0:  # not a number is none of these
        raise config_error(name, "must be seconds from 0", "out_of_range")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def flag(value: object, name: str) -> bool:
    """True or False, and nothing that only looks like it."""
    if not isinstance(value, bool):
        raise wrong_type(name, "True or False", value)
    return value


def data(value: object, name: str) -> bytes:
    """Bytes of any kind."""
    if not isinstance(value, _BYTES):
        raise wrong_type(name, "bytes", value)
    return bytes(value)


def callback(value: _Call | None, name: str) -> None:
    """Something to call, or None."""
    if value is not None and not callable(value):
        raise wrong_type(name, "callable", value)


def file_path(value: object, name: str) -> Path:
    """A path in the file system."""
    if not isinstance(value, str | os.PathLike) or isinstance(path := os.fspath(value), bytes):
        raise wrong_type(name, "a path", value)
    if not path:
        raise config_error(name, "must not be empty")
    return said_path(Path(path), name)


def socket_path(value: object, name: str) -> Path:
    """A Unix socket's path: the system takes short ones only."""
    path = file_path(value, name)
    if (length := len(os.fsencode(path))) > MAX_UNIX_NAME:
        raise config_error(
            name, f"a Unix socket's name has 1 to {MAX_UNIX_NAME} bytes, not {length}", "out_of_range"
        )
    return path


def said_path(path: Path, name: str | None) -> Path:
    """A path that the system can be asked for. Its bytes need not be UTF-8."""
    if "\0" in str(path):
        raise config_error(name, "a path holds a zero byte")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise config_error(
            name, "a path holds a character that is none (a lone surrogate)", "not_text"
        ) from None
    return path
