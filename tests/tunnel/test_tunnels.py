"""Between our own two ends: streams, ends, resets, credit, TLS, sessions that go on, ports that stay."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import random
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sapper.errors import (
    ApiMisuseError,
    BindError,
    ConfigError,
    CredentialsRejected,
    IncompatiblePeer,
    PolicyDenied,
)
from sapper.testing import ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials
from sapper.tunnel import ClientOptions, ServerOptions, TunnelClient, TunnelServer, events
from support.tunnel_ends import End
from support.tunnels import (
    CREDENTIALS,
    LATEST,
    Cutter,
    Service,
    allow,
    asked,
    client,
    echo,
    leaves,
    listens,
    says,
    server,
    until,
    visit,
)
from support.w3ptunl import OriginalClient


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


# -- streams -------------------------------------------------------------------------------------------


async def test_bytes_half_closes_and_counts(any_loop: str, leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            payload = random.Random(1).randbytes(3_000_000)
            assert await asked(public, payload) == payload
            await until(lambda: _counts(ours) == (0, 1, 3_000_000, 3_000_000), "the visitor's end")
            status = ours.status()[0]
            assert (status.negotiated, status.connected, status.port) == (True, True, public)
            await until(lambda: exposed.status().received == 3_000_000, "the client's count")


def _counts(ours: TunnelServer) -> tuple[int, int, int, int]:
    status = ours.status()[0]
    return status.streams, status.opened, status.sent, status.received


async def test_many_visitors_at_once(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            payloads = [random.Random(n).randbytes(n * 997) for n in range(200)]
            answers = await asyncio.gather(*(asked(public, payload) for payload in payloads))
            assert answers == payloads
            await until(lambda: ours.status()[0].opened == 200, "the count")


async def test_a_service_that_is_not_there(leak_check: None) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with server() as ours, client(ours.port or 0, nobody.getsockname()[1]) as exposed:
            heard = exposed.events()
            with suppress(ConnectionResetError):  # it may come before the connection is seen
                reader, writer = await visit(exposed.assigned_port or 0)
                assert await asyncio.wait_for(reader.read(), LATEST) == b""
                writer.close()
            async with asyncio.timeout(LATEST):
                async for event in heard:
                    if isinstance(event, events.ServiceError):
                        assert event.err.kind == "connect"
                        assert event.service.visitor_address is not None
                        break


async def test_a_reset_goes_through(leak_check: None) -> None:
    async def answer_and_break(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    async with Service(answer_and_break) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            reader, writer = await visit(exposed.assigned_port or 0)
            writer.write(b"x")
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(), LATEST)
            writer.close()


async def test_a_service_at_a_path_and_one_on_ipv6(tmp_path: Path, leak_check: None) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await echo(reader, writer)
        writer.close()

    path = tmp_path / "service"
    unix = await asyncio.start_unix_server(serve, path)
    six = await asyncio.start_server(serve, "::1", 0)
    async with server() as ours:
        exposed = TunnelClient("127.0.0.1", ours.port or 0, None, CREDENTIALS, local_service_path=path)
        async with exposed:
            assert await asked(exposed.assigned_port or 0, b"over a path") == b"over a path"
        async with client(ours.port or 0, six.sockets[0].getsockname()[1]) as exposed:
            assert await asked(exposed.assigned_port or 0, b"over ::1") == b"over ::1"
    unix.close()
    six.close()


async def test_a_stalled_visitor_holds_up_nobody_and_costs_its_window(leak_check: None) -> None:
    async def pour_or_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readexactly(1) == b"e":
            return await echo(reader, writer)
        while True:
            writer.write(bytes(65_536))
            await writer.drain()

    async with Service(pour_or_echo) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            _reader, writer = await visit(exposed.assigned_port or 0)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(b"p")
            # The first window is 256 KiB, and credit is given by the half of it.
            await until(lambda: ours.status()[0].held > 128_000, "the window to fill")
            for _ in range(20):
                assert await asked(exposed.assigned_port or 0, b"e" + b"y" * 10_000) == b"y" * 10_000
            assert ours.status()[0].held < 18_000_000, "a window grows to 16 MiB at most"
            assert exposed.status().held < 6_000_000, "what was not acknowledged is 4 MiB at most"
            writer.transport.abort()


# -- sessions ------------------------------------------------------------------------------------------


async def test_a_cut_is_a_pause_and_nothing_else(leak_check: None) -> None:
    payload = random.Random(5).randbytes(20_000_000)
    async with Service(echo) as service, server() as ours, Cutter(ours.port or 0) as network:
        async with client(network.port, service.port) as exposed:
            public = exposed.assigned_port or 0
            answer = asyncio.create_task(asked(public, payload))
            for cut in range(3):
                seen = exposed.status().received
                await until(functools.partial(_received_more, exposed, seen), "progress")
                if answer.done():
                    break
                network.refuses = True
                network.cut()
                await until(lambda: not ours.status()[0].connected, "the cut")
                network.refuses = False
                await until(functools.partial(_is_back, ours, cut + 1), "the client")
            got = await asyncio.wait_for(answer, 60)
            assert hashlib.sha256(got).digest() == hashlib.sha256(payload).digest()
            assert exposed.assigned_port == public
            assert service.connections == 1, "the service noticed nothing"


def _is_back(ours: TunnelServer, resumes: int) -> bool:
    status = ours.status()[0]
    return status.connected and status.resumes == resumes


def _received_more(exposed: TunnelClient, seen: int) -> bool:
    return exposed.status().received > seen


async def test_a_client_is_where_it_came_from_last(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours, Cutter(ours.port or 0) as network:
        heard = ours.events()
        async with client(network.port, service.port) as exposed:
            assert ours.status()[0].client_address == network.seen_as
            network.cut()
            await until(lambda: ours.status()[0].resumes == 1, "the client")
            assert ours.status()[0].client_address == network.seen_as
            assert await asked(exposed.assigned_port or 0, b"x") == b"x"
        async for event in heard:
            if isinstance(event, events.VisitorConnected):
                assert event.client_tunnel.client_address == network.seen_as
                break


async def test_visitors_come_while_the_client_is_away(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours, Cutter(ours.port or 0) as network:
        async with client(network.port, service.port) as exposed:
            public = exposed.assigned_port or 0
            network.refuses = True
            network.cut()
            await until(lambda: not ours.status()[0].connected, "the cut")
            visitor = asyncio.create_task(asked(public, b"patience"))
            await until(lambda: ours.status()[0].streams == 1, "the visitor")
            network.refuses = False
            assert await asyncio.wait_for(visitor, LATEST) == b"patience"


async def test_after_its_grace_a_session_is_over(leak_check: None) -> None:
    async with Service(echo) as service:
        async with server(options={"grace": 0.2}) as ours, Cutter(ours.port or 0) as network:
            async with client(network.port, service.port, options={"grace": 0.2}) as exposed:
                public = exposed.assigned_port or 0
                reader, writer = await visit(public)
                writer.write(b"x")
                assert await asyncio.wait_for(reader.readexactly(1), LATEST) == b"x"
                network.refuses = True
                network.cut()
                with suppress(ConnectionResetError):
                    assert await asyncio.wait_for(reader.read(), LATEST) == b""
                writer.close()
                await until(lambda: not ours.status(), "the end of the tunnel")
                await until(lambda: service.open == 0, "the end of the service's connection")
                network.refuses = False
                await until(lambda: ours.status(), "a new tunnel")
                assert ours.status()[0].port == public, "the port is leased"
                await until(lambda: exposed.assigned_port == public, "the client's port")
                assert await asked(public, b"again") == b"again"


async def test_a_restarted_server_gives_the_same_port(tmp_path: Path, leak_check: None) -> None:
    leases = tmp_path / "leases.json"
    async with Service(echo) as service:
        async with server(options={"lease_file": leases}) as first:
            port = first.port or 0
            mine = TunnelClient(
                "127.0.0.1",
                port,
                service.port,
                CREDENTIALS,
                options=ClientOptions(reconnect_delay=(0.02, 0.1)),
            )
            public = await asyncio.wait_for(mine.connect(), LATEST)
            await first.stop()
            assert [one["port"] for one in json.loads(leases.read_text())["leases"]] == [public]
        async with server(options={"lease_file": leases}, port=port) as second:
            await until(lambda: second.status() and mine.assigned_port, "the client")
            assert mine.assigned_port == public
            assert await asked(public, b"the same") == b"the same"
            await mine.stop()


async def test_a_lease_is_taken_over_at_once(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours, Cutter(ours.port or 0) as network:
        options = {"lease": "a shop's"}
        async with client(ours.port or 0, service.port, options=options) as stale:
            public = stale.assigned_port
            async with client(network.port, service.port, options=options) as fresh:
                assert fresh.assigned_port == public
                # It is told, and does not come back to take it back, again and again.
                await asyncio.wait_for(stale.wait_closed(), LATEST)
                assert isinstance(stale.error, PolicyDenied)
                assert stale.error.reason == "replaced"
                assert [one.port for one in ours.status()] == [public]
                assert await asked(public or 0, b"fresh") == b"fresh"
                # One that slept hears of it when it wakes up.
                network.refuses = True
                network.cut()
                async with client(ours.port or 0, service.port, options=options) as third:
                    assert third.assigned_port == public
                    network.refuses = False
                    await asyncio.wait_for(fresh.wait_closed(), LATEST)
                    assert isinstance(fresh.error, PolicyDenied)
                    assert fresh.error.reason == "replaced"
                    assert await asked(public or 0, b"third") == b"third"


async def test_a_lease_is_taken_over_from_a_client_that_hangs_without_asking_it() -> None:
    async with Service(echo) as service, server() as ours:
        given: dict[str, Any] = {"port": ours.port, "service": service.port, "credentials": CREDENTIALS}
        frozen = await End.start("client", **given, options={"lease": "a shop's"})
        frozen.freeze()
        # Its answer alone would be waited for longer.
        options = {"lease": "a shop's", "handshake_timeout": 1.5}
        try:
            async with client(ours.port or 0, service.port, options=options) as again:
                assert again.assigned_port == frozen.port
        finally:
            await frozen.kill()


async def test_a_client_that_is_started_again_has_its_port_at_once() -> None:
    async with Service(echo) as service, server() as ours:
        given: dict[str, Any] = {
            "port": ours.port,
            "service": service.port,
            "credentials": CREDENTIALS,
            "options": {},
        }
        dead = await End.start("client", **given)
        await dead.kill()
        await until(lambda: not ours.status()[0].connected, "the end of its connection")
        async with client(ours.port or 0, 9) as other:
            assert other.assigned_port != dead.port, "it exposes another service"
        async with client(ours.port or 0, service.port) as again:
            assert again.assigned_port == dead.port
            assert await asked(dead.port, b"again") == b"again"


async def test_a_client_that_hangs_loses_its_port_to_one_that_is_started_again() -> None:
    async with Service(echo) as service, server() as ours:
        given: dict[str, Any] = {"port": ours.port, "service": service.port, "credentials": CREDENTIALS}
        frozen = await End.start("client", **given, options={"reconnect_delay": (0.05, 0.2)})
        frozen.freeze()
        try:
            async with client(ours.port or 0, service.port) as again:
                assert again.assigned_port == frozen.port
                frozen.thaw()
                # It comes back, as another one.
                await until(lambda: len(ours.status()) == 2, "the one that hung")
                assert again.assigned_port == frozen.port
                assert await asked(frozen.port, b"again") == b"again"
        finally:
            await frozen.kill()


async def test_a_second_client_of_the_same_service_takes_nothing_from_one_that_is_slow(
    leak_check: None,
) -> None:
    async with Service(echo) as service, server() as ours, Cutter(ours.port or 0) as network:
        # Its round trip is longer than one waits for who does not answer, and is known by its hello alone.
        network.delay = 1.2
        async with client(network.port, service.port) as first:
            reader, writer = await visit(first.assigned_port or 0)
            async with client(ours.port or 0, service.port) as beside:
                assert beside.assigned_port != first.assigned_port
                writer.write(b"there")
                assert await asyncio.wait_for(reader.readexactly(5), LATEST) == b"there"
            writer.close()


async def test_a_second_client_of_the_same_service_takes_nothing_from_one_that_lives(
    leak_check: None,
) -> None:
    async with Service(echo) as service, server() as ours, Cutter(ours.port or 0) as network:
        async with client(network.port, service.port) as first:
            public = first.assigned_port or 0
            reader, writer = await visit(public)
            async with client(ours.port or 0, service.port) as beside:
                assert beside.assigned_port != public
            network.refuses = True
            network.cut()
            await until(lambda: not ours.status()[0].connected, "the end of its connection")
            async with client(ours.port or 0, service.port) as second:
                assert second.assigned_port != public
                network.refuses = False
                writer.write(b"patient")
                assert await asyncio.wait_for(reader.readexactly(7), LATEST) == b"patient"
                assert first.assigned_port == public
                writer.close()


async def test_one_port_is_enough_to_come_back(free_port: Any, leak_check: None) -> None:
    only = free_port()
    async with Service(echo) as service, server(options={"public_ports": (only, only)}) as ours:
        async with Cutter(ours.port or 0) as network, client(network.port, service.port) as exposed:
            assert exposed.assigned_port == only
            network.cut()
            await until(lambda: ours.status()[0].resumes == 1, "the client")
            assert await asked(only, b"back") == b"back"
            other = TunnelClient(
                "127.0.0.1",
                ours.port or 0,
                9,
                {**CREDENTIALS, "n": 2},
                options=ClientOptions(reconnect=False),
            )
            with pytest.raises(ConnectionError, match="no port is free"):
                await asyncio.wait_for(other.connect(), LATEST)


async def test_a_server_that_stops_lets_visitors_finish(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            visitor = await visit(public)
            await says(visitor, b"before")
            stopping = asyncio.create_task(ours.stop(drain=LATEST))
            await until(lambda: not listens(public), "the port's end")
            await says(visitor, b"after")
            assert not stopping.done()
            await leaves(visitor)
            await asyncio.wait_for(stopping, LATEST)


# -- TLS -----------------------------------------------------------------------------------------------


async def test_tls_on_both_hops(made: ThrowawayCertificates, leak_check: None) -> None:
    credentials = made.server_credentials()
    async with Service(echo) as service, server(tls=credentials, visitor_tls=credentials) as ours:
        exposed = TunnelClient(
            "localhost",
            ours.port or 0,
            service.port,
            CREDENTIALS,
            ca=made.authority,
            options=ClientOptions(reconnect_delay=(0.05, 0.1)),
        )
        async with exposed:
            context = ssl.create_default_context(cadata=made.authority.decode())
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", exposed.assigned_port, ssl=context, server_hostname="localhost"
            )
            payload = random.Random(6).randbytes(2_000_000)
            writer.write(payload)
            assert await asyncio.wait_for(reader.readexactly(len(payload)), LATEST) == payload
            writer.close()
            await writer.wait_closed()


async def test_tls_goes_on_after_a_cut(made: ThrowawayCertificates, leak_check: None) -> None:
    payload = random.Random(7).randbytes(5_000_000)
    async with Service(echo) as service, server(tls=made.server_credentials()) as ours:
        async with Cutter(ours.port or 0) as network:
            options = {"host": "localhost", "ca": made.authority}
            async with client(network.port, service.port, **options) as exposed:
                answer = asyncio.create_task(asked(exposed.assigned_port or 0, payload))
                await until(lambda: exposed.status().received > 0, "progress")
                network.cut()
                assert await asyncio.wait_for(answer, 60) == payload


async def test_an_original_client_over_tls(made: ThrowawayCertificates) -> None:
    async with Service(echo) as service, server(tls=made.server_credentials()) as ours:
        peer = OriginalClient(service.port)
        context = ssl.create_default_context(cadata=made.authority.decode())
        context.check_hostname = False
        public = await asyncio.wait_for(
            peer.connect("127.0.0.1", ours.port or 0, CREDENTIALS, context), LATEST
        )
        assert await asked(public, b"x" * 100_000, end=False) == b"x" * 100_000
        await peer.close()


async def test_a_plain_client_at_a_tls_port_is_told(made: ThrowawayCertificates, leak_check: None) -> None:
    async with server(tls=made.server_credentials()) as ours:
        heard = ours.events()
        mine = TunnelClient("127.0.0.1", ours.port or 0, 9, CREDENTIALS)
        with pytest.raises(IncompatiblePeer, match="the port speaks TLS: connect with TLS") as told:
            await asyncio.wait_for(mine.connect(), LATEST)
        assert (told.value.reason, told.value.retryable) == ("plain_at_tls_port", False)
        async with asyncio.timeout(LATEST):
            async for event in heard:
                if isinstance(event, events.ClientError):
                    assert isinstance(event.err, IncompatiblePeer)
                    assert event.err.reason == "plain_at_tls_port"
                    break


async def test_a_tls_client_at_a_plain_port_is_told(made: ThrowawayCertificates, leak_check: None) -> None:
    async with server() as ours:
        heard = ours.events()
        mine = TunnelClient(
            "localhost",
            ours.port or 0,
            9,
            CREDENTIALS,
            ca=made.authority,
            options=ClientOptions(reconnect=False),
        )
        with pytest.raises(IncompatiblePeer, match="the port is plain: connect without TLS") as told:
            await asyncio.wait_for(mine.connect(), LATEST)
        assert (told.value.reason, told.value.retryable) == ("tls_at_plain_port", False)
        async with asyncio.timeout(LATEST):
            async for event in heard:
                if isinstance(event, events.ClientError):
                    assert isinstance(event.err, IncompatiblePeer)
                    assert event.err.reason == "tls_at_plain_port"
                    break


# -- who may, and mistakes -----------------------------------------------------------------------------


async def test_filters_of_both_kinds_are_replaced_while_it_runs(leak_check: None) -> None:
    async def never(credentials: dict[str, Any]) -> bool:
        return False

    def yes_man(credentials: dict[str, Any]) -> Any:
        return "yes"

    async with Service(echo) as service, server() as ours:
        for connection_filter in (never, yes_man):
            ours.connection_filter = connection_filter
            mine = TunnelClient("127.0.0.1", ours.port or 0, service.port, CREDENTIALS)
            with pytest.raises(CredentialsRejected, match="rejected"):
                await asyncio.wait_for(mine.connect(), LATEST)
        ours.connection_filter = allow
        async with client(ours.port or 0, service.port) as exposed:
            assert await asked(exposed.assigned_port or 0, b"in") == b"in"


async def test_without_a_filter_only_loopback_listens(leak_check: None) -> None:
    with pytest.raises(ConfigError) as caught:
        TunnelServer(options=ServerOptions(host="0.0.0.0"))
    assert caught.value.field == "host"
    ours = TunnelServer()
    async with Service(echo) as service:
        await ours.start(0)
        assert all(one.startswith(("127.0.0.1:", "[::1]:")) for one in ours.addresses)
        async with client(ours.port or 0, service.port, credentials={}) as exposed:
            assert await asked(exposed.assigned_port or 0, b"in") == b"in"
        await ours.stop()
    async with server(
        connection_filter=None, danger_allow_anonymous=True, options={"host": None}
    ) as open_one:
        assert open_one.addresses[0].startswith(("[::]:", "0.0.0.0:"))


async def test_mistakes(tmp_path: Path, leak_check: None) -> None:
    with pytest.raises(ConfigError) as caught:
        TunnelClient("host", 1, 1, ["a list"])  # type: ignore[arg-type]
    assert caught.value.field == "authentication_credentials"
    with pytest.raises(ConfigError) as caught:
        TunnelClient("host", 1, 1, {"x": object()})
    assert caught.value.field == "authentication_credentials"
    with pytest.raises(ConfigError) as caught:
        TunnelClient("host", 1)
    assert caught.value.field == "local_service_port"
    with pytest.raises(ConfigError) as caught:
        ServerOptions(public_ports=(5, 4))
    assert caught.value.field == "public_ports"
    bad = tmp_path / "leases"
    bad.write_text('{"version": 3}')
    broken = TunnelServer(options=ServerOptions(lease_file=bad))
    with pytest.raises(ConfigError) as caught:
        await broken.start(0)
    assert caught.value.field == "lease_file"
    with pytest.raises(ConfigError):
        broken.on("no-such-event", print)
    with pytest.raises(ConfigError) as caught:
        await TunnelServer(tls=Credentials.none()).start(0)
    assert caught.value.field in ("tls", "credentials")
    async with server() as ours:
        taken = TunnelServer(options=ServerOptions(host="127.0.0.1"))
        with pytest.raises(BindError):
            await taken.start(ours.port or 0)
        with pytest.raises(ApiMisuseError):
            await ours.start(0)


async def test_secrets_do_not_print(leak_check: None) -> None:
    secret = {"id": "allowed-client", "key": "5up3r-s3cr3t"}
    async with Service(echo) as service, server() as ours:
        heard = ours.events()
        async with client(ours.port or 0, service.port, credentials=secret) as exposed:
            assert "5up3r" not in repr(exposed)
            async for event in heard:
                assert "5up3r" not in repr(event)
                if isinstance(event, events.TunnelCreated):
                    assert event.client_authentication_credentials == secret
                    assert event.client_tunnel.authentication_credentials == secret
                    break


async def test_call_backs_by_name(leak_check: None) -> None:
    seen: list[str] = []
    async with Service(echo) as service, server() as ours:
        ours.on("visitor-connected", lambda event: seen.append(event.name))
        ours.on("data-from-visitor", lambda event: seen.append(f"{event.name} {event.bytes}"))
        async with client(ours.port or 0, service.port) as exposed:
            assert await asked(exposed.assigned_port or 0, b"12345") == b"12345"
            await until(lambda: len(seen) == 2, "both events")
    assert seen == ["visitor-connected", "data-from-visitor 5"]


async def test_cancelled_starts_leave_nothing(leak_check: None) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        mine = TunnelClient("127.0.0.1", silent.getsockname()[1], 9, CREDENTIALS)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(mine.connect(), 0.2)
        await asyncio.wait_for(mine.wait_closed(), LATEST)
