"""How much may pass through a tunnel, and how often somebody may come: of an address, a service, a client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sapper.errors import ConfigError, PolicyDenied, ResourceLimit
from sapper.metrics import render
from sapper.tunnel import (
    ClientOptions,
    Limits,
    ServerOptions,
    Service,
    ServiceRequest,
    TunnelClient,
    TunnelServer,
    VisitorLimits,
    events,
)
from support.tunnels import CREDENTIALS, LATEST, asked, client, echo, server, until, visit
from support.tunnels import Service as Local
from support.w3ptunl import OriginalClient

RATE = 400_000
MUCH = 300_000


async def sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes everything, then says how much it was."""
    size = 0
    while data := await reader.read(65_536):
        size += len(data)
    writer.write(str(size).encode())


async def giver(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Gives much at once."""
    writer.write(bytes(MUCH))
    await writer.drain()
    writer.write_eof()
    await reader.read()


@asynccontextmanager
async def tunnel(
    service: Local, at_server: dict[str, Any], **values: Any
) -> AsyncIterator[tuple[TunnelServer, TunnelClient]]:
    async with server(options=at_server) as ours, client(ours.port or 0, service.port, **values) as exposed:
        yield ours, exposed


async def come(port: int, count: int = 1) -> list[bool]:
    """Whether visitors, one after the other, get their echo; those that do stay until the last has come."""
    found, there = [], []
    for _ in range(count):
        try:
            reader, writer = await visit(port)
            there.append(writer)
            writer.write(b"x")
            found.append(await asyncio.wait_for(reader.readexactly(1), LATEST) == b"x")
        except (ConnectionError, asyncio.IncompleteReadError):
            found.append(False)
    for writer in there:
        writer.close()
    return found


async def sent_away(heard: Any, kind: type[Any] = events.VisitorError) -> Any:
    """The error of the next visitor that was sent away or cut."""
    async with asyncio.timeout(LATEST):
        async for event in heard:
            if isinstance(event, kind):
                return event.err
    raise AssertionError("the events ended")


# -- bytes a second --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["visitor_limits", "client_limits", "service_limits", "client", "service"])
@pytest.mark.parametrize("direction", ["up", "down"])
async def test_a_rate_of_bytes(scope: str, direction: str, leak_check: None) -> None:
    """A quarter of a second's worth passes at once; it is never faster than the rate, and nothing is lost."""
    limited = Limits(bytes_per_second=RATE)
    at_server: dict[str, Any] = {}
    if scope == "visitor_limits":
        at_server[scope] = VisitorLimits(bytes_per_second=RATE)
    elif scope.endswith("_limits"):
        at_server[scope] = limited
    async with Local(sink if direction == "up" else giver) as local:
        async with server(options=at_server) as ours:
            exposed = TunnelClient(
                "127.0.0.1",
                ours.port or 0,
                None,
                CREDENTIALS,
                services=[Service(port=local.port, limits=limited if scope == "service" else Limits())],
                options=ClientOptions(limits=limited if scope == "client" else Limits()),
            )
            async with exposed:
                began = time.monotonic()
                answer = await asked(exposed.assigned_port or 0, bytes(MUCH) if direction == "up" else b"")
                took = time.monotonic() - began
                assert answer == (str(MUCH).encode() if direction == "up" else bytes(MUCH))
                assert took > (MUCH - RATE / 4) / RATE * 0.95, "it was faster than its limit"
                status = (ours.status()[0] if at_server else exposed.status()).services[0]
                assert status.paused > 0
                assert (status.cut, status.refused) == (0, 0)


async def test_a_rate_of_an_original_client(leak_check: None) -> None:
    async with (
        Local(giver) as local,
        server(options={"service_limits": Limits(bytes_per_second=RATE)}) as ours,
    ):
        peer = OriginalClient(local.port)
        public = await asyncio.wait_for(peer.connect("127.0.0.1", ours.port or 0, CREDENTIALS), LATEST)
        began = time.monotonic()
        reader, writer = await visit(public)
        assert await asyncio.wait_for(reader.readexactly(MUCH), LATEST) == bytes(MUCH)
        assert time.monotonic() - began > (MUCH - RATE / 4) / RATE * 0.95
        writer.close()
        await peer.close()


async def test_visitors_share_a_rate_in_turns(leak_check: None) -> None:
    """A second visitor is not starved by the first one, who came long before and sends without a pause."""
    got: dict[bytes, int] = {}

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        who = await reader.readexactly(1)
        while data := await reader.read(65_536):
            got[who] = got.get(who, 0) + len(data)

    async with Local(count) as local:
        async with tunnel(local, {"service_limits": Limits(bytes_per_second=RATE)}) as (_, exposed):

            async def flood(who: bytes) -> None:
                _, writer = await visit(exposed.assigned_port or 0)
                writer.write(who)
                try:
                    while True:
                        writer.write(bytes(65_536))
                        await writer.drain()
                finally:
                    writer.transport.abort()

            first = asyncio.create_task(flood(b"1"))
            await until(lambda: got.get(b"1", 0) > RATE / 4, "more than the burst")
            second = asyncio.create_task(flood(b"2"))
            await until(lambda: b"2" in got, "the second visitor's turn")
            before = got[b"1"], got[b"2"]
            await until(lambda: got[b"2"] - before[1] > RATE / 4, "the second visitor's share")
            gained = got[b"1"] - before[0], got[b"2"] - before[1]
            assert gained[0] < 2 * gained[1], f"the first visitor had more than twice as much: {gained}"
            for task in (first, second):
                task.cancel()
            await asyncio.gather(first, second, return_exceptions=True)


async def test_an_address_shares_its_rate_between_tunnels(leak_check: None) -> None:
    async with (
        Local(sink) as local,
        server(options={"visitor_limits": VisitorLimits(bytes_per_second=RATE)}) as ours,
    ):
        async with client(ours.port or 0, local.port) as one, client(ours.port or 0, local.port) as two:
            began = time.monotonic()
            ports = (one.assigned_port or 0, two.assigned_port or 0)
            await asyncio.gather(*(asked(port, bytes(MUCH)) for port in ports))
            assert time.monotonic() - began > (2 * MUCH - RATE / 4) / RATE * 0.95


# -- bytes and visits in all -------------------------------------------------------------------------------


async def test_bytes_of_a_visit(leak_check: None) -> None:
    async with Local(echo) as local:
        async with tunnel(local, {"visitor_limits": VisitorLimits(total_bytes=20)}) as (ours, exposed):
            public = exposed.assigned_port or 0
            heard = ours.events()
            for _ in range(2):  # each visit has its own
                assert await asked(public, b"0123456789") == b"0123456789"
            reader, writer = await visit(public)
            writer.write(b"0123456789")
            assert await asyncio.wait_for(reader.readexactly(10), LATEST) == b"0123456789"
            writer.write(b"!")
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(), LATEST)
            writer.close()
            error = await sent_away(heard)
            assert isinstance(error, ResourceLimit)
            assert error.context.reason == "visitor_limit"
            await until(lambda: ours.status()[0].services[0].cut == 1, "the count")


