"""The TLS bridge: a stream under TLS on one side, a native endpoint on the other, no byte in Python.

::

    bridge = create_bridge(socket=sock, sink=tun_fd, credentials=Credentials.psk("x", key), framing="ipv6")
    info = await bridge.handshake()
    bridge.start()
    ...
    await bridge.stop(drain=2.0)

Not here: how bytes move (native), what a pump without TLS can do (:mod:`sapper.pump`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Literal, Self

from sapper import _arguments, _native, endpoint
from sapper._joining import build, take_both
from sapper._life import Callback, ErrorCallback, Policy
from sapper._loop import running_post
from sapper._mistakes import unused
from sapper._options import config_error
from sapper._takeover import EndpointLike, Taken
from sapper.errors import ApiMisuseError, ErrorContext
from sapper.pump import Pump
from sapper.pump_options import Framing, PumpOptions, TapOptions, Upgrade, options_from
from sapper.tls.config import Credentials, TlsConfig
from sapper.tls.lookup import PskAnswers

__all__ = ["Bridge", "CdTunnelParameters", "HandshakeInfo", "Peer", "create_bridge"]

#: What every link carries, by IP version (RFC 791, RFC 8200): less cannot be granted.
LEAST_MTU = {4: 68, 6: 1280}


@dataclass(frozen=True, slots=True)
class HandshakeInfo:
    """What a handshake agreed on.

    Attributes:
        version: ``"TLSv1.2"`` or ``"TLSv1.3"``.
        cipher_suite: IANA name: ``"TLS_AES_256_GCM_SHA384"``.
        group: Key exchange group (``"X25519MLKEM768"``), where there is one.
        alpn: Application protocol, where one was agreed.
        peer_certificates: The peer's chain in DER, its own certificate first.
        psk_identity: Identity of the pre-shared key, where one was used (servers).
        server_name: Name that the client asked for (servers).
        is_client: Whether we were the client.
        own_end_point: The channel binding of our own certificate (servers); see :attr:`server_end_point`.
        resumed: Whether an earlier session was resumed.
        early_data: What became of early data: ``"accepted"``, ``"rejected"`` (clients), or ``None`` where
            none was sent.
        engine: ``"rustls"`` or ``"openssl"``.
    """

    version: str
    cipher_suite: str
    group: str | None
    alpn: bytes | None
    peer_certificates: tuple[bytes, ...] = field(repr=False)
    psk_identity: str | None
    server_name: str | None
    is_client: bool
    own_end_point: bytes | None = field(repr=False)
    resumed: bool
    early_data: Literal["accepted", "rejected"] | None
    engine: str

    @property
    def server_end_point(self) -> bytes | None:
        """The channel binding ``tls-server-end-point`` (RFC 5929): a hash of the server's certificate.

        ``None`` without a certificate, and for one whose signature has no hash of its own (Ed25519).
        """
        if self.is_client and self.peer_certificates:
            return _native.end_point_hash(self.peer_certificates[0])
        return self.own_end_point

    @property
    def peer_certificate(self) -> bytes | None:
        """The peer's own certificate in DER."""
        return self.peer_certificates[0] if self.peer_certificates else None

    @classmethod
    def from_native(cls, values: _native.HandshakeDict) -> Self:
        """From what the binding gives."""
        return cls(
            version=values["version"],
            cipher_suite=values["cipher_suite"],
            group=values["group"],
            alpn=values["alpn"],
            peer_certificates=tuple(values["peer_certificates"]),
            psk_identity=values["psk_identity"],
            server_name=values["server_name"],
            is_client=values["is_client"],
            own_end_point=values["own_end_point"],
            resumed=values["resumed"],
            early_data=values["early_data"],
            engine=values["engine"],
        )


