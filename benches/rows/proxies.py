"""Rows: a TLS proxy in front of a plain service, beside HAProxy, nginx and stunnel as Debian has them.

`tls_load` is the client, with OpenSSL, and the service; each proxy runs in processes of its own, whose time
and memory are counted. TLS 1.3, one suite, one group, one certificate for all.
"""

from __future__ import annotations

import functools
import json
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Self

from benches.children import BenchError, Children
from benches.credentials import Credentials, Files
from benches.figures import OURS, Column, Round, Row, Samples, alternate
from benches.programs import compiled
from benches.proxies import PEERS, Subject, start
from benches.rows import RowFunction, Settings
from benches.subjects import has_sapper

_FLOW = (
    Column("receive", "to clients MB/s", 1e-6, 0),
    Column("receive_cpu", "CPU s/GB", 1e9),
    Column("send", "from clients MB/s", 1e-6, 0),
    Column("send_cpu", "CPU s/GB", 1e9),
)
_CONNECTIONS = (
    Column("one", "full, 1 at a time /s", 1, 0),
    Column("many", "full, 32 /s", 1, 0),
    Column("mutual", "mutual, 32 /s", 1, 0),
    Column("resumed", "resumed, 32 /s", 1, 0),
)
_IDLE = (Column("resident", "resident KB each", 1 / 1024, 1),)
_ECHO = (
    Column("p50", "alone p50 µs", 1e6, 0),
    Column("p99", "p99 µs", 1e6, 0),
    Column("even_p50", "beside 200 MB/s p50 µs", 1e6, 0),
    Column("even_p99", "p99 µs", 1e6, 0),
    Column("busy_p50", "beside all it carries p50 µs", 1e6, 0),
    Column("busy_p99", "p99 µs", 1e6, 0),
    Column("busy_rate", "MB/s", 1e-6, 0),
)
#: Bytes a second of the bulk flow that is the same for all: a proxy that carries less leaves more of two
#: cores to the echo, so that beside all that each carries the fastest has the hardest test.
_EVEN_RATE = 200e6
#: Rounds of the echo for one of the others, each of which is as much shorter: a p99 beside full cores differs
#: by ten times from one second to the next, and many short looks tell it better than few long ones.
_ECHO_ROUNDS = 3
#: One round of one proxy.
Work = Callable[[str, Files, Settings], Round]
_IDLE_KB = 24.0
_FLOW_RATIO = 1.1
_CPU_RATIO = 0.8


def rows() -> dict[str, RowFunction]:
    """The rows of this module."""
    return {
        "proxy-flow-1": functools.partial(measure_flows, 1),
        "proxy-flow-16": functools.partial(measure_flows, 16),
        "proxy-connections": measure_connections,
        "proxy-idle": measure_idle,
        "proxy-echo": measure_echo,
    }


def measure_flows(count: int, settings: Settings) -> Row:
    """Bytes per second each way, and the proxy's processor time for them."""
    flows = "one flow" if count == 1 else f"{count} flows"
    row = Row(f"proxy-flow-{count}", f"TLS proxy, {flows}", _FLOW)
    _take(row, settings, functools.partial(_flows, count))
    for way, text in (("receive", "to clients"), ("send", "from clients")):
        best = row.best(way, PEERS, highest=True)
        row.require(
            f"bytes/s {text} against {best}", way, best, ">=", _FLOW_RATIO if count == 1 else row.slack(way)
        )
        if count > 1:
            row.require(f"CPU a gigabyte {text} against {best}", f"{way}_cpu", best, "<=", _CPU_RATIO)
    return row


def measure_connections(settings: Settings) -> Row:
    """New connections per second, each with an echo that proves it."""
    row = Row("proxy-connections", "new TLS 1.3 connections through a proxy", _CONNECTIONS)
    _take(row, settings, _connections)
    for column in _CONNECTIONS:
        best = row.best(column.key, PEERS, highest=True)
        row.require(f"{column.title} against {best}", column.key, best, ">=", row.slack(column.key))
    return row


def measure_idle(settings: Settings) -> Row:
    """Private memory of the proxy's processes per idle connection."""
    count = 1000 if settings.quick else 5000
    row = Row("proxy-idle", f"memory of an idle connection at {count:,}", _IDLE)
    _take(row, settings, functools.partial(_idle, count), rounds=min(settings.rounds, 3))
    ours = row.subjects.get(OURS)
    kilobytes = Samples(tuple(value / 1024 for value in ours["resident"].values)) if ours else None
    row.require_value("KB of an idle connection", kilobytes, "<=", _IDLE_KB)
    best = row.best("resident", PEERS, highest=False)
    row.require(f"against {best}", "resident", best, "<=", 1.0)
    return row


