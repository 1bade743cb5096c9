"""Who counts by events: each connection comes once and goes once, whatever becomes of it; so do tunnels and
visitors. ``client-resumed`` says which tunnel goes on over which connection.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest

from sapper.tunnel import ServerOptions, TunnelServer, events
from sapper.tunnel.events import TunnelAddress
from support.tunnels import CREDENTIALS, LATEST, Cutter, Service, asked, client, echo, until, visit
from support.w3ptunl import MAGIC, OriginalClient

ALL = (
    "main-server-start client-connected client-protocol-confirmed client-authentication-failed client-error "
    "client-resumed client-disconnected tunnel-created tunnel-destroyed tunnel-error visitor-connected "
    "visitor-disconnected main-server-end"
)


class Books:
    """What a program keeps that counts by events, and what may not be."""

    def __init__(self, server: TunnelServer) -> None:
        self.connections: Counter[int] = Counter()
        self.ever: set[int] = set()
        self.tunnels: Counter[int] = Counter()
        self.visitors: Counter[tuple[int, int]] = Counter()
        #: Which connection carries which tunnel.
        self.carries: dict[int, int] = {}
        self.resumed: list[events.ClientResumed] = []
        self.names: list[str] = []
        #: Whether a hello may come so late that its client is taken for an original one until then.
        self.slow = False
        self.wrong: list[tuple[Any, AssertionError]] = []
        for name in ALL.split():
            server.on(name, self._hear)

    def _hear(self, event: Any) -> None:
        try:
            self._enter(event)
        except AssertionError as error:  # of which only the loop would hear
            self.wrong.append((event, error))

    def _enter(self, event: Any) -> None:
        assert self.names[-1:] != ["main-server-end"], f"{event} behind the end"
        self.names.append(event.name)
        match event:
            case events.ClientConnected(client_tunnel=one):
                assert one.id not in self.ever, "an id comes once"
                self.ever.add(one.id)
                self.connections[one.id] += 1
            case events.TunnelCreated(client_tunnel=one):
                assert self.connections[one.id] == 1, "a tunnel has the id of the connection that made it"
                self.tunnels[one.id] += 1
                self.carries[one.id] = one.id
            case events.ClientResumed(client_tunnel=one, connection=connection):
                assert self.tunnels[one.id] == 1, "a session is that of a tunnel"
                assert one.id not in self.carries.values(), "the connection before is told first"
                assert self.connections[connection] == 1
                assert connection != one.id
                self.carries[connection] = one.id
                self.resumed.append(event)
            case events.ClientDisconnected(client_tunnel=one, session=session):
                self.connections[one.id] -= 1
                assert self.connections[one.id] == 0, "once, and only who came"
                assert self.carries.pop(one.id, None) == session
            case events.TunnelDestroyed(client_tunnel=one):
                self.tunnels[one.id] -= 1
                assert self.tunnels[one.id] == 0
                assert not any(n for (tunnel, _), n in self.visitors.items() if tunnel == one.id), (
                    "told first"
                )
                if self.slow:
                    self.carries = {by: which for by, which in self.carries.items() if which != one.id}
                assert one.id not in self.carries.values(), "its connection is told first"
            case events.VisitorConnected(client_tunnel=one, visitor=visitor):
                self.visitors[one.id, visitor.number] += 1
            case events.VisitorDisconnected(client_tunnel=one, visitor=visitor):
                self.visitors[one.id, visitor.number] -= 1
                assert self.visitors[one.id, visitor.number] == 0

    def are_even(self) -> None:
        """Nobody is left."""
        assert not self.wrong
        assert not +self.connections
        assert not +self.tunnels
        assert not +self.visitors
        assert not self.carries
        assert self.ever
        assert self.names[0] == "main-server-start"
        assert self.names[-1] == "main-server-end"


@asynccontextmanager
async def counted(**given: Any) -> AsyncIterator[tuple[TunnelServer, Books]]:
    """A server whose books are even at its end."""
    options = ServerOptions(host="127.0.0.1", **given)
    ours = TunnelServer(lambda said: said["id"] == "allowed-client", options=options)
    books = Books(ours)
    heard_lost: list[Any] = []
    ours.on("events-lost", heard_lost.append)
    await ours.start(0)
    try:
        yield ours, books
    finally:
        await ours.stop()
    assert not heard_lost
    books.are_even()


async def test_visits_that_come_and_go_in_one_turn(leak_check: None) -> None:
    """A stream's place is taken by the next one before its socket has said goodbye."""
    heard: Counter[str] = Counter()
    async with (
        Service(echo) as service,
        counted() as (ours, _),
        client(ours.port or 0, service.port) as exposed,
    ):
        for name in ("service-connected", "service-disconnected"):
            exposed.on(name, lambda event: heard.update([event.name]))
        few = asyncio.Semaphore(30)

        async def one() -> None:
            async with few:
                assert await asked(exposed.assigned_port or 0, b"?") == b"?"

        await asyncio.gather(*(one() for _ in range(600)))
        await until(lambda: not exposed.status().streams, "all left")
        await until(lambda: heard["service-disconnected"] == 600, "and that was told")
        assert heard["service-connected"] == 600


