"""Services behind a tunnel, visitors in front of it, and waiting for a condition with a deadline."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Self

from sapper.tunnel import ClientOptions, ServerOptions, TunnelClient, TunnelServer

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
LATEST = 20.0
CREDENTIALS = {"id": "allowed-client"}


async def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Waits until ``condition`` holds, at most :data:`LATEST` seconds."""
    loop = asyncio.get_running_loop()
    latest = loop.time() + LATEST
    while not condition():
        assert loop.time() < latest, f"{what} does not come"
        await asyncio.sleep(0.005)


async def first_of(heard: Any, kind: type[Any]) -> Any:
    """The first event of that kind, of those that ``heard`` gives."""
    async with asyncio.timeout(LATEST):
        async for event in heard:
            if isinstance(event, kind):
                return event
    raise AssertionError("the events ended")


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends back what comes, then ends."""
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def stop_serving(server: asyncio.Server) -> None:
    """Closes a server of asyncio's, once it has what it is accepting just now.

    Asyncio would forget that connection, and complain where it is collected, in the middle of another test.
    """
    loop = asyncio.get_running_loop()
    for one in server.sockets:
        loop.remove_reader(one.fileno())
    for _ in range(3):
        await asyncio.sleep(0)
    server.close()


class Service:
    """A TCP service of the test's own."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.connections = 0
        self.open = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        await stop_serving(self._server)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        try:
            await self._handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # a cancelled handler would be logged as a defect
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()


def allow(credentials: dict[str, Any]) -> bool:
    """The filter of most tests."""
    return credentials.get("id") == "allowed-client"


@asynccontextmanager
async def server(**values: Any) -> AsyncIterator[TunnelServer]:
    """A server on loopback that lets in whoever has :data:`CREDENTIALS`."""
    options = {"host": "127.0.0.1", **values.pop("options", {})}
    port = values.pop("port", 0)
    tunnel = TunnelServer(values.pop("connection_filter", allow), options=ServerOptions(**options), **values)
    await tunnel.start(port)
    try:
        yield tunnel
    finally:
        await tunnel.stop()


@asynccontextmanager
async def client(port: int, service_port: int, **values: Any) -> AsyncIterator[TunnelClient]:
    """A client with a public port."""
    options = values.pop("options", {})
    if options.get("reconnect", True):
        options = {"reconnect_delay": (0.05, 0.2), **options}
    credentials = values.pop("credentials", CREDENTIALS)
    tunnel = TunnelClient(
        values.pop("host", "127.0.0.1"),
        port,
        service_port,
        credentials,
        options=ClientOptions(**options),
        **values,
    )
    async with asyncio.timeout(LATEST):
        await tunnel.connect()
    try:
        yield tunnel
    finally:
        await tunnel.stop()


