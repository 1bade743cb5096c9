"""Bytes in order, read and written by a program: :class:`ByteStream`, and pairs of them in memory.

A stream's bytes lie in native memory, bounded in both directions. A read that finds some returns at once,
without the event loop; only an empty or a full stream is waited for. :class:`sapper.tls.TlsStream` is one
with a TLS session behind it; the two ends of :func:`memory_pair` are each other's peer. Each can also be
given to a bridge as an endpoint, which then moves its bytes natively.

The names and habits are those of asyncio's ``StreamReader`` and ``StreamWriter`` in one object, so that
code written for those runs on it.

Not here: TLS, sockets. A stream belongs to the event loop that made it and is used on its thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sapper import _native
from sapper._loop import LoopPost, running_post
from sapper._mistakes import config_error
from sapper.errors import BusyError, ClosedError, ConfigError, ErrorContext, SapperError

if TYPE_CHECKING:
    from sapper._takeover import Taken

__all__ = ["ByteStream", "memory_pair"]

#: Bytes of one read where nobody says how many: what native memory holds at most.
_MOST = 256 * 1024
#: Bytes that wait in Python, at most, for somebody to drain: a program that writes on beyond this never
#: looks at its peer's pace.
WRITE_LIMIT = 64 * 1024 * 1024
#: Bytes that a separator is looked for in.
LIMIT = 64 * 1024

Buffer = bytes | bytearray | memoryview

#: Streams that somebody waits on: the wait is what keeps them alive.
_awaited: set[ByteStream] = set()


class ByteStream:
    """Ordered bytes, both ways, each of which ends by itself.

    One task reads at a time; a second read at the same time raises BusyError. A cancelled read loses
    nothing: what had arrived is there for the next one. ``async for`` gives lines.

    ``async with`` ends it: orderly, or after an exception at once.
    """

    def __init__(self) -> None:
        self._post: LoopPost = running_post()
        self._mailbox, self._key = self._post.subscribe(_Ear(self))
        self._door: _native.StreamDoor | None = None
        # Bytes that were fetched for a read that needs more.
        self._held = bytearray()
        self._limit = LIMIT
        self._reader: asyncio.Future[None] | None = None
        # What found no room in native memory.
        self._unwritten: deque[memoryview] = deque()
        self._unwritten_size = 0
        # What native memory took of it, and whether some of the rest was thrown away.
        self._taken = 0
        self._lost = False
        self._drainers: list[asyncio.Future[None]] = []
        self._ending = False
        self._closed = False
        self._deaf = False
        self._handed_over = False
        # Whether it is alive without a variable: a transport's, until its protocol has heard of the end.
        self._stays = False

    # -- reading ---------------------------------------------------------------------------------

    async def read(self, n: int = -1) -> bytes:
        """Reads what is there, at least one byte and at most ``n``; with ``n=-1`` everything until the end.

        If cancelled, nothing is lost.

        Returns:
            The bytes; ``b""`` at the end.

        Raises:
            SapperError: The connection failed; what had arrived before was read first.
            BusyError: Another read is under way.
            ClosedError: The stream is closed.
        """
        if n < 0:
            while await self._hold(_MOST):
                pass
            return self._take_held(len(self._held))
        if self._held:
            self._check_reading()
            return self._take_held(n)
        if n == 0:
            return b""
        while (data := self._fetch(n)) is None:
            await self._readable()
        return data

    async def readexactly(self, n: int) -> bytes:
        """Reads ``n`` bytes. If cancelled, nothing is lost.

        Raises:
            asyncio.IncompleteReadError: The end came before; ``partial`` holds what there was.
            SapperError, BusyError, ClosedError: As :meth:`read`.
        """
        if n < 0:
            raise ValueError("readexactly size can not be less than zero")
        if n == 0:
            return b""
        if not self._held and self._reading().available() >= n:
            data = self._fetch(n)
            if data is not None and len(data) == n:
                return data
            self._held += data or b""
        while len(self._held) < n:
            if not await self._hold(n - len(self._held)):
                raise asyncio.IncompleteReadError(self._take_held(len(self._held)), n)
        return self._take_held(n)

    async def readuntil(self, separator: bytes = b"\n") -> bytes:
        """Reads up to and including ``separator``. If cancelled, nothing is lost.

        Raises:
            asyncio.IncompleteReadError: The end came before.
            asyncio.LimitOverrunError: It is not within 64 KiB; the bytes are still there.
            SapperError, BusyError, ClosedError: As :meth:`read`.
        """
        if not separator:
            raise ValueError("Separator should be at least one-byte string")
        looked = 0
        while True:
            found = self._held.find(separator, looked)
            if found >= 0:
                if found > self._limit:
                    raise asyncio.LimitOverrunError(
                        "Separator is found, but chunk is longer than limit", found
                    )
                return self._take_held(found + len(separator))
            looked = max(0, len(self._held) + 1 - len(separator))
            if looked > self._limit:
                raise asyncio.LimitOverrunError("Separator is not found, and chunk exceed the limit", looked)
            if not await self._hold(_MOST):
                raise asyncio.IncompleteReadError(self._take_held(len(self._held)), None)

    async def readline(self) -> bytes:
        """Reads a line with its end; what is left where the end comes first. If cancelled, nothing is lost.

        Raises:
            asyncio.LimitOverrunError: The line is longer than 64 KiB.
            SapperError, BusyError, ClosedError: As :meth:`read`.
        """
        try:
            return await self.readuntil(b"\n")
        except asyncio.IncompleteReadError as end:
            return end.partial

    async def readinto(self, buffer: bytearray | memoryview) -> int:
        """Reads what is there into a writable buffer. If cancelled, nothing is lost.

        Returns:
            How many bytes; 0 at the end.

        Raises:
            ConfigError: The buffer is not writable, not in one piece, or empty.
            SapperError, BusyError, ClosedError: As :meth:`read`.
        """
        if self._held:
            self._check_reading()
            view = _room(buffer)
            n = min(len(view), len(self._held))
            view[:n] = self._take_held(n)
            return n
        while True:
            try:
                n_read = self._reading().read_into(buffer)
            except ConfigError:
                raise
            except SapperError as error:
                self._heard(error)
                raise
            if n_read is not None:
                return n_read
            await self._readable()

    def at_eof(self) -> bool:
        """Whether a read would give ``b""`` at once."""
        if self._held or self._closed or self._door is None:
            return self._closed and not self._held
        if self._reader is not None or self._door.available():
            # What comes now is of the read that waits for it, and would be late behind it.
            return False
        with contextlib.suppress(SapperError):
            data = self._door.read(1)
            self._held += data or b""
            return data == b""
        return False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    # -- writing ---------------------------------------------------------------------------------

    def write(self, data: Buffer) -> None:
        """Writes all of ``data``, without waiting: what native memory has no room for waits in Python.

        :meth:`drain` waits until there is room again; a program that writes much awaits it.

        Raises:
            SapperError: The connection failed, or nobody reads at the other end.
            BusyError: 64 MiB wait already and nobody drained them.
            ClosedError: The stream is closed, or its end was written.
        """
        self._write(data, bounded=True)

    def _write(self, data: Buffer, *, bounded: bool) -> None:
        door = self._writing()
        if not self._unwritten:
            try:
                written = door.write(data)
            except ConfigError:
                raise
            except SapperError as error:
                self._heard(error)
                raise
            self._taken += written
            if written == len(data) and type(data) is bytes:
                return
            rest = memoryview(data).cast("B")[written:]
        else:
            rest = memoryview(data).cast("B")
        if not rest:
            return
        if bounded and self._unwritten_size > WRITE_LIMIT:
            raise BusyError(
                f"{self._unwritten_size} bytes wait to be written: await drain() between writes",
                ErrorContext(reason="write_limit"),
            )
        # Others than bytes may change before they are written.
        self._unwritten.append(rest if type(data) is bytes else memoryview(bytes(rest)))
        self._unwritten_size += len(rest)
        _awaited.add(self)

    def writelines(self, data: Iterable[Buffer]) -> None:
        """Writes several pieces as one."""
        self.write(b"".join(data))

    async def drain(self) -> None:
        """Waits until everything that was written has left Python. If cancelled, only the waiting ends.

        Raises:
            SapperError: The connection failed.
            ClosedError: The stream is closed.
        """
        self._raise_failure()
        while self._unwritten:
            waiter = asyncio.get_running_loop().create_future()
            self._drainers.append(waiter)
            try:
                await waiter
            finally:
                with contextlib.suppress(ValueError):
                    self._drainers.remove(waiter)
            self._raise_failure()

    def can_write_eof(self) -> bool:
        """Always: each direction ends by itself."""
        return True

    def write_eof(self) -> None:
        """Ends our direction, behind everything that was written; reading goes on. May be repeated.

        Raises:
            ClosedError: The stream is closed.
        """
        if self._closed:
            raise _closed()
        if not self._ending:
            self._ending = True
            if not self._unwritten:
                self._say_end()

    # -- its end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends both directions; what was written is still delivered. What was not read is thrown away.

        Of a stream that was handed over, nothing: what took it has its end.
        """
        if self._closed:
            return
        self._closed = True
        self._held.clear()
        if self._handed_over:
            return
        if self._door is not None:
            self._stop_reading(self._door)
            if not self._ending:
                self._ending = True
                if not self._unwritten:
                    self._say_end()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        if not self._unwritten:
            self._finish()

    def is_closing(self) -> bool:
        """Whether it is closed, or closing."""
        return self._closed

    async def wait_closed(self) -> None:
        """Waits until what was written has left; after :meth:`close`."""
        while self._unwritten and self._failure() is None:
            with contextlib.suppress(SapperError):
                await self.drain()

    async def aclose(self) -> None:
        """:meth:`close` and :meth:`wait_closed`. If cancelled, the stream ends at once."""
        self.close()
        try:
            await self.wait_closed()
        except asyncio.CancelledError:
            self.abort()
            raise

    def abort(self) -> None:
        """Breaks both directions off at once; what has not left is lost, and the peer reads an error.

        Of a stream that was handed over, nothing: what took it has its end.
        """
        self._unwritten.clear()
        self._unwritten_size = 0
        self._taken, self._lost = 0, False  # nothing is to be delivered any more
        if not self._handed_over:
            self._ending = True  # no orderly end
            self._break_off()
        if self._closed and not self._handed_over:
            self._finish()
        self.close()
        self._wake_drainers()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.aclose()
        else:
            self.abort()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What is known of the connection, by asyncio's names; ``default`` where nothing is."""
        del name
        return default

    def __repr__(self) -> str:
        state = "handed over" if self._handed_over else "closed" if self._closed else "open"
        return f"<{type(self).__name__} {state}>"

    def __del__(self) -> None:
        if not getattr(self, "_deaf", True):
            self._deafen()

    # -- for this package ------------------------------------------------------------------------

    def _hand_over(self, name: str) -> Taken:
        """Gives the native half to a bridge, with what was fetched and not yet read."""
        from sapper._takeover import Taken

        if self._closed or self._handed_over or self._door is None:
            raise config_error(name, "the stream is closed, or was handed over before", "closed")
        if self._reader is not None:
            raise config_error(name, "somebody reads from the stream", "busy")
        if self._unwritten:
            raise config_error(name, "bytes wait to be written: await drain() first", "busy")
        if self._ending:
            raise config_error(name, "the end of the stream was written already", "closed")
        return Taken(
            self._door.near_end(name),
            initial_data=bytes(self._held),
            commit=self._gone,
            end=self._bridge_over,
        )

    def _gone(self) -> None:
        self._handed_over = self._closed = True
        self._held.clear()
        self._deafen()

    def _bridge_over(self) -> None:
        """The bridge that took this stream is over."""

    def _reading(self) -> _native.StreamDoor:
        self._check_reading()
        assert self._door is not None  # noqa: S101 - made together with this object
        return self._door

    def _check_reading(self) -> None:
        if self._closed:
            raise _handed_over() if self._handed_over else _closed()
        if self._reader is not None:
            raise BusyError("another read of this stream is under way", ErrorContext(reason="reading"))

    def _writing(self) -> _native.StreamDoor:
        if self._closed:
            raise _handed_over() if self._handed_over else _closed()
        if self._ending:
            raise ClosedError(
                "the end of this stream was written already", ErrorContext(reason="eof_written")
            )
        assert self._door is not None  # noqa: S101 - made together with this object
        return self._door

    def _stop_reading(self, door: _native.StreamDoor) -> None:
        """Nothing more will be read: what still comes is thrown away."""
        door.abandon_reading()

    def _fetch(self, n: int) -> bytes | None:
        door = self._reading()
        try:
            return door.read(n)
        except SapperError as error:
            self._heard(error)
            raise

    async def _hold(self, n: int) -> bool:
        """Fetches some bytes, at most ``n``, and keeps them; False at the end."""
        while (data := self._fetch(n)) is None:
            await self._readable()
        self._held += data
        return bool(data)

    def _take_held(self, n: int) -> bytes:
        data = bytes(self._held[:n])
        del self._held[:n]
        return data

    async def _readable(self) -> None:
        """Waits for the word that the last read, which found nothing, has asked for."""
        waiter = self._reader = asyncio.get_running_loop().create_future()
        _awaited.add(self)
        try:
            await waiter
        finally:
            self._reader = None
            if not self._unwritten:
                self._sleep()

    def _notified(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        if self._unwritten:
            self._flush()

    def _flush(self) -> None:
        """Writes what waits, as far as there is room."""
        assert self._door is not None  # noqa: S101 - something was written to it
        try:
            while self._unwritten:
                piece = self._unwritten[0]
                written = self._door.write(piece)
                self._taken += written
                self._unwritten_size -= written
                if written < len(piece):
                    self._unwritten[0] = piece[written:]
                    return
                self._unwritten.popleft()
        except SapperError:
            # Whoever drains, writes or reads next is told.
            self._lost = True
            self._unwritten.clear()
            self._unwritten_size = 0
        self._sleep()
        if self._ending:
            self._say_end()
        self._wake_drainers()
        if self._closed:
            self._finish()

    def _wake_drainers(self) -> None:
        for waiter in self._drainers:
            if not waiter.done():
                waiter.set_result(None)

    def _break_off(self) -> None:
        if self._door is not None:
            self._door.reset()

    def _say_end(self) -> None:
        assert self._door is not None  # noqa: S101 - made together with this object
        with contextlib.suppress(SapperError):
            self._door.write_eof()

    def _finish(self) -> None:
        """Both directions are done with."""
        self._deafen()

    def _deafen(self) -> None:
        """Hears nothing more from the native side, from whatever thread this is called."""
        if self._deaf:
            return
        self._deaf = True
        self._sleep()
        loop = self._post.loop
        if loop is None or loop.is_closed():
            return
        if self._post.is_here():
            self._post.unsubscribe(self._key)
        else:
            with contextlib.suppress(RuntimeError):  # closed in between
                loop.call_soon_threadsafe(self._post.unsubscribe, self._key)

    def _sleep(self) -> None:
        """Nobody waits on it."""
        if not self._stays:
            _awaited.discard(self)

    def _stay(self, stays: bool) -> None:
        """Keeps it alive without a variable, or not any more."""
        self._stays = stays
        (_awaited.add if stays else _awaited.discard)(self)

    def _heard(self, error: SapperError) -> None:
        """The caller is about to hear this error."""

    def _failure(self) -> SapperError | None:
        """What ended the connection, as far as it is known."""
        return None

    def _raise_failure(self) -> None:
        if (error := self._failure()) is not None:
            raise error


def _room(buffer: bytearray | memoryview) -> memoryview:
    """A caller's buffer, refused as native code refuses it."""
    try:
        view = memoryview(buffer)
    except TypeError:
        raise config_error("data", "must be bytes, or a buffer of bytes", "wrong_type") from None
    if not view.c_contiguous:
        raise config_error("data", "must lie in one piece", "wrong_type")
    if view.readonly:
        raise config_error("data", "must be writable", "wrong_type")
    if not view.nbytes:
        raise config_error("buffer", "has no room")
    return view.cast("B")


class _Ear:
    """Passes the native side's word on to a stream that it does not keep alive."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = weakref.ref(stream)

    def __call__(self, _tag: str, _value: object) -> None:
        stream = self._stream()
        if stream is not None:
            stream._notified()


def memory_pair() -> tuple[ByteStream, ByteStream]:
    """Two streams that are each other's peer, without a descriptor: 256 KiB fit each way.

    Each can be read and written, or given to a bridge or to :func:`sapper.tls.start_client` as what lies
    underneath; bytes between two bridges never enter Python.

    Raises:
        ApiMisuseError: There is no running event loop.
    """
    one, other = ByteStream(), ByteStream()
    one._door, other._door = _native.StreamDoor.pair(one._mailbox, one._key, other._key)
    return one, other


def _closed() -> ClosedError:
    return ClosedError("the stream is closed")


def _handed_over() -> ClosedError:
    return ClosedError("the stream was handed over to a bridge", ErrorContext(reason="taken"))
