"""What who runs a server relies on: filters that fail, files of leases, whose a lease is, last words."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sapper.errors import ConfigError, ConnectError, PolicyDenied
from sapper.tunnel import ClientOptions, ServerOptions, TunnelClient, TunnelServer, events
from support.tunnels import CREDENTIALS, LATEST, Cutter, Service, allow, asked, client, echo, server, until
from support.w3ptunl import message, read_message

ANN, BOB = {"id": "ann"}, {"id": "bob"}


def either(credentials: dict[str, Any]) -> bool:
    return credentials in (ANN, BOB)


# -- filters that fail -------------------------------------------------------------------------------------


def broken(*_: object) -> bool:
    raise RuntimeError("the database is away")


async def late(*_: object) -> bool:
    await asyncio.sleep(LATEST)
    return True


@pytest.mark.parametrize("filter_of_the_moment", [broken, late])
async def test_a_filter_that_fails_once_ends_no_client(leak_check: None, filter_of_the_moment: Any) -> None:
    options = {"filter_timeout": 0.2}
    async with (
        Service(echo) as service,
        server(options=options) as ours,
        Cutter(ours.port or 0) as network,
        client(network.port, service.port) as tunnel,
    ):
        public = tunnel.assigned_port or 0
        reader, writer = await asyncio.open_connection("127.0.0.1", public)
        writer.write(b"before")
        assert await reader.readexactly(6) == b"before"
        failures: list[events.TunnelError] = []
        tunnel.on("tunnel-error", lambda event: failures.append(event))
        ours.connection_filter = filter_of_the_moment
        network.cut()
        await until(lambda: any("could not decide" in str(one.err) for one in failures), "the refusal")
        ours.connection_filter = allow
        # Its session waited: the visitor noticed a pause.
        writer.write(b"after")
        async with asyncio.timeout(LATEST):
            assert await reader.readexactly(5) == b"after"
        assert tunnel.assigned_port == public
        assert tunnel.error is None
        writer.close()


@pytest.mark.parametrize(
    ("service_filter", "kind"), [(broken, ConnectError), (lambda *_: False, PolicyDenied)]
)
async def test_so_does_a_filter_of_services(
    leak_check: None, service_filter: Any, kind: type[Exception]
) -> None:
    async with server(service_filter=service_filter) as ours:
        once = ClientOptions(reconnect=False)
        refused = TunnelClient("127.0.0.1", ours.port or 0, 1, CREDENTIALS, options=once)
        with pytest.raises(kind):
            await asyncio.wait_for(refused.connect(), LATEST)
        if kind is ConnectError:
            ours.service_filter = None
            ours.connection_filter = allow
            async with client(ours.port or 0, 1):
                pass


async def test_only_a_no_is_said_to_be_final(leak_check: None) -> None:
    for decide, retry in ((broken, True), (lambda _: False, False)):
        async with server(connection_filter=decide) as ours, asyncio.timeout(LATEST):
            reader, writer = await asyncio.open_connection("127.0.0.1", ours.port or 0)
            writer.write(message(CREDENTIALS))
            assert (await read_message(reader))["error"]["retry"] is retry
            writer.close()


# -- last words --------------------------------------------------------------------------------------------


async def test_a_refusal_is_told_though_the_server_stops_at_once(leak_check: None) -> None:
    heard: list[str] = []
    async with server(connection_filter=lambda _: False) as ours, asyncio.timeout(LATEST):
        for name in ("client-error", "client-disconnected"):
            ours.on(name, lambda event: heard.append(event.name))
        reader, writer = await asyncio.open_connection("127.0.0.1", ours.port or 0)
        writer.write(message(CREDENTIALS))
        assert "error" in await read_message(reader)
        await ours.stop()  # the peer has not closed
        assert heard == ["client-error", "client-disconnected"]
        writer.close()


# -- whose a lease is --------------------------------------------------------------------------------------


async def test_a_lease_s_name_is_its_credentials_own(leak_check: None) -> None:
    wanted = {"options": {"lease": "web", "reconnect": False}}
    async with Service(echo) as service, server(connection_filter=either) as ours:
        async with client(ours.port or 0, service.port, credentials=ANN, **wanted) as ann:
            async with client(ours.port or 0, service.port, credentials=BOB, **wanted) as bob:
                assert bob.assigned_port != ann.assigned_port
                assert ann.error is None
                assert await asked(ann.assigned_port or 0, b"ann's") == b"ann's"
            async with client(ours.port or 0, service.port, credentials=ANN, **wanted) as again:
                assert again.assigned_port == ann.assigned_port or ann.error is not None


async def test_a_server_may_let_all_share_leases(leak_check: None) -> None:
    wanted = {"options": {"lease": "web", "reconnect": False}}
    options = {"danger_shared_leases": True}
    async with Service(echo) as service, server(connection_filter=either, options=options) as ours:
        async with client(ours.port or 0, service.port, credentials=ANN, **wanted) as ann:
            public = ann.assigned_port
            async with client(ours.port or 0, service.port, credentials=BOB, **wanted) as bob:
                assert bob.assigned_port == public


async def test_a_filter_sees_the_lease_before_anybody_gives_way_to_it(leak_check: None) -> None:
    seen: list[str | None] = []
    created: list[str | None] = []

    def decide(tunnel: events.ClientTunnel, wanted: object) -> bool:
        seen.append(tunnel.lease)
        return tunnel.authentication_credentials == ANN

    options = {"danger_shared_leases": True}
    given: dict[str, Any] = {"connection_filter": either, "service_filter": decide, "options": options}
    async with Service(echo) as service, server(**given) as ours:
        ours.on("tunnel-created", lambda event: created.append(event.client_tunnel.lease))
        wanted = {"options": {"lease": "web", "reconnect": False}}
        async with client(ours.port or 0, service.port, credentials=ANN, **wanted) as ann:
            thief = TunnelClient(
                "127.0.0.1", ours.port or 0, 1, BOB, options=ClientOptions(lease="web", reconnect=False)
            )
            with pytest.raises(PolicyDenied):
                await asyncio.wait_for(thief.connect(), LATEST)
            assert await asked(ann.assigned_port or 0, b"still") == b"still"
            assert ann.error is None
        async with client(ours.port or 0, service.port, credentials=ANN):
            pass
    assert seen == ["web", "web", None]
    assert created == ["web", None]


# -- files of leases ---------------------------------------------------------------------------------------


async def test_a_child_that_was_forked_off_keeps_neither_the_file_nor_ports(
    tmp_path: Path, leak_check: None
) -> None:
    leases, (reading, writing) = tmp_path / "leases", os.pipe()
    async with Service(echo) as service, server(options={"lease_file": leases}) as first:
        port = first.port or 0
        async with client(port, service.port) as exposed:
            public = exposed.assigned_port or 0
            if (child := os.fork()) == 0:
                os.close(writing)
                os.read(reading, 1)
                os._exit(0)
            try:
                assert await asked(public, b"as before") == b"as before"
                await first.stop()
                back: list[object] = []
                exposed.on("authentication-acknowledged", back.append)
                async with server(options={"lease_file": leases}, port=port):
                    await until(lambda: back, "the client")
                    assert exposed.assigned_port == public
                    assert await asked(public, b"again") == b"again"
            finally:
                os.close(writing)
                os.close(reading)
                os.waitpid(child, 0)


async def test_a_file_of_leases_is_one_server_s_as_long_as_it_runs(tmp_path: Path, leak_check: None) -> None:
    leases = tmp_path / "leases"
    second = TunnelServer(allow, options=ServerOptions(host="127.0.0.1", lease_file=leases))
    async with server(options={"lease_file": leases}) as first:
        with pytest.raises(ConfigError, match="another server's") as caught:
            await second.start(0)
        assert (caught.value.field, caught.value.reason) == ("lease_file", "in_use")
        assert first.running
    await second.start(0)
    await second.stop()


@pytest.mark.parametrize("there", [True, False], ids=["there", "not yet there"])
async def test_a_link_stands_for_its_file_of_leases(there: bool, tmp_path: Path, leak_check: None) -> None:
    (tmp_path / "disk").mkdir()
    leases, link = tmp_path / "disk" / "leases", tmp_path / "link"
    (tmp_path / "other").symlink_to("disk/leases")
    link.symlink_to("other")
    if there:
        async with server(options={"lease_file": leases}):
            pass
    second = TunnelServer(allow, options=ServerOptions(host="127.0.0.1", lease_file=leases))
    async with server(options={"lease_file": link}) as ours:
        with pytest.raises(ConfigError) as caught:
            await second.start(0)
        assert caught.value.reason == "in_use"
        async with client(ours.port or 0, 1):
            pass
    assert link.is_symlink()
    assert len(json.loads(leases.read_text())["leases"]) == 1


async def test_a_file_of_leases_is_for_nobody_else_s_eyes(tmp_path: Path, leak_check: None) -> None:
    made = [tmp_path / "one", tmp_path / "two"]
    (tmp_path / "one.new").write_text("left by a process that died")
    kept = []
    for path in made:
        async with server(options={"lease_file": path}) as ours, client(ours.port or 0, 1):
            pass
        assert path.stat().st_mode & 0o077 == 0
        kept.append(json.loads(path.read_text()))
    tokens = [one["leases"][0]["token"] for one in kept]
    assert tokens[0] != tokens[1], "the same credentials, and nobody can see that"
    assert kept[0]["key"] != kept[1]["key"]


async def test_the_main_port_in_the_name_of_the_file(tmp_path: Path, leak_check: None) -> None:
    options = {"lease_file": tmp_path / "leases-{port}"}
    async with server(options=options) as one, server(options=options) as other:
        assert one.port != other.port
    assert {path.name for path in tmp_path.glob("*") if path.suffix == ""} == {
        f"leases-{one.port}",
        f"leases-{other.port}",
    }
