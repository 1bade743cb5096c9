"""Rows: a service exposed through a reverse tunnel, beside rathole, bore and `ssh -R`.

`tunnel_load` is the visitor and the service; both ends of each tunnel run in processes of their own, whose
time and memory are counted.
"""

from __future__ import annotations

import functools
import json
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from benches.children import BenchError, Child, Children
from benches.credentials import Credentials, Files
from benches.exposers import BORE, COMMANDS, PEERS, RATHOLE, SSH, TLS_PEERS, Exposed, expose
from benches.figures import OURS, Column, Round, Row, Samples, alternate
from benches.memory import allow_many_fds
from benches.programs import compiled
from benches.rows import RowFunction, Settings

_FLOW = (Column("rate", "to the visitor MB/s", 1e-6, 0), Column("cpu", "CPU s/GB", 1e9))
_ECHO = (
    Column("p50", "alone p50 µs", 1e6, 0),
    Column("p99", "p99 µs", 1e6, 0),
    Column("busy_p50", "beside a bulk stream p50 µs", 1e6, 0),
    Column("busy_p99", "p99 µs", 1e6, 0),
)
_VISITS = (Column("visits", "visits /s", 1, 0), Column("cpu", "CPU µs each", 1e6, 0))
_IDLE = (Column("server", "server MB", 1e-6, 1), Column("client", "client MB", 1e-6, 1))
_STREAMS = (
    Column("server", "server KB a stream", 1 / 1024, 2),
    Column("client", "client KB a stream", 1 / 1024, 2),
)
_STALL = (Column("server", "server grew MB", 1e-6, 1), Column("client", "client grew MB", 1e-6, 1))

#: One round of one tunnel.
Work = Callable[[str, Files | None, Settings], Round]

_LANES = 100
_FLOW_RATIOS = {RATHOLE: 1.5, BORE: 1.15, SSH: 2.0}
_TLS_RATIO = 1.25
_VISITS_RATIO = 1.2
_IDLE_MB = 35.0
_STREAM_KB = 6.0
_STALL_SECONDS = 60.0
_STALL_MB = 4.5
"""docs/tunnel.md: 4 MiB that are not acknowledged, and a window of 256 KiB."""


def rows() -> dict[str, RowFunction]:
    """The rows of this module."""
    return {
        "expose-flow": measure_flow,
        "expose-flow-tls": measure_tls_flow,
        "expose-echo": measure_echo,
        "expose-visits": measure_visits,
        "expose-idle": measure_idle,
        "expose-streams": measure_streams,
        "expose-stall": measure_stall,
    }


def measure_flow(settings: Settings) -> Row:
    """Bytes a second of one stream."""
    row = Row("expose-flow", "one stream through a reverse tunnel", _FLOW)
    _take(row, settings, _flow, PEERS)
    for peer, ratio in _FLOW_RATIOS.items():
        row.require(f"bytes/s against {peer}", "rate", peer, ">=", ratio)
    return row


def measure_tls_flow(settings: Settings) -> Row:
    """The same with TLS between the two ends."""
    row = Row("expose-flow-tls", "one stream, TLS between the tunnel's ends", _FLOW)
    with Credentials() as files:
        _take(row, settings, _flow, TLS_PEERS, files)
    row.require(f"bytes/s against {RATHOLE}", "rate", RATHOLE, ">=", _TLS_RATIO)
    return row


def measure_echo(settings: Settings) -> Row:
    """Latency of one byte there and back, alone and beside a stream that receives all it can."""
    row = Row("expose-echo", "echo of one byte through a reverse tunnel", _ECHO)
    _take(row, settings, _echo, PEERS)
    best = row.best("p50", PEERS, highest=False)
    row.require(f"p50 alone against {best}", "p50", best, "<=", 2 - row.slack("p50"))
    best = row.best("busy_p99", PEERS, highest=False)
    row.require(f"p99 beside a bulk stream against {best}", "busy_p99", best, "<", 1.0)
    return row


def measure_visits(settings: Settings) -> Row:
    """New visitors a second, each with an echo that proves it and an orderly end."""
    row = Row("expose-visits", f"new visitors, {_LANES} at a time", _VISITS)
    _take(row, settings, _visits, PEERS)
    best = row.best("visits", PEERS, highest=True)
    row.require(f"visits/s against {best}", "visits", best, ">=", _VISITS_RATIO)
    return row


def measure_idle(settings: Settings) -> Row:
    """Resident memory of both ends before anybody comes: programs with the API's defaults, and commands."""
    row = Row("expose-idle", "resident memory of a process with an idle tunnel", _IDLE)
    _take(row, settings, _idle, (COMMANDS, *PEERS), rounds=min(settings.rounds, 3))
    for end in ("server", "client"):
        row.require_value(f"resident MB of the {end}", _ours(row, end, 1e-6), "<=", _IDLE_MB)
        command = _ours(row, end, 1e-6, COMMANDS)
        row.require_value(f"resident MB of the {end}'s command", command, "<=", _IDLE_MB)
    return row


def measure_streams(settings: Settings) -> Row:
    """What an idle stream holds in each process."""
    count = 1000 if settings.quick else 10_000
    row = Row("expose-streams", f"memory of an idle stream at {count:,}", _STREAMS)
    # Fewer for the peers: bore and rathole need two descriptors a visitor, and ssh polls all of them.
    work = functools.partial(_streams, count, min(count, 2000))
    _take(row, settings, work, PEERS, rounds=min(settings.rounds, 2))
    row.notes.append(f"The peers with {min(count, 2000):,} streams.")
    for end in ("server", "client"):
        row.require_value(f"KB a stream in the {end}", _ours(row, end, 1 / 1024), "<=", _STREAM_KB)
    return row


