"""Files of leases from one server to the next: of an earlier version, of one that was killed, of clients that
share a token, in a rolling restart, on a full disk.

Not here: that ports stay over a restart, and whose a file is (:mod:`test_operating`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import time
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import pytest

from sapper.errors import BindError, ConfigError
from sapper.tunnel import ClientOptions, ServerOptions, Service, TunnelClient, TunnelServer, events
from support.programs import free_port
from support.tunnel_ends import End
from support.tunnels import (
    CREDENTIALS,
    LATEST,
    Cutter,
    allow,
    asked,
    client,
    echo,
    leaves,
    says,
    server,
    until,
    visit,
)
from support.tunnels import Service as Local

PORTS = (21_000, 21_099)


# -- files of an earlier version, where the name of a lease was everybody's -------------------------------


def hashed(what: bytes, text: bytes) -> bytes:
    return sha256(what + text).digest()


def earlier(path: Path, *rows: tuple[int, bytes, bytes]) -> None:
    """A file of version 1: port, whose it is, and of which client's."""
    leases = [
        {"port": port, "token": token.hex(), "client": of.hex(), "service": 0, "seen": int(time.time()) - 60}
        for port, token, of in rows
    ]
    path.write_text(json.dumps({"version": 1, "leases": leases}))


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_lease_of_an_earlier_version_stays_its_name_s(
    tmp_path: Path, leak_check: None, restarted: bool
) -> None:
    own, name = (
        hashed(b"credentials:", json.dumps(CREDENTIALS).replace(" ", "").encode()),
        hashed(b"lease:", b"web"),
    )
    leases = tmp_path / "leases"
    usual, named, asked_for, unused = free_port(), *sorted({free_port() for _ in range(9)})[:3]
    earlier(
        leases,
        (usual, own, own),
        (named, name, name),
        (asked_for, hashed(b"service:", name + b"db"), name),
        (unused, hashed(b"service:", name + b"no more"), name),
    )
    options = {"lease_file": leases, "public_ports": (1_024, 65_535)}
    if restarted:
        async with server(options=options):
            pass
    async with Local(echo) as service, server(options=options, connection_filter=lambda _: True) as ours:
        port = ours.port or 0
        async with client(port, service.port) as plain:
            assert plain.assigned_port == usual
        stranger = TunnelClient(
            "127.0.0.1",
            port,
            authentication_credentials={"id": "somebody else"},
            services=[Service(port=service.port, name="db", public_port=asked_for)],
            options=ClientOptions(reconnect=False),
        )
        with pytest.raises(Exception, match="belongs to another"):
            await asyncio.wait_for(stranger.connect(), LATEST)
        services = [
            Service(port=service.port),
            Service(port=service.port, name="db", public_port=asked_for),
            Service(port=service.port, name="new", public_port=unused),
        ]
        for _ in range(2):
            mine = TunnelClient(
                "127.0.0.1",
                port,
                authentication_credentials=CREDENTIALS,
                services=services,
                options=ClientOptions(lease="web", reconnect=False),
            )
            await asyncio.wait_for(mine.connect(), LATEST)
            assert mine.assigned_ports == (named, asked_for, unused)
            await mine.stop()
        async with client(port, service.port, credentials={"id": "b"}, options={"lease": "web"}) as other:
            assert other.assigned_port != named, "it is the first one's own now"


