"""What moved between two runs, beyond what two runs of the same thing differ by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from normwise.bench.operations import COPY
from normwise.bench.results import Outcome, Results, Timed
from normwise.bench.timing import Spread

# Nine in ten ratios of two full runs on one machine agree within this factor. Quartiles alone are no test: they tell
# what happened within a run.
NOISE = 1.2


@dataclass(frozen=True)
class Move:
    """A contender that takes another time than before.

    Attributes:
        case: The case, in words.
        contender: Who moved.
        before: The seconds of a call, earlier.
        now: The same, now.
    """

    case: str
    contender: str
    before: float
    now: float

    @property
    def factor(self) -> float:
        """Now over before: above 1 it is slower."""
        return self.now / self.before

    def __str__(self) -> str:
        word = "slower" if self.factor > 1 else "faster"
        times = f"{1e3 * self.before:.3g} -> {1e3 * self.now:.3g} ms"
        return f"{self.case}: {self.contender} is {max(self.factor, 1 / self.factor):.2f} times {word} ({times})"


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        moves: What moved, the largest change first.
        compared: How many contenders of cases are in both runs.
        notes: What makes the two hard to compare.
    """

    moves: tuple[Move, ...]
    compared: int
    notes: tuple[str, ...]


def compare(before: Results, now: Results) -> Comparison:
    """What moved: quartiles that do not overlap, and medians further apart than two runs of the same thing.

    Both must hold of the seconds and of the share of the reference's time in the same rounds: a machine that is slower
    as a whole moves the first alone, a copy that met other caches the second. Cases that were disturbed are left out.
    """
    pairs = list(_pairs(before, now))
    moves = [move for outcome, name, old, new in pairs if (move := _move(outcome, name, old, new)) is not None]
    ordered = sorted(moves, key=lambda move: -max(move.factor, 1 / move.factor))
    return Comparison(tuple(ordered), len(pairs), tuple(_notes(before, now)))


def _pairs(before: Results, now: Results) -> Iterator[tuple[Outcome, str, Timed, Timed]]:
    """Contenders that both runs have, but for the copy, which is measured against itself."""
    known = {str(outcome.case): outcome for outcome in before.outcomes}
    for outcome in now.outcomes:
        earlier = known.get(str(outcome.case))
        for name, timed in outcome.timed.items():
            if earlier is not None and name in earlier.timed and earlier.is_quiet and outcome.is_quiet and name != COPY:
                yield outcome, name, earlier.timed[name], timed


def _move(outcome: Outcome, name: str, old: Timed, new: Timed) -> Move | None:
    slower, dearer = _direction(old.seconds, new.seconds), _direction(new.share, old.share)
    if slower == 0 or slower != dearer:
        return None
    return Move(str(outcome.case), name, old.seconds.median, new.seconds.median)


def _direction(old: Spread, new: Spread) -> int:
    """1 if the new one is larger beyond doubt, -1 if it is smaller, 0 if nobody can tell."""
    if new.low > old.high and new.median > NOISE * old.median:
        return 1
    return -1 if new.high < old.low and new.median * NOISE < old.median else 0


def _notes(before: Results, now: Results) -> Iterator[str]:
    """Facts of the machine that differ, cases that are in one run only, and cases that went wrong."""
    for name, value in before.machine.items():
        if now.machine.get(name) != value:
            yield f"{name} was {value}, and is {now.machine.get(name)}"
    worked = {str(outcome.case): bool(outcome.timed) for outcome in before.outcomes}
    works = {str(outcome.case): bool(outcome.timed) for outcome in now.outcomes}
    gone, new = worked.keys() - works.keys(), works.keys() - worked.keys()
    if gone or new:
        yield f"{len(gone)} cases are only in the earlier run, {len(new)} only in this one"
    disturbed = {str(outcome.case) for run in (before, now) for outcome in run.outcomes if not outcome.is_quiet}
    if disturbed:
        yield f"{len(disturbed)} cases were disturbed in one run or the other, and are not compared"
    yield from (f"{case} was right, and is wrong" for case, right in works.items() if not right and worked.get(case))
