"""The verdict in one sentence: numbers, names and units as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from normwise.tuning.records import Comparison

MOST_MORE_SEEDS = 1000  # beyond this, "more seeds would decide" is no advice

Kind = Literal["better", "equivalent", "undecided"]


@dataclass(frozen=True)
class Wording:
    """Numbers and names as the sentence writes them."""

    unit: str
    margin: float
    means: Mapping[str, float]
    rates: Mapping[str, float]
    confidence: float = 0.95
    combinations: Mapping[str, str] = field(default_factory=dict)  # the axes' values, in words

    def sentence(self, kind: Kind, winner: str, recommended: str, own: Sequence[Comparison], count: int) -> str:
        """The whole answer: what to use at which learning rate, by how much and against which."""
        mean = f"{self.value(self.means[winner])} on average over {count} seed{'s' * (count != 1)}"
        if not own:
            return f"Only {self.name(winner)} was confirmed: {mean}, with nothing to compare it with."
        if kind == "better":
            return self._better(winner, own, mean)
        if kind == "undecided":
            return self._undecided(winner, recommended, own, mean)
        return self._equivalent(winner, recommended, own, mean)

    def name(self, label: str) -> str:
        """A label with its learning rate and its values of other axes, where those are known."""
        lr, rest = self.rates.get(label), self.combinations.get(label)
        at = [*([f"learning rate {rate_text(lr)}"] if lr is not None else []), *([rest] if rest else [])]
        return f"{label} at {', '.join(at)}" if at else label

    def value(self, score: float) -> str:
        """A score with its unit."""
        return f"{self.number(score)} {self.unit}".rstrip()

    def gap(self, difference: float) -> str:
        """A difference of scores; that of two percentages is in points."""
        return f"{self.number(difference)} {'points' if self.unit == '%' else self.unit}".rstrip()

    def number(self, value: float) -> str:
        """As many decimals as show a tenth of the margin; four digits where there is none."""
        if self.margin == 0:
            return f"{value:.4g}"
        return f"{value:.{max(0, 1 - math.floor(math.log10(self.margin)))}f}"

    def level(self) -> str:
        """The confidence, as in "95 %"."""
        return f"{100 * self.confidence:g} %"

    def interval(self, c: Comparison) -> str:
        """A comparison's interval."""
        return f"{self.level()} interval {self.number(c.low)} to {self.number(c.high)}"

    def _better(self, winner: str, own: Sequence[Comparison], mean: str) -> str:
        bound, closest = min(c.low for c in own), own[0]
        return (
            f"Use {self.name(winner)}: {mean}, better than every other normalization by at least {self.gap(bound)} "
            f"({self.level()} confidence, margin {self.gap(self.margin)}); the runner-up, {self.name(closest.other)}, "
            f"is {self.gap(closest.difference)} behind."
        )

    def _equivalent(self, winner: str, recommended: str, own: Sequence[Comparison], mean: str) -> str:
        alike = [c for c in own if c.verdict == "equivalent"]
        inside = f"inside ±{self.gap(2 * self.margin)}"
        if recommended == winner:
            names = listed([c.other for c in alike])
            return (
                f"Use {self.name(winner)}: {mean}, the best mean and the simplest of its equivalents; "
                f"{alike[0].other} is {self.gap(alike[0].difference)} behind ({self.interval(alike[0])}, {inside}). "
                f"Equivalent: {names}."
            )
        pair = next(c for c in alike if c.other == recommended)
        return (
            f"Use {self.name(recommended)}: {self.value(self.means[recommended])}, equivalent to the best mean and "
            f"simpler; {self.name(winner)} reached {mean}, {self.gap(pair.difference)} ahead "
            f"({self.interval(pair)}, {inside})."
        )

    def _undecided(self, winner: str, recommended: str, own: Sequence[Comparison], mean: str) -> str:
        open_ = [c for c in own if c.verdict == "undecided"]
        closest, rest = open_[0], [c.other for c in open_[1:]]
        also = f"; nor is its lead over {listed(rest)}" if rest else ""
        simpler = "" if recommended == winner else ", its equivalent and simpler"
        return (
            f"Undecided: {self.name(winner)} has the best mean, {mean}, but its lead of {self.gap(closest.difference)} "
            f"over {self.name(closest.other)} is not settled ({self.interval(closest)}, margin "
            f"{self.gap(self.margin)}){also}; {seeds_needed(open_)}. Until then use {self.name(recommended)}{simpler}."
        )


def seeds_needed(comparisons: Sequence[Comparison]) -> str:
    """How many more seeds would settle undecided comparisons.

    >>> seeds_needed([Comparison("a", "b", 1.0, 0.2, 1.8, "undecided", more_seeds=7)])
    'about 7 more seeds would decide'
    """
    if any(math.isinf(c.low) for c in comparisons):
        return "a single seed has no interval, so run at least 2, better 10"
    needed = [c.more_seeds for c in comparisons]
    known = [n for n in needed if n is not None]
    if len(known) < len(needed):
        return f"even {MOST_MORE_SEEDS} more seeds would not decide"
    return f"about {max(known)} more seed{'s' * (max(known) != 1)} would decide"


def rate_text(lr: float) -> str:
    """A learning rate in three digits.

    >>> rate_text(0.3535533905932738), rate_text(4096.0), rate_text(2**-12)
    ('0.354', '4096', '0.000244')
    """
    return f"{lr:.0f}" if lr >= 1000 else f"{lr:.3g}"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
