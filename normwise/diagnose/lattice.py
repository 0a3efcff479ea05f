"""Learning rates on a half-octave lattice, and how a grid of them widens and refines. Rung k is the rate 2**(k/2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

STEP = 4  # rungs between coarse rates: a factor 4
LEAP = 10  # rungs between the rates that look for divergence above the training edge: a factor 32

Rates = tuple[float, ...]


def rate(rung: int) -> float:
    """The learning rate 2**(rung/2), exact to the last bit on every machine (math.sqrt is; a power need not be).

    >>> rate(-2), rate(0), rate(1)
    (0.5, 1.0, 1.4142135623730951)
    """
    return math.ldexp(math.sqrt(2.0) if rung % 2 else 1.0, rung // 2)


def rung(lr: float) -> int:
    """The rung nearest to a learning rate.

    >>> rung(0.5), rung(0.1), rung(rate(7))
    (-2, -7, 7)
    """
    return round(2 * math.log2(lr))


def coarse(low: int, high: int) -> Rates:
    """The coarse rates between two rungs.

    >>> coarse(-16, 4)
    (0.00390625, 0.015625, 0.0625, 0.25, 1.0, 4.0)
    """
    return tuple(rate(k) for k in range(low, high + 1, STEP))


def wider(rates: Sequence[float], floor: int, cap: int, *, below: bool, above: bool, beyond: bool) -> Rates:
    """The rates to try outside of those tried, which ascend, within the rungs `floor` and `cap`.

    A coarse rate below and above where the grid is open on that side; `beyond` leaps further up instead, where nothing
    trains any more and not everything diverges yet.

    >>> wider((0.25, 1.0), floor=-48, cap=24, below=True, above=False, beyond=True)
    (0.0625, 32.0)
    """
    rungs: set[int] = set()
    if below:
        rungs.add(max(rung(rates[0]) - STEP, floor))
    if above or beyond:
        rungs.add(min(rung(rates[-1]) + (STEP if above else LEAP), cap))
    return tuple(lr for lr in map(rate, sorted(rungs)) if lr not in rates)


def finer(rates: Iterable[float], upwards: Iterable[float | None], downwards: Iterable[float | None]) -> Rates:
    """The middles of the gaps above and below some of the rates, which ascend, that are wider than half an octave.

    >>> finer((0.25, 1.0, 4.0), upwards=[1.0], downwards=[1.0, None])
    (0.5, 2.0)
    """
    gaps = {(rung(low), rung(high)) for low, high in _gaps(rates, upwards, downwards)}
    return tuple(rate(k) for k in sorted({(low + high) // 2 for low, high in gaps if high - low > 1}))


def _gaps(
    rates: Iterable[float], upwards: Iterable[float | None], downwards: Iterable[float | None]
) -> Iterator[tuple[float, float]]:
    above = dict(pairwise(rates))
    below = {high: low for low, high in above.items()}
    yield from ((lr, above[lr]) for lr in upwards if lr in above)
    yield from ((below[lr], lr) for lr in downwards if lr in below)
