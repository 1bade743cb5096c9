# The seam, typed: module ``sapper._native``, compiled from ``crates/sapper-py``.
#
# It converts and does nothing else; the public API is in the Python modules beside it. Every operation
# that takes time has the arguments ``mailbox`` and ``key`` and posts exactly one message there:
# ``(key, "done", value)`` or ``(key, "error", exception)``. Subscriptions post ``"started"``,
# ``"closed"`` and ``"reloaded"`` (with ``None`` or the exception), ``"lost"`` (with a number),
# ``"question"``, ``"proxy"`` (with a ProxyEventDict), ``"tunnel"`` (a dictionary), ``"released"`` (the last
# one, where nothing else ends it).

from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal, TypeAlias, TypedDict, final

__version__: str

def error_kinds() -> list[tuple[str, bool]]: ...

# -- mailbox.rs ------------------------------------------------------------------------------------

@final
class Mailbox:
    def __new__(cls) -> Mailbox: ...
    def fileno(self) -> int: ...
    def drain(self) -> list[tuple[int, str, Any]]: ...
    def wait(self, timeout: float | None) -> bool: ...
    def hear_log(self, key: int) -> None: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...

@final
class Question:
    @property
    def subject(self) -> dict[str, Any]: ...
    def answer(self, yes: bool) -> bool: ...
    def give_up(self) -> None: ...
    def answer_key(self, key: bytes | None) -> bool: ...

# -- tls.rs ----------------------------------------------------------------------------------------

# Bytes, and the file that they came from.
Material: TypeAlias = tuple[bytes, str | PathLike[str] | None]

class OwnDict(TypedDict):
    chain: Material | None
    key: Material | None
    pkcs12: Material | None
    password: bytes | None
    ocsp_response: Material | None
    names: Sequence[str]

class RuleDict(TypedDict):
    dns: Sequence[str]
    uri: Sequence[str]
    email: Sequence[str]
    ip: Sequence[str]
    cn: Sequence[str]
    ou: Sequence[str]
    pin: Sequence[bytes]

class TlsDict(TypedDict):
    own: OwnDict | None
    more: Sequence[OwnDict]
    psks: Sequence[tuple[bytes, bytes, PathLike[str] | None]] | None
    psk_lookup: tuple[Mailbox, int, float] | None
    psk_hash: Literal["sha256", "sha384"]
    roots: Material | Literal["system", "none"] | None
    pins: Sequence[bytes]
    client_auth: Literal["off", "optional", "required"]
    peer_rules: Sequence[RuleDict]
    crls: Sequence[Material]
    ocsp: Literal["off", "check", "require"] | None
    min_version: Literal["TLSv1.2", "TLSv1.3"]
    max_version: Literal["TLSv1.2", "TLSv1.3"]
    cipher_suites: Sequence[str]
    groups: Sequence[str]
    alpn: Sequence[bytes]
    resumption: bool
    ticket_lifetime: float
    key_log_file: str | PathLike[str] | None
    capture_file: str | PathLike[str] | None
    danger_ignore_server_name: bool
    danger_legacy_renegotiation: bool
    danger_security_level_0: bool
    danger_legacy_suites: bool
    danger_short_psk: bool
    danger_ignore_truncation: bool
    danger_early_data: int

@final
class TlsConfig:
    def __new__(cls, options: TlsDict) -> TlsConfig: ...
    @property
    def engine(self) -> Literal["rustls", "openssl"]: ...
    def check_server(self) -> None: ...
    def with_alpn(self, alpn: list[bytes]) -> TlsConfig: ...
    def reload(self) -> bool: ...

@final
class TlsWatch:
    def __new__(cls, config: TlsConfig, mailbox: Mailbox, key: int) -> TlsWatch: ...
    def close(self) -> None: ...

def end_point_hash(certificate: bytes) -> bytes | None: ...

# The configuration, whether we are the server, and the name to check (clients).
TlsSide: TypeAlias = tuple[TlsConfig, bool, str | None]

# -- endpoint.rs -----------------------------------------------------------------------------------

