"""Reads a configuration again at SIGHUP, or when its files have changed: one reload after the other.

What serves waits for none of them: reading goes on in a thread of its own, and an end leaves it there.

Not here: what is read, nor what a reload changes. Nothing here loads typer or rich.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from sapper import _notify
from sapper._files import regular_only
from sapper._own_thread import in_own_thread
from sapper.errors import ConfigError, SapperError

__all__ = ["Files", "read_again", "reloading"]

T = TypeVar("T")

logger = logging.getLogger("sapper")

#: Seconds between two looks at the files of a configuration.
LOOK = 1.0
#: Seconds after which reading is told to take long.
SLOW = 10.0

#: The files that a configuration came from.
Files = Callable[[], Iterable[Path | None]]


async def read_again(again: Callable[[], T]) -> T:
    """What ``again`` reads. Where that takes long, the log says so."""
    reading = asyncio.ensure_future(in_own_thread(again))
    try:
        done, _ = await asyncio.wait({reading}, timeout=SLOW)
        if not done:
            logger.warning("sapper: a reload still reads; what was there stays in use until it has")
        return await reading
    finally:
        reading.cancel()


@contextlib.asynccontextmanager
async def reloading(
    reload: Callable[[], Awaitable[None]],
    told: Callable[[SapperError | None], None],
    *,
    ready: str,
    files: Files | None = None,
) -> AsyncIterator[None]:
    """Reloads at SIGHUP, and when one of the files has changed. Signals that come meanwhile are one more.

    Args:
        reload: Does it.
        told: Hears how it went.
        ready: What the service manager is told afterwards.
        files: The files to look at.
    """
    hang_up = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, hang_up.set)
    seen = _stamps(files()) if files is not None else None

    async def changed() -> None:
        """Returns when there is something to do."""
        nonlocal seen
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(hang_up.wait(), None if files is None else LOOK)
            asked = hang_up.is_set()
            hang_up.clear()
            if files is not None:
                before, seen = seen, await in_own_thread(partial(_stamps, list(files())))
                asked = asked or seen != before
            if asked:
                return

    async def work() -> None:
        while True:
            await changed()
            _notify.reloading()
            error: SapperError | None = None
            try:
                await reload()
            except SapperError as failure:
                error = failure
            except Exception as failure:
                # A defect of ours; but who mends the file has it read all the same.
                logger.exception("sapper: reading the configuration again failed")
                error = ConfigError(f"{type(failure).__name__}: {failure}")
            told(error)
            _notify.ready(ready)

    task = loop.create_task(work())
    try:
        with regular_only():
            yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _stamps(paths: Iterable[Path | None]) -> dict[Path, tuple[int, ...] | None]:
    """What tells that a file is another now."""
    found: dict[Path, tuple[int, ...] | None] = {}
    for path in paths:
        if path is not None:
            try:
                at = path.stat()
            except OSError:
                found[path] = None
            else:
                found[path] = (at.st_mtime_ns, at.st_size, at.st_ino)
    return found
