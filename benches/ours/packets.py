"""Ours: a packet pump between a TLS connection and a datagram socket or a TUN, as `sapper.tls` makes one."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import sys

from sapper import tls


def parse_arguments() -> argparse.Namespace:
    """The arguments that every packet pump of the benches takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tls-fd", type=int, required=True)
    parser.add_argument("--packet-fd", type=int)
    parser.add_argument("--tun")
    parser.add_argument("--key", required=True)
    parser.add_argument("--direction", default="both")
    return parser.parse_args()


async def main() -> None:
    """Runs until the other end closes."""
    given = parse_arguments()
    bridge = tls.create_bridge(
        socket=socket.socket(fileno=given.tls_fd),
        sink=f"tun:{given.tun}" if given.tun else given.packet_fd,
        credentials=tls.Credentials.psk(identity="bench", key=bytes.fromhex(given.key)),
        framing="ipv6",
    )
    await bridge.handshake()
    bridge.start()
    try:
        await bridge.wait_closed()
    finally:
        if "SAPPER_BENCH_STATS" in os.environ:
            print(bridge.stats(), file=sys.stderr)


with contextlib.suppress(KeyboardInterrupt):
    asyncio.run(main())
