"""What the data plane warns of, in Python's ``logging``.

A record's logger is named for the part that says it (``sapper.stream.listen``, ``sapper.tls.key_log``); its
message is a sentence with the values behind it, and ``record.sapper`` has these values by name. Native
threads only put it into a bounded queue: whoever hears of native work anyway (:mod:`sapper._loop`) comes by.

Not here: when somebody comes by; events, which are told to who asks for them.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from typing import Any

from sapper import _native

__all__ = ["KEY", "TakeLog", "tell"]

#: Takes lines: whether each is an error, logger, message, values, how many like it were left out, source file
#: and line, thread, time; and how many lines were lost.
TakeLog = Callable[[bool], tuple[list[tuple[bool, str, str, dict[str, str], int, str, int, str, float]], int]]

#: The key under which a mailbox hears that lines wait; no operation has it.
KEY = 0

logger = logging.getLogger("sapper")


def tell(*, last: bool = False, take: TakeLog | None = None) -> None:
    """Hands everything that waits to ``logging``.

    Args:
        last: Nobody will look again: what was left out of repeated warnings is told too.
        take: Takes it, where another native module than ours warns.
    """
    records, lost = (take or _native.take_log)(last)
    for one in records:
        _hand_over(*one)
    if lost:
        logger.warning("sapper: %d warnings were lost: there were more than anybody read", lost)


def _hand_over(
    is_error: bool,
    name: str,
    message: str,
    fields: dict[str, str],
    left_out: int,
    file: str,
    line: int,
    thread: str,
    time: float,
) -> None:
    where = logging.getLogger(name)
    level = logging.ERROR if is_error else logging.WARNING
    if not where.isEnabledFor(level):
        return
    values: dict[str, Any] = dict(fields)
    if left_out:
        values["left_out"] = left_out
    said = [f"{key}={value}" for key, value in fields.items()]
    if left_out:
        said.append(f"{left_out} more like this were left out")
    text = f"sapper: {message}" + (f" ({', '.join(said)})" if said else "")
    record = where.makeRecord(name, level, file, line, "%s", (text,), None, extra={"sapper": values})
    record.created, record.msecs = time, (time % 1) * 1000
    record.threadName, record.thread = thread, 0
    where.handle(record)


# Before logging itself ends, which was loaded first.
atexit.register(tell, last=True)
