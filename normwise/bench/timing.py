"""Interleaved rounds: contenders take turns, so that what else the machine does meets all of them alike.

A round in which the process had to wait for a core, or in which the yardstick itself was slow, is dirty: it is counted
and run again, at most as often as there were to be rounds at all.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from normwise.bench.machine import faults, waited

Call: TypeAlias = Callable[[], object]

WAITED = 0.05  # of a round's time, summed over threads
SLOW = 1.5  # times the yardstick's median
_FEWEST, _MOST = 5, 25  # clean rounds
_SHORTEST = 2e-3  # seconds; shorter calls are repeated within a measurement


class Spread(NamedTuple):
    """The median of some numbers, between their quartiles."""

    low: float
    median: float
    high: float


class Round(NamedTuple):
    """The seconds of one call of each contender, the page faults of one, and how long the process waited for a core."""

    seconds: Mapping[str, float]
    faults: Mapping[str, float]
    waited: float  # seconds, of all threads
    lasted: float  # seconds

    @property
    def was_delayed(self) -> bool:
        """Whether the process had to wait for a core."""
        return self.waited > WAITED * self.lasted


class Timing(NamedTuple):
    """The rounds that count, and how many dirty ones there were."""

    rounds: tuple[Round, ...]
    dirty: int

    def seconds(self, name: str) -> Spread:
        """The time of a call."""
        return spread([round_.seconds[name] for round_ in self.rounds])

    def ratio(self, name: str, other: str) -> Spread:
        """The time of one contender over that of another, round by round."""
        return spread([round_.seconds[name] / round_.seconds[other] for round_ in self.rounds])

    def faults(self, name: str) -> float:
        """Page faults of a call."""
        return statistics.median(round_.faults[name] for round_ in self.rounds)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles.

    >>> spread([3.0, 1.0, 2.0])
    Spread(low=1.5, median=2.0, high=2.5)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def measure(
    calls: Mapping[str, Call],
    yardstick: str | None,
    budget: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    waiting: Callable[[], float] = waited,
) -> Timing:
    """Time every contender in interleaved rounds, of which five at least are clean if the machine lets it.

    Args:
        calls: What to run, by name; each has been run before.
        yardstick: The contender whose own slowness gives a disturbance away.
        budget: Seconds that all rounds should take together.
        clock: Seconds.
        waiting: Seconds that this process has waited for a core so far.
    """
    repeats = {name: _repeats(call, clock) for name, call in calls.items()}
    names, rounds = list(calls), []
    start = clock()
    rounds.append(_round(calls, names, repeats, clock, waiting))
    wanted = min(max(math.floor(budget / max(clock() - start, 1e-9)), _FEWEST), _MOST)
    while len(clean(rounds, yardstick)) < wanted and len(rounds) < 2 * wanted:
        turn = len(rounds) % len(names)
        rounds.append(_round(calls, names[turn:] + names[:turn], repeats, clock, waiting))
    kept = clean(rounds, yardstick)
    dirty = len(rounds) - len(kept)
    if len(kept) < _FEWEST:  # a busy machine: those that waited least
        kept = sorted(rounds, key=lambda round_: round_.waited / round_.lasted)[:wanted]
    return Timing(tuple(kept), dirty)


def clean(rounds: Sequence[Round], yardstick: str | None) -> list[Round]:
    """The rounds that nothing disturbed."""
    calm = [round_ for round_ in rounds if not round_.was_delayed]
    if yardstick is None or not calm:
        return calm
    usual = statistics.median(round_.seconds[yardstick] for round_ in calm)
    return [round_ for round_ in calm if round_.seconds[yardstick] <= SLOW * usual]


def _repeats(call: Call, clock: Callable[[], float]) -> int:
    """How many calls a measurement takes to be long enough for the clock."""
    call()
    start = clock()
    call()
    return max(1, math.ceil(_SHORTEST / max(clock() - start, 1e-7)))


def _round(
    calls: Mapping[str, Call],
    order: Sequence[str],
    repeats: Mapping[str, int],
    clock: Callable[[], float],
    waiting: Callable[[], float],
) -> Round:
    seconds, faulted = {}, {}
    before, begun = waiting(), clock()
    for name in order:
        seconds[name], faulted[name] = _one(calls[name], repeats[name], clock)
    return Round(seconds, faulted, waiting() - before, clock() - begun)


def _one(call: Call, repeats: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds and page faults of one call."""
    before, start = faults(), clock()
    for _ in range(repeats):
        call()
    lasted = clock() - start
    return lasted / repeats, (faults() - before) / repeats
