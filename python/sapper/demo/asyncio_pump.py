"""The same job as well as asyncio does it: Protocols, not streams, and no needless copy.

It is there to be compared with, and honest work: back-pressure in both directions, one record for
each packet, many datagrams for each wake-up.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from typing import Any, Protocol

__all__ = ["AsyncioPump", "start"]

#: Datagrams that one wake-up moves at most, so that the other direction has its turn.
BURST = 64
#: Bytes that wait for a full sink at most before the network is not read any more.
HIGH_WATER = 256 * 1024


class AsyncioPump(Protocol):
    """A running pump."""

    tls: str

    def close(self) -> None:
        """Ends it."""


async def start(tcp: socket.socket, sink: socket.socket | int, authority: str, framing: str) -> AsyncioPump:
    """Connects TLS over ``tcp`` and pumps between it and ``sink`` (a socket, or a TUN's descriptor)."""
    loop = asyncio.get_running_loop()
    context = ssl.create_default_context(cadata=authority)
    tcp.setblocking(False)
    network: _Packets | _Bytes = _Bytes() if framing == "raw" else _Packets(sink)
    await loop.create_connection(lambda: network, sock=tcp, ssl=context, server_hostname="localhost")
    if isinstance(network, _Bytes):
        assert isinstance(sink, socket.socket)  # noqa: S101 - a stream's sink is a socket
        sink.setblocking(False)
        await loop.create_connection(lambda: network.other, sock=sink)
    else:
        network.start()
    return network


def _agreed(transport: Any) -> str:
    name, version, _ = transport.get_extra_info("cipher")
    return f"{version}, {name}"


class _Bytes(asyncio.Protocol):
    """One side of a stream pump."""

    def __init__(self, other: _Bytes | None = None) -> None:
        self.transport: Any = None
        self.tls = ""
        self.other: _Bytes = other if other is not None else _Bytes(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        if transport.get_extra_info("ssl_object") is not None:
            self.tls = _agreed(transport)

    def data_received(self, data: bytes) -> None:
        if self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other.transport is not None:
            self.other.transport.close()

    def close(self) -> None:
        for one in (self, self.other):
            if one.transport is not None:
                one.transport.abort()


class _Packets(asyncio.Protocol):
    """The network's side of a packet pump; the sink is a descriptor that keeps packets."""

    def __init__(self, sink: socket.socket | int) -> None:
        self._sink = sink  # kept open
        self._fd = sink if isinstance(sink, int) else sink.fileno()
        os.set_blocking(self._fd, False)
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._buffer = bytearray()
        self._waiting = False
        self._paused = False
        self.tls = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.tls = _agreed(transport)

    def start(self) -> None:
        self._loop.add_reader(self._fd, self._from_sink)

    def _from_sink(self) -> None:
        for _ in range(BURST):
            try:
                packet = os.read(self._fd, 65_536)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.close()
                return
            self._transport.write(packet)
            if self._paused:
                return

    def pause_writing(self) -> None:
        self._paused = True
        self._loop.remove_reader(self._fd)

    def resume_writing(self) -> None:
        self._paused = False
        self._loop.add_reader(self._fd, self._from_sink)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._waiting:
            self._to_sink()

    def _to_sink(self) -> None:
        buffer, position, write = self._buffer, 0, os.write
        with memoryview(buffer) as view:
            while len(buffer) - position >= 20:
                if view[position] >> 4 == 6:
                    length = 40 + int.from_bytes(view[position + 4 : position + 6], "big")
                else:
                    length = int.from_bytes(view[position + 2 : position + 4], "big")
                if len(buffer) - position < length:
                    break
                try:
                    write(self._fd, view[position : position + length])
                except (BlockingIOError, InterruptedError):
                    self._wait()
                    break
                except OSError:
                    self.close()
                    return
                position += length
        del buffer[:position]
        if self._waiting and len(buffer) > HIGH_WATER:
            self._transport.pause_reading()

    def _wait(self) -> None:
        if not self._waiting:
            self._waiting = True
            self._loop.add_writer(self._fd, self._writable)

    def _writable(self) -> None:
        self._waiting = False
        self._loop.remove_writer(self._fd)
        self._to_sink()
        if not self._waiting and self._transport is not None:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.close()

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        if self._transport is not None:
            self._transport.abort()
