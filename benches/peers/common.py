"""What the Python peers share: arguments, the TLS context, and the packet side.

Standard library only: the interpreter that runs a peer need not be the one that Sapper is installed in.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import os
import signal
import socket
import ssl
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass

IPV6_HEADER = 40
PACKET_MAX = 2048
"""What a pump of this kind reserves for one packet: more than any MTU that the benches use."""

_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000


@dataclass(frozen=True)
class PacketSide:
    """The datagram socket or TUN at the packet side, as two functions that cost no Python frame each."""

    fd: int
    send: Callable[[bytes | memoryview], int]
    receive: Callable[[], bytes]


@dataclass(frozen=True)
class Job:
    """What the bench asks a pump to do."""

    tls: socket.socket
    packets: PacketSide
    context: ssl.SSLContext
    receive: bool
    send: bool


def parse_job(doc: str | None) -> Job:
    """Reads the arguments that every packet pump takes."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--tls-fd", type=int, required=True, help="connected TCP socket, inherited")
    parser.add_argument("--packet-fd", type=int, help="datagram socket, inherited")
    parser.add_argument("--tun", help="name of a TUN in this namespace, instead of --packet-fd")
    parser.add_argument("--key", default="", help="pre-shared key in hex; without it certificates")
    parser.add_argument("--direction", choices=("receive", "send", "both"), default="both")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    return Job(
        tls=socket.socket(fileno=given.tls_fd),
        packets=open_tun(given.tun) if given.tun else adopt_datagrams(given.packet_fd),
        context=client_context(bytes.fromhex(given.key)),
        receive=given.direction != "send",
        send=given.direction != "receive",
    )


def client_context(key: bytes) -> ssl.SSLContext:
    """TLS 1.2 with AES-256-GCM: by pre-shared key, or with an unverified certificate where there is none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    if not key:
        context.set_ciphers("ECDHE-ECDSA-AES256-GCM-SHA384")
    elif sys.version_info >= (3, 13):
        context.set_ciphers("PSK-AES256-GCM-SHA384")
        context.set_psk_client_callback(lambda hint: ("bench", key))
    else:
        raise SystemExit("this interpreter's ssl module has no pre-shared keys: run the peer without --key")
    return context


def adopt_datagrams(fd: int) -> PacketSide:
    """The inherited datagram socket."""
    packets = socket.socket(fileno=fd)
    return PacketSide(fd, packets.send, functools.partial(packets.recv, PACKET_MAX))


def open_tun(name: str) -> PacketSide:
    """An existing TUN without any header: one system call and one packet each way."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return PacketSide(fd, functools.partial(os.write, fd), functools.partial(os.read, fd, PACKET_MAX))
