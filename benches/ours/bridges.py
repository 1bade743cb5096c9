"""Ours: idle bridges, and pairs of bridges set up and torn down one after another (see `bridge_work`)."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

from benches.bridge_work import WARM_CYCLES, Work, parse_work, print_cycles, print_idle
from benches.memory import allow_many_fds
from sapper import tls


def config(work: Work, *, server: bool) -> tls.TlsConfig:
    """One side's configuration, shared by all of its connections."""
    if work.key:
        return tls.TlsConfig(credentials=tls.Credentials.psk("bench", work.key), max_version="TLSv1.2")
    if server:
        return tls.TlsConfig(credentials=tls.Credentials.certificate(work.certificate, work.private_key))
    return tls.TlsConfig(credentials=tls.Credentials.none(roots=work.roots))


def client_end(work: Work) -> dict[str, Any]:
    """What a client's bridge is made with beside its endpoints."""
    return {
        "credentials": config(work, server=False),
        "server_hostname": None if work.key else work.server_name,
    }


async def idle(work: Work) -> None:
    """Opens bridges to datagram sockets, keeps them, and reports what each one holds."""
    client = client_end(work)

    async def open_one() -> object:
        near, far = datagram_pair()
        bridge = tls.create_bridge(
            socket=socket.create_connection(("127.0.0.1", work.port)), sink=near, framing="ipv6", **client
        )
        await bridge.handshake()
        bridge.start()
        return bridge, far

    await print_idle(work, open_one)


async def cycles(work: Work) -> None:
    """Sets up and tears down pairs: one end stops, the other hears of it and ends by itself.

    The sinks are descriptors that the caller has, as a TUN is: they are made before the clock runs, and
    closed after it. The connection is made while it runs, as it is for asyncio's TLS, which has no sinks.
    """
    server, client = config(work, server=True), client_end(work)
    allow_many_fds()
    descriptors = [end.detach() for _ in range(2 * (work.count + WARM_CYCLES)) for end in datagram_pair()]
    sinks = descriptors[::2]

    async def one() -> None:
        near, far = socket.socketpair()
        near_end = tls.create_bridge(
            socket=near, sink=sinks.pop(), credentials=server, server_side=True, framing="ipv6"
        )
        near_end.start()  # a server's end shakes hands by itself; who begins wants to know
        far_end = tls.create_bridge(socket=far, sink=sinks.pop(), framing="ipv6", **client)
        await far_end.handshake()
        far_end.start()
        await far_end.stop(drain=work.drain)
        await near_end.wait_closed()

    await print_cycles(work, one)
    for descriptor in descriptors:
        os.close(descriptor)


def datagram_pair() -> tuple[socket.socket, socket.socket]:
    """A bridge's sink and its far end."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)


def main() -> None:
    """Dispatches."""
    work = parse_work(__doc__)
    asyncio.run(idle(work) if work.mode == "idle" else cycles(work))


if __name__ == "__main__":
    main()
