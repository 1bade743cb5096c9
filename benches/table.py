"""Prints rows for people (rich) and for programs (JSON)."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benches.figures import Column, Floor, Row, Samples

_RELATION_WORDS = {">=": "at least", "<=": "at most", "<": "below", ">": "above"}


def machine() -> dict[str, str | int]:
    """Where the figures come from."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def print_row(console: Console, row: Row) -> None:
    """One row as a table of its subjects, and its floors below."""
    table = Table(title=f"[bold]{row.name}[/]  {row.title}", title_justify="left", caption_justify="left")
    table.add_column("")
    for column in row.columns:
        table.add_column(column.title, justify="right")
    for name, figures in row.subjects.items():
        table.add_row(name, *(cell(figures[column.key], column) for column in row.columns))
    if row.subjects:
        console.print(table)
    else:
        console.print(f"[bold]{row.name}[/]  {row.title}")
    for floor in row.floors:
        console.print("  " + sentence(floor))
    for reason in row.unmeasured:
        console.print(f"  [yellow]not measured[/]  {escape(reason)}", highlight=False)
    for note in row.notes:
        console.print(f"  note: {note}", highlight=False)
    console.print()


def cell(samples: Samples, column: Column) -> str:
    """Median, and the spread in grey."""
    if len(samples.values) == 1:
        return f"{samples.median * column.scale:,.{column.digits}f}"
    low, middle, high = (
        f"{value * column.scale:,.{column.digits}f}" for value in (samples.low, samples.median, samples.high)
    )
    return f"{middle} [dim]{low}-{high}[/]"


def sentence(floor: Floor) -> str:
    """One floor with its verdict."""
    mark = "[green]holds[/]       " if floor.holds else "[bold red]MISSED[/]      "
    value = floor.value
    spread = f"{value.low:.{floor.digits}f}-{value.high:.{floor.digits}f}"
    must = f"must be {_RELATION_WORDS[floor.relation]} {floor.limit:g}"
    return f"{mark}  {floor.text}: [bold]{value.median:.{floor.digits}f}[/] [dim]{spread}[/], {must}"


def summary(console: Console, rows: Sequence[Row]) -> None:
    """One line for all."""
    missed = sum(not floor.holds for row in rows for floor in row.floors)
    unmeasured = sum(len(row.unmeasured) for row in rows)
    held = sum(floor.holds for row in rows for floor in row.floors)
    console.print(f"{held} floors hold, {missed} missed, {unmeasured} not measured")


def as_json(rows: Sequence[Row], rounds: int, seconds: float) -> dict[str, object]:
    """The same for programs; every sample of every round is in it, unscaled (seconds, bytes, per second)."""
    return {
        "machine": machine(),
        "rounds": rounds,
        "seconds": seconds,
        "holds": all(row.holds for row in rows),
        "rows": [
            {
                "name": row.name,
                "title": row.title,
                "holds": row.holds,
                "subjects": {
                    name: {key: list(samples.values) for key, samples in figures.items()}
                    for name, figures in row.subjects.items()
                },
                "floors": [
                    {
                        "text": floor.text,
                        "median": floor.value.median,
                        "values": list(floor.value.values),
                        "relation": floor.relation,
                        "limit": floor.limit,
                        "holds": floor.holds,
                    }
                    for floor in row.floors
                ],
                "unmeasured": row.unmeasured,
                "notes": row.notes,
            }
            for row in rows
        ],
    }
