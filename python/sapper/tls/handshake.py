"""TLS in the shape of the WebAssembly proposal ``wasi:tls``, both drafts of it, and their server twins.

The first draft's, over an input and an output::

    connection, tls_input, tls_output = await ClientHandshake("example.org", input, output).finish()
    tls_output.write(b"...")
    connection.close_notify()

The newer one's, over streams of one direction each::

    connector = Connector()
    ciphertext_out, sent = connector.send(cleartext_in)
    cleartext_out, received = connector.receive(ciphertext_in)
    await connector.connect("example.org")

:class:`ServerHandshake` and :class:`Acceptor` are the other side. What the proposal has not got is there in
the same style: credentials, rules about the peer, and on a :class:`Connection` what was agreed.

Not here: wasm. This is the shape for Python programs; the engines below are those of every TLS stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Protocol

from sapper import _native
from sapper._joining import build
from sapper._takeover import EndpointLike, Taken, take
from sapper.errors import (
    ApiMisuseError,
    ClosedError,
    ConfigError,
    ConnectionLost,
    ErrorContext,
    NotStartedError,
    SapperError,
)
from sapper.pump_options import PumpOptions
from sapper.stream import Buffer, ByteStream, memory_pair
from sapper.tls.bridge import Bridge, HandshakeInfo
from sapper.tls.config import Credentials, TlsConfig
from sapper.tls.stream import TlsStream, start_client, start_server

__all__ = [
    "Acceptor",
    "ClientHandshake",
    "Connection",
    "Connector",
    "FutureStreams",
    "InputStream",
    "OutputStream",
    "Readable",
    "ServerHandshake",
]

_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_LONGEST_NAME = 253
#: Bytes of one read where a reader of asyncio's feeds us.
_PIECE = 64 * 1024


class Readable(Protocol):
    """What has bytes to read: a stream of this package, an ``asyncio.StreamReader``."""

    async def read(self, n: int = -1, /) -> bytes:
        """Some bytes; ``b""`` at the end."""


# -- the first draft -----------------------------------------------------------------------------------


class InputStream:
    """The reading half of a TLS connection."""

    def __init__(self, stream: TlsStream, shared: _Halves) -> None:
        self._stream = stream
        self._shared = shared

    async def read(self, n: int = -1) -> bytes:
        """As :meth:`sapper.tls.TlsStream.read`. A peer that was cut off is an error, no end."""
        return await self._stream.read(n)

    async def readinto(self, buffer: bytearray | memoryview) -> int:
        """As :meth:`sapper.tls.TlsStream.readinto`."""
        return await self._stream.readinto(buffer)

    def close(self) -> None:
        """Drops this half. With the other one dropped too, the connection ends in order."""
        self._shared.drop("input")

    def _hand_over(self, name: str) -> Taken:
        return self._stream._hand_over(name)


class OutputStream:
    """The writing half of a TLS connection."""

    def __init__(self, stream: TlsStream, shared: _Halves) -> None:
        self._stream = stream
        self._shared = shared

    def write(self, data: Buffer) -> None:
        """As :meth:`sapper.tls.TlsStream.write`."""
        self._stream.write(data)

    async def drain(self) -> None:
        """As :meth:`sapper.tls.TlsStream.drain`."""
        await self._stream.drain()

    def close(self) -> None:
        """Drops this half: close_notify, behind what was written."""
        if not self._stream.is_closing():
            self._stream.write_eof()
        self._shared.drop("output")

    def _hand_over(self, name: str) -> Taken:
        return self._stream._hand_over(name)


class Connection:
    """A TLS connection beside its two halves."""

    def __init__(self, stream: TlsStream) -> None:
        self._stream = stream

    @property
    def info(self) -> HandshakeInfo:
        """What was agreed: version, suite, group, ALPN, the peer's certificate."""
        return self._stream.info

    @property
    def stream(self) -> TlsStream:
        """The same connection as one stream."""
        return self._stream

    def close_output(self) -> None:
        """Says close_notify behind what was written; reading goes on. May be repeated."""
        if not self._stream.is_closing():
            self._stream.write_eof()

    def close_notify(self) -> None:
        """:meth:`close_output`, by the name of the proposal's explainer."""
        self.close_output()

    async def export_keying_material(self, label: str, length: int, context: bytes | None = None) -> bytes:
        """As :meth:`sapper.tls.TlsStream.export_keying_material`."""
        return await self._stream.export_keying_material(label, length, context)

    async def channel_binding(self) -> bytes:
        """``tls-exporter``; ``tls-server-end-point`` is ``info.server_end_point``."""
        return await self._stream.channel_binding()

    async def aclose(self) -> None:
        """Ends the connection in order, whatever halves are left."""
        await self._stream.aclose()


