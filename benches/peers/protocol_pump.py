"""Peer: the best pump that asyncio's public API allows, a `data_received` Protocol on the TLS transport.

Whole chunks are parsed in place and each packet is sent from a slice of them; the packet side has reader
call-backs that take what is there, and back-pressure is kept both ways.
"""

from __future__ import annotations

import asyncio
import os

from benches.peers.common import IPV6_HEADER, Job, parse_job

BURST = 64
"""Packets of one reader call-back, so that the other direction has its turn."""


class Pump(asyncio.Protocol):
    """Both directions between the TLS transport and the packet side."""

    def __init__(self, job: Job, closed: asyncio.Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._job = job
        self._closed = closed
        self._rest = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is done."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._job.send:
            self._loop.add_reader(self._job.packets.fd, self._packets_readable)

    def connection_lost(self, exc: Exception | None) -> None:
        """The other end has closed."""
        self._loop.remove_reader(self._job.packets.fd)
        self._loop.remove_writer(self._job.packets.fd)
        if not self._closed.done():
            self._closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Sends each whole packet; a started one waits for the next chunk."""
        if self._rest:
            data = self._rest + data
        send = self._job.packets.send
        view = memoryview(data)
        at, end = 0, len(data)
        try:
            while end - at >= IPV6_HEADER:
                after = at + IPV6_HEADER + (data[at + 4] << 8 | data[at + 5])
                if after > end:
                    break
                send(view[at:after])
                at = after
        except BlockingIOError:
            self._transport.pause_reading()
            self._loop.add_writer(self._job.packets.fd, self._packets_writable)
        self._rest = data[at:]

    def _packets_writable(self) -> None:
        self._loop.remove_writer(self._job.packets.fd)
        self._transport.resume_reading()
        self.data_received(b"")

    def _packets_readable(self) -> None:
        receive, write = self._job.packets.receive, self._transport.write
        if self._transport.is_closing():
            self._loop.remove_reader(self._job.packets.fd)
            return
        try:
            for _ in range(BURST):
                write(receive())
        except BlockingIOError:
            pass

    def pause_writing(self) -> None:
        """The transport's buffer is above its high-water mark."""
        self._loop.remove_reader(self._job.packets.fd)

    def resume_writing(self) -> None:
        """The transport's buffer has drained."""
        self._loop.add_reader(self._job.packets.fd, self._packets_readable)


async def main() -> None:
    """Runs until the other end closes."""
    job = parse_job(__doc__)
    job.tls.setblocking(False)
    os.set_blocking(job.packets.fd, False)
    loop = asyncio.get_running_loop()
    closed: asyncio.Future[None] = loop.create_future()
    await loop.create_connection(
        lambda: Pump(job, closed), sock=job.tls, ssl=job.context, server_hostname="bench"
    )
    await closed


asyncio.run(main())
