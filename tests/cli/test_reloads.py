"""Reloads of commands that serve: their order, and that nothing waits for one that does not come back."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sapper import _files
from sapper._own_thread import in_own_thread
from sapper.cli import _reloading
from sapper.cli._serve import Journal, serve
from sapper.errors import ConfigError, SapperError
from sapper.tls import Proxy, ProxyOptions, TlsConfig

LATEST = 20.0


class Heard(Journal):
    """What a proxy in this process tells."""

    def __init__(self) -> None:
        super().__init__(as_json=True, quiet=False)
        self.events: asyncio.Queue[str] = asyncio.Queue()

    def note(self, event: str, text: str, *, bad: bool = False, **values: Any) -> None:
        del text, bad, values
        self.events.put_nowait(event)

    async def until(self, event: str) -> None:
        async with asyncio.timeout(LATEST):
            while await self.events.get() != event:
                pass


@contextmanager
def unharmed() -> Iterator[None]:
    """SIGHUP, as it was."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@asynccontextmanager
async def serving(again: Callable[[], ProxyOptions]) -> AsyncIterator[Heard]:
    heard = Heard()
    options = ProxyOptions(listen=("127.0.0.1:0",), to=("127.0.0.1:1",))
    with unharmed():
        task = asyncio.create_task(serve(options, again, (), heard))
        await heard.until("listening")
        try:
            yield heard
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(LATEST):
                assert await task == 0


async def entered(event: threading.Event) -> None:
    assert await asyncio.wait_for(in_own_thread(lambda: event.wait(LATEST)), LATEST)


async def test_signals_during_a_reload_are_one_more_reload_after_it() -> None:
    begun, release, other = threading.Event(), threading.Event(), threading.Event()
    busy = threading.Lock()
    calls: list[bool] = []

    def again() -> ProxyOptions:
        alone = busy.acquire(blocking=False)
        calls.append(alone)
        if not alone:
            other.set()
        try:
            if len(calls) == 1:
                begun.set()
                release.wait(LATEST)
                other.wait(0.2)  # one that does not wait for its turn begins by now
            return ProxyOptions(listen=("127.0.0.1:0",), to=("127.0.0.1:1",))
        finally:
            if alone:
                busy.release()

    async with serving(again) as heard:
        os.kill(os.getpid(), signal.SIGHUP)
        await entered(begun)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        release.set()
        await heard.until("reload")
        await heard.until("reload")
    assert calls == [True, True]


async def test_an_end_waits_for_no_reload(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_reloading, "SLOW", 0.01)
    begun, release = threading.Event(), threading.Event()

    def again() -> ProxyOptions:
        begun.set()
        release.wait()
        raise SapperError("nobody waits for this")

    try:
        async with serving(again) as heard:
            os.kill(os.getpid(), signal.SIGHUP)
            await entered(begun)
            async with asyncio.timeout(LATEST):
                while "still reads" not in caplog.text:
                    await asyncio.sleep(0.01)
        assert "reload" not in list(heard.events._queue)  # type: ignore[attr-defined]
    finally:
        release.set()


async def test_a_proxy_s_reload_does_not_come_behind_a_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, release = threading.Event(), threading.Event()
    order: list[str] = []

    def reload(config: TlsConfig) -> bool:
        begun.set()
        release.wait(LATEST)
        order.append("first")
        return False

    monkeypatch.setattr(TlsConfig, "reload", reload)
    options = ProxyOptions(listen=("127.0.0.1:0",), to=("tls://127.0.0.1:1",))
    async with Proxy(options) as proxy:
        first = asyncio.create_task(proxy.reload())
        await entered(begun)
        second = asyncio.create_task(proxy.reload(options.model_copy(update={"to": ("tls://127.0.0.1:2",)})))
        second.add_done_callback(lambda _: order.append("second"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        release.set()
        await asyncio.wait_for(asyncio.gather(first, second), LATEST)
        assert order == ["first", "second"]
        assert proxy.options.to == ("tls://127.0.0.1:2",)
        proxy.stop()


async def test_a_thread_of_its_own_is_left_when_nobody_waits() -> None:
    release = threading.Event()
    waiting = asyncio.create_task(in_own_thread(lambda: release.wait(LATEST)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    release.set()
    with pytest.raises(ZeroDivisionError):
        await in_own_thread(lambda: 1 // 0)


def test_who_serves_reads_regular_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("text")
    with _files.regular_only():
        assert _files.read_whole(tmp_path / "file") == (b"text", True)
        with pytest.raises(OSError, match="it is no regular file"):
            _files.read_whole(tmp_path / "fifo")
        with pytest.raises(IsADirectoryError):
            _files.read_whole(tmp_path)
        with pytest.raises(FileNotFoundError):
            _files.read_whole(tmp_path / "none")
    threading.Thread(target=(tmp_path / "fifo").write_text, args=("once",), daemon=True).start()
    assert _files.read_whole(tmp_path / "fifo") == (b"once", False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("listen", ("127.0.0.1:0", "127.0.0.1:0")),
        ("max_connections", 7),
        ("keepalive", 60.0),
        ("backlog", 7),
        ("reuse_port", True),
        ("transparent", True),
    ],
)
async def test_what_needs_a_restart_is_named(name: str, value: object) -> None:
    options = ProxyOptions(listen=("127.0.0.1:0",), to=("127.0.0.1:1",))
    async with Proxy(options) as proxy:
        with pytest.raises(ConfigError, match="by a restart") as caught:
            await proxy.reload(options.model_copy(update={name: value}))
        assert caught.value.field == name
        await proxy.reload(options.model_copy(update={"rate": 5.0}))
        proxy.stop()
