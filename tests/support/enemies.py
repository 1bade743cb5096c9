"""A peer that passes the TLS handshake and has its own mind about what comes then."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress

from support.certs import Certificates
from support.hearing import LATEST


class Enemy:
    """CPython's ``ssl`` as server, with the records in our hands."""

    def __init__(self, certs: Certificates, end: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certs.server.cert_path, certs.server.key_path)
        context.num_tickets = 0
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        self._socket = end
        end.settimeout(LATEST)

    def handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._socket.sendall(self._out.read())
                self._in.write(self._socket.recv(65_536))
            else:
                self._socket.sendall(self._out.read())
                return

    def records(self, data: bytes) -> bytes:
        """What TLS makes of it, not sent."""
        self._tls.write(data)
        return self._out.read()

    def complaint(self) -> bytes:
        """Our alert about a record that is none, not sent."""
        self._in.write(b"\x17\x03\x03\x00\x20" + bytes(32))
        with suppress(ssl.SSLError):
            self._tls.read(1)
        return self._out.read()

    def goodbye(self) -> bytes:
        """Our close_notify, not sent."""
        with suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        return self._out.read()
