"""Control of a bridge that runs: pause, another sink, new keys, taps."""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from sapper.errors import (
    ApiMisuseError,
    ClosedError,
    ConfigError,
    NotStartedError,
    ResourceError,
    SapperError,
)
from sapper.pump import PumpOptions, TapOptions
from sapper.stream import memory_pair
from sapper.testing import Load
from sapper.tls import TlsConfig
from support import traffic
from support.bridges import PSK, pair, receive, running, send


async def test_pause_and_resume(leak_check: None) -> None:
    async with running(pair()) as two:
        two.server.pause("decapsulate")
        await send(two.client_end, b"waits")
        two.server_end.setblocking(False)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.get_running_loop().sock_recv(two.server_end, 1), 0.1)
        two.server.resume("decapsulate")
        assert await receive(two.server_end, 5) == b"waits"
        with pytest.raises(ConfigError) as caught:
            two.server.pause("sideways")  # type: ignore[arg-type]
        assert caught.value.field == "direction"


async def test_pauses_in_a_loop_are_never_too_many(leak_check: None) -> None:
    async with running(pair()) as two:
        for _ in range(1_000):
            two.server.pause("decapsulate")
            two.server.resume("decapsulate")
        await two.server.update_keys()  # nothing of that is in the way of other calls
        await send(two.client_end, b"flows")
        assert await receive(two.server_end, 5) == b"flows"


async def test_swap_sink_loses_nothing(leak_check: None) -> None:
    two = pair()
    async with running(two):
        await send(two.client_end, b"one")
        assert await receive(two.server_end, 3) == b"one"
        new, end = socket.socketpair()
        with end:
            await two.server.swap_sink(new)
            assert new.fileno() == -1
            await send(two.client_end, b"two")
            assert await receive(end, 3) == b"two"
            with pytest.raises(ConfigError) as caught:
                await two.server.swap_sink(object())  # type: ignore[arg-type]
            assert caught.value.field == "sink"


async def test_a_sink_that_does_not_fit_the_framing_is_to_blame(leak_check: None) -> None:
    async with running(pair(socket.SOCK_SEQPACKET, framing="ip")) as two:
        with pytest.raises(ConfigError) as caught:
            await two.client.swap_sink("tap:none0")
        assert caught.value.field == "sink"


async def test_a_new_sink_gets_what_the_old_one_did_not_want(leak_check: None) -> None:
    mine, far = memory_pair()
    two = pair(client_sink=mine)
    two.client.pause("encapsulate")  # the old sink's end is not to end the bridge's direction
    async with running(two), asyncio.timeout(20):
        await send(two.server_end, b"one")
        assert await far.readexactly(3) == b"one"
        far.close()
        await far.wait_closed()
        await two.client.update_keys()  # behind a call a pump looks at its ends
        new, end = socket.socketpair()
        with end:
            await two.client.swap_sink(new)
            two.client.resume("encapsulate")
            await send(two.server_end, b"two")
            assert await receive(end, 3) == b"two"
            await send(end, b"back")
            assert await receive(two.server_end, 4) == b"back"


async def test_what_an_old_sink_ended_stays_ended(leak_check: None) -> None:
    """close_notify cannot be taken back: the new sink is written to, and not read."""
    async with running(pair()) as two, asyncio.timeout(20):
        two.client_end.shutdown(socket.SHUT_WR)
        assert await receive(two.server_end, 1) == b""
        new, end = socket.socketpair()
        with end:
            await two.client.swap_sink(new)
            await send(end, b"up")
            await send(two.server_end, b"down")
            assert await receive(end, 4) == b"down"
            two.server_end.shutdown(socket.SHUT_WR)
            await two.client.wait_closed()
            assert two.client.stats().encapsulate.bytes == 0


@pytest.mark.parametrize("ends_by", ["stop", "drain", "abort", "aclose", "peer", "error"])
async def test_a_swap_ends_with_the_bridge(ends_by: str, tmp_path: Path, leak_check: None) -> None:
    listening = tmp_path / "sink"
    async with running(pair()) as two, asyncio.timeout(20):
        swapping = asyncio.create_task(two.client.swap_sink(f"unix-listen:{listening}"))
        while not listening.exists():
            await asyncio.sleep(0.001)
        match ends_by:
            case "stop":
                two.client.stop()
            case "drain":
                two.client.stop(1.0)
            case "abort":
                two.client.abort()
            case "aclose":
                await two.client.aclose()
            case "peer":
                two.client_end.close()
                two.server_end.close()
            case _:
                two.server.abort()
        with pytest.raises(ClosedError):
            await swapping
        assert not listening.exists(), "nobody is waited for any more"


async def test_exporter_and_key_update(leak_check: None) -> None:
    async with running(pair()) as two:
        ours, theirs = await asyncio.gather(
            two.client.export_keying_material("EXPERIMENTAL x", 32, b"context"),
            two.server.export_keying_material("EXPERIMENTAL x", 32, b"context"),
        )
        assert ours == theirs
        assert len(ours) == 32
        assert ours != await two.client.export_keying_material("EXPERIMENTAL x", 32, b"other")
        await two.client.update_keys()
        await send(two.client_end, b"new keys")
        assert await receive(two.server_end, 8) == b"new keys"
        for length in (0, 8_161, 65_536):  # the suite's hash is SHA-256
            with pytest.raises(ConfigError) as caught:
                await two.client.export_keying_material("x", length)
            assert caught.value.field == "length"
        for label in ("", "x" * 250):
            with pytest.raises(ConfigError) as caught:
                await two.client.export_keying_material(label, 16)
            assert caught.value.field == "label"
        for _ in range(100):
            await two.client.update_keys()  # no flood of records to the peer
        await send(two.client_end, b"newer keys")
        assert await receive(two.server_end, 10) == b"newer keys"
        assert "packet" not in two.client.stats().facts["offload.ktls"]  # this bridge carries bytes


