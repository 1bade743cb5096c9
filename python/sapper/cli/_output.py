"""How commands speak: tables for people on standard error, JSON lines for programs on standard output.

rich is loaded where it draws: a command that serves for months draws nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any, cast

from sapper._log import tell
from sapper.cli._lines import Patient, is_told, put
from sapper.errors import DeviceError, ErrorContext, SapperError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sapper.stats import FlowStats, PumpStats

__all__ = [
    "EXIT_CODES",
    "amount",
    "canvas",
    "drawn",
    "duration",
    "error_values",
    "fail",
    "log_told",
    "now",
    "plain",
    "rate",
    "say",
    "stats_table",
    "stats_values",
    "tell_json",
    "unwritten",
    "write_json",
]

#: What is no text, or changes how what stands around it is shown: a line's end, a turn of the direction.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

EXIT_CODES = (
    "Exit codes: 0 an orderly end (Ctrl-C, and a reader who leaves, included), 1 a defect, 2 wrong options, "
    "3 misuse, 4 a local resource, 5 no way to the peer, 6 a deadline, 7 a protocol error, "
    "8 TLS or a certificate, 9 credentials refused, 10 denied by policy, 11 a remote call, 12 a registry, "
    "13 a right is missing, 130 stopped by a second Ctrl-C."
)


def error_values(error: SapperError) -> dict[str, Any]:
    """An error for programs."""
    return {
        "kind": error.kind.value,
        "message": error.message,
        "retryable": error.retryable,
        **{name: value for name, value in asdict(error.context).items() if value not in (None, False)},
    }


def fail(error: SapperError, *, as_json: bool) -> int:
    """Tells an error on standard error and gives the exit code; a note of the error says what to do next."""
    if as_json:
        last = tell_json if is_told(sys.stderr) else write_json
        last({"time": now(), "event": "error", "error": error_values(error)}, sys.stderr)
    else:
        from rich.console import Console
        from rich.text import Text

        from sapper.cli._hints import hint, offered

        console = Console(stderr=True, highlight=False, emoji=False)
        with drawn(console):
            console.print(Text.assemble(("error", "bold red"), ": ", plain(str(error))), soft_wrap=True)
            notes: list[str] = getattr(error, "__notes__", [])
            said = notes[-1] if notes else hint(error.kind, offered(sys.argv[1:]), error.reason)
            if said is not None:
                console.print(Text.assemble(("try", "bold"), ": ", plain(said)), soft_wrap=True)
    return error.kind.exit_code


def unwritten(error: OSError) -> int:
    """Tells that standard output cannot be written to, and gives the exit code: that of a local resource."""
    # What is left in its buffer would be tried again at the end, and fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    context = ErrorContext(errno=error.errno)
    return fail(DeviceError(f"standard output: {error.strerror}", context), as_json="--json" in sys.argv)


@contextlib.contextmanager
def drawn(console: Console) -> Iterator[None]:
    """Draws behind the lines that were told to standard error; as they do, it waits for nobody."""
    if not is_told(sys.stderr):
        yield
        return
    with console.capture() as drawing:
        yield
    put(drawing.get(), sys.stderr, _lost_text)


def canvas() -> Console:
    """Standard error to draw on while a command serves: it goes on where nobody reads."""
    from rich.console import Console

    stream = cast("IO[str]", Patient(sys.stderr, _lost_text))
    return Console(file=stream, highlight=False, emoji=False)


def now() -> str:
    """The time of an event."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def say(*lines: str) -> None:
    """Lines for people. What a peer wrote in one does not move their cursor, and begins no line of its own.

    Where nobody reads, or the disk is full, the line is lost and what tells it goes on. Not by rich,
    which loads what it needs when it needs it: perhaps no file can be opened then.
    """
    with contextlib.suppress(OSError):
        put("".join(f"{_visible(line)}\n" for line in lines), sys.stderr, _lost_text)


def plain(text: str) -> Text:
    """Text for rich to draw as it is: without markup, and without what moves a cursor."""
    from rich.text import Text

    return Text(_visible(text))


def _visible(text: str) -> str:
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def _lost_text(count: int) -> str:
    return f"warning: {count} lines were lost: nobody read them\n"


def _lost_json(count: int) -> str:
    return _json({"time": now(), "event": "lines_lost", "count": count})


