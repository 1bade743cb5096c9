"""Connects two endpoints; native code moves the bytes.

:class:`Pump` is what every bridge and tunnel is under the hood: it opens two endpoints, moves
payload between them in native threads, and tells Python of its start, its end and its figures.
:func:`connect` makes one between two endpoints without TLS; with TLS it is
:func:`sapper.tls.create_bridge`.

Not here: bytes. They do not pass Python (but for the doors that their docstrings name).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self

from sapper import _arguments, _native
from sapper._joining import build, take_both
from sapper._life import Callback, ErrorCallback, EventStream, Life
from sapper._loop import LoopPost, Operation, call_sync, current_loop, running_post
from sapper._mistakes import again
from sapper._options import config_error
from sapper._takeover import EndpointLike, Taken, take
from sapper._unsent import Unsent
from sapper.errors import ApiMisuseError, ClosedError, ConfigError, ErrorContext, SapperError
from sapper.pump_options import (
    Framing,
    PumpOptions,
    TapOptions,
    Upgrade,
    options_from,
    swap_values,
    tap_values,
)
from sapper.stats import PumpStats

__all__ = ["Direction", "Framing", "Pump", "PumpOptions", "TapOptions", "Upgrade", "connect"]

#: ``"encapsulate"``: towards the network (what TLS encrypts). ``"decapsulate"``: from it.
Direction = Literal["encapsulate", "decapsulate"]
State = Literal["new", "handshaking", "ready", "running", "draining", "closed"]


class _Closing(Awaitable[None]):
    """What ``stop()`` gives back: the stop is under way, awaiting it waits for the end."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump

    def __await__(self) -> Generator[Any, None, None]:
        return self._pump.wait_closed().__await__()


