"""A writer that is given with bytes that it has not sent yet: they go out first, and not for ever."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from sapper.errors import (
    ApiMisuseError,
    ClosedError,
    ConnectDeadline,
    ConnectionLost,
    HandshakeDeadline,
    SapperError,
)
from sapper.pump import Pump, PumpOptions, connect
from sapper.stream import memory_pair
from sapper.tls import create_bridge
from support.bridges import PSK, receive
from support.transports import InMemory

#: Far more than a socket takes at once.
UNSENT = os.urandom(3_000_000)


class Complaints(list[dict[str, Any]]):
    """What the loop's exception handler hears from now on."""

    def __init__(self) -> None:
        super().__init__()
        asyncio.get_running_loop().set_exception_handler(lambda _, said: self.append(said))


async def unsent_writer() -> tuple[asyncio.StreamReader, asyncio.StreamWriter, socket.socket]:
    """A reader and a writer with bytes that wait, and their peer, which reads nothing by itself."""
    ours, peer = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    writer.write(UNSENT)
    assert writer.transport.get_write_buffer_size() > 0
    return reader, writer, peer


async def test_handing_over_says_nothing_to_the_loop(any_loop: str, leak_check: None) -> None:
    complaints = Complaints()
    reader, writer, peer = await unsent_writer()
    theirs, far = socket.socketpair()
    pump = connect((reader, writer), theirs)
    pump.start()
    with peer, far:
        far.sendall(b"after it")
        assert await receive(peer, len(UNSENT) + 8) == UNSENT + b"after it"
        await writer.wait_closed()
        await pump.stop()
    assert complaints == []


# -- a peer that does not read ---------------------------------------------------------------------------


async def ends_within(pump: Pump) -> None:
    with suppress(SapperError):
        async with asyncio.timeout(20):
            await pump.wait_closed()


async def drained(peer: socket.socket) -> int:
    """How much of what was written the peer can still read; it comes to the connection's end."""
    peer.setblocking(False)
    size = 0
    async with asyncio.timeout(20):
        while data := await asyncio.get_running_loop().sock_recv(peer, 1 << 20):
            size += len(data)
    return size


@pytest.mark.parametrize("first", [True, False], ids=["network", "sink"])
async def test_a_handshake_waits_no_longer_than_its_deadline(
    any_loop: str, first: bool, leak_check: None
) -> None:
    complaints, heard = Complaints(), list[SapperError]()
    reader, writer, peer = await unsent_writer()
    theirs, far = socket.socketpair()
    ends = ((reader, writer), theirs) if first else (theirs, (reader, writer))
    bridge = create_bridge(
        socket=ends[0], sink=ends[1], credentials=PSK, on_error=heard.append, handshake_timeout=0.2
    )
    with peer, far:
        async with asyncio.timeout(20):
            with pytest.raises(HandshakeDeadline) as caught:
                await bridge.handshake()
        assert caught.value.phase == "handshake"
        await bridge.wait_closed()
        assert (bridge.state, bridge.error) == ("closed", caught.value)
        await writer.wait_closed()
        assert await drained(peer) < len(UNSENT)
    assert heard == [], "handshake() told it"
    assert complaints == []


async def test_start_tells_the_deadline_once(any_loop: str, leak_check: None) -> None:
    heard = list[SapperError]()
    reader, writer, peer = await unsent_writer()
    bridge = create_bridge(
        socket=(reader, writer), sink="null:", credentials=PSK, on_error=heard.append, handshake_timeout=0.2
    )
    bridge.start()
    with pytest.raises(ApiMisuseError):
        bridge.start()
    with peer:
        await ends_within(bridge)
        assert [type(error) for error in heard] == [HandshakeDeadline]
        assert await drained(peer) < len(UNSENT)


async def test_one_deadline_for_them_and_for_the_handshake(
    any_loop: str, monkeypatch: pytest.MonkeyPatch, leak_check: None
) -> None:
    reader, writer, peer = await unsent_writer()
    bridge = create_bridge(socket=(reader, writer), sink="null:", credentials=PSK, handshake_timeout=60.0)
    clock = iter([1000.0, 1059.9])  # nearly all of it goes by while they are sent
    monkeypatch.setattr("sapper.pump.time", SimpleNamespace(monotonic=lambda: next(clock)))
    shaking = asyncio.create_task(bridge.handshake())
    with peer:
        assert await receive(peer, len(UNSENT)) == UNSENT
        async with asyncio.timeout(20):
            with pytest.raises(HandshakeDeadline, match=r"within 60\.0 s"):
                await shaking
        await bridge.wait_closed()


