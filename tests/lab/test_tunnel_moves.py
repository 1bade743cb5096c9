"""A tunnel whose client's machine gets another address in the middle of a transfer, without a word."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from support.netns import Namespace
from support.tunnel_ends import PUBLIC_PORTS, End
from support.tunnels import CREDENTIALS

MUCH = 30_000_000
# The silence after which an end gives a connection up is fifteen seconds.
LATEST = 60.0


@pytest.mark.soak
async def test_the_client_s_address_changes(
    two_namespaces: tuple[Namespace, Namespace], tmp_path: Path
) -> None:
    here, there = two_namespaces
    options = {"host": here.ipv4, "public_ports": PUBLIC_PORTS, "lease_file": str(tmp_path / "leases.json")}
    server = await End.start("server", namespace=here.name, port=9000, options=options)
    service = await End.start("service", namespace=there.name)
    client = await End.start(
        "client",
        namespace=there.name,
        host=here.ipv4,
        port=9000,
        service=service.port,
        credentials=CREDENTIALS,
        options={"reconnect_delay": (0.05, 0.5)},
    )
    try:
        visitor = here.call(lambda: socket.create_connection((here.ipv4, client.port)))
        reader, writer = await asyncio.open_connection(sock=visitor)
        payload = b"e" + os.urandom(MUCH)
        writer.write(payload)
        got = bytearray(await asyncio.wait_for(reader.readexactly(MUCH // 4), LATEST))
        there.ip(f"address del {there.ipv4}/24 dev cable")
        there.ip("address add 10.77.0.99/24 dev cable")
        while len(got) < len(payload):
            data = await asyncio.wait_for(reader.read(1 << 20), LATEST)
            assert data, f"it ended after {len(got)} bytes"
            got += data
        assert got == payload
        status = (await server.ask())["tunnels"][0]
        assert status["resumes"] == 1
        assert status["client_address"].startswith("10.77.0.99:")
        writer.close()
    finally:
        for end in (client, service, server):
            await end.stop()
