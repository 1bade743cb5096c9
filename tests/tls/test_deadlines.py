"""Ends that come too late: of a close that cannot deliver all, of a listener whose queue stays full."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from sapper.errors import CloseDeadline, ConnectDeadline, ConnectionLost, IdleDeadline, SapperError
from sapper.pump import PumpOptions, connect
from support.bridges import closing, pair, running


def tcp_with_little_room(sends: int | None = None) -> tuple[socket.socket, socket.socket]:
    """A connection of which the second end takes in little, and the first sends little at a time."""
    near = socket.socket()
    if sends is not None:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sends)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        near.connect(listener.getsockname())
        return near, listener.accept()[0]


async def test_a_close_that_cannot_deliver_all_says_so(any_loop: str, leak_check: None) -> None:
    """Who closes orderly learns what was lost; ``stop()`` asks for that, and hears nothing."""
    for how in ("aclose", "async with", "shortened", "stop"):
        (near, far), (sink, end) = socket.socketpair(), socket.socketpair()
        heard: list[SapperError] = []
        pump = connect(near, sink, options=PumpOptions(close_timeout=0.1), on_error=heard.append)
        with far, end:
            await pump.open()
            pump.start()
            far.setblocking(False)
            while not pump.stats().decapsulate.backpressure:  # nobody reads at the other end
                with suppress(BlockingIOError):
                    far.send(bytes(65_536))
                await asyncio.sleep(0)
            async with asyncio.timeout(20):
                if how == "aclose":
                    await pump.aclose()
                elif how == "async with":
                    async with pump:
                        pass
                else:
                    pump.stop(drain=60.0 if how == "shortened" else 0.0)
                    await pump.stop()
        if how in ("shortened", "stop"):
            assert (heard, pump.error) == ([], None)
            continue
        assert [type(one) for one in heard] == [CloseDeadline]
        assert pump.error is heard[0]


@pytest.mark.parametrize("framing", ["raw", "u16"])
async def test_what_a_reset_cuts_off_a_drain_is_told(leak_check: None, framing: str) -> None:
    """The bridge has taken all of it, and the peer broke off before it left: no drain has delivered that."""
    kind = socket.SOCK_STREAM if framing == "raw" else socket.SOCK_SEQPACKET
    with closing(pair(kind, wire=tcp_with_little_room(sends=4096), framing=framing)) as two:
        await asyncio.gather(two.client.handshake(), two.server.handshake())
        two.client.start()  # and the peer does not: it reads nothing
        for _ in range(200):
            two.client_end.send(bytes(1000))
        async with asyncio.timeout(20):
            while two.client.stats().encapsulate.bytes < 200_000:
                await asyncio.sleep(0)
            assert two.client.stats().transport.bytes_sent < 200_000
            stopping = asyncio.ensure_future(two.client.stop(drain=60.0))
            while two.client.state != "draining":
                await asyncio.sleep(0)
            two.server.abort()
            with pytest.raises(ConnectionLost):
                await stopping
        assert isinstance(two.client.error, ConnectionLost)


async def test_a_drain_waits_until_a_sink_has_what_it_was_given(leak_check: None) -> None:
    """Closed with bytes to read, the sink's TCP would throw away what its peer has not read yet."""
    (near, far), (sink, end) = socket.socketpair(), tcp_with_little_room()
    with far, end:
        pump = connect(near, sink)
        await pump.open()
        pump.start()
        far.sendall(bytes(100_000))
        async with asyncio.timeout(20):
            while pump.stats().decapsulate.bytes < 100_000:
                await asyncio.sleep(0)
            stopping = asyncio.ensure_future(pump.stop(drain=60.0))
            loop = asyncio.get_running_loop()
            far.setblocking(False)
            assert await loop.sock_recv(far, 1) == b""  # nothing more is moved
            await asyncio.wait([stopping], timeout=0.1)  # it would be over now if it waited for nobody
            read = 0
            end.setblocking(False)
            with suppress(ConnectionError):
                while data := await loop.sock_recv(end, 1000):
                    read += len(data)
                    with suppress(ConnectionError):
                        end.send(b"x")  # which nobody reads any more
            await stopping
        assert read == 100_000


async def test_a_drain_of_no_time_loses_nothing_where_nothing_waits(leak_check: None) -> None:
    async with running(pair()) as two:
        await two.client.stop(drain=1e-9)
        assert two.client.error is None


async def test_a_short_time_is_told_as_it_is(leak_check: None) -> None:
    (near, far), (sink, end) = socket.socketpair(), socket.socketpair()
    with far, end:
        pump = connect(near, sink, options=PumpOptions(idle_timeout=0.002))
        pump.start()
        with pytest.raises(IdleDeadline, match=r"for 0\.002 s"):
            await pump.wait_closed()


@pytest.mark.parametrize("accepts", [True, False])
async def test_a_seqpacket_listener_with_a_full_queue_is_waited_for(
    tmp_path: Path, leak_check: None, *, accepts: bool
) -> None:
    with ExitStack() as ours:
        listening = ours.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listening.bind(str(tmp_path / "s"))
        listening.listen(0)
        with suppress(BlockingIOError):
            while True:
                other = ours.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                other.setblocking(False)
                other.connect(str(tmp_path / "s"))
        options = PumpOptions(connect_timeout=20.0 if accepts else 0.2)
        pump = connect("counter:", f"seqpacket:{tmp_path / 's'}", options=options)
        opening = asyncio.create_task(pump.open())
        if accepts:
            await asyncio.wait([opening], timeout=0.05)
            assert not opening.done()
            ours.enter_context(listening.accept()[0])
            await opening
        else:
            with pytest.raises(ConnectDeadline, match="its queue is full") as caught:
                await opening
            assert caught.value.field == "sink"
        await pump.stop()
