"""A transport without a descriptor: its bytes pass Python, chunk by chunk, on the event loop.

One of the few doors through which payload enters Python; the native side of it is ``payload.rs``.
Both directions are bounded: a full native queue pauses the transport, a full transport leaves the
bytes with the native side.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from sapper import _native
from sapper._loop import LoopPost, current_loop, running_post
from sapper.errors import SapperError

__all__ = ["ForeignDoor"]

logger = logging.getLogger("sapper")

#: Bytes that are fetched for one write to the transport.
CHUNK = 256 * 1024
#: Seconds for a transport to write what it has and close, once the pump is over; then it is aborted.
LINGER = 2.0


class ForeignDoor(asyncio.Protocol):
    """Passes bytes between a transport and a native stream."""

    def __init__(self, transport: asyncio.Transport, original: asyncio.BaseProtocol, name: str) -> None:
        self._transport = transport
        self._original = original
        self._opened = False
        self._post: LoopPost = running_post()
        mailbox, self._key = self._post.subscribe(self._notified)
        self._name = name
        self._native = _native.ForeignTransport(mailbox, self._key, f"{name} {type(transport).__name__}")
        self._rest = b""
        self._eof_received = False
        self._may_write = True
        self._sent_eof = False
        self._ending = False
        self._over = False
        self._failed = False

    @property
    def native(self) -> _native.Endpoint:
        """The native endpoint at the other side of the door."""
        return self._native.endpoint(self._name)

    def open(self) -> None:
        """Begins to pass bytes."""
        self._transport.set_protocol(self)
        self._opened = True
        self._transport.resume_reading()
        self._send()

    def cancel(self) -> None:
        """Nothing will pass after all."""
        self._post.unsubscribe(self._key)
        if self._opened:
            self._transport.set_protocol(self._original)

    def end(self) -> None:
        """The pump is over: what it still had to send goes out, then the transport is closed."""
        loop = self._post.loop
        if loop is None or loop.is_closed():
            self._post.unsubscribe(self._key)
        elif current_loop() is loop:
            self._end()
        else:
            with contextlib.suppress(RuntimeError):  # closed in between
                loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._ending:
            return
        self._ending = True
        self._rest = b""
        self._send()
        if self._over:
            self._post.unsubscribe(self._key)
            return
        if self._sent_eof:
            self._transport.close()
        asyncio.get_running_loop().call_later(LINGER, self._give_up)

    def _give_up(self) -> None:
        if self._over:
            return
        waits = "last"
        with contextlib.suppress(Exception):  # another's code, which may not know it
            waits = f"last {self._transport.get_write_buffer_size()}"
        if waits != "last 0":
            text = "sapper: %s: a %s took too long for its %s bytes after the pump's end: they are lost"
            logger.warning(text, self._name, type(self._transport).__name__, waits)
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._rest:  # a transport may have had this on its way when it was paused
            self._rest += data
        else:
            self._push(data)

    def eof_received(self) -> bool:
        self._eof_received = True
        if not self._rest:
            self._native.push_eof()
        return True  # our direction goes on

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        self._transport.set_protocol(self._original)
        if self._failed:
            self._rest = b""
        elif exc is not None:
            self._rest = b""
            self._native.push_lost(str(exc) or type(exc).__name__, getattr(exc, "errno", None))
        elif not self._rest:  # what was received before is still delivered
            self._native.push_eof()
        self._send()
        if self._ending:
            self._post.unsubscribe(self._key)
        self._original.connection_lost(exc)

    def pause_writing(self) -> None:
        self._may_write = False

    def resume_writing(self) -> None:
        self._may_write = True
        self._send()

    def _push(self, data: bytes) -> None:
        try:
            taken = self._native.push_received(data)
        except SapperError:  # the native side reads no more
            taken = 0
            data = b""
        self._rest = bytes(memoryview(data)[taken:])
        if (self._rest or not data) and not self._over:
            self._transport.pause_reading()

    def _notified(self, _tag: str, _value: Any) -> None:
        if self._post.is_closed:
            return  # nothing of the transport can move any more
        if self._rest:
            rest, self._rest = self._rest, b""
            self._push(rest)
            if not self._rest:
                if self._eof_received or self._over:
                    self._native.push_eof()
                elif not self._transport.is_closing():
                    self._transport.resume_reading()
        self._send()

    def _send(self) -> None:
        # In the end nobody may wait for it: what is left, a queue's worth at most, is the transport's.
        while (self._may_write or self._ending) and not self._sent_eof:
            if self._transport.is_closing() and not self._over:
                return  # somebody closes it: it takes nothing any more, and says so when it is closed
            try:
                data = self._native.take_to_send(CHUNK)
            except SapperError:  # broken off
                self._sent_eof = True
                self._transport.abort()
                return
            if data is None:
                return
            if self._over:
                self._sent_eof = True
                if data:  # nobody will have it
                    self._native.stop_sending()
                return
            if data:
                try:
                    self._transport.write(data)
                except Exception as error:  # noqa: BLE001 - another's code; these bytes are lost
                    self._fail(error)
                    return
                continue
            self._sent_eof = True
            if self._transport.can_write_eof() and not self._eof_received and not self._ending:
                self._transport.write_eof()
            else:
                self._transport.close()

    def _fail(self, error: Exception) -> None:
        """The transport did not take what it was given: the connection is lost."""
        self._failed = self._sent_eof = True
        self._rest = b""
        self._native.push_lost(
            f"the transport failed to write: {str(error) or type(error).__name__}",
            getattr(error, "errno", None),
        )
        self._transport.abort()
