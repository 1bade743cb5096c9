"""The far end of a CDTunnel as a device has it, with nothing but CPython's ssl.

It grants an MTU, answers every UDP packet with the same data in the other direction, and counts what real
devices punish: a record with more or less than one packet. It prints one line of JSON at the end.

Run by a test, maybe under another interpreter: cdtunnel_device.py PORT MTU psk KEY | cert CHAIN KEY
"""

import hashlib
import json
import socket
import ssl
import struct
import sys
from typing import Any

MAGIC = b"CDTunnel"


def context_for(kind: str, *values: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if kind == "cert":
        context.load_cert_chain(*values)
        return context
    # Such tunnels know TLS 1.2 alone, an empty identity, and no certificates.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("PSK-AES256-GCM-SHA384:PSK-AES128-GCM-SHA256")
    context.set_psk_server_callback(  # type: ignore[attr-defined] # CPython 3.13 has it
        lambda name: bytes.fromhex(values[0]) if not name else b""
    )
    return context


def receive_exactly(tls: ssl.SSLSocket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = tls.recv(size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


def handshake(tls: ssl.SSLSocket, mtu: int) -> object:
    assert receive_exactly(tls, 8) == MAGIC
    (length,) = struct.unpack("!H", receive_exactly(tls, 2))
    request = json.loads(receive_exactly(tls, length))
    assert request["type"] == "clientHandshakeRequest", request
    answer = {
        "clientParameters": {"address": "fd58:8c92:8961::2", "mtu": mtu, "netmask": "ffff:ffff:ffff:ffff::"},
        "serverAddress": "fd58:8c92:8961::1",
        "serverRSDPort": 56307,
        "type": "serverHandshakeResponse",
    }
    body = json.dumps(answer).encode()
    # A device does not care where records end in its greeting: three here.
    message = MAGIC + struct.pack("!H", len(body)) + body
    for piece in (message[:5], message[5:30], message[30:]):
        tls.sendall(piece)
    return request


def main() -> None:
    port, mtu, *credentials = sys.argv[1:]
    facts: dict[str, Any] = {"packets": 0, "punished": 0, "largest": 0}
    digest = hashlib.sha256()
    with socket.create_server(("127.0.0.1", int(port))) as listener:
        connection, _ = listener.accept()
    connection.settimeout(20)
    with context_for(*credentials).wrap_socket(connection, server_side=True) as tls:
        facts["cipher"] = tls.cipher()
        facts["request"] = handshake(tls, int(mtu))
        # One read gives what one record holds, never more.
        while record := tls.recv(65536):
            if len(record) < 48 or len(record) != 40 + int.from_bytes(record[4:6], "big"):
                facts["punished"] += 1
                continue
            facts["packets"] += 1
            facts["largest"] = max(facts["largest"], len(record))
            digest.update(record)
            source, destination, udp = record[8:24], record[24:40], record[40:]
            # Swapping both ends leaves the checksum as it is.
            tls.sendall(record[:8] + destination + source + udp[2:4] + udp[:2] + udp[4:])
        tls.unwrap()
    print(json.dumps({**facts, "sha256": digest.hexdigest()}), flush=True)


if __name__ == "__main__":
    main()
