"""`python -m benches`: prints the tables, marks what misses its floor, and exits with 1 then.

Exit codes: 0 every floor holds; 1 one is missed; 2 wrong options; 3 something could not be measured (a
program or a privilege is missing), and nothing that could be was missed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from types import FrameType

from rich.console import Console

from benches.children import BenchError
from benches.figures import Row
from benches.rows import (
    RowFunction,
    Settings,
    bridges,
    exposing,
    packets,
    proxies,
    streams,
    tun_offload,
    tunnels,
)
from benches.table import as_json, machine, print_row, summary

ROWS: dict[str, RowFunction] = {
    **packets.rows(),
    **tun_offload.rows(),
    **tunnels.rows(),
    **bridges.rows(),
    **streams.rows(),
    **proxies.rows(),
    **exposing.rows(),
}


def main() -> int:
    """Runs the chosen rows."""
    given = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    # Into a file or a pipe without the folding that a narrow terminal needs.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    told = machine()
    rounds = given.rounds or (2 if given.quick else 5)
    seconds = given.seconds or (0.5 if given.quick else 1.5)
    console.print(
        f"{told['cores']} cores, {told['system']}; {rounds} alternating rounds of {seconds:g} s; "
        "median [dim]lowest-highest[/]; ratios are taken within a round\n"
    )
    done = []
    with console.status("") as status:
        settings = Settings(rounds, seconds, 0.3, given.quick, status.update)
        for name in given.only or ROWS:
            done.append(run_row(name, settings))
            print_row(console, done[-1])
    summary(console, done)
    if given.json:
        given.json.write_text(json.dumps(as_json(done, rounds, seconds), indent=2) + "\n")
    if any(not floor.holds for row in done for floor in row.floors):
        return 1
    return 3 if any(row.unmeasured for row in done) else 0


def run_row(name: str, settings: Settings) -> Row:
    """One row; what it cannot measure is told in it and does not keep the others from running."""
    try:
        return ROWS[name](settings)
    except BenchError as error:
        reason = "\n  ".join((str(error), *getattr(error, "__notes__", ())))
        return Row(name, "", (), unmeasured=[reason])


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benches", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", action="append", choices=ROWS, metavar="ROW", help=f"one of: {', '.join(ROWS)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two short rounds: to see that it works, not to judge"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="alternating rounds of each row (5)")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of one measurement (1.5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file as well")
    given = parser.parse_args()
    if (given.rounds is not None and given.rounds < 1) or (given.seconds is not None and given.seconds <= 0):
        parser.error("--rounds and --seconds must be above zero")
    return given


def _leave(number: int, frame: FrameType | None) -> None:
    # The first one ends the bench; a second must not end its tidying up, which takes seconds at most.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
