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
import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from sapper import _native
from sapper._loop import current_loop
from sapper._options import config_error
from sapper._takeover import EndpointLike, Taken, take
from sapper.errors import ApiMisuseError, ErrorContext, SapperError
from sapper.pump import PumpOptions, Upgrade, build, options_from
from sapper.stats import PumpStats
from sapper.stream import ByteStream
from sapper.tls.bridge import Bridge, HandshakeInfo, PeerPolicy, asked, side, with_protocol
from sapper.tls.config import Credentials, TlsConfig
from sapper.tls.session import TlsSession, extra_info

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
            length: Bytes wanted, 1 to 65535.
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
            SapperError: What was written may not have arrived.
        """
        await super().wait_closed()
        await self._session().wait_closed()
        error = self._error
        # What did not arrive for us is no news to who closed: it was not going to be read.
        if error is not None and not (self._closed and error.direction == "decapsulate"):
            raise error

    def __del__(self) -> None:
        if getattr(self, "_closed", True) or self._bridge is None:
            super().__del__()
            return
        said = f"unclosed {self!r}"
        with contextlib.suppress(SapperError):
            if self._door is not None:
                self._door.abandon_reading()
            self._bridge.stop(self._close_timeout)
        super().__del__()
        # Last: where warnings are errors nothing behind it runs.
        warnings.warn(said, ResourceWarning, source=self, stacklevel=2)

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
            self._giving_up = loop.call_later(self._close_timeout, self.abort)

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


async def connect(
    host: str,
    port: int,
    *,
    credentials: Credentials | TlsConfig | None = None,
    server_hostname: str | None = None,
    peer_policy: PeerPolicy | None = None,
    connect_timeout: float | None = None,
    handshake_timeout: float | None = None,
    idle_timeout: float | None = None,
    close_timeout: float | None = None,
    policy_timeout: float | None = None,
    upgrade: Upgrade | None = None,
) -> TlsStream:
    """Connects over TCP and shakes hands as client. If cancelled, nothing stays open.

    Args:
        host: Name or address; a name is tried over IPv6 and IPv4 side by side.
        port: Its port.
        credentials: :class:`Credentials`, or a :class:`TlsConfig` with all options. ``None`` checks the
            server against the system's roots.
        server_hostname: Name to check in the server's certificate; ``None`` is ``host``.
        peer_policy: Asked about the peer after its verification and before any data.
        connect_timeout: Seconds for making the connection (30).
        handshake_timeout: Seconds for TLS and the policy together (30).
        idle_timeout: Seconds without a byte in either direction after which the connection ends (never).
        close_timeout: Seconds within which :meth:`TlsStream.close` delivers what was written (2).
        policy_timeout: Seconds for the policy's answer (5).
        upgrade: What the protocol says in clear before TLS: ``"postgres"``, ``"smtp"``, ``"imap"``, …

    Raises:
        ConfigError: An argument is wrong; ``field`` names it.
        ConnectError, Unreachable, ConnectDeadline: No way to the peer.
        TlsError, CertificateError, CredentialsRejected, IncompatiblePeer, HandshakeDeadline,
            ConnectionLost: The handshake failed.
        PolicyDenied: The policy said no.
    """
    return await start_client(
        (host, port),
        credentials=credentials,
        server_hostname=server_hostname,
        peer_policy=peer_policy,
        connect_timeout=connect_timeout,
        handshake_timeout=handshake_timeout,
        idle_timeout=idle_timeout,
        close_timeout=close_timeout,
        policy_timeout=policy_timeout,
        upgrade=upgrade,
    )


async def start_client(
    stream: EndpointLike,
    *,
    credentials: Credentials | TlsConfig | None = None,
    server_hostname: str | None = None,
    initial_data: bytes = b"",
    peer_policy: PeerPolicy | None = None,
    connect_timeout: float | None = None,
    handshake_timeout: float | None = None,
    idle_timeout: float | None = None,
    close_timeout: float | None = None,
    policy_timeout: float | None = None,
    upgrade: Upgrade | None = None,
) -> TlsStream:
    """Shakes hands as client over any stream. If cancelled, the stream is closed.

    Args:
        stream: What lies underneath: another :class:`TlsStream` (TLS in TLS), an end of
            :func:`sapper.stream.memory_pair`, a socket (ours from then on), an asyncio
            ``(reader, writer)`` or transport (taken over with what it holds), a descriptor or a pair of
            them (duplicated), ``(host, port)``, or text such as ``"unix:/path"``
            (:mod:`sapper.endpoint`). An asyncio transport without a descriptor is used as it is: its
            ciphertext passes Python.
        credentials: As for :func:`connect`.
        server_hostname: Name to check in the server's certificate; ``None`` is the host of ``stream``,
            where it has one.
        initial_data: Ciphertext that was already read from ``stream``.
        peer_policy: As for :func:`connect`, and so are the times.
        connect_timeout: Seconds.
        handshake_timeout: Seconds.
        idle_timeout: Seconds.
        close_timeout: Seconds.
        policy_timeout: Seconds.
        upgrade: As for :func:`connect`.

    Raises:
        As :func:`connect`. After a ConfigError nothing was taken.
    """
    options = _options(
        connect_timeout, handshake_timeout, idle_timeout, close_timeout, policy_timeout, upgrade
    )
    return await _start(stream, credentials, False, server_hostname, initial_data, peer_policy, options)


async def start_server(
    stream: EndpointLike,
    *,
    credentials: Credentials | TlsConfig,
    initial_data: bytes = b"",
    peer_policy: PeerPolicy | None = None,
    connect_timeout: float | None = None,
    handshake_timeout: float | None = None,
    idle_timeout: float | None = None,
    close_timeout: float | None = None,
    policy_timeout: float | None = None,
    upgrade: Upgrade | None = None,
) -> TlsStream:
    """Shakes hands as server over any stream. If cancelled, the stream is closed.

    Args:
        stream: As for :func:`start_client`.
        credentials: What we prove, and whom we believe.
        initial_data: Ciphertext that was already read from ``stream``.
        peer_policy: As for :func:`connect`, and so are the times.
        connect_timeout: Seconds.
        handshake_timeout: Seconds.
        idle_timeout: Seconds.
        close_timeout: Seconds.
        policy_timeout: Seconds.
        upgrade: As for :func:`connect`.

    Raises:
        As :func:`connect`. After a ConfigError nothing was taken.
    """
    options = _options(
        connect_timeout, handshake_timeout, idle_timeout, close_timeout, policy_timeout, upgrade
    )
    return await _start(stream, credentials, True, None, initial_data, peer_policy, options)


def _options(
    connect: float | None,
    handshake: float | None,
    idle: float | None,
    close: float | None,
    policy: float | None,
    upgrade: Upgrade | None,
) -> PumpOptions:
    return options_from(
        None,
        {
            "connect_timeout": connect,
            "handshake_timeout": handshake,
            "idle_timeout": idle,
            "close_timeout": close,
            "policy_timeout": policy,
            "upgrade": upgrade,
        },
    )


async def _start(
    stream: EndpointLike,
    credentials: Credentials | TlsConfig | None,
    server_side: bool,
    hostname: str | None,
    initial_data: bytes,
    policy: PeerPolicy | None,
    options: PumpOptions,
) -> TlsStream:
    if not isinstance(initial_data, bytes | bytearray | memoryview):
        raise config_error("initial_data", f"must be bytes, not {type(initial_data).__name__}", "wrong_type")
    config = with_protocol(TlsConfig.of(credentials), options.upgrade)
    if isinstance(stream, ByteStream):
        await stream.drain()
    taken = take(stream, "stream")
    try:
        tls = side(taken, config, server_side, hostname, "server_hostname")
    except BaseException:
        taken.give_back()
        raise
    return await shake(taken, tls, bytes(initial_data), options, policy)


async def shake(
    taken: Taken,
    tls: _native.TlsSide,
    initial_data: bytes,
    options: PumpOptions,
    policy: PeerPolicy | None,
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
            Bridge,
            (taken, tls, initial_data),
            (Taken(stream._door.far_end()), None),
            options,
            on_error=ended,
            on_close=given_back,
            policy=asked(policy),
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
