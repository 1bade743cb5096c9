"""Several services of one client, and the public ports that they ask for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sapper.errors import ConfigError, ConnectError, IncompatiblePeer, PolicyDenied, SapperError
from sapper.tunnel import ClientOptions, ServerOptions, Service, TunnelClient, events
from sapper.tunnel.config import read_clients
from support.programs import free_port
from support.tunnels import CREDENTIALS, LATEST, Cutter, asked, echo, server, until
from support.tunnels import Service as Local
from support.w3ptunl import OriginalServer

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def saying(name: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """A service that says its name first, then echoes."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(name)
        await echo(reader, writer)

    return say


def several(port: int, *services: Service, **values: Any) -> TunnelClient:
    options = values.pop("options", {})
    if options.get("reconnect", True):
        options = {"reconnect_delay": (0.05, 0.2), **options}
    return TunnelClient(
        values.pop("host", "127.0.0.1"),
        port,
        None,
        values.pop("credentials", CREDENTIALS),
        services=services,
        options=ClientOptions(**options),
        **values,
    )


async def refusal(client: TunnelClient) -> SapperError:
    """Why a client that does not try again has no port."""
    with pytest.raises(SapperError) as raised:
        await asyncio.wait_for(client.connect(), LATEST)
    await client.stop()
    return raised.value


# -- several services ------------------------------------------------------------------------------------


