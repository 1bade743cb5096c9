"""Row: TLS that a Python program reads and writes itself, beside asyncio's own TLS streams.

One connection over loopback, TLS 1.3, certificates. The far end is the same native bridge for every subject,
in a process of its own: it does nothing but feed, swallow or echo. What is compared is the Python side:
bytes per second in reads of up to 256 KB and in writes of 64 KB, processor time of the whole process per
gigabyte, and the time of a one-byte echo, where every byte crosses between threads on our side and asyncio's
does not.
"""

from __future__ import annotations

import functools
import json
import socket
from pathlib import Path

from benches.children import Children
from benches.credentials import Credentials, Files
from benches.figures import OURS, Column, Round, Row, alternate
from benches.programs import peer_python
from benches.rows import RowFunction, Settings
from benches.subjects import has_sapper, our_program

ASYNCIO = "asyncio streams"

COLUMNS = (
    Column("receive", "receive MB/s", 1e-6, 0),
    Column("receive_cpu", "CPU s/GB", 1e9),
    Column("send", "send MB/s", 1e-6, 0),
    Column("send_cpu", "CPU s/GB", 1e9),
    Column("p50", "echo p50 µs", 1e6, 0),
    Column("p99", "echo p99 µs", 1e6, 0),
)


def rows() -> dict[str, RowFunction]:
    """The row of this module."""
    return {"tls-stream": measure}


def measure(settings: Settings) -> Row:
    """Both subjects, alternating."""
    row = Row("tls-stream", "one TLS 1.3 connection that Python reads and writes", COLUMNS)
    names = (OURS, ASYNCIO) if has_sapper() else ()
    if not names:
        row.unmeasured.append(
            "sapper is not installed in this interpreter (make build): it is the far end too"
        )
    with Credentials() as files:
        subjects = {name: functools.partial(one_round, name, files, settings) for name in names}
        row.subjects = alternate(subjects, settings.rounds, settings.step(row.name))
    row.require("received bytes/s against asyncio's streams", "receive", ASYNCIO, ">=", 1.0)
    row.require("sent bytes/s against asyncio's streams", "send", ASYNCIO, ">=", 1.0)
    return row


def one_round(name: str, files: Files, settings: Settings) -> Round:
    """Receiving, sending, echoes: a connection each."""
    measured = {mode: run(name, mode, files, settings) for mode in ("receive", "send", "echo")}
    return {
        "receive": measured["receive"]["rate"],
        "receive_cpu": measured["receive"]["cpu"],
        "send": measured["send"]["rate"],
        "send_cpu": measured["send"]["cpu"],
        "p50": measured["echo"]["p50"],
        "p99": measured["echo"]["p99"],
    }


def run(name: str, mode: str, files: Files, settings: Settings) -> dict[str, float]:
    """One subject in one mode against a far end of its own."""
    command: list[str | Path] = (
        our_program("stream") if name == OURS else [peer_python()[0], "-m", "benches.peers.asyncio_stream"]
    )
    with socket.create_server(("127.0.0.1", 0)) as listener, Children() as children:
        port, number = listener.getsockname()[1], listener.fileno()
        children.start(
            [*our_program("stream_far"), mode, "--listen-fd", str(number),
             "--certificate", files.chain, "--private-key", files.key],
            (number,),
        )  # fmt: skip
        subject = children.start(
            [*command, mode, "--port", str(port), "--seconds", str(settings.seconds),
             "--warm", str(settings.warm), "--roots", files.roots],
        )  # fmt: skip
        figures: dict[str, float] = json.loads(subject.result(settings.warm + settings.seconds + 20))
        return figures
