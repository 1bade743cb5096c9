"""How Python hears of native work: one mailbox per event loop, one thread where there is no loop.

Native I/O threads never take the interpreter's lock. They put messages into a ``_native.Mailbox``,
whose descriptor becomes readable, and the event loop (asyncio, uvloop, any that has ``add_reader``)
takes them all at once. Every operation and every subscription has a key of its own.

- :class:`LoopPost` serves one event loop. It exists while anything is under way on that loop.
- :class:`ThreadPost` serves call-backs of objects that were made without a loop, on one thread
  named ``sapper-callbacks`` that ends when nothing is left to hear.
- :func:`call_sync` waits for one operation in a mailbox of its own; Ctrl-C works.

Not here: what the messages mean; whoever subscribes decides that.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from sapper import _log, _native
from sapper.errors import ApiMisuseError, ErrorContext, SapperError

__all__ = ["Handler", "LoopPost", "Post", "ThreadPost", "call_sync", "current_loop", "post_of"]

logger = logging.getLogger("sapper")

#: Called with a message's tag (``"started"``, ``"closed"``, ``"lost"``, ``"question"``) and its value.
Handler = Callable[[str, Any], None]

#: Starts a native operation that answers into this mailbox under this key.
Operation = Callable[[_native.Mailbox, int], None]

#: A blocking wait is cut into slices of this length, so that a signal which arrives just before the
#: wait begins is heard. Nothing else depends on it.
SIGNAL_SLICE = 0.5


class Post(Protocol):
    """Where messages arrive and call-backs run."""

    def subscribe(self, handler: Handler) -> tuple[_native.Mailbox, int]:
        """Gives the mailbox and the key under which ``handler`` hears."""

    def unsubscribe(self, key: int) -> None:
        """Ends a subscription; unknown keys are ignored."""

    def unsubscribe_from_anywhere(self, key: int) -> None:
        """The same from any thread, in the midst of anything: for ``__del__``."""

    def is_here(self) -> bool:
        """Whether messages are taken by this very thread."""

    def run(self, callback: Callable[..., Any], *args: Any) -> None:
        """Runs a user's call-back where call-backs of this post run; its failure is told, not raised."""