class _Lines(logging.Handler):
    """Each record of the log as what a command tells."""

    def __init__(self, note: Callable[..., None] | None) -> None:
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level, message = record.levelname.lower(), record.getMessage()
            values: dict[str, Any] = {"level": level, "logger": record.name, "message": message}
            lines = [f"{level}: {message.removeprefix('sapper: ')}"]
            if named := getattr(record, "sapper", None):
                values["values"] = named
            if record.exc_info:
                values["traceback"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
                lines += values["traceback"].splitlines()
            if self._note is not None:
                self._note("log", "", **values)
            else:
                say(*lines)
        except Exception:  # noqa: BLE001 - a line that cannot be told ends nothing
            self.handleError(record)


@contextlib.contextmanager
def log_told(note: Callable[..., None] | None) -> Iterator[None]:
    """Has what is logged told like everything else.

    Args:
        note: Writes an event with values for programs; ``None`` where people read standard error.
    """
    handler = _Lines(note)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        tell(last=True)
        root.removeHandler(handler)


def write_json(values: dict[str, Any], to: IO[str] | None = None) -> None:
    """One line of JSON."""
    out = to if to is not None else sys.stdout
    out.write(_json(values))
    out.flush()


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, separators=(",", ":")) + "\n"


def tell_json(values: dict[str, Any], to: IO[str] | None = None) -> None:
    """The same while a command serves: it goes on where the line cannot be written, or waits to be."""
    with contextlib.suppress(OSError):
        put(_json(values), to if to is not None else sys.stdout, _lost_json)


def amount(count: float, unit: str = "B") -> str:
    """A number with a decimal prefix: ``1.25 MB``."""
    for prefix in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if not prefix else f"{count:.2f} {prefix}{unit}"
        count /= 1000
    return f"{count:.2f} T{unit}"


def rate(count: float, seconds: float, unit: str = "B") -> str:
    """An amount per second."""
    return f"{amount(count / seconds if seconds > 0 else 0.0, unit)}/s"


def duration(seconds: float) -> str:
    """A short time for an eye: ``85 µs``."""
    if seconds <= 0:
        return "-"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds:.2f} s"


def stats_values(stats: PumpStats) -> dict[str, Any]:
    """Counters for programs."""

    def flow(one: FlowStats) -> dict[str, Any]:
        names = ("bytes", "packets", "backpressure", "latency_p50", "latency_p99", "latency_max")
        values = {name: getattr(one, name) for name in names}
        return {**values, "latency": asdict(one.latency), "drops": dict(one.drops)}

    return {
        "running": stats.running,
        "encapsulate": flow(stats.encapsulate),
        "decapsulate": flow(stats.decapsulate),
        "transport": asdict(stats.transport),
        "sink": asdict(stats.sink),
        "facts": dict(stats.facts),
    }


def stats_table(stats: PumpStats, before: PumpStats | None = None) -> Table:
    """Counters for people; rates since ``before``, or since the start."""
    from rich.table import Table

    seconds = stats.running - (before.running if before else 0.0)
    now = (stats.encapsulate, stats.decapsulate)
    then = (before.encapsulate, before.decapsulate) if before else (None, None)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("to the network", justify="right")
    table.add_column("from the network", justify="right")
    moved = [one.bytes - (past.bytes if past else 0) for one, past in zip(now, then, strict=True)]
    table.add_row("bytes", *(amount(one.bytes) for one in now))
    table.add_row("bytes/s", *(rate(count, seconds) for count in moved))
    if any(one.packets for one in now):
        packets = [one.packets - (past.packets if past else 0) for one, past in zip(now, then, strict=True)]
        table.add_row("packets", *(f"{one.packets:,}" for one in now))
        table.add_row("packets/s", *(rate(count, seconds, "") for count in packets))
    records = (stats.transport.records_sent, stats.transport.records_received)
    if any(records):
        table.add_row("records", *(f"{count:,}" for count in records))
    table.add_row("latency p50", *(duration(one.latency_p50) for one in now))
    table.add_row("latency p99", *(duration(one.latency_p99) for one in now))
    table.add_row("back-pressure", *(duration(one.backpressure) for one in now))
    if any(one.drops for one in now):
        drops = (", ".join(f"{reason} {count:,}" for reason, count in one.drops.items()) for one in now)
        table.add_row("drops", *(text or "-" for text in drops))
    return table