async def test_each_service_has_its_port(any_loop: str, tmp_path: Path, leak_check: None) -> None:
    def closing(name: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await saying(name)(reader, writer)
            writer.close()
            closed.release()

        return serve

    closed = asyncio.Semaphore(0)
    path = tmp_path / "service"
    unix = await asyncio.start_unix_server(closing(b"path:"), path)
    six = await asyncio.start_server(closing(b"six:"), "::1", 0)
    async with Local(saying(b"one:")) as one, Local(saying(b"two:")) as two, server() as ours:
        heard = ours.events()
        client = several(
            ours.port or 0,
            Service(port=one.port),
            Service(port=two.port, name="second"),
            Service(path=path),
            Service(host="::1", port=six.sockets[0].getsockname()[1]),
        )
        async with client:
            ports = client.assigned_ports
            assert len(set(ports)) == 4
            assert client.assigned_port == ports[0]
            answers = await asyncio.gather(*(asked(port, b"hello") for port in ports))
            assert answers == [b"one:hello", b"two:hello", b"path:hello", b"six:hello"]
            names = ["", "second", f"unix:{path}", f"[::1]:{six.sockets[0].getsockname()[1]}"]
            status = ours.status()[0]
            assert [(one.name, one.port) for one in status.services] == list(zip(names, ports, strict=True))
            await until(
                lambda: (
                    [(one.visits, one.visitors, one.sent) for one in ours.status()[0].services]
                    == [(1, 0, 5)] * 4
                ),
                "the counts of each service",
            )
            assert [one.received for one in client.status().services] == [5] * 4
        visited = []
        async with asyncio.timeout(LATEST):
            async for event in heard:
                if isinstance(event, events.TunnelCreated):
                    found = [(one.name, one.port) for one in event.client_tunnel.services]
                    assert found == list(zip(names, ports, strict=True))
                elif isinstance(event, events.VisitorConnected):
                    visited.append(event.visitor.service)
                elif isinstance(event, events.ClientDisconnected):
                    break
        assert sorted(visited) == sorted(names)
        async with asyncio.timeout(LATEST):
            for _ in range(2):
                await closed.acquire()
    unix.close()
    six.close()


async def test_services_go_on_over_another_connection(leak_check: None) -> None:
    async with Local(saying(b"one:")) as one, Local(saying(b"two:")) as two, server() as ours:
        async with Cutter(ours.port or 0) as link:
            client = several(link.port, Service(port=one.port), Service(port=two.port))
            async with client:
                ports = client.assigned_ports
                streams = [await asyncio.open_connection("127.0.0.1", port) for port in ports]
                for (reader, writer), name in zip(streams, (b"one:", b"two:"), strict=True):
                    writer.write(b"before ")
                    assert await asyncio.wait_for(reader.readexactly(11), LATEST) == name + b"before "
                link.cut()
                for reader, writer in streams:
                    writer.write(b"behind")
                    assert await asyncio.wait_for(reader.readexactly(6), LATEST) == b"behind"
                    writer.close()
                await until(lambda: client.status().resumes == 1, "the second connection")
                assert client.assigned_ports == ports
                assert one.connections == two.connections == 1
                assert await asked(ports[1], b"new") == b"two:new"


async def test_ports_stay_with_their_names_over_a_restart(tmp_path: Path, leak_check: None) -> None:
    options = {"lease_file": tmp_path / "leases.json"}
    async with Local(echo) as one, Local(echo) as two:
        async with server(options=options) as ours:
            async with several(
                ours.port or 0, Service(port=one.port), Service(port=two.port, name="b")
            ) as had:
                first, second = had.assigned_ports
            await until(lambda: ours.status() == (), "the end of the tunnel")
            # Another order, one more: names decide.
            async with several(
                ours.port or 0,
                Service(port=one.port),
                Service(port=one.port, name="c"),
                Service(port=two.port, name="b"),
            ) as had:
                assert had.assigned_ports[0] == first
                assert had.assigned_ports[2] == second
                third = had.assigned_ports[1]
        async with server(options=options) as ours:
            async with several(
                ours.port or 0, Service(port=two.port, name="b"), Service(port=one.port, name="c")
            ) as had:
                assert had.assigned_ports == (second, third)
            async with several(ours.port or 0, Service(port=one.port)) as had:
                assert had.assigned_port == first


async def test_two_clients_with_the_same_credentials_and_names(leak_check: None) -> None:
    async with Local(saying(b"one:")) as one, Local(saying(b"two:")) as two, server() as ours:
        async with several(ours.port or 0, Service(port=one.port, name="web")) as first:
            async with several(ours.port or 0, Service(port=two.port, name="web")) as second:
                assert first.assigned_port != second.assigned_port
                assert await asked(first.assigned_port or 0, b"") == b"one:"
                assert await asked(second.assigned_port or 0, b"") == b"two:"


async def test_a_lease_takes_each_service_over(leak_check: None) -> None:
    shared = {"danger_shared_leases": True}
    async with (
        Local(saying(b"one:")) as one,
        Local(saying(b"two:")) as two,
        server(options=shared) as ours,
    ):
        options = {"lease": "ours", "reconnect": False}
        names = ("", "db")
        first = several(
            ours.port or 0, *(Service(port=one.port, name=name or None) for name in names), options=options
        )
        async with first:
            ports = first.assigned_ports
            second = several(
                ours.port or 0,
                *(Service(port=two.port, name=name or None) for name in names),
                options=options,
                credentials={**CREDENTIALS, "more": 1},
            )
            async with second:
                assert second.assigned_ports == ports
                assert await asked(ports[0], b"") == b"two:"
                assert await asked(ports[1], b"") == b"two:"
                await first.stop()


async def test_an_original_server_takes_one() -> None:
    async with Local(echo) as one:
        peer = OriginalServer(CREDENTIALS)
        await peer.start()
        try:
            error = await refusal(
                several(peer.port, Service(port=one.port), Service(port=one.port, name="b"))
            )
            assert isinstance(error, IncompatiblePeer)
            assert error.context.reason == "one_service"
            assert "takes one service of a client, not 2" in str(error)
            error = await refusal(several(peer.port, Service(port=one.port, public_port=1)))
            assert isinstance(error, IncompatiblePeer)
            assert error.context.reason == "public_port"
            error = await refusal(several(peer.port, Service(port=one.port, public_host="127.0.0.1")))
            assert error.context.reason == "public_port"
            # One that has a name, and would take any port, is served.
            client = several(peer.port, Service(port=one.port, name="b", public_port=(1, 65_535)))
            async with client:
                assert await asked(client.assigned_port or 0, b"hello", end=False) == b"hello"
        finally:
            await peer.close()


async def test_a_client_that_gives_up_says_why(leak_check: None) -> None:
    heard: list[Any] = []
    async with server(options={"max_services": 1}) as ours:
        client = several(ours.port or 0, Service(port=9), Service(port=9, name="b"))
        client.on("error", heard.append)
        stream = client.events()
        error = await refusal(client)
        names = [event.name async for event in stream]
        assert names[-2:] == ["error", "tunnel-client-end"]
        assert [(type(event.err), str(event.err)) for event in heard] == [(type(error), str(error))]


async def test_more_services_than_the_server_allows(leak_check: None) -> None:
    async with server(options={"max_services": 2}) as ours:
        error = await refusal(several(ours.port or 0, *(Service(port=9, name=f"s{n}") for n in range(3))))
        assert isinstance(error, PolicyDenied)
        assert error.context.reason == "too_many_services"
        await until(lambda: ours.status() == (), "the end of the tunnel")
        async with several(ours.port or 0, *(Service(port=9, name=f"s{n}") for n in range(2))) as client:
            assert len(client.assigned_ports) == 2


# -- ports that are asked for ------------------------------------------------------------------------------


async def test_a_fixed_port_and_one_of_a_range(leak_check: None) -> None:
    fixed = free_port()
    async with Local(echo) as one, server(options={"asked_ports": ((15_000, 30_000),)}) as ours:
        client = several(
            ours.port or 0,
            Service(port=one.port, public_port=fixed),
            Service(port=one.port, name="b", public_port=(20_000, 20_999)),
            Service(port=one.port, name="c"),
        )
        async with client:
            first, second, third = client.assigned_ports
            assert first == fixed
            assert 20_000 <= second <= 20_999
            for port in (first, second, third):
                assert await asked(port, b"hello") == b"hello"
        await until(lambda: ours.status() == (), "the end of the tunnel")
        # The same again: ranges do not draw anew.
        client = several(
            ours.port or 0,
            Service(port=one.port, public_port=fixed),
            Service(port=one.port, name="b", public_port=(20_000, 20_999)),
            Service(port=one.port, name="c"),
        )
        async with client:
            assert client.assigned_ports == (first, second, third)


@pytest.mark.parametrize(
    ("options", "wish", "reason"),
    [
        ({"public_ports": (20_000, 20_999)}, {"public_port": 21_000}, "port_not_allowed"),
        ({"asked_ports": ()}, {"public_port": 20_000}, "port_not_allowed"),
        ({"asked_ports": ((8_000, 8_001),)}, {"public_port": (8_002, 9_000)}, "port_not_allowed"),
        ({}, {"public_host": "127.0.0.2"}, "host_not_allowed"),
        ({"asked_hosts": ("127.0.0.3",)}, {"public_host": "127.0.0.2"}, "host_not_allowed"),
    ],
)
async def test_what_the_server_does_not_allow(
    options: dict[str, Any], wish: dict[str, Any], reason: str, leak_check: None
) -> None:
    async with server(options=options) as ours:
        error = await refusal(several(ours.port or 0, Service(port=9, name="web", **wish)))
        assert isinstance(error, PolicyDenied)
        assert error.context.reason == reason
        assert str(error).startswith("service web: ")
        await until(lambda: ours.status() == (), "the end of the tunnel")


async def test_a_port_that_is_not_free_is_tried_again(leak_check: None) -> None:
    port = free_port()
    async with Local(echo) as one, server(options={"asked_ports": ((port, port),)}) as ours:
        taken = socket.create_server(("127.0.0.1", port))
        once = several(ours.port or 0, Service(port=one.port, public_port=port), options={"reconnect": False})
        error = await refusal(once)
        assert isinstance(error, ConnectError)
        assert error.context.reason == "port_taken"
        assert f"the server's machine has public port {port}" in str(error)
        client = several(ours.port or 0, Service(port=one.port, public_port=port))
        heard = client.events()
        await client.start()
        async with asyncio.timeout(LATEST):
            async for event in heard:
                if isinstance(event, events.TunnelReconnectQueued):
                    taken.close()
                elif isinstance(event, events.AuthenticationAcknowledged):
                    assert event.assigned_port == port
                    break
        other = several(
            ours.port or 0,
            Service(port=one.port, public_port=port),
            credentials={**CREDENTIALS, "other": True},
            options={"reconnect": False},
        )
        error = await refusal(other)
        assert error.context.reason == "port_taken"
        assert f"port {port}" in str(error)
        await client.stop()


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
async def test_a_public_port_at_another_address(host: str, leak_check: None) -> None:
    port = free_port(host)
    async with Local(echo) as one:
        async with server(options={"asked_hosts": (host,), "asked_ports": ((port, port),)}) as ours:
            client = several(
                ours.port or 0,
                Service(port=one.port),
                Service(port=one.port, name="b", public_host=host, public_port=port),
            )
            async with client:
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(b"hello")
                assert await asyncio.wait_for(reader.readexactly(5), LATEST) == b"hello"
                writer.close()
                with pytest.raises(ConnectionRefusedError):
                    await asyncio.open_connection("127.0.0.1", port)


async def test_a_server_and_its_tunnel_on_ipv6(leak_check: None) -> None:
    async with Local(echo) as one, server(options={"host": "::1"}) as ours:
        async with several(ours.port or 0, Service(port=one.port), host="::1") as client:
            reader, writer = await asyncio.open_connection("::1", client.assigned_port or 0)
            writer.write(b"hello")
            assert await asyncio.wait_for(reader.readexactly(5), LATEST) == b"hello"
            assert ours.status()[0].client_address.startswith("[::1]:")
            writer.close()


async def test_a_session_goes_on_though_every_port_is_taken(leak_check: None) -> None:
    """The client that comes back needs no port of its own first, whatever its lease is."""
    first = free_port()
    async with Local(echo) as one, server(options={"public_ports": (first, first)}) as ours:
        async with Cutter(ours.port or 0) as link:
            async with several(link.port, Service(port=one.port)) as client:
                reader, writer = await asyncio.open_connection("127.0.0.1", first)
                writer.write(b"x")
                assert await asyncio.wait_for(reader.readexactly(1), LATEST) == b"x"
                link.cut()
                writer.write(b"y")
                assert await asyncio.wait_for(reader.readexactly(1), LATEST) == b"y"
                assert client.status().resumes == 1
                writer.close()


# -- in a file -------------------------------------------------------------------------------------------


def test_services_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "expose.toml"
    path.write_text(
        '[expose]\nserver = "host:9"\n'
        'services = [3000, "db=5432@8432", {path = "run.sock", public_port = [8000, 8099]}]\n'
    )
    config = read_clients(path)[""]
    assert config.services == (
        Service(port=3000),
        Service(port=5432, name="db", public_port=8432),
        Service(path=tmp_path / "run.sock", public_port=(8_000, 8_099)),
    )
    assert "host" in repr(config.client())
    path.write_text('[expose]\nserver = "host:9"\nservice = 3000\nservices = [3001]\n')
    with pytest.raises(ConfigError) as raised:
        read_clients(path)
    assert "service" in (raised.value.context.field or "")


@pytest.mark.parametrize(
    ("text", "service"),
    [
        ("3000", Service(port=3000)),
        ("host:3000", Service(host="host", port=3000)),
        ("[::1]:3000@8000", Service(host="::1", port=3000, public_port=8000)),
        ("web=unix:/run/a=b@8000-8099", Service(name="web", path=Path("/run/a=b"), public_port=(8000, 8099))),
        ("3000@[2001:db8::1]:80", Service(port=3000, public_host="2001:db8::1", public_port=80)),
        ("3000@192.0.2.1:80-90", Service(port=3000, public_host="192.0.2.1", public_port=(80, 90))),
    ],
)
def test_services_as_they_are_typed(text: str, service: Service) -> None:
    assert Service.parse(text) == service


# -- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, "port"),
        ({"port": 1, "path": "x"}, "port"),
        ({"path": "x", "host": "y"}, "host"),
        ({"port": 0}, "port"),
        ({"port": 1, "public_port": 0}, "public_port"),
        ({"port": 1, "public_port": (2, 1)}, "public_port"),
        ({"port": 1, "name": ""}, "name"),
        ({"port": 1, "name": "é" * 65}, "name"),
        ({"port": 1, "what": 2}, "what"),
    ],
)
def test_services_that_are_none(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Service(**values)
    assert (raised.value.context.field or "").startswith(field)


@pytest.mark.parametrize(
    ("services", "more", "field"),
    [
        ((), {}, "services"),
        ((Service(port=1), 7), {}, "services.1"),
        ((Service(port=1, name="a"), Service(port=2, name="a")), {}, "services.1.name"),
        ((Service(port=1),), {"local_service_port": 1}, "local_service_port"),
        ((Service(port=1),), {"local_service_path": "x"}, "local_service_path"),
    ],
)
def test_lists_of_services_that_are_none(services: Any, more: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        TunnelClient("localhost", 9, services=services, **more)
    assert raised.value.context.field == field


async def test_a_name_that_a_server_would_refuse_is_a_mistake() -> None:
    """Also where nobody said it: a service without a name is called as its address."""
    long = Service(host=".".join(["h" * 60] * 3), port=2)
    with pytest.raises(ConfigError, match="longer than 128 bytes, or not printable") as raised:
        await several(9, Service(port=1), long).start()
    assert raised.value.context.field == "services"


@pytest.mark.parametrize(("lease", "may"), [("", False), ("l", True), ("é" * 128, True), ("é" * 129, False)])
def test_a_lease_that_a_server_would_pass_over_is_a_mistake(lease: str, may: bool) -> None:
    if may:
        assert ClientOptions(lease=lease).lease == lease
        return
    with pytest.raises(ConfigError, match="must be 1 to 256 bytes long") as raised:
        ClientOptions(lease=lease)
    assert raised.value.context.field == "lease"


def test_options_of_a_server_that_are_none() -> None:
    for options, field in (
        ({"asked_ports": ((2, 1),)}, "asked_ports"),
        ({"asked_ports": ((0, 1),)}, "asked_ports"),
        ({"max_services": 0}, "max_services"),
        ({"asked_hosts": ("localhost",)}, "asked_hosts"),
    ):
        with pytest.raises(ConfigError) as raised:
            ServerOptions(**options)
        assert (raised.value.context.field or "").startswith(field)


def test_a_range_alone_is_told_how_ranges_are_written() -> None:
    with pytest.raises(ConfigError, match=r"list of ranges.*\[\[8000, 8999\]\]") as raised:
        ServerOptions(asked_ports=(8_000, 8_999))  # type: ignore[arg-type]
    assert (raised.value.field, raised.value.reason) == ("asked_ports", "wrong_type")


@pytest.mark.parametrize("name", ["two\nlines", "two\u2028lines", "gpj\u202e.exe", "\u2066x", "\x9b31m"])
def test_a_name_that_is_shown_as_another_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match="control characters") as raised:
        Service(port=1, name=name)
    assert raised.value.field == "name"
    assert Service(port=1, name="שלום").name == "שלום"


async def test_a_port_goes_along_to_another_service_of_its_client(leak_check: None) -> None:
    public = free_port()
    async with Local(echo) as local, server(options={"asked_ports": ((public, public),)}) as ours:
        for name in (None, "web", None):
            mine = several(ours.port or 0, Service(port=local.port, name=name, public_port=public))
            assert await asyncio.wait_for(mine.connect(), LATEST) == public
            assert await asked(public, b"here") == b"here"
            other = several(
                ours.port or 0,
                Service(port=local.port, name="other", public_port=public),
                options={"reconnect": False},
            )
            assert (await refusal(other)).reason == "port_taken"
            await mine.stop()
            await until(lambda: not ours.status(), "the end of the tunnel")
        stranger = several(
            ours.port or 0,
            Service(port=local.port, public_port=public),
            credentials={**CREDENTIALS, "of": "somebody else"},
            options={"reconnect": False},
        )
        assert (await refusal(stranger)).reason == "port_taken"
