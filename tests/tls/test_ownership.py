"""Whose descriptors they are: the process's table, open files' flags, a terminal's mode, before and after.

Each kind of argument goes through each way in which a bridge can end. Not here: what the bytes are
(``test_bridge.py``), and what a hostile peer can do (``test_bad_input.py``).
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import pty
import socket
import termios
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from sapper.errors import ApiMisuseError, ClosedError, ConfigError, SapperError
from sapper.tls import Bridge, Credentials, create_bridge
from support import leaks

PSK = Credentials.psk("x", bytes(range(32)))
LATEST = 25.0

pytestmark = pytest.mark.usefixtures("leak_check")


def flags(number: int) -> int:
    """The flags of an open file."""
    return fcntl.fcntl(number, fcntl.F_GETFL)


@dataclass
class Given:
    """An argument, the descriptors that stay the caller's, and those that the bridge takes."""

    value: Any
    kept: list[int] = field(default_factory=list)
    taken: Callable[[], bool] | None = None
    """Whether an object that is handed over is in our hands no longer."""


def _int_socket(stack: ExitStack) -> Given:
    ours, theirs = (stack.enter_context(one) for one in socket.socketpair())
    theirs.setblocking(False)
    return Given(ours.fileno(), [ours.fileno()])


def _socket_object(stack: ExitStack) -> Given:
    ours, _ = (stack.enter_context(one) for one in socket.socketpair())
    return Given(ours, taken=lambda: ours.fileno() == -1)


def _pipe_pair(stack: ExitStack) -> Given:
    numbers = [*os.pipe(), *os.pipe()]
    for number in numbers:
        stack.callback(os.close, number)
    return Given((numbers[0], numbers[3]), [numbers[0], numbers[3]])


def _listener(stack: ExitStack) -> Given:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    return Given(listener, taken=lambda: listener.fileno() == -1)


def _file(stack: ExitStack) -> Given:
    file = stack.enter_context(os.fdopen(os.memfd_create("sink"), "w+b"))
    return Given(file, [file.fileno()])


def _null(stack: ExitStack) -> Given:
    file = stack.enter_context(os.fdopen(os.open("/dev/null", os.O_RDWR), "r+b", buffering=0))
    return Given(file, [file.fileno()])


def _pty_end(index: int) -> Callable[[ExitStack], Given]:
    def make(stack: ExitStack) -> Given:
        numbers = pty.openpty()
        for number in numbers:
            stack.callback(os.close, number)
        return Given(numbers[index], [numbers[index]])

    return make