async def test_a_session_that_goes_on_again_and_again(leak_check: None) -> None:
    async with Service(echo) as service, counted() as (ours, books):
        async with Cutter(ours.port or 0) as link, client(link.port, service.port) as exposed:
            reader, writer = await visit(exposed.assigned_port or 0)
            for _ in range(4):
                before = len(books.resumed)
                link.cut()
                await until(lambda before=before: len(books.resumed) > before, "its client")  # type: ignore[misc]
                writer.write(b"on")
                assert await asyncio.wait_for(reader.readexactly(2), LATEST) == b"on"
            (tunnel,) = ours.status()
            assert tunnel.resumes == 4
            assert {one.client_tunnel.id for one in books.resumed} == {tunnel.id}
            assert {one.client_tunnel.tunnel_address for one in books.resumed} == {TunnelAddress(tunnel.port)}
            assert len({one.connection for one in books.resumed}) == 4
            (carrying,) = books.carries
            assert carrying == books.resumed[-1].connection
            writer.close()
    assert books.names.count("client-connected") == books.names.count("client-disconnected") == 5
    assert books.names.count("tunnel-created") == books.names.count("tunnel-destroyed") == 1


async def test_a_slow_way_costs_a_session_nothing_at_a_full_server(leak_check: None) -> None:
    """The hello comes half a second behind the acknowledgement, and there is no other place."""
    async with Service(echo) as service, counted(max_clients=1) as (ours, books):
        async with Cutter(ours.port or 0) as link, client(link.port, service.port) as exposed:
            reader, writer = await visit(exposed.assigned_port or 0)
            writer.write(b"first")
            assert await asyncio.wait_for(reader.readexactly(5), LATEST) == b"first"
            link.delay = 0.25
            link.cut()
            await until(lambda: books.resumed, "its client")
            writer.write(b"on")
            assert await asyncio.wait_for(reader.readexactly(2), LATEST) == b"on"
            writer.close()
    assert books.names.count("tunnel-created") == books.names.count("tunnel-destroyed") == 1


async def test_who_was_taken_for_an_original_client_is_told_anew(leak_check: None) -> None:
    async with Service(echo) as service, counted() as (ours, books):
        created: list[Any] = []
        destroyed: list[Any] = []
        ours.on("tunnel-created", created.append)
        ours.on("tunnel-destroyed", destroyed.append)
        books.slow = True
        async with Cutter(ours.port or 0) as link:
            link.delay = 0.25
            async with client(link.port, service.port) as exposed:
                await until(lambda: len(created) == 2, "its hello")
                assert [one.client_tunnel.negotiated for one in created] == [False, True]
                assert destroyed[0].client_tunnel == created[0].client_tunnel
                assert created[-1].client_tunnel.tunnel_address == TunnelAddress(exposed.assigned_port or 0)
                # Slower than one waits for who may come back: its session is found all the same.
                link.delay = 1.2
                link.cut()
                await until(lambda: books.resumed, "its client")
                assert await asked(exposed.assigned_port or 0, b"on") == b"on"
    assert books.names.count("tunnel-created") == books.names.count("tunnel-destroyed") == 3


