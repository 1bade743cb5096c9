"""TLS as an asyncio transport: what libraries that are written for protocols run on.

:func:`create_connection` is ``loop.create_connection`` with our TLS below; :func:`open_connection` gives
asyncio's own ``StreamReader`` and ``StreamWriter`` over it. A :class:`TlsTransport` keeps the rules of
``asyncio.Transport``: reading can be paused, which holds the peer back; writes beyond the high-water mark
pause the protocol; ``connection_lost`` comes once, last.

Not here: connections of particular libraries (:mod:`sapper.tls.clients`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, Unpack, cast

from sapper import _native
from sapper._options import config_error
from sapper._takeover import EndpointLike, Taken
from sapper.errors import CloseDeadline, SapperError
from sapper.stream import Buffer
from sapper.tls.stream import TlsStream, start_client
from sapper.tls.stream_options import ClientOptions, known

__all__ = ["TlsTransport", "create_connection", "open_connection"]

P = TypeVar("P", bound=asyncio.BaseProtocol)

#: Bytes of one read: what native memory holds.
_MOST = 256 * 1024
#: Reads before the loop's other work has its turn.
_ROUNDS = 4
#: High-water mark where nobody sets one, as asyncio has it.
_HIGH = 64 * 1024


class TlsTransport(asyncio.Transport):
    """Moves the bytes of a :class:`~sapper.tls.TlsStream`, which is its own, to and from a protocol.

    Made by :func:`create_connection`. Open, it is alive without a variable, until ``connection_lost``.
    """

    def __init__(self, stream: TlsStream, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._protocol = protocol
        self._reading = True
        self._read_ended = False
        self._high, self._low = _HIGH, _HIGH // 4
        self._paused_protocol = False
        self._lost = False
        self._turn: asyncio.Handle | None = None
        stream._stay(True)
        stream._serve_transport(self._news, self._over)
        protocol.connection_made(self)
        self._read_soon()

    # -- what it tells ---------------------------------------------------------------------------

    @property
    def stream(self) -> TlsStream:
        """The connection: handshake, counters, keys. Its bytes are the transport's."""
        return self._stream

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As :meth:`sapper.tls.TlsStream.get_extra_info`."""
        return self._stream.get_extra_info(name, default)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol that hears of the bytes."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Has another protocol hear of the bytes that come from now on."""
        self._protocol = protocol
        self._read_soon()

    # -- reading ---------------------------------------------------------------------------------

    def is_reading(self) -> bool:
        """Whether the protocol is given what arrives."""
        return self._reading and not self._read_ended and not self.is_closing()

    def pause_reading(self) -> None:
        """Gives the protocol nothing until :meth:`resume_reading`; the peer is held back."""
        self._reading = False

    def resume_reading(self) -> None:
        """Ends a :meth:`pause_reading`."""
        if not self._reading:
            self._reading = True
            self._read_soon()

    # -- writing ---------------------------------------------------------------------------------

    def write(self, data: Buffer) -> None:
        """Writes all of ``data``. It never waits; a protocol that writes much heeds ``pause_writing``."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data: expecting a bytes-like instance, got {type(data).__name__}")
        if self._stream._ending and not self.is_closing():
            raise RuntimeError("Cannot call write() after write_eof()")
        if self.is_closing():
            return
        try:
            self._stream._write(data, bounded=False)
        except SapperError as error:
            self._fail(error)
            return
        if not self._paused_protocol and self.get_write_buffer_size() > self._high:
            self._paused_protocol = True
            self._protocol.pause_writing()

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        """Writes several pieces as one."""
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        """Always: TLS ends each direction by itself."""
        return True

    def write_eof(self) -> None:
        """Says close_notify behind everything that was written; reading goes on."""
        if not self.is_closing():
            self._stream.write_eof()

    def get_write_buffer_size(self) -> int:
        """Bytes that have not left Python."""
        return self._stream._unwritten_size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Low-water and high-water mark."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Sets the marks between which the protocol is told to pause and to go on."""
        if high is None:
            high = _HIGH if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low

    # -- its end ---------------------------------------------------------------------------------

    def is_closing(self) -> bool:
        """Whether it is closed, or closing."""
        return self._lost or self._stream.is_closing()

    def close(self) -> None:
        """Delivers what was written, says goodbye and ends; ``connection_lost(None)`` comes then.

        With CloseDeadline in place of ``None`` where that took longer than ``close_timeout``.
        """
        self._stream.close()

    def abort(self) -> None:
        """Ends at once, without a goodbye; what has not left is lost."""
        self._stream.abort()

    def __repr__(self) -> str:
        return f"<TlsTransport {'closing' if self.is_closing() else 'open'} {self._stream!r}>"

    # -- inside ----------------------------------------------------------------------------------

    def _hand_over(self, name: str) -> Taken:
        """To a bridge; the protocol hears that the connection is over for it, as from any transport."""
        taken = self._stream._hand_over(name)
        commit = taken.commit

        def gone() -> None:
            commit()
            self._loop.call_soon(self._finish, None)

        taken.commit = gone
        return taken

    def _read_soon(self) -> None:
        if self._turn is None and self.is_reading():
            self._turn = self._loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._turn = None
        self._read()

    def _news(self) -> None:
        """More can be read, or written."""
        if self._turn is None:
            self._read()
        if self._paused_protocol and self.get_write_buffer_size() <= self._low:
            self._paused_protocol = False
            self._protocol.resume_writing()

    def _read(self) -> None:
        for _ in range(_ROUNDS):
            if not self.is_reading():
                return
            door = self._stream._door
            assert door is not None  # noqa: S101 - made together with the stream
            try:
                if isinstance(self._protocol, asyncio.BufferedProtocol):
                    more = self._read_into(door, self._protocol)
                else:
                    more = self._read_bytes(door)
            except SapperError as error:
                self._fail(error)
                return
            except Exception as error:  # noqa: BLE001 - a protocol may raise anything; it loses its connection
                self._loop.call_exception_handler(
                    {
                        "message": "sapper: a protocol failed",
                        "exception": error,
                        "transport": self,
                        "protocol": self._protocol,
                    }
                )
                self._stream.abort()
                return
            if not more:
                return
        self._read_soon()

    def _read_bytes(self, door: _native.StreamDoor) -> bool:
        data = door.read(_MOST)
        if data:
            cast("asyncio.Protocol", self._protocol).data_received(data)
        elif data is not None:
            self._end_reading()
        return bool(data)

    def _read_into(self, door: _native.StreamDoor, protocol: asyncio.BufferedProtocol) -> bool:
        if not door.available():
            # Asks for news, or finds the end, without a buffer of the protocol's.
            return self._read_one(door, protocol)
        n = door.read_into(memoryview(protocol.get_buffer(-1)))
        if n:
            protocol.buffer_updated(n)
        return bool(n)

    def _read_one(self, door: _native.StreamDoor, protocol: asyncio.BufferedProtocol) -> bool:
        data = door.read(1)
        if data:
            memoryview(protocol.get_buffer(1))[:1] = data
            protocol.buffer_updated(1)
        elif data is not None:
            self._end_reading()
        return bool(data)

    def _end_reading(self) -> None:
        self._read_ended = True
        protocol = cast("asyncio.Protocol | asyncio.BufferedProtocol", self._protocol)
        if not protocol.eof_received():
            self.close()

    def _fail(self, error: SapperError) -> None:
        self._stream._heard(error)
        self._loop.call_soon(self._finish, error)

    def _over(self, error: SapperError | None) -> None:
        """The native side is done. What arrived before its end is still read."""
        if error is not None and not self._stream.is_closing() and self._reading and not self._read_ended:
            self._read_soon()  # finds the bytes, then the error
        elif error is not None or self._stream.is_closing():
            # Who has closed hears only that what he wrote did not arrive.
            told = not self._stream.is_closing() or isinstance(error, CloseDeadline)
            told = told or (error is not None and self._stream._undelivered())
            self._loop.call_soon(self._finish, error if told else None)
        # Else both directions have ended in order, and the protocol has yet to read its end or to close.
        elif self._read_ended:
            self._loop.call_soon(self._finish, None)

    def _finish(self, error: SapperError | None) -> None:
        if self._lost:
            return
        self._lost = True
        if self._turn is not None:
            self._turn.cancel()
        self._stream._stay(False)
        try:
            self._protocol.connection_lost(error)
        finally:
            if not self._stream._handed_over:
                self._stream.abort()
            self._stream._serve_transport(None, None)