@pytest.mark.parametrize("scope", ["client_limits", "service_limits"])
async def test_bytes_in_all(scope: str, leak_check: None) -> None:
    async with Local(echo) as local, tunnel(local, {scope: Limits(total_bytes=20)}) as (ours, exposed):
        public = exposed.assigned_port or 0
        heard = ours.events()
        assert await asked(public, b"0123456789") == b"0123456789"
        assert await come(public) == [False]
        assert (await sent_away(heard)).context.reason == scope.removesuffix("s")
        assert ours.status()[0].services[0].refused == 1


async def test_visits_of_a_service_in_all_are_of_the_clients_whole_life(leak_check: None) -> None:
    async with Local(echo) as local, server() as ours:
        services = [Service(port=local.port, limits=Limits(total_visits=2)), Service(port=local.port)]
        exposed = TunnelClient("127.0.0.1", ours.port or 0, None, CREDENTIALS, services=services)
        async with exposed:
            heard = exposed.events()
            first, second = exposed.assigned_ports
            assert await come(first, 3) == [True, True, False]
            error = await sent_away(heard, events.ServiceError)
            assert (error.kind, error.context.reason) == ("resource_limit", "service_limit")
            assert await come(second) == [True]
            refused = [service.refused for service in exposed.status().services]
            assert refused == [1, 0]
            figures = render(tunnels={"t": ours}, tunnel_clients={"c": exposed})
            assert 'sapper_tunnel_client_service_refused_total{client="c",service=""} 1\n' in figures
            which = f'port="{first}",service="{local.port}",service_port="{second}"'
            assert f'sapper_tunnel_service_visits_total{{server="t",{which}}} 1\n' in figures
            assert local.connections == 3