def rows_in(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["leases"]
    return rows


def ports_in(path: Path) -> list[int]:
    return [one["port"] for one in rows_in(path)]


async def a_newcomer(port: int, service: int) -> tuple[TunnelClient, list[str | None]]:
    """A client with other credentials, and why it was refused: it comes again and again."""
    found = TunnelClient(
        "127.0.0.1",
        port,
        service,
        {**CREDENTIALS, "who": "a newcomer"},
        options=ClientOptions(reconnect_delay=(0.02, 0.05)),
    )
    refused: list[str | None] = []
    found.on("tunnel-error", lambda event: refused.append(event.err.reason))
    await found.start()
    return found, refused


# -- a server that was killed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lease"), [(None, None), ("web", None), (None, "mine")], ids=["usual", "named", "lease"]
)
async def test_behind_a_kill_a_port_is_its_owner_s_before_it_is_a_newcomer_s(
    tmp_path: Path, leak_check: None, name: str | None, lease: str | None
) -> None:
    leases, main, public = tmp_path / "leases", free_port(), free_port()
    options = {"host": "127.0.0.1", "lease_file": str(leases), "public_ports": (public, public)}
    async with Local(echo) as service, Cutter(main) as network:
        killed = await End.start("server", port=main, options=options)
        mine = TunnelClient(
            "127.0.0.1",
            network.port,
            authentication_credentials=CREDENTIALS,
            services=[Service(port=service.port, name=name)],
            options=ClientOptions(lease=lease),
        )
        assert await asyncio.wait_for(mine.connect(), LATEST) == public
        await until(lambda: ports_in(leases) == [public], "the lease on the disk")
        newcomer, refused = await a_newcomer(main, service.port)
        await until(lambda: "no_port" in refused, "a refusal")
        network.refuses = True
        await killed.kill()
        again = await End.start("server", port=main, options=options)
        refused.clear()
        await until(lambda: "no_port" in refused, "a refusal by the new server")
        back: list[object] = []
        mine.on("authentication-acknowledged", back.append)
        network.refuses = False
        await until(lambda: back, "the port's owner")
        assert (mine.assigned_port, newcomer.assigned_port) == (public, None)
        assert await asked(public, b"the same") == b"the same"
        await newcomer.stop()
        await mine.stop()
        await again.stop()


# -- clients that share a token ---------------------------------------------------------------------------


def ports_in_a_row(count: int) -> tuple[int, int]:
    """First and last of so many that were free a moment ago."""
    for _ in range(1_000):
        first = free_port()
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first, first + count - 1
    raise AssertionError(f"there are no {count} free ports in a row")


