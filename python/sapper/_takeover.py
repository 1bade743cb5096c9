"""Turns what a caller has (sockets, transports, descriptors, names) into native endpoints.

Taking happens in two steps, so that nothing is taken when the rest of a call turns out wrong:
:func:`take` duplicates descriptors and checks, :meth:`Taken.commit` is called when the native object
exists, :meth:`Taken.undo` when it does not.

Who closes what afterwards:

- ``int``, a file object, ``Fd(…)``: duplicated. The caller keeps and closes its own.
- ``socket.socket``: detached. It is ours from then on.
- asyncio transport or ``(reader, writer)``: taken over with everything that was read and not yet
  fetched; bytes that wait to be written go out first; the transport is aborted and its descriptor
  lives on in us. A transport without a descriptor is used as it is, through the foreign door
  (:mod:`sapper._foreign`): every byte then passes Python.
- :class:`sapper.stream.ByteStream` and its kind: their native half changes hands, with what was fetched
  and not read; no byte passes Python from then on.
- text, ``(host, port)``, :class:`sapper.endpoint.Endpoint`: opened by us.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from sapper import _native, endpoint
from sapper._loop import current_loop
from sapper._options import config_error
from sapper.errors import ConnectionLost, SapperError

__all__ = [
    "EndpointLike",
    "HasFileno",
    "Taken",
    "becomes_ours",
    "descriptors",
    "must_be_open",
    "take",
]


class HasFileno(Protocol):
    """Anything with a descriptor: a file, a pipe's end."""

    def fileno(self) -> int:
        """The descriptor."""


class HandsOver(Protocol):
    """A stream of this package that a program reads and writes: it gives its native half away."""

    def _hand_over(self, name: str) -> Taken:
        """The half, prepared."""


#: What an endpoint argument takes.
EndpointLike: TypeAlias = (
    str
    | int
    | endpoint.Endpoint
    | socket.socket
    | HasFileno
    | asyncio.BaseTransport
    | tuple[asyncio.StreamReader, asyncio.StreamWriter]
    | tuple[str, int]
    | tuple[int | HasFileno, int | HasFileno]
    | HandsOver
    | tuple[HandsOver, HandsOver | int | HasFileno | asyncio.BaseTransport]
    | tuple[int | HasFileno | asyncio.BaseTransport, HandsOver]
)

#: Largest buffer that a StreamReader can have filled; it is taken whole.
_EVERYTHING = 2**31 - 1

#: Of a transport with a descriptor: what is called until the descriptor is ours.
_MOVING = (
    "is_closing",
    "is_reading",
    "pause_reading",
    "resume_reading",
    "get_write_buffer_size",
    "set_write_buffer_limits",
    "get_protocol",
    "set_protocol",
    "abort",
)
#: Of one without: what is called as long as bytes pass it.
_PASSING = (
    "is_closing",
    "pause_reading",
    "resume_reading",
    "get_protocol",
    "set_protocol",
    "write",
    "can_write_eof",
    "close",
    "abort",
)


def _nothing() -> None:
    return None


@dataclass(slots=True)
class Taken:
    """An endpoint in our hands, not yet for good.

    Attributes:
        native: The native endpoint; used up by the native object.
        host: Name to check in the peer's certificate, where the endpoint has one.
        tls: The endpoint's own words about TLS (``tls://…``), where it has any.
        initial_data: Bytes that had been read from it.
        commit: Makes it ours.
        undo: Gives everything back.
        ready: Something to await before the first byte may move.
        end: Called when the pump is over.
        foreign: Whether every byte passes Python on the loop.
        asks: Whether ``commit`` runs another's code, which may fail.
    """

    native: _native.Endpoint
    host: str | None = None
    tls: endpoint.Tls | endpoint.TlsListen | None = None
    initial_data: bytes = b""
    commit: Callable[[], None] = _nothing
    undo: Callable[[], None] = _nothing
    ready: Callable[[], Awaitable[None]] | None = None
    end: Callable[[], None] = _nothing
    foreign: bool = False
    asks: bool = False

    def give_back(self) -> None:
        """Undoes the taking, and lets go of the duplicate: whoever keeps the exception keeps this object."""
        self.undo()
        del self.native


