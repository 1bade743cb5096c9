"""Sinks that are not sockets, with bytes in them: terminals, TUN descriptors, foreign transports.

Whose each of them is in every state a bridge can end in: ``test_ownership.py``.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import select
import socket
import struct
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import pytest

from sapper.endpoint import Fd
from sapper.errors import ConnectionLost, SapperError
from sapper.tls import create_bridge, start_client
from support.bridges import PSK, closing, pair, running, send
from support.netns import Namespace
from support.traffic import Background, digest, payload, receive_all, receive_exactly, udp_packet
from support.transports import InMemory

TUNSETIFF, TUNGETIFF = 0x400454CA, 0x800454D2
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
OURS, THEIRS = "10.88.0.1", "10.88.0.2"


# -- terminals ---------------------------------------------------------------------------------------


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Master and slave of a pseudo-terminal that passes bytes as they are."""
    numbers = pty.openpty()
    tty.setraw(numbers[1])
    try:
        yield numbers
    finally:
        for number in numbers:
            os.close(number)


def look(number: int) -> tuple[int, list[object]]:
    """What a program sees of its terminal: the open file's flags and the mode."""
    return fcntl.fcntl(number, fcntl.F_GETFL), termios.tcgetattr(number)


def read_from(number: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        assert select.select([number], [], [], 10)[0], f"nothing comes after {data!r}"
        data += os.read(number, size - len(data))
    return data


@pytest.mark.parametrize("which", ["slave", "master"])
def test_a_terminal_as_sink_moves_bytes_and_is_as_before_afterwards(which: str, leak_check: None) -> None:
    with terminal() as (master, slave):
        ours, theirs = (slave, master) if which == "slave" else (master, slave)
        before = [look(number) for number in (master, slave)]
        two = pair(client_sink=ours)
        with closing(two):
            two.client.start()
            two.server.start()
            os.write(theirs, b"typed\n")
            assert receive_exactly(two.server_end, 6) == b"typed\n"
            two.server_end.sendall(b"shown\r\n" * 100)
            assert read_from(theirs, 700) == b"shown\r\n" * 100
            if which == "slave":  # opened a second time: not even meanwhile is the caller's changed
                assert look(slave) == before[1]
        assert [look(number) for number in (master, slave)] == before
        # The caller reads and writes as before.
        os.write(ours, b"mine")
        assert read_from(theirs, 4) == b"mine"
        os.write(theirs, b"back")
        assert read_from(ours, 4) == b"back"


# -- a TUN descriptor that the caller keeps ----------------------------------------------------------


def open_tun(flags: int) -> int:
    """Makes the interface ``given0``, as a program does that wants to keep its descriptor."""
    number = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(number, TUNSETIFF, struct.pack("16sH22x", b"given0", flags))
    return number


def name_of(number: int) -> bytes:
    """The interface that belongs to a descriptor."""
    answer: bytes = fcntl.ioctl(number, TUNGETIFF, bytes(40))
    return answer[:16].rstrip(b"\0")


def exists(place: Namespace, interface: str) -> bool:
    with suppress(AssertionError):
        place.ip(f"link show {interface}")
        return True
    return False


@pytest.mark.needs("namespaces", "tun")
@pytest.mark.parametrize("header", [None, "vnet"])
def test_a_tun_descriptor_stays_the_callers(
    header: Literal["vnet"] | None, two_namespaces: tuple[Namespace, Namespace], leak_check: None
) -> None:
    place, _ = two_namespaces
    flags = IFF_TUN | IFF_NO_PI | (IFF_VNET_HDR if header else 0)
    number = place.call(lambda: open_tun(flags))
    try:
        place.ip(f"address add {OURS}/24 dev given0")
        place.ip("link set given0 up")
        before = fcntl.fcntl(number, fcntl.F_GETFL)
        two = pair(
            socket.SOCK_DGRAM, client_sink=Fd(number, header=header) if header else number, framing="ipv4"
        )
        with closing(two), place.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as inside:
            inside.bind((OURS, 5000))
            inside.settimeout(20)
            two.client.start()
            two.server.start()
            # From the network into the interface, and back out of it.
            two.server_end.send(udp_packet(THEIRS, OURS, b"into the interface"))
            data, peer = inside.recvfrom(100)
            assert (data, peer[0]) == (b"into the interface", THEIRS)
            inside.sendto(b"and out of it", (THEIRS, 4000))
            two.server_end.settimeout(20)
            while not (packet := two.server_end.recv(2000)).endswith(b"and out of it"):
                assert packet[:1] == b"E", "the framing carries nothing else"
            two.client.stop()
            two.client.wait_closed_sync(20)
            # The descriptor is ours again as it was, and so is the interface.
            assert fcntl.fcntl(number, fcntl.F_GETFL) == before
            assert name_of(number) == b"given0"
            assert exists(place, "given0")
            os.write(number, (bytes(10) if header else b"") + udp_packet(THEIRS, OURS, b"by hand"))
            assert inside.recv(100) == b"by hand"
    finally:
        os.close(number)
    assert not exists(place, "given0"), "nobody else holds it open"


# -- transports without a descriptor -----------------------------------------------------------------


def send_all(end: socket.socket, data: bytes) -> None:
    """The bytes and the end behind them."""
    end.sendall(data)
    end.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("place", ["network", "sink"])
async def test_every_byte_passes_a_transport_without_a_descriptor(
    place: str, any_loop: str, leak_check: None
) -> None:
    """Both ways at once, far more than any queue holds; then one direction ends and the other goes on."""
    outer, near = socket.socketpair()
    transport = InMemory(outer, asyncio.Protocol())
    if place == "network":
        two = pair(wire=(transport, near))
        ours = two.client_end
    else:
        two = pair(client_sink=transport)
        ours = near
    up, down, later = payload(3_000_000, 1), payload(3_000_000, 2), payload(500_000, 3)
    async with running(two):
        theirs = two.server_end
        for end in (ours, theirs):
            end.setblocking(True)
        got: dict[str, bytes] = {}
        jobs = [
            Background(lambda: send_all(ours, up)),
            Background(lambda: theirs.sendall(down)),
            Background(lambda: got.update(up=receive_all(theirs))),
            Background(lambda: got.update(down=receive_exactly(ours, len(down)))),
        ]
        await asyncio.gather(*(asyncio.to_thread(job.join) for job in jobs))
        assert digest(got["up"]) == digest(up), "whole, and its end behind it"
        assert digest(got["down"]) == digest(down)
        sending = Background(lambda: send_all(theirs, later))
        assert digest(await asyncio.to_thread(receive_all, ours)) == digest(later)
        sending.join()
        async with asyncio.timeout(20):
            await two.client.wait_closed()
            await two.server.wait_closed()
        assert (two.client.error, two.server.error) == (None, None)
        async with asyncio.timeout(20):
            while not transport.is_closing():
                await asyncio.sleep(0.005)
    near.close()


async def test_what_was_received_when_a_transport_is_closed_is_still_delivered(leak_check: None) -> None:
    """More than the queue holds arrives at once, in spite of a pause, and the end right behind it."""
    outer, near = socket.socketpair()
    protocol = asyncio.Protocol()
    transport = InMemory(outer, protocol)
    data = payload(2_000_000)
    two = pair(client_sink=transport)
    with near:
        async with running(two):
            door = transport.get_protocol()
            assert isinstance(door, asyncio.Protocol)
            assert door is not protocol
            for start in range(0, len(data), 700_000):
                door.data_received(data[start : start + 700_000])
            transport.close()
            got = await asyncio.to_thread(receive_all, two.server_end)
            assert digest(got) == digest(data)
            assert transport.get_protocol() is protocol, "as it was before"


async def test_a_transport_that_is_closed_ends_the_bridge_that_has_bytes_for_it(leak_check: None) -> None:
    outer, near = socket.socketpair()
    transport = InMemory(outer, asyncio.Protocol())
    two = pair(client_sink=transport, close_timeout=0.2)
    with near:
        async with running(two):
            transport.close()
            with suppress(BrokenPipeError):
                await send(two.server_end, bytes(1_000_000))
            async with asyncio.timeout(20):
                with pytest.raises(ConnectionLost) as caught:
                    await two.client.wait_closed()
            assert caught.value.context.direction == "decapsulate"
            assert transport.late_writes == 0


async def test_nothing_is_written_to_a_transport_that_is_closing(leak_check: None) -> None:
    """It still has bytes to deliver, so that it is not closed at once, and more come from the peer."""
    outer, near = socket.socketpair()
    outer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    transport = InMemory(outer, asyncio.Protocol())
    two = pair(client_sink=transport)
    with near:
        async with running(two):
            await send(two.server_end, bytes(50_000))
            async with asyncio.timeout(20):
                while two.client.stats().decapsulate.bytes < 50_000:
                    await asyncio.sleep(0.005)
            near.setblocking(True)
            assert await asyncio.to_thread(receive_exactly, near, 1_000) == bytes(1_000), "it has begun"
            transport.close()
            await send(two.server_end, bytes(50_000))
            # All that it had taken before comes out, and its end behind that.
            assert await asyncio.to_thread(receive_all, near)
            async with asyncio.timeout(20):
                with pytest.raises(ConnectionLost):
                    await two.client.wait_closed()
            assert transport.late_writes == 0


async def test_a_transport_that_is_lost_says_why(leak_check: None) -> None:
    outer, near = socket.socketpair()
    transport = InMemory(outer, asyncio.Protocol())
    two = pair(client_sink=transport)
    with near:
        async with running(two):
            door = transport.get_protocol()
            assert isinstance(door, asyncio.Protocol)
            door.connection_lost(ConnectionResetError(104, "the cable is cut"))
            async with asyncio.timeout(20):
                with pytest.raises(SapperError, match="the cable is cut") as caught:
                    await two.client.wait_closed()
            assert caught.value.context.errno == 104
            transport.abort()


async def test_a_sink_whose_connection_breaks_is_no_orderly_end(leak_check: None) -> None:
    """Behind close_notify the peer would take half an answer for all of it."""
    near, far = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        bridge = create_bridge(
            socket=near, sink=listener.getsockname(), credentials=PSK, server_side=True, on_error=print
        )
        bridge.start()
        client = await start_client(far, credentials=PSK)
        service, _ = await asyncio.to_thread(listener.accept)
    service.sendall(b"half of it")
    async with asyncio.timeout(25):
        assert await client.readexactly(10) == b"half of it"
        service.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        service.close()
        with pytest.raises(SapperError) as caught:
            await client.read()
        assert caught.value.context.alert == 80
        client.abort()
        await client.wait_closed()
        await bridge.wait_closed()
    assert isinstance(bridge.error, ConnectionLost)