def current_loop() -> asyncio.AbstractEventLoop | None:
    """The running event loop of this thread, if there is one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class LoopPost:
    """The mailbox of one event loop. Everything but the native side happens on the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._thread = threading.get_ident()
        self._mailbox: _native.Mailbox | None = None
        self._handlers: dict[int, Handler] = {}
        self._futures: dict[int, tuple[asyncio.Future[Any], Callable[[SapperError], None] | None]] = {}
        self._next_key = 1
        self._tasks: set[asyncio.Future[Any]] = set()
        self._kept: list[object] = []
        self._waiter: threading.Thread | None = None
        self._closing = False
        # Messages are heard in their order: who is told of one does not take those behind it.
        self._draining = False
        # What ends the program, from a call-back: raised once all messages of this turn are heard.
        self._ending: BaseException | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop, while it is alive."""
        return self._loop()

    @property
    def thread(self) -> int:
        """Identifier of the thread that runs the loop."""
        return self._thread

    @property
    def is_closed(self) -> bool:
        """Whether the loop is no more: nobody but who looks takes its messages then."""
        loop = self.loop
        return loop is None or loop.is_closed()

    def is_here(self) -> bool:
        """Whether this is the loop's thread."""
        return threading.get_ident() == self._thread

    async def call(self, operation: Operation, told: Callable[[SapperError], None] | None = None) -> Any:
        """Starts a native operation and waits for its one answer.

        Args:
            operation: Starts it.
            told: Hears of a failure before any later message is handled.

        If cancelled, the answer is dropped when it comes; what the operation itself then does is for
        the caller to say.

        Raises:
            SapperError: The operation failed.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        mailbox, key = self._place()
        self._futures[key] = future, told
        try:
            operation(mailbox, key)
            return await future
        finally:
            self._futures.pop(key, None)
            self._close_if_idle()

    def subscribe(self, handler: Handler) -> tuple[_native.Mailbox, int]:
        mailbox, key = self._place()
        self._handlers[key] = handler
        return mailbox, key

    def unsubscribe(self, key: int) -> None:
        if self._handlers.pop(key, None) is not None:
            self._close_if_idle()

    def unsubscribe_from_anywhere(self, key: int) -> None:
        loop = self.loop
        if loop is not None and not loop.is_closed():
            with contextlib.suppress(RuntimeError):  # closed in between
                loop.call_soon_threadsafe(self.unsubscribe, key)

    def keep(self, one: object) -> contextlib.AbstractContextManager[None]:
        """Keeps an object as long as the loop lives and somebody waits for it: who waits need not be kept."""
        return _Kept(self._kept, one)

    def run(self, callback: Callable[..., Any], *args: Any) -> None:
        try:
            result = callback(*args)
        except (KeyboardInterrupt, SystemExit) as error:
            self._end_with(error)
            return
        # CancelledError too: that of a future which the call-back looked at is not ours to obey.
        except BaseException as error:  # noqa: BLE001 - a user's call-back may raise anything; the loop hears of it
            self._failed(callback, error)
            return
        if result is None:
            return
        if asyncio.iscoroutine(result) or isinstance(result, Awaitable):
            task = asyncio.ensure_future(result)
            self._tasks.add(task)
            task.add_done_callback(lambda done: self._finished(callback, done))

    def _finished(self, callback: Callable[..., Any], task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(callback, error)

    def _failed(self, callback: Callable[..., Any], error: BaseException) -> None:
        loop = self.loop
        if loop is not None:
            loop.call_exception_handler(
                {"message": f"sapper: the call-back {_name(callback)} failed", "exception": error}
            )

    def _end_with(self, error: BaseException) -> None:
        """Raises what ends the program, but not before others have heard what came with it."""
        if not self._draining:
            raise error
        self._ending = self._ending or error

    def _place(self) -> tuple[_native.Mailbox, int]:
        """The mailbox and a key that is free."""
        key, self._next_key = self._next_key, self._next_key + 1
        return self._mailbox or self._open(), key

    def _open(self) -> _native.Mailbox:
        loop = self.loop
        if loop is None or loop.is_closed():
            raise ApiMisuseError(
                "the event loop of this object is closed", ErrorContext(reason="loop_closed")
            )
        mailbox = _native.Mailbox()
        try:
            loop.add_reader(mailbox.fileno(), self.drain)
        except NotImplementedError:
            # A loop that cannot watch descriptors (Windows' proactor): a thread waits in its place.
            self._waiter = threading.Thread(
                target=_wait_for_loop, args=(mailbox, weakref.ref(self)), name="sapper-mailbox", daemon=True
            )
            self._waiter.start()
            vars(loop)["_sapper_post"] = self  # it has no reader that would keep this
        mailbox.hear_log(_log.KEY)
        self._mailbox = mailbox
        return mailbox

    def _close_if_idle(self) -> None:
        """Closes the mailbox soon; not at once, because whoever works in sequence opens it again at once."""
        if self._handlers or self._futures or self._closing or self._mailbox is None:
            return
        loop = self.loop
        if loop is None or loop.is_closed():
            self._close()
        else:
            self._closing = True
            loop.call_soon(self._close)

    def _close(self) -> None:
        self._closing = False
        mailbox = self._mailbox
        if mailbox is None or self._handlers or self._futures:
            return
        self._mailbox = None
        loop = self.loop
        if self._waiter is None and loop is not None and not loop.is_closed():
            loop.remove_reader(mailbox.fileno())
        self._waiter = None
        mailbox.close()

    def drain(self) -> None:
        """Takes all messages; the loop calls it when there are some."""
        if self._mailbox is None or self._draining:
            return
        self._draining = True
        try:
            for key, tag, value in self._mailbox.drain():
                try:
                    self._deliver(key, tag, value)
                except BaseException as error:  # noqa: BLE001 - raised below
                    self._end_with(error)
        finally:
            self._draining = False
        ending, self._ending = self._ending, None
        if ending is not None:
            raise ending

    def _deliver(self, key: int, tag: str, value: Any) -> None:
        if key == _log.KEY:
            _log.tell()
            return
        waiting = self._futures.get(key)
        if waiting is not None:
            future, told = waiting
            if future.done():
                return
            if tag == "error":
                if told is not None:
                    told(value)
                future.set_exception(value)
            else:
                future.set_result(value)
        elif (handler := self._handlers.get(key)) is not None:
            self.run(handler, tag, value)

    def __del__(self) -> None:
        if self._waiter is not None and self._mailbox is not None:
            self._mailbox.close()  # ends the thread's wait


class _Kept:
    """An object's place in a list, for as long as a block runs."""

    def __init__(self, among: list[object], one: object) -> None:
        self._among = among
        self._one = one

    def __enter__(self) -> None:
        self._among.append(self._one)

    def __exit__(self, *exc: object) -> None:
        at = next(at for at, one in enumerate(self._among) if one is self._one)
        del self._among[at]