async def visit(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A visitor."""
    return await asyncio.open_connection("127.0.0.1", port)


def listens(port: int) -> bool:
    """Whether somebody takes connections at a port of this machine."""
    with socket.socket() as probe:
        try:
            probe.connect(("127.0.0.1", port))
        except OSError:
            return False
        return True


async def says(stream: tuple[asyncio.StreamReader, asyncio.StreamWriter], word: bytes) -> None:
    """A visitor of an echo says that, and hears it."""
    reader, writer = stream
    writer.write(word)
    assert await asyncio.wait_for(reader.readexactly(len(word)), LATEST) == word


async def leaves(stream: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
    """A visitor of an echo ends, and hears its end."""
    reader, writer = stream
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), LATEST) == b""
    writer.close()


async def come(port: int, source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A visitor from an address of this machine."""
    host = "::1" if ":" in source else "127.0.0.1"
    return await asyncio.open_connection(host, port, local_addr=(source, 0))


async def is_let_in(port: int, source: str = "127.0.0.1") -> bool:
    """Whether a visitor gets its echo."""
    async with asyncio.timeout(LATEST):
        try:
            reader, writer = await come(port, source)
        except ConnectionError:  # nobody listens; or a reset comes before the connection is seen
            return False
        try:
            writer.write(b"hello")
            return await reader.readexactly(5) == b"hello"
        except (ConnectionError, asyncio.IncompleteReadError):
            return False
        finally:
            writer.close()


async def asked(port: int, payload: bytes, *, end: bool = True) -> bytes:
    """What a visitor gets back who sends ``payload`` and ends its direction."""
    async with asyncio.timeout(LATEST):
        reader, writer = await visit(port)

        async def send() -> None:
            writer.write(payload)
            await writer.drain()
            if end:
                writer.write_eof()

        _, answer = await asyncio.gather(send(), reader.read() if end else reader.readexactly(len(payload)))
        writer.close()
        return answer


class Cutter:
    """A TCP relay that a test can cut, hold and mend: the network between the two ends."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._unheard: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._may_pass = asyncio.Event()
        # Whether what clients say is passed on, and whether what the server says is taken.
        self._may_go_up, self._may_come_down = asyncio.Event(), asyncio.Event()
        self._stops_at: int | None = None
        self.go_on()
        self._stopped = asyncio.Event()
        self._passed = 0
        self.refuses = False
        #: Whether it holds as little as it can of what the server says.
        self.narrow = False
        #: Seconds that everything takes, each way.
        self.delay = 0.0
        self.connections = 0
        self.seen_as = ""
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        await stop_serving(self._server)
        self.refuses = True
        self.cut()
        await asyncio.wait_for(asyncio.gather(*self._tasks, return_exceptions=True), LATEST)

    async def stop_after(self, more: int) -> None:
        """Lets so many bytes more pass, both ways together, and nothing behind them; waits for that moment.

        Whoever needs more than these is in the middle of its work then, however fast it is.
        """
        self._stopped.clear()
        self._stops_at = self._passed + more
        await asyncio.wait_for(self._stopped.wait(), LATEST)

    def hold_up(self) -> None:
        """Passes nothing on that clients say, until :meth:`let_up`."""
        self._may_go_up.clear()

    def let_up(self) -> None:
        """Passes on what clients say."""
        self._may_go_up.set()

    def hold_down(self) -> None:
        """Takes nothing more that the server says, until :meth:`go_on`: it waits there."""
        self._may_come_down.clear()

    def go_on(self) -> None:
        """Lets everything pass."""
        self._stops_at = None
        for event in (self._may_pass, self._may_go_up, self._may_come_down):
            event.set()

    def cut(self) -> None:
        """Breaks every connection at once, what is on its way included."""
        self.go_on()
        self._unheard.clear()
        for pair in list(self._pairs):
            for one in pair:
                one.transport.abort()

    def cut_clients(self) -> None:
        """Breaks the connections of those who came; the server hears nothing of it."""
        for writer, near in list(self._pairs):
            self._unheard.add(near)
            writer.transport.abort()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not self.narrow:
            return await asyncio.open_connection("127.0.0.1", self._to)
        dialled = socket.socket()
        dialled.setblocking(False)
        dialled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        try:
            await asyncio.get_running_loop().sock_connect(dialled, ("127.0.0.1", self._to))
        except OSError:
            dialled.close()
            raise
        return await asyncio.open_connection(sock=dialled, limit=4_096)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        if self.refuses:
            writer.transport.abort()
            self._tasks.discard(task)
            return
        self.connections += 1
        try:
            far, near = await self._dial()
        except OSError:
            writer.transport.abort()
            self._tasks.discard(task)
            return
        self.seen_as = "{}:{}".format(*near.get_extra_info("sockname"))
        pair = (writer, near)
        self._pairs.add(pair)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while True:
                    if source is far:
                        await self._may_come_down.wait()
                    if not (data := await source.read(65_536)):
                        break
                    self._passed += len(data)
                    if self._stops_at is not None and self._passed >= self._stops_at:
                        self._stopped.set()
                        self._may_pass.clear()
                    await self._may_pass.wait()
                    if source is reader:
                        await self._may_go_up.wait()
                    if self.delay:
                        await asyncio.sleep(self.delay)
                    sink.write(data)
                    await sink.drain()
            except ConnectionError:
                pass
            finally:
                for one in pair:
                    if one not in self._unheard:
                        one.transport.abort()

        await asyncio.gather(copy(reader, near), copy(far, writer), return_exceptions=True)
        near.transport.abort()
        self._unheard.discard(near)
        self._pairs.discard(pair)
        self._tasks.discard(task)