def take(what: object, name: str) -> Taken:
    """Prepares to take over ``what``, which was given for the argument ``name``.

    Raises:
        ConfigError: It is of a wrong type, a closed or an unusable descriptor, a transport under TLS
            or on another loop, …; ``field`` is ``name``.
    """
    # What is common, and asked quickly, comes first.
    if isinstance(what, int) and not isinstance(what, bool):
        return Taken(_native.Endpoint.fd(_descriptor(what, name), None, None, name))
    if type(what) is socket.socket:
        return _socket(what, name)
    if isinstance(what, str):
        return _described(endpoint.parse(what, field=name), name)
    if isinstance(what, endpoint.Endpoint):
        return _described(what, name)
    if isinstance(what, bool):
        raise _wrong_type(what, name)
    if (hand_over := _hand_over_of(what)) is not None:
        try:
            return hand_over(name)
        except (AttributeError, NotImplementedError) as error:
            raise not_a_transport(what, name, error) from error
    if isinstance(what, ssl.SSLSocket | ssl.SSLObject):
        raise _under_tls(name)
    if isinstance(what, socket.socket):
        return _socket(what, name)
    if _is_transport(what):
        return _transport(what, None, name)
    if isinstance(what, tuple) and len(what) == 2:
        first, second = what
        if isinstance(first, asyncio.StreamReader) and isinstance(second, asyncio.StreamWriter):
            transport = getattr(second, "transport", None)
            if transport is None:
                raise config_error(name, "the writer was never set up: it has no transport", "no_method")
            _must_be_a_pair(first, second, transport, name)
            return _transport(transport, first, name)
        if isinstance(first, str) and isinstance(second, int) and not isinstance(second, bool):
            try:
                return _described(endpoint.Tcp(first, second), name)
            except SapperError as error:
                raise config_error(name, str(error), error.reason) from None
        if _hand_over_of(first) is not None or _hand_over_of(second) is not None:
            return _joined(first, second, name)
        return Taken(_native.Endpoint.fd(_descriptor(first, name), _descriptor(second, name), None, name))
    return Taken(_native.Endpoint.fd(_descriptor(what, name), None, None, name))


def _hand_over_of(what: object) -> Callable[[str], Taken] | None:
    return getattr(what, "_hand_over", None)


