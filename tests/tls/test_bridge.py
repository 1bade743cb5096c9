"""The bridge as Python sees it: its life, call-backs, cancellation; on asyncio, uvloop and without a loop."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, Literal

import pytest

from sapper import tls
from sapper.errors import (
    ApiMisuseError,
    BusyError,
    CertificateError,
    ClosedError,
    ConfigError,
    ConnectionLost,
    CredentialsRejected,
    HandshakeDeadline,
    IdleDeadline,
    NotStartedError,
    PolicyDenied,
    SapperError,
)
from sapper.events import Closed, Event, Started
from sapper.testing import Load, ThrowawayCertificates, throwaway_certificates
from sapper.tls import Credentials, create_bridge
from support import traffic
from support.bridges import PSK, Pair, closing, pair, receive, running, send


@pytest.fixture(scope="module")
def made() -> ThrowawayCertificates:
    return throwaway_certificates("localhost")


async def test_bytes_pass_both_ways(any_loop: str, leak_check: None, made: ThrowawayCertificates) -> None:
    two = pair(
        server={"credentials": made.server_credentials(ask_clients=True)},
        credentials=made.client_credentials(),
        server_hostname="localhost",
    )
    async with running(two):
        info = await two.client.handshake()  # asked again
        assert (info.version, info.engine) == ("TLSv1.3", "rustls")
        assert info.peer_certificate is not None
        seen = await two.server.handshake()
        assert seen.server_name == "localhost"
        assert seen.peer_certificate is not None
        await send(two.client_end, b"hello")
        assert await receive(two.server_end, 5) == b"hello"
        await send(two.server_end, b"and back")
        assert await receive(two.client_end, 8) == b"and back"
        # The other end may have the bytes before they are counted.
        async with asyncio.timeout(20):
            while (stats := two.client.stats()).decapsulate.bytes < 8:
                await asyncio.sleep(0)
        assert (stats.encapsulate.bytes, stats.decapsulate.bytes) == (5, 8)
        assert stats.transport.records_sent == 1
        assert stats.running > 0


async def test_two_that_send_without_a_pause_do_not_wait_for_each_other(leak_check: None) -> None:
    two = pair()
    async with running(two):
        ends = [end.fileno() for end in (two.client_end, two.server_end)]
        meters = [Load.meter(end, "block", 16_384) for end in ends]
        sources = [Load.source(end, "block", 16_384) for end in ends]
        async with asyncio.timeout(30):
            while min(meter.stats().bytes for meter in meters) < 30_000_000:
                await asyncio.sleep(0.01)
        for load in (*sources, *meters):
            load.stop()
        assert [meter.stats().torn + meter.stats().lost for meter in meters] == [0, 0]


async def test_packets_keep_their_bounds(any_loop: str, leak_check: None) -> None:
    two = pair(socket.SOCK_DGRAM, framing="ipv6")
    async with running(two):
        meter = Load.meter(two.server_end.fileno(), "packet", 1280)
        source = Load.source(two.client_end.fileno(), "packet", 1280, rate=20_000)
        async with asyncio.timeout(20):
            while meter.stats().units < 5_000:
                await asyncio.sleep(0.01)
        source.stop()
        meter.stop()
        assert (meter.stats().lost, meter.stats().torn) == (0, 0)
        # The other end may have a packet before it is counted.
        async with asyncio.timeout(20):
            while two.client.stats().encapsulate.packets < 5_000:
                await asyncio.sleep(0.01)


async def test_half_close_is_kept(any_loop: str, leak_check: None) -> None:
    async with running(pair()) as two:
        await send(two.client_end, b"question")
        two.client_end.shutdown(socket.SHUT_WR)
        assert await receive(two.server_end, 100) == b"question"
        await send(two.server_end, b"answer")
        two.server_end.shutdown(socket.SHUT_WR)
        assert await receive(two.client_end, 100) == b"answer"
        async with asyncio.timeout(20):
            await two.client.wait_closed()
            await two.server.wait_closed()
        assert two.client.error is None


async def test_start_alone_does_the_handshake(any_loop: str, leak_check: None) -> None:
    two = pair()
    two.client.start()
    two.server.start()
    await send(two.client_end, b"x")
    assert await receive(two.server_end, 1) == b"x"
    with pytest.raises(ApiMisuseError):
        two.client.start()
    await two.client.aclose()
    two.server_end.close()
    two.client_end.close()
    await two.server.wait_closed()


async def test_a_failure_of_start_goes_to_on_error_once_and_on_close_comes_last(any_loop: str) -> None:
    heard: list[object] = []
    two = pair(
        server={"credentials": Credentials.psk("x", bytes(32))},
        on_error=heard.append,
        on_close=lambda: heard.append("closed"),
    )
    with closing(two):
        two.client.start()
        with pytest.raises(SapperError):
            await two.server.handshake()
        await two.client.wait_closed()  # on_error has heard it
        assert [type(one) for one in heard] == [CredentialsRejected, str]
        assert two.client.error is heard[0]


async def test_an_error_that_handshake_raised_is_not_told_again(any_loop: str) -> None:
    heard: list[object] = []
    two = pair(server={"credentials": Credentials.psk("x", bytes(32))}, on_error=heard.append)
    with closing(two):
        results = await asyncio.gather(two.client.handshake(), two.server.handshake(), return_exceptions=True)
        assert all(isinstance(one, CredentialsRejected) for one in results), results
        await two.client.wait_closed()
        assert heard == []
        assert two.client.error is results[0]


async def test_an_error_that_nobody_heard_is_raised_by_wait_closed_once(made: ThrowawayCertificates) -> None:
    credentials = Credentials.none(roots=made.authority)
    two = pair(
        server={"credentials": made.server_credentials()},
        credentials=credentials,
        server_hostname="other.test",
    )
    with closing(two):
        two.client.start()
        two.server.start()
        with pytest.raises(CertificateError) as caught:
            await two.client.wait_closed()
        assert caught.value.reason == "wrong_name"
        assert caught.value.phase == "handshake"
        await two.client.wait_closed()


async def test_events_tell_the_life(any_loop: str) -> None:
    two = pair()
    events = two.client.events()
    async with running(two):
        seen: list[Event] = [await anext(events)]
        await two.client.stop(20.0)
        seen += [event async for event in events]
    assert seen == [Started(), Closed(None)]
    assert [event async for event in two.client.events()] == [Closed(None)]


async def test_async_call_backs_are_awaited_and_their_failure_is_told() -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    done = asyncio.Event()

    async def on_close() -> None:
        done.set()
        raise ValueError("in the call-back")

    async with running(pair(on_close=on_close)) as two:
        await two.client.stop()
        async with asyncio.timeout(20):
            await done.wait()
        await asyncio.sleep(0)
    assert [str(one["exception"]) for one in told] == ["in the call-back"]


# -- cancellation ------------------------------------------------------------------------------------


async def test_cancelling_the_handshake_stops_the_bridge(any_loop: str, leak_check: None) -> None:
    near, far = socket.socketpair()
    with far:
        bridge = create_bridge(socket=near, sink="null:", credentials=PSK)
        task = asyncio.create_task(bridge.handshake())
        await asyncio.sleep(0)
        while bridge.state == "new":
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(20):
            await bridge.wait_closed()
        assert bridge.state == "closed"
        with pytest.raises(ClosedError):
            await bridge.handshake()


@pytest.mark.parametrize("name", ["handshake", "open", "channel_binding", "cdtunnel_handshake"])
async def test_a_call_that_comes_too_late_does_not_hide_what_ended_the_bridge(
    name: str, leak_check: None
) -> None:
    ended: list[SapperError | None] = []
    for orderly in (True, False):
        async with running(pair()) as two:
            events = two.client.events()
            if orderly:
                await two.client.aclose()
            else:
                two.server.abort()
            async with asyncio.timeout(20):
                ended += [event.error async for event in events if isinstance(event, Closed)]
            with pytest.raises(ClosedError):
                await getattr(two.client, name)()
            assert two.client.error is ended[-1]
            if not orderly:  # nobody has heard it yet
                with pytest.raises(ConnectionLost):
                    await two.client.wait_closed()
    assert [type(one) for one in ended] == [type(None), ConnectionLost]


async def test_cancelling_wait_closed_ends_only_the_waiting(any_loop: str) -> None:
    async with running(pair()) as two:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await two.client.wait_closed()
        await send(two.client_end, b"still there")
        assert await receive(two.server_end, 11) == b"still there"


async def test_cancelling_aclose_stops_at_once(any_loop: str, leak_check: None) -> None:
    two = pair(socket.SOCK_STREAM, close_timeout=60.0)
    async with running(two):
        # The far sink takes nothing any more, so that a drain would wait.
        two.server_end.setblocking(False)
        two.client_end.setblocking(False)
        while two.server.stats().decapsulate.backpressure == 0:
            try:
                two.client_end.send(bytes(65_536))
            except BlockingIOError:
                await asyncio.sleep(0.005)
        task = asyncio.create_task(two.server.aclose())
        while two.server.state != "draining":
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(20):
            await two.server.wait_closed()


async def test_stop_works_without_being_awaited(any_loop: str, leak_check: None) -> None:
    async with running(pair()) as two:
        two.client.stop()
        async with asyncio.timeout(20):
            await two.client.wait_closed()
    with pytest.raises(ClosedError):
        two.client.start()


async def test_async_with_ends_it_and_does_not_hide_an_error_of_the_body(
    any_loop: str, leak_check: None
) -> None:
    two = pair()
    with pytest.raises(KeyError):
        async with two.client:
            raise KeyError("body")
    async with asyncio.timeout(20):
        await two.client.wait_closed()
        await two.server.stop()
    two.client_end.close()
    two.server_end.close()


# -- without a loop -----------------------------------------------------------------------------------


def test_without_a_loop_call_backs_run_on_their_own_thread_which_ends(leak_check: None) -> None:
    heard: list[str] = []
    over = threading.Event()

    def on_close() -> None:
        heard.append(threading.current_thread().name)
        over.set()

    two = pair(on_close=on_close)
    with closing(two):
        helper = threading.Thread(target=two.server.handshake_sync)
        helper.start()
        assert two.client.handshake_sync().engine == "openssl"
        helper.join()
        two.client.start()
        two.server.start()
        two.client_end.sendall(b"hello")
        assert two.server_end.recv(5, socket.MSG_WAITALL) == b"hello"
        with pytest.raises(TimeoutError):
            two.client.wait_closed_sync(0.01)
        two.client.stop()
        two.client.wait_closed_sync(20)
        assert over.wait(20)
    assert heard == ["sapper-callbacks"]


def test_ctrl_c_ends_a_waiting_handshake_and_stops_the_bridge(leak_check: None) -> None:
    near, far = socket.socketpair()
    with far:
        bridge = create_bridge(socket=near, sink="null:", credentials=PSK)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            bridge.handshake_sync()
        bridge.wait_closed_sync(5)


async def test_blocking_the_thread_that_must_answer_is_refused() -> None:
    two = pair(peer_policy=lambda peer: True)
    with closing(two):
        with pytest.raises(ApiMisuseError) as caught:
            two.client.handshake_sync()
        assert caught.value.reason == "would_deadlock"
        two.client.stop()
        two.server.stop()
        await asyncio.gather(two.client.wait_closed(), two.server.wait_closed())


def test_awaiting_without_a_loop_says_what_to_do() -> None:
    two = pair()
    with closing(two):
        waiting = two.client.handshake()
        with pytest.raises(ApiMisuseError, match="_sync"):
            waiting.send(None)


# -- policy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_a_policy_is_asked_about_the_peer(
    kind: str, any_loop: str, made: ThrowawayCertificates
) -> None:
    asked: list[tls.Peer] = []

    def plain(peer: tls.Peer) -> bool:
        asked.append(peer)
        return True

    async def later(peer: tls.Peer) -> bool:
        await asyncio.sleep(0)
        return plain(peer)

    server = {
        "credentials": made.server_credentials(ask_clients=True),
        "peer_policy": plain if kind == "plain" else later,
    }
    async with running(
        pair(server=server, credentials=made.client_credentials(), server_hostname="localhost")
    ):
        assert len(asked) == 1
        assert len(asked[0].certificates) >= 1


def _fails(peer: tls.Peer) -> bool:
    raise ValueError("a defect in the policy")


def _cancels(peer: tls.Peer) -> bool:
    raise asyncio.CancelledError


async def _never(peer: tls.Peer) -> bool:
    await asyncio.sleep(60)
    return True


@pytest.mark.parametrize(
    "policy", [lambda peer: False, lambda peer: 1, lambda peer: None, _fails, _cancels, _never]
)
async def test_anything_but_yes_is_a_no(policy: Any, any_loop: str, leak_check: None) -> None:
    two = pair(server={"peer_policy": policy, "policy_timeout": 0.2})
    with pytest.raises(PolicyDenied) as caught:
        await _server_handshake(two)
    assert caught.value.phase == "handshake"
    two.client_end.close()
    two.server_end.close()
    two.client.stop()
    await two.server.wait_closed()
    with suppress(SapperError):
        await two.client.wait_closed()


async def test_a_policy_is_not_waited_for_behind_the_end(any_loop: str, leak_check: None) -> None:
    asked, ended = asyncio.Event(), asyncio.Event()

    async def never(peer: tls.Peer) -> bool:
        asked.set()
        try:
            return await _never(peer)
        finally:
            ended.set()

    with closing(pair(server={"peer_policy": never, "policy_timeout": 60.0})) as two:
        two.client.start()
        two.server.start()
        async with asyncio.timeout(20):
            await asked.wait()
            await two.server.stop()
            await ended.wait()


async def _server_handshake(two: Pair) -> None:
    two.client.start()
    await two.server.handshake()


def test_a_policy_without_a_loop_runs_on_the_call_backs_thread() -> None:
    names: list[str] = []

    def policy(peer: tls.Peer) -> bool:
        names.append(threading.current_thread().name)
        return True

    two = pair(server={"peer_policy": policy})
    with closing(two):
        two.client.start()
        two.server.handshake_sync()
    assert names == ["sapper-callbacks"]


# -- deadlines, memory -----------------------------------------------------------------------------------


async def test_a_peer_that_says_nothing_meets_the_deadline(any_loop: str, leak_check: None) -> None:
    near, far = socket.socketpair()
    with far:
        bridge = create_bridge(socket=near, sink="null:", credentials=PSK, handshake_timeout=0.1)
        with pytest.raises(HandshakeDeadline) as caught:
            await bridge.handshake()
        assert isinstance(caught.value, TimeoutError)
        await bridge.wait_closed()


async def test_silence_meets_the_idle_deadline_and_traffic_keeps_it_away(
    any_loop: str, leak_check: None
) -> None:
    idle = 1.5  # longer than a busy machine holds the source up
    async with running(pair(idle_timeout=idle)) as two:
        meter = Load.meter(two.server_end.fileno(), "block", 1000)
        source = Load.source(two.client_end.fileno(), "block", 1000, rate=1000)
        async with asyncio.timeout(20):
            while meter.stats().units < 2 * idle * 1000:  # twice as long as it may be silent
                await asyncio.sleep(0.01)
        assert two.client.state == "running"
        source.stop()
        async with asyncio.timeout(20):
            with pytest.raises(IdleDeadline) as caught:
                await two.client.wait_closed()
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.phase == "transfer"
        meter.stop()


async def growth(counted: Callable[[], int], amount: int) -> tuple[int, int]:
    """By how much Python's memory has grown when so much has moved, and by how much at the most."""

    async def moved(count: int) -> None:
        goal = counted() + count
        async with asyncio.timeout(50):
            while counted() < goal:
                await asyncio.sleep(0.02)

    await moved(amount // 100)
    tracemalloc.start()
    try:
        await moved(amount // 100)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        await moved(amount)
        _, peak = tracemalloc.get_traced_memory()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return after - before, peak - before


@pytest.mark.parametrize(
    ("kind", "unit", "size", "amount"),
    [("stream", "block", 100_000, 200_000_000), ("packets", "packet", 1280, 64_000_000)],
    ids=["200 MB of a stream", "50,000 packets"],
)
async def test_python_allocates_nothing_while_payload_flows(
    kind: str, unit: Literal["block", "packet"], size: int, amount: int
) -> None:
    two = pair() if kind == "stream" else pair(socket.SOCK_DGRAM, framing="ipv6")
    async with running(two):
        meter = Load.meter(two.server_end.fileno(), unit, size)
        source = Load.source(two.client_end.fileno(), unit, size)
        left, most = await growth(lambda: meter.stats().bytes, amount)
        source.stop()
        meter.stop()
        assert (meter.stats().lost, meter.stats().torn) == (0, 0)
        assert left < 20_000, "Python's memory grew with the payload"
        assert most < 200_000, "a chunk of payload was in Python for a moment"


def test_a_bridge_that_was_never_used_is_collected(leak_check: None) -> None:
    near, far = socket.socketpair()
    with far, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        create_bridge(socket=near, sink="null:", credentials=PSK)
        gc.collect()
        far.settimeout(20)
        assert far.recv(1) == b"", "the native side closed its end"


async def test_a_running_bridge_needs_no_variable(leak_check: None) -> None:
    two = pair()
    two.client.start()
    two.server.start()
    ends = two.client_end, two.server_end
    del two
    gc.collect()
    await send(ends[0], b"alive")
    assert await receive(ends[1], 5) == b"alive"
    for end in ends:
        end.close()


async def test_a_call_that_cannot_be_made_changes_nothing(any_loop: str, leak_check: None) -> None:
    two = pair(socket.SOCK_DGRAM, framing="ipv6")
    with pytest.raises(NotStartedError):
        await two.client.cdtunnel_handshake(1280)
    async with running(two):
        with pytest.raises(ApiMisuseError):
            await two.client.cdtunnel_handshake(1280)
        packet = traffic.udp_packet("fd00::1", "fd00::2", b"still there")
        await send(two.client_end, packet)
        assert await receive(two.server_end, len(packet)) == packet
        assert two.client.error is None


def test_both_ends_of_a_device_tunnel_have_addresses_of_their_own() -> None:
    with pytest.raises(ConfigError) as caught:
        tls.CdTunnelParameters(ip_address("fd00::1"), 64, 1280, ip_address("fd00::1"), 1000)
    assert caught.value.field == "server_address"


async def test_a_second_greeting_at_once_leaves_the_first_alone(any_loop: str, leak_check: None) -> None:
    two = pair(socket.SOCK_DGRAM, framing="ipv6")
    granted = tls.CdTunnelParameters(ip_address("fd00::2"), 64, 1280, ip_address("fd00::1"), 1000)
    with closing(two):
        await asyncio.gather(two.client.handshake(), two.server.handshake())
        first = asyncio.ensure_future(two.client.cdtunnel_handshake(1280))
        second = asyncio.ensure_future(two.client.cdtunnel_handshake(1280))
        with pytest.raises(BusyError):
            await second
        await two.server.cdtunnel_accept(granted)
        assert await first == granted


async def test_bytes_that_the_caller_read_come_before_those_of_its_reader(
    any_loop: str, leak_check: None
) -> None:
    near, far = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=far)
    ours, other = socket.socketpair()
    sink, end = socket.socketpair()
    with other, end, create_bridge(socket=near, sink=ours, credentials=PSK) as client:
        client.start()
        begun = await reader.readexactly(5)
        with create_bridge(
            socket=(reader, writer), sink=sink, credentials=PSK, server_side=True, initial_data=begun
        ) as server:
            await server.handshake()
            await server.stop()
        await client.stop()