@dataclass(frozen=True, slots=True)
class CdTunnelParameters:
    """What a CDTunnel handshake granted. Both addresses are of one IP version.

    Attributes:
        client_address: The client's address inside the tunnel.
        prefix_len: Length of the tunnel's network prefix.
        mtu: The granted MTU in bytes; it counts, not the one asked for.
        server_address: The server's address inside the tunnel.
        rsd_port: Port of the server's service directory.
    """

    client_address: IPv4Address | IPv6Address
    prefix_len: int
    mtu: int
    server_address: IPv4Address | IPv6Address
    rsd_port: int

    def __post_init__(self) -> None:
        for name in ("client_address", "server_address"):
            if not isinstance(address := getattr(self, name), IPv4Address | IPv6Address):
                raise _arguments.wrong_type(name, "an IPv4Address or IPv6Address", address)
        _arguments.whole(self.prefix_len, "prefix_len", 1, self.client_address.max_prefixlen)
        _arguments.whole(self.mtu, "mtu", LEAST_MTU[self.client_address.version], 65_535)
        _arguments.whole(self.rsd_port, "rsd_port", 1, 65_535)
        if self.client_address.version != self.server_address.version:
            raise config_error("server_address", "is of another IP version than client_address")
        if self.client_address == self.server_address:
            raise config_error("server_address", "is the client's address: each end has its own")

    @classmethod
    def from_native(cls, values: _native.CdTunnelDict) -> Self:
        """From what the binding gives."""
        return cls(
            client_address=ip_address(values["client_address"]),
            prefix_len=values["prefix_len"],
            mtu=values["mtu"],
            server_address=ip_address(values["server_address"]),
            rsd_port=values["rsd_port"],
        )

    def to_native(self) -> _native.CdTunnelDict:
        """As the binding takes it."""
        return {
            "client_address": str(self.client_address),
            "prefix_len": self.prefix_len,
            "mtu": self.mtu,
            "server_address": str(self.server_address),
            "rsd_port": self.rsd_port,
        }


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom a policy call-back decides about, after native verification.

    Attributes:
        certificates: Its chain in DER, its own certificate first.
        psk_identity: Identity of its pre-shared key, where one was used.
        address: Where it connects from, where that is known.
    """

    certificates: tuple[bytes, ...] = field(repr=False)
    psk_identity: str | None
    address: str | None


#: Decides whether a peer may go on: plain or async. Failure, lateness and anything but True mean no.
PeerPolicy = Callable[[Peer], bool | Awaitable[bool]]


class Bridge(Pump):
    """A pump of which at least one end is under TLS. Made by :func:`create_bridge`."""

    _psk_answers: tuple[PskAnswers, ...] = ()
    _least_mtu: int = LEAST_MTU[4]

    async def handshake(self) -> HandshakeInfo:
        """Connects both ends and shakes hands. :meth:`start` does it by itself where nobody did.

        Asked again, it gives the same. If cancelled, the bridge stops at once.

        Returns:
            What was agreed; of the ``socket`` side, where both ends are under TLS.

        Raises:
            TlsError, CertificateError, CredentialsRejected, IncompatiblePeer: It failed; not told again
                by ``on_error``.
            PolicyDenied: The policy said no.
            ConnectError, Unreachable, ConnectDeadline, HandshakeDeadline, ConnectionLost: No way to the peer.
            ResourceError: An endpoint cannot be opened.
            ClosedError: The bridge was stopped.
        """
        return _agreed(await self._opened())

    def handshake_sync(self) -> HandshakeInfo:
        """:meth:`handshake` without an event loop. Ctrl-C stops the bridge.

        Raises:
            ApiMisuseError: This thread is the one that has to answer meanwhile.
        """
        if any(answers.must_answer_here() for answers in self._psk_answers):
            raise ApiMisuseError(
                "handshake_sync() blocks the thread that has to answer for pre-shared keys meanwhile: await "
                "handshake(), or call it in another thread",
                ErrorContext(reason="would_deadlock"),
            )
        return _agreed(self._opened_sync("handshake_sync()"))

    async def cdtunnel_handshake(self, mtu: int = 1280) -> CdTunnelParameters:
        """The hello of a CDTunnel (iOS CoreDevice) as client, after the handshake and before ``start``.

        If cancelled, the bridge stops at once.

        Args:
            mtu: The MTU to ask for, in bytes; a tunnel of IPv6 has at least 1280.

        Raises:
            ConfigError: ``mtu`` is out of range.
            RemoteProtocolError, IncompatiblePeer: The answer is none.
            HandshakeDeadline: There was none in time.
            NotStartedError: The handshake is not done yet.
        """
        return CdTunnelParameters.from_native(await self._stop_if_cancelled(self._cdtunnel(mtu)))

    def cdtunnel_handshake_sync(self, mtu: int = 1280) -> CdTunnelParameters:
        """:meth:`cdtunnel_handshake` without an event loop."""
        self._refuse_own_thread("cdtunnel_handshake_sync()", needed=self._on_loop)
        return CdTunnelParameters.from_native(self._told_sync(self._cdtunnel(mtu)))

    async def cdtunnel_accept(self, parameters: CdTunnelParameters) -> CdTunnelParameters:
        """The server's half of :meth:`cdtunnel_handshake`: waits for a request and grants ``parameters``.

        If cancelled, the bridge stops at once.

        Returns:
            What was granted: the MTU is the smaller one of theirs and ours.

        Raises:
            ConfigError: ``parameters`` are none, or their addresses do not belong together.
            RemoteProtocolError: The request is none, or asks for less than a tunnel of this IP version has.
        """
        if not isinstance(parameters, CdTunnelParameters):
            raise _arguments.wrong_type("parameters", "CdTunnelParameters", parameters)
        granted, operation = parameters.to_native(), self._native.cdtunnel_accept
        return CdTunnelParameters.from_native(
            await self._stop_if_cancelled(lambda mailbox, key: operation(granted, mailbox, key))
        )

    def _cdtunnel(self, mtu: int) -> Callable[[_native.Mailbox, int], None]:
        _arguments.whole(mtu, "mtu", self._least_mtu, 65_535)
        operation = self._native.cdtunnel_handshake
        return lambda mailbox, key: operation(mtu, mailbox, key)

    async def export_keying_material(self, label: str, length: int, context: bytes | None = None) -> bytes:
        """Keying material of this connection for a purpose (RFC 5705; RFC 8446, section 7.5).

        Args:
            label: The purpose; 1 to 249 bytes.
            length: Bytes wanted, 1 to 65535; of TLS 1.3 at most 255 times its hash (8160, of SHA-384 12240).
            context: Further input; ``None`` and ``b""`` differ in TLS 1.2.

        Raises:
            ConfigError: An argument is wrong.
            NotStartedError: The handshake is not done yet.
        """
        export = self._native.export_keying_material
        if not 1 <= len(_arguments.text(label, "label").encode()) <= _LONGEST_LABEL:
            raise config_error("label", f"must be 1 to {_LONGEST_LABEL} bytes", "out_of_range")
        _arguments.whole(length, "length", 1, 65_535)
        context = None if context is None else _arguments.data(context, "context")
        material: bytes = await running_post().call(
            lambda mailbox, key: export(label, context, length, mailbox, key)
        )
        return material

    async def channel_binding(self) -> bytes:
        """The channel binding ``tls-exporter`` (RFC 9266): the same at both ends, and nowhere else.

        The other one, ``tls-server-end-point``, is :attr:`HandshakeInfo.server_end_point`.

        Raises:
            ApiMisuseError: This is TLS 1.2, for which it is not defined without further conditions.
            NotStartedError: The handshake is not done yet.
        """
        binding = await self.export_keying_material("EXPORTER-Channel-Binding", 32, b"")
        # Hands are shaken, so that this only tells what was agreed. By way of handshake() a caller that
        # gives up would stop the bridge.
        if _agreed(await running_post().call(self._native.handshake)).version != "TLSv1.3":
            raise ApiMisuseError("the channel binding tls-exporter needs TLS 1.3")
        return binding

    async def update_keys(self) -> None:
        """New keys for our sending direction (TLS 1.3).

        Long connections do this by themselves before a key's limit.

        Raises:
            ApiMisuseError: This is TLS 1.2.
            NotStartedError: The handshake is not done yet.
        """
        await running_post().call(self._native.update_keys)

    async def unused_data(self) -> bytes:
        """What the peer sent after its close_notify, once the bridge is closed. Given once.

        Raises:
            ApiMisuseError: It is not closed yet.
        """
        data: bytes = await running_post().call(self._native.unused_data)
        return data


def create_bridge(
    *,
    socket: EndpointLike,
    sink: EndpointLike,
    credentials: Credentials | TlsConfig | None = None,
    server_side: bool = False,
    server_hostname: str | None = None,
    direction: Literal["duplex", "encrypt-only", "decrypt-only"] | None = None,
    framing: Framing | None = None,
    sink_framing: Framing | None = None,
    initial_data: bytes = b"",
    max_packet: int | None = None,
    records_per_write: int | None = None,
    resync: bool | None = None,
    connect_timeout: float | None = None,
    accept_timeout: float | None = None,
    handshake_timeout: float | None = None,
    idle_timeout: float | None = None,
    close_timeout: float | None = None,
    tap: TapOptions | Mapping[str, Any] | None = None,
    options: PumpOptions | None = None,
    sink_credentials: Credentials | TlsConfig | None = None,
    sink_hostname: str | None = None,
    peer_policy: PeerPolicy | None = None,
    policy_timeout: float | None = None,
    upgrade: Upgrade | None = None,
    on_error: ErrorCallback | None = None,
    on_close: Callback | None = None,
) -> Bridge:
    """Makes a bridge: TLS over ``socket`` on one side, ``sink`` on the other, native code in between.

    Nothing is sent before :meth:`Bridge.handshake` or :meth:`Bridge.start`. When this raises, nothing
    was taken from the caller.

    Args:
        socket: Where ciphertext flows. An asyncio transport or ``(reader, writer)`` (taken over with what
            it holds), a socket object (detached: ours from then on), a descriptor or an object that has
            one (duplicated: the caller keeps and closes its own), a pair of them to read and to write,
            ``(host, port)``, or text such as ``"tcp://host:port"`` (:mod:`sapper.endpoint`).
        sink: Where cleartext comes out. The same, and also descriptors of TUN, TAP, terminals, files,
            datagram and seqpacket sockets, listeners (one connection is accepted), ``"tun:name"``.
        credentials: :class:`Credentials`, or a :class:`TlsConfig` with all options. ``None`` is a client
            that checks its server against the system's roots.
        server_side: We answer the TLS handshake rather than begin it.
        server_hostname: Name to check in the server's certificate; ``None`` is the host of ``socket``.
        direction: ``"duplex"``, ``"encrypt-only"`` (sink to network), ``"decrypt-only"``.
        framing: How packets lie in the TLS stream: ``"raw"`` (default), ``"ip"``, ``"ipv4"``, ``"ipv6"``,
            ``"u16"``, ``"u32"``, ``"superframe"``. Packet sinks need one that is not ``"raw"``.
        sink_framing: How packets lie in a sink that is a stream; ``None`` is as in ``framing``.
        initial_data: Ciphertext that the caller has already read from ``socket``.
        max_packet: Largest packet in bytes; ``None`` is 16,384, with superframes 65,535.
        records_per_write: How many records share one write.
        resync: Go on at the next record boundary after a bad packet header.
        connect_timeout: Seconds for making a connection.
        accept_timeout: Seconds to wait for a listener's one connection.
        handshake_timeout: Seconds for TLS, policy and hello together.
        idle_timeout: Seconds without a byte after which the bridge ends.
        close_timeout: Seconds that ``aclose()`` gives to deliver what waits.
        tap: Where inner packets are copied to.
        options: The options above in one object (:class:`sapper.pump.PumpOptions`, which also gives their
            defaults and reads TOML); those given by name come first.
        sink_credentials: For a sink that is a ``tls:`` endpoint.
        sink_hostname: For a sink that is a ``tls:`` endpoint.
        peer_policy: Asked about the peer after its verification and before any data: plain or async. Any
            answer but True within ``policy_timeout``, and any failure, means no.
        policy_timeout: Seconds.
        upgrade: What the protocol says in clear before TLS: ``"postgres"``, ``"postgres-direct"``,
            ``"mysql"``, ``"smtp"``, ``"imap"``.
        on_error: Called once with the error that ended the bridge, unless ``handshake()`` raised it.
        on_close: Called once, last, when every resource is given back.

    Call-backs run on the event loop that is running now; without one, on a thread of their own named
    ``sapper-callbacks``.

    Raises:
        ConfigError: An argument is wrong; ``field`` names it.
        ResourceError: The tap's file cannot be made, or a ``file:`` cannot be opened; ``field`` names it.
        ApiMisuseError: This process is a fork of one that used Sapper.
    """
    initial_data = _arguments.data(initial_data, "initial_data")
    _arguments.flag(server_side, "server_side")
    if server_hostname is not None:
        _arguments.text(server_hostname, "server_hostname")
    if sink_hostname is not None:
        _arguments.text(sink_hostname, "sink_hostname")
    _arguments.callback(peer_policy, "peer_policy")
    chosen = options_from(
        options,
        {
            "direction": direction,
            "framing": framing,
            "sink_framing": sink_framing,
            "max_packet": max_packet,
            "records_per_write": records_per_write,
            "resync": resync,
            "connect_timeout": connect_timeout,
            "accept_timeout": accept_timeout,
            "handshake_timeout": handshake_timeout,
            "idle_timeout": idle_timeout,
            "close_timeout": close_timeout,
            "policy_timeout": policy_timeout,
            "upgrade": upgrade,
            "tap": tap,
        },
    )
    config = with_protocol(TlsConfig.of(credentials), chosen.upgrade)
    policy = asked(peer_policy)
    network, inner = take_both(socket, "socket", sink, "sink")
    try:
        network_tls = side(network, config, server_side, server_hostname, "server_hostname")
        inner_tls = None
        if inner.tls is not None:
            inner_config = TlsConfig.of(sink_credentials, field="sink_credentials")
            inner_tls = side(inner, inner_config, False, sink_hostname, "sink_hostname")
        elif sink_credentials is not None:
            raise unused("sink_credentials", "are for a sink that is a tls: or tls-listen: endpoint")
        elif sink_hostname is not None:
            raise unused("sink_hostname", "is for a sink that is a tls: endpoint")
    except BaseException:
        inner.give_back()
        network.give_back()
        raise
    bridge = build(
        Bridge,
        (network, network_tls, initial_data),
        (inner, inner_tls),
        chosen,
        on_error=on_error,
        on_close=on_close,
        policy=policy,
    )
    if config.psk_answers is not None:
        bridge._psk_answers = (config.psk_answers,)
    if chosen.framing == "ipv6":
        bridge._least_mtu = LEAST_MTU[6]
    return bridge


def side(
    taken: Taken, config: TlsConfig, server_side: bool, hostname: str | None, name: str
) -> _native.TlsSide:
    """TLS on one end: the configuration, whether we are the server, the name to check."""
    words = taken.tls
    if words is not None and words.alpn:
        if config.alpn:
            raise config_error("alpn", "is given twice: in the endpoint and beside it")
        config = config.offering(words.alpn)
    is_server = server_side or isinstance(words, endpoint.TlsListen)
    if server_side and isinstance(words, endpoint.Tls):
        raise config_error("server_side", "a tls:// endpoint is a client's; write tcp:// or tls-listen://")
    if isinstance(words, endpoint.Tls) and words.server_name is not None and hostname is not None:
        raise config_error(name, "is given twice: here and in the endpoint (server_name)")
    if is_server:
        if hostname is not None:
            raise unused(name, "is for clients: a server's clients say which name they want")
        return (config.for_server(), True, None)
    return (config.native, False, hostname if hostname is not None else taken.host)


#: Bytes of an exporter's label: its length and "tls13 " share one byte (RFC 8446, section 7.1).
_LONGEST_LABEL = 249
#: The application protocol that goes with an upgrade: TLS at once is refused without.
_PROTOCOLS: dict[str | None, bytes] = {"postgres": b"postgresql", "postgres-direct": b"postgresql"}


def with_protocol(config: TlsConfig, upgrade: Upgrade | None) -> TlsConfig:
    """The configuration with the application protocol of an upgrade, where none is named."""
    protocol = _PROTOCOLS.get(upgrade)
    if protocol is None or config.alpn:
        return config
    return config.offering((protocol,))


def asked(policy: PeerPolicy | None) -> Policy | None:
    """A call-back as the life of a pump takes it."""
    if policy is None:
        return None

    def ask(subject: dict[str, Any]) -> bool | Awaitable[bool]:
        return policy(
            Peer(
                certificates=tuple(subject["certificates"]),
                psk_identity=subject["psk_identity"],
                address=subject["address"],
            )
        )

    return ask


def _agreed(both: list[_native.HandshakeDict | None]) -> HandshakeInfo:
    network, inner = both
    values = network or inner
    assert values is not None  # noqa: S101 - create_bridge puts TLS on one end at least
    return HandshakeInfo.from_native(values)