def _joined(first: object, second: object, name: str) -> Taken:
    """One to read and one to write, of which at least one is a stream of ours."""
    if first is second:
        return take(first, name)
    read = take(first, name)
    try:
        write = take(second, name)
    except BaseException:
        read.give_back()
        raise

    def both(one: Callable[[], None], other: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            one()
            other()

        return call

    waits = [one.ready for one in (read, write) if one.ready is not None]

    async def ready() -> None:
        for wait in waits:
            await wait()

    return Taken(
        _native.Endpoint.joined(read.native, write.native),
        initial_data=read.initial_data,
        commit=both(read.commit, write.commit),
        undo=both(read.undo, write.undo),
        ready=ready if waits else None,
        end=both(read.end, write.end),
        foreign=read.foreign or write.foreign,
        asks=read.asks or write.asks,
    )


def descriptors(what: object, name: str) -> list[int]:
    """The caller's own descriptors in an endpoint argument, as far as it names some."""
    if type(what) is int:
        return [what]
    if isinstance(what, str):
        what = endpoint.parse(what, field=name)
    if isinstance(what, endpoint.Fd):
        return [what.read] if what.write is None else [what.read, what.write]
    numbers = []
    for one in what if isinstance(what, tuple) else (what,):
        if isinstance(one, int) and not isinstance(one, bool):
            numbers.append(one)
        elif not isinstance(one, str) and (fileno := getattr(one, "fileno", None)) is not None:
            # What has none says so when it is taken.
            with contextlib.suppress(Exception):
                if isinstance(number := fileno(), int) and number >= 0:
                    numbers.append(number)
    return numbers if not (isinstance(what, tuple) and what and isinstance(what[0], str)) else []


def must_be_open(number: int, name: str) -> None:
    """Refuses a number that is no open descriptor, before anything else can get it."""
    try:
        os.get_inheritable(number)
    except (OSError, OverflowError):
        raise config_error(name, f"descriptor {number} is not open", "not_open") from None


def becomes_ours(what: object) -> object:
    """What the caller loses by giving it, and so cannot give twice; None where it is duplicated or named."""
    if isinstance(what, tuple) and len(what) == 2 and isinstance(what[1], asyncio.StreamWriter):
        return getattr(what[1], "transport", None)
    if isinstance(what, int):
        return None
    ours = isinstance(what, socket.socket) or _is_transport(what) or _hand_over_of(what) is not None
    return what if ours else None


def _described(what: endpoint.Endpoint, name: str) -> Taken:
    native = _native.Endpoint
    match what:
        case endpoint.Tcp(host, port):
            return Taken(native.tcp(host, port, name), _without_scope(host))
        case endpoint.Tls(host, port):
            return Taken(native.tcp(host, port, name), what.server_name or _without_scope(host), what)
        case endpoint.TcpListen(host, port):
            return Taken(native.tcp_listen(host, port, name))
        case endpoint.TlsListen(host, port):
            return Taken(native.tcp_listen(host, port, name), None, what)
        case endpoint.Unix(path):
            return Taken(native.unix(path, name))
        case endpoint.UnixListen(path):
            return Taken(native.unix_listen(path, name))
        case endpoint.UnixDatagram(path, bind):
            return Taken(native.unix_datagram(path, bind, name))
        case endpoint.Seqpacket(path):
            return Taken(native.seqpacket(path, name))
        case endpoint.Udp(host, port, bind):
            return Taken(native.udp(host, port, bind, name))
        case endpoint.Fd(read, write, header):
            return Taken(native.fd(read, write, header, name))
        case endpoint.Stdio():
            return Taken(native.stdio(name))
        case endpoint.Tap(interface, mtu, addresses, offload):
            return Taken(native.tap(interface, mtu, list(addresses), offload, name))
        case endpoint.Tun(interface, mtu, addresses, offload):
            return Taken(native.tun(interface, mtu, list(addresses), offload, name))
        case endpoint.File(path, mode):
            return Taken(native.file(path, mode, name))
        case endpoint.Null():
            return Taken(native.null(name))
        case endpoint.Counter():
            return Taken(native.counter(name))
    raise _wrong_type(what, name)


def _without_scope(host: str) -> str:
    """A certificate names an address without the interface behind which it is (``fe80::1%eth0``)."""
    return host.partition("%")[0]


def _descriptor(what: object, name: str) -> int:
    """The descriptor of an int or of an object that has one, with its own buffer written out."""
    if isinstance(what, int) and not isinstance(what, bool):
        if not 0 <= what < 2**31:  # the binding takes a C int: another number would not reach its message
            raise config_error(name, f"descriptor {what} is not open", "not_open")
        return what
    fileno = getattr(what, "fileno", None)
    if fileno is None:
        raise _wrong_type(what, name)
    flush = getattr(what, "flush", None)
    try:
        if flush is not None:
            flush()
        number = fileno()
    except io.UnsupportedOperation:  # io.BytesIO and the like, which never had one
        raise config_error(name, f"{type(what).__name__} has no descriptor", "no_descriptor") from None
    except (OSError, ValueError) as error:
        raise config_error(name, f"{type(what).__name__} has no descriptor: {error}", "closed") from None
    except Exception as error:
        raise not_a_transport(what, name, error) from error
    if not isinstance(number, int):
        raise _wrong_type(what, name)
    return number


def _socket(sock: socket.socket, name: str) -> Taken:
    number = sock.fileno()
    if number < 0:
        raise config_error(name, "the socket is closed", "closed")
    return Taken(_native.Endpoint.fd(number, None, None, name), commit=lambda: os.close(sock.detach()))


def _is_transport(what: object) -> bool:
    """Uvloop's transports are no subclasses of asyncio's: their methods tell."""
    return isinstance(what, asyncio.BaseTransport) or (
        hasattr(what, "get_extra_info") and hasattr(what, "set_protocol") and hasattr(what, "is_closing")
    )


def _transport(transport: Any, reader: asyncio.StreamReader | None, name: str) -> Taken:
    for one in (transport, reader):
        _must_be_of_this_loop(one, name)
    if (hand_over := _hand_over_of(transport)) is not None:
        return _transport_of_ours(hand_over(name), transport, reader, name)
    if any(_asked(transport, name, "get_extra_info", what) for what in ("sslcontext", "ssl_object")):
        raise _under_tls(name)
    loop = current_loop()
    if loop is None:
        raise config_error(
            name, "an asyncio transport is taken over on its loop: call this in a coroutine", "no_loop"
        )
    number = _transport_descriptor(transport)
    if number is None and not (hasattr(transport, "write") and hasattr(transport, "pause_reading")):
        raise config_error(
            name,
            f"a {type(transport).__name__} has no descriptor and does not move bytes both ways",
            "no_descriptor",
        )
    _must_have(transport, _PASSING if number is None else _MOVING, name)
    if _asked(transport, name, "is_closing"):
        raise config_error(name, "the transport is closed, or closing", "closed")
    if number is None:
        return _foreign(transport, reader, name)
    # What asks comes before what changes anything.
    pausable = hasattr(transport, "pause_reading")
    was_reading = pausable and bool(_asked(transport, name, "is_reading"))
    unsent = hasattr(transport, "get_write_buffer_size") and _asked(transport, name, "get_write_buffer_size")
    flushing = _Flushing(transport, loop, name) if unsent else None
    native = _native.Endpoint.fd(number, None, None, name)
    initial = b""
    if pausable:
        _asked(transport, name, "pause_reading")
    if reader is not None:
        try:
            initial = _take_buffer(reader, name)
        except SapperError:
            if was_reading:
                transport.resume_reading()
            raise
        # Taking the buffer may have resumed a transport that the reader itself had paused.
        transport.pause_reading()

    def undo() -> None:
        if initial and reader is not None:
            reader.feed_data(initial)
        if was_reading and not transport.is_closing():
            transport.resume_reading()

    if flushing is None:
        return Taken(native, initial_data=initial, commit=lambda: _abort(transport), undo=undo)
    return Taken(
        native,
        initial_data=initial,
        commit=flushing.begin,
        undo=undo,
        ready=flushing.wait,
        end=flushing.end,
        asks=True,
    )


def _must_be_of_this_loop(what: object, name: str) -> None:
    """Refuses what another loop serves: that one may be in the midst of it, in another thread."""
    here, its = current_loop(), None
    with contextlib.suppress(Exception):  # another's: what is wrong with it is found by what is asked of it
        its = getattr(what, "_loop", None)
    if its is None and here is not None:
        # Uvloop does not show it; what its transports refer to can be seen all the same.
        seen = gc.get_referents(what)
        its = next((one for one in seen if isinstance(one, asyncio.AbstractEventLoop)), None)
    if here is not None and isinstance(its, asyncio.AbstractEventLoop) and its is not here:
        message = f"this {type(what).__name__} belongs to another event loop: call this in a coroutine there"
        raise config_error(name, message, "other_loop")


def _asked(transport: Any, name: str, method: str, *arguments: object) -> Any:
    """What a transport's method gives.

    One that was never set up (its class does not call the one above it) fails in any of them.
    """
    try:
        return getattr(transport, method)(*arguments)
    except Exception as error:
        raise not_a_transport(transport, name, error, f"{method}() of it") from error


def not_a_transport(transport: object, name: str, error: Exception, what: str = "it") -> SapperError:
    """What another's transport failed with, as the caller's mistake."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    message = f"a {type(transport).__name__} does not do what its kind does, {what} failed: {said}"
    return config_error(name, message, "no_method")


def _must_have(transport: Any, methods: tuple[str, ...], name: str) -> None:
    """Refuses a transport that was left as asyncio's base class has it, where every call raises."""
    for method in methods:
        # Of the object, not of its class: one that passes all on to another has it there.
        given = getattr(transport, method, None)
        lacks = given is None and methods is _PASSING
        if lacks or getattr(given, "__func__", None) is getattr(asyncio.Transport, method):
            message = f"a {type(transport).__name__} does not implement {method}() of asyncio's transports"
            raise config_error(name, message, "no_method")


def _must_be_a_pair(reader: Any, writer: Any, transport: object, name: str) -> None:
    """Refuses a reader of one connection beside a writer of another, whose bytes it would not hold."""
    # Asyncio has no public name for either. One that is fed by hand has no transport.
    fed_by = getattr(reader, "_transport", None)
    if fed_by is not None and fed_by is not transport and getattr(writer, "_reader", None) is not reader:
        text = "the reader and the writer belong to two connections"
        if writer.get_extra_info("pipe") is not None:
            text += "; of two pipes give the descriptors, before asyncio has them"
        raise config_error(name, text, "not_a_pair")


def _transport_of_ours(taken: Taken, transport: Any, reader: asyncio.StreamReader | None, name: str) -> Taken:
    """A transport of this package behind a reader, whose buffer comes along."""
    if reader is None:
        return taken
    was_reading = transport.is_reading()
    transport.pause_reading()
    initial = _take_buffer(reader, name)
    transport.pause_reading()  # taking the buffer may have resumed it

    def undo() -> None:
        if initial:
            reader.feed_data(initial)
        if was_reading and not transport.is_closing():
            transport.resume_reading()

    taken.initial_data, taken.undo = initial + taken.initial_data, undo
    return taken


def _transport_descriptor(transport: Any) -> int | None:
    for kind in ("socket", "pipe"):
        holder = transport.get_extra_info(kind)
        if holder is not None:
            with contextlib.suppress(Exception):  # then it has none
                number = holder.fileno()
                if isinstance(number, int) and number >= 0:
                    return number
    return None


def _take_buffer(reader: asyncio.StreamReader, name: str) -> bytes:
    """What a StreamReader has received and nobody has fetched, without waiting for more.

    One step of ``read()`` either ends with the bytes or begins to wait; the wait is then given up.
    """
    reading = reader.read(_EVERYTHING)
    try:
        reading.send(None)
    except StopIteration as done:
        data: bytes = done.value
        return data
    except RuntimeError as error:
        raise config_error(name, f"the reader is in use: {error}", "busy") from None
    except Exception as error:
        raise config_error(name, f"the reader has failed: {error}", "closed") from error
    reading.close()
    return b""


def _abort(transport: Any) -> None:
    """Ends the transport; the connection lives on in our duplicate."""
    if hasattr(transport, "abort"):
        transport.abort()
    else:
        transport.close()


class _Flushing(asyncio.Protocol):
    """Stands in for a transport's protocol until everything that was written is on its way."""

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._transport = transport
        self._loop = loop
        self._name = name
        self._original = _asked(transport, name, "get_protocol")
        self._done: asyncio.Future[None] = loop.create_future()

    def begin(self) -> None:
        try:
            self._transport.set_protocol(self)
            # Asks for resume_writing() when the buffer is empty.
            self._transport.set_write_buffer_limits(high=0)
        except Exception as error:
            raise not_a_transport(self._transport, self._name, error) from error
        if not self._transport.get_write_buffer_size():
            self.resume_writing()

    def resume_writing(self) -> None:
        if not self._done.done():
            self._finish()
            # Not here: asyncio calls this in the midst of its own write, and goes on with the transport.
            # Before whoever waits: what is called first runs first.
            self._loop.call_soon(_abort, self._transport)
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._finish()
            self._original.connection_lost(exc)
            self._done.set_exception(
                ConnectionLost(f"the connection broke before what was written to it had been sent: {exc}")
            )
            self._done.exception()  # somebody may never ask

    def _finish(self) -> None:
        # Its protocol hears of the end, as it would have: whoever waits for wait_closed() goes on.
        self._transport.set_protocol(self._original)

    async def wait(self) -> None:
        if current_loop() is self._loop:
            await asyncio.shield(self._done)
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.wait(), self._loop))

    def end(self) -> None:
        """The pump is over: what was not sent by now is lost."""
        if current_loop() is self._loop:
            self._give_up()
        else:
            with contextlib.suppress(RuntimeError):  # a closed loop sends nothing either
                self._loop.call_soon_threadsafe(self._give_up)

    def _give_up(self) -> None:
        if not self._done.done():
            self._finish()
            _abort(self._transport)
            self._done.set_result(None)  # whoever waits asks the pump next, and hears that it is closed


