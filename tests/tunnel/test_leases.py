"""Files of leases from one server to the next: of an earlier version, in a rolling restart, on a full disk.

Not here: that ports stay over a restart, and whose a file is (:mod:`test_operating`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from sapper.errors import BindError
from sapper.tunnel import ClientOptions, ServerOptions, Service, TunnelClient, TunnelServer, events
from support.programs import free_port
from support.tunnels import CREDENTIALS, LATEST, allow, asked, client, echo, server, until, visit
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


def ports_in(path: Path) -> list[int]:
    return [one["port"] for one in json.loads(path.read_text())["leases"]]


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
            reader, writer = await visit(public)
            writer.write(b"before")
            assert await asyncio.wait_for(reader.readexactly(6), LATEST) == b"before"
            draining = asyncio.create_task(first.stop(drain=LATEST))
            async with next_server(port, lease_file=leases) as second:
                assert ports_in(leases) == [public]
                writer.write(b"still")
                assert await asyncio.wait_for(reader.readexactly(5), LATEST) == b"still"
                assert not draining.done()
                writer.write_eof()
                assert await asyncio.wait_for(reader.read(), LATEST) == b""
                writer.close()
                await asyncio.wait_for(draining, LATEST)
                await until(lambda: second.status(), "the client")
                await until(lambda: exposed.assigned_port == public, "its port")
                assert await asked(public, b"behind") == b"behind"


async def test_who_ends_writes_no_leases_any_more(tmp_path: Path, leak_check: None) -> None:
    leases = tmp_path / "leases"
    async with Local(echo) as service, server(options={"lease_file": leases}) as first:
        async with client(first.port or 0, service.port) as exposed:
            reader, writer = await visit(exposed.assigned_port or 0)
            writer.write(b"before")
            assert await asyncio.wait_for(reader.readexactly(6), LATEST) == b"before"
            draining = asyncio.create_task(first.stop(drain=LATEST))
            async with next_server(0, lease_file=tmp_path / "another"):
                await until(lambda: "until" in json.loads(leases.read_text()), "the hand-over")
            leases.write_text("the next one's")
            writer.close()
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