@final
class Endpoint:
    def connects(self) -> bool: ...
    @staticmethod
    def tcp(host: str, port: int, field: str) -> Endpoint: ...
    @staticmethod
    def tcp_listen(host: str, port: int, field: str) -> Endpoint: ...
    @staticmethod
    def unix(path: str, field: str) -> Endpoint: ...
    @staticmethod
    def unix_listen(path: str, field: str) -> Endpoint: ...
    @staticmethod
    def unix_datagram(path: str, bind: str | None, field: str) -> Endpoint: ...
    @staticmethod
    def seqpacket(path: str, field: str) -> Endpoint: ...
    @staticmethod
    def udp(host: str, port: int, bind: tuple[str, int] | None, field: str) -> Endpoint: ...
    @staticmethod
    def fd(read: int, write: int | None, header: str | None, field: str) -> Endpoint: ...
    @staticmethod
    def stdio(field: str) -> Endpoint: ...
    @staticmethod
    def tun(name: str, mtu: int | None, addresses: Sequence[str], offload: bool, field: str) -> Endpoint: ...
    @staticmethod
    def tap(name: str, mtu: int | None, addresses: Sequence[str], offload: bool, field: str) -> Endpoint: ...
    @staticmethod
    def file(path: str, mode: str, field: str) -> Endpoint: ...
    @staticmethod
    def joined(read: Endpoint, write: Endpoint) -> Endpoint: ...
    @staticmethod
    def null(field: str) -> Endpoint: ...
    @staticmethod
    def counter(field: str) -> Endpoint: ...

# -- bridge.rs -------------------------------------------------------------------------------------

class HandshakeDict(TypedDict):
    version: str
    cipher_suite: str
    group: str | None
    alpn: bytes | None
    peer_certificates: list[bytes]
    psk_identity: str | None
    server_name: str | None
    own_end_point: bytes | None
    is_client: bool
    resumed: bool
    early_data: Literal["accepted", "rejected"] | None
    engine: str

class CdTunnelDict(TypedDict):
    client_address: str
    prefix_len: int
    mtu: int
    server_address: str
    rsd_port: int

class FlowDict(TypedDict):
    bytes: int
    packets: int
    backpressure: float
    latency_p50: float
    latency_p99: float
    latency_max: float
    latency_counts: list[int]
    latency_sum: float
    drops: dict[str, int]

class EndpointDict(TypedDict):
    description: str
    bytes_received: int
    bytes_sent: int
    packets_received: int
    packets_sent: int
    records_received: int
    records_sent: int
    receive_calls: int
    send_calls: int

class StatsDict(TypedDict):
    running: float
    latency_bounds: list[float]
    encapsulate: FlowDict
    decapsulate: FlowDict
    transport: EndpointDict
    sink: EndpointDict
    facts: dict[str, str]

class TapDict(TypedDict):
    path: str | PathLike[str]
    filter: str | None
    max_bytes: int | None
    snap_len: int

class SwapDict(TypedDict):
    sink_framing: str | None
    accept_timeout: float | None

class OptionsDict(TypedDict):
    direction: str
    framing: str
    sink_framing: str | None
    max_packet: int
    records_per_write: int
    resync: bool
    connect_timeout: float
    accept_timeout: float | None
    handshake_timeout: float
    idle_timeout: float | None
    policy_timeout: float
    upgrade: str | None
    tap: TapDict | None