class Sharing:
    """A client that says nothing but the token, on a way of its own to the server: the test lets it come."""

    def __init__(self, main: int, name: bytes, service: Local | None = None) -> None:
        self.network = Cutter(main)
        self.service = service or Local(self._says)
        self._name = name
        self._own_service = service is None
        self.back = asyncio.Event()

    async def _says(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.write(self._name)
        writer.write_eof()

    async def __aenter__(self) -> Self:
        self._stack = contextlib.AsyncExitStack()
        if self._own_service:
            await self._stack.enter_async_context(self.service)
        await self._stack.enter_async_context(self.network)
        options = {"reconnect_delay": (0.01, 0.02)}
        found = client(self.network.port, self.service.port, options=options)
        self.client = await self._stack.enter_async_context(found)
        self.client.on("authentication-acknowledged", lambda _: self.back.set())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def comes(self) -> None:
        self.network.refuses = False
        await asyncio.wait_for(self.back.wait(), LATEST)


@pytest.mark.parametrize("ports", [4, 40], ids=["a port for each", "ports for more"])
async def test_clients_with_one_token_have_their_own_ports_behind_each_kill(
    tmp_path: Path, leak_check: None, ports: int
) -> None:
    main, public = free_port(), ports_in_a_row(ports)
    options = {"host": "127.0.0.1", "lease_file": str(tmp_path / "leases"), "public_ports": public}
    async with contextlib.AsyncExitStack() as stack:
        ours = await End.start("server", port=main, options=options)
        clients: list[Sharing] = []
        for name in (b"a", b"b", b"c"):
            clients.append(await stack.enter_async_context(Sharing(main, name)))
        # The same service once more: they look the same.
        clients.append(await stack.enter_async_context(Sharing(main, b"c", clients[2].service)))
        had = [one.client.assigned_port or 0 for one in clients]
        assert len(set(had)) == 4
        await until(lambda: sorted(ports_in(tmp_path / "leases")) == sorted(had), "the leases")
        for kill in range(6):
            for one in clients:
                one.network.refuses = True
                one.back.clear()
            await ours.kill()
            ours = await End.start("server", port=main, options=options)
            order = random.sample(clients, 4)
            if kill % 2:
                await asyncio.gather(*(one.comes() for one in order))
            else:
                # The last one does not come before the next server.
                for one in order[:3]:
                    await one.comes()
            here = clients if kill % 2 else order[:3]
            for one in here:
                assert one.client.assigned_port == had[clients.index(one)], f"kill {kill}, {order}"
                assert await asked(one.client.assigned_port or 0, b"who?") == one._name
        await ours.stop()


async def test_a_client_that_is_killed_with_the_server_has_its_port_again(
    tmp_path: Path, leak_check: None
) -> None:
    main, public = free_port(), ports_in_a_row(40)
    leases = tmp_path / "leases"
    options = {"host": "127.0.0.1", "lease_file": str(leases), "public_ports": public}
    async with Local(echo) as first, Local(echo) as second, Local(echo) as third:
        ours = await End.start("server", port=main, options=options)
        services = [first.port, second.port, third.port]

        async def start(service: int) -> End:
            more = {"reconnect_delay": (0.02, 0.05)}
            return await End.start(
                "client", port=main, service=service, credentials=CREDENTIALS, options=more
            )

        ends = [await start(service) for service in services]
        had = [end.port for end in ends]
        await until(lambda: sorted(ports_in(leases)) == sorted(had), "the leases")
        for at in random.sample(range(3), 3):
            await ends[at].kill()
            ends[at] = await start(services[at])
            assert ends[at].port == had[at], "the server has its session"
        await ours.kill()
        for end in ends:
            await end.kill()
        ours = await End.start("server", port=main, options=options)
        for at in random.sample(range(3), 3):
            ends[at] = await start(services[at])
            assert ends[at].port == had[at], "the server knows it from the file"
        for end in [*ends, ours]:
            await end.stop()


async def test_a_newcomer_has_no_port_of_who_shares_its_token_behind_a_kill(
    tmp_path: Path, leak_check: None
) -> None:
    main, leases = free_port(), tmp_path / "leases"
    options = {"host": "127.0.0.1", "lease_file": str(leases), "public_ports": ports_in_a_row(40)}
    ours = await End.start("server", port=main, options=options)
    async with Sharing(main, b"owner") as owner:
        had = owner.client.assigned_port
        await until(lambda: ports_in(leases) == [had], "the lease")
        owner.network.refuses = True
        owner.back.clear()
        await ours.kill()
        ours = await End.start("server", port=main, options=options)
        async with Sharing(main, b"newcomer") as newcomer:
            assert newcomer.client.assigned_port != had
            await owner.comes()
            assert owner.client.assigned_port == had
            assert await asked(had or 0, b"who?") == b"owner"
    # It ended, and nobody is expected: its port is of whoever says the token, whatever it exposes.
    await until(lambda: not any(one.get("used") for one in rows_in(leases)), "their end on the disk")
    await ours.kill()
    ours = await End.start("server", port=main, options=options)
    async with Sharing(main, b"another") as another:
        assert another.client.assigned_port == had
    await ours.stop()


# -- a new server while the old one ends ------------------------------------------------------------------


@contextlib.asynccontextmanager
async def next_server(port: int, **options: Any) -> AsyncIterator[TunnelServer]:
    """One on the same port, as soon as that is free."""
    following = TunnelServer(allow, options=ServerOptions(host="127.0.0.1", **options))
    async with asyncio.timeout(LATEST):
        while not following.running:
            with contextlib.suppress(BindError):
                await following.start(port)
            await asyncio.sleep(0.01)
    try:
        yield following
    finally:
        await following.stop()


async def test_a_server_starts_while_the_one_before_drains(tmp_path: Path, leak_check: None) -> None:
    leases = tmp_path / "leases"
    async with Local(echo) as service, server(options={"lease_file": leases}) as first:
        port = first.port or 0
        async with client(port, service.port) as exposed:
            public = exposed.assigned_port or 0
            visitor = await visit(public)
            await says(visitor, b"before")
            draining = asyncio.create_task(first.stop(drain=LATEST))
            async with next_server(port, lease_file=leases) as second:
                assert ports_in(leases) == [public]
                await says(visitor, b"still")
                assert not draining.done()
                await leaves(visitor)
                await asyncio.wait_for(draining, LATEST)
                await until(lambda: second.status(), "the client")
                await until(lambda: exposed.assigned_port == public, "its port")
                assert await asked(public, b"behind") == b"behind"


async def test_a_newcomer_has_no_port_of_who_still_drains(tmp_path: Path, leak_check: None) -> None:
    leases, public = tmp_path / "leases", free_port()
    options = {"lease_file": leases, "public_ports": (public, public)}
    async with Local(echo) as service, server(options=options) as first:
        port = first.port or 0
        async with client(port, service.port) as exposed:
            visitor = await visit(public)
            await says(visitor, b"before")
            draining = asyncio.create_task(first.stop(drain=LATEST))
            async with next_server(port, **options):
                newcomer, refused = await a_newcomer(port, service.port)
                await until(lambda: refused.count("no_port") >= 3, "refusals during the drain")
                await says(visitor, b"still")
                back: list[object] = []
                exposed.on("authentication-acknowledged", back.append)
                refused.clear()
                await leaves(visitor)
                await asyncio.wait_for(draining, LATEST)
                await until(lambda: back, "the port's owner")
                assert (exposed.assigned_port, newcomer.assigned_port) == (public, None)
                assert await asked(public, b"behind") == b"behind"
                await until(lambda: "no_port" in refused, "a refusal behind the drain")
                await newcomer.stop()


async def test_who_ends_writes_no_leases_any_more(tmp_path: Path, leak_check: None) -> None:
    leases = tmp_path / "leases"
    async with Local(echo) as service, server(options={"lease_file": leases}) as first:
        async with client(first.port or 0, service.port) as exposed:
            visitor = await visit(exposed.assigned_port or 0)
            await says(visitor, b"before")
            draining = asyncio.create_task(first.stop(drain=LATEST))
            async with next_server(0, lease_file=tmp_path / "another"):
                await until(lambda: "until" in json.loads(leases.read_text()), "the hand-over")
            leases.write_text("the next one's")
            await leaves(visitor)
            await asyncio.wait_for(draining, LATEST)
    assert leases.read_text() == "the next one's"


@pytest.mark.parametrize("ends", [True, False], ids=["ends", "has ended"])
async def test_a_leased_port_that_is_in_use(tmp_path: Path, leak_check: None, ends: bool) -> None:
    leases = tmp_path / "leases"
    public = free_port()
    options = {"lease_file": leases, "public_ports": (1_024, 65_535)}
    wish: dict[str, Any] = {
        "services": [Service(port=1, public_port=public)],
        "authentication_credentials": CREDENTIALS,
    }
    async with server(options=options) as first:
        mine = TunnelClient("127.0.0.1", first.port or 0, **wish)
        await asyncio.wait_for(mine.connect(), LATEST)
        await mine.stop()
    said = json.loads(leases.read_text())
    leases.write_text(json.dumps({**said, "until": int(time.time()) + (600 if ends else -600)}))
    async with server(options=options) as second:
        found: list[events.TunnelEvent] = []
        again = ClientOptions(reconnect_delay=(0.02, 0.05))
        mine = TunnelClient("127.0.0.1", second.port or 0, 1, CREDENTIALS, options=again)
        mine.on("tunnel-error", found.append)
        with socket.create_server(("127.0.0.1", public)):
            await mine.start()
            await until(lambda: found or mine.assigned_port, "what the server says")
            if not ends:
                await until(lambda: mine.assigned_port, "another port")
                assert mine.assigned_port != public
        if ends:
            assert "still uses port" in str(getattr(found[0], "err", found[0]))
            await until(lambda: mine.assigned_port, "its port")
            assert mine.assigned_port == public
        await mine.stop()


# -- a disk that is full for a while ----------------------------------------------------------------------


async def test_leases_that_could_not_be_written_are_tried_again(tmp_path: Path, leak_check: None) -> None:
    leases, full = tmp_path / "leases", tmp_path / "leases.new"
    async with Local(echo) as service, server(options={"lease_file": leases}) as ours:
        failed: list[object] = []
        ours.on("error", failed.append)
        full.mkdir()
        async with client(ours.port or 0, service.port) as exposed:
            await until(lambda: failed, "the error")
            full.rmdir()
            await until(lambda: ports_in(leases) == [exposed.assigned_port], "the leases on the disk")
    assert len(failed) == 1


async def test_a_pipe_is_no_file_for_leases(leak_check: None, tmp_path: Path) -> None:
    """Who opens it waits for a writer, and all that runs on that thread with it."""
    os.mkfifo(tmp_path / "leases")
    ours = TunnelServer(options=ServerOptions(lease_file=tmp_path / "leases"))
    with pytest.raises(ConfigError) as caught:
        await asyncio.wait_for(ours.start(0), LATEST)
    assert caught.value.field == "lease_file"