def _wait_for_loop(mailbox: _native.Mailbox, post: weakref.ref[LoopPost]) -> None:
    """Waits for messages in place of a loop that cannot, and has the loop take them."""
    while not mailbox.closed:
        if not mailbox.wait(None) or mailbox.closed:
            continue
        owner = post()
        loop = owner.loop if owner is not None else None
        if owner is None or loop is None or loop.is_closed():
            return
        taken = threading.Event()

        def take(owner: LoopPost = owner, taken: threading.Event = taken) -> None:
            try:
                owner.drain()
            finally:
                taken.set()

        try:
            loop.call_soon_threadsafe(take)
        except RuntimeError:  # closed in between
            return
        del owner, take
        # A loop that is closed before its next turn takes nothing any more.
        while not taken.wait(0.1):
            if loop.is_closed():
                return


#: Weakly on both sides: a post that hears of something belongs to the loop that watches its mailbox, and is
#: given back with it. Held here it would hold its loop, wherever one of its handlers knows it, for ever.
_posts: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[LoopPost]] = (
    weakref.WeakKeyDictionary()
)
_latest: weakref.ref[LoopPost] | None = None


class ThreadPost:
    """The call-backs' thread: started by the first subscription, gone with the last."""

    def __init__(self) -> None:
        # A garbage collection in the middle of any of this may end a subscription.
        self._lock = threading.RLock()
        self._mailbox: _native.Mailbox | None = None
        self._handlers: dict[int, Handler] = {}
        self._next_key = 1
        self._thread: threading.Thread | None = None

    @property
    def ident(self) -> int | None:
        """Identifier of the thread, while it runs."""
        thread = self._thread
        return thread.ident if thread is not None else None

    def subscribe(self, handler: Handler) -> tuple[_native.Mailbox, int]:
        with self._lock:
            key, self._next_key = self._next_key, self._next_key + 1
            self._handlers[key] = handler
            mailbox = self._mailbox
            if mailbox is None:
                mailbox = self._mailbox = _native.Mailbox()
                mailbox.hear_log(_log.KEY)
                # A daemon, so that a bridge nobody waits for does not keep the program from ending;
                # joined at exit, so that it never meets an interpreter that is already gone.
                self._thread = threading.Thread(
                    target=self._serve, args=(mailbox,), name="sapper-callbacks", daemon=True
                )
                self._thread.start()
            return mailbox, key

    def unsubscribe(self, key: int) -> None:
        with self._lock:
            self._handlers.pop(key, None)
            if self._handlers:
                return
            mailbox, self._mailbox, self._thread = self._mailbox, None, None
            if mailbox is not None:
                mailbox.close()  # ends the thread's wait

    def unsubscribe_from_anywhere(self, key: int) -> None:
        self.unsubscribe(key)

    def run(self, callback: Callable[..., Any], *args: Any) -> None:
        try:
            result = callback(*args)
            if asyncio.iscoroutine(result):
                asyncio.run(result)
        # Also what ends a program: in this thread it would end only what all others hear by.
        except BaseException:
            logger.exception("sapper: the call-back %s failed", _name(callback))

    def is_here(self) -> bool:
        return self.ident == threading.get_ident()

    def shut_down(self) -> None:
        """Ends the thread whatever is left (at exit)."""
        with self._lock:
            thread, mailbox = self._thread, self._mailbox
            self._handlers.clear()
            self._mailbox = self._thread = None
            if mailbox is not None:
                mailbox.close()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _serve(self, mailbox: _native.Mailbox) -> None:
        while not mailbox.closed:
            mailbox.wait(None)
            for key, tag, value in mailbox.drain():
                if key == _log.KEY:
                    _log.tell()
                    continue
                with self._lock:
                    handler = self._handlers.get(key)
                if handler is not None:
                    self.run(handler, tag, value)
                # An error that waits here for the next message would keep every frame that it passed.
                del handler, value