async def test_visitors_of_who_was_taken_for_an_original_client_cost_the_session_nothing(
    leak_check: None,
) -> None:
    async with Service(echo) as service, counted() as (ours, books):
        created: list[Any] = []
        ours.on("tunnel-created", created.append)
        books.slow = True
        async with Cutter(ours.port or 0) as link, client(link.port, service.port) as exposed:
            reader, writer = await visit(exposed.assigned_port or 0)
            # Later than one waits for who may come back.
            link.delay = 1.2
            link.cut()
            await until(lambda: len(created) == 2, "a tunnel of an original client")
            strange, stranger = await visit(created[1].client_tunnel.tunnel_address.port)
            stranger.write(b"for nobody")
            await until(lambda: books.resumed, "its client")
            link.delay = 0.0
            writer.write(b"on")
            assert await asyncio.wait_for(reader.readexactly(2), LATEST) == b"on"
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(strange.read(), LATEST)
            stranger.close()
            writer.close()
    assert books.names.count("tunnel-created") == books.names.count("tunnel-destroyed") == 2


@pytest.mark.parametrize("ends", ["the server", "the wait"])
async def test_a_hello_whose_way_back_is_full(ends: str, leak_check: None) -> None:
    """The connection cannot go over to the client's session, for a frame that is half sent is in front."""
    async with Service(echo) as service, counted() as (ours, books), AsyncExitStack() as here:
        created: list[Any] = []
        ours.on("tunnel-created", created.append)
        link = await here.enter_async_context(Cutter(ours.port or 0))
        exposed = await here.enter_async_context(client(link.port, service.port))
        reader, writer = await visit(exposed.assigned_port or 0)
        # Later than one waits for who may come back.
        link.delay, link.narrow = 1.5, True
        link.cut()
        await until(lambda: len(created) == 2, "a tunnel of an original client")
        link.hold_up()
        link.hold_down()
        strange = created[1].client_tunnel.tunnel_address.port
        _reader, stranger = await visit(strange)
        stranger.write(bytes(4_000_000))
        await until(lambda: [one for one in ours.status() if one.port == strange and one.held], "what waits")
        link.let_up()
        await until(lambda: all(one.port != strange for one in ours.status()), "its hello")
        if ends == "the server":
            # Which is not the five seconds that a frame may take.
            async with asyncio.timeout(4.0):
                await ours.stop()
        else:
            await until(lambda: books.names.count("tunnel-destroyed") == 1, "the end of the wait")
            assert not books.resumed
            link.delay = 0.0
            link.cut()
            await until(lambda: books.resumed, "its client")
            writer.write(b"on")
            assert await asyncio.wait_for(reader.readexactly(2), LATEST) == b"on"
        stranger.transport.abort()
        writer.close()


async def test_a_drain_waits_for_nobody_who_cannot_come_back(leak_check: None) -> None:
    async with Service(echo) as service, counted() as (ours, books), AsyncExitStack() as ends:
        link = await ends.enter_async_context(Cutter(ours.port or 0))
        await ends.enter_async_context(client(link.port, service.port))
        link.refuses = True
        link.cut()
        await until(lambda: "client-disconnected" in books.names, "the end of its connection")
        async with asyncio.timeout(LATEST):
            await ours.stop(drain=3_600.0)


