"""A TLS server: an async iterator of connections whose handshake is done, or a handler's host.

::

    async with listen(("::", 8443), credentials=Credentials.certificate(chain, key)) as server:
        async for stream in server:
            ...

Accepting is native. Connections between their acceptance and the end of their handshake are bounded, and each
has its deadline: who connects and says nothing costs a known amount and holds nobody up. A handshake that
fails is an event (:class:`sapper.events.HandshakeFailed`) and a number, never an exception of the loop.

Not here: what the connections carry.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

from sapper import _arguments, _native
from sapper._life import EventStream
from sapper._loop import running_post
from sapper._options import config_error
from sapper._owned import dropped, subscribe
from sapper._takeover import Taken
from sapper.errors import ApiMisuseError, ClosedError, ErrorContext, ResourceLimit, SapperError
from sapper.events import Closed, Event, HandshakeFailed
from sapper.pump_options import PumpOptions
from sapper.tls.bridge import PeerPolicy, with_protocol
from sapper.tls.config import Credentials, TlsConfig
from sapper.tls.listen_address import ListenAddress, where_to_listen
from sapper.tls.stream import TlsStream, shake
from sapper.tls.stream_options import SessionOptions, known, pump_options

__all__ = ["ListenAddress", "ListenerStats", "TlsListener", "listen"]

logger = logging.getLogger("sapper")

Handler = Callable[[TlsStream], Awaitable[object]]

#: Seconds of a listener's handshakes where nobody says otherwise: clients that mean it need one at most.
_HANDSHAKE_TIMEOUT = 10.0

#: Seconds that the last handshakes get in an orderly end: a client that means it needs less, and a stranger
#: who leaves his unfinished holds nobody up.
_LAST_HANDSHAKES = 1.0


@dataclass(frozen=True, slots=True)
class ListenerStats:
    """What a listener has done.

    Attributes:
        accepted: Connections accepted.
        aborted: Connections that broke before they were accepted.
        pending: Connections now between their acceptance and being fetched.
        limit_pauses: Times that accepting waited because ``max_connections`` were open.
        exhausted_pauses: Times that accepting waited because the system was out of descriptors or memory.
        handshakes: Handshakes that were done.
        failed: Handshakes that failed.
    """

    accepted: int
    aborted: int
    pending: int
    limit_pauses: int
    exhausted_pauses: int
    handshakes: int
    failed: int


@dataclass(slots=True)
class _Shaking:
    """A handshake under way.

    Attributes:
        arrival: Whose, with its place among the pending.
        network: The sender that it comes from, for limits.
        gives_way: Why it has to end for a newcomer, in words and as a reason; ``None``: it need not.
    """

    arrival: _native.Arrival
    network: int
    gives_way: tuple[str, str] | None = None


class TlsListener:
    """Accepts TLS connections. Made by :func:`listen`; begins with ``async with`` or ``await``.

    It lives until it is closed; dropped, it closes, with a ResourceWarning. Used on the thread of its event
    loop.
    """

    def __init__(
        self,
        start: Callable[[_native.Mailbox, int], _native.Listener],
        tls: TlsConfig,
        options: PumpOptions,
        policy: PeerPolicy | None,
        own: Callable[[], None],
        most: int,
    ) -> None:
        self._begin = start
        self._tls = tls
        self._options = options
        self._policy = policy
        self._own = own
        self._post = running_post()
        self._key: int | None = None
        self._native: _native.Listener | None = None
        self._listening: asyncio.Future[None] | None = None
        self._addresses: tuple[str, ...] = ()
        self._over = asyncio.Event()
        self._error: SapperError | None = None
        self._closing = False
        self._most = most
        # By age.
        self._shaking: dict[asyncio.Task[None], _Shaking] = {}
        self._handling: set[asyncio.Task[None]] = set()
        # Bounded: each one holds its place among the pending.
        self._ready: deque[tuple[TlsStream, _native.Arrival]] = deque()
        self._acceptors: deque[asyncio.Future[None]] = deque()
        self._serving = 0
        self._streams: list[EventStream] = []
        self._handshakes = self._failed = 0

    # -- its life --------------------------------------------------------------------------------

    async def start(self) -> Self:
        """Begins to listen; again, it does nothing. If cancelled, it is closed.

        Raises:
            BindError: The address cannot be had.
            PermissionRequired: The port needs a right.
            ClosedError: It was closed.
        """
        if self._native is None:
            if self._closing:
                raise ClosedError("the listener is closed")
            self._listening = asyncio.get_running_loop().create_future()
            mailbox, self._key = subscribe(self._post, self._hear)
            try:
                self._native = self._begin(mailbox, self._key)
            except BaseException:
                self._post.unsubscribe(self._key)
                raise
            self._own()
        assert self._listening is not None  # noqa: S101 - made with the native one
        try:
            await asyncio.shield(self._listening)
        except asyncio.CancelledError:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Accepts no more. Handshakes under way go on, and connections that are fetched are not touched."""
        self._closing = True
        if self._native is not None:
            self._native.close()
        else:
            self._over.set()
        self._wake(everybody=True)

    async def aclose(self, drain: float = 5.0) -> None:
        """:meth:`close`, then waits for handlers of :meth:`serve`, and a second for handshakes under way.

        Connections that nobody has fetched are closed. If cancelled, everything ends at once.

        Args:
            drain: Seconds; what is not done by then is cancelled.
        """
        self.close()
        clock = asyncio.get_running_loop().time
        patience = clock() + _LAST_HANDSHAKES
        # A handler that closes its listener does not wait for itself.
        me = {asyncio.current_task()}
        try:
            if drain > 0 and self._serving:
                async with asyncio.timeout(drain):
                    while self._ready or self._handling - me or (self._shaking and clock() < patience):
                        left = patience - clock()
                        shaking = self._shaking if left > 0 else ()
                        if under_way := {*shaking, *(self._handling - me)}:
                            limit = left if shaking else None
                            await asyncio.wait(under_way, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
                        else:
                            await asyncio.sleep(0)  # serve() fetches what is ready in its next turn
        except TimeoutError:
            if left_over := len(self._handling - me) + len(self._ready):
                logger.warning("sapper: %d connections were not done within %s s", left_over, drain)
        finally:
            await self._end()

    async def wait_closed(self) -> None:
        """Waits until it accepts no more.

        If cancelled, only the waiting ends.

        Raises:
            SapperError: What ended it, where that was not :meth:`close`.
        """
        with self._post.keep(self):
            await self._over.wait()
        if self._error is not None:
            raise self._error

    def __await__(self) -> Generator[Any, None, Self]:
        return self.start().__await__()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose(*(() if kind is None else (0.0,)))

    # -- its connections -------------------------------------------------------------------------

    async def accept(self) -> TlsStream:
        """The next connection whose handshake is done. If cancelled, none is lost.

        Raises:
            ClosedError: The listener is closed, and everything accepted before was fetched.
            NotStartedError: It was not started.
            SapperError: What ended it.
        """
        if self._native is None:
            await self.start()
        while not self._ready:
            if self._over.is_set() and not self._shaking:
                if self._error is not None:
                    raise self._error
                raise ClosedError("the listener is closed")
            waiter = asyncio.get_running_loop().create_future()
            self._acceptors.append(waiter)
            try:
                with self._post.keep(self):
                    await waiter
            finally:
                if waiter in self._acceptors:
                    self._acceptors.remove(waiter)
                elif self._ready and waiter.cancelled():
                    self._wake()  # somebody else takes what this one was woken for
        stream, arrival = self._ready.popleft()
        arrival.done()
        return stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TlsStream:
        try:
            return await self.accept()
        except ClosedError:
            raise StopAsyncIteration from None

    async def serve(self, handler: Handler) -> None:
        """Runs ``handler`` for each connection, in a task of its own, until the listener is closed.

        The connection is closed behind the handler: orderly, or at once where it failed. A handler's
        failure goes to the loop's exception handler. If cancelled, the listener and all handlers end.

        Args:
            handler: Takes the connection.

        Raises:
            SapperError: What ended the listener, where that was not :meth:`close`.
        """
        await self.start()
        self._serving += 1
        try:
            async for stream in self:
                task = asyncio.create_task(_handle(handler, stream))
                self._handling.add(task)
                task.add_done_callback(self._handling.discard)
            with self._post.keep(self):
                while self._handling:
                    await asyncio.wait(self._handling)
        except asyncio.CancelledError:
            await self._end()
            raise
        finally:
            self._serving -= 1

    # -- what it tells ---------------------------------------------------------------------------

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it listens: ``"127.0.0.1:8443"``, ``"[::1]:8443"``, a path."""
        return self._addresses

    @property
    def port(self) -> int:
        """Its TCP port (that of its first address).

        Raises:
            ApiMisuseError: It does not listen on TCP, or not yet.
        """
        host, _, port = self._addresses[0].rpartition(":") if self._addresses else ("", "", "")
        if not host or not port.isdigit():
            raise ApiMisuseError("there is no TCP port", ErrorContext(reason="no_port"))
        return int(port)

    def stats(self) -> ListenerStats:
        """Counters now."""
        native = self._native.stats() if self._native is not None else None
        return ListenerStats(
            accepted=native["accepted"] if native else 0,
            aborted=native["aborted"] if native else 0,
            pending=native["pending"] if native else 0,
            limit_pauses=native["limit_pauses"] if native else 0,
            exhausted_pauses=native["exhausted_pauses"] if native else 0,
            handshakes=self._handshakes,
            failed=self._failed,
        )

    def events(self) -> EventStream:
        """An iterator over its events from now on: HandshakeFailed, EventsLost, Closed last.

        Its queue is bounded; one that is too slow gets :class:`~sapper.events.EventsLost`.
        """
        stream = EventStream()
        if self._over.is_set():
            stream.put(Closed(self._error))
        else:
            self._streams.append(stream)
        return stream

    def __del__(self) -> None:
        if getattr(self, "_native", None) is not None and not self._closing:
            dropped(self, self._let_go)

    def _let_go(self) -> None:
        for heard in self._streams:
            heard.put(Closed(None))
        loop = self._post.loop
        for task in self._shaking:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                if loop is not None:
                    loop.call_soon_threadsafe(task.cancel)
        while self._ready:
            stream, arrival = self._ready.popleft()
            stream.abort()
            arrival.done()
        assert self._native is not None  # noqa: S101 - it runs
        self._native.close()

    def __repr__(self) -> str:
        state = "closed" if self._closing else "listening" if self._addresses else "new"
        return f"<TlsListener {state} {' '.join(self._addresses)}>"

    # -- inside ----------------------------------------------------------------------------------

    def _hear(self, tag: str, value: Any) -> None:
        if tag == "closed":
            self._closed(value)
        elif isinstance(value, _native.Arrival):
            shaking = _Shaking(value, value.network)
            me, tls = weakref.ref(self), (self._tls.native, True, None)
            shaken = _shake(me, value, tls, self._options, self._policy)
            task = asyncio.get_running_loop().create_task(shaken)
            self._shaking[task] = shaking
            task.add_done_callback(partial(_shaken, me))
            self._make_room()
        elif value is None:  # there is no room for another one, and somebody waits
            self._give_way(
                "max_connections, or all that the process has descriptors for, are open",
                "too_many_connections",
            )
        else:
            self._addresses = tuple(value)
            if self._listening is not None and not self._listening.done():
                self._listening.set_result(None)

    def _make_room(self) -> None:
        """Beyond the limit nobody waits, for who fills the places would have all others wait.

        What is done and not fetched stays.
        """
        if len(self._shaking) + len(self._ready) <= self._most:
            return
        staying = sum(not one.gives_way for one in self._shaking.values())
        if staying >= 2 and staying + len(self._ready) > self._most:
            self._give_way("too many handshakes are under way", "too_many_handshakes")

    def _give_way(self, why: str, reason: str) -> None:
        """The sender that has most handshakes under way loses its oldest."""
        there = [(task, one) for task, one in self._shaking.items() if not one.gives_way]
        if there:
            ((crowd, _),) = Counter(one.network for _, one in there).most_common(1)
            task, oldest = next((task, one) for task, one in there if one.network == crowd)
            oldest.gives_way = why, reason
            task.cancel()

    def _done(self, arrival: _native.Arrival, stream: TlsStream) -> None:
        self._handshakes += 1
        self._ready.append((stream, arrival))
        self._wake()

    def _fail(self, arrival: _native.Arrival, error: SapperError) -> None:
        self._failed += 1
        logger.debug("sapper: the handshake with %s failed: %s", arrival.peer, error)
        self._tell(HandshakeFailed(arrival.peer, error))
        arrival.done()

    def _shaken(self, task: asyncio.Task[None]) -> None:
        shaking = self._shaking.pop(task)
        if task.cancelled() and shaking.gives_way:  # perhaps before its first step
            why, reason = shaking.gives_way
            context = ErrorContext(phase="handshake", reason=reason)
            self._fail(shaking.arrival, ResourceLimit(f"gave way to another client: {why}", context))
        if not task.cancelled() and (error := task.exception()) is not None:
            task.get_loop().call_exception_handler(
                {"message": "sapper: a handshake's task failed", "exception": error, "task": task}
            )
        if self._over.is_set() and not self._shaking:
            self._wake(everybody=True)

    def _wake(self, *, everybody: bool = False) -> None:
        while self._acceptors:
            waiter = self._acceptors.popleft()
            if not waiter.done():
                waiter.set_result(None)
                if not everybody:
                    return

    def _tell(self, event: Event) -> None:
        for stream in self._streams:
            stream.put(event)

    def _closed(self, error: SapperError | None) -> None:
        self._closing = True
        self._error = error
        if self._key is not None:
            self._post.unsubscribe(self._key)
        if self._listening is not None and not self._listening.done():
            self._listening.set_exception(error or ClosedError("the listener was closed"))
            self._listening.exception()  # somebody may never ask
        self._over.set()
        self._tell(Closed(error))
        self._streams.clear()
        self._wake(everybody=True)

    async def _end(self) -> None:
        """Ends everything that is under way."""
        self.close()
        me = asyncio.current_task()
        under_way = [task for task in (*self._shaking, *self._handling) if task is not me]
        for task in under_way:
            task.cancel()
        while self._ready:
            stream, arrival = self._ready.popleft()
            stream.abort()
            arrival.done()
        if under_way:
            await asyncio.wait(under_way)
        while self._ready:  # what was done in the same moment
            self._ready.popleft()[0].abort()
        await self._over.wait()


async def _shake(
    of: weakref.ref[TlsListener],
    arrival: _native.Arrival,
    tls: _native.TlsSide,
    options: PumpOptions,
    policy: PeerPolicy | None,
) -> None:
    """One handshake. It does not keep its listener: otherwise whoever connects to one would."""
    try:
        stream = await shake(Taken(arrival.endpoint()), tls, b"", options, policy)
    except SapperError as error:
        _failed(of, arrival, error)
    else:
        _done(of, arrival, stream)


def _failed(of: weakref.ref[TlsListener], arrival: _native.Arrival, error: SapperError) -> None:
    # Not in the frame above: whoever keeps the error keeps that.
    if (listener := of()) is not None:
        listener._fail(arrival, error)


def _done(of: weakref.ref[TlsListener], arrival: _native.Arrival, stream: TlsStream) -> None:
    if (listener := of()) is not None:
        listener._done(arrival, stream)
    else:
        stream.abort()


def _shaken(of: weakref.ref[TlsListener], task: asyncio.Task[None]) -> None:
    if (listener := of()) is not None:
        listener._shaken(task)


async def _handle(handler: Handler, stream: TlsStream) -> None:
    try:
        async with stream:
            await handler(stream)
    except asyncio.CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - a user's handler may raise anything; the loop hears of it
        asyncio.get_running_loop().call_exception_handler(
            {"message": f"sapper: the handler of {stream!r} failed", "exception": error}
        )


def listen(
    address: ListenAddress,
    *,
    credentials: Credentials | TlsConfig,
    max_connections: int = 4096,
    max_handshakes: int = 512,
    backlog: int = 1024,
    reuse_port: bool = False,
    unix_mode: int | None = None,
    replace_stale: bool = False,
    keepalive: float | None = None,
    **options: Unpack[SessionOptions],
) -> TlsListener:
    """Makes a TLS server. It listens from ``async with`` (or ``await``) on.

    Args:
        address: ``(host, port)`` (``None`` or ``""`` as host: every address of this machine; port 0: a free
            one), ``"tcp-listen://host:port"``, ``"unix-listen:/path"``, a socket that listens already
            (ours from then on), a descriptor of one (duplicated), or several of these.
        credentials: What we prove, and whom we believe.
        max_connections: Connections that may be open; at the limit a handshake gives way to a newcomer, where
            one is under way, otherwise accepting waits.
        max_handshakes: Connections that may be between their acceptance and being fetched. Beyond it the
            oldest handshake of the address that has most under way gives way; where all are done and
            nobody fetches them, accepting waits.
        backlog: Connections that the system keeps until they are accepted.
        reuse_port: Share the port with other sockets that say the same.
        unix_mode: Permissions of a Unix socket's path.
        replace_stale: Replace a Unix socket's path on which nobody listens any more.
        keepalive: Seconds of silence after which the system asks a TCP peer whether it is still there.
        options: By name: :class:`~sapper.tls.stream_options.SessionOptions`, of every connection.

    Raises:
        ConfigError: An argument is wrong; ``field`` names it.
        ApiMisuseError: There is no running event loop.
    """
    known("listen", SessionOptions, options)
    times = pump_options({"handshake_timeout": _HANDSHAKE_TIMEOUT, **options})
    if credentials is None:
        raise config_error("credentials", "a server needs some")
    for name, value, low, high in (
        ("max_connections", max_connections, 1, 1_000_000),
        ("max_handshakes", max_handshakes, 1, 1_000_000),
        ("backlog", backlog, 1, 65_535),
        ("unix_mode", 0 if unix_mode is None else unix_mode, 0, 0o7777),
    ):
        _arguments.whole(value, name, low, high)
    _arguments.flag(reuse_port, "reuse_port")
    _arguments.flag(replace_stale, "replace_stale")
    if keepalive is not None:
        _arguments.seconds(keepalive, "keepalive")
    values: _native.ListenerDict = {
        "backlog": backlog,
        "max_connections": max_connections,
        # One more, the newcomer for whom another one gives way.
        "max_handshakes": max_handshakes + 1,
        "reuse_port": reuse_port,
        "unix_mode": unix_mode,
        "replace_stale": replace_stale,
        "keepalive": keepalive,
    }
    start, own = where_to_listen(address, values)
    if times.upgrade == "mysql":
        raise config_error("upgrade", '"mysql" needs both ends before TLS: make bridges', "two_sided")
    config = with_protocol(TlsConfig.of(credentials, early_data=True), times.upgrade)
    config.for_server().check_server()
    return TlsListener(start, config, times, options.get("peer_policy"), own, max_handshakes)
