"""Where a server listens: what is no host is told by its option, and `::` is every address."""

from __future__ import annotations

import socket

import pytest

from sapper.errors import ConfigError
from sapper.tunnel import ServerOptions, TunnelServer
from support.tunnels import Service, allow, client, echo, server

NO_HOSTS = ["no name", " ", "a" * 70 + ".invalid"]


async def refused(options: ServerOptions) -> ConfigError:
    wrong = TunnelServer(allow, options=options)
    with pytest.raises(ConfigError) as caught:
        await wrong.start(0)
    assert not wrong.running
    return caught.value


@pytest.mark.parametrize("host", NO_HOSTS)
async def test_a_host_of_visitors_that_is_none_is_told_at_the_start(leak_check: None, host: str) -> None:
    error = await refused(ServerOptions(host="127.0.0.1", visitor_host=host))
    assert error.field == "visitor_host"


async def test_so_is_an_address_of_another_machine(leak_check: None) -> None:
    error = await refused(ServerOptions(host="127.0.0.1", visitor_host="192.0.2.1"))
    assert error.field == "visitor_host"
    assert "192.0.2.1" in error.message


async def test_a_main_host_that_is_none_is_told_by_its_name(leak_check: None) -> None:
    assert (await refused(ServerOptions(host="no name"))).field == "host"


async def test_a_running_server_keeps_its_host_of_visitors_where_the_new_one_is_none(
    leak_check: None,
) -> None:
    async with Service(echo) as service, server() as ours:
        with pytest.raises(ConfigError) as caught:
            await ours.reload(ServerOptions(host="127.0.0.1", visitor_host="no name"))
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
