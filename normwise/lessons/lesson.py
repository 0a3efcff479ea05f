"""A lesson: a claim about normalization, what was expected, what was measured, and whether the two agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from normwise.diagnose.results import Result, number
from normwise.errors import DiagnosisError

Size = Literal["small", "full"]
Cell = float | int | str | None
Series = Mapping[str, tuple[Sequence[Cell], Sequence[Cell]]]


@dataclass(frozen=True)
class Check:
    """One number of a claim, and the range that it has to lie in.

    Attributes:
        what: The number in words.
        measured: Its value here. NaN lies in no range.
        low: The least that supports the claim.
        high: The most.
        why: The reason for the slack, with the number that was first measured where there is one.
    """

    what: str
    measured: float
    low: float = -math.inf
    high: float = math.inf
    why: str = ""

    def __post_init__(self) -> None:
        if not self.low <= self.high or (math.isinf(self.low) and math.isinf(self.high)):
            raise DiagnosisError(f"{self.what}: a range from {self.low} to {self.high} tells nothing")

    @property
    def holds(self) -> bool:
        """Whether the number lies in its range.

        >>> Check("ratio", 2.0, low=1.5).holds, Check("ratio", math.nan, low=1.5).holds
        (True, False)
        """
        return self.low <= self.measured <= self.high

    @property
    def expected(self) -> str:
        """The range in words.

        >>> Check("ratio", 2.0, low=1.5).expected, Check("error", 2.0, 1.0, 2.5).expected, Check("n", 7, 7, 7).expected
        ('at least 1.5', '1 to 2.5', 'exactly 7')
        """
        if self.low == self.high:
            return f"exactly {shown(self.low)}"
        if math.isinf(self.high):
            return f"at least {shown(self.low)}"
        if math.isinf(self.low):
            return f"at most {shown(self.high)}"
        return f"{shown(self.low)} to {shown(self.high)}"


def shown(value: Cell) -> str:
    """A value in a table: numbers to four digits, whole ones in full.

    >>> shown(46080), shown(0.123456), shown(None), shown("batch")
    ('46,080', '0.1235', '-', 'batch')
    """
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else number(value, 4)


def about(what: str, measured: float, first: float, factor: float, why: str) -> Check:
    """A number within a factor of the one that is expected, as where it was first measured.

    >>> about("BN / none", 10.0, first=9.5, factor=2, why="half-octave grid").expected
    '4.75 to 19'
    """
    return Check(what, measured, first / factor, first * factor, f"around {number(first)}: {why}")


@dataclass(frozen=True)
class Chart:
    """What a lesson draws: lines with points, or bars, one series a name.

    Attributes:
        title: What the chart shows.
        x: The title of the horizontal axis.
        y: That of the vertical one.
        series: The points by name, as (xs, ys).
        bars: Bars in groups, instead of lines.
        log: The axes that are logarithmic: "", "x", "y" or "xy".
    """

    title: str
    x: str
    y: str
    series: Series
    bars: bool = False
    log: Literal["", "x", "y", "xy"] = ""


@dataclass(frozen=True, repr=False)
class Lesson(Result):
    """A claim and its test.

    Attributes:
        name: One word.
        claim: What is said to be so, in one sentence.
        setting: What was run: network, data, steps, seeds.
        table: What was measured, one dictionary a row, all with the same keys.
        checks: The numbers that decide.
        chart: What is drawn.
        size: "small", as in continuous integration, or "full".
    """

    name: str
    claim: str
    setting: str
    table: tuple[Mapping[str, Cell], ...]
    checks: tuple[Check, ...]
    chart: Chart
    size: Size

    @property
    def reproduced(self) -> bool:
        """Whether every number lies in its range."""
        return all(check.holds for check in self.checks)

    @property
    def verdict(self) -> str:
        """In words: reproduced, or not reproduced."""
        return "reproduced" if self.reproduced else "not reproduced"

    @property
    def meaning(self) -> str:
        """The claim, the verdict, and the numbers that decide."""
        numbers = "; ".join(f"{check.what} {shown(check.measured)} ({check.expected})" for check in self.checks)
        return f"{self.claim} {self.verdict.capitalize()}: {numbers}"

    def rows(self) -> list[dict[str, Any]]:
        """What was measured."""
        return [dict(row) for row in self.table]

    def traces(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The chart."""
        kind: dict[str, Any] = {"type": "bar"} if self.chart.bars else {"type": "scatter", "mode": "lines+markers"}
        axes = {
            f"{letter}axis": {
                "title": {"text": title},
                "type": "log" if letter in self.chart.log else "category" if self.chart.bars and letter == "x" else "-",
            }
            for letter, title in (("x", self.chart.x), ("y", self.chart.y))
        }
        drawn = [{**kind, "name": name, "x": list(xs), "y": list(ys)} for name, (xs, ys) in self.chart.series.items()]
        return drawn, {"title": {"text": self.chart.title}, **axes}


Measure = Callable[[Size], Lesson]