async def test_without_tls_it_is_the_deadline_of_connecting(any_loop: str, leak_check: None) -> None:
    heard = list[SapperError]()
    reader, writer, peer = await unsent_writer()
    pump = connect((reader, writer), "null:", options=PumpOptions(connect_timeout=0.2), on_error=heard.append)
    pump.start()
    with peer:
        await ends_within(pump)
        assert [(type(error), error.phase) for error in heard] == [(ConnectDeadline, "connect")]
        assert await drained(peer) < len(UNSENT)


@pytest.mark.parametrize(
    "how", [Pump.stop, Pump.abort, lambda pump: pump.stop(5.0)], ids=["stop", "abort", "drain"]
)
@pytest.mark.parametrize("started", [True, False])
async def test_the_end_of_the_pump_is_the_end_of_the_writer(
    any_loop: str, how: Callable[[Pump], Any], started: bool, leak_check: None
) -> None:
    complaints, heard = Complaints(), list[SapperError]()
    reader, writer, peer = await unsent_writer()
    pump = connect((reader, writer), "null:", on_error=heard.append)
    if started:
        pump.start()
        await asyncio.sleep(0)  # it waits now
    how(pump)
    with peer:
        await ends_within(pump)
        assert writer.transport.is_closing()
        await writer.wait_closed()
        assert await drained(peer) < len(UNSENT)
    assert heard == []
    assert complaints == []


async def test_a_cancelled_handshake_lets_the_writer_go(any_loop: str, leak_check: None) -> None:
    reader, writer, peer = await unsent_writer()
    bridge = create_bridge(socket=(reader, writer), sink="null:", credentials=PSK)
    shaking = asyncio.create_task(bridge.handshake())
    await asyncio.sleep(0)  # it waits now
    shaking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await shaking
    with peer:
        await ends_within(bridge)
        await writer.wait_closed()
        assert await drained(peer) < len(UNSENT)


async def test_another_thread_starts_it_and_shakes_hands_in_turn(any_loop: str, leak_check: None) -> None:
    reader, writer, peer = await unsent_writer()
    theirs, far = socket.socketpair()
    pump = connect((reader, writer), theirs)
    await asyncio.to_thread(pump.start)
    with peer, far:
        far.sendall(b"after it")
        assert await receive(peer, len(UNSENT) + 8) == UNSENT + b"after it"
        await pump.stop()
    reader, writer, peer = await unsent_writer()
    bridge = create_bridge(socket=(reader, writer), sink="null:", credentials=PSK, handshake_timeout=0.2)
    with peer:
        with pytest.raises(HandshakeDeadline):
            await asyncio.to_thread(bridge.handshake_sync)
        await ends_within(bridge)


# -- as another sink -------------------------------------------------------------------------------------


async def plain(**options: Any) -> tuple[Pump, socket.socket, socket.socket]:
    """A pump that runs, and both its peers."""
    (ours, near), (theirs, far) = socket.socketpair(), socket.socketpair()
    pump = connect(ours, theirs, options=PumpOptions(**options))
    pump.start()
    near.sendall(b"first")
    assert await receive(far, 5) == b"first"
    return pump, near, far


async def test_a_swap_into_a_writer_waits_no_longer_than_its_deadline(
    any_loop: str, recwarn: pytest.WarningsRecorder, leak_check: None
) -> None:
    complaints = Complaints()
    pump, near, far = await plain(connect_timeout=0.2)
    reader, writer, peer = await unsent_writer()
    with near, far, peer:
        async with asyncio.timeout(20):
            with pytest.raises(ConnectDeadline):
                await pump.swap_sink((reader, writer))
        await writer.wait_closed()
        assert await drained(peer) < len(UNSENT)
        near.sendall(b"to the old one")
        assert await receive(far, 14) == b"to the old one"
        await pump.stop()
    assert complaints == []
    assert [str(one.message) for one in recwarn if "never awaited" in str(one.message)] == []


async def test_a_swap_that_is_given_up_takes_place_all_the_same(
    any_loop: str, recwarn: pytest.WarningsRecorder, leak_check: None
) -> None:
    complaints = Complaints()
    pump, near, far = await plain()
    reader, writer, peer = await unsent_writer()
    swapping = asyncio.create_task(pump.swap_sink((reader, writer)))
    await asyncio.sleep(0)  # it waits now
    swapping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await swapping
    with near, far, peer:
        assert await receive(peer, len(UNSENT)) == UNSENT
        assert await receive(far, 1) == b"", "the old one is closed when the new one is in use"
        near.sendall(b"to the new one")
        assert await receive(peer, 14) == b"to the new one"
        await pump.stop()
    assert complaints == []
    assert [str(one.message) for one in recwarn if "never awaited" in str(one.message)] == []