async def create_connection(
    protocol_factory: Callable[[], P],
    host: str | None = None,
    port: int | None = None,
    *,
    stream: EndpointLike | None = None,
    initial_data: bytes = b"",
    **options: Unpack[ClientOptions],
) -> tuple[TlsTransport, P]:
    """Connects a protocol over TLS, as ``loop.create_connection`` does. If cancelled, nothing stays open.

    Args:
        protocol_factory: Makes the protocol, after the handshake.
        host: Name or address.
        port: Its port.
        stream: What lies underneath in place of ``host`` and ``port``; as for
            :func:`sapper.tls.start_client`.
        initial_data: Ciphertext that was already read from ``stream``.
        options: By name: :class:`~sapper.tls.stream_options.ClientOptions`.

    Raises:
        As :func:`sapper.tls.connect`.
    """
    known("create_connection", ClientOptions, options)
    if stream is None:
        if host is None or port is None:
            raise config_error("host", "give host and port, or a stream")
        stream = (host, port)
    elif host is not None or port is not None:
        raise config_error("stream", "is given in place of host and port, not beside them")
    connected = await start_client(stream, initial_data=initial_data, **options)
    try:
        protocol = protocol_factory()
        return TlsTransport(connected, protocol), protocol
    except BaseException:
        connected.abort()
        raise


async def open_connection(
    host: str | None = None,
    port: int | None = None,
    *,
    limit: int = 64 * 1024,
    stream: EndpointLike | None = None,
    initial_data: bytes = b"",
    **options: Unpack[ClientOptions],
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Asyncio's own reader and writer over TLS, for code that needs exactly these.

    :class:`~sapper.tls.TlsStream` has their methods and one copy less.

    Args:
        host: Name or address.
        port: Its port.
        limit: The reader's.
        stream: As for :func:`create_connection`, and so are the others.
        initial_data: Ciphertext that was already read from ``stream``.
        options: By name: :class:`~sapper.tls.stream_options.ClientOptions`.

    Raises:
        As :func:`create_connection`.
    """
    known("open_connection", ClientOptions, options)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    transport, protocol = await create_connection(
        lambda: asyncio.StreamReaderProtocol(reader, loop=loop),
        host,
        port,
        stream=stream,
        initial_data=initial_data,
        **options,
    )
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