async def test_who_gives_up_a_channel_binding_leaves_the_bridge_alone(leak_check: None) -> None:
    async with running(pair()) as two:
        asking = asyncio.ensure_future(two.client.channel_binding())
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await two.client.channel_binding() == await two.server.channel_binding()
        await send(two.client_end, b"goes on")
        assert await receive(two.server_end, 7) == b"goes on"


async def test_the_channel_binding_of_tls_1_2_is_not_defined(leak_check: None) -> None:
    options = TlsConfig(credentials=PSK, max_version="TLSv1.2")
    async with running(pair(credentials=options)) as two:
        with pytest.raises(ApiMisuseError, match=r"needs TLS 1\.3"):
            await two.client.channel_binding()


async def test_what_needs_a_handshake_says_so(leak_check: None) -> None:
    two = pair()
    client = two.client
    for call in (client.update_keys(), client.export_keying_material("x", 16), client.channel_binding()):
        with pytest.raises(NotStartedError):
            await call
    assert client.state == "new"
    with pytest.raises(NotStartedError):
        await two.client.swap_sink("null:")
    with pytest.raises(ApiMisuseError, match="wait_closed"):
        await two.client.unused_data()
    for end in (two.client_end, two.server_end):
        end.close()
    await two.client.stop()
    await two.server.stop()
    assert await two.client.unused_data() == b""


async def test_a_tap_writes_packets(tmp_path: Path, leak_check: None) -> None:
    file = tmp_path / "out.pcapng"
    async with running(pair(socket.SOCK_DGRAM, framing="ipv6")) as two:
        await two.client.tap(file, max_bytes=1_000_000)
        source = Load.source(two.client_end.fileno(), "packet", 1280, rate=1000)
        async with asyncio.timeout(20):
            while two.client.stats().encapsulate.packets < 10:
                await asyncio.sleep(0.01)
        source.stop()
        await two.client.untap()
        with pytest.raises(ConfigError) as caught:
            await two.client.tap(file, filter="no such language (")
        assert caught.value.field == "filter"
    data = file.read_bytes()
    assert data.startswith(b"\x0a\x0d\x0d\x0a")
    assert len(data) > 10 * 1280


async def test_a_tap_that_was_set_before_the_start_has_the_first_packet(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("option.pcapng", "ready.pcapng")]
    first = traffic.udp_packet("fd00::1", "fd00::2", b"the very first")
    second = traffic.udp_packet("fd00::2", "fd00::1", b"the answer to it")
    two = pair(
        socket.SOCK_DGRAM,
        framing="ipv6",
        options=PumpOptions(tap=TapOptions(path=files[0])),
    )
    with two.client_end, two.server_end:
        await asyncio.gather(two.client.handshake(), two.server.handshake())
        await two.server.tap(files[1])  # shaken hands, and nothing flows yet
        two.client_end.send(first)
        two.client.start()
        two.server.start()
        assert await receive(two.server_end, len(first)) == first
        await send(two.server_end, second)
        assert await receive(two.client_end, len(second)) == second
        await two.client.stop(20.0)
        with suppress(SapperError):
            await two.server.stop(20.0)
    for file in files:
        data = file.read_bytes()
        assert 0 < data.find(first) < data.find(second)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
async def test_a_tap_that_cannot_write_says_so(leak_check: None) -> None:
    packet = traffic.udp_packet("fd00::1", "fd00::2", b"seen by nobody")
    async with running(pair(socket.SOCK_DGRAM, framing="ipv6")) as two:
        await two.server.tap("/dev/full")
        two.client_end.send(packet)
        assert await receive(two.server_end, len(packet)) == packet
        with pytest.raises(ResourceError, match="No space left") as caught:
            await two.server.untap()
        assert caught.value.field == "tap"
        assert caught.value.errno == caught.value.context.errno == errno.ENOSPC
        assert two.server.stats().facts["tap"].startswith("off: No space left")
        assert two.server.stats().facts["tap"].endswith("0 packets written, 1 lost")
        assert two.server.state == "running"
        # It is told once, whatever else fails afterwards.
        await two.server.untap()
        with pytest.raises(ResourceError, match="create /dev/null/none"):
            await two.server.tap("/dev/null/none")
        await two.server.untap()


async def test_a_tap_counts_what_it_wrote(tmp_path: Path, leak_check: None) -> None:
    packet = traffic.udp_packet("fd00::1", "fd00::2", bytes(500))
    async with running(pair(socket.SOCK_DGRAM, framing="ipv6")) as two:
        await two.server.tap(tmp_path / "tap.pcapng", max_bytes=2000)
        for _ in range(4):
            two.client_end.send(packet)
            assert await receive(two.server_end, len(packet)) == packet
        await two.server.untap()
        assert two.server.stats().facts["tap"] == "full: 3 packets written, 0 lost"
