"""The search by points: what a sampler draws is run on every selection seed, in full or by successive halving.

Halving is synchronous and stays within one batch of one normalization: all of its points run a ninth of their steps,
the best third of them a third, the best third of those all. Normalizations never compete for steps, because one that
starts slowly would lose to one that ends badly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from normwise.tuning.outcomes import Standing, standing
from normwise.tuning.records import Record, Request, Settings
from normwise.tuning.samplers import BATCH, Point, Told, draw
from normwise.tuning.seeds import labels, select_requests

ETA = 3  # of the points of a rung, one in three goes on, to three times the steps
RUNGS = 3

Done = Mapping[Request, Record]


@dataclass(frozen=True)
class _Race:
    """A batch under way: the requests it still lacks, or what came of its points."""

    missing: tuple[Request, ...] = ()
    told: tuple[Told, ...] = ()


def missing_points(settings: Settings, label: str, done: Done) -> tuple[Request, ...]:
    """What the points of a normalization lack now; empty when all of them have been run."""
    told: list[Told] = []
    missing: list[Request] = []
    for points in _batches(settings, label, told):
        race = _race(settings, label, points, done)
        missing += race.missing
        if race.missing and settings.sampler == "tpe":  # what comes next depends on what is missing
            break
        told += race.told
    return tuple(missing)


def trials_by_points(settings: Settings) -> tuple[int, float]:
    """How many trials the points of a normalization make on one seed, and how many full trials those cost.

    >>> trials_by_points(Settings("mlp", "digits", (), sampler="tpe", trials=18))
    (18, 18.0)
    >>> trials_by_points(Settings("mlp", "digits", (), sampler="tpe", trials=18, prune=True))
    (26, 6.0)
    """
    sizes = [_sizes(settings, size) for size in _cut(settings.trials or 0)]
    shares = _shares(settings)
    return sum(map(sum, sizes)), sum(size / share for rungs in sizes for size, share in zip(rungs, shares, strict=True))


def _batches(settings: Settings, label: str, told: Sequence[Told]) -> Iterator[tuple[Point, ...]]:
    """The points, batch by batch; those of TPE depend on what `told` holds by then."""
    index, count = labels(settings).index(label), settings.trials or 0
    if settings.sampler == "tpe":
        for number, size in enumerate(_cut(count)):
            yield draw(settings, index, number, told, size)
        return
    points = draw(settings, index, 0, (), count)  # one sequence, whatever comes of it
    yield from (points[start : start + BATCH] for start in range(0, count, BATCH))


def _cut(count: int) -> list[int]:
    """A number of points in batches.

    >>> _cut(20)
    [9, 9, 2]
    """
    return [min(BATCH, count - start) for start in range(0, count, BATCH)]


def _shares(settings: Settings) -> tuple[int, ...]:
    """What the full steps are divided by, rung by rung."""
    return tuple(ETA**power for power in reversed(range(RUNGS))) if settings.prune else (1,)


def _sizes(settings: Settings, size: int) -> tuple[int, ...]:
    """How many points a batch has at each rung."""
    sizes = [size]
    while len(sizes) < len(_shares(settings)):
        sizes.append(_third(sizes[-1]))
    return tuple(sizes)


def _third(size: int) -> int:
    return -(-size // ETA)


def _race(settings: Settings, label: str, points: tuple[Point, ...], done: Done) -> _Race:
    """Run a batch through its rungs as far as the records go."""
    told = {point: Told(point, None) for point in points}
    going, shares = list(told), _shares(settings)
    for share in shares:
        wanted = {point: _requests(settings, label, point, share) for point in going}
        missing = tuple(dict.fromkeys(r for rows in wanted.values() for r in rows if r not in done))
        if missing:
            return _Race(missing)
        rows = {point: tuple(done[r] for r in wanted[point]) for point in going}
        for point in going:
            told[point] = _after(told[point], rows[point], last=share == shares[-1])
        going = _best_third(settings, rows)
    return _Race(told=tuple(told.values()))


def _requests(settings: Settings, label: str, point: Point, share: int) -> tuple[Request, ...]:
    own = settings.at(point.variant)
    steps = None if own.steps is None else max(1, own.steps // share)
    return select_requests(settings, label, point.variant, (point.lr(settings),), steps=steps)


def _after(told: Told, rows: tuple[Record, ...], *, last: bool) -> Told:
    """A point after one rung more. A seed that diverged makes it infeasible, which outweighs what it had reached."""
    scores = [row.score for row in rows if row.score is not None]
    if len(scores) < len(rows):
        return Told(told.point, None)
    mean = fmean(scores)
    return Told(told.point, mean if last else None, (*told.rungs, mean))


def _best_third(settings: Settings, rows: Mapping[Point, tuple[Record, ...]]) -> list[Point]:
    """The points that go on, in the order they were drawn; one of which every seed failed does not."""
    stands: dict[Point, Standing] = {}
    for point, own in rows.items():
        found = standing({point.lr(settings): own}, settings.direction)
        if found is not None:
            stands[point] = found
    best = sorted(stands, key=lambda point: stands[point][:-1], reverse=True)[: _third(len(rows))]
    return [point for point in stands if point in best]
