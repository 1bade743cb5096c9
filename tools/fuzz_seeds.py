"""Writes the inputs that the fuzz targets begin with into fuzz/corpus: one or more good ones of each form."""

from __future__ import annotations

import struct
from pathlib import Path

import fuzz_material as material

CORPUS = Path(__file__).parent.parent / "fuzz" / "corpus"

TCP, UDP = 6, 17


def checksum(data: bytes) -> int:
    """The sum of RFC 1071, not complemented."""
    words: tuple[int, ...] = struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2))
    total = sum(words)
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def packet(version: int, protocol: int, payload: int, *, partial: bool = False) -> bytes:
    """A TCP or UDP packet; with `partial`, the checksum field has the pseudo-header's sum only."""
    length = (20 if protocol == TCP else 8) + payload
    source, destination = (
        (b"\x0a\0\0\1", b"\x0a\0\0\2") if version == 4 else (bytes(15) + b"\1", bytes(15) + b"\2")
    )
    if protocol == TCP:
        transport = struct.pack("!HHIIBBHHH", 443, 50000, 1000, 7, 0x50, 0x18, 501, 0, 0)
    else:
        transport = struct.pack("!HHHH", 443, 53, length, 0)
    transport += bytes(index & 0xFF for index in range(payload))
    pseudo = checksum(source + destination + struct.pack("!IHH", length, 0, protocol))
    total = pseudo if partial else (checksum(transport) + pseudo) % 0xFFFF ^ 0xFFFF
    at = 16 if protocol == TCP else 6
    transport = transport[:at] + struct.pack("!H", total) + transport[at + 2 :]
    if version == 6:
        return struct.pack("!IHBB", 0x60000000, length, protocol, 64) + source + destination + transport
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 1, 0x4000, 64, protocol, 0) + source + destination
    return header[:10] + struct.pack("!H", checksum(header) ^ 0xFFFF) + header[12:] + transport


def virtio(version: int, protocol: int, size: int) -> bytes:
    """The virtio-net header of a large packet."""
    kind = 5 if protocol == UDP else 1 if version == 4 else 4
    return struct.pack("<BBHHHH", 1, kind, 0, size, 20 if version == 4 else 40, 16 if protocol == TCP else 6)


def message(json: str) -> bytes:
    """A CDTunnel message."""
    return b"CDTunnel" + struct.pack("!H", len(json)) + json.encode()


def vector(size: int, data: bytes) -> bytes:
    """Data behind its length, as TLS writes it."""
    return len(data).to_bytes(size) + data


def client_hello() -> bytes:
    """The message without records: a name, two protocols, two versions."""
    extensions = b"".join(
        struct.pack("!H", kind) + vector(2, data)
        for kind, data in [
            (0, vector(2, b"\0" + vector(2, b"www.example.org"))),
            (16, vector(2, vector(1, b"h2") + vector(1, b"http/1.1"))),
            (43, vector(1, b"\3\4\3\3")),
        ]
    )
    suites = vector(1, b"") + vector(2, b"\x13\x01") + vector(1, b"\0")
    return b"\1" + vector(3, b"\3\3" + bytes(32) + suites + vector(2, extensions))


def records(message: bytes, size: int) -> bytes:
    """TLS handshake records of that size."""
    return b"".join(b"\x16\3\1" + vector(2, message[at : at + size]) for at in range(0, len(message), size))


def proxy_headers() -> list[bytes]:
    """PROXY headers: a line, and a binary one with what is known of TLS."""
    tls = b"\7\0\0\0\0" + b"\x21" + vector(2, b"TLSv1.3") + b"\x22" + vector(2, b"ann")
    tlvs = b"\1" + vector(2, b"h2") + b"\2" + vector(2, b"a.example") + b"\x20" + vector(2, tls)
    ends = bytes([192, 0, 2, 7, 198, 51, 100, 9]) + struct.pack("!HH", 50000, 443)
    return [
        b"PROXY TCP6 2001:db8::7 ::1 50000 443\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + vector(2, ends + tlvs),
    ]


def w3p(json: str) -> bytes:
    """A handshake message of the tunnel."""
    return b"W3PTUNL" + vector(4, json.encode())


