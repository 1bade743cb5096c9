"""Reads a capture of TLS as a stranger would: blocks, TCP segments, secrets, and records of TLS 1.3."""

from __future__ import annotations

import struct
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

PACKET, SECRETS = 6, 10
SYN, ACK, FIN = 0x02, 0x10, 0x01

End = tuple[bytes, int]


@dataclass
class Captured:
    """What a file holds."""

    #: What each end sent, by (from, to).
    streams: dict[tuple[End, End], bytes] = field(default_factory=lambda: defaultdict(bytes))
    #: Who said SYN without ACK.
    clients: list[tuple[End, End]] = field(default_factory=list)
    secrets: dict[str, bytes] = field(default_factory=dict)
    ended: int = 0


def blocks(data: bytes) -> list[tuple[int, bytes]]:
    """Types and bodies; a block that is not whole ends the test."""
    found = []
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from("<II", data, at)
        assert size % 4 == 0
        assert struct.unpack_from("<I", data, at + size - 4) == (size,)
        found.append((kind, data[at + 8 : at + size - 4]))
        at += size
    assert at == len(data)
    return found


def read(path: Path) -> Captured:
    """Reads a whole file. Segments must follow each other without a gap."""
    result = Captured()
    next_number: dict[tuple[End, End], int] = {}
    for kind, body in blocks(path.read_bytes()):
        if kind == SECRETS:
            assert body[:4] == b"KSLT"
            (size,) = struct.unpack_from("<I", body, 4)
            for line in body[8 : 8 + size].decode().splitlines():
                label, _, secret = line.split(" ")
                result.secrets[label] = bytes.fromhex(secret)
        elif kind == PACKET:
            (size,) = struct.unpack_from("<I", body, 12)
            source, target, number, flags, payload = _segment(body[20 : 20 + size])
            flow = (source, target)
            if flags & SYN:
                next_number[flow] = number + 1
                if not flags & ACK:
                    result.clients.append(flow)
                continue
            assert number == next_number[flow], "a segment is missing"
            next_number[flow] = (number + len(payload)) & 0xFFFFFFFF
            result.streams[flow] += payload
            result.ended += bool(flags & FIN)
    return result


def _segment(packet: bytes) -> tuple[End, End, int, int, bytes]:
    if packet[0] >> 4 == 4:
        source, target, tcp = packet[12:16], packet[16:20], packet[20:]
        assert int.from_bytes(packet[2:4], "big") == len(packet)
    else:
        source, target, tcp = packet[8:24], packet[24:40], packet[40:]
        assert int.from_bytes(packet[4:6], "big") == len(packet) - 40
    ports = struct.unpack_from(">HH", tcp)
    (number,) = struct.unpack_from(">I", tcp, 4)
    return (source, ports[0]), (target, ports[1]), number, tcp[13], tcp[20:]


def decrypt13(stream: bytes, secret: bytes, suite: str) -> bytes:
    """Application data of one direction of TLS 1.3, whose keys never change.

    Records that another key sealed (the handshake's) are left out.
    """
    algorithm = hashes.SHA384() if suite.endswith("384") else hashes.SHA256()

    def expand(label: bytes, size: int) -> bytes:
        label = b"tls13 " + label
        info = struct.pack(">HB", size, len(label)) + label + b"\0"
        return HKDFExpand(algorithm, size, info).derive(secret)

    aead: AESGCM | ChaCha20Poly1305
    if "CHACHA" in suite:
        aead = ChaCha20Poly1305(expand(b"key", 32))
    else:
        aead = AESGCM(expand(b"key", 16 if "AES_128" in suite else 32))
    iv = int.from_bytes(expand(b"iv", 12), "big")
    plain, number, at = b"", 0, 0
    while at < len(stream):
        kind, size = stream[at], int.from_bytes(stream[at + 3 : at + 5], "big")
        header, sealed = stream[at : at + 5], stream[at + 5 : at + 5 + size]
        at += 5 + size
        if kind != 23:
            continue
        try:
            inner = aead.decrypt((iv ^ number).to_bytes(12, "big"), sealed, header).rstrip(b"\0")
        except Exception:
            assert number == 0, "a record behind the handshake does not verify"
            continue
        number += 1
        if inner[-1] == 23:
            plain += inner[:-1]
    return plain
