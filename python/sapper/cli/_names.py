"""Errors in the words of the command line: A, B and options, where the API says ``socket`` and ``chain``.

Not here: whether something is wrong; that is found by what the commands call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sapper._mistakes import again
from sapper.cli._tls_options import tls_words
from sapper.errors import SapperError

__all__ = [
    "OPTIONS",
    "Words",
    "again",
    "in_file",
    "named",
    "naming",
    "of_file",
]

#: What is typed for an argument or an option of the API. What is not here can only be said in --config.
OPTIONS: Mapping[str, str] = {
    **tls_words(),
    "sink_credentials": "--cert",
    "allow_visitors": "--allow",
    "deny_visitors": "--deny",
    "asked_ports": "--ask-ports",
    "asked_hosts": "--ask-host",
    "server_hostname": "--server-name",
    "sink_hostname": "--server-name",
    "direction": "--direction",
    "framing": "--framing",
    "sink_framing": "--sink-framing",
    "max_packet": "--max-packet",
    "records_per_write": "--records-per-write",
    "resync": "--resync",
    "upgrade": "--upgrade",
    "connect_timeout": "--connect-timeout",
    "accept_timeout": "--accept-timeout",
    "handshake_timeout": "--handshake-timeout",
    "idle_timeout": "--idle-timeout",
    "close_timeout": "--drain",
    "tap": "--tap",
    "path": "--tap",
    "tap.path": "--tap",
    "filter": "--tap-filter",
    "tap.filter": "--tap-filter",
    "max_bytes": "--tap-max-bytes",
    "tap.max_bytes": "--tap-max-bytes",
}

#: In a sentence only names that are no words of a language are replaced.
_IN_TEXT = re.compile(r"`(\w+)`|\b(\w*_\w+)\b")


def named(error: SapperError, words: Mapping[str, str] | None = None) -> SapperError:
    """The same error in the words of the command line.

    Args:
        error: What the API raised.
        words: What the API's names are here, where that is not as in ``OPTIONS``.
    """
    field = error.field
    if field is not None and field.startswith("-"):
        return error  # it has them
    known = {**OPTIONS, **(words or {})}

    def word(match: re.Match[str]) -> str:
        return known.get(match[1] or match[2], match[0])

    if field is not None and field not in ("A", "B"):
        field = known.get(field) or _typed(field, known) or field
    return again(error, _IN_TEXT.sub(word, error.message), field)


def _typed(path: str, known: Mapping[str, str]) -> str | None:
    """What is typed for a part of an option: the longest path that has a word, without places in lists."""
    parts = [part for part in re.split(r"[.[\]]", path) if part and not part.isdecimal()]
    # A table that the command line has no word for: its options stand for themselves.
    parts = [part for part in parts[:-1] if part != "credentials"] + parts[-1:]
    tries = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((known[one] for one in tries if one in known), None)


@contextmanager
def naming(words: Mapping[str, str] | None = None) -> Iterator[None]:
    """Errors of the calls inside, in the words of the command line."""
    try:
        yield
    except SapperError as error:
        raise named(error, words) from None


@contextmanager
def in_file(table: str | None) -> Iterator[None]:
    """Errors of a file's table, or of a file that has none: they keep the file's own names."""
    try:
        yield
    except SapperError as error:
        raise of_file(error, table) from None


def of_file(error: SapperError, table: str | None) -> SapperError:
    """The error of a file's table, or of a file that has none, in the file's own names."""
    parts = [f"[{table}]"] if table else []
    if error.field not in (None, table):
        parts.append(str(error.field))
    where = " ".join(parts)
    return again(error, f"{where}: {error.message}" if where else error.message, "--config")


class Words:
    """Errors of the calls inside, in the words of who said what is wrong: the command line, or a file."""

    def __init__(self, words: Mapping[str, str], table: str) -> None:
        self._words = words
        #: The file's table, where it has one.
        self.table: str | None = table
        #: What the file's table said.
        self.in_file: set[str] = set()
        #: What that is called there, where that is not as in the API.
        self.file_words: Mapping[str, str] = {}

    def follow(self, other: Words) -> None:
        """The file says what that one knows of it."""
        self.table, self.in_file, self.file_words = other.table, other.in_file, other.file_words

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, SapperError):
            name = re.split(r"[.[]", error.field or "")[0]
            if name in self.in_file:
                field = self.file_words.get(name, name) + (error.field or "")[len(name) :]
                raise of_file(again(error, error.message, field), self.table) from None
            raise named(error, self._words) from None