def frame(stream: int, kind: int, payload: bytes = b"") -> bytes:
    """A frame of the tunnel."""
    return vector(4, struct.pack("!IB", stream, kind) + payload)


def tunnel() -> tuple[list[bytes], list[bytes]]:
    """Payloads and frames one by one, then whole streams for each sort of machine."""
    hello = struct.pack("!BBHIIII", 1, 1, 0, 15, 1000, 10, 4096) + bytes(16 + 32 + 8)
    ends = bytes([192, 0, 2, 7, 198, 51, 100, 9]) + struct.pack("!HH", 50000, 443)
    opening = b"\0\2\4" + ends + b"\1" + vector(1, b"a.example") + b"\2" + vector(1, b"h2")
    plain = frame(8, 1, b"GET /") + frame(8, 2) + frame(10, 1) + frame(10, 3)
    ours = b"".join(
        [
            frame(4, 0x20, opening), frame(4, 1, b"GET /"), frame(4, 0x21, b"\0\0\1\0"),
            frame(0, 0x11, bytes(8)), frame(0, 0x13, bytes(8)), frame(4, 0x22),
            frame(6, 0x20, b"\0\0\0"), frame(6, 0x23, b"\0\0\0\2no"),
            frame(0, 0x24, b"\0\0\0\4\0\0\0\x08bye"),
        ]
    )  # fmt: skip
    odd = ours.replace(struct.pack("!I", 4), struct.pack("!I", 5)).replace(b"\0\0\0\6", b"\0\0\0\7")
    greeting = frame(0, 0x10, hello)
    streams = [
        b"\2" + b"\x40" + plain,
        b"\3" + b"\x40" + plain,
        b"\0" + b"\x40" + plain + greeting + ours,
        b"\1" + b"\x40" + greeting + odd,
    ]
    return [hello, opening, frame(7, 1, b"x"), greeting], streams


