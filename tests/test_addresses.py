"""IPv4 clients of a listener for both versions: IPv4 addresses wherever they show."""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Any

import pytest

from sapper.events import HandshakeFailed
from sapper.tls import Credentials, Proxy, connect, listen
from sapper.tls.proxy import ConnectionEvent
from support import tunnels
from support.services import echo

PSK = Credentials.psk("x", bytes(range(32)))
PLAIN = re.compile(r"127\.0\.0\.1:\d+")

pytestmark = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no socket has both versions here")


async def test_at_a_listener() -> None:
    async with asyncio.timeout(30), listen((None, 0), credentials=PSK) as server:
        events = server.events()
        assert server.addresses[0].startswith("[::]:")
        visiting = asyncio.create_task(connect("127.0.0.1", server.port, credentials=PSK))
        async with await server.accept() as stream, await visiting as visitor:
            theirs, ours = stream.get_extra_info("peername"), stream.get_extra_info("sockname")
            assert theirs == visitor.get_extra_info("sockname")
            assert ours == ("127.0.0.1", server.port)
        with socket.create_connection(("127.0.0.1", server.port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            failed: Any = await anext(aiter(events))
            assert isinstance(failed, HandshakeFailed)
            assert failed.peer == "{}:{}".format(*stranger.getsockname())


async def test_at_a_proxy() -> None:
    told: list[Any] = []
    with echo(b"hello") as behind:
        async with Proxy(listen=":0", to=behind.to, log_connections=True, on_event=told.append) as proxy:
            port = int(proxy.addresses[0].rsplit(":", 1)[1])
            with socket.create_connection(("127.0.0.1", port)) as one:
                assert await asyncio.to_thread(one.recv, 1) == b"h"
                (now,) = proxy.connections()
                assert PLAIN.fullmatch(now.client)
                assert now.local == f"127.0.0.1:{port}"
            async with asyncio.timeout(30):
                while not (ended := [event for event in told if isinstance(event, ConnectionEvent)]):
                    await asyncio.sleep(0)
            assert ended[0].connection.client == now.client


async def test_at_a_tunnel() -> None:
    everywhere = {"host": None, "visitor_host": None}
    async with tunnels.Service(tunnels.echo) as one, tunnels.server(options=everywhere) as ours:
        async with tunnels.client(ours.port or 0, one.port) as theirs:
            reader, writer = await asyncio.open_connection("127.0.0.1", theirs.assigned_port or 0)
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            (tunnel,) = ours.status()
            assert PLAIN.fullmatch(tunnel.client_address)
            (visitor,) = ours.visitors()
            assert visitor.visitor_address == "{}:{}".format(*writer.get_extra_info("sockname"))
            writer.close()
