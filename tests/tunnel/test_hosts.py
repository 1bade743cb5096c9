"""Where a server listens: what is no host is told by its option, and `::` is every address."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from sapper.errors import ConfigError
from sapper.tunnel import ServerOptions, TunnelClient, TunnelServer, events
from sapper.tunnel import Service as Exposed
from support.tunnels import CREDENTIALS, Service, allow, client, echo, first_of, leaves, says, server, until

NO_HOSTS = [
    "no name",
    " ",
    "",
    "a\0b",
    "a..b",
    "256.1.1.1",
    "fe80::zz",
    "a" * 70 + ".invalid",
    "a" * 300,
    True,
    "\udc80",
]
# Well formed, and no look-up finds it.
NOWHERE = "nobody.invalid"


async def refused(options: ServerOptions) -> ConfigError:
    wrong = TunnelServer(allow, options=options)
    with pytest.raises(ConfigError) as caught:
        await wrong.start(0)
    assert not wrong.running
    return caught.value


@pytest.mark.parametrize("host", NO_HOSTS, ids=lambda host: ascii(host)[:20])
def test_what_is_no_host_is_told_where_it_is_said(host: Any) -> None:
    made: dict[str, Callable[[], object]] = {
        "host": lambda: ServerOptions(host=host),
        "visitor_host": lambda: ServerOptions(visitor_host=host),
        "tunnel_server_host": lambda: TunnelClient(host, 9000, 1),
        "local_service_host": lambda: TunnelClient("here", 9000, 1, local_service_host=host),
    }
    for field, make in made.items():
        with pytest.raises(ConfigError) as caught:
            make()
        assert caught.value.field == field
        assert len(caught.value.message) < 150


@pytest.mark.parametrize(
    "host", ["h", "a_b.example.", "bücher.example", "127.1", "::", "fe80::1%lo", "x" * 63]
)
def test_what_may_be_a_host(host: str) -> None:
    assert ServerOptions(host=host, visitor_host=host).host == host
    TunnelClient(host, 9000, 1, local_service_host=host)


async def test_a_host_of_visitors_that_nobody_finds_is_told_at_the_start(leak_check: None) -> None:
    error = await refused(ServerOptions(host="127.0.0.1", visitor_host=NOWHERE))
    assert error.field == "visitor_host"


async def test_so_is_an_address_of_another_machine(leak_check: None) -> None:
    error = await refused(ServerOptions(host="127.0.0.1", visitor_host="192.0.2.1"))
    assert error.field == "visitor_host"
    assert "192.0.2.1" in error.message


async def test_a_main_host_that_nobody_finds_is_told_by_its_name(leak_check: None) -> None:
    assert (await refused(ServerOptions(host=NOWHERE))).field == "host"


async def test_a_running_server_keeps_its_host_of_visitors_where_the_new_one_is_none(
    leak_check: None,
) -> None:
    async with Service(echo) as service, server() as ours:
        with pytest.raises(ConfigError) as caught:
            await ours.reload(ServerOptions(host="127.0.0.1", visitor_host=NOWHERE))
        assert caught.value.field == "visitor_host"
        assert ours.port is not None
        async with client(ours.port, service.port) as tunnel:
            assert tunnel.assigned_port


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
async def test_every_address_is_every_address_of_both_families(leak_check: None) -> None:
    async with Service(echo) as service, server(options={"host": "::"}) as ours:
        assert ours.port is not None
        async with client(ours.port, service.port) as tunnel:
            assert tunnel.assigned_port is not None
            for host in ("127.0.0.1", "::1"):
                for port in (ours.port, tunnel.assigned_port):
                    socket.create_connection((host, port), 10).close()


# -- where visitors come in is told to the client ----------------------------------------------------------


async def hosts_of(given: dict[str, Any], *public: str | None, to: str = "127.0.0.1") -> list[str | None]:
    """What a client hears about the hosts of services that ask for these, and that visitors come in there."""
    created: list[events.TunnelCreated] = []
    async with Service(echo) as local, server(options=given) as ours:
        services = [Exposed(port=local.port, name=str(at), public_host=one) for at, one in enumerate(public)]
        ours.on("tunnel-created", created.append)
        exposed = TunnelClient(to, ours.port or 0, authentication_credentials=CREDENTIALS, services=services)
        heard = exposed.events()
        await exposed.start()
        try:
            told = await first_of(heard, events.AuthenticationAcknowledged)
            await until(lambda: created, "the server's word")
            assert created[0].client_tunnel.services == told.services
            for one in told.services:
                visitor = await asyncio.open_connection(one.host or to, one.port)
                await says(visitor, b"x")
                await leaves(visitor)
                visitor[1].close()
        finally:
            await exposed.stop()
    return [one.host for one in told.services]


async def test_a_client_hears_where_its_visitors_come_in(leak_check: None) -> None:
    asked = {"asked_hosts": ("127.0.0.1", "127.0.0.2")}
    assert await hosts_of(asked, None, "127.0.0.2") == [None, "127.0.0.2"]
    assert await hosts_of({"visitor_host": "127.0.0.2"}, None) == ["127.0.0.2"]
    # Where it came in itself, whatever that is called on its way.
    assert await hosts_of(asked, "127.0.0.1", to="localhost") == [None]
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "::"):
        assert await hosts_of({"visitor_host": host}, None, to="localhost") == [None]
    assert await hosts_of({"host": None}, None, to="127.0.0.2") == [None]
    named = {"host": "127.0.0.2", "visitor_host": "localhost"}
    assert await hosts_of(named, None, to="127.0.0.2") == ["localhost"]
