"""The original's two roles of W3PTUNL, written down once more from its wire, with what it gets wrong.

Independent of the product: nothing of it is imported. The quirks are there because peers that are deployed
have them: an end of a stream throws away what is still to be written; a service is dialled at the first frame
of an unknown id, whatever it says; nothing answers a half-close.
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
from contextlib import suppress
from typing import Any

MAGIC = b"W3PTUNL"
DATA, CLOSE, ERROR = 1, 2, 3
LONGEST = 67_108_864


def message(value: object) -> bytes:
    """A handshake's message."""
    body = json.dumps(value).encode()
    return MAGIC + struct.pack(">I", len(body)) + body


def frame(stream: int, kind: int, payload: bytes = b"") -> bytes:
    """A frame."""
    return struct.pack(">IIB", 5 + len(payload), stream, kind) + payload


async def read_message(reader: asyncio.StreamReader) -> Any:
    """The peer's handshake."""
    if await reader.readexactly(7) != MAGIC:
        raise ValueError("Invalid magic bytes")
    (length,) = struct.unpack(">I", await reader.readexactly(4))
    return json.loads(await reader.readexactly(length))


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    """The next frame, whole, as the original takes it."""
    (length,) = struct.unpack(">I", await reader.readexactly(4))
    if not 5 <= length <= LONGEST:
        raise ValueError(f"length {length}")
    body = await reader.readexactly(length)
    stream, kind = struct.unpack(">IB", body[:5])
    if kind not in (DATA, CLOSE, ERROR):
        raise ValueError("Message is not valid")
    return stream, kind, body[5:]


class _Streams:
    """What both roles do with their sockets."""

    def __init__(self) -> None:
        self.carrier: asyncio.StreamWriter | None = None
        self.sockets: dict[int, asyncio.StreamWriter] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def pump(self, stream: int, reader: asyncio.StreamReader) -> None:
        """A socket's bytes become frames, its end a close."""
        kind = CLOSE
        try:
            while data := await reader.read(65_536):
                assert self.carrier is not None
                self.carrier.write(frame(stream, DATA, data))
                await self.carrier.drain()
        except ConnectionError:
            kind = ERROR
        if self.sockets.pop(stream, None) is not None and self.carrier is not None:
            self.carrier.write(frame(stream, kind))

    def destroy(self, stream: int) -> None:
        """What is still to be written is thrown away."""
        if (socket := self.sockets.pop(stream, None)) is not None:
            socket.transport.abort()

    async def close(self) -> None:
        """Ends everything."""
        if self.carrier is not None:
            self.carrier.transport.abort()
        for stream in list(self.sockets):
            self.destroy(stream)
        for task in list(self.tasks):
            task.cancel()
            with suppress(asyncio.CancelledError, ConnectionError, asyncio.IncompleteReadError):
                await task


class OriginalClient(_Streams):
    """The original's client."""

    def __init__(self, service_port: int) -> None:
        super().__init__()
        self.service_port = service_port
        self.answer: dict[str, Any] = {}
        self.dials = 0
        self.frames: list[tuple[int, int, int]] = []
        self.ended = asyncio.Event()

    async def connect(self, host: str, port: int, credentials: object, tls: Any = None) -> int:
        """Shakes hands; the public port, or ValueError with what the server said."""
        reader, self.carrier = await asyncio.open_connection(host, port, ssl=tls)
        self.carrier.write(message(credentials))
        self.answer = await read_message(reader)
        if not isinstance(self.answer.get("port"), int):
            raise ValueError(f"Message is not valid: {self.answer}")
        self.spawn(self._serve(reader))
        return int(self.answer["port"])

    async def _serve(self, reader: asyncio.StreamReader) -> None:
        waiting: dict[int, list[bytes]] = {}
        try:
            while True:
                stream, kind, payload = await read_frame(reader)
                self.frames.append((stream, kind, len(payload)))
                if stream not in self.sockets and stream not in waiting:
                    waiting[stream] = []
                    self.dials += 1
                    self.spawn(self._dial(stream, waiting))
                if kind != DATA:
                    waiting.pop(stream, None)  # the dial goes on for nothing
                    self.destroy(stream)
                elif stream in waiting:
                    waiting[stream].append(payload)
                else:
                    self.sockets[stream].write(payload)  # no back-pressure
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.ended.set()

    async def _dial(self, stream: int, waiting: dict[int, list[bytes]]) -> None:
        assert self.carrier is not None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.service_port)
        except OSError:
            waiting.pop(stream, None)
            self.carrier.write(frame(stream, ERROR))
            return
        if stream not in waiting:
            writer.transport.abort()
            return
        self.sockets[stream] = writer
        for payload in waiting.pop(stream):
            if payload:
                writer.write(payload)
        await self.pump(stream, reader)
        writer.close()


class OriginalServer(_Streams):
    """The original's server, for one client. It compares the credentials strictly."""

    def __init__(self, credentials: object) -> None:
        super().__init__()
        self.credentials = credentials
        self.seen: list[object] = []
        self.received: list[tuple[int, int, int]] = []
        self.port = self.public_port = 0
        self.created = asyncio.Event()
        self.gone = asyncio.Event()
        self._servers: list[asyncio.Server] = []

    async def start(self, tls: Any = None) -> int:
        """Listens."""
        server = await asyncio.start_server(self._client, "127.0.0.1", 0, ssl=tls)
        self._servers.append(server)
        self.port = server.sockets[0].getsockname()[1]
        return self.port

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            credentials = await read_message(reader)
            self.seen.append(credentials)
            if credentials != self.credentials:
                writer.close()  # not a word
                return
            self.carrier = writer
            public = await asyncio.start_server(self._visitor, "127.0.0.1", 0)
            self._servers.append(public)
            self.public_port = public.sockets[0].getsockname()[1]
            writer.write(message({"port": self.public_port}))
            self.created.set()
            while True:
                stream, kind, payload = await read_frame(reader)
                self.received.append((stream, kind, len(payload)))
                if kind != DATA:
                    self.destroy(stream)
                elif stream in self.sockets:
                    self.sockets[stream].write(payload)
        except (ValueError, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.tasks.discard(task)
            self.gone.set()
            writer.close()

    async def _visitor(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = random.randrange(1, 2**32 - 1)
        self.sockets[stream] = writer
        await self.pump(stream, reader)
        writer.close()

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        await super().close()
