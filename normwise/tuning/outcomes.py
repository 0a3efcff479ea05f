"""What a normalization's trials say: which of them train, the best learning rate, the edges, the sensitivity.

Everything here reads `Trials`, one normalization's selection records by learning rate in ascending order, each rate
with one record a seed, in one order of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import NamedTuple

from normwise.tuning.records import Direction, Edge, Record

SHARES = (0.9, 0.5, 0.25)  # of chance: the thresholds below which a trial counts as training

Trials = Mapping[float, tuple[Record, ...]]


def trains(record: Record, share: float, chance: float | None, *, own_loop: bool = False) -> bool:
    """Whether the tail of the training loss and the validation loss both end below `share` times chance.

    A user's own loop has no validation loss. Where it logs nothing, or chance is unknown, nothing can be compared, and
    the record's own outcome counts: a finite score.

    >>> from normwise.tuning.records import Request
    >>> request = Request("select", "batch", 0.1, 0, 200)
    >>> record = Record(request, "stuck", score=60.0, tail_loss=1.3, val_loss=1.4)
    >>> trains(record, 0.9, chance=2.3), trains(record, 0.5, chance=2.3)
    (True, False)
    """
    silent = own_loop and record.tail_loss is None
    if chance is None or silent or record.outcome == "diverged":
        return record.outcome == "trains"
    losses = (record.tail_loss,) if own_loop else (record.tail_loss, record.val_loss)
    return all(loss is not None and loss < share * chance for loss in losses)


def best_rate(trials: Trials, direction: Direction) -> float | None:
    """The rate with the best mean score, smoothed over rates less than an octave away.

    The weights fall linearly with the distance in octaves: on half-octaves they are 1 : 2 : 1. A score is a smooth
    function of the rate, and the mean of three seeds is not: without smoothing, copies of one normalization settle on
    different rates. Only the rates with the fewest failed seeds take part. Ties go to the lower mean validation loss,
    then to the smaller rate. None where every trial failed.
    """
    found = standing(trials, direction)
    return None if found is None else found.lr


class Standing(NamedTuple):
    """How good a normalization is at its best rate; of two, the larger is the better."""

    survivors: int  # seeds that have a score there
    score: float  # smoothed mean, oriented so that more is better
    loss: float  # minus the mean validation loss
    lr: float


def standing(trials: Trials, direction: Direction) -> Standing | None:
    """The best rate, as `best_rate` finds it, and what it is worth; None where every trial failed."""
    scores = {lr: [r.score for r in rows if r.score is not None] for lr, rows in trials.items()}
    most = max(map(len, scores.values()), default=0)
    sign = 1.0 if direction == "max" else -1.0
    means = {lr: sign * fmean(values) for lr, values in scores.items() if len(values) == most > 0}
    smoothed = {lr: _smoothed(means, lr) for lr in means}
    top = max(smoothed.values(), default=0.0)
    tied = [lr for lr, score in smoothed.items() if score == top]
    lr = min(tied, key=lambda lr: (_mean_loss(trials[lr]), lr), default=None)
    return None if lr is None else Standing(most, top, -_mean_loss(trials[lr]), lr)


def train_edges(trials: Trials, chance: float | None, *, own_loop: bool = False) -> dict[str, Edge]:
    """The largest rate that trains, at each threshold as a share of chance.

    Outcomes are not monotone in the rate, so this looks past the first failure. A seed that trains nowhere has no edge
    and is not counted in the edge's `seeds`; one that trains at the largest rate tried counts there, as censored.
    """
    return {f"{share:g}": _train_edge(trials, share, chance, own_loop) for share in SHARES}


def diverge_edge(trials: Trials) -> Edge:
    """The smallest rate that diverges; a seed that never does counts at the largest rate tried, as censored."""
    edges = smallest_diverged(trials)
    return _edge([max(trials) if lr is None else lr for lr in edges], censored=edges.count(None))


def sensitivity(trials: Trials, declared: Iterable[float]) -> float | None:
    """Learning-rate sensitivity: the mean over the declared rates of min(loss, first loss), minus the best loss.

    The loss is the validation loss at the end (a user's own loop: the tail of its training loss), averaged over
    seeds; a diverged trial counts at its first loss. The best loss is the lowest of all rates tried. None where no
    losses were logged. After Wortsman et al. 2023 (arXiv 2309.14322).
    """
    first = [_first_loss(rows) for rows in zip(*trials.values(), strict=True)]
    known = [loss for loss in first if loss is not None]
    if not known or len(known) < len(first):
        return None
    capped = {lr: fmean(map(_capped_loss, rows, known)) for lr, rows in trials.items()}
    inside = [capped[lr] for lr in declared if lr in capped]
    return fmean(inside) - min(capped.values()) if inside else None


def largest_training(
    trials: Trials, share: float, chance: float | None, *, own_loop: bool = False
) -> tuple[float | None, ...]:
    """For each seed the largest rate that trains at a share of chance, None where none does."""
    good = {lr: [trains(r, share, chance, own_loop=own_loop) for r in rows] for lr, rows in trials.items()}
    return tuple(
        max((lr for lr, seed in zip(good, column, strict=True) if seed), default=None) for column in _seeds(good)
    )


def smallest_diverged(trials: Trials) -> tuple[float | None, ...]:
    """For each seed the smallest rate that diverges, None where none does."""
    bad = {lr: [r.outcome == "diverged" for r in rows] for lr, rows in trials.items()}
    return tuple(
        min((lr for lr, seed in zip(bad, column, strict=True) if seed), default=None) for column in _seeds(bad)
    )


def _seeds(flags: Mapping[float, list[bool]]) -> Iterable[tuple[bool, ...]]:
    return zip(*flags.values(), strict=True)


def _smoothed(means: Mapping[float, float], lr: float) -> float:
    """The weighted mean around a rate, rounded so that equal scores tie whatever their weights."""
    near = [other for other in means if lr / 2 < other < lr * 2]
    weights = [1 - abs(math.log2(other / lr)) for other in near]
    return round(fmean([means[other] for other in near], weights), 9)


def _mean_loss(rows: tuple[Record, ...]) -> float:
    return fmean(math.inf if r.val_loss is None else r.val_loss for r in rows)


def _train_edge(trials: Trials, share: float, chance: float | None, own_loop: bool) -> Edge:
    edges = largest_training(trials, share, chance, own_loop=own_loop)
    return _edge([lr for lr in edges if lr is not None], censored=edges.count(max(trials, default=None)))


def _edge(rates: list[float], censored: int) -> Edge:
    if not rates:
        return Edge(None, None, None, seeds=0)
    mean = 2.0 ** fmean(map(math.log2, rates))
    return Edge(mean, min(rates), max(rates), seeds=len(rates), censored=censored)


def _first_loss(rows: Iterable[Record]) -> float | None:
    """A seed's first loss, from any rate: it starts from the same weights and the same batch at every rate."""
    return next((r.first_loss for r in rows if r.first_loss is not None), None)


def _capped_loss(record: Record, first: float) -> float:
    final = record.tail_loss if record.val_loss is None else record.val_loss
    return first if record.outcome == "diverged" or final is None else min(final, first)
