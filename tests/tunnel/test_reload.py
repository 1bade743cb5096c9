"""A server and a client that are told to do otherwise while streams are open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sapper.errors import ClosedError, ConfigError
from sapper.testing import throwaway_certificates
from sapper.tls import Credentials
from sapper.tunnel import ClientOptions, ServerOptions, TunnelClient, TunnelServer
from support.tunnels import CREDENTIALS, LATEST, Service, client, echo, is_let_in, server, visit


async def echoes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Whether an open stream still works."""
    async with asyncio.timeout(LATEST):
        writer.write(b"still there")
        return await reader.readexactly(11) == b"still there"


async def test_visitors_meet_other_rules_and_streams_stay(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            stream = await visit(public)
            assert await echoes(*stream)
            options = ServerOptions(host="127.0.0.1", deny_visitors=("127.0.0.1",))
            await ours.reload(options)
            assert not await is_let_in(public, "127.0.0.1")
            assert await is_let_in(public, "127.0.0.2")
            await ours.reload(options, visitor_filter=lambda _tunnel, address: "127.0.0.3:" in address)
            assert not await is_let_in(public, "127.0.0.2")
            assert await is_let_in(public, "127.0.0.3")
            await ours.reload(ServerOptions(host="127.0.0.1"), visitor_filter=None)
            assert await is_let_in(public, "127.0.0.1")
            assert await echoes(*stream)
            stream[1].close()


async def test_the_later_of_two_reloads_at_once_holds(leak_check: None) -> None:
    async with server(options={"host": "127.0.0.1"}) as ours:
        first = ServerOptions(host="127.0.0.1", visitor_host="localhost")  # which is looked up
        second = ServerOptions(host="127.0.0.1", deny_visitors=("127.0.0.1",))
        await asyncio.gather(ours.reload(first), ours.reload(second))
        async with Service(echo) as service, client(ours.port or 0, service.port) as exposed:
            assert not await is_let_in(exposed.assigned_port or 0, "127.0.0.1")


async def test_other_ports_are_for_clients_that_come(free_port: Callable[..., int], leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            stream = await visit(exposed.assigned_port or 0)
            port = free_port()
            await ours.reload(ServerOptions(host="127.0.0.1", public_ports=(port, port)))
            async with client(ours.port or 0, service.port, credentials={**CREDENTIALS, "n": 2}) as second:
                assert second.assigned_port == port
            assert await echoes(*stream)
            stream[1].close()


async def test_tls_begins_with_the_next_connection(leak_check: None) -> None:
    made = throwaway_certificates()
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            stream = await visit(exposed.assigned_port or 0)
            await ours.reload(tls=made.server_credentials())
            given: dict[str, Any] = {"host": "localhost", "ca": made.authority}
            async with client(ours.port or 0, service.port, **given) as second:
                assert second.assigned_port != exposed.assigned_port
            assert await echoes(*stream)
            stream[1].close()


async def test_what_cannot_change_is_named_and_nothing_changes(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            public = exposed.assigned_port or 0
            for name, value in [
                ("host", "::1"),
                ("max_clients", 7),
                ("max_handshakes", 7),
                ("lease_file", "x"),
            ]:
                given: dict[str, Any] = {"host": "127.0.0.1", "deny_visitors": ("*",), name: value}
                with pytest.raises(ConfigError, match="while the server runs") as caught:
                    await ours.reload(ServerOptions(**given))
                assert caught.value.field == name
            with pytest.raises(ConfigError) as caught:
                await ours.reload(ServerOptions(host="127.0.0.1", allow_visitors=("nonsense",)))
            assert caught.value.field == "allow_visitors.0"
            assert await is_let_in(public)


async def test_the_next_visitor_reaches_another_service(leak_check: None) -> None:
    async with Service(echo) as first, Service(echo) as second, server() as ours:
        async with client(ours.port or 0, first.port) as exposed:
            public = exposed.assigned_port or 0
            stream = await visit(public)
            assert await echoes(*stream)
            like = TunnelClient(
                "127.0.0.1",
                ours.port or 0,
                second.port,
                CREDENTIALS,
                options=ClientOptions(reconnect_delay=(0.05, 0.2)),
            )
            await exposed.reload(like)
            assert await is_let_in(public)
            assert (first.connections, second.connections) == (1, 1)
            assert await echoes(*stream)
            stream[1].close()


async def test_a_client_that_is_sent_away_comes_again_with_other_credentials(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours, server() as other:
        async with client(ours.port or 0, service.port) as exposed:
            heard = exposed.events()
            like = TunnelClient(
                "127.0.0.1",
                other.port or 0,
                service.port,
                CREDENTIALS,
                options=ClientOptions(reconnect_delay=(600, 600)),
            )
            await ours.stop()
            async with asyncio.timeout(LATEST):
                async for event in heard:
                    if event.name == "tunnel-reconnect-queued":
                        await exposed.reload(like)  # its pause is over with that
                    if event.name == "authentication-acknowledged":
                        break
            assert other.status()[0].port == exposed.assigned_port


async def test_files_are_read_again(tmp_path: Path, leak_check: None) -> None:
    def write() -> bytes:
        made = throwaway_certificates()
        (tmp_path / "chain.pem").write_bytes(made.server[0])
        (tmp_path / "key.pem").write_bytes(made.server[1])
        return made.authority

    before = write()
    credentials = Credentials.certificate(tmp_path / "chain.pem", tmp_path / "key.pem")
    async with Service(echo) as service, server(tls=credentials) as ours:
        given: dict[str, Any] = {"host": "localhost", "ca": before}
        async with client(ours.port or 0, service.port, **given) as exposed:
            stream = await visit(exposed.assigned_port or 0)
            assert await echoes(*stream)
            given["ca"] = write()
            await ours.reload()
            async with client(ours.port or 0, service.port, **given):
                assert await echoes(*stream)
            stream[1].close()


async def test_one_that_does_not_run_is_told_so(leak_check: None) -> None:
    with pytest.raises(ClosedError):
        await TunnelServer().reload(ServerOptions())
    with pytest.raises(ClosedError):
        await TunnelClient("localhost", 9000, 1).reload()


async def test_only_a_fresh_client_is_an_example(leak_check: None) -> None:
    async with Service(echo) as service, server() as ours:
        async with client(ours.port or 0, service.port) as exposed:
            with pytest.raises(ConfigError) as caught:
                await exposed.reload(exposed)
            assert caught.value.field == "like"