async def test_the_end_of_the_pump_is_the_end_of_a_swap(any_loop: str, leak_check: None) -> None:
    complaints = Complaints()
    pump, near, far = await plain()
    reader, writer, peer = await unsent_writer()
    swapping = asyncio.create_task(pump.swap_sink((reader, writer)))
    await asyncio.sleep(0)  # it waits now
    with near, far, peer:
        await pump.stop()
        async with asyncio.timeout(20):
            with pytest.raises(ClosedError):
                await swapping
        await writer.wait_closed()
        assert await drained(peer) < len(UNSENT)
    assert complaints == []


async def test_a_foreign_transport_hears_of_the_end_as_another_sink(
    any_loop: str, monkeypatch: pytest.MonkeyPatch, leak_check: None
) -> None:
    monkeypatch.setattr("sapper._foreign.LINGER", 0.1)
    pump, near, far = await plain()
    outer, peer = socket.socketpair()
    transport = InMemory(outer, asyncio.Protocol())
    with near, far, peer:
        await pump.swap_sink(transport)
        await until_it_pauses(transport, near)
        await pump.stop()
        assert await given_back(outer)


async def test_a_foreign_transport_that_is_swapped_away_is_closed(any_loop: str, leak_check: None) -> None:
    (ours, near), (outer, peer) = socket.socketpair(), socket.socketpair()
    pump = connect(ours, InMemory(outer, asyncio.Protocol()))
    pump.start()
    for _ in range(3):
        with peer:
            near.sendall(b"passes Python")
            assert await receive(peer, 13) == b"passes Python"
            old, (outer, new) = outer, socket.socketpair()
            await pump.swap_sink(InMemory(outer, asyncio.Protocol()))
            assert await receive(peer, 1) == b""
            assert await given_back(old)
        peer = new
    assert len(pump._life._subscription.at_end) == 2, "the network and the one sink"
    with near, peer:
        await pump.stop()
        assert await given_back(outer)


# -- a transport without a descriptor --------------------------------------------------------------------


async def test_a_paused_transport_does_not_outlive_its_pump(
    any_loop: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, leak_check: None
) -> None:
    """What it has not written by then is lost, and said."""
    monkeypatch.setattr("sapper._foreign.LINGER", 0.1)
    outer, peer = socket.socketpair()
    theirs, far = socket.socketpair()
    transport = InMemory(outer, asyncio.Protocol())
    pump = connect(transport, theirs)
    pump.start()
    with peer, far:
        await until_it_pauses(transport, far)
        await pump.stop()
        assert await given_back(outer)
    [said] = [record.getMessage() for record in caplog.records if "they are lost" in record.getMessage()]
    assert re.search(r"^sapper: network: a InMemory took too long for its last \d{5,} bytes", said), said


async def until_it_pauses(transport: InMemory, source: socket.socket) -> None:
    """Feeds a pump more than its transport takes: that one pauses, and stays so."""
    source.setblocking(False)
    feeding = asyncio.create_task(asyncio.get_running_loop().sock_sendall(source, UNSENT))
    async with asyncio.timeout(20):
        while not transport._asked_to_pause:
            await asyncio.sleep(0.005)
    feeding.cancel()


async def given_back(outer: socket.socket) -> bool:
    """Whether the transport gives its socket back although its peer reads nothing."""
    async with asyncio.timeout(20):
        while outer.fileno() >= 0:
            await asyncio.sleep(0.005)
    return True


class Broken(InMemory):
    """It refuses what it is given."""

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        raise RuntimeError("no room in here")


async def test_a_transport_that_fails_to_write_ends_the_pump(any_loop: str, leak_check: None) -> None:
    complaints, heard = Complaints(), list[SapperError]()
    outer, peer = socket.socketpair()
    theirs, far = socket.socketpair()
    pump = connect(Broken(outer, asyncio.Protocol()), theirs, on_error=heard.append)
    pump.start()
    with peer, far:
        far.sendall(b"lost")
        await ends_within(pump)
        assert [type(error) for error in heard] == [ConnectionLost]
        assert "no room in here" in str(heard[0])
        assert await drained(peer) == 0
    assert complaints == []


async def test_they_go_out_first_from_half_an_endpoint_too(any_loop: str, leak_check: None) -> None:
    """One of our streams to read, and a transport with unsent bytes to write."""
    _, writer, peer = await unsent_writer()
    one, other = memory_pair()
    theirs, far = socket.socketpair()
    pump = connect((one, writer.transport), theirs)
    pump.start()
    with peer, far:
        far.sendall(b"after it")
        assert await receive(peer, len(UNSENT) + 8) == UNSENT + b"after it"
        await pump.stop()
    await other.aclose()
