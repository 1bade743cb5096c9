"""An end that leaves in order: what was sent before reaches who is slow to take it, on both sides."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from sapper.tunnel import ClientOptions, ClientStatus, TunnelClient, TunnelStatus
from support.tunnels import (
    CREDENTIALS,
    LATEST,
    Cutter,
    Service,
    asked,
    client,
    echo,
    is_let_in,
    server,
    until,
)
from support.w3ptunl import CLOSE, DATA, frame, message, read_message

Status = ClientStatus | TunnelStatus
CHANCE = random.Random(12)
# Less than a stream's first window.
PIECE = 65_536
# Frames that are not acknowledged yet are less.
ENOUGH = 10_000


class Slow:
    """A service that takes nothing before it is told to, and then answers."""

    def __init__(self) -> None:
        self.may_read = asyncio.Event()
        self.got: list[bytes | OSError] = []
        self.answer = b""
        self.port = 0

    @asynccontextmanager
    async def listening(self, holder: Callable[[], Status | None]) -> AsyncIterator[Slow]:
        """Its answer is so long that ``holder``'s end has a part of it that the visitor does not take."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            self.port = listener.getsockname()[1]
            listener.setblocking(False)
            serving = asyncio.create_task(self._serve(listener, holder))
            try:
                yield self
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)

    async def _serve(self, listener: socket.socket, holder: Callable[[], Status | None]) -> None:
        loop = asyncio.get_running_loop()
        one, _ = await loop.sock_accept(listener)
        with one:
            one.setblocking(False)
            await self.may_read.wait()
            parts = []
            try:
                while part := await loop.sock_recv(one, 65_536):
                    parts.append(part)
                self.got.append(b"".join(parts))
                await self._fill(one, holder)
                one.shutdown(socket.SHUT_WR)
            except OSError as error:
                self.got.append(error)
            await asyncio.Event().wait()

    async def _fill(self, one: socket.socket, holder: Callable[[], Status | None]) -> None:
        self.answer = await fill(one, holder)


async def fill(one: socket.socket, holder: Callable[[], Status | None]) -> bytes:
    """Sends until ``holder`` has some of it that the far side does not take: more than systems hold."""
    sent = b""
    # What it has sent itself, and is not acknowledged yet, is nothing that somebody does not take.
    await until(lambda: (now := holder()) is None or now.held < ENOUGH, "the acknowledgement")
    while (status := holder()) is not None and status.held < ENOUGH:
        sent += CHANCE.randbytes(PIECE)
        await asyncio.get_running_loop().sock_sendall(one, sent[-PIECE:])
        count = len(sent)
        await until(lambda count=count: (now := holder()) is None or now.received == count, "its way")  # type: ignore[misc]
    return sent


@asynccontextmanager
async def visitor(
    port: int, holder: Callable[[], Status | None]
) -> AsyncIterator[tuple[socket.socket, bytes]]:
    """One who sends all that it has to say, which is more than its service takes, and reads late."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        one.setblocking(False)
        async with asyncio.timeout(LATEST):
            await asyncio.get_running_loop().sock_connect(one, ("127.0.0.1", port))
            sent = await fill(one, holder)
        one.shutdown(socket.SHUT_WR)
        yield one, sent


async def rest(one: socket.socket) -> bytes:
    loop, parts = asyncio.get_running_loop(), []
    async with asyncio.timeout(LATEST):
        while part := await loop.sock_recv(one, 65_536):
            parts.append(part)
    return b"".join(parts)


def nobody() -> None:
    """Where no answer has to be longer than it is."""


@pytest.mark.parametrize("again", [True, False], ids=["comes again", "ends"])
async def test_a_service_that_is_slow_when_the_server_is_gone(again: bool, leak_check: None) -> None:
    """The server's drain is over; the service gets all that its visitor had sent, and its end."""
    async with Slow().listening(nobody) as service, server() as ours:
        options = ClientOptions(reconnect_delay=(0.05, 0.2)) if again else ClientOptions(reconnect=False)
        mine = TunnelClient("127.0.0.1", ours.port or 0, service.port, CREDENTIALS, options=options)
        async with asyncio.timeout(LATEST):
            public = await mine.connect()
        async with visitor(public, mine.status) as (one, sent):
            await ours.stop(drain=0.2)
            with pytest.raises(ConnectionResetError):  # there will be no answer
                await rest(one)
            await until(lambda: mine.assigned_port is None, "the client's news")
            ended = asyncio.create_task(mine.wait_closed())
            await asyncio.sleep(0.05)  # in which it would end, if it did
            assert not ended.done()
            service.may_read.set()
            await until(lambda: service.got, "what the service gets")
            assert service.got == [sent]
        if again:
            await mine.stop()
        # Who does not connect again ended behind that, without an error.
        await asyncio.wait_for(ended, LATEST)
        assert mine.error is None


@pytest.mark.parametrize("end", ["client", "server"])
async def test_both_are_slow_and_the_drain_is_long(end: str, leak_check: None) -> None:
    async with server() as ours:
        async with Slow().listening(lambda: ours.status()[0]) as service:
            async with client(ours.port or 0, service.port) as mine:
                async with visitor(mine.assigned_port or 0, mine.status) as (one, sent):
                    stopping = asyncio.create_task((mine if end == "client" else ours).stop(drain=LATEST))
                    await asyncio.sleep(0)  # it has begun
                    service.may_read.set()
                    await until(lambda: service.answer, "the answer's way")
                    assert service.got == [sent]
                    assert await rest(one) == service.answer
                    await asyncio.wait_for(stopping, LATEST)


