"""Packets in the stream, and what is said before them: resynchronising, the hello of a device tunnel."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import replace
from ipaddress import ip_address
from typing import Any, Literal

import pytest

from sapper.errors import ConfigError, IncompatiblePeer, RemoteProtocolError, SapperError
from sapper.pump import PumpOptions
from sapper.tls import Bridge, CdTunnelParameters, Credentials, create_bridge
from support import traffic
from support.bridges import receive

PSK = Credentials.psk("x", bytes(range(32)))


async def joined(**options: Any) -> tuple[Bridge, Bridge, socket.socket, socket.socket]:
    """A bridge with the given options, facing one without framing whose sink is in our hands."""
    near, far = socket.socketpair()
    sink, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    raw, hand = socket.socketpair()
    bridge = create_bridge(socket=near, sink=sink, credentials=PSK, **options)
    peer = create_bridge(socket=far, sink=raw, credentials=PSK, server_side=True)
    await asyncio.gather(bridge.handshake(), peer.handshake())
    bridge.start()
    peer.start()
    return bridge, peer, end, hand


async def test_resync_goes_on_at_the_next_record(leak_check: None) -> None:
    bridge, peer, end, hand = await joined(framing="ipv6", resync=True)
    packet = b"\x60\x00\x00\x00\x00\x04\x3b\x40" + bytes(32) + b"data"
    loop = asyncio.get_running_loop()
    end.setblocking(False)
    with end, hand:
        hand.sendall(b"\x00" * 100)
        while not bridge.stats().decapsulate.drops:
            await asyncio.sleep(0.005)
        hand.sendall(packet)
        async with asyncio.timeout(20):
            assert await loop.sock_recv(end, 2000) == packet
        assert set(bridge.stats().decapsulate.drops) == {"resync"}
        await asyncio.gather(bridge.stop(), peer.stop(), return_exceptions=True)


async def test_packets_are_counted_where_they_went(leak_check: None) -> None:
    """Delivered is what left; what was dropped is dropped in the direction in which it was on its way."""
    bridge, peer, end, hand = await joined(framing="ipv4", options=PumpOptions(max_packet=100))
    good = traffic.udp_packet("10.0.0.1", "10.0.0.2", b"delivered")
    with end, hand:
        for packet in (
            traffic.udp_packet("fd00::1", "fd00::2", b"not of this framing"),
            traffic.udp_packet("10.0.0.1", "10.0.0.2", bytes(100)),
            good,
        ):
            end.send(packet)
        assert await receive(hand, len(good)) == good
        async with asyncio.timeout(20):
            while sum(bridge.stats().encapsulate.drops.values()) < 2:
                await asyncio.sleep(0.005)
        stats = bridge.stats()
        assert stats.encapsulate.drops == {"malformed": 1, "too_large": 1}
        assert (stats.encapsulate.packets, stats.encapsulate.bytes) == (1, len(good))
        assert stats.decapsulate.drops == {}
        await asyncio.gather(bridge.stop(), peer.stop(), return_exceptions=True)


def whole(size: int) -> bytes:
    """An IP packet of that size."""
    return traffic.udp_packet("10.0.0.1", "10.0.0.2", bytes(size - 28))


def superframe(packet: bytes) -> bytes:
    """The packet in one, as docs/framing.md has it: nothing is partial, nothing to be cut."""
    return struct.pack(">I", 10 + len(packet)) + bytes(10) + packet


async def superframes(max_packet: int, theirs: int) -> tuple[Bridge, Bridge, socket.socket, socket.socket]:
    """As :func:`joined`, of superframes: the far end takes packets of ``theirs`` bytes."""
    near, far = socket.socketpair()
    sink, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    raw, hand = socket.socketpair()
    bridge = create_bridge(
        socket=near,
        sink=sink,
        credentials=PSK,
        framing="superframe",
        options=PumpOptions(max_packet=max_packet),
    )
    peer = create_bridge(socket=far, sink=raw, credentials=PSK, server_side=True)
    hello = b"SAPPERSF" + struct.pack(">BBHI", 1, 1, 7, theirs)
    hand.sendall(hello)
    shaken = asyncio.create_task(bridge.handshake())
    await peer.handshake()
    peer.start()
    await shaken
    bridge.start()
    said = await receive(hand, len(hello))
    assert struct.unpack(">8sBBHI", said)[::4] == (b"SAPPERSF", max_packet), "it says what it takes"
    return bridge, peer, end, hand


@pytest.mark.parametrize(("max_packet", "theirs"), [(2000, 65_535), (65_535, 2000), (2000, 1500)])
async def test_the_longest_superframe_is_sent(max_packet: int, theirs: int, leak_check: None) -> None:
    most = min(max_packet, theirs)
    bridge, peer, end, hand = await superframes(max_packet, theirs)
    with end, hand:
        for size in (most + 1, most):
            end.send(whole(size))
        assert await receive(hand, 14 + most) == superframe(whole(most))
        stats = bridge.stats().encapsulate
        assert (stats.packets, stats.bytes, stats.drops) == (1, most, {"too_large": 1})
        await asyncio.gather(bridge.stop(), peer.stop(), return_exceptions=True)


@pytest.mark.parametrize("most", [1280, 2000, 65_535])
async def test_the_longest_superframe_is_taken(most: int, leak_check: None) -> None:
    bridge, peer, end, hand = await superframes(most, 65_535)
    with end, hand:
        hand.sendall(superframe(whole(most)))
        assert await receive(end, most) == whole(most)
        too_large = bytes(most + 1) if most == 65_535 else whole(most + 1)
        hand.sendall(superframe(too_large))
        async with asyncio.timeout(20):
            with pytest.raises(RemoteProtocolError) as caught:
                await bridge.wait_closed()
        assert (caught.value.phase, caught.value.direction) == ("transfer", "decapsulate")
        assert bridge.stats().decapsulate.packets == 1
        await asyncio.gather(peer.stop(), return_exceptions=True)


async def test_a_bad_device_tunnel_hello(leak_check: None) -> None:
    near, far = socket.socketpair()
    raw, hand = socket.socketpair()
    bridge = create_bridge(socket=near, sink="counter:", framing="ipv6", credentials=PSK)
    peer = create_bridge(socket=far, sink=raw, credentials=PSK, server_side=True)
    with hand:
        await asyncio.gather(bridge.handshake(), peer.handshake())
        peer.start()
        hand.sendall(b"CDTunnel\x00\x02{}")
        async with asyncio.timeout(20):
            with pytest.raises((RemoteProtocolError, IncompatiblePeer)) as caught:
                await bridge.cdtunnel_handshake(1280)
            assert caught.value.phase == "handshake"
            await bridge.wait_closed()
        await asyncio.gather(peer.stop(), return_exceptions=True)


async def test_both_roles_of_a_device_tunnel(leak_check: None) -> None:
    ours, theirs = socket.socketpair()
    client = create_bridge(socket=ours, sink="counter:", framing="ipv6", credentials=PSK)
    server = create_bridge(socket=theirs, sink="counter:", framing="ipv6", credentials=PSK, server_side=True)
    await asyncio.gather(client.handshake(), server.handshake())
    offered = CdTunnelParameters(ip_address("fd00::2"), 64, 1280, ip_address("fd00::1"), 58_783)
    granted, accepted = await asyncio.gather(
        client.cdtunnel_handshake(16_000), server.cdtunnel_accept(offered)
    )
    assert granted == accepted == offered
    await asyncio.gather(client.stop(), server.stop(), return_exceptions=True)


async def test_no_tunnel_of_ipv6_has_an_mtu_below_1280(leak_check: None) -> None:
    async def greeting(framing: Literal["ip", "ipv6"], mtu: int) -> list[object]:
        ours, theirs = socket.socketpair()
        client = create_bridge(socket=ours, sink="counter:", framing=framing, credentials=PSK)
        server = create_bridge(
            socket=theirs, sink="counter:", framing=framing, credentials=PSK, server_side=True
        )
        await asyncio.gather(client.handshake(), server.handshake())
        if framing == "ipv6":  # our own mistake: nothing is said to the peer
            with pytest.raises(ConfigError) as caught:
                await client.cdtunnel_handshake(mtu)
            assert caught.value.field == "mtu"
            assert client.state == "ready"
            mtu = 1280
        both = client.cdtunnel_handshake(mtu), server.cdtunnel_accept(offered)
        outcomes: list[object] = list(await asyncio.gather(*both, return_exceptions=True))
        await asyncio.gather(client.stop(), server.stop(), return_exceptions=True)
        return outcomes

    offered = CdTunnelParameters(ip_address("fd00::2"), 64, 4000, ip_address("fd00::1"), 58_783)
    granted = replace(offered, mtu=1280)
    assert await greeting("ip", 1280) == await greeting("ipv6", 1279) == [granted, granted]
    asked, refused = await greeting("ip", 1279)
    assert isinstance(refused, RemoteProtocolError)
    assert refused.message == "CDTunnel hello: mtu: 1279 is not a number in range"
    assert isinstance(asked, SapperError)  # it is told nothing, and nothing was granted
