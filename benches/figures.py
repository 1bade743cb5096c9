"""What a row measured and what it must reach: samples, ratios within one round, floors.

A ratio is taken round by round, ours against the peer that ran next to it, and the median of these ratios is
judged: the machine's absolute speed drifts, two neighbours in one round drift together.
"""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

OURS = "sapper"
"""The subject's name of our own side in every row."""

Relation = Literal[">=", "<=", "<", ">"]
_COMPARE: dict[Relation, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Samples:
    """One figure, once per round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value, which is what is judged."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest value."""
        return max(self.values)

    def over(self, other: Samples) -> Samples:
        """The ratio to another figure, round by round."""
        return Samples(
            tuple(a / b if b else float("inf") for a, b in zip(self.values, other.values, strict=True))
        )

    def minus(self, other: Samples) -> Samples:
        """The difference to another figure, round by round."""
        return Samples(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))


@dataclass(frozen=True)
class Column:
    """A figure that a row measures for each of its subjects."""

    key: str
    title: str
    scale: float = 1.0
    digits: int = 2


@dataclass(frozen=True)
class Floor:
    """What a figure must reach, and what it reached."""

    text: str
    value: Samples
    relation: Relation
    limit: float
    digits: int = 2

    @property
    def holds(self) -> bool:
        """Whether the median reaches it."""
        return _COMPARE[self.relation](self.value.median, self.limit)


@dataclass
class Row:
    """One row of the table: the subjects' figures and the floors."""

    name: str
    title: str
    columns: Sequence[Column]
    subjects: dict[str, dict[str, Samples]] = field(default_factory=dict)
    floors: list[Floor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)

    def require(self, text: str, column: str, peer: str, relation: Relation, limit: float) -> None:
        """Adds a floor: our figure over the peer's. Without one of them it is reported as not measured."""
        ours = self.subjects.get(OURS, {}).get(column)
        theirs = self.subjects.get(peer, {}).get(column)
        if ours is None or theirs is None:
            self.unmeasured.append(f"{text}: {OURS if ours is None else peer} was not measured")
            return
        self.floors.append(Floor(text, ours.over(theirs), relation, limit))

    def require_value(self, text: str, value: Samples | None, relation: Relation, limit: float) -> None:
        """Adds a floor on a figure itself."""
        if value is None:
            self.unmeasured.append(f"{text}: was not measured")
            return
        self.floors.append(Floor(text, value, relation, limit))

    def best(self, column: str, peers: Sequence[str], *, highest: bool) -> str:
        """The peer with the best median; the first one where none was measured, which is then told."""
        measured = {name: self.subjects[name][column].median for name in peers if name in self.subjects}
        if not measured:
            return peers[0]
        return (max if highest else min)(measured, key=lambda name: measured[name])

    def slack(self, column: str) -> float:
        """What the printed spread of the rounds leaves open, at most a tenth: 0.9 to 1."""
        spreads = [
            (samples[column].high - samples[column].low) / (2 * samples[column].median)
            for samples in self.subjects.values()
            if samples[column].median
        ]
        return 1 - min(0.1, max(spreads, default=0.0))

    @property
    def holds(self) -> bool:
        """Whether every floor of the row was measured and is reached."""
        return not self.unmeasured and all(floor.holds for floor in self.floors)


Round = dict[str, float]
"""The figures of one subject in one round, by column key."""


def alternate(
    subjects: Mapping[str, Callable[[], Round]], rounds: int, on_step: Callable[[str, int], None]
) -> dict[str, dict[str, Samples]]:
    """Runs A B C A B C …, so that a drift of the machine meets all of them, and gathers the samples."""
    gathered: dict[str, list[Round]] = {name: [] for name in subjects}
    for number in range(rounds):
        for name, run in subjects.items():
            on_step(name, number)
            gathered[name].append(run())
    return {
        name: {key: Samples(tuple(each[key] for each in taken)) for key in taken[0]}
        for name, taken in gathered.items()
        if taken
    }
