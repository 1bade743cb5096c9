"""An asyncio transport without a descriptor, as libraries make them: payload passes Python."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

HIGH_WATER = 64 * 1024


class InMemory(asyncio.Transport):
    """What it is given comes out at a socket, and the other way round.

    It keeps asyncio's contract: while it is paused nothing is delivered, and beyond its high-water mark
    the protocol is asked to pause.
    """

    def __init__(self, outer: socket.socket, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self._outer, self._protocol = outer, protocol
        self._waiting = bytearray()
        #: Writes after it was closed, which nobody will ever read.
        self.late_writes = 0
        self._eof_waits = self._closing = self._asked_to_pause = False
        outer.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self.resume_reading()

    def _readable(self) -> None:
        try:
            data = self._outer.recv(65_536)
        except ConnectionError as error:
            self._lost(error)
            return
        assert isinstance(self._protocol, asyncio.Protocol)
        if data:
            self._protocol.data_received(data)
        else:
            self.pause_reading()
            if not self._protocol.eof_received():
                self.close()

    def _writable(self) -> None:
        if self._waiting:
            try:
                del self._waiting[: self._outer.send(self._waiting)]
            except BlockingIOError:
                pass
            except ConnectionError as error:
                self._lost(error)
                return
        if self._asked_to_pause and len(self._waiting) < HIGH_WATER // 4:
            self._asked_to_pause = False
            self._protocol.resume_writing()
        if not self._waiting:
            self._loop.remove_writer(self._outer)
            if self._closing:
                self._lost(None)
            elif self._eof_waits:
                self._outer.shutdown(socket.SHUT_WR)

    def _lost(self, error: Exception | None) -> None:
        if self._outer.fileno() >= 0:
            self._closing = True
            self._loop.remove_reader(self._outer)
            self._loop.remove_writer(self._outer)
            self._outer.close()
            self._loop.call_soon(self._protocol.connection_lost, error)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def pause_reading(self) -> None:
        if not self._closing:
            self._loop.remove_reader(self._outer)

    def resume_reading(self) -> None:
        if not self._closing:
            self._loop.add_reader(self._outer, self._readable)

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._closing:
            self.late_writes += 1
            return
        self._waiting += data
        self._loop.add_writer(self._outer, self._writable)
        if len(self._waiting) > HIGH_WATER and not self._asked_to_pause:
            self._asked_to_pause = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return len(self._waiting)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._eof_waits = True
        self._loop.add_writer(self._outer, self._writable)

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.remove_reader(self._outer)
            self._loop.add_writer(self._outer, self._writable)

    def abort(self) -> None:
        self._waiting.clear()
        self._lost(None)
