"""Waits for what may never come back, in a way that nothing else has to wait for it.

A read of a file system that hangs cannot be ended. A thread of asyncio's pool that is in one holds the end of
the process: this one is nobody's.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["in_own_thread"]

T = TypeVar("T")


async def in_own_thread(function: Callable[[], T]) -> T:
    """What the function gives, called in a thread of its own. Cancelled, the thread is left to itself."""
    loop = asyncio.get_running_loop()
    given: asyncio.Future[T] = loop.create_future()

    def tell(say: Callable[[], None]) -> None:
        if not given.done():
            say()

    def work() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - who waits has it
            failure = error
            say: Callable[[], None] = lambda: given.set_exception(failure)  # noqa: E731
        else:
            say = lambda: given.set_result(result)  # noqa: E731
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, say)

    threading.Thread(target=work, name="sapper-reading", daemon=True).start()
    return await given
