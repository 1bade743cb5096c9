"""Reads what a person named: certificates, keys, configurations. Not payload, and never without an end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["read_whole"]

#: Larger files are no certificates and no configurations: whoever names a disk or a device is told so.
MOST = 16 * 1024 * 1024


def read_whole(path: Path) -> tuple[bytes, bool]:
    """The content, and whether it can be read again: that of a pipe is there once.

    Raises:
        OSError: It cannot be read, or has more than 16 MiB.
    """
    with path.open("rb") as file:
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return content, regular
