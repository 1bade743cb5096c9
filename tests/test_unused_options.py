"""No option is accepted and passed over: for each there is a case in which it is refused, or a reason why it
always has its use. A new option without an entry here fails.

Not here: flags of the command line (``tests/cli/test_unused_flags.py``), and options that are wrong.
"""

from __future__ import annotations

import asyncio
import inspect
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from sapper import tls
from sapper.errors import ConfigError
from sapper.pump import Pump, PumpOptions, TapOptions, connect
from sapper.stream import memory_pair
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, ProxyOptions, Route, TlsConfig
from sapper.tls.handshake import Acceptor
from sapper.tls.listener import listen
from sapper.tls.stream import start_client
from sapper.tls.stream_options import ClientOptions as StreamOptions
from sapper.tunnel import (
    ClientOptions,
    Limits,
    ServerOptions,
    Service,
    TunnelClient,
    TunnelServer,
    VisitorLimits,
)

pytestmark = pytest.mark.usefixtures("leak_check")

PSK = Credentials.psk("x", "00" * 16)
#: Why an option has a use whatever else is said.
ALWAYS = "it says what is done, or for how long, wherever this is called"
MAY = "what it says holds anyway where it does nothing: it turns something off, or allows it"
LATER = "another sink, or a filter, that comes later goes by it"

#: What else is said, so that the option has no use; or why there is nothing.
Case = Mapping[str, Any] | str


def always(names: str, why: str = ALWAYS) -> dict[str, Case]:
    return dict.fromkeys(names.split(), why)


