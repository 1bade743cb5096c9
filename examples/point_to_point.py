"""Joins two machines: a TUN interface on each, TLS with a pre-shared key over TCP port 443 between them.

    head -c 32 /dev/urandom > key       # the same file on both
    python point_to_point.py listen 192.0.2.1 10.9.0.1/30 key
    python point_to_point.py connect 192.0.2.1 10.9.0.2/30 key

Needs root on Linux. Large packets travel whole between the two ends ("superframe").
"""

import asyncio
import sys
from pathlib import Path

import sapper.tls as tls


async def main(role: str, host: str, address: str, key: str) -> None:
    listens = role == "listen"
    bridge = tls.create_bridge(
        socket=f"tcp-listen://{host}:443" if listens else f"tcp://{host}:443",
        sink=f"tun:p2p0?mtu=1420&address={address}",
        credentials=tls.Credentials.psk(identity="point-to-point", key=Path(key).read_bytes()),
        server_side=listens,
        framing="superframe",
    )
    async with bridge:
        print("waiting for the other machine", flush=True)
        info = await bridge.handshake()
        bridge.start()
        print(f"joined with {info.version}, {info.cipher_suite}", flush=True)
        await bridge.wait_closed()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:5]))
