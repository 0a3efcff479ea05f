"""The learning rates that a study may try: a declared range for each optimizer, in rungs of the half-octave lattice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from normwise.diagnose.lattice import coarse
from normwise.errors import StudyError
from normwise.tuning.records import Settings


@dataclass(frozen=True)
class Range:
    """A range of rates, in rungs: coarse rates from `low` to `high`, widened no further than `floor` and `cap`."""

    low: int
    high: int
    floor: int
    cap: int


# The declared ranges. Heavy ball with 0.9 steps ten times as far as SGD; AdamW's step has the rate's own size.
RANGES: Mapping[str, Range] = {
    "sgd": Range(low=-16, high=4, floor=-48, cap=24),
    "momentum": Range(low=-22, high=-2, floor=-54, cap=18),
    "adamw": Range(low=-28, high=-8, floor=-60, cap=12),
}


def declared_rates(settings: Settings) -> tuple[float, ...]:
    """The rates that every normalization runs first: the declared range of the optimizer, or all of a fixed grid.

    >>> declared_rates(Settings("mlp", "digits", (("none", "none"),)))
    (0.00390625, 0.015625, 0.0625, 0.25, 1.0, 4.0)
    """
    if settings.lrs is not None:
        return tuple(sorted(set(settings.lrs)))
    span = range_of(settings.optimizer)
    return coarse(span.low, span.high)


def range_of(optimizer: str) -> Range:
    """The optimizer's range of learning rates. Raises StudyError for one without."""
    span = RANGES.get(optimizer)
    if span is None:
        raise StudyError(f"optimizer {optimizer!r}: no range of learning rates; known: {', '.join(RANGES)}")
    return span