@final
class Bridge:
    def __new__(
        cls,
        transport: Endpoint,
        transport_tls: TlsSide | None,
        transport_data: bytes,
        sink: Endpoint,
        sink_tls: TlsSide | None,
        sink_data: bytes,
        options: OptionsDict,
        asks: bool,
        early: tuple[bytes, bool] | None,
        mailbox: Mailbox,
        key: int,
    ) -> Bridge: ...
    def handshake(self, mailbox: Mailbox, key: int) -> None: ...
    def handshake_began(self, ago: float) -> None: ...
    def cdtunnel_handshake(self, mtu: int, mailbox: Mailbox, key: int) -> None: ...
    def cdtunnel_accept(self, granted: CdTunnelDict, mailbox: Mailbox, key: int) -> None: ...
    def watch(self) -> None: ...
    def start(self) -> None: ...
    def pause(self, direction: str) -> None: ...
    def resume(self, direction: str) -> None: ...
    def check_sink(self, sink: Endpoint, swap: SwapDict) -> None: ...
    def swap_sink(self, sink: Endpoint, swap: SwapDict, mailbox: Mailbox, key: int) -> None: ...
    def set_tap(self, tap: TapDict | None, mailbox: Mailbox, key: int) -> None: ...
    def update_keys(self, mailbox: Mailbox, key: int) -> None: ...
    def confirmed(self, mailbox: Mailbox, key: int) -> None: ...
    def export_keying_material(
        self, label: str, context: bytes | None, length: int, mailbox: Mailbox, key: int
    ) -> None: ...
    def unused_data(self, mailbox: Mailbox, key: int) -> None: ...
    def stop(self, drain: float) -> None: ...
    def abort(self) -> None: ...
    def addresses(self) -> tuple[str | None, str | None]: ...
    def wait_closed(self, mailbox: Mailbox, key: int) -> None: ...
    def state(self) -> Literal["new", "handshaking", "ready", "running", "draining", "closed"]: ...
    def stats(self) -> StatsDict: ...

# -- payload.rs ------------------------------------------------------------------------------------

@final
class ForeignTransport:
    def __new__(cls, mailbox: Mailbox, key: int, description: str) -> ForeignTransport: ...
    def endpoint(self, field: str) -> Endpoint: ...
    def push_received(self, data: bytes) -> int: ...
    def push_eof(self) -> None: ...
    def push_lost(self, message: str, errno: int | None) -> None: ...
    def stop_sending(self) -> None: ...
    def take_to_send(self, max_bytes: int) -> bytes | None: ...

@final
class StreamDoor:
    def __new__(cls, mailbox: Mailbox, key: int) -> StreamDoor: ...
    @staticmethod
    def pair(mailbox: Mailbox, key: int, other_key: int) -> tuple[StreamDoor, StreamDoor]: ...
    def far_end(self) -> Endpoint: ...
    def near_end(self, field: str) -> Endpoint: ...
    def available(self) -> int: ...
    def read(self, max_bytes: int) -> bytes | None: ...
    def read_into(self, buffer: bytearray | memoryview) -> int | None: ...
    def write(self, data: bytes | bytearray | memoryview) -> int: ...
    def write_eof(self) -> None: ...
    def abandon_reading(self) -> None: ...
    def reset(self) -> None: ...
    def stop_reading(self) -> None: ...

# -- listener.rs -----------------------------------------------------------------------------------

class ListenerDict(TypedDict):
    backlog: int
    max_connections: int
    max_handshakes: int
    reuse_port: bool
    unix_mode: int | None
    replace_stale: bool
    keepalive: float | None

class ListenerStatsDict(TypedDict):
    accepted: int
    aborted: int
    limit_pauses: int
    exhausted_pauses: int
    pending: int

@final
class Listener:
    @staticmethod
    def tcp(host: str | None, port: int, options: ListenerDict, mailbox: Mailbox, key: int) -> Listener: ...
    @staticmethod
    def unix(path: str, options: ListenerDict, mailbox: Mailbox, key: int) -> Listener: ...
    @staticmethod
    def adopt(fds: Sequence[int], options: ListenerDict, mailbox: Mailbox, key: int) -> Listener: ...
    def close(self) -> None: ...
    def stats(self) -> ListenerStatsDict: ...

@final
class Arrival:
    @property
    def peer(self) -> str: ...
    @property
    def network(self) -> int: ...
    @property
    def local(self) -> str: ...
    def endpoint(self) -> Endpoint: ...
    def done(self) -> None: ...

# -- proxy.rs --------------------------------------------------------------------------------------

class ProxyListenDict(TypedDict):
    host: str | None
    port: int
    path: str | None
    fd: int | None

class ProxyListenerDict(TypedDict):
    backlog: int
    max_connections: int
    reuse_port: bool
    unix_mode: int | None
    replace_stale: bool
    transparent: bool
    keepalive: float | None

class UpstreamDict(TypedDict):
    host: str | None
    port: int
    path: str | None

