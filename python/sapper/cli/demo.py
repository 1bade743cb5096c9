"""``sapper demo``: the main job on real traffic, beside the same job done by an asyncio pump."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Annotated, Any, Self

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sapper.cli._output import amount, duration, write_json
from sapper.demo import PUMPS, Pumped, PumpName, Sample, Scene, run_scene, scenes
from sapper.testing import throwaway_certificates

__all__ = ["demo"]

#: What the workers' starts and ends take of the whole, a run.
OVERHEAD = 0.5


def demo(
    seconds: Annotated[float, typer.Option(min=2, max=3600, help="How long all of it takes, about.")] = 12.0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the bridge running afterwards, until Ctrl-C.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines, for programs.")] = False,
) -> None:
    """Show the main job on real traffic, beside the same job done by an asyncio pump.

    Makes throw-away credentials and a TLS peer, and moves stamped packets and a byte stream through TLS
    both ways, first with Sapper's bridge, then with asyncio; each in a process of its own, whose processor
    time is what is compared. With the rights for it, packets go through TUN interfaces in network
    namespaces of their own; without them, through datagram sockets.
    """
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_demo(seconds, keep, _JsonView() if as_json else _LiveView()))


async def _demo(seconds: float, keep: bool, view: _View) -> None:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine runs in a task
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    shown = await asyncio.to_thread(scenes)
    certificates = throwaway_certificates("localhost")
    each = max(0.6, seconds / (len(shown) * len(PUMPS)) - OVERHEAD)
    with view:
        view.begin(shown)
        for scene in shown:
            for pump in PUMPS:
                async with _closing(run_scene(scene, pump, each, certificates)) as run:
                    async for news in run:
                        view.show(news)
        view.summary()
        if keep:
            view.keeping()
            async with _closing(run_scene(shown[0], "sapper", None, certificates)) as run:
                async for news in run:
                    view.show(news)


def _closing(run: AsyncIterator[Pumped | Sample]) -> contextlib.aclosing[Any]:
    return contextlib.aclosing(run)


class _View:
    """Tells how the demonstration goes."""

    def __init__(self) -> None:
        self._scenes: list[Scene] = []
        self._last: dict[tuple[str, PumpName], Sample] = {}
        self._rates: dict[tuple[str, PumpName], tuple[float, float]] = {}
        self._tls: dict[tuple[str, PumpName], str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def begin(self, shown: list[Scene]) -> None:
        """What will be shown."""
        self._scenes = shown

    def show(self, news: Pumped | Sample) -> None:
        """Something new."""
        key = news.scene, news.pump
        if isinstance(news, Pumped):
            self._tls[key] = news.tls
            self._last.pop(key, None)
            return
        before = self._last.get(key)
        if before is not None and news.elapsed > before.elapsed and news.elapsed > before.elapsed + 0.05:
            passed = news.elapsed - before.elapsed
            self._rates[key] = (news.bytes - before.bytes) / passed, (news.packets - before.packets) / passed
        self._last[key] = news

    def summary(self) -> None:
        """All runs are over."""

    def keeping(self) -> None:
        """The bridge goes on."""

    def ratios(self, scene: Scene) -> dict[str, float]:
        """Sapper against asyncio: how much more arrived a second, how much less it took."""
        ours, theirs = (self._last.get((scene.name, pump)) for pump in PUMPS)
        if ours is None or theirs is None or not ours.bytes or not theirs.bytes:
            return {}
        found = {"throughput": (ours.bytes / ours.elapsed) / (theirs.bytes / theirs.elapsed)}
        if ours.cpu and theirs.cpu:
            found["cpu_per_gigabyte"] = ours.cpu_per_gigabyte / theirs.cpu_per_gigabyte
        if scene.tells_latency and ours.latency_p99 and theirs.latency_p99:
            found["latency_p99"] = ours.latency_p99 / theirs.latency_p99
        return found


def _values(sample: Sample) -> dict[str, Any]:
    return {**asdict(sample), "cpu_per_gigabyte": sample.cpu_per_gigabyte}


class _JsonView(_View):
    """For programs: an object a line."""

    def begin(self, shown: list[Scene]) -> None:
        super().begin(shown)
        write_json({"event": "begin", "scenes": {one.name: one.title for one in shown}, "pumps": PUMPS})

    def show(self, news: Pumped | Sample) -> None:
        super().show(news)
        if isinstance(news, Pumped):
            write_json({"event": "handshake", **asdict(news)})
        else:
            write_json({"event": "sample", **_values(news)})

    def summary(self) -> None:
        runs = [_values(one) for one in self._last.values()]
        ratios = {scene.name: self.ratios(scene) for scene in self._scenes}
        write_json({"event": "summary", "runs": runs, "sapper_to_asyncio": ratios})

    def keeping(self) -> None:
        write_json({"event": "keeping", "scene": self._scenes[0].name})


class _LiveView(_View):
    """For people: one table that is drawn anew while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(highlight=False)
        self._now: tuple[str, PumpName] | None = None
        self._over = False
        self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._draw)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._now = None
        if self._console.is_terminal:
            self._live.refresh()
            self._live.stop()
        else:  # a pipe or a file: the end is what it wants
            self._console.print(self._draw())

    def begin(self, shown: list[Scene]) -> None:
        super().begin(shown)
        self._console.print(
            "Real traffic through TLS over loopback, both ways at once; throw-away credentials. The pumps "
            "take turns, and only the pump's own process counts.",
            style="dim",
        )

    def show(self, news: Pumped | Sample) -> None:
        super().show(news)
        self._now = news.scene, news.pump
        self._refresh()

    def summary(self) -> None:
        self._now, self._over = None, True
        self._refresh()

    def keeping(self) -> None:
        self._console.print("The bridge goes on; Ctrl-C ends it.", style="bold")

    def _refresh(self) -> None:
        if self._console.is_terminal:
            self._live.refresh()

    def _draw(self) -> RenderableType:
        parts: list[RenderableType] = []
        for scene in self._scenes:
            parts += [self._table(scene), Text()]
        if self._over:
            parts += [self._sentence(scene) for scene in self._scenes]
        return Group(*parts)

    def _table(self, scene: Scene) -> Table:
        table = Table(title=scene.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("", style="dim", min_width=18)
        for pump in PUMPS:
            running = self._now == (scene.name, pump)
            title = "Sapper" if pump == "sapper" else "asyncio"
            table.add_column(f"{title} ▸" if running else title, justify="right", min_width=18)
        samples = [self._last.get((scene.name, pump)) for pump in PUMPS]
        agreed = [self._tls.get((scene.name, pump), "").partition(", ") for pump in PUMPS]
        table.add_row("version", *(version for version, _, _ in agreed))
        table.add_row("suite", *(suite for _, _, suite in agreed))
        rates = [self._rate(scene, pump) for pump in PUMPS]
        table.add_row("bytes/s", *(amount(found[0]) + "/s" if found else "" for found in rates))
        if scene.framing != "raw":
            table.add_row("packets/s", *(f"{found[1]:,.0f}" if found else "" for found in rates))
        rows: tuple[tuple[str, Callable[[Sample], str]], ...] = (
            ("bytes", lambda one: amount(one.bytes)),
            ("packets", lambda one: f"{one.packets:,}" if one.packets else "-"),
            ("TLS records", lambda one: f"{one.records:,}" if one.records else "not told"),
            ("lost or torn", lambda one: f"{one.lost + one.torn:,}"),
            ("CPU per gigabyte", lambda one: f"{one.cpu_per_gigabyte:.2f} s" if one.cpu else "-"),
            ("latency p50", lambda one: duration(one.latency_p50)),
            ("latency p99", lambda one: duration(one.latency_p99)),
        )
        for name, cell in rows:
            if name == "packets" and scene.framing == "raw":
                continue
            if name.startswith("latency") and not scene.tells_latency:
                continue
            table.add_row(name, *(cell(one) if one is not None else "" for one in samples))
        return table

    def _rate(self, scene: Scene, pump: PumpName) -> tuple[float, float] | None:
        """Of the last moment while it runs, of the whole run afterwards."""
        sample = self._last.get((scene.name, pump))
        if sample is None:
            return None
        if self._now == (scene.name, pump):
            return self._rates.get((scene.name, pump), (0.0, 0.0))
        return sample.bytes / sample.elapsed, sample.packets / sample.elapsed

    def _sentence(self, scene: Scene) -> Text:
        ratios = self.ratios(scene)
        words = Text(f"{scene.name}: ", style="bold")
        said = []
        if "throughput" in ratios:
            said.append(f"{ratios['throughput']:.2f} times the bytes per second")
        if "cpu_per_gigabyte" in ratios:
            said.append(f"{ratios['cpu_per_gigabyte']:.2f} of the processor time per gigabyte")
        if "latency_p99" in ratios:
            said.append(f"{ratios['latency_p99']:.2f} of the p99 latency")
        words.append(
            ", ".join(said) + " of the asyncio pump." if said else "too short to compare.", style="not bold"
        )
        return words