_thread_post = ThreadPost()


@atexit.register
def _at_exit() -> None:
    # A forked child has a post of its own: that of its parent is not there to be ended.
    _thread_post.shut_down()


def post_of(loop: asyncio.AbstractEventLoop | None) -> LoopPost | ThreadPost:
    """The post of an event loop, or of the call-backs' thread where there is none."""
    global _latest  # noqa: PLW0603 - only a short cut: most programs have one loop
    if loop is None:
        return _thread_post
    if _latest is not None and (latest := _latest()) is not None and latest._loop() is loop:
        return latest
    known = _posts.get(loop)
    post = known() if known is not None else None
    if post is None:
        post = LoopPost(loop)
        _posts[loop] = weakref.ref(post)
    _latest = _posts[loop]
    return post


def running_post() -> LoopPost:
    """The post of the running loop, for ``await``.

    Raises:
        ApiMisuseError: There is no asyncio event loop in this thread.
    """
    post = post_of(current_loop())
    if not isinstance(post, LoopPost):
        raise ApiMisuseError(
            "there is no running asyncio event loop: use the methods that end in _sync",
            ErrorContext(reason="no_loop"),
        )
    return post


def call_sync(operation: Operation, timeout: float | None = None) -> Any:
    """Starts a native operation and blocks until its one answer; signals (Ctrl-C) are heard meanwhile.

    Args:
        operation: Starts it.
        timeout: Seconds to wait at most; ``None`` waits for as long as it takes.

    Raises:
        SapperError: The operation failed.
        TimeoutError: ``timeout`` is over; the operation goes on.
    """
    mailbox = _native.Mailbox()
    try:
        operation(mailbox, 0)
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            left = SIGNAL_SLICE if until is None else min(SIGNAL_SLICE, until - time.monotonic())
            if mailbox.wait(max(left, 0.0)):
                for _key, tag, value in mailbox.drain():
                    if tag == "error":
                        raise value
                    return value
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(f"no answer within {timeout} s")
    finally:
        mailbox.close()
        _log.tell()  # where nothing else runs, this is who comes by


def _name(callback: Callable[..., Any]) -> str:
    return getattr(callback, "__qualname__", None) or repr(callback)


def _after_fork() -> None:
    """A child has no I/O threads: nothing that it inherited here can ever be answered."""
    global _thread_post, _latest  # noqa: PLW0603 - the child starts with an empty one
    _posts.clear()
    _latest = None
    _thread_post = ThreadPost()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