def refused(field: str, make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert (caught.value.field, caught.value.reason) == (field, "unused"), caught.value


def names_of(function: Callable[..., object]) -> set[str]:
    found = inspect.signature(function).parameters.values()
    return {one.name for one in found if one.kind is not one.VAR_KEYWORD} - {"self"}


def with_reasons(table: Mapping[str, Case]) -> list[str]:
    assert all(case in (ALWAYS, MAY, LATER) for case in table.values() if isinstance(case, str))
    return [name for name, case in table.items() if not isinstance(case, str)]


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    (ours, theirs), (inner, outer) = socket.socketpair(), socket.socketpair()
    with ours, theirs, inner, outer:
        yield ours.fileno(), inner.fileno()


# -- bridges and pumps ----------------------------------------------------------------------------------

BRIDGE: dict[str, Case] = {
    **always("socket sink credentials server_side direction framing"),
    **dict.fromkeys(
        ("idle_timeout", "close_timeout", "handshake_timeout", "initial_data", "options"), ALWAYS
    ),
    **always("peer_policy upgrade on_error on_close"),
    "connect_timeout": LATER,
    "server_hostname": {"server_hostname": "a.test", "server_side": True},
    "sink_framing": {"sink_framing": "u16", "framing": "u32", "sink": "counter:"},
    "max_packet": {"max_packet": 1000},
    "records_per_write": {"records_per_write": 1},
    "resync": {"resync": True},
    "accept_timeout": LATER,
    "tap": {"tap": {"path": "/nowhere/tap"}},
    "sink_credentials": {"sink_credentials": PSK},
    "sink_hostname": {"sink_hostname": "a.test"},
    "policy_timeout": {"policy_timeout": 1.0},
}

#: More of them: with TLS and packets.
MORE_OF_BRIDGES: list[tuple[str, dict[str, Any]]] = [
    ("sink_framing", {"sink_framing": "u16"}),
    ("upgrade", {"upgrade": "smtp", "framing": "ipv6", "sink": "counter:"}),
    ("upgrade", {"upgrade": "smtp", "direction": "encrypt-only"}),
    ("resync", {"resync": True, "framing": "ipv6", "sink": "counter:", "direction": "encrypt-only"}),
]

#: Without TLS.
PUMP: dict[str, Case] = {
    **always("direction idle_timeout close_timeout"),
    "connect_timeout": LATER,
    "framing": {"framing": "u16", "network": "counter:", "sink": "counter:"},
    "sink_framing": {"sink_framing": "u16", "network": "counter:", "sink": "counter:"},
    "max_packet": {"max_packet": 1000},
    # Into a sink that is swapped in later packets may be written, if any come.
    "records_per_write": {
        "records_per_write": 1,
        "network": "counter:",
        "sink": "counter:",
        "direction": "encrypt-only",
    },
    # There are no records without TLS.
    "resync": {"resync": True, "framing": "ipv6"},
    "accept_timeout": LATER,
    "handshake_timeout": {"handshake_timeout": 1.0, "framing": "u16"},
    "policy_timeout": {"policy_timeout": 1.0},
    "upgrade": {"upgrade": "smtp"},
    "tap": {"tap": TapOptions(path=Path("/nowhere/tap"))},
}


def test_each_option_of_bridges_and_pumps_is_here() -> None:
    assert BRIDGE.keys() == names_of(tls.create_bridge)
    assert PUMP.keys() == set(PumpOptions.model_fields)
    assert set(PumpOptions.model_fields) <= BRIDGE.keys()
    # A tap's own options are of the tap; connect() has no others than these.
    assert names_of(connect) - {"network", "sink", "options", "framing", "on_error", "on_close"} == set()
    assert names_of(Pump.swap_sink) == {"sink", "sink_framing", "accept_timeout"}


@pytest.mark.parametrize(
    ("name", "given"), [*((name, BRIDGE[name]) for name in with_reasons(BRIDGE)), *MORE_OF_BRIDGES]
)
def test_a_bridge_refuses_what_it_has_no_use_for(
    name: str, given: dict[str, Any], ends: tuple[int, int]
) -> None:
    given = {"socket": ends[0], "sink": ends[1], "credentials": PSK, **given}
    refused(name, lambda: tls.create_bridge(**given))
    if name in PumpOptions.model_fields:  # the same in one object
        options = {one: given.pop(one) for one in PumpOptions.model_fields if one in given}
        refused(name, lambda: tls.create_bridge(**given, options=PumpOptions(**options)))


@pytest.mark.parametrize("name", with_reasons(PUMP))
def test_a_pump_refuses_what_it_has_no_use_for(name: str, ends: tuple[int, int]) -> None:
    options = dict(PUMP[name])  # type: ignore[arg-type]
    network, sink = options.pop("network", ends[0]), options.pop("sink", ends[1])
    refused(name, lambda: connect(network, sink, options=PumpOptions(**options)))


def test_a_default_that_is_written_down_counts_as_left_out(ends: tuple[int, int]) -> None:
    usual = {name: getattr(PumpOptions(), name) for name in PumpOptions.model_fields}
    connect(*ends, options=PumpOptions(**{**usual, "max_packet": 16_384})).stop()
    # As in `framing` is what holds for the sink, whatever it carries.
    for network, sink in ((ends[0], "counter:"), ("counter:", ends[1])):
        connect(network, sink, framing="u16", options=PumpOptions(sink_framing="u16")).stop()


def test_what_a_sink_that_is_swapped_in_later_goes_by_is_taken(ends: tuple[int, int]) -> None:
    given: dict[str, Any] = {"socket": ends[0], "credentials": PSK, "framing": "u16"}
    tls.create_bridge(sink=ends[1], **given, accept_timeout=1.0).stop()
    one_way: dict[str, Any] = {**given, "direction": "decrypt-only", "records_per_write": 1}
    tls.create_bridge(sink="counter:", **one_way).stop()


async def test_a_tap_has_no_use_where_bytes_move(ends: tuple[int, int], tmp_path: Path) -> None:
    async with connect(*ends) as pump:
        for begin in (pump.open, None):  # before it starts, and after
            with pytest.raises(ConfigError) as caught:
                await pump.tap(tmp_path / "tap")
            assert (caught.value.field, caught.value.reason) == ("tap", "unused")
            if begin is not None:
                await begin()
                pump.start()
        pump.stop()


def test_a_header_is_of_a_tun(ends: tuple[int, int]) -> None:
    refused("header", lambda: connect(ends[0], f"fd:{ends[1]}?header=pi"))


async def test_a_sink_that_is_swapped_in_has_options_of_its_own(ends: tuple[int, int]) -> None:
    one, other = socket.socketpair()
    with one, other:
        async with connect(*ends, framing="u16") as pump:
            await pump.open()
            pump.start()
            for name, value, sink in (
                ("sink_framing", "u32", "counter:"),
                ("sink_framing", "raw", one.fileno()),
                ("accept_timeout", 1.0, one.fileno()),
            ):
                with pytest.raises(ConfigError) as caught:
                    await pump.swap_sink(sink, **{name: value})  # type: ignore[arg-type]
                assert caught.value.field == name
            await pump.swap_sink(one.fileno(), sink_framing="u32")
            pump.stop()


# -- streams and listeners ------------------------------------------------------------------------------

STREAM: dict[str, Case] = {
    **always("peer_policy handshake_timeout idle_timeout close_timeout upgrade"),
    **always("credentials server_hostname"),
    "policy_timeout": {"policy_timeout": 1.0},
    "connect_timeout": {"connect_timeout": 1.0},
    "resend_early_data": {"resend_early_data": True},
    # Not passed over, and not by this word: nothing allows it.
    "early_data": ALWAYS,
}
LISTEN: dict[str, Case] = {
    **always("address credentials max_connections max_handshakes"),
    "backlog": {"backlog": 7, "address": "adopted"},
    "reuse_port": {"reuse_port": True, "address": "unix-listen:@sapper-unused"},
    "unix_mode": {"unix_mode": 0o600},
    "replace_stale": {"replace_stale": True},
    "keepalive": {"keepalive": 7.0, "address": "unix-listen:@sapper-unused"},
}


def test_each_option_of_streams_and_listeners_is_here() -> None:
    assert STREAM.keys() == set(get_type_hints(StreamOptions))
    assert LISTEN.keys() == names_of(listen)


@pytest.mark.parametrize("name", with_reasons(STREAM))
async def test_a_stream_refuses_what_it_has_no_use_for(name: str) -> None:
    ours, theirs = memory_pair()
    given: Any = {"credentials": PSK, **dict(STREAM[name])}  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        await start_client(ours, **given)
    assert (caught.value.field, caught.value.reason) == (name, "unused")
    await ours.aclose()
    await theirs.aclose()


@pytest.mark.parametrize("name", [*with_reasons(LISTEN), "policy_timeout"])
async def test_a_listener_refuses_what_it_has_no_use_for(name: str) -> None:
    case: Any = LISTEN.get(name, STREAM.get(name))
    given: dict[str, Any] = {"address": ("127.0.0.1", 0), "credentials": PSK, **case}
    with socket.create_server(("127.0.0.1", 0)) as listening:
        if given["address"] == "adopted":
            given["address"] = listening.fileno()
        refused(name, lambda: listen(**given))


# -- configurations of TLS --------------------------------------------------------------------------------

#: Beside a pre-shared key, or beside nothing. Who is client and who is server belongs to a connection: what
#: a server must not pass over is refused there, below.
CONFIG: dict[str, Case] = {
    **always("credentials min_version max_version alpn"),
    **always("key_log_file capture_file danger_security_level_0"),
    **always("resumption danger_ignore_server_name danger_ignore_truncation", MAY),
    "cipher_suites": {
        "cipher_suites": ("TLS_PSK_WITH_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256"),
        "max_version": "TLSv1.2",
    },
    "groups": {
        "groups": ("X25519",),
        "max_version": "TLSv1.2",
        "cipher_suites": ("TLS_PSK_WITH_AES_256_GCM_SHA384",),
    },
    "danger_accept_any_certificate": {"danger_accept_any_certificate": True},
    "danger_legacy_renegotiation": {"danger_legacy_renegotiation": True, "min_version": "TLSv1.3"},
    "danger_legacy_suites": {"danger_legacy_suites": True, "min_version": "TLSv1.3"},
    "more_credentials": {"more_credentials": "own"},
    "roots": {"roots": "system"},
    "pins": {"pins": ("ab" * 32,)},
    "client_auth": {"client_auth": "required"},
    "peer_rules": {"peer_rules": [{"cn": "x"}]},
    "crls": {"crls": [b"0"]},
    "ocsp": {"ocsp": "require"},
    "ticket_lifetime": {"ticket_lifetime": 60.0},
    "danger_short_psk": {"danger_short_psk": True, "credentials": None},
    "danger_early_data": {"danger_early_data": 100},
}


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


def test_each_option_of_tls_is_here() -> None:
    assert CONFIG.keys() == set(TlsConfig.model_fields)


@pytest.mark.parametrize("name", with_reasons(CONFIG))
def test_tls_refuses_what_it_has_no_use_for(name: str, made: ThrowawayCertificates) -> None:
    given = {"credentials": PSK, **dict(CONFIG[name])}  # type: ignore[arg-type]
    if given.get("more_credentials"):
        given["more_credentials"] = [Credentials.certificate(*made.server)]
    given = {one: value for one, value in given.items() if value is not None}
    refused("cipher_suites.1" if name == "cipher_suites" else name, lambda: TlsConfig(**given))
    if name == "ticket_lifetime":
        refused(name, lambda: TlsConfig(ticket_lifetime=60.0, resumption=False))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("groups.0", {"groups": ("X25519MLKEM768", "X25519"), "max_version": "TLSv1.2"}),
        (
            "groups.1",
            {"groups": ("X25519", "SecP256r1MLKEM768"), "cipher_suites": ("ECDHE-RSA-AES128-GCM-SHA256",)},
        ),
        ("ticket_lifetime", {"ticket_lifetime": 60.0, "danger_legacy_suites": True}),
        ("ticket_lifetime", {"ticket_lifetime": 60.0, "danger_security_level_0": True}),
        ("ticket_lifetime", {"ticket_lifetime": 60.0, "danger_legacy_renegotiation": True}),
        (
            "danger_legacy_suites",
            {"danger_legacy_suites": True, "cipher_suites": ("ECDHE-RSA-AES128-GCM-SHA256",)},
        ),
        (
            "danger_legacy_renegotiation",
            {"danger_legacy_renegotiation": True, "cipher_suites": ("TLS_AES_128_GCM_SHA256",)},
        ),
        ("credentials.hash", {"credentials": "sha384", "max_version": "TLSv1.2"}),
        ("credentials.names", {"credentials": "named"}),
    ],
)
def test_tls_refuses_what_the_versions_and_suites_have_no_use_for(
    name: str, given: dict[str, Any], made: ThrowawayCertificates
) -> None:
    own = {
        "sha384": Credentials.psk("x", "00" * 16, hash="sha384"),
        "named": Credentials.certificate(*made.server, names=["a.test"]),
    }
    given = given | {"credentials": own.get(given.get("credentials", ""), Credentials.none())}
    refused(name, lambda: TlsConfig(**given))
    TlsConfig(groups=("X25519MLKEM768",))
    TlsConfig(credentials=own["sha384"])
    TlsConfig(credentials=own["named"], more_credentials=[Credentials.certificate(*made.server)])


