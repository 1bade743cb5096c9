"""Ours: one end of a TUN - TLS 1.2 - TUN tunnel over TCP."""

from __future__ import annotations

import argparse
import asyncio

from sapper import tls


async def main() -> None:
    """Runs until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tun", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--framing", required=True)
    parser.add_argument("--port", type=int, required=True)
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--listen", metavar="ADDRESS")
    end.add_argument("--connect", metavar="ADDRESS")
    given = parser.parse_args()
    listens = given.listen is not None
    credentials = tls.Credentials.psk(identity="bench", key=bytes.fromhex(given.key))
    bridge = tls.create_bridge(
        socket=f"tcp-listen://{given.listen}:{given.port}"
        if listens
        else f"tcp://{given.connect}:{given.port}",
        sink=f"tun:{given.tun}",
        credentials=tls.TlsConfig(credentials=credentials, max_version="TLSv1.2"),
        server_side=listens,
        framing=given.framing,
    )
    await bridge.handshake()
    bridge.start()
    print("ready", flush=True)
    await bridge.wait_closed()


asyncio.run(main())
