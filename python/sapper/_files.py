"""Reads what a person named: certificates, keys, configurations. Not payload, and never without an end."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["is_pipe", "keep_pipes", "read_whole", "regular_only"]

#: Larger files are no certificates and no configurations: whoever names a disk or a device is told so.
MOST = 16 * 1024 * 1024

#: What came out of pipes, by name and identity; none where nobody asked for that.
_kept: dict[tuple[str, int, int], bytes] | None = None

#: How many have asked that nobody waits for what a pipe will give.
_regular_only = 0


def is_pipe(path: str | Path) -> bool:
    """Whether it is there, but what it holds is there only once."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def keep_pipes() -> None:
    """Has this process remember what came out of a pipe, for everything that reads it later.

    For a command line, where an option is read by several, and again at SIGHUP; a program that names a pipe
    again may mean what is in it by then.
    """
    global _kept  # noqa: PLW0603 - one for the process
    _kept = {} if _kept is None else _kept


@contextlib.contextmanager
def regular_only() -> Iterator[None]:
    """Refuses, inside, what is no regular file: who serves waits for no writer of a pipe.

    What was kept of a pipe is there as before.
    """
    global _regular_only  # noqa: PLW0603 - one for the process
    _regular_only += 1
    try:
        yield
    finally:
        _regular_only -= 1


def read_whole(path: Path) -> tuple[bytes, bool]:
    """The content, and whether it can be read again: that of a pipe is there once.

    Raises:
        OSError: It cannot be read, has more than 16 MiB, or is not there to be read now.
    """
    known = None
    if _kept is not None and is_pipe(path):
        found = path.stat()
        known = str(path), found.st_dev, found.st_ino
        if known in _kept:
            return _kept[known], False
    with _opened(path) as file:
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    if known is not None and _kept is not None:
        _kept[known] = content
    return content, regular


def _opened(path: Path) -> BinaryIO:
    if not _regular_only or path.is_dir():  # a folder is told by the system
        return path.open("rb")
    if not is_pipe(path):
        # It may be a pipe by now.
        file = open(path, "rb", opener=lambda name, how: os.open(name, how | os.O_NONBLOCK))  # noqa: SIM115
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise OSError(errno.EINVAL, "it is no regular file", str(path))