def test_what_is_said_twice_is_refused(tmp_path: Path, ends: tuple[int, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        tls.create_bridge(
            socket="tls://localhost:1?server_name=a.test", sink=ends[1], server_hostname="b.test"
        )
    assert caught.value.field == "server_hostname"
    (tmp_path / "link").symlink_to(tmp_path / "log")
    with pytest.raises(ConfigError) as caught:
        TlsConfig(key_log_file=tmp_path / "log", capture_file=tmp_path / "link")
    assert (caught.value.field, caught.value.reason) == ("capture_file", "same")


def test_what_is_said_of_certificates_that_nobody_checks_is_refused() -> None:
    for more in (
        {"ocsp": "require"},
        {"peer_rules": [{"cn": ("x",)}]},
    ):
        name = next(iter(more))
        refused(name, lambda more=more: TlsConfig(danger_accept_any_certificate=True, **more))  # type: ignore[misc]
    TlsConfig(danger_accept_any_certificate=True, ocsp="off")


def test_a_default_of_tls_that_is_written_down_counts_as_left_out(made: ThrowawayCertificates) -> None:
    usual = {"client_auth": "off", "ocsp": "off", "ticket_lifetime": 21_600.0, "resumption": True}
    for credentials in (PSK, Credentials.certificate(*made.server), Credentials.none()):
        TlsConfig(credentials=credentials, **usual)


#: What a server must not pass over: whoever says it believes that clients are checked that way.
AT_A_SERVER: list[tuple[str, dict[str, Any]]] = [
    ("roots", {"roots": "own", "client_auth": "off"}),
    ("roots", {"roots": "system", "client_auth": "off"}),
    ("credentials.roots", {"credentials.roots": "own", "client_auth": "off"}),
    ("pins", {"pins": ("ab" * 32,), "client_auth": "off"}),
    ("peer_rules", {"peer_rules": [{"cn": ("x",)}]}),
    ("ocsp", {"ocsp": "require"}),
    ("danger_accept_any_certificate", {"danger_accept_any_certificate": True}),
    ("danger_ignore_server_name", {"danger_ignore_server_name": True}),
    ("danger_legacy_renegotiation", {"danger_legacy_renegotiation": True}),
]


@pytest.mark.parametrize(("name", "given"), AT_A_SERVER)
def test_a_server_refuses_what_it_has_no_use_for(
    name: str, given: dict[str, Any], made: ThrowawayCertificates, ends: tuple[int, int]
) -> None:
    given = dict(given)
    own: dict[str, Any] = {"roots": made.authority} if given.pop("credentials.roots", None) else {}
    if given.get("roots") == "own":
        given["roots"] = made.authority
    config = TlsConfig(credentials=Credentials.certificate(*made.server, **own), **given)
    refused(
        name,
        lambda: tls.create_bridge(socket=ends[0], sink=ends[1], credentials=config, server_side=True),
    )
    refused(name, lambda: listen(("127.0.0.1", 0), credentials=config))
    refused(name, lambda: Acceptor(config))

    async def proxied() -> None:
        options = {"listen": "127.0.0.1:0", "to": "127.0.0.1:1", "tls": config}
        async with tls.Proxy(ProxyOptions.from_mapping(options)):
            pass

    refused(f"tls.{name}", lambda: asyncio.run(proxied()))


def test_a_configuration_may_be_shared_by_both_ends(made: ThrowawayCertificates) -> None:
    """A client is asked for nothing by what is a server's."""
    shared = TlsConfig(
        credentials=Credentials.certificate(*made.server),
        more_credentials=[Credentials.certificate(*made.server)],
        roots=made.authority,
        client_auth="optional",
        ticket_lifetime=60.0,
    )
    for server_side in (False, True):
        ends: dict[str, Any] = {"socket": "tcp://localhost:1", "sink": "null:", "credentials": shared}
        tls.create_bridge(**ends, server_side=server_side).stop()


@pytest.mark.parametrize(
    ("name", "value"), [("client_auth", "optional"), ("ticket_lifetime", 60.0), ("more_credentials", "own")]
)
def test_a_place_that_is_a_clients_alone_refuses_what_is_for_servers(
    name: str, value: object, made: ThrowawayCertificates
) -> None:
    if value == "own":
        value = [Credentials.certificate(*made.server)]
    given: dict[str, Any] = {name: value}
    config = TlsConfig(credentials=Credentials.certificate(*made.server), roots=made.authority, **given)

    async def proxied(**options: Any) -> None:
        async with tls.Proxy(ProxyOptions.from_mapping({"listen": "127.0.0.1:0", **options})):
            pass

    async def tunnelled() -> None:
        await TunnelClient("localhost", 1, 1, tls=config).start()

    way = {"to": "tls://localhost:1", "upstream_tls": config}
    refused(f"upstream_tls.{name}", lambda: asyncio.run(proxied(**way)))
    refused(f"routes.0.upstream_tls.{name}", lambda: asyncio.run(proxied(routes=[way])))
    refused(f"tls.{name}", lambda: asyncio.run(tunnelled()))
    asyncio.run(proxied(**way, tls=config))  # shared with an end for which it is


def test_tls_of_a_route_is_told_with_its_path(made: ThrowawayCertificates) -> None:
    config = TlsConfig(
        credentials=Credentials.certificate(*made.server), roots=made.authority, client_auth="off"
    )

    async def proxied() -> None:
        routes = [{"names": "a.test", "to": "localhost:1"}, {"to": "localhost:1", "tls": config}]
        options = {"listen": "127.0.0.1:0", "routes": routes}
        async with tls.Proxy(ProxyOptions.from_mapping(options)):
            pass

    refused("routes.1.tls.roots", lambda: asyncio.run(proxied()))


# -- proxies --------------------------------------------------------------------------------------------

UNIX = {"listen": "unix:/run/x", "to": "localhost:1"}
PROXY: dict[str, Case] = {
    **always("listen to max_connections connect_timeout idle_timeout"),
    **always("drain_timeout log_connections send_proxy"),
    **always("watch replace_stale", MAY),
    # Of ways that no client can take native code speaks.
    "routes": ALWAYS,
    "pass_through": {"pass_through": True, "tls": "server"},
    "upstream_name": {"upstream_name": "a.test"},
    "upstream_upgrade": {"upstream_upgrade": "smtp"},
    "keep_source": {"keep_source": True, "to": "unix:/run/y"},
    "tls": {"tls": "server", "to": (), "routes": ({"to": "localhost:1", "pass_through": True},)},
    "upgrade": {"upgrade": "smtp"},
    "upstream_tls": {"upstream_tls": TlsConfig()},
    "proxy_from": {"proxy_from": "unix"},
    "max_handshakes": {"max_handshakes": 7},
    "handshake_timeout": {"handshake_timeout": 7.0},
    "rate": {"rate": 7.0, **UNIX},
    "burst": {"burst": 7},
    "keepalive": {"keepalive": 7.0, **UNIX},
    "backlog": {"backlog": 7, "listen": "systemd"},
    "reuse_port": {"reuse_port": True, **UNIX},
    "unix_mode": {"unix_mode": 0o600},
    "transparent": {"transparent": True, **UNIX},
}
ROUTE: dict[str, Case] = {
    **always("names to tls send_proxy"),
    # Of the proxy as a whole: above.
    "keep_source": ALWAYS,
    "pass_through": {"pass_through": True, "tls": "server"},
    "upstream_name": {"upstream_name": "a.test"},
    "upstream_upgrade": {"upstream_upgrade": "smtp"},
    # Not passed over: it asks for TLS by itself.
    "upstream_tls": ALWAYS,
}


def test_each_option_of_a_proxy_is_here() -> None:
    assert PROXY.keys() == set(ProxyOptions.model_fields)
    assert ROUTE.keys() == set(Route.model_fields)


@pytest.mark.parametrize(
    ("kind", "table", "name"),
    [
        (kind, table, name)
        for kind, table in ((ProxyOptions, PROXY), (Route, ROUTE))
        for name in with_reasons(table)
    ],
)
def test_a_proxy_refuses_what_it_has_no_use_for(
    kind: Any, table: dict[str, Any], name: str, made: ThrowawayCertificates
) -> None:
    given = {**({"listen": ":1"} if kind is ProxyOptions else {}), "to": "localhost:1", **table[name]}
    if given.get("tls"):
        given["tls"] = made.server_credentials()
    refused(name, lambda: kind(**given))


def test_a_list_of_a_proxy_names_the_entry() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"proxy_from": ("10.0.0.0/8", "unix")}, "proxy_from.1"),
        ({"to": ("localhost:1", "localhost")}, "to.1"),
        ({"listen": (":1", "x")}, "listen.1"),
    )
    for given, field in cases:
        with pytest.raises(ConfigError) as caught:
            ProxyOptions(**{"listen": ":1", "to": "localhost:1", **given})
        assert caught.value.field == field


