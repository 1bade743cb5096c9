"""The mailboxes: one per loop while it is needed, a thread where a loop cannot watch, and no fork."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

from sapper import _native, tls
from sapper._loop import LoopPost, call_sync, post_of, running_post
from sapper.errors import ApiMisuseError, SapperError
from sapper.pump import Pump, connect
from sapper.tunnel import ClientOptions, ServerOptions, TunnelClient, TunnelServer
from support.traffic import Background
from support.transports import InMemory

PSK = tls.Credentials.psk("one", bytes(range(32)))


def new_pump() -> tuple[Pump, socket.socket]:
    ours, near = socket.socketpair()
    return connect(ours, "null:"), near


async def test_a_loop_has_one_mailbox_while_it_hears_of_something(any_loop: str, leak_check: None) -> None:
    one, near = new_pump()
    other, far = new_pump()
    post = running_post()
    assert post_of(asyncio.get_running_loop()) is post
    assert post._mailbox is not None
    with near, far:
        await asyncio.gather(one.open(), other.open())
        await one.stop()
        await other.stop()
    await asyncio.sleep(0)
    assert post._mailbox is None, "it is closed at the loop's next turn"


async def test_a_loop_that_ends_takes_its_mailbox_along(any_loop: str, leak_check: None) -> None:
    """Also where nobody heard the end, and one who hears knows the loop."""
    loop = asyncio.get_running_loop()
    running_post().subscribe(lambda tag, value: loop.stop())
    listener = await tls.listen(("127.0.0.1", 0), credentials=PSK)
    listener.close()


async def test_a_cancelled_call_leaves_no_key_behind() -> None:
    pump, near = new_pump()
    with near:
        task = asyncio.create_task(pump.wait_closed())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert running_post()._futures == {}
        await pump.stop()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["this thread", "another"])
@pytest.mark.parametrize("way", ["another loop", "sync"])
def test_the_end_is_heard_without_its_loop(
    way: str, elsewhere: bool, monkeypatch: pytest.MonkeyPatch, leak_check: None
) -> None:
    """Nobody takes the messages of a loop that is closed, so whoever waits for the end does."""
    heard = list[str]()

    async def made() -> tuple[Pump, socket.socket]:
        ours, near = socket.socketpair()
        pump = connect(ours, "null:", on_close=lambda: heard.append("closed"))
        pump.start()
        return pump, near

    pump, near = asyncio.run(made())
    monkeypatch.setattr(pump._life, "wait_over", lambda _: pytest.fail("it waits for a loop that is no more"))

    def ending() -> None:
        if way == "sync":
            pump.stop()
            pump.wait_closed_sync(20)
        else:
            asyncio.run(pump.aclose())

    with near:
        if elsewhere:
            job = Background(ending)
            job.join()
        else:
            ending()
    assert pump.state == "closed"
    assert heard == ["closed"]


def test_a_foreign_transport_of_a_closed_loop_holds_nobody(leak_check: None) -> None:
    outer, peer = socket.socketpair()

    async def made() -> Pump:
        pump = connect(InMemory(outer, asyncio.Protocol()), "null:")
        await pump.open()
        asyncio.get_running_loop().remove_reader(outer)
        return pump

    pump = asyncio.run(made())
    with peer, outer:
        asyncio.run(pump.aclose())
    assert pump.state == "closed"


class Proactor(asyncio.SelectorEventLoop):
    """A loop that cannot watch descriptors for others, as Windows' has it."""

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]
        raise NotImplementedError


def test_a_loop_that_cannot_watch_takes_its_thread_along(leak_check: None) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        running_post().subscribe(lambda tag, value: loop.stop())

    with asyncio.Runner(loop_factory=Proactor) as runner:
        runner.run(main())


def test_a_loop_that_cannot_watch_is_served_by_a_thread(leak_check: None) -> None:
    async def main() -> None:
        pump, near = new_pump()
        with near:
            await pump.open()
            pump.start()
            names = [thread.name for thread in threading.enumerate()]
            assert "sapper-mailbox" in names
            await pump.stop()

    # The loop's own self-pipe is watched by other means than add_reader().
    with asyncio.Runner(loop_factory=Proactor) as runner:
        runner.run(main())


async def test_messages_of_a_closed_loop_are_an_error_in_words() -> None:
    def other_loop() -> None:
        loop = asyncio.new_event_loop()
        post = LoopPost(loop)
        loop.close()
        with pytest.raises(ApiMisuseError, match="closed"):
            post.subscribe(lambda tag, value: None)

    await asyncio.to_thread(other_loop)