async def test_a_connection_that_is_taken_over_before_it_is_known_to_be_gone(leak_check: None) -> None:
    """The client comes again, and the server has not seen the end of its first connection."""
    async with Service(echo) as service, counted() as (ours, books):
        async with Cutter(ours.port or 0) as link, client(link.port, service.port) as exposed:
            assert await asked(exposed.assigned_port or 0, b"first") == b"first"
            link.cut_clients()
            await until(lambda: books.resumed, "its client")
            assert await asked(exposed.assigned_port or 0, b"second") == b"second"
            assert "tunnel-error" not in books.names
            assert books.names.index("client-disconnected") < books.names.index("client-resumed")


async def test_a_grace_that_is_over_and_a_server_that_stops_meanwhile(leak_check: None) -> None:
    async with Service(echo) as service, counted(grace=0.1) as (ours, books), AsyncExitStack() as ends:
        link = await ends.enter_async_context(Cutter(ours.port or 0))
        await ends.enter_async_context(client(link.port, service.port))
        link.refuses = True
        link.cut()
        await until(lambda: "tunnel-destroyed" in books.names, "the end of the grace")
        assert not +books.connections
    async with Service(echo) as service, counted() as (ours, books), AsyncExitStack() as ends:
        link = await ends.enter_async_context(Cutter(ours.port or 0))
        exposed = await ends.enter_async_context(client(link.port, service.port))
        _reader, writer = await visit(exposed.assigned_port or 0)
        await until(lambda: +books.visitors, "a visitor")
        link.refuses = True
        link.cut()
        await until(lambda: "client-disconnected" in books.names, "the cut")
        assert +books.visitors, "who waits is there"
        await ours.stop(drain=0.05)
        writer.close()


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_the_books_are_even(seed: int, leak_check: None) -> None:
    """Clients of all sorts come, break off, come back, are replaced and refused, in any order."""
    chance = random.Random(seed)
    given = {"grace": 0.3, "max_clients": 6, "handshake_timeout": 0.5, "linger": 0.05}
    async with Service(echo) as service, counted(**given) as (ours, books), AsyncExitStack() as ends:
        port = ours.port or 0
        link = await ends.enter_async_context(Cutter(port))
        here: list[AsyncExitStack] = []
        writers: list[asyncio.StreamWriter] = []

        def leave() -> None:
            for writer in writers:
                writer.transport.abort()

        ends.callback(leave)

        async def come(**values: Any) -> None:
            stack = AsyncExitStack()
            try:
                async with asyncio.timeout(1.0):
                    await stack.enter_async_context(client(link.port, service.port, **values))
            except TimeoutError:
                await stack.aclose()
            else:
                here.append(stack)

        async def original() -> None:
            peer = OriginalClient(service.port)
            with suppress(ValueError, asyncio.IncompleteReadError, ConnectionError):
                await peer.connect("127.0.0.1", port, {**CREDENTIALS, "n": chance.random()})
            stack = AsyncExitStack()
            stack.push_async_callback(peer.close)
            here.append(stack)

        async def stranger() -> None:
            _reader, writer = await visit(port)
            writer.write(chance.choice([b"", b"GET /", MAGIC, MAGIC + b'\0\0\0\x0d{"id":"nobo"}']))
            writers.append(writer)

        async def visits() -> None:
            for one in ours.status():
                with suppress(ConnectionError):
                    _reader, writer = await visit(one.port)
                    writer.write(b"hello")
                    writers.append(writer)

        for _ in range(40):
            match chance.randrange(10):
                case 0:
                    await come(credentials={**CREDENTIALS, "n": chance.random()})
                case 1:
                    await come(options={"lease": chance.choice(["a", "b"]), "reconnect": False})
                case 2:
                    await original()
                case 3:
                    await stranger()
                case 4 | 5 | 6:
                    await visits()
                case 7:
                    link.cut()
                case 8 if here:
                    await here.pop(chance.randrange(len(here))).aclose()
                case _ if writers:
                    writer = writers.pop(chance.randrange(len(writers)))
                    writer.transport.abort()
        if seed % 2:
            await ours.stop(drain=chance.choice([0.0, 0.1]))
        for stack in here:
            await stack.aclose()
    assert books.names.count("client-connected") == books.names.count("client-disconnected") > 5