class FutureStreams(Awaitable[tuple[Connection, InputStream, OutputStream]]):
    """A handshake under way: await it, or look with :meth:`get` when :meth:`subscribe` says so.

    Dropped before its streams were taken, it ends the handshake, or the connection, without a word.
    """

    def __init__(self, shaking: Awaitable[TlsStream]) -> None:
        self._taken = False
        self._task = asyncio.ensure_future(shaking)

    def get(self) -> tuple[Connection, InputStream, OutputStream] | None:
        """The connection and its halves, once; ``None`` as long as the handshake is under way.

        Raises:
            ApiMisuseError: It was asked before, after the handshake.
            SapperError: The handshake failed.
        """
        if not self._task.done():
            return None
        if self._taken:
            raise ApiMisuseError("the streams were taken already", ErrorContext(reason="taken"))
        self._taken = True
        stream = self._task.result()
        halves = _Halves(stream)
        return Connection(stream), InputStream(stream, halves), OutputStream(stream, halves)

    async def subscribe(self) -> None:
        """Waits until :meth:`get` has an answer. If cancelled, the handshake goes on."""
        await asyncio.wait([self._task])

    def __await__(self) -> Generator[Any, None, tuple[Connection, InputStream, OutputStream]]:
        return self._wait().__await__()

    async def _wait(self) -> tuple[Connection, InputStream, OutputStream]:
        try:
            await self.subscribe()
        except asyncio.CancelledError:
            self._task.cancel()
            raise
        found = self.get()
        assert found is not None  # noqa: S101 - the task is done
        return found

    def __del__(self) -> None:
        task: asyncio.Future[TlsStream] | None = getattr(self, "_task", None)
        if task is None or self._taken:
            return
        # In the loop, whichever thread drops this, and behind the task's first step: what it takes over then
        # is closed with it. With the loop everything has ended.
        with contextlib.suppress(RuntimeError):
            task.get_loop().call_soon_threadsafe(_give_up, task)


def _give_up(task: asyncio.Future[TlsStream]) -> None:
    task.cancel()
    task.add_done_callback(_forget)