def test_a_call_without_an_answer_meets_its_deadline() -> None:
    with pytest.raises(TimeoutError):
        call_sync(lambda mailbox, key: None, 0.05)


def test_a_closed_mailbox_ends_a_wait() -> None:
    mailbox = _native.Mailbox()
    threading.Timer(0.05, mailbox.close).start()
    mailbox.wait(20)
    assert mailbox.closed
    assert mailbox.drain() == []
    assert not mailbox.wait(20)


def _in_a_child(pump: Pump, answers: Any) -> None:
    try:
        pump.stats()
    except ApiMisuseError as error:
        answers.send(error.reason)
    try:
        new_pump()[0].start()
    except ApiMisuseError as error:
        answers.send(error.reason)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_is_refused_in_words() -> None:
    pump, near = new_pump()
    with near:
        ours, theirs = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=_in_a_child, args=(pump, theirs))
        child.start()
        for _ in range(2):
            assert ours.poll(20)
            assert ours.recv() == "forked"
        child.join(20)
        assert child.exitcode == 0, "what was inherited is dropped in peace"
        pump.stop()
        pump.wait_closed_sync(20)


def test_a_program_ends_while_a_bridge_runs_and_nobody_waits_for_it() -> None:
    program = (
        "import socket; from sapper.pump import connect; a, b = socket.socketpair()\n"
        "pump = connect(a, 'null:'); pump.start(); print('started')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr


def _forking(in_the_child: str) -> subprocess.CompletedProcess[str]:
    """A program without a loop that forks beside a running bridge."""
    program = (
        "import os, socket, sys; from sapper.pump import connect; a, b = socket.socketpair()\n"
        "pump = connect(a, 'null:', on_error=print); pump.start()\n"
        f"if os.fork() == 0: {in_the_child}\n"
        "os.wait()"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_a_forked_child_ends_silently() -> None:
    done = _forking("sys.exit(0)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_forked_child_may_show_what_it_inherited() -> None:
    done = _forking("print(repr(pump), flush=True); os._exit(0)")
    assert (done.stdout, done.stderr) == ("<Pump of another process>\n", "")


class LeavesEarly:
    """A call-back that raises what is no Exception."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __call__(self, *_: object) -> None:
        raise self.error


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit])
async def test_a_cancelled_future_in_a_call_back_is_no_cancellation(error: type[BaseException]) -> None:
    """``future.result()`` of a cancelled one is enough to raise it; who waits behind it is told."""
    failed: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda loop, context: failed.append(context["exception"])
    )
    heard: list[str] = []
    server = TunnelServer(lambda credentials: True, options=ServerOptions(host="127.0.0.1"))
    server.on("main-server-end", LeavesEarly(error))
    server.on("main-server-end", lambda event: heard.append(event.name))
    await server.start(0)
    async with asyncio.timeout(20):
        await server.stop()
    assert not server.running
    assert heard == ["main-server-end"]
    assert [type(one) for one in failed] == [error]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_call_back_that_ends_the_program_takes_no_message_along(error: type[BaseException]) -> None:
    heard: list[str] = []
    server = TunnelServer(lambda credentials: True, options=ServerOptions(host="127.0.0.1"))
    server.on("main-server-end", LeavesEarly(error))
    server.on("main-server-end", lambda event: heard.append(event.name))

    async def main() -> None:
        await server.start(0)
        await server.stop()
        await asyncio.Event().wait()

    with pytest.raises(error):
        asyncio.run(main())
    assert not server.running, "its end, in the same turn, was heard"
    assert heard == ["main-server-end"]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_the_call_backs_thread_survives_its_call_backs(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    heard = threading.Event()
    ours, near = socket.socketpair()
    theirs, far = socket.socketpair()
    with near, far:
        first = connect(ours, "null:", on_close=LeavesEarly(error))
        second = connect(theirs, "null:", on_close=heard.set)
        for pump in (first, second):
            pump.start()
        for pump in (first, second):
            pump.stop()
            pump.wait_closed_sync(20)
        assert heard.wait(20)
    assert "LeavesEarly" in caplog.text


async def test_a_filter_that_raises_cancelled_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    def cancels(credentials: dict[str, Any]) -> bool:
        raise asyncio.CancelledError

    server = TunnelServer(cancels, options=ServerOptions(host="127.0.0.1"))
    options = ClientOptions(reconnect=False)
    port = await server.start(0)
    async with server:
        client = TunnelClient("127.0.0.1", port, 1, {}, options=options)
        async with asyncio.timeout(20):
            with pytest.raises(SapperError):
                await client.connect()
    assert "a filter of the tunnel failed" in caplog.text