async def test_tunnels_of_one_client_share_its_limits(leak_check: None) -> None:
    """Those at a time, and those one after the other; other credentials are another client."""
    options: Any = {"client_limits": Limits(total_visits=3), "service_limits": Limits(total_visits=2)}
    async with Local(echo) as local, server(options=options) as ours:
        port = ours.port or 0
        async with client(port, local.port) as one, client(port, local.port) as two:
            assert one.assigned_port != two.assigned_port
            assert await come(one.assigned_port or 0, 3) == [True, True, False], "the service's limit"
            heard = ours.events()
            assert await come(two.assigned_port or 0, 2) == [True, False]
            assert (await sent_away(heard)).context.reason == "client_limit"
            async with client(port, local.port, credentials={**CREDENTIALS, "n": 2}) as other:
                assert await come(other.assigned_port or 0) == [True]
        async with client(port, local.port) as again:
            assert await come(again.assigned_port or 0) == [False]
            await ours.reload(ServerOptions(host="127.0.0.1", **options))
            async with client(port, local.port) as same:
                assert await come(same.assigned_port or 0) == [False], "the same limits are used up"
            changed = {**options, "client_limits": Limits(total_visits=1)}
            await ours.reload(ServerOptions(host="127.0.0.1", **changed))
            async with client(port, local.port) as anew:
                assert await come(anew.assigned_port or 0, 2) == [True, False]
            assert await come(again.assigned_port or 0) == [False], "who is there keeps what it has"


async def test_tunnels_of_one_client_share_its_rate(leak_check: None) -> None:
    async with Local(sink) as local, server(options={"client_limits": Limits(bytes_per_second=RATE)}) as ours:
        async with client(ours.port or 0, local.port) as one, client(ours.port or 0, local.port) as two:
            began = time.monotonic()
            ports = (one.assigned_port or 0, two.assigned_port or 0)
            await asyncio.gather(*(asked(port, bytes(MUCH)) for port in ports))
            assert time.monotonic() - began > (2 * MUCH - RATE / 4) / RATE * 0.95


# -- visitors at a time, visits a second -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"visitor_limits": VisitorLimits(visitors=2)}, "visitor_limit"),
        ({"client_limits": Limits(visitors=2)}, "client_limit"),
        ({"service_limits": Limits(visitors=2)}, "service_limit"),
        ({"service_limits": Limits(visits_per_second=0.001, visit_burst=2)}, "service_limit"),
        ({"client_limits": Limits(total_visits=2)}, "client_limit"),
        ({"max_streams": 2}, "server_limit"),
    ],
)
async def test_who_comes_too_often(options: dict[str, Any], reason: str, leak_check: None) -> None:
    async with Local(echo) as local, tunnel(local, options) as (ours, exposed):
        heard = ours.events()
        assert await come(exposed.assigned_port or 0, 4) == [True, True, False, False]
        error = await sent_away(heard)
        assert isinstance(error, ResourceLimit)
        assert error.context.reason == reason
        assert ours.status()[0].services[0].refused == 2
        await until(lambda: ours.status()[0].services[0].visitors == 0, "the end of those that were there")
        at_a_time = "streams" in str(options) or "visitors=2" in str(options)
        assert await come(exposed.assigned_port or 0) == [at_a_time]


