"""How the events of a tunnel are heard: call-backs by name, and asynchronous iterators.

Not here: the events themselves (:mod:`sapper.tunnel.events`), nor what makes them.
"""

from __future__ import annotations

import asyncio
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar

from sapper import _native
from sapper._arguments import callback as check_callback
from sapper._arguments import flag, text
from sapper._event_queue import EventQueue
from sapper._loop import LoopPost, running_post
from sapper._mistakes import config_error
from sapper._owned import dropped, subscribe
from sapper.errors import ApiMisuseError, ErrorContext, NotStartedError, SapperError
from sapper.tunnel import events
from sapper.tunnel.events import (
    ClientTunnel,
    DataEvent,
    EventsLost,
    PublicService,
    StreamEnd,
    TunnelAddress,
    TunnelEvent,
)

__all__ = [
    "Listener",
    "TunnelEvents",
    "TunnelObject",
    "answer_later",
    "credentials_of",
    "end_of",
    "public_services",
    "tunnel_of",
]

logger = logging.getLogger("sapper")

#: Hears an event; what it returns may be awaitable.
Listener = Callable[[Any], object]

#: Events that wait in one iterator at most; one that is further behind hears EventsLost.
WAITING = 1024

#: The two sorts of frequent events, which native code tells only when somebody listens; and whether those of
#: payload carry it.
VISITORS, DATA, PAYLOAD = 1, 2, 4

_SERVER: dict[str, type[events.TunnelEvent]] = {
    one.name: one
    for one in (
        events.GenericError,
        events.MainServerStart,
        events.MainServerEnd,
        events.MainServerError,
        events.ClientConnected,
        events.ClientProtocolConfirmed,
        events.ClientAuthenticationFailed,
        events.ClientError,
        events.ClientDisconnected,
        events.ClientResumed,
        events.TunnelCreated,
        events.TunnelDestroyed,
        events.TunnelError,
        events.VisitorConnected,
        events.VisitorDisconnected,
        events.VisitorError,
        events.DataFromVisitor,
        events.DataToVisitor,
        events.EventsLost,
    )
}
_CLIENT: dict[str, type[events.TunnelEvent]] = {
    one.name: one
    for one in (
        events.TunnelConnectionEstablished,
        events.AuthenticationCredentialsSent,
        events.GenericError,
        events.TunnelProtocolConfirmed,
        events.AuthenticationAcknowledged,
        events.TunnelError,
        events.TunnelDisconnected,
        events.TunnelReconnectQueued,
        events.TunnelClientEnd,
        events.ServiceConnected,
        events.ServiceDisconnected,
        events.ServiceError,
        events.DataToService,
        events.DataFromService,
        events.EventsLost,
    )
}


def _sort(name: str) -> int:
    if name.startswith("data-"):
        return DATA
    return VISITORS if name.startswith(("visitor-", "service-")) else 0


class TunnelEvents(EventQueue[TunnelEvent]):
    """The events of one server or client from the moment of asking, until it is closed."""

    def __init__(self, sorts: int) -> None:
        super().__init__(WAITING, EventsLost)
        #: What it wants.
        self.sorts = sorts

    def put(self, event: TunnelEvent) -> None:
        """Adds an event."""
        if isinstance(event, EventsLost):
            self.miss(event.count)
        else:
            self.add(event)

    def wants(self, sort: int) -> bool:
        """Whether it wants events of this sort."""
        return sort & self.sorts == sort


