"""What the data plane of guests warns of, in Python's ``logging``.

This distribution's native module has its own copy of who warns, whose lines wait in a queue of their own.

Not here: what becomes of a line (:mod:`sapper._log`).
"""

from __future__ import annotations

import atexit
from functools import partial

from sapper import _log
from sapper_wasi import _native
from sapper_wasi._native import LogWaits

__all__ = ["LogWaits", "tell"]


def tell(log: LogWaits) -> None:
    """Hands everything that waits to ``logging``."""
    log.clear()
    _log.tell(take=_native.take_log)


# Before logging itself ends, which was loaded first.
atexit.register(partial(_log.tell, last=True, take=_native.take_log))