class Pump:
    """Moves payload between two endpoints until one ends, an error comes, or somebody stops it.

    Made by :func:`connect` (or, with TLS, by :func:`sapper.tls.create_bridge`). Methods may be called
    from any thread. A pump that works needs no variable: it lives until its end. One that was never
    used is freed like any object.

    ``async with`` (or ``with``) ends it: orderly with :meth:`aclose`, at once after an exception.
    """

    def __init__(
        self,
        native: _native.Bridge,
        life: Life,
        network: Taken,
        sink: Taken,
        options: PumpOptions,
        *,
        tls: bool,
    ) -> None:
        self._native = native
        self._life = life
        self._unsent: Unsent | None = None
        if network.ready is not None or sink.ready is not None:
            waits = tuple(one.ready for one in (network, sink) if one.ready is not None)
            patience = options.handshake_timeout if tls else options.connect_timeout
            self._unsent = Unsent(waits, patience, tls)
        self._starting = False
        self._swapping: set[asyncio.Future[None]] = set()
        self._sink_end = sink.end
        self._connect_timeout = options.connect_timeout
        self._on_loop = network.foreign or sink.foreign
        self._close_timeout = options.close_timeout

    # -- its life ------------------------------------------------------------------------------

    async def open(self) -> None:
        """Opens both endpoints. :meth:`start` does it by itself where nobody did.

        If cancelled, the pump stops at once.

        Raises:
            ConnectError, Unreachable, ConnectDeadline: An endpoint cannot be reached.
            ResourceError: An endpoint cannot be opened.
            ClosedError: The pump was stopped.
        """
        await self._opened()

    def start(self) -> None:
        """Lets payload flow, after connecting and the handshake, which it does itself where nobody did.

        Returns at once. A failure ends the pump and goes to ``on_error``.

        Raises:
            ApiMisuseError: It was started already.
            ClosedError: It is closed.
        """
        self._life.keep(self)
        if self._unsent is None or self.state != "new":
            self._native.start()
            return
        if self._starting:
            raise ApiMisuseError("start() was called already")
        # The native side waits for what the caller wrote before.
        loop, self._starting = self._home(), True
        if self._life.hears_here():
            self._life.post.run(self._start_when_sent)
        else:
            loop.call_soon_threadsafe(self._life.post.run, self._start_when_sent)

    async def _start_when_sent(self) -> None:
        try:
            if self._unsent is not None:
                await self._send_unsent(self._unsent, self._life.fail)
            self._native.start()
        except ClosedError:
            return  # stopped meanwhile, or whoever waits for the handshake has heard why
        except SapperError as error:
            self._life.fail(error)
            self._native.stop(0.0)
        except BaseException:
            self._native.stop(0.0)
            raise

    def stop(self, drain: float = 0.0) -> Awaitable[None]:
        """Ends the pump, in every state: at once, or after what waits was delivered.

        Works whether or not the result is awaited; awaiting it waits for the end as
        :meth:`wait_closed` does. A second call can only shorten the time.

        Args:
            drain: Seconds within which everything that was received is still delivered; at their end
                the rest is lost.

        Raises:
            ConfigError: ``drain`` is no number of seconds.
        """
        seconds = _arguments.seconds(drain, "drain")
        self._life.keep(self)  # its end is told also where nothing was before it
        self._native.stop(seconds)
        return _Closing(self)

    def abort(self) -> None:
        """Ends the pump at once and without a goodbye: the network's peer sees a connection that broke off.

        :meth:`stop` says close_notify also where it cuts something off; this does not.
        """
        self._life.keep(self)
        self._native.abort()

    async def aclose(self) -> None:
        """Ends the pump orderly: ``stop`` with the default drain (``close_timeout``), then waits.

        If cancelled, the pump is stopped at once.
        """
        try:
            await self.stop(self._close_timeout)
        except asyncio.CancelledError:
            self._native.stop(0.0)
            raise

    async def wait_closed(self) -> None:
        """Waits until everything is closed and every resource given back.

        If cancelled, only the waiting ends.

        Raises:
            SapperError: What ended the pump, unless ``on_error`` or another waiter has heard it.
        """
        life = self._life
        if not life.is_over():
            await running_post().call(self._native.wait_closed)
            if not life.is_over():  # its messages arrive on another loop or thread
                await asyncio.to_thread(life.wait_over, 1.0)
        life.raise_unheard()

    def wait_closed_sync(self, timeout: float | None = None) -> None:
        """Waits for the end without an event loop; Ctrl-C ends the waiting.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            TimeoutError: ``timeout`` is over; the pump goes on.
            ConfigError: ``timeout`` is no number of seconds.
            SapperError: As :meth:`wait_closed`.
        """
        if timeout is not None:
            timeout = _arguments.seconds(timeout, "timeout")
        self._refuse_own_thread("wait_closed_sync()", needed=self._on_loop)
        call_sync(self._native.wait_closed, timeout)
        if not self._life.is_over() and not self._life.hears_here():
            self._life.wait_over(1.0)
        self._life.raise_unheard()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.aclose()
            return
        # What is on its way already is the better story: the end of the pump adds nothing to it.
        self._life.keep(self)
        self._native.stop(0.0)
        self._life.forget_unheard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._life.keep(self)
        self._native.stop(self._close_timeout if kind is None else 0.0)
        if kind is None:
            self.wait_closed_sync()
        else:
            self._life.forget_unheard()

    # -- while it runs ---------------------------------------------------------------------------

    def pause(self, direction: Direction) -> None:
        """Stops reading for one direction until :meth:`resume`; what was read is delivered.

        Raises:
            ConfigError: There is no such direction.
            ClosedError: The pump is closed.
        """
        self._native.pause(_arguments.text(direction, "direction"))

    def resume(self, direction: Direction) -> None:
        """Ends a :meth:`pause`.

        Raises:
            ConfigError: There is no such direction.
            ClosedError: The pump is closed.
        """
        self._native.resume(_arguments.text(direction, "direction"))

    async def swap_sink(
        self,
        sink: EndpointLike,
        *,
        sink_framing: Framing | None = None,
        accept_timeout: float | None = None,
    ) -> None:
        """Opens another sink and goes on with it; no byte that was read is lost. The old one is closed.

        Where an end of file at the old sink was passed on already, the new one is written to and not read.

        What a writer that is given has not sent yet goes out before the swap, within ``connect_timeout``.

        If cancelled, the swap still takes place when the new sink opens.

        Args:
            sink: What the pump's own sink may be, without TLS.
            sink_framing: How packets lie in it, where it is a stream; ``None`` is as the pump was made with.
            accept_timeout: Seconds to wait for its one connection, where it listens; ``None`` likewise.

        Raises:
            ConfigError: ``sink`` is no endpoint, or an option has no use with it (nothing was taken).
            NotStartedError: Payload does not flow yet.
            BusyError: Another sink is still being opened.
            ClosedError: The pump is closed, or ended before the new sink was open.
            ConnectDeadline: The peer of a writer did not take what was written before; the old sink stays
                in use, the writer is aborted.
            ResourceError, TransportError: It cannot be opened; the old one stays in use.
        """
        running_post()  # without a loop nothing is taken
        said = swap_values(sink_framing, accept_timeout)
        taken = take(sink, "sink")
        try:
            self._native.check_sink(taken.native, said)
            if taken.tls is not None:
                raise config_error("sink", "a tls: endpoint cannot be swapped in")
            if taken.initial_data:
                raise ApiMisuseError(
                    "a sink that holds bytes cannot be swapped in", ErrorContext(field="sink")
                )
            swap = self._native.swap_sink
            operation: Operation = lambda mailbox, key: swap(taken.native, said, mailbox, key)  # noqa: E731
        except BaseException:
            taken.give_back()
            raise
        taken.commit()
        self._life.at_end(taken.end)
        if taken.foreign:
            self._on_loop = True
        # A task of its own: it goes on when nobody waits for it any more.
        swapping = asyncio.ensure_future(self._swap_when_sent(taken, operation))
        self._swapping.add(swapping)
        swapping.add_done_callback(self._swapped)
        await asyncio.shield(swapping)

    async def _swap_when_sent(self, taken: Taken, operation: Operation) -> None:
        try:
            if taken.ready is not None:
                await Unsent((taken.ready,), self._connect_timeout, tls=False).sent()
            await running_post().call(operation)
        except BaseException:
            self._at_its_end(taken.end)
            del taken.native  # whoever keeps the exception keeps no connection
            raise
        self._at_its_end(self._sink_end)
        self._sink_end = taken.end

    def _at_its_end(self, end: Callable[[], None]) -> None:
        """A sink is no more, before the pump is: what is left of it in Python goes with it."""
        self._life.not_at_end(end)
        end()

    def _swapped(self, swapping: asyncio.Future[None]) -> None:
        self._swapping.discard(swapping)
        if not swapping.cancelled():
            swapping.exception()  # whoever gave the swap up does not ask

    async def tap(
        self,
        path: str | PathLike[str],
        *,
        filter: str | None = None,
        max_bytes: int | None = None,
        snap_len: int = 65_535,
    ) -> None:
        """Starts (or replaces) the tap: native code copies the inner packets to a pcapng file.

        The pump never waits for the disk: what does not fit the tap's queue is left out, and counted in
        ``stats().facts["tap"]``.

        Args:
            path: The file; an existing one is replaced.
            filter: Which packets: ``"tcp and port 443"``; ``None`` is all.
            max_bytes: The file ends before it grows beyond this, which has room for its header and a packet.
            snap_len: At most so many bytes of each packet.

        Raises:
            ConfigError: The filter is wrong, ``max_bytes`` holds no packet, or nothing here is one.
            ResourceError: The file cannot be made.
        """
        options = TapOptions(
            path=_arguments.file_path(path, "path"), filter=filter, max_bytes=max_bytes, snap_len=snap_len
        )
        values = tap_values(options)
        try:
            await running_post().call(lambda mailbox, key: self._native.set_tap(values, mailbox, key))
        except ConfigError as error:
            if error.field not in ("tap.filter", "tap.max_bytes"):
                raise
            raise again(error, error.message, error.field.removeprefix("tap.")) from None

    async def untap(self) -> None:
        """Ends the tap; its file is complete then.

        If cancelled, the tap ends all the same.

        Raises:
            ResourceError: It is not: the file could not be written (the disk was full), which is told once,
                or the disk took nothing for ten seconds; then what is left is written when it does.
        """
        await running_post().call(lambda mailbox, key: self._native.set_tap(None, mailbox, key))

    # -- what it tells ---------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Where its life is: new, handshaking, ready, running, draining, closed."""
        return self._native.state()

    @property
    def error(self) -> SapperError | None:
        """What ended it; ``None`` before the end and after an orderly one."""
        return self._life.error

    def stats(self) -> PumpStats:
        """Counters now. Cheap; for an eye or a dashboard, not for each packet."""
        return PumpStats.from_native(self._native.stats())

    def events(self) -> EventStream:
        """An iterator over its events from now on, :class:`~sapper.events.Closed` last.

        Ask before ``start`` to hear of the start.

        Each call gives an iterator of its own with a bounded queue; one that is too slow gets
        :class:`~sapper.events.EventsLost`.

        Raises:
            ApiMisuseError: There is no running event loop.
        """
        self._native.watch()
        return self._life.events()

    def __repr__(self) -> str:
        try:
            state: str = self.state
        except ApiMisuseError:  # this process is a fork of the one that made it
            state = "of another process"
        return f"<{type(self).__name__} {state}>"

    # -- for this package --------------------------------------------------------------------------

    def _opened(self) -> Coroutine[Any, Any, Any]:
        return self._stop_if_cancelled(self._native.handshake)

    def _opened_sync(self, name: str) -> Any:
        self._refuse_own_thread(
            name, needed=self._on_loop or self._life.must_answer_here() or self._unsent is not None
        )
        if self._unsent is not None:
            self._send_unsent_sync(self._unsent)
        return self._told_sync(self._native.handshake)

    def _home(self) -> asyncio.AbstractEventLoop:
        """The loop of which this is, where it has one."""
        loop = self._life.post.loop if isinstance(self._life.post, LoopPost) else None
        if loop is None or loop.is_closed():
            raise ApiMisuseError(
                "the event loop of this object is closed", ErrorContext(reason="loop_closed")
            )
        return loop

    async def _send_unsent(self, unsent: Unsent, told: Callable[[SapperError], None]) -> None:
        """Waits for what the caller wrote before; ``told`` hears why it cannot be sent."""
        began = time.monotonic()
        try:
            await unsent.sent()
        except SapperError as error:
            told(error)
            raise
        if unsent.tls:  # one deadline for both
            self._native.handshake_began(time.monotonic() - began)
        self._unsent = None

    def _send_unsent_sync(self, unsent: Unsent) -> None:
        self._life.keep(self)
        sending = asyncio.run_coroutine_threadsafe(self._send_unsent(unsent, self._life.told), self._home())
        try:
            sending.result(unsent.timeout + 1.0)  # a loop that does not run keeps no deadline
        except BaseException as error:
            sending.cancel()
            self._native.stop(0.0)
            if isinstance(error, TimeoutError) and not isinstance(error, SapperError):
                late = unsent.too_late()
                self._life.told(late)
                raise late from None
            raise

    async def _stop_if_cancelled(self, operation: Operation) -> Any:
        """Runs one step of the handshake: whoever gives it up gives up the pump."""
        self._life.keep(self)
        try:
            if self._unsent is not None:
                await self._send_unsent(self._unsent, self._life.told)
            return await running_post().call(operation, self._told)
        except ApiMisuseError:
            raise  # a call that cannot be made changes nothing
        except BaseException:
            self._given_up()  # where the native side failed, it has ended already
            raise

    def _given_up(self) -> None:
        self._native.stop(0.0)

    def _told(self, error: SapperError) -> None:
        # That it is closed already, or cannot be asked for this now, is not what ended it.
        if not isinstance(error, ApiMisuseError):
            self._life.told(error)

    def _told_sync(self, operation: Operation) -> Any:
        self._life.keep(self)
        try:
            return call_sync(operation)
        except SapperError as error:
            self._told(error)
            raise
        except BaseException:  # Ctrl-C: the same as a cancelled await
            self._native.stop(0.0)
            raise

    def _refuse_own_thread(self, name: str, *, needed: bool) -> None:
        """Refuses to block the thread that must act for the call to end."""
        if needed and (self._life.hears_here() or current_loop() is not None):
            raise ApiMisuseError(
                f"{name} blocks the thread that has to answer meanwhile (a policy call-back, or a transport "
                "of this event loop): await the method without _sync, or call it in another thread",
                ErrorContext(reason="would_deadlock"),
            )