class TunnelObject(ABC):
    """What a server and a client have in common: they are heard, they end, and one waits for that.

    Whoever starts one keeps it: when it is dropped it ends, with a ResourceWarning.
    """

    _kinds: ClassVar[dict[str, type[TunnelEvent]]] = {}

    def __init__(self) -> None:
        self._listeners: dict[str, list[tuple[Listener, bool]]] = {}
        self._streams: list[TunnelEvents] = []
        self._post: LoopPost | None = None
        self._key = 0
        self._native: _native.TunnelServer | _native.TunnelClient | None = None
        self._error: SapperError | None = None
        self._begun: asyncio.Future[Any] | None = None
        #: Whether it ended before it was there, so that it may be started again.
        self._again = False

    def __del__(self) -> None:
        if getattr(self, "_native", None) is not None:
            dropped(self, self._let_go)

    def _let_go(self) -> None:
        for stream in self._streams:
            stream.end()
        assert self._native is not None  # noqa: S101 - it runs
        self._native.stop(0.0)

    def on(self, name: str, callback: Listener, *, payload: bool = False) -> None:
        """Has ``callback`` called with each event of this name, on the event loop.

        Args:
            name: The event's name: ``"tunnel-created"``, …
            callback: Takes the event; a coroutine function is awaited apart.
            payload: Whether a ``data-*`` event carries the first of its bytes. Without it no payload enters
                Python.

        Raises:
            ConfigError: There is no such event, or it has no payload.
        """
        if text(name, "name") not in self._kinds:
            raise config_error("name", f"{name!r} is no event: {', '.join(self._kinds)}")
        check_callback(callback, "callback")
        if flag(payload, "payload") and _sort(name) != DATA:
            raise config_error("payload", f"{name} carries none")
        self._listeners.setdefault(name, []).append((callback, payload))
        self._watch()

    def off(self, name: str, callback: Listener) -> None:
        """Ends an :meth:`on`; one that was not there is ignored.

        Raises:
            ConfigError: ``name`` is no text.
        """
        listeners = self._listeners.get(text(name, "name"), [])
        for one in listeners:
            if one[0] == callback:
                listeners.remove(one)
                self._watch()
                return

    def events(self, *, data: bool = False, payload: bool = False) -> TunnelEvents:
        """An iterator over the events from now on, until the end; of what has ended there are none.

        Args:
            data: Whether ``data-*`` events are among them.
            payload: Whether they are, and carry the first of their bytes.

        Raises:
            ApiMisuseError: No event loop is running.
        """
        sorts = DATA if flag(data, "data") else 0
        stream = TunnelEvents(VISITORS | (DATA | PAYLOAD if flag(payload, "payload") else sorts))
        if self._started and self._native is None:
            stream.end()
        else:
            self._streams.append(stream)
            self._watch()
        return stream

    def _forget(self, stream: TunnelEvents) -> None:
        if stream in self._streams:
            self._streams.remove(stream)
            self._watch()

    @property
    def error(self) -> SapperError | None:
        """What ended it; ``None`` where it was stopped, or did not end."""
        return self._error

    async def wait_closed(self) -> None:
        """Waits until everything is closed.

        If cancelled, it goes on.

        Raises:
            NotStartedError: It was never started.
        """
        if self._begun is None:
            raise NotStartedError("it was not started")
        native = self._native
        if native is not None:
            await running_post().call(native.wait_closed)

    @property
    def _started(self) -> bool:
        """Whether it runs, or has run: then it is not started again."""
        return self._begun is not None and not self._again

    def _begin(self) -> tuple[_native.Mailbox, int]:
        if self._started:
            raise ApiMisuseError("it was started already", ErrorContext(reason="started"))
        self._post = post = running_post()
        mailbox, self._key = subscribe(post, self._hear)
        self._begun, self._again, self._error = asyncio.get_running_loop().create_future(), False, None
        return mailbox, self._key

    def _not_begun(self) -> None:
        if self._post is not None:
            self._post.unsubscribe(self._key)
        self._post = self._begun = None

    @property
    def _wanted(self) -> int:
        wanted = 0
        for name, listeners in self._listeners.items():
            for _, payload in listeners:
                wanted |= _sort(name) | (PAYLOAD if payload else 0)
        for stream in self._streams:
            wanted |= stream.sorts
        return wanted

    def _watch(self) -> None:
        if self._native is not None:
            self._native.watch(self._wanted)

    def _hear(self, tag: str, value: Any) -> None:
        begun = self._begun
        if tag == "done":
            if begun is not None and not begun.done():
                begun.set_result(value)
        elif tag == "tunnel":
            event = self._event(value)
            if event is not None:
                self._tell(event)
        elif tag == "question":
            self._ask(value)
        elif tag == "lost":
            self._tell(EventsLost(value))
        elif tag == "closed":
            self._end(value)

    def _end(self, error: SapperError | None) -> None:
        self._error = error
        self._native = None  # whoever keeps a closed object keeps no descriptor
        if self._post is not None:
            self._post.unsubscribe(self._key)
        begun = self._begun
        if begun is not None and not begun.done():
            if error is not None:
                begun.set_exception(error)
                begun.exception()  # whoever waits hears it; where nobody does, events told it
            else:
                begun.cancel()
        for stream in self._streams:
            stream.end()
        self._streams.clear()

    def _tell(self, event: TunnelEvent) -> None:
        sort = _sort(event.name)
        bare = event
        if isinstance(event, DataEvent) and event.payload is not None:
            bare = replace(event, payload=None)  # for those who did not ask for it
        for listener, payload in tuple(self._listeners.get(event.name, ())):
            if self._post is not None:
                self._post.run(listener, event if payload else bare)
        for stream in self._streams:
            if stream.wants(sort):
                stream.put(event if stream.wants(PAYLOAD) else bare)

    @abstractmethod
    async def stop(self, drain: float = 0.0) -> None:
        """Ends it, after what is under way was given `drain` seconds."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    @abstractmethod
    def _event(self, values: dict[str, Any]) -> TunnelEvent | None:
        """The event that native code tells in these words; `None` for one that nobody hears."""

    def _ask(self, question: _native.Question) -> None:
        question.give_up()


def end_of(values: dict[str, Any]) -> StreamEnd | None:
    """The visitor, or the connection to a service, that an event is about."""
    stream = values["stream"]
    return None if stream is None else StreamEnd(stream[0], stream[1] or None, stream[2])


def tunnel_of(values: Mapping[str, Any]) -> ClientTunnel:
    """The client and its tunnel that an event is about."""
    if "id" not in values:
        return ClientTunnel(0, "")
    credentials = values["credentials"]
    port = values["tunnel_port"]
    return ClientTunnel(
        values["id"],
        values["client"],
        credentials_of(credentials) if credentials else None,
        TunnelAddress(port) if port else None,
        values["negotiated"],
        public_services(values.get("tunnel_services", ())),
        values["lease"],
    )


def credentials_of(text: str) -> dict[str, Any]:
    """What a client says of itself; the text is what native code took for a JSON object."""
    found: dict[str, Any] = json.loads(text, parse_int=_number)
    return found


def _number(digits: str) -> float:
    try:
        return int(digits)
    except ValueError:  # more of them than Python reads; JavaScript calls that infinite too
        return float(digits)


def public_services(services: Iterable[tuple[str, int, str | None]]) -> tuple[PublicService, ...]:
    """Services with their public ports."""
    return tuple(PublicService(*one) for one in services)


async def answer_later(question: _native.Question, answer: Awaitable[object], deadline: float) -> None:
    """Gives a question the answer of a coroutine: all but True mean no; where it fails there is none."""
    try:
        async with asyncio.timeout(deadline):
            yes = await answer is True
        question.answer(yes)
    except TimeoutError:
        logger.warning(
            "sapper: a filter of the tunnel gave no answer within %g s: nobody is let in", deadline
        )
    except Exception:
        logger.exception("sapper: a filter of the tunnel failed: nobody is let in by that")
    finally:
        question.give_up()