def _foreign(transport: Any, reader: asyncio.StreamReader | None, name: str) -> Taken:
    from sapper._foreign import ForeignDoor

    original = _asked(transport, name, "get_protocol")
    initial = _take_buffer(reader, name) if reader is not None else b""
    try:
        _asked(transport, name, "pause_reading")
    except SapperError:
        if initial and reader is not None:
            reader.feed_data(initial)
        raise
    door = ForeignDoor(transport, original, name)

    def open_door() -> None:
        try:
            door.open()
        except Exception as error:
            raise not_a_transport(transport, name, error) from error

    def undo() -> None:
        door.cancel()
        if initial and reader is not None:
            reader.feed_data(initial)
        with contextlib.suppress(Exception):  # it was refused because it cannot do such things
            transport.resume_reading()

    return Taken(
        door.native,
        initial_data=initial,
        commit=open_door,
        undo=undo,
        end=door.end,
        foreign=True,
        asks=True,
    )


def _wrong_type(what: object, name: str) -> SapperError:
    return config_error(
        name,
        "must be an asyncio transport or (reader, writer), a socket, a descriptor, a pair of descriptors, "
        f"(host, port) or text like tcp://host:port, not {type(what).__name__}",
        "wrong_type",
    )


def _under_tls(name: str) -> SapperError:
    return config_error(
        name,
        "is under TLS of Python's ssl already, whose keys cannot be read: give the plain socket and let "
        "credentials= do the handshake",
        "ssl_transport",
    )