class RouteDict(TypedDict):
    names: Sequence[str]
    pass_through: bool
    tls: TlsConfig | None
    upstreams: Sequence[UpstreamDict]
    keep_source: bool
    upstream_tls: tuple[TlsConfig, str | None] | None
    upstream_upgrade: str | None
    send_proxy: Literal["v1", "v2"] | None

class ServiceDict(TypedDict):
    routes: Sequence[RouteDict]
    upgrade: str | None
    proxy_from: Sequence[str]
    proxy_from_unix: bool
    max_handshakes: int
    rate: float | None
    burst: int
    handshake_timeout: float
    connect_timeout: float
    idle_timeout: float | None
    tell_connections: bool

class ProxyStatsDict(TypedDict):
    state: Literal["new", "running", "draining", "closed"]
    accepted: int
    open: int
    handshaking: int
    handshakes: dict[str, int]
    resumed: int
    ended: dict[str, int]
    errors: dict[str, int]
    upstream_failures: dict[str, int]
    to_upstream: int
    to_client: int
    handshake_p50: float
    handshake_p99: float
    connect_p50: float
    connect_p99: float
    limit_pauses: int
    exhausted_pauses: int
    rate_addresses: int

class ProxyConnectionDict(TypedDict):
    id: int
    client: str
    local: str
    upstream: str | None
    server_name: str | None
    version: str | None
    cipher_suite: str | None
    alpn: bytes | None
    resumed: bool
    client_cn: str | None
    age: float
    to_upstream: int
    to_client: int

# An event "proxy" of the subscription.
class ProxyEventDict(TypedDict):
    connection: ProxyConnectionDict
    outcome: str
    error: Any

@final
class Proxy:
    def __new__(
        cls,
        listen: Sequence[ProxyListenDict],
        listener: ProxyListenerDict,
        service: ServiceDict,
        mailbox: Mailbox,
        key: int,
    ) -> Proxy: ...
    def start(self, mailbox: Mailbox, key: int) -> None: ...
    def reload(self, service: ServiceDict) -> None: ...
    def stop(self, drain: float) -> None: ...
    def wait_closed(self, mailbox: Mailbox, key: int) -> None: ...
    def state(self) -> Literal["new", "running", "draining", "closed"]: ...
    def stats(self) -> ProxyStatsDict: ...
    def connections(self) -> list[ProxyConnectionDict]: ...

def inherited_sockets() -> list[tuple[int, str]]: ...

# -- tunnel.rs -------------------------------------------------------------------------------------

class TunnelCommonDict(TypedDict):
    handshake_timeout: float
    grace: float
    overflow: Literal["pause", "reset"]
    linger: float

class TunnelLimitsDict(TypedDict):
    bytes_per_second: int | None
    total_bytes: int | None
    visitors: int | None
    visits: tuple[float, int] | None
    total_visits: int | None

class TunnelServerDict(TypedDict):
    host: str | None
    port: int
    visitor_host: str | None
    public_ports: tuple[int, int]
    asked_ports: list[tuple[int, int]] | None
    asked_hosts: list[str]
    max_services: int
    tls: TlsConfig | None
    visitor_tls: TlsConfig | None
    filter: float | None
    visitor_filter: float | None
    service_filter: float | None
    allow_visitors: list[str] | None
    deny_visitors: list[str]
    visitor_rate: tuple[float, int] | None
    max_clients: int
    max_handshakes: int
    max_visitors: int
    max_streams: int
    visitor_limits: TunnelLimitsDict
    client_limits: TunnelLimitsDict
    service_limits: TunnelLimitsDict
    lease_file: str | PathLike[str] | None
    lease_time: float
    danger_shared_leases: bool
    common: TunnelCommonDict

class TunnelVisitorDict(TypedDict):
    tunnel: int
    number: int
    address: str | None
    service: str
    age: float
    from_socket: int
    to_socket: int

class TunnelServiceStatsDict(TypedDict):
    name: str
    port: int
    visitors: int
    visits: int
    sent: int
    received: int
    refused: int
    paused: int
    cut: int