def connect(
    network: EndpointLike,
    sink: EndpointLike,
    *,
    options: PumpOptions | None = None,
    framing: Framing | None = None,
    on_error: ErrorCallback | None = None,
    on_close: Callback | None = None,
) -> Pump:
    """Joins two endpoints without TLS.

    Args:
        network: The end that statistics call the transport; anything that ``socket`` of
            :func:`sapper.tls.create_bridge` takes.
        sink: The other end; anything that its ``sink`` takes.
        options: All options; ``None`` is the defaults.
        framing: How packets lie in ``network`` (or in ``sink``, where ``network`` carries packets
            already), in place of what ``options`` say. Two ends that carry packets need none.
        on_error: Called once with the error that ended the pump.
        on_close: Called once, last, when every resource is given back.

    Raises:
        ConfigError: An argument is wrong; nothing was taken. ``tls://`` endpoints belong to create_bridge.
        ResourceError: The tap's file cannot be made; nothing was taken.
    """
    one, two = take_both(network, "network", sink, "sink")
    try:
        chosen = options_from(options, {"framing": framing})
        for taken, name in ((one, "network"), (two, "sink")):
            if taken.tls is not None:
                raise _belongs_to_tls(name)
    except BaseException:
        two.give_back()
        one.give_back()
        raise
    return build(Pump, (one, None, b""), (two, None), chosen, on_error=on_error, on_close=on_close)


def _belongs_to_tls(name: str) -> SapperError:
    return config_error(name, "a tls: endpoint needs sapper.tls.create_bridge")
