"""A bounded queue of events between call-backs and one iterator.

Not here: what the events are; :class:`~sapper._life.EventStream` of a pump and
:class:`sapper.tunnel.TunnelEvents` say that.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, Self, TypeVar

from sapper._loop import current_loop
from sapper.errors import ApiMisuseError, ErrorContext

__all__ = ["EventQueue"]

E = TypeVar("E")


class EventQueue(AsyncIterator[E], Generic[E]):
    """Events from the moment of asking until the end, for one iterator on one event loop.

    Args:
        bound: So many events wait; of more only the number is kept.
        lost: Makes the event that tells the number.

    Raises:
        ApiMisuseError: There is no running event loop.
    """

    def __init__(self, bound: int, lost: Callable[[int], E]) -> None:
        loop = current_loop()
        if loop is None:
            raise ApiMisuseError("events() needs a running event loop", ErrorContext(reason="no_loop"))
        self._loop = loop
        self._thread = threading.get_ident()
        self._bound = bound
        self._lost_event = lost
        self._waiting: deque[E] = deque()
        self._lost = 0
        self._last: E | None = None
        self._over = False
        # Of everybody who waits: more than one task may, and the end is for all of them.
        self._wakes: set[asyncio.Future[None]] = set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E:
        """The next event.

        If cancelled, no event is lost.
        """
        while True:
            if self._waiting:
                return self._waiting.popleft()
            if self._lost:
                lost, self._lost = self._lost, 0
                return self._lost_event(lost)
            if self._last is not None:
                last, self._last = self._last, None
                return last
            if self._over:
                raise StopAsyncIteration
            wake = self._loop.create_future()
            self._wakes.add(wake)
            try:
                await wake
            finally:
                self._wakes.discard(wake)

    def add(self, event: E) -> None:
        """Adds an event, from any thread."""
        self._here(self._add, event)

    def miss(self, count: int) -> None:
        """So many events were lost before they came here."""
        self._here(self._miss, count)

    def end(self, last: E | None = None) -> None:
        """No more events come, behind ``last``."""
        self._here(self._end, last)

    def _add(self, event: E) -> None:
        if len(self._waiting) >= self._bound:
            self._lost += 1
        else:
            self._waiting.append(event)

    def _miss(self, count: int) -> None:
        self._lost += count

    def _end(self, last: E | None) -> None:
        self._last = last
        self._over = True

    def _here(self, change: Callable[..., None], *args: object) -> None:
        if threading.get_ident() == self._thread:
            self._changed(change, *args)
        else:
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody listens
                self._loop.call_soon_threadsafe(self._changed, change, *args)

    def _changed(self, change: Callable[..., None], *args: object) -> None:
        change(*args)
        for wake in self._wakes:
            if not wake.done():
                wake.set_result(None)
