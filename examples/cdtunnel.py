"""A device tunnel as its author would write it, with a simulated device at the other end.

    python cdtunnel.py                  # packets through a socket pair; needs no rights
    python cdtunnel.py --tun device0    # a real interface: then `ping` the address that it prints; needs root

``open_tunnel`` is all that an author writes: TLS 1.2 with a pre-shared key and an empty identity, the
CDTunnel greeting, and from then on bare IPv6 packets, each in a record of its own. No packet enters Python.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import socket
import subprocess
import sys
from ipaddress import IPv6Address

import sapper.tls as tls


async def open_tunnel(
    device: str, key: bytes, sink: str | socket.socket
) -> tuple[tls.Bridge, tls.CdTunnelParameters]:
    """Connects to a device and greets it; the tunnel runs when this returns."""
    bridge = tls.create_bridge(
        socket=device,
        sink=sink,
        # Such devices know TLS 1.2 alone, and an empty identity.
        credentials=tls.TlsConfig(
            credentials=tls.Credentials.psk(identity="", key=key), max_version="TLSv1.2"
        ),
        framing="ipv6",
        max_packet=8192,  # larger ones are lost on USB, whatever MTU was granted
    )
    await bridge.handshake()
    parameters = await bridge.cdtunnel_handshake(mtu=1420)
    bridge.start()
    return bridge, parameters


async def simulated_device(listener: socket.socket, key: bytes) -> None:
    """The other end: grants addresses, then answers pings and UDP packets."""
    inside, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    bridge = tls.create_bridge(
        socket=listener,  # its one connection is accepted
        sink=outside,
        credentials=tls.TlsConfig(
            credentials=tls.Credentials.psk(identity="", key=key), max_version="TLSv1.2"
        ),
        server_side=True,
        framing="ipv6",
    )
    inside.setblocking(False)
    with inside:
        async with bridge:
            await bridge.handshake()
            await bridge.cdtunnel_accept(
                tls.CdTunnelParameters(
                    client_address=IPv6Address("fd58:8c92:8961::2"),
                    prefix_len=64,
                    mtu=1280,
                    server_address=IPv6Address("fd58:8c92:8961::1"),
                    rsd_port=56307,
                )
            )
            bridge.start()
            loop = asyncio.get_running_loop()
            while True:
                answer = answered(await loop.sock_recv(inside, 65536))
                if answer:
                    await loop.sock_sendall(inside, answer)


def answered(packet: bytes) -> bytes | None:
    """What the device's own network stack would say: an echo of pings and of UDP."""
    head, source, destination, body = packet[:8], packet[8:24], packet[24:40], packet[40:]
    if head[6] == socket.IPPROTO_UDP:
        # Both ends swapped: the checksum stays as it was.
        return head + destination + source + body[2:4] + body[:2] + body[4:]
    if head[6] == socket.IPPROTO_ICMPV6 and body[0] == 128:  # echo request; 129 is the reply
        total = (~int.from_bytes(body[2:4], "big") & 0xFFFF) + 0x0100
        checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
        return head + destination + source + b"\x81\0" + checksum.to_bytes(2, "big") + body[4:]
    return None


def udp(source: object, destination: object, data: bytes) -> bytes:
    """An IPv6 packet with a UDP datagram in it, as the kernel would hand it to a TUN."""
    addresses = b"".join(socket.inet_pton(socket.AF_INET6, str(one)) for one in (source, destination))
    length = (8 + len(data)).to_bytes(2, "big")
    datagram = (4000).to_bytes(2, "big") + (7).to_bytes(2, "big") + length
    summed = (
        addresses + b"\0\0" + length + b"\0\0\0\x11" + datagram + b"\0\0" + data + b"\0" * (len(data) % 2)
    )
    total = sum(int.from_bytes(summed[n : n + 2], "big") for n in range(0, len(summed), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    checksum = (~total & 0xFFFF or 0xFFFF).to_bytes(2, "big")
    return b"\x60\0\0\0" + length + b"\x11\x40" + addresses + datagram + checksum + data


async def main(tun: str | None) -> None:
    """Runs both ends in one process and sends something through."""
    key = secrets.token_bytes(32)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    device = asyncio.create_task(simulated_device(listener, key))

    ours, sink = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    bridge, granted = await open_tunnel(f"tcp://127.0.0.1:{port}", key, f"tun:{tun}" if tun else sink)
    print(f"granted: {granted.client_address}, MTU {granted.mtu}, services at {granted.rsd_port}")
    async with bridge:
        ours.setblocking(False)
        if tun:
            for words in (
                f"link set {tun} mtu {granted.mtu} up",
                f"address add {granted.client_address}/64 dev {tun} nodad",
            ):
                subprocess.run(["ip", *words.split()], check=True)
            print(f"the interface is up: ping {granted.server_address} (Ctrl-C ends)", flush=True)
            await bridge.wait_closed()
        loop = asyncio.get_running_loop()
        answers = 0
        for n in range(100):
            await loop.sock_sendall(ours, udp(granted.client_address, granted.server_address, b"%d" % n * 50))
            answer = await loop.sock_recv(ours, 65536)
            answers += answer[48:] == b"%d" % n * 50
        print(
            f"the device answered {answers} of 100 packets; {bridge.stats().encapsulate.packets} records sent"
        )
    device.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tun", metavar="NAME", help="make this TUN interface rather than a socket pair")
    try:
        asyncio.run(main(parser.parse_args().tun))
    except KeyboardInterrupt:
        sys.exit(130)