def seeds() -> dict[str, list[bytes]]:
    """Inputs by target."""
    forms = [(version, protocol) for version in (4, 6) for protocol in (TCP, UDP)]
    ordinary = [packet(version, protocol, 40) for version, protocol in forms]
    # Hop-by-hop options, then a fragment header, in front of UDP.
    udp = packet(6, UDP, 20)
    extensions = bytes([44, 0, 1, 4, 0, 0, 0, 0]) + bytes([UDP, 0, 0, 1, 0, 0, 0, 9])
    extended = udp[:4] + struct.pack("!HB", len(udp) - 40 + 16, 0) + udp[7:40] + extensions + udp[40:]
    large = [
        virtio(version, protocol, 100) + packet(version, protocol, 950, partial=True)
        for version, protocol in forms
    ]
    plain = bytes(10)
    stream = {
        0: b"".join(ordinary),
        1: ordinary[0] + ordinary[1],
        2: ordinary[2] + ordinary[3],
        3: b"".join(struct.pack("!H", len(data)) + data for data in ordinary),
        4: b"".join(struct.pack("!I", len(data)) + data for data in ordinary),
        5: b"".join(struct.pack("!I", len(data)) + data for data in [plain + ordinary[0], *large]),
    }
    reply = (
        '{"clientParameters":{"address":"fd58:8c92:8961::2","mtu":1280,"netmask":"ffff:ffff:ffff:ffff::"},'
        '"serverAddress":"fd58:8c92:8961::1","serverRSDPort":56307,"type":"serverHandshakeResponse"}'
    )
    filters = [
        "tcp port 443 and not src host 10.0.0.1",
        "ip6 dst net fe80::/10 || (udp and greater 100)",
        "icmp or icmp6 and less 99",
    ]
    # Data, a key update, data again, a read with little room; an alert; a changed record; a ticket.
    steps = bytes.fromhex("0002616205000002636407081111 0603000000 00016503016600")
    ticket = bytes([2, 12, 22, 4, 0, 0, 7]) + bytes(7) + bytes([0, 1, 0x61])
    # A client's hello of TLS 1.3, cut short, and what other servers say.
    hello = bytes.fromhex("160301007a010000760303") + bytes(32) + bytes.fromhex("00000a1301130200ff")
    words = [hello, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28"]
    pem = material.pem("CERTIFICATE", material.CERTIFICATE)
    crl = material.pem("X509 CRL", material.CRL)
    return {
        "tls_records": [bytes([choice]) + script for choice in range(12) for script in (steps, ticket)],
        "tls_handshake": [
            bytes([choice]) + said for choice in range(16) for said in (*words, bytes([60, 1]))
        ],
        "certificates": [pem, pem * 2, material.CERTIFICATE],
        "peer_certificates": [
            bytes([role]) + vector(2, material.CERTIFICATE) + above
            for role in (0, 1)
            for above in (b"", material.CERTIFICATE)
        ],
        "private_key": [
            b"\0" + material.pem("PRIVATE KEY", material.KEY),
            b"\1" + material.pem("ENCRYPTED PRIVATE KEY", material.ENCRYPTED_KEY),
            *(bytes([1]) + der for der in (material.KEY, material.ENCRYPTED_KEY, material.EC_KEY)),
        ],
        "pkcs12": [bytes([password]) + material.PKCS12 for password in (0, 1)],
        "crls": [b"\0" + material.CRL, b"\x80" + crl * 2, b"\x80" + material.CRL * 2],
        "ocsp_response": [material.OCSP],
        "tunnel_words": [b'{"instance":"a","lease":"b"}', b'{"port":40001}', b"W3PTUNL", b"GET / HTTP"],
        "listen_fds": [b"42\x002\x00web:admin", b"42\x001\x00", b"43\x001"],
        "pcapng": [bytes([0, 0, 9, 1, 1, 0, 40, 2, 6, 0, 99, 3, 7, 5, 0, 1])],
        "ip": [*ordinary, extended],
        "virtio": [*large, plain + ordinary[0]],
        "segments": [bytes([flow, 100, 0] * 6 + [flow, 40, 0]) for flow in range(4)],
        "deframer": [bytes([framing, 37]) + data for framing, data in stream.items()],
        "superframe_hello": [b"SAPPERSF" + struct.pack("!BBHI", 1, 1, flags, 65535) for flags in (0, 15)],
        "cdtunnel": [message('{"type":"clientHandshakeRequest","mtu":16000}'), message(reply)],
        "proxy_protocol": proxy_headers(),
        "client_hello": [bytes([7]) + records(client_hello(), size) for size in (10, 16384)],
        "w3p": [
            w3p('{"id":"secret"}'),
            w3p('{"port":34567,"sapper":{"versions":[1,1],"capabilities":31}}'),
            w3p('{"error":{"code":"rejected","message":"no","retry":1.5}}'),
            b'{"instance":"i","lease":"l","services":[{"name":""},{"name":"b","ports":[1,9],"host":"::1"}]}',
            b'{"port":1,"ports":[1,2]}',
            b'{"error":{"code":"no_port","message":"no","retry":true,"service":1}}',
        ],
        "tunnel_frame": tunnel()[0],
        "tunnel_mux": tunnel()[1],
        "ip_list": [b"10.0.0.0/8,192.168.*,10.0.0.5-9,2001:db8::/32,::ffff:1.2.3.4,*"],
        "lease": [
            b'{"leases":[{"port":%d,"seen":11,"service":0,"token":"%s"}],"version":1}' % (port, b"01" * 32)
            for port in (40_001, 22)
        ],
        "upgrade": [
            bytes([choice, len(said)]) + said
            for choice in range(10)
            for said in (
                b"EHLO x\r\nSTARTTLS\r\n",
                b"a STARTTLS\r\n",
                b"220 x\r\n250 STARTTLS\r\n",
                b"* OK x\r\nS1 OK\r\n",
                bytes.fromhex("0000000804d2162f"),
                b"\x2d\0\0\0\x0a8.4.0\0" + bytes(13) + b"\xff\xff" + bytes(23),
            )
        ],
        "filter": [text.encode() + b"\0" + data for text in filters for data in ordinary],
    }


def main() -> None:
    """Writes them beside whatever earlier runs have found."""
    for target, inputs in seeds().items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for index, data in enumerate(inputs):
            (folder / f"seed-{index}").write_bytes(data)


if __name__ == "__main__":
    main()