class TunnelStatusDict(TypedDict):
    streams: int
    opened: int
    sent: int
    received: int
    sent_rate: int
    received_rate: int
    held: int
    rtt: float | None
    resumes: int
    age: float
    id: int
    client: str
    port: int
    negotiated: bool
    connected: bool
    services: list[TunnelServiceStatsDict]

class TunnelClientStatsDict(TypedDict):
    streams: int
    opened: int
    sent: int
    received: int
    sent_rate: int
    received_rate: int
    held: int
    rtt: float | None
    resumes: int
    age: float
    port: int | None
    services: list[TunnelServiceStatsDict]

@final
class TunnelServer:
    def __new__(cls, options: TunnelServerDict, watched: int, mailbox: Mailbox, key: int) -> TunnelServer: ...
    def watch(self, watched: int) -> None: ...
    def stop(self, drain: float) -> None: ...
    def wait_closed(self, mailbox: Mailbox, key: int) -> None: ...
    def reload(self, options: TunnelServerDict) -> None: ...
    def tunnels(self) -> list[TunnelStatusDict]: ...
    def visitors(self, tunnel: int | None, most: int) -> list[TunnelVisitorDict]: ...
    def handshakes(self) -> tuple[int, int]: ...

class TunnelServiceDict(TypedDict):
    name: str
    host: str | None
    port: int
    path: str | PathLike[str] | None
    public_ports: tuple[int, int] | None
    public_host: str | None
    limits: TunnelLimitsDict

class TunnelClientDict(TypedDict):
    host: str
    port: int
    services: list[TunnelServiceDict]
    credentials: str
    tls: tuple[TlsConfig, str | None] | None
    lease: str | None
    reconnect: tuple[float, float] | None
    dial_timeout: float
    send_proxy: Literal["v1", "v2"] | None
    max_streams: int
    limits: TunnelLimitsDict
    common: TunnelCommonDict

@final
class TunnelClient:
    def __new__(cls, options: TunnelClientDict, watched: int, mailbox: Mailbox, key: int) -> TunnelClient: ...
    def watch(self, watched: int) -> None: ...
    def stop(self, drain: float) -> None: ...
    def wait_closed(self, mailbox: Mailbox, key: int) -> None: ...
    def reload(self, options: TunnelClientDict) -> None: ...
    def stats(self) -> TunnelClientStatsDict: ...
    def visitors(self, most: int) -> list[TunnelVisitorDict]: ...

# -- values.rs -------------------------------------------------------------------------------------

class CertificateDict(TypedDict):
    subject: tuple[tuple[tuple[str, str], ...], ...]
    issuer: tuple[tuple[tuple[str, str], ...], ...]
    version: int
    serialNumber: str
    notBefore: int
    notAfter: int
    subjectAltName: tuple[tuple[str, str], ...]
    signatureAlgorithm: str

def describe_certificate(der: bytes) -> CertificateDict: ...

# -- testing.rs ------------------------------------------------------------------------------------

class CertificatesDict(TypedDict):
    authority: bytes
    server: tuple[bytes, bytes]
    client: tuple[bytes, bytes]

class LoadDict(TypedDict):
    units: int
    bytes: int
    lost: int
    torn: int
    latency_p50: float
    latency_p99: float
    latency_max: float

@final
class Load:
    @staticmethod
    def source(fd: int, unit: str, size: int, rate: int) -> Load: ...
    @staticmethod
    def meter(fd: int, unit: str, size: int) -> Load: ...
    def snapshot(self) -> LoadDict: ...
    def stop(self) -> None: ...

def take_log(
    last: bool,
) -> tuple[list[tuple[bool, str, str, dict[str, str], int, str, int, str, float]], int]: ...
def live_tasks() -> int: ...
def dev_authority(valid: float) -> tuple[bytes, bytes]: ...
def dev_issue(
    authority: tuple[bytes, bytes], names: Sequence[str], valid: float
) -> tuple[tuple[bytes, bytes], list[str], int]: ...
def dev_certificates(names: Sequence[str], valid: float) -> CertificatesDict: ...
def handshake_pair_seconds(client: TlsConfig, server: TlsConfig, rounds: int) -> float: ...
