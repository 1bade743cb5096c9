"""Peer: a blocking pump, `SSLSocket.recv_into` and `send`, without any event loop.

An SSL object is not for two threads, so both directions at once share one thread and a poll.
"""

from __future__ import annotations

import os
import select
import ssl

from benches.peers.common import IPV6_HEADER, Job, parse_job

BUFFER = 65536
BURST = 64


class Pump:
    """Both directions between an SSLSocket and the packet side."""

    def __init__(self, job: Job) -> None:
        self._tls = job.context.wrap_socket(job.tls, server_hostname="bench")
        self._packets = job.packets
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)
        self._held = 0

    def receive(self) -> bool:
        """One record to packets; False at the end of the stream."""
        count = self._tls.recv_into(self._view[self._held :])
        if not count:
            return False
        buffer, at, end = self._buffer, 0, self._held + count
        while end - at >= IPV6_HEADER:
            after = at + IPV6_HEADER + (buffer[at + 4] << 8 | buffer[at + 5])
            if after > end:
                break
            self._send_packet(self._view[at:after])
            at = after
        self._held = end - at
        if self._held:
            self._buffer[: self._held] = self._buffer[at:end]
        return True

    def _send_packet(self, packet: memoryview) -> None:
        while True:
            try:
                self._packets.send(packet)
                return
            except BlockingIOError:
                select.select((), (self._packets.fd,), ())

    def send(self) -> None:
        """One packet to one record."""
        self._tls.sendall(self._packets.receive())

    def both(self) -> None:
        """Serves whichever side is ready, a burst at a time."""
        self._tls.setblocking(False)
        os.set_blocking(self._packets.fd, False)
        poll = select.poll()
        poll.register(self._tls, select.POLLIN)
        poll.register(self._packets.fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                try:
                    for _ in range(BURST):
                        if fd == self._packets.fd:
                            self._send_all(self._packets.receive())
                        elif not self.receive():
                            return
                except (BlockingIOError, ssl.SSLWantReadError):
                    pass

    def _send_all(self, packet: bytes) -> None:
        while True:
            try:
                self._tls.send(packet)
                return
            except ssl.SSLWantWriteError:
                select.select((), (self._tls,), ())


def main() -> None:
    """Runs until the other end closes."""
    job = parse_job(__doc__)
    pump = Pump(job)
    try:
        if job.receive and job.send:
            pump.both()
        elif job.receive:
            while pump.receive():
                pass
        else:
            while True:
                pump.send()
    except ConnectionError:
        pass


main()