async def test_a_drain_goes_on_when_the_other_end_leaves_meanwhile(leak_check: None) -> None:
    """The server has begun to leave when the client has left; the visitor has still to read."""
    async with server() as ours:
        async with Slow().listening(lambda: ours.status()[0]) as service:
            mine = TunnelClient("127.0.0.1", ours.port or 0, service.port, CREDENTIALS)
            async with asyncio.timeout(LATEST):
                public = await mine.connect()
            async with visitor(public, mine.status) as (one, sent):
                service.may_read.set()
                await until(lambda: service.answer, "the answer's way")
                stopping = asyncio.create_task(ours.stop(drain=LATEST))
                await asyncio.wait_for(mine.stop(drain=LATEST), LATEST)
                assert await rest(one) == service.answer
                await asyncio.wait_for(stopping, LATEST)
                assert service.got == [sent]


async def test_a_grace_says_nothing_about_what_is_left_to_deliver(leak_check: None) -> None:
    async with server(options={"grace": 0.1}) as ours:
        async with Slow().listening(lambda: ours.status()[0]) as service:
            mine = TunnelClient("127.0.0.1", ours.port or 0, service.port, CREDENTIALS)
            async with asyncio.timeout(LATEST):
                public = await mine.connect()
            async with visitor(public, mine.status) as (one, _):
                service.may_read.set()
                await until(lambda: service.answer, "the answer's way")
                await mine.stop(drain=LATEST)
                await asyncio.sleep(0.5)  # the time that counts, if it does
                assert await rest(one) == service.answer


async def test_a_service_that_is_still_dialled_when_its_server_is_gone(leak_check: None) -> None:
    """Its visitor had said all, and ended. The service's queue of connections is full for a moment."""

    async def original(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(message({"port": 4_711}) + frame(7, DATA, b"all") + frame(7, CLOSE))
        writer.close()

    peer = await asyncio.start_server(original, "127.0.0.1", 0)
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        # With room for one more than this says. Without any, Linux would answer with SYN cookies, and resets
        # a connection that says something before it is taken, or acknowledges bytes that nobody gets.
        listener.listen(1)
        place = listener.getsockname()
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex(place)
        others = {first.getsockname(), second.getsockname()}
        options = ClientOptions(reconnect=False)
        at = peer.sockets[0].getsockname()[1]
        mine = TunnelClient("127.0.0.1", at, place[1], CREDENTIALS, options=options)
        gone = asyncio.Event()
        mine.on("tunnel-disconnected", lambda event: gone.set())
        async with asyncio.timeout(LATEST):
            await mine.start()
            await gone.wait()
            listener.setblocking(False)
            loop = asyncio.get_running_loop()
            while True:
                accepted, who = await loop.sock_accept(listener)
                with accepted:
                    accepted.setblocking(False)
                    if who not in others:
                        assert await rest(accepted) == b"all"
                        break
            await mine.wait_closed()
    peer.close()


async def test_a_stop_ends_what_is_left_to_deliver(leak_check: None) -> None:
    async with Slow().listening(nobody) as service, server() as ours:
        mine = TunnelClient("127.0.0.1", ours.port or 0, service.port, CREDENTIALS)
        async with asyncio.timeout(LATEST):
            public = await mine.connect()
        async with visitor(public, mine.status):
            await ours.stop(drain=0.2)
            await until(lambda: mine.assigned_port is None, "the client's news")
            await asyncio.wait_for(mine.stop(), LATEST)
            service.may_read.set()
            await until(lambda: service.got, "what the service gets")
            assert isinstance(service.got[0], ConnectionResetError)


async def test_a_client_that_is_told_to_end_in_a_cut_comes_back_for_its_visitors(leak_check: None) -> None:
    """Those who are there go on, nobody new comes in."""
    async with Service(echo) as local, server() as ours, Cutter(ours.port or 0) as cutter:
        options = ClientOptions(reconnect_delay=(0.05, 0.2))
        mine = TunnelClient("127.0.0.1", cutter.port, local.port, CREDENTIALS, options=options)
        async with asyncio.timeout(LATEST):
            public = await mine.connect()
            reader, writer = await asyncio.open_connection("127.0.0.1", public)
            writer.write(b"first")
            assert await reader.readexactly(5) == b"first"
            cutter.refuses = True
            cutter.cut()
            await until(lambda: not any(one.connected for one in ours.status()), "the cut")
            stopping = asyncio.create_task(mine.stop(LATEST))
            writer.write(b"second")
            cutter.refuses = False
            assert await reader.readexactly(6) == b"second"
            assert not stopping.done()
            while await is_let_in(public):
                pass
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            await stopping
            await until(lambda: not ours.status(), "the end of its tunnel")


async def test_a_client_that_is_away_and_has_no_visitors_leaves_at_once(leak_check: None) -> None:
    async with Service(echo) as local, server() as ours, Cutter(ours.port or 0) as cutter:
        options = ClientOptions(reconnect_delay=(0.05, 0.2))
        mine = TunnelClient("127.0.0.1", cutter.port, local.port, CREDENTIALS, options=options)
        async with asyncio.timeout(LATEST):
            public = await mine.connect()
            assert await asked(public, b"all") == b"all"
            cutter.refuses = True
            cutter.cut()
            await until(lambda: not any(one.connected for one in ours.status()), "the cut")
            await mine.stop(10 * LATEST)