# -- tunnels --------------------------------------------------------------------------------------------

SERVER: dict[str, Case] = {
    name: ALWAYS for name in ServerOptions.model_fields if name not in ("visitor_burst", "filter_timeout")
}
SERVER |= {"visitor_burst": {"visitor_burst": 7}, "filter_timeout": LATER}
CLIENT: dict[str, Case] = {
    **always("handshake_timeout overflow reconnect dial_timeout"),
    **always("send_proxy max_streams limits lease"),
    "reconnect_delay": {"reconnect_delay": (1.0, 2.0), "reconnect": False},
    "grace": {"grace": 1.0, "reconnect": False},
}
LIMITS: dict[str, Case] = {
    **dict.fromkeys(
        ("bytes_per_second", "total_bytes", "visitors", "visits_per_second", "total_visits"), ALWAYS
    ),
    "visit_burst": {"visit_burst": 7},
}
TABLES: list[tuple[Any, dict[str, Case]]] = [
    (ServerOptions, SERVER),
    (ClientOptions, CLIENT),
    (Limits, LIMITS),
]

TUNNEL_SERVER: dict[str, Case] = always(
    "connection_filter visitor_filter service_filter tls visitor_tls options danger_allow_anonymous"
)
TUNNEL_CLIENT: dict[str, Case] = {
    **always("tunnel_server_host tunnel_server_port local_service_port"),
    **dict.fromkeys(
        ("authentication_credentials", "local_service_path", "services", "tls", "options"), ALWAYS
    ),
    # They ask for TLS by themselves.
    **always("ca danger_accept_any_certificate"),
    "local_service_host": {
        "local_service_host": "a.test",
        "local_service_port": None,
        "local_service_path": "/x",
    },
    "server_hostname": {"server_hostname": "a.test"},
}
SERVICE: dict[str, Case] = {
    **always("port path name public_port public_host limits"),
    "host": {"host": "a.test", "path": "/x", "port": None},
}


