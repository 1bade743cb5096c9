"""Payload for tests: bytes that nobody else sends, and small IP packets that are right to the checksum."""

from __future__ import annotations

import hashlib
import ipaddress
import random
import socket
import struct
import threading
from collections.abc import Callable


def payload(size: int, seed: int = 1) -> bytes:
    """The same pseudo-random bytes for the same arguments."""
    return random.Random(seed).randbytes(size)


def digest(data: bytes) -> str:
    """What two ends compare."""
    return hashlib.sha256(data).hexdigest()


def receive_exactly(connection: socket.socket, size: int, seconds: float = 30) -> bytes:
    """So many bytes, or the end of the test."""
    connection.settimeout(seconds)
    received = bytearray()
    while len(received) < size:
        chunk = connection.recv(min(1 << 20, size - len(received)))
        assert chunk, f"the stream ended after {len(received)} of {size} bytes"
        received += chunk
    return bytes(received)


def receive_all(connection: socket.socket, seconds: float = 30) -> bytes:
    """Everything up to the end of the stream."""
    connection.settimeout(seconds)
    received = bytearray()
    while chunk := connection.recv(1 << 20):
        received += chunk
    return bytes(received)


class Background:
    """A function on a thread of its own; `join` gives what it gave or raises what it raised."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._error: BaseException | None = None
        self._function = function
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self._error = error

    def join(self, seconds: float = 30) -> None:
        """Waits for its end."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the background thread does not end"
        if self._error is not None:
            raise self._error


def checksum(data: bytes) -> int:
    """The internet checksum."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def udp_packet(
    source: str, destination: str, data: bytes, *, source_port: int = 4000, destination_port: int = 5000
) -> bytes:
    """An IPv4 or IPv6 packet with one UDP datagram in it."""
    src, dst = ipaddress.ip_address(source), ipaddress.ip_address(destination)
    length = 8 + len(data)
    header = struct.pack("!HHHH", source_port, destination_port, length, 0)
    if isinstance(src, ipaddress.IPv6Address):
        pseudo = src.packed + dst.packed + struct.pack("!I3xB", length, socket.IPPROTO_UDP)
    else:
        pseudo = src.packed + dst.packed + struct.pack("!BBH", 0, socket.IPPROTO_UDP, length)
    total = checksum(pseudo + header + data) or 0xFFFF
    datagram = header[:6] + struct.pack("!H", total) + data
    if isinstance(src, ipaddress.IPv6Address):
        fixed = struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_UDP, 64)
        return fixed + src.packed + dst.packed + datagram
    fixed = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, socket.IPPROTO_UDP, 0)
    packed = fixed + src.packed + dst.packed
    return packed[:10] + struct.pack("!H", checksum(packed)) + packed[12:] + datagram