def measure_stall(settings: Settings) -> Row:
    """What grows while a visitor asks for bytes and does not read them."""
    length = 5.0 if settings.quick else _STALL_SECONDS
    row = Row("expose-stall", f"a visitor that does not read for {length:.0f} s", _STALL)
    _take(row, settings, functools.partial(_stall, length), (), rounds=1)
    for end in ("server", "client"):
        row.require_value(f"MB that the {end} grew", _ours(row, end, 1e-6), "<=", _STALL_MB)
    return row


def _ours(row: Row, column: str, scale: float, name: str = OURS) -> Samples | None:
    ours = row.subjects.get(name)
    return Samples(tuple(value * scale for value in ours[column].values)) if ours else None


def _take(
    row: Row,
    settings: Settings,
    work: Work,
    peers: Sequence[str],
    files: Files | None = None,
    rounds: int | None = None,
) -> None:
    allow_many_fds()
    subjects = {}
    for name in (OURS, *peers):
        settings.say(f"{row.name}: {name}, which is made first where it is not here")
        try:
            with _Scene(name, files):
                pass
        except BenchError as error:
            row.unmeasured.append(f"{name}: {error}")
            continue
        subjects[name] = functools.partial(work, name, files, settings)
    row.subjects = alternate(subjects, rounds or settings.rounds, settings.step(row.name))


class _Scene:
    """A service, and a tunnel that exposes it."""

    def __init__(self, name: str, files: Files | None, visitors: int = 0) -> None:
        self._name, self._files, self._visitors = name, files, visitors
        self._children = Children()
        self._folder = tempfile.TemporaryDirectory(prefix="sapper-bench-")
        self.tunnel: Exposed

    def __enter__(self) -> Self:
        self._children.__enter__()
        try:
            with socket.create_server(("127.0.0.1", 0), backlog=4096) as service:
                number = service.fileno()
                self._children.start(
                    [compiled("tunnel_load"), "serve", "--listen-fd", str(number)], (number,)
                )
                self.tunnel = expose(
                    self._name,
                    self._children,
                    service.getsockname()[1],
                    Path(self._folder.name),
                    self._files,
                    self._visitors,
                )
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, *told: object) -> None:
        error = told[1] if len(told) > 1 and isinstance(told[1], BaseException) else None
        self._children.__exit__(type(error) if error else None, error, None)
        self._folder.cleanup()

    def visitor(self, mode: str, settings: Settings | None = None, count: int = 1) -> Child:
        """Starts a visitor."""
        command: list[str | Path] = [
            compiled("tunnel_load"), mode, "--port", str(self.tunnel.port), "--count", str(count),
        ]  # fmt: skip
        if settings:
            command += ["--seconds", str(settings.seconds), "--warm", str(settings.warm)]
        return self._children.start(command)

    def visit(self, mode: str, settings: Settings, count: int = 1) -> dict[str, float]:
        """Its figures; `cpu` is both ends' processor time from its first line to its last."""
        visitor = self.visitor(mode, settings, count)
        visitor.first_line(20)
        before = self.tunnel.cpu_seconds()
        figures: dict[str, float] = json.loads(visitor.result(settings.seconds + 20))
        return {**figures, "cpu": self.tunnel.cpu_seconds() - before}


def _flow(name: str, files: Files | None, settings: Settings) -> Round:
    with _Scene(name, files) as scene:
        figures = scene.visit("receive", settings)
    return {"rate": figures["bytes"] / figures["seconds"], "cpu": figures["cpu"] / figures["bytes"]}


def _echo(name: str, files: Files | None, settings: Settings) -> Round:
    with _Scene(name, files) as scene:
        alone = scene.visit("echo", settings)
        busy = scene.visit("busy-echo", settings)
    return {
        "p50": alone["p50"],
        "p99": alone["p99"],
        "busy_p50": busy["p50"],
        "busy_p99": busy["p99"],
    }


def _visits(name: str, files: Files | None, settings: Settings) -> Round:
    with _Scene(name, files) as scene:
        figures = scene.visit("visit", settings, _LANES)
    return {"visits": figures["visits"] / figures["seconds"], "cpu": figures["cpu"] / figures["visits"]}


def _idle(name: str, files: Files | None, settings: Settings) -> Round:
    del settings
    with _Scene(name, files) as scene:
        return _resident(scene)


def _streams(ours: int, theirs: int, name: str, files: Files | None, settings: Settings) -> Round:
    del settings
    count = ours if name == OURS else theirs
    with _Scene(name, files, visitors=count + 1000) as scene:
        scene.visitor("hold", count=50).first_line(60)  # what a process has once is made
        before = _resident(scene)
        scene.visitor("hold", count=count).first_line(120)
        after = _resident(scene)
    return {end: (after[end] - before[end]) / count for end in after}


def _stall(length: float, name: str, files: Files | None, settings: Settings) -> Round:
    del settings
    with _Scene(name, files) as scene:
        before = _resident(scene)
        scene.visitor("stall").first_line(20)
        most = dict.fromkeys(before, 0.0)
        until = time.monotonic() + length
        while time.monotonic() < until:
            now = _resident(scene)
            most = {end: max(most[end], now[end] - before[end]) for end in most}
            time.sleep(0.1)
    return most


def _resident(scene: _Scene) -> Round:
    return {end: float(scene.tunnel.resident(end)) for end in ("server", "client")}
