"""Rows: what an idle bridge costs in memory, and what setting one up and tearing it down costs in time.

Memory is the growth of the process's private resident memory, so it holds whatever allocator is in use and
the Python objects too; what the C allocator counts is printed beside it. The far ends are in a process of
their own. A cycle is a pair of ends in one process: handshake on both, then an orderly end of both.
"""

from __future__ import annotations

import functools
import json
import socket
from pathlib import Path

from benches.children import Children
from benches.credentials import Credentials, Files
from benches.figures import OURS, Column, Round, Row, Samples, alternate
from benches.programs import compiled, peer_python
from benches.rows import RowFunction, Settings
from benches.subjects import KEY, has_sapper, our_program

ASYNCIO = "asyncio TLS"
ENGINE = "engine alone"
DRAINED = "sapper, stop(drain=2)"

IDLE_COLUMNS = (
    Column("resident", "resident KB each", 1 / 1024, 1),
    Column("allocated", "C allocator KB each", 1 / 1024, 1),
)
CYCLE_COLUMNS = (
    Column("seconds", "µs a pair", 1e6, 0),
    Column("cpu_seconds", "CPU µs a pair", 1e6, 0),
)
_TITLES = {"certificates": "certificates, TLS 1.3", "psk": "pre-shared key, TLS 1.2"}
_IDLE_KB = {"certificates": 16.0, "psk": 26.0}
_SETUP_EXTRA_US = 300.0
_ROUNDS = 3
"""Memory hardly varies, and a round of these rows is a thousand samples by itself."""


def rows() -> dict[str, RowFunction]:
    """The four rows of this module."""
    return {
        **{f"heap-{kind}": functools.partial(measure_idle, kind) for kind in _TITLES},
        **{f"setup-{kind}": functools.partial(measure_cycles, kind) for kind in _TITLES},
    }


def measure_idle(kind: str, settings: Settings) -> Row:
    """Memory of an idle bridge, in a process that holds thousands."""
    count = 500 if settings.quick else 2000
    row = Row(f"heap-{kind}", f"memory of an idle end at {count:,}, {_TITLES[kind]}", IDLE_COLUMNS)
    with Credentials() as files:
        names = [name for name in _names(kind, row) if name not in (ENGINE, DRAINED)]
        subjects = {name: functools.partial(one_idle, name, kind, files, count) for name in names}
        row.subjects = alternate(subjects, min(settings.rounds, _ROUNDS), settings.step(row.name))
    ours = row.subjects.get(OURS)
    kilobytes = Samples(tuple(value / 1024 for value in ours["resident"].values)) if ours else None
    row.require_value("KB of an idle bridge", kilobytes, "<=", _IDLE_KB[kind])
    return row


def measure_cycles(kind: str, settings: Settings) -> Row:
    """Time of setting a pair up and tearing it down."""
    count = 200 if settings.quick else 1000
    row = Row(f"setup-{kind}", f"set-up and tear-down of {count:,} pairs, {_TITLES[kind]}", CYCLE_COLUMNS)
    with Credentials() as files:
        subjects = {
            name: functools.partial(one_cycles, name, kind, files, count) for name in _names(kind, row)
        }
        row.subjects = alternate(subjects, min(settings.rounds, _ROUNDS), settings.step(row.name))
    ours, engine = row.subjects.get(OURS), row.subjects.get(ENGINE)
    extra = None
    if ours and engine:
        extra = Samples(tuple(value * 1e6 for value in ours["seconds"].minus(engine["seconds"]).values))
    row.require_value("µs beyond the engine's own handshake", extra, "<=", _SETUP_EXTRA_US)
    row.require("time against asyncio's TLS", "seconds", ASYNCIO, "<", 0.5)
    return row


def _names(kind: str, row: Row) -> list[str]:
    names = [OURS, DRAINED, ENGINE] if has_sapper() else []
    python, has_psk = peer_python()
    if kind == "psk" and not has_psk:
        row.notes.append(f"asyncio is left out: {python} has no pre-shared keys (CPython 3.13 has).")
        return names
    return [*names, ASYNCIO]


def _command(name: str) -> list[str | Path]:
    if name in (OURS, DRAINED):
        return our_program("bridges")
    if name == ENGINE:
        return our_program("engines")
    return [peer_python()[0], "-m", "benches.peers.asyncio_bridges"]


def one_idle(name: str, kind: str, files: Files, count: int) -> Round:
    """One process under test and one that holds the far ends."""
    own = ["--key", KEY] if kind == "psk" else files.arguments()
    far = ["--key", KEY] if kind == "psk" else ["--certificate", files.chain, "--private-key", files.key]
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener, Children() as children:
        port = listener.getsockname()[1]
        children.start([compiled("hold"), "--listen-fd", str(listener.fileno()), *far], (listener.fileno(),))
        tested = children.start([*_command(name), "idle", "--port", str(port), "--count", str(count), *own])
        measured = json.loads(tested.result(120))
    return {"resident": measured["resident"], "allocated": measured["allocated"]}


def one_cycles(name: str, kind: str, files: Files, count: int) -> Round:
    """One process with both ends."""
    own = ["--key", KEY] if kind == "psk" else files.arguments()
    own += ["--drain", "2"] if name == DRAINED else []
    with Children() as children:
        measured = json.loads(
            children.start([*_command(name), "cycles", "--count", str(count), *own]).result(120)
        )
    return {"seconds": measured["seconds"], "cpu_seconds": measured["cpu_seconds"]}