def _forget(task: asyncio.Future[TlsStream]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()


class ClientHandshake:
    """A client's handshake over an input and an output.

    Args:
        server_name: Name of the server: sent, and checked in its certificate.
        input: Where its bytes come from: a descriptor, an ``asyncio.StreamReader``, an
            :class:`InputStream` (TLS in TLS), an end of a memory pair, …
        output: Where ours go. The same object twice is one stream both ways.
        credentials: As for :func:`sapper.tls.connect`.
        options: As for :func:`sapper.tls.start_client`.
    """

    def __init__(
        self,
        server_name: str,
        input: Any,
        output: Any,
        *,
        credentials: Credentials | TlsConfig | None = None,
        **options: Any,
    ) -> None:
        self._name = server_name
        self._under: Any = _underneath(input, output)
        self._credentials = credentials
        self._options = options

    def finish(self) -> FutureStreams:
        """Begins the handshake and uses this object up.

        Raises:
            ApiMisuseError: It was called before, or there is no running event loop.
        """
        under, self._under = _once(self._under), None
        return FutureStreams(self._shake(under))

    async def _shake(self, under: Any) -> TlsStream:
        _check_name(self._name)
        return await start_client(
            under, credentials=self._credentials, server_hostname=self._name, **self._options
        )


class ServerHandshake:
    """A server's handshake over an input and an output; the twin of :class:`ClientHandshake`.

    Args:
        input: As there.
        output: As there.
        credentials: What we prove, and whom we believe.
        options: As for :func:`sapper.tls.start_server`.
    """

    def __init__(
        self, input: Any, output: Any, *, credentials: Credentials | TlsConfig, **options: Any
    ) -> None:
        self._under: Any = _underneath(input, output)
        self._credentials = credentials
        self._options = options

    def finish(self) -> FutureStreams:
        """Begins the handshake and uses this object up.

        Raises:
            ApiMisuseError: It was called before, or there is no running event loop.
        """
        under, self._under = _once(self._under), None
        return FutureStreams(start_server(under, credentials=self._credentials, **self._options))


class _Halves:
    """Which halves of a connection are still in use."""

    def __init__(self, stream: TlsStream) -> None:
        self._stream = stream
        self._left = {"input", "output"}

    def drop(self, which: str) -> None:
        self._left.discard(which)
        if not self._left:
            self._stream.close()


def _underneath(first: Any, second: Any) -> Any:
    if first is second:
        return first
    if (
        isinstance(first, InputStream)
        and isinstance(second, OutputStream)
        and first._stream is second._stream
    ):
        return first._stream
    return first, second


def _once(under: Any) -> Any:
    if under is None:
        raise ApiMisuseError("finish() was called already", ErrorContext(reason="consumed"))
    return under


# -- the second draft ----------------------------------------------------------------------------------


class _Half(ByteStream):
    """What ``send`` and ``receive`` give: a stream to read, with the result of its direction."""

    def __init__(self) -> None:
        super().__init__()
        self.result: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Nobody has to ask.
        self.result.add_done_callback(lambda done: done.cancelled() or done.exception())

        #: Whether the handshake is done: an end before it is none.
        self.established = False
        #: Whether the connection is over.
        self.over = False

    def tell(self, error: SapperError | None) -> None:
        if self.result.done():
            return
        if error is None:
            self.result.set_result(None)
        else:
            self.result.set_exception(error)

    def _stop_reading(self, door: _native.StreamDoor) -> None:
        """Dropped: where its end was not read yet, whoever writes to it fails."""
        if self.result.done():
            super()._stop_reading(door)
        else:
            door.stop_reading()
            if self.over:
                self.dropped()

    def dropped(self) -> None:
        """Nobody will read the end."""
        self.tell(ClosedError("the stream was dropped before its end"))

    def _break_off(self) -> None:
        """Nobody writes here: it is dropped, and what comes is not thrown away as if it had been read."""
        if self._door is not None:
            self._stop_reading(self._door)

    def _fetch(self, n: int) -> bytes | None:
        data = super()._fetch(n)
        if data == b"":
            if not self.established:
                raise ClosedError("the handshake was given up")
            self.tell(None)
        return data

    async def readinto(self, buffer: bytearray | memoryview) -> int:
        """As any stream's; its end is a result here."""
        view = memoryview(buffer).cast("B")
        data = await self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def _heard(self, error: SapperError) -> None:
        self.tell(error)


class _Direct:
    """What a connector and an acceptor share: the two directions, each configured once."""

    _verb = ""

    def __init__(self, credentials: Credentials | TlsConfig | None, options: PumpOptions | None) -> None:
        self._config = TlsConfig.of(credentials)
        self._options = options or PumpOptions()
        self._send: tuple[Any, _Half, ByteStream] | None = None
        self._receive: tuple[Any, _Half, ByteStream] | None = None
        self._consumed = False
        self._bridge: Bridge | None = None

    def send(
        self, cleartext: ByteStream | Readable | EndpointLike
    ) -> tuple[ByteStream, asyncio.Future[None]]:
        """Configures the sending direction.

        Args:
            cleartext: What is to be sent; its end says close_notify. A stream of this package or a
                descriptor is moved natively, an ``asyncio.StreamReader`` through Python.

        Returns:
            The ciphertext to carry to the peer, and the result: done when all of it was read (with the
            connection, where something native carries it), failed where that cannot be. A second call
            gives a closed stream and ApiMisuseError (``"send already configured"``).
        """
        if self._send is not None or self._consumed:
            return _refused("send already configured")
        self._send = (cleartext, *_half_and_writer())
        return self._send[1], self._send[1].result

    def receive(
        self, ciphertext: ByteStream | Readable | EndpointLike
    ) -> tuple[ByteStream, asyncio.Future[None]]:
        """Configures the receiving direction.

        Args:
            ciphertext: What comes from the peer; as in :meth:`send`.

        Returns:
            The cleartext, and the result of both together: done at the peer's close_notify, failed where
            the ciphertext was cut off before it or is none. A second call gives a closed stream and
            ApiMisuseError (``"receive already configured"``).
        """
        if self._receive is not None or self._consumed:
            return _refused("receive already configured")
        self._receive = (ciphertext, *_half_and_writer())
        return self._receive[1], self._receive[1].result

    async def wait_closed(self) -> None:
        """Waits until the connection is over and everything is given back; how it ended the results say.

        If cancelled, only the waiting ends.
        """
        if self._bridge is not None:
            with contextlib.suppress(SapperError):
                await self._bridge.wait_closed()

    async def _shake(self, server_name: str | None) -> HandshakeInfo:
        for configured, name in ((self._send, "send"), (self._receive, "receive")):
            if configured is None:
                raise NotStartedError(f"{name}() must be called before {self._verb}()")
        assert self._send is not None  # noqa: S101 - looked at above
        assert self._receive is not None  # noqa: S101 - looked at above
        if self._consumed:
            raise ApiMisuseError(f"{self._verb}() was called already", ErrorContext(reason="consumed"))
        self._consumed = True
        cleartext, ciphertext_out, ciphertext_writer = self._send
        ciphertext, cleartext_out, cleartext_writer = self._receive
        halves = (ciphertext_out, cleartext_out)
        feeding: list[asyncio.Task[None]] = []

        def cut_off(why: Exception) -> None:
            # A sink that breaks would be an orderly end to the peer.
            for half in halves:
                half.tell(ConnectionLost(f"the cleartext to be sent was cut off: {why!r}"))
            if self._bridge is not None:
                self._bridge.abort()

        try:
            if self._verb == "connect":
                _check_name(server_name)
            inner = take((_native_or_fed(cleartext, feeding, cut_off), cleartext_writer), "cleartext")
            try:
                network = take((_native_or_fed(ciphertext, feeding), ciphertext_writer), "ciphertext")
            except BaseException:
                inner.give_back()
                raise

            def over(error: SapperError | None = None) -> None:
                for half in halves:
                    # In order, its reader finds the end by itself; a half that natively moves on has none.
                    # What a handshake failed with is its caller's to tell.
                    half.over = half.established
                    if error is not None or (half._handed_over and half.established):
                        half.tell(error)
                    elif half.over and half.is_closing():
                        half.dropped()
                for task in feeding:
                    task.cancel()

            bridge = build(
                Bridge,
                (network, (self._config.native, server_name is None, server_name), b""),
                (inner, None),
                self._options,
                on_error=over,
                on_close=over,
            )
            self._bridge = bridge
            info = await bridge.handshake()
            for half in halves:
                half.established = True
            bridge.start()
        except BaseException as error:
            told = error if isinstance(error, SapperError) else ClosedError("the handshake was given up")
            for half in halves:
                half.tell(told)
            for task in feeding:
                task.cancel()
            for writer in (ciphertext_writer, cleartext_writer):
                writer.abort()
            raise
        return info


class Connector(_Direct):
    """A client of the newer draft. Configure both directions, then :meth:`connect`, once.

    Args:
        credentials: As for :func:`sapper.tls.connect`.
        options: Times (:class:`sapper.pump.PumpOptions`).
    """

    _verb = "connect"

    def __init__(
        self, credentials: Credentials | TlsConfig | None = None, *, options: PumpOptions | None = None
    ) -> None:
        super().__init__(credentials, options)

    async def connect(self, server_name: str) -> HandshakeInfo:
        """Shakes hands as client; bytes flow from then on. If cancelled, everything ends.

        Args:
            server_name: Name of the server: sent, and checked in its certificate.

        Raises:
            NotStartedError: ``send() must be called before connect()``, or the same of ``receive()``.
            ConfigError: ``invalid server name``.
            SapperError: The handshake failed; both results fail with the same.
        """
        return await self._shake(server_name)


class Acceptor(_Direct):
    """A server of the newer draft; the twin of :class:`Connector`.

    Args:
        credentials: What we prove, and whom we believe.
        options: Times (:class:`sapper.pump.PumpOptions`).
    """

    _verb = "accept"

    def __init__(self, credentials: Credentials | TlsConfig, *, options: PumpOptions | None = None) -> None:
        super().__init__(credentials, options)
        self._config.for_server().check_server()

    async def accept(self) -> HandshakeInfo:
        """Shakes hands as server; bytes flow from then on. If cancelled, everything ends.

        Raises:
            NotStartedError: ``send() must be called before accept()``, or the same of ``receive()``.
            SapperError: The handshake failed; both results fail with the same.
        """
        return await self._shake(None)


def _half_and_writer() -> tuple[_Half, ByteStream]:
    half, writer = _Half(), ByteStream()
    half._door, writer._door = _native.StreamDoor.pair(half._mailbox, half._key, writer._key)
    return half, writer


def _refused(message: str) -> tuple[ByteStream, asyncio.Future[None]]:
    half, writer = _half_and_writer()
    half.tell(ApiMisuseError(message, ErrorContext(reason="configured")))
    half.close()
    writer.close()
    return half, half.result


def _native_or_fed(
    source: Any, feeding: list[asyncio.Task[None]], cut_off: Callable[[Exception], None] | None = None
) -> Any:
    """What native code reads from: the source itself, or a stream that this loop feeds from it."""
    if not isinstance(source, asyncio.StreamReader):
        return source
    writer, end = memory_pair()
    feeding.append(asyncio.create_task(_feed(source, writer, cut_off)))
    return end


async def _feed(
    source: asyncio.StreamReader, writer: ByteStream, cut_off: Callable[[Exception], None] | None
) -> None:
    try:
        while data := await source.read(_PIECE):
            writer.write(data)
            await writer.drain()
    except asyncio.CancelledError:
        writer.abort()
        return
    except Exception as error:  # noqa: BLE001 - whoever feeds a reader says why it ends
        if cut_off is not None:
            cut_off(error)
        writer.abort()  # cut off: no end
        return
    with contextlib.suppress(SapperError):
        await writer.aclose()


def _check_name(name: object) -> None:
    if isinstance(name, str) and _is_name(name):
        return
    raise ConfigError("invalid server name", ErrorContext(reason="invalid_name"))


def _is_name(name: str) -> bool:
    """As native code has it: an address without a zone, or a DNS name that nobody can take for an address."""
    with contextlib.suppress(ValueError):
        return getattr(ipaddress.ip_address(name), "scope_id", None) is None
    name = name.removesuffix(".")
    labels = name.split(".")
    fits = len(name) <= _LONGEST_NAME and all(_LABEL.fullmatch(label) for label in labels)
    return fits and not labels[-1].isdigit()