async def test_a_client_has_so_many_visitors_and_more_wait(leak_check: None) -> None:
    async with Local(echo) as local, server(options={"max_visitors": 2}) as ours:
        services = [Service(port=local.port), Service(port=local.port)]
        async with TunnelClient("127.0.0.1", ours.port or 0, None, CREDENTIALS, services=services) as exposed:
            first, second = exposed.assigned_ports
            streams = [await visit(first), await visit(second)]
            for reader, writer in streams:
                writer.write(b"x")
                await asyncio.wait_for(reader.readexactly(1), LATEST)
            waiting = asyncio.create_task(come(second))
            await until(lambda: ours.status()[0].streams == 2)
            assert local.connections == 2
            streams[0][1].close()
            assert await asyncio.wait_for(waiting, LATEST) == [True]
            streams[1][1].close()


async def test_a_client_takes_so_many_streams(leak_check: None) -> None:
    async with Local(echo) as local:
        async with tunnel(local, {}, options={"max_streams": 2}) as (ours, exposed):
            assert await come(exposed.assigned_port or 0, 3) == [True, True, False]
            assert ours.status()[0].services[0].refused == 1


# -- filters that are replaced -----------------------------------------------------------------------------


async def test_the_visitor_filter_is_replaced_while_it_runs(leak_check: None) -> None:
    async with Local(echo) as local, tunnel(local, {}) as (ours, exposed):
        public = exposed.assigned_port or 0
        assert await come(public) == [True]
        ours.visitor_filter = lambda tunnel, visitor: False
        assert await come(public) == [False]

        async def let(tunnel: events.ClientTunnel, visitor: str) -> bool:
            return tunnel.tunnel_address == events.TunnelAddress(public) and visitor.startswith("127.0.0.1:")

        ours.visitor_filter = let
        assert await come(public) == [True]
        ours.visitor_filter = None
        assert await come(public) == [True]
        with pytest.raises(ConfigError):
            ours.visitor_filter = 7  # type: ignore[assignment]


async def test_a_filter_decides_about_services(leak_check: None) -> None:
    seen: list[tuple[ServiceRequest, ...]] = []

    async def web_alone(tunnel: events.ClientTunnel, wanted: tuple[ServiceRequest, ...]) -> bool:
        seen.append(wanted)
        assert tunnel.authentication_credentials == CREDENTIALS
        return all(one.name == "web" for one in wanted)

    async with Local(echo) as local, server(service_filter=web_alone) as ours:

        def exposing(*names: str) -> TunnelClient:
            services = [Service(port=local.port, name=name, public_port=(10_000, 30_000)) for name in names]
            options = ClientOptions(reconnect=False)
            return TunnelClient(
                "127.0.0.1", ours.port or 0, None, CREDENTIALS, services=services, options=options
            )

        async with exposing("web") as exposed:
            assert await come(exposed.assigned_port or 0) == [True]
        with pytest.raises(PolicyDenied) as raised:
            await asyncio.wait_for(exposing("web", "db").connect(), LATEST)
        assert raised.value.context.reason == "service_rejected"
        request = ServiceRequest("web", (10_000, 30_000), None)
        assert seen == [(request,), (request, ServiceRequest("db", (10_000, 30_000), None))]
        # An original client asks for nothing.
        peer = OriginalClient(local.port)
        await asyncio.wait_for(peer.connect("127.0.0.1", ours.port or 0, CREDENTIALS), LATEST)
        await peer.close()
        ours.service_filter = None
        async with exposing("web", "db") as exposed:
            assert await come(exposed.assigned_ports[1]) == [True]
        assert len(seen) == 2


# -- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"service_limits": {"bytes_per_second": 0}}, "service_limits.bytes_per_second"),
        ({"client_limits": {"visits_per_second": 0}}, "client_limits.visits_per_second"),
        ({"visitor_limits": {"total_visits": 1}}, "visitor_limits.total_visits"),
        ({"max_streams": 0}, "max_streams"),
    ],
)
def test_limits_that_are_none(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ServerOptions(**values)
    assert raised.value.context.field == field