def measure_echo(settings: Settings) -> Row:
    """Latency of one byte there and back: alone, beside a flow of one rate, beside all the proxy carries."""
    row = Row("proxy-echo", "echo of one byte through a proxy", _ECHO)
    short = replace(
        settings, rounds=_ECHO_ROUNDS * settings.rounds, seconds=max(settings.seconds / _ECHO_ROUNDS, 0.3)
    )
    _take(row, short, _echo)
    for column in _ECHO:
        if column.key == "busy_rate":
            continue
        best = row.best(column.key, PEERS, highest=False)
        row.require(f"{column.title} against {best}", column.key, best, "<=", 2 - row.slack(column.key))
    return row


def _take(row: Row, settings: Settings, work: Work, rounds: int | None = None) -> None:
    if not has_sapper():
        row.unmeasured.append("sapper is not installed in this interpreter (make build)")
    with Credentials() as files:
        subjects = {}
        for name in (*([OURS] if has_sapper() else []), *PEERS):
            try:
                _probe(name, files)
            except BenchError as error:
                row.unmeasured.append(f"{name}: {error}")
                continue
            subjects[name] = functools.partial(work, name, files, settings)
        row.subjects = alternate(subjects, rounds or settings.rounds, settings.step(row.name))


def _probe(name: str, files: Files) -> None:
    """Whether it is installed and takes its configuration."""
    with _Scene(name, files):
        pass


class _Scene:
    """A service, and a proxy in front of it."""

    def __init__(self, name: str, files: Files, *, mutual: bool = False) -> None:
        self._name, self._files, self._mutual = name, files, mutual
        self._children = Children()
        self._folder = tempfile.TemporaryDirectory(prefix="sapper-bench-")
        self.proxy: Subject

    def __enter__(self) -> Self:
        self._children.__enter__()
        try:
            with socket.create_server(("127.0.0.1", 0), backlog=4096) as service:
                number = service.fileno()
                self._children.start([compiled("tls_load"), "serve", "--listen-fd", str(number)], (number,))
                with socket.create_server(("127.0.0.1", 0)) as free:
                    port = free.getsockname()[1]
                folder = Path(self._folder.name)
                self.proxy = start(
                    self._name,
                    self._children,
                    self._files,
                    port,
                    service.getsockname()[1],
                    folder,
                    mutual=self._mutual,
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._children.__exit__(None, None, None)
        self._folder.cleanup()

    def load(
        self, mode: str, settings: Settings, count: int = 1, rate: float = 0
    ) -> tuple[dict[str, float], float]:
        """Runs the client: its figures, and the proxy's processor time from its first line to its last."""
        command: list[str | Path] = [
            compiled("tls_load"), mode, "--port", str(self.proxy.port), "--roots", self._files.roots,
            "--seconds", str(settings.seconds), "--warm", str(settings.warm), "--count", str(count),
            "--rate", str(rate),
        ]  # fmt: skip
        if self._mutual:
            command += ["--certificate", self._files.chain, "--private-key", self._files.key]
        client = self._children.start(command)
        client.first_line(20)
        before = self.proxy.cpu_seconds()
        said = client.result(settings.seconds + 20)
        after = self.proxy.cpu_seconds()
        figures: dict[str, float] = json.loads(said)
        return figures, after - before

    def hold(self, count: int) -> None:
        """Opens so many connections and leaves them open."""
        client = self._children.start(
            [compiled("tls_load"), "hold", "--port", str(self.proxy.port), "--roots", self._files.roots,
             "--count", str(count)],
        )  # fmt: skip
        client.first_line(120)


def _flows(count: int, name: str, files: Files, settings: Settings) -> Round:
    measured: Round = {}
    for mode in ("receive", "send"):
        with _Scene(name, files) as scene:
            figures, cpu = scene.load(mode, settings, count)
        measured[mode] = figures["bytes"] / figures["seconds"]
        measured[f"{mode}_cpu"] = cpu / figures["bytes"]
    return measured


def _connections(name: str, files: Files, settings: Settings) -> Round:
    measured: Round = {}
    ways = (("one", "full", 1, False), ("many", "full", 32, False), ("mutual", "full", 32, True))
    for key, mode, lanes, mutual in (*ways, ("resumed", "resumed", 32, False)):
        with _Scene(name, files, mutual=mutual) as scene:
            figures, _ = scene.load(mode, settings, lanes)
        measured[key] = figures["connections"] / figures["seconds"]
    return measured


def _idle(count: int, name: str, files: Files, settings: Settings) -> Round:
    del settings
    with _Scene(name, files) as scene:
        scene.hold(50)  # what a process has once is made
        before = scene.proxy.private_bytes()
        scene.hold(count)
        return {"resident": (scene.proxy.private_bytes() - before) / count}


def _echo(name: str, files: Files, settings: Settings) -> Round:
    with _Scene(name, files) as scene:
        alone, _ = scene.load("echo", settings)
        even, _ = scene.load("busy-echo", settings, rate=_EVEN_RATE)
        busy, _ = scene.load("busy-echo", settings)
    return {
        "p50": alone["p50"],
        "p99": alone["p99"],
        "even_p50": even["p50"],
        "even_p99": even["p99"],
        "busy_p50": busy["p50"],
        "busy_p99": busy["p99"],
        "busy_rate": busy["rate"],
    }
