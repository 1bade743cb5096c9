"""The rows of the table, a module for each kind of work.

A row is a function that takes `Settings` and gives a `Row`; `ROWS` names them in the order of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benches.figures import Row


@dataclass(frozen=True)
class Settings:
    """How long and how often, and where progress is told."""

    rounds: int
    seconds: float
    warm: float
    quick: bool
    say: Callable[[str], None]

    def step(self, row: str) -> Callable[[str, int], None]:
        """The progress call-back of one row."""
        return lambda subject, number: self.say(f"{row}: round {number + 1} of {self.rounds}, {subject}")


RowFunction = Callable[[Settings], Row]