def test_each_option_of_tunnels_is_here() -> None:
    for kind, table in [*TABLES, (Service, SERVICE)]:
        assert table.keys() == set(kind.model_fields)
    assert set(VisitorLimits.model_fields) == {"bytes_per_second", "total_bytes", "visitors"}
    assert TUNNEL_SERVER.keys() == names_of(TunnelServer.__init__)
    assert TUNNEL_CLIENT.keys() == names_of(TunnelClient.__init__)


@pytest.mark.parametrize(
    ("kind", "table", "name"), [(kind, table, name) for kind, table in TABLES for name in with_reasons(table)]
)
def test_a_tunnel_refuses_what_it_has_no_use_for(kind: Any, table: dict[str, Any], name: str) -> None:
    refused(name, lambda: kind(**table[name]))


@pytest.mark.parametrize("name", with_reasons(TUNNEL_CLIENT))
def test_a_tunnels_client_refuses_what_it_has_no_use_for(name: str) -> None:
    given: dict[str, Any] = {"local_service_port": 1, **dict(TUNNEL_CLIENT[name])}  # type: ignore[arg-type]
    refused(name, lambda: TunnelClient("localhost", 9000, **given))


def test_a_service_refuses_what_it_has_no_use_for() -> None:
    refused("host", lambda: Service(host="a.test", path=Path("/x")))
