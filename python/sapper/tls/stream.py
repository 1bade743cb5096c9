r"""TLS as a stream that a program reads and writes.

::

    async with await connect("example.org", 443) as stream:
        stream.write(b"GET / HTTP/1.1\\r\\nHost: example.org\\r\\nConnection: close\\r\\n\\r\\n")
        await stream.drain()
        print(await stream.read())

A :class:`TlsStream` is a bridge whose sink is the program: the same native pump, engines, deadlines and
counters as :func:`sapper.tls.create_bridge`. Ciphertext stays in native code; cleartext is copied once on
its way into, or out of, a Python object.

Not here: a server's accept loop (:mod:`sapper.tls.listener`), adapters for other libraries
(:mod:`sapper.tls.transport`, :mod:`sapper.tls.byte_stream`).
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any, Unpack, cast

from sapper import _arguments, _native
from sapper._joining import build
from sapper._loop import current_loop, running_post
from sapper._mistakes import again, unused
from sapper._options import config_error
from sapper._owned import dropped
from sapper._takeover import EndpointLike, Taken, not_a_transport, take
from sapper.errors import ApiMisuseError, CloseDeadline, ErrorContext, SapperError
from sapper.pump_options import PumpOptions
from sapper.stats import PumpStats
from sapper.stream import ByteStream
from sapper.tls.bridge import Bridge, HandshakeInfo, PeerPolicy, asked, side, with_protocol
from sapper.tls.config import Credentials, TlsConfig
from sapper.tls.session import TlsSession, extra_info
from sapper.tls.stream_options import ClientOptions, ServerOptions, check_connecting, known, pump_options

__all__ = ["TlsStream", "connect", "start_client", "start_server"]


class TlsStream(ByteStream):
    """A TLS connection: ordered bytes, both ways, each of which ends by itself.

    Made by :func:`connect`, :func:`start_client`, :func:`start_server` and listeners. The end of our
    direction is close_notify; a peer's connection that ends without one is an error behind the bytes that
    arrived (ConnectionLost, reason ``"truncated"``), never an orderly end.
    """

    def __init__(self) -> None:
        if current_loop() is None:
            raise ApiMisuseError("a TlsStream needs a running event loop", ErrorContext(reason="no_loop"))
        super().__init__()
        self._door = _native.StreamDoor(self._mailbox, self._key)
        self._bridge: Bridge | None = None
        self._info: HandshakeInfo | None = None
        self._error: SapperError | None = None
        self._close_timeout = 0.0
        self._giving_up: asyncio.TimerHandle | None = None
        # Where a transport reads and writes: who hears of news, and of the end.
        self._on_news: Callable[[], None] | None = None
        self._on_over: Callable[[SapperError | None], None] | None = None

    # -- what it tells ---------------------------------------------------------------------------

    @property
    def info(self) -> HandshakeInfo:
        """What the handshake agreed on."""
        assert self._info is not None  # noqa: S101 - nobody gets a stream before
        return self._info

    def stats(self) -> PumpStats:
        """Counters now. ``decapsulate`` is what arrived for us, ``encapsulate`` what we sent."""
        return self._session().stats()

    async def export_keying_material(self, label: str, length: int, context: bytes | None = None) -> bytes:
        """Keying material of this connection for a purpose (RFC 5705; RFC 8446, section 7.5).

        Args:
            label: The purpose; 1 to 249 bytes.
            length: Bytes wanted, 1 to 65535; of TLS 1.3 at most 255 times its hash (8160, of SHA-384 12240).
            context: Further input; ``None`` and ``b""`` differ in TLS 1.2.

        Raises:
            ConfigError: An argument is wrong.
            ClosedError: The connection is over.
        """
        return await self._session().export_keying_material(label, length, context)

    async def channel_binding(self) -> bytes:
        """The channel binding ``tls-exporter`` (RFC 9266): the same at both ends, and nowhere else.

        The other one, ``tls-server-end-point``, is ``info.server_end_point``.

        Raises:
            ApiMisuseError: This is TLS 1.2.
            ClosedError: The connection is over.
        """
        return await self._session().channel_binding()

    async def update_keys(self) -> None:
        """New keys for our sending direction (TLS 1.3). Long connections do this by themselves.

        Raises:
            ApiMisuseError: This is TLS 1.2.
            ClosedError: The connection is over.
        """
        await self._session().update_keys()

    async def confirmed(self) -> None:
        """Waits until the peer has finished its part of the handshake.

        It has, unless it is a client whose early data was accepted (``info.early_data``): what is read until
        then may be a recording that somebody sends again. Such a client has 30 seconds.

        Raises:
            ClosedError: The connection ended before.
        """
        await running_post().call(self._session()._native.confirmed)

    async def unused_data(self) -> bytes:
        """What the peer sent behind its close_notify, once the connection is closed. Given once.

        Raises:
            ApiMisuseError: It is not closed yet: both directions have to end first.
        """
        return await self._session().unused_data()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What is known of the connection, by asyncio's names.

        ``"peername"``, ``"sockname"``, ``"ssl_object"`` (a :class:`~sapper.tls.session.TlsSession`),
        ``"peercert"``, ``"cipher"``, ``"compression"``, ``"socket"`` (addresses only: the descriptor
        is the data plane's), ``"tls_info"`` (:attr:`info`).
        """
        local, peer = self._session()._native.addresses()
        return extra_info(TlsSession(self.info), local, peer, name, default)

    # -- its end ---------------------------------------------------------------------------------

    async def wait_closed(self) -> None:
        """Waits until everything is closed and every resource given back.

        If cancelled, only the waiting ends.

        Raises:
            SapperError: Not all that was written has left.
        """
        await super().wait_closed()
        await self._session().wait_closed()
        error = self._error
        # What did not arrive for us is no news to who closed: it was not going to be read.
        unread = self._closed and error is not None and error.direction == "decapsulate"
        if error is not None and (not unread or self._undelivered()):
            raise error

    def _undelivered(self) -> bool:
        """Whether the end came before all that was written had left."""
        return self._lost or self.stats().encapsulate.bytes < self._taken

    def __del__(self) -> None:
        if getattr(self, "_closed", True) or self._bridge is None:
            super().__del__()
            return
        dropped(self, self._let_go)

    def _let_go(self) -> None:
        try:
            if self._door is not None:
                self._door.abandon_reading()
            self._session().stop(self._close_timeout)
        finally:
            super().__del__()

    # -- for this package ------------------------------------------------------------------------

    def _session(self) -> Bridge:
        assert self._bridge is not None  # noqa: S101 - nobody gets a stream before
        return self._bridge

    def _listen_to(self, bridge: Bridge, close_timeout: float) -> None:
        self._bridge, self._close_timeout = bridge, close_timeout

    def close(self) -> None:
        """Says goodbye (close_notify); what was written is still delivered, for ``close_timeout``."""
        if self._closed:
            return
        super().close()
        loop = self._post.loop
        if self._unwritten and loop is not None:
            # A peer that takes nothing does not keep us.
            self._giving_up = loop.call_later(self._close_timeout, self._give_up)

    def _give_up(self) -> None:
        # Whoever gives no time wants nothing delivered.
        if self._unwritten and self._close_timeout > 0:
            text = "the time of the drain was too short for what waited"
            lost = f"{text}: at least {self._unwritten_size} bytes are lost"
            self._ended(CloseDeadline(lost, ErrorContext(phase="close")))
        self.abort()

    def _finish(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
        if self._bridge is not None:
            self._bridge.stop(self._close_timeout)
        super()._finish()

    def _break_off(self) -> None:
        # The bridge breaks the connection off; a broken sink would only be another story about it.
        if self._bridge is not None:
            self._bridge.abort()

    def _bridge_over(self) -> None:
        # What ran over this stream is over; what it still sent goes out.
        self._session().stop(self._close_timeout)

    def _failure(self) -> SapperError | None:
        return self._error

    def _ended(self, error: SapperError | None) -> None:
        """The bridge is over, or about to be, with this error."""
        self._error = self._error or error
        if self._unwritten:
            self._flush()
        self._wake_drainers()

    def _given_back(self) -> None:
        """The bridge is over and everything given back."""
        self._ended(None)
        if self._on_over is not None:
            self._on_over(self._error)

    def _serve_transport(
        self, news: Callable[[], None] | None, over: Callable[[SapperError | None], None] | None
    ) -> None:
        self._on_news, self._on_over = news, over

    def _notified(self) -> None:
        super()._notified()
        if self._on_news is not None:
            self._on_news()

    def _heard(self, error: SapperError) -> None:
        if error.reason != "taken" and self._error is None:
            self._error = error


async def connect(host: str, port: int, **options: Unpack[ClientOptions]) -> TlsStream:
    """Connects over TCP and shakes hands as client. If cancelled, nothing stays open.

    Args:
        host: Name or address; a name is tried over IPv6 and IPv4 side by side.
        port: Its port.
        options: By name: :class:`~sapper.tls.stream_options.ClientOptions`.

    Raises:
        ConfigError: An argument is wrong; ``field`` names it.
        ConnectError, Unreachable, ConnectDeadline: No way to the peer.
        TlsError, CertificateError, CredentialsRejected, IncompatiblePeer, HandshakeDeadline,
            ConnectionLost: The handshake failed.
        PolicyDenied: The policy said no.
    """
    known("connect", ClientOptions, options)
    _arguments.host_name(host, "host")
    _arguments.whole(port, "port", 1, 65_535)
    try:
        return await start_client((host, port), **options)
    except SapperError as error:
        if error.field != "stream":
            raise
        raise again(error, error.message, "host") from error.__cause__


async def start_client(
    stream: EndpointLike, *, initial_data: bytes = b"", **options: Unpack[ClientOptions]
) -> TlsStream:
    """Shakes hands as client over any stream. If cancelled, the stream is closed.

    Args:
        stream: What lies underneath: another :class:`TlsStream` (TLS in TLS), an end of
            :func:`sapper.stream.memory_pair`, a socket (ours from then on), an asyncio
            ``(reader, writer)`` or transport (taken over with what it holds), a descriptor or a pair of
            them (duplicated), ``(host, port)``, or text such as ``"unix:/path"``
            (:mod:`sapper.endpoint`). An asyncio transport without a descriptor is used as it is: its
            ciphertext passes Python.
        initial_data: Ciphertext that was already read from ``stream``.
        options: By name: :class:`~sapper.tls.stream_options.ClientOptions`.

    Raises:
        As :func:`connect`. After a ConfigError nothing was taken.
    """
    known("start_client", ClientOptions, options)
    config = TlsConfig.of(options.get("credentials"), early_data=True)
    return await _start(stream, config, initial_data, options)


async def start_server(
    stream: EndpointLike,
    *,
    credentials: Credentials | TlsConfig,
    initial_data: bytes = b"",
    **options: Unpack[ServerOptions],
) -> TlsStream:
    """Shakes hands as server over any stream. If cancelled, the stream is closed.

    Args:
        stream: As for :func:`start_client`.
        credentials: What we prove, and whom we believe.
        initial_data: Ciphertext that was already read from ``stream``.
        options: By name: :class:`~sapper.tls.stream_options.ServerOptions`.

    Raises:
        As :func:`connect`. After a ConfigError nothing was taken.
    """
    known("start_server", ServerOptions, options)
    config = TlsConfig.of(credentials, early_data=True)
    return await _start(stream, config, initial_data, cast("ClientOptions", options), server_side=True)


class _Session(Bridge):
    """The bridge below a stream."""

    def _given_up(self) -> None:
        # The peer may think that the handshake is done: an end in order would be an empty answer to it.
        self._native.abort()


async def _start(
    stream: EndpointLike,
    config: TlsConfig,
    initial_data: bytes,
    given: ClientOptions,
    *,
    server_side: bool = False,
) -> TlsStream:
    if not isinstance(initial_data, bytes | bytearray | memoryview):
        raise config_error("initial_data", f"must be bytes, not {type(initial_data).__name__}", "wrong_type")
    options = pump_options(given)
    policy, early = given.get("peer_policy"), _early_data(given)
    config = with_protocol(config, options.upgrade)
    if isinstance(stream, ByteStream):
        try:
            await stream.drain()
        except AttributeError as error:  # it was never set up
            raise not_a_transport(stream, "stream", error) from error
    taken = take(stream, "stream")
    try:
        check_connecting(options, taken.native)
        tls = side(taken, config, server_side, given.get("server_hostname"), "server_hostname")
    except BaseException:
        taken.give_back()
        raise
    return await shake(taken, tls, bytes(initial_data), options, policy, early)


def _early_data(given: ClientOptions) -> tuple[bytes, bool] | None:
    resend = _arguments.flag(given.get("resend_early_data", False), "resend_early_data")
    data = _arguments.data(given.get("early_data", b""), "early_data")
    if not data:
        if resend:
            raise unused("resend_early_data", "there is no early_data")
        return None
    if given.get("peer_policy") is not None:
        raise config_error("early_data", "is sent before peer_policy can be asked about the server")
    return data, resend


async def shake(
    taken: Taken,
    tls: _native.TlsSide,
    initial_data: bytes,
    options: PumpOptions,
    policy: PeerPolicy | None,
    early: tuple[bytes, bool] | None = None,
) -> TlsStream:
    """A stream over an endpoint that is in our hands."""
    if options.upgrade == "mysql":
        taken.give_back()
        raise config_error("upgrade", '"mysql" needs both ends before TLS: make a bridge', "two_sided")
    try:
        stream = TlsStream()
    except BaseException:
        taken.give_back()
        raise
    assert stream._door is not None  # noqa: S101 - just made
    me = weakref.ref(stream)

    def ended(error: SapperError) -> None:
        if (alive := me()) is not None:
            alive._ended(error)

    def given_back() -> None:
        if (alive := me()) is not None:
            alive._given_back()

    try:
        bridge = build(
            _Session,
            (taken, tls, initial_data),
            (Taken(stream._door.far_end()), None),
            options,
            on_error=ended,
            on_close=given_back,
            policy=asked(policy),
            early=early,
        )
        try:
            stream._info = await bridge.handshake()
        except SapperError:
            await bridge.wait_closed()  # a failed call leaves nothing behind
            raise
        bridge.start()
    except BaseException:
        stream._closed = True
        stream._deafen()
        raise
    stream._listen_to(bridge, options.close_timeout)
    return stream