def _datagram(stack: ExitStack) -> Given:
    ours, _ = (stack.enter_context(one) for one in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
    return Given(ours.fileno(), [ours.fileno()])


KINDS: dict[str, Callable[[ExitStack], Given]] = {
    "int": _int_socket,
    "socket": _socket_object,
    "pipe pair": _pipe_pair,
    "listener": _listener,
    "file": _file,
    "null": _null,
    "terminal": _pty_end(1),
    "terminal's master": _pty_end(0),
    "datagram": _datagram,
}
ENDS = ("raises", "new", "handshaking", "ready", "running", "draining", "collected")


def _until(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + LATEST
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.001)  # between two looks


def _bring_to(state: str, bridge: Bridge, far: socket.socket, stack: ExitStack) -> Bridge | None:
    """Brings a bridge into a state; gives the other bridge, where one is needed for it."""
    if state in ("new", "handshaking"):
        if state == "handshaking":
            bridge.start()
            _until(lambda: bridge.state == "handshaking", "it does not begin")
        return None
    # One that gives nothing and does not end: an end would be passed on, at a moment that nobody chose.
    sink, held = socket.socketpair()
    stack.enter_context(held)
    other = create_bridge(socket=far, sink=sink, credentials=PSK, server_side=True, framing=None)
    other.start()
    bridge.handshake_sync()
    assert bridge.state == "ready"
    if state != "ready":
        bridge.start()
    return other


@contextmanager
def _unchanged(given: Given) -> Iterator[None]:
    """The caller's descriptors are open, are what they were, and behave as they did."""
    before = [(os.fstat(number)[:3], flags(number)) for number in given.kept]
    modes = [termios.tcgetattr(number) for number in given.kept if os.isatty(number)]
    yield
    assert [(os.fstat(number)[:3], flags(number)) for number in given.kept] == before
    assert [termios.tcgetattr(number) for number in given.kept if os.isatty(number)] == modes


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sink_is_as_before_however_the_bridge_ends(kind: str, end: str) -> None:
    with ExitStack() as stack:
        near, far = socket.socketpair()
        stack.enter_context(near)
        stack.enter_context(far)
        before = len(leaks.open_fds())
        given = KINDS[kind](stack)
        made = leaks.open_fds()
        options: dict[str, Any] = {"framing": "u16"} if kind == "datagram" else {}
        with _unchanged(given):
            if end == "raises":
                with pytest.raises(ConfigError):
                    create_bridge(
                        socket=near,
                        sink=given.value,
                        credentials=PSK,
                        max_packet=0,
                        **options,
                    )
                with pytest.raises(ConfigError):
                    create_bridge(socket=near, sink=given.value, credentials=object(), **options)  # type: ignore[arg-type]
                assert leaks.open_fds() == made
                assert near.fileno() >= 0
                assert given.taken is None or not given.taken()
                return
            bridge = create_bridge(socket=near, sink=given.value, credentials=PSK, **options)
            assert near.fileno() == -1
            assert given.taken is None or given.taken()
            if end == "collected":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    del bridge
                    gc.collect()
                far.settimeout(LATEST)
                assert far.recv(1) == b""
            else:
                other = _bring_to(end, bridge, far, stack)
                bridge.stop(drain=0.05 if end == "draining" else 0.0)
                with suppress(SapperError):  # the other half may end first, and a stop says so to nobody
                    bridge.wait_closed_sync(LATEST)
                assert bridge.state == "closed"
                if other is not None:
                    other.stop()
                    with suppress(SapperError):
                        other.wait_closed_sync(LATEST)
                del bridge, other
        del given
    gc.collect()
    _until(lambda: len(leaks.open_fds()) <= before, f"left: {leaks.open_fds()}")


@pytest.mark.parametrize("kind", ["int", "pipe pair", "terminal"])
def test_the_callers_descriptor_works_on_after_the_bridge(kind: str) -> None:
    with ExitStack() as stack:
        near, far = socket.socketpair()
        stack.enter_context(far)
        given = KINDS[kind](stack)
        bridge = create_bridge(socket=near, sink=given.value, credentials=PSK)
        other = _bring_to("running", bridge, far, stack)
        bridge.stop()
        bridge.wait_closed_sync(LATEST)
        assert other is not None
        other.stop()
        with suppress(SapperError):
            other.wait_closed_sync(LATEST)
        assert os.write(given.kept[-1], b"still mine\n") == 11


async def test_a_reader_comes_with_the_bytes_that_it_held(any_loop: str) -> None:
    """What the peer sent before the takeover was read by asyncio: it is the beginning of the handshake."""
    near, far = socket.socketpair()
    client = create_bridge(socket=far, sink="null:", credentials=PSK)
    shaking = asyncio.create_task(client.handshake())
    reader, writer = await asyncio.open_unix_connection(sock=near)
    async with asyncio.timeout(LATEST):
        while not reader._buffer:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
    with pytest.raises(ConfigError):  # after it was taken: everything is given back
        create_bridge(socket=(reader, writer), sink=object(), credentials=PSK, server_side=True)  # type: ignore[arg-type]
    assert reader._buffer  # type: ignore[attr-defined]
    assert not writer.is_closing()
    server = create_bridge(socket=(reader, writer), sink="null:", credentials=PSK, server_side=True)
    async with asyncio.timeout(LATEST):
        assert (await server.handshake()).psk_identity == "x"
        await shaking
    for one in (client, server):
        with suppress(SapperError):
            await one.stop()


async def test_a_reader_and_a_writer_of_two_connections_are_no_pair(any_loop: str) -> None:
    """What the reader holds would begin the other one's handshake."""
    first, second = socket.socketpair(), socket.socketpair()
    (one_reader, one_writer), (_, two_writer) = [
        await asyncio.open_unix_connection(sock=near) for near, _ in (first, second)
    ]
    first[1].send(b"of the first")
    async with asyncio.timeout(LATEST):
        while not one_reader._buffer:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
    for name in ("socket", "sink"):
        ends: dict[str, Any] = {"socket": "counter:", "sink": "null:", name: (one_reader, two_writer)}
        with pytest.raises(ConfigError) as caught:
            create_bridge(**ends, credentials=PSK, server_side=True)
        assert (caught.value.field, caught.value.reason) == (name, "not_a_pair")
    assert await one_reader.read(100) == b"of the first"
    assert not one_writer.is_closing()
    assert not two_writer.is_closing()
    # A reader that is fed by hand has no connection of its own.
    async with asyncio.timeout(LATEST):
        bridge = create_bridge(
            socket=(asyncio.StreamReader(), two_writer), sink="null:", credentials=PSK, server_side=True
        )
        await bridge.stop()
    one_writer.close()
    for end in (first[1], second[1]):
        end.close()


# -- calls at the wrong time and from the wrong place ------------------------------------------------


def test_double_start_double_stop_and_calls_after_the_end() -> None:
    near, far = socket.socketpair()
    with far:
        bridge = create_bridge(socket=near, sink="null:", credentials=PSK)
        bridge.start()
        with pytest.raises(ApiMisuseError):
            bridge.start()
        bridge.stop()
        bridge.stop()
        bridge.stop(drain=5.0)
        bridge.wait_closed_sync(LATEST)
        bridge.wait_closed_sync(LATEST)
        bridge.stop()
        for call in (
            bridge.start,
            bridge.handshake_sync,
            bridge.cdtunnel_handshake_sync,
            lambda: bridge.pause("encapsulate"),
            lambda: bridge.resume("encapsulate"),
        ):
            with pytest.raises(ClosedError):
                call()
        assert bridge.state == "closed"
        assert bridge.stats().encapsulate.bytes == 0
        assert repr(bridge) == "<Bridge closed>"


def test_a_second_stop_shortens_the_first_and_a_drain_ends_at_its_deadline() -> None:
    for drain, then in ((60.0, 0.0), (0.1, None)):
        near, far = socket.socketpair()
        sink, end = socket.socketpair()
        ours, theirs = socket.socketpair()
        with far, end, theirs:
            bridge = create_bridge(socket=near, sink=sink, credentials=PSK)
            other = create_bridge(socket=far, sink=ours, credentials=PSK, server_side=True)
            other.start()
            bridge.handshake_sync()
            bridge.start()
            theirs.settimeout(0.01)
            until = time.monotonic() + LATEST
            while not bridge.stats().decapsulate.backpressure:  # its sink is full
                assert time.monotonic() < until
                with suppress(TimeoutError):
                    theirs.send(bytes(65_536))
            bridge.stop(drain=drain)
            if then is not None:
                bridge.stop(drain=then)
            with suppress(SapperError):
                bridge.wait_closed_sync(LATEST)
            other.stop()
            with suppress(SapperError):
                other.wait_closed_sync(LATEST)


def test_calls_from_many_threads_at_once() -> None:
    near, far = socket.socketpair()
    with far:
        bridge = create_bridge(socket=near, sink="null:", credentials=PSK)
        started: list[bool] = []
        strange: list[BaseException] = []
        gate = threading.Barrier(8)

        def attack() -> None:
            gate.wait(LATEST)
            try:
                bridge.start()
                started.append(True)
            except ApiMisuseError:
                pass
            except BaseException as error:
                strange.append(error)
            for _ in range(50):
                bridge.stats()
                bridge.state  # noqa: B018 - only that it answers
            bridge.stop()

        threads = [threading.Thread(target=attack) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LATEST)
        bridge.wait_closed_sync(LATEST)
        assert strange == []
        assert len(started) <= 1


def test_a_forked_child_gets_a_clear_error() -> None:
    near, far = socket.socketpair()
    with far:
        bridge = create_bridge(socket=near, sink="null:", credentials=PSK)
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 3.12 warns of a fork beside threads, which is the point
            child = os.fork()
        if child == 0:
            said = []
            for call in (
                bridge.handshake_sync,
                bridge.start,
                lambda: create_bridge(socket=far, sink="null:", credentials=PSK),
            ):
                try:
                    call()
                    said.append("nothing")
                except ApiMisuseError as error:
                    said.append(str(error.reason))
                except BaseException as error:
                    said.append(repr(error))
            os.write(write, ",".join(said).encode())
            os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        assert os.read(read, 1000) == b"forked,forked,forked"
        os.close(read)
        bridge.stop()
        bridge.wait_closed_sync(LATEST)


@pytest.mark.parametrize("has_loop", [True, False], ids=["loop", "no loop"])
def test_call_backs_that_raise_end_nothing_else(has_loop: bool, caplog: pytest.LogCaptureFixture) -> None:
    closed = threading.Event()
    near, far = socket.socketpair()
    far.close()

    def on_error(error: SapperError) -> None:
        raise ValueError("in on_error")

    def on_close() -> None:
        closed.set()
        raise KeyError("in on_close")

    def make() -> Bridge:
        return create_bridge(socket=near, sink="null:", credentials=PSK, on_error=on_error, on_close=on_close)

    async def on_a_loop() -> list[str]:
        told: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(str(what["exception"])))
        bridge = make()
        bridge.start()
        async with asyncio.timeout(LATEST):
            await bridge.wait_closed()
            while len(told) < 2:
                await asyncio.sleep(0)
        return told

    if has_loop:
        assert asyncio.run(on_a_loop()) == ["in on_error", "'in on_close'"]
        return
    bridge = make()
    bridge.start()
    bridge.wait_closed_sync(LATEST)
    assert closed.wait(LATEST)
    _until(lambda: "in on_error" in caplog.text and "in on_close" in caplog.text, caplog.text)
