"""What Python hears of one pump's life: events, call-backs, policy questions, the error that ended it.

A :class:`Life` hears the native messages of one pump on its post (event loop or call-backs' thread).
Before the pump works the post hears weakly, because call-backs often lead back to the pump's owner: one
which was never used is collected, in silence. From :meth:`Life.keep` on the post keeps it, and it the pump,
until the end, so that a running pump needs no variable to live in.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

from sapper import _native
from sapper._event_queue import EventQueue
from sapper._loop import LoopPost, Post
from sapper.errors import SapperError
from sapper.events import Closed, Event, EventsLost, Started

__all__ = ["Callback", "ErrorCallback", "EventStream", "Life", "PeerPolicy", "Policy"]

logger = logging.getLogger("sapper")

Callback = Callable[[], object]
ErrorCallback = Callable[[SapperError], object]
#: Turns a question's plain values into what the user's call-back takes, and asks it.
Policy = Callable[[dict[str, Any]], bool | Awaitable[bool]]
PeerPolicy = Policy

#: Events that wait in one iterator at most: a listener that is further behind hears EventsLost.
EVENTS = 256


class EventStream(EventQueue[Event]):
    """The events of one pump from the moment of asking, until it is closed; :class:`Closed` is the last."""

    def __init__(self) -> None:
        super().__init__(EVENTS, EventsLost)

    def put(self, event: Event) -> None:
        """Adds an event, from any thread."""
        if isinstance(event, EventsLost):
            self.miss(event.count)
        elif isinstance(event, Closed):
            self.end(event)
        else:
            self.add(event)


class Life:
    """Hears the native messages of one pump and tells whoever wants to know."""

    def __init__(
        self,
        post: Post,
        *,
        on_error: ErrorCallback | None,
        on_close: Callback | None,
        policy: Policy | None,
        policy_deadline: float,
    ) -> None:
        self.post = post
        self.error: SapperError | None = None
        self.over = False
        # Held until the end: an Event would cost as much as all the rest of this.
        self._alive = threading.Lock()
        self._alive.acquire()
        self._on_error = on_error
        self._on_close = on_close
        self._policy = policy
        self._policy_deadline = policy_deadline
        self._unheard: SapperError | None = None
        self._failure: SapperError | None = None
        self._streams: list[EventStream] = []
        self._keep: object = None
        self._answering: asyncio.Task[Any] | None = None
        self.mailbox: _native.Mailbox | None = None
        self._subscription = _Subscription(self, post)
        self.key = self._subscription.key

    def subscribed(self) -> _native.Mailbox:
        """Where the native side posts, with :attr:`key`."""
        assert self.mailbox is not None  # noqa: S101 - asked for when the pump is made
        return self.mailbox

    def wait_over(self, timeout: float) -> None:
        """Blocks until the end was heard of, for ``timeout`` seconds at most."""
        if self._alive.acquire(timeout=timeout):
            self._alive.release()

    def keep(self, pump: object) -> None:
        """Keeps the pump alive until its end."""
        if not self.over:
            self._keep = pump
            self._subscription.kept = self

    def at_end(self, *calls: Callable[[], None]) -> None:
        """Has these called too at the end, before anybody hears of it; now, where that is past."""
        self._subscription.at_end += calls
        if self.over:
            self._subscription.call_at_end()

    def not_at_end(self, call: Callable[[], None]) -> None:
        """Has this not called at the end after all."""
        kept = tuple(one for one in self._subscription.at_end if one != call)
        self._subscription.at_end = kept

    def cancel(self) -> None:
        """The pump was not made after all."""
        self._subscription.end()
        self.mailbox = None  # whoever keeps the exception keeps this object

    def told(self, error: SapperError) -> None:
        """Somebody who waited hears this error: it is not told again."""
        self.error = error
        self._unheard = self._failure = None

    def raise_unheard(self) -> None:
        """Raises the error that ended the pump, unless somebody heard it already."""
        error, self._unheard = self._unheard, None
        if error is not None:
            raise error

    def forget_unheard(self) -> None:
        """Something worse is on its way to the caller: the error is not told."""
        self._unheard = None

    def fail(self, error: SapperError) -> None:
        """The pump is being stopped because of this error, which the native side does not know."""
        if self.error is None:  # else somebody who waited has heard it
            self._failure = error

    def is_over(self) -> bool:
        """Whether the end was heard of.

        Messages that wait are taken at once, where this is the thread that hears them, or nobody else does.
        """
        if not self.over and isinstance(self.post, LoopPost) and (self.hears_here() or self.post.is_closed):
            self.post.drain()
        return self.over

    def events(self) -> EventStream:
        """A new iterator."""
        stream = EventStream()
        if self.over:
            stream.put(Closed(self.error))
        else:
            self._streams.append(stream)
        return stream

    def must_answer_here(self) -> bool:
        """Whether a question would be answered by this very thread."""
        if self._policy is None:
            return False
        return self.hears_here()

    def hears_here(self) -> bool:
        """Whether messages are taken by this very thread."""
        return self.post.is_here()

    def hear(self, tag: str, value: Any) -> None:
        """Takes a message; the post's subscription calls it."""
        if tag == "question":
            self._ask(value)
        elif tag == "started":
            self._tell(Started())
        elif tag == "lost":
            self._tell(EventsLost(value))
        elif tag == "closed":
            self._end(value)

    def _tell(self, event: Event) -> None:
        for stream in self._streams:
            stream.put(event)

    def _end(self, error: SapperError | None) -> None:
        self._subscription.end()
        self.mailbox = None  # whoever keeps a closed pump keeps no descriptor
        error = error or self._failure
        if error is not None:
            self.error = error
            if self._on_error is None:
                self._unheard = error
        self.over = True
        self._alive.release()
        self._subscription.call_at_end()
        self._tell(Closed(self.error))
        self._streams.clear()
        on_error, on_close = self._on_error, self._on_close
        self._on_error = self._on_close = self._policy = None
        self._keep = None
        if self._answering is not None:
            self._answering.cancel()  # nobody waits for this answer any more
        if error is not None and on_error is not None:
            self.post.run(on_error, error)
        if on_close is not None:
            self.post.run(on_close)

    def _ask(self, question: _native.Question) -> None:
        policy = self._policy
        if policy is None:
            question.answer(False)
            return
        try:
            answer = policy(question.subject)
        except BaseException as error:
            question.answer(False)
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            logger.exception("sapper: the policy failed, which means no")
            return
        if isinstance(answer, Awaitable):
            self.post.run(self._answer_later, question, answer)
        else:
            question.answer(_is_yes(answer))

    async def _answer_later(self, question: _native.Question, answer: Awaitable[bool]) -> None:
        yes = False
        self._answering = asyncio.current_task()
        try:
            # The native side says no by itself at the deadline; this ends a call-back that goes on.
            async with asyncio.timeout(self._policy_deadline):
                yes = _is_yes(await answer)
        except TimeoutError:
            logger.warning(
                "sapper: the policy gave no answer within %s s, which means no", self._policy_deadline
            )
        except Exception:
            logger.exception("sapper: the policy failed, which means no")
        finally:
            self._answering = None
            question.answer(yes)

    def __del__(self) -> None:
        for stream in getattr(self, "_streams", ()):
            stream.put(Closed(None))  # never used, and its iterators end with it
        if getattr(self, "_unheard", None) is not None:
            logger.error("sapper: an error that nobody heard ended a pump: %s", self._unheard)


class _Subscription:
    """What the post has of a life: its way to it, and what is to be done at the end without it too."""

    def __init__(self, life: Life, post: Post) -> None:
        self._life = weakref.ref(life)
        self._post = post
        self.kept: Life | None = None
        self.at_end: tuple[Callable[[], None], ...] = ()
        # The mailbox is not kept here: whoever keeps a closed pump keeps no descriptor.
        mailbox, self.key = post.subscribe(self._hear)
        life.mailbox = mailbox

    def end(self) -> None:
        self._post.unsubscribe(self.key)
        self.kept = None

    def call_at_end(self) -> None:
        calls, self.at_end = self.at_end, ()
        for call in calls:
            call()

    def _hear(self, tag: str, value: Any) -> None:
        life = self._life()
        if life is not None:
            life.hear(tag, value)
        elif tag == "closed":  # nobody used it, and nobody has it any more
            self.end()
            self.call_at_end()


def _is_yes(answer: object) -> bool:
    if isinstance(answer, bool):
        return answer
    logger.error("sapper: a policy answers True or False, not %s; this means no", type(answer).__name__)
    return False
