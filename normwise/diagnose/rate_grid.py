"""A grid of learning rates that widens until every edge is enclosed, and what its trials say.

The rates lie on a half-octave lattice: rung k is the rate 2**(k/2). A grid has every rate with one trial a seed. It
goes through three stages.

1. **The declared range**: coarse rates, a factor 4 apart.
2. **Widening**, until each seed's best rate has a rate on either side, the two largest rates train for no seed (the
   edge is where outcomes stop training, not where they first fail to), and the largest diverges for every seed; or
   until a cap.
3. **Refining** to half an octave beside each seed's best rate and edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from normwise.diagnose.lattice import Rates, coarse, finer, rung, wider

Outcome = Literal["trains", "stuck", "diverged"]

BELOW, ABOVE = 32, 20  # rungs that a grid may widen beyond its declared range: factors 65,536 and 1,024


@dataclass(frozen=True)
class Trial:
    """One training at a constant rate.

    Attributes:
        lr: The learning rate.
        seed: Of the order of the batches, and of a factory's weights.
        outcome: "diverged" is not finite at the end. "trains" is below the first share of chance, by the tail of the
            training loss and by the validation loss. "stuck" is everything else.
        first_loss: The training loss before the first step.
        tail_loss: The mean training loss of the last tenth of the steps; None where it diverged.
        val_loss: The validation loss at the end, in evaluation mode; None where it diverged.
        steps: How many steps were taken; fewer than asked for where a parameter became non-finite.
    """

    lr: float
    seed: int
    outcome: Outcome
    first_loss: float
    tail_loss: float | None
    val_loss: float | None
    steps: int

    def below(self, loss: float) -> bool:
        """Whether both losses ended below one."""
        return all(own is not None and own < loss for own in (self.tail_loss, self.val_loss))


@dataclass(frozen=True)
class Edge:
    """A learning rate read from several seeds.

    Attributes:
        value: The geometric mean; None where no seed has such a rate.
        low: The smallest of the seeds' rates.
        high: The largest.
        seeds: How many seeds have one.
        open: For how many of them it lies at an end of the rates tried, or beyond.
    """

    value: float | None
    low: float | None
    high: float | None
    seeds: int
    open: int = 0


Grid = Mapping[float, Sequence[Trial]]  # by rate, ascending; one trial a seed, in one order of seeds


def declared(low: float, high: float) -> Rates:
    """The coarse rates of a declared range.

    >>> declared(2**-8, 4.0)
    (0.00390625, 0.015625, 0.0625, 0.25, 1.0, 4.0)
    """
    return coarse(rung(low), rung(high))


def next_rates(grid: Grid, start: Rates, losses: Sequence[float]) -> Rates:
    """The rates that a grid leaves open; none when it is complete.

    `start` is the declared range, and `losses` are those below which a trial counts as training.
    """
    if not grid:
        return start
    return _widen(grid, start, max(losses)) or _refine(grid, losses)


def _widen(grid: Grid, start: Rates, loosest: float) -> Rates:
    """Coarse rates below or above those tried, while an optimum or an edge is open on that side."""
    rates, bests = tuple(grid), best(grid)
    return wider(
        rates,
        rung(start[0]) - BELOW,
        rung(start[-1]) + ABOVE,
        below=rates[0] in bests or None in bests,
        above=rates[-1] in bests or any(trial.below(loosest) for lr in rates[-2:] for trial in grid[lr]),
        beyond=any(trial.outcome != "diverged" for trial in grid[rates[-1]]),
    )


def _refine(grid: Grid, losses: Sequence[float]) -> Rates:
    """The middle of every gap beside an optimum or at an edge that is still wider than half an octave."""
    bests = best(grid)
    training = [lr for loss in losses for lr in largest_training(grid, loss)]
    return finer(grid, upwards=(*bests, *training), downwards=(*bests, *smallest_diverged(grid)))


def best(grid: Grid) -> tuple[float | None, ...]:
    """For each seed the rate with the lowest validation loss, None where all diverge; of equals the smallest."""
    return _by_seed(grid, lambda trials: min(_ended(trials), default=(0.0, None))[1])


def _ended(trials: Sequence[Trial]) -> list[tuple[float, float]]:
    return [(trial.val_loss, trial.lr) for trial in trials if trial.val_loss is not None]


def largest_training(grid: Grid, loss: float) -> tuple[float | None, ...]:
    """For each seed the largest rate that ends below a loss, None where none does; it looks past a failure."""
    return _by_seed(grid, lambda trials: max((t.lr for t in trials if t.below(loss)), default=None))


def smallest_diverged(grid: Grid) -> tuple[float | None, ...]:
    """For each seed the smallest rate that diverges, None where none does."""
    return _by_seed(grid, lambda trials: min((t.lr for t in trials if t.outcome == "diverged"), default=None))


def _by_seed(grid: Grid, pick: Callable[[tuple[Trial, ...]], float | None]) -> tuple[float | None, ...]:
    return tuple(pick(trials) for trials in zip(*grid.values(), strict=True))


def best_edge(grid: Grid) -> Edge:
    """The seeds' best rates; open at either end of the rates tried."""
    return _edge(best(grid), ends=(min(grid), max(grid)))


def train_edge(grid: Grid, loss: float) -> Edge:
    """The seeds' largest rates that end below a loss; a seed that trains nowhere has none."""
    return _edge(largest_training(grid, loss), ends=(max(grid),))


def diverge_edge(grid: Grid) -> Edge:
    """The seeds' smallest rates that diverge; one that never does counts at the largest rate tried, as open."""
    rates = smallest_diverged(grid)
    found = _edge([max(grid) if lr is None else lr for lr in rates], ends=())
    return Edge(found.value, found.low, found.high, found.seeds, open=rates.count(None))


def _edge(rates: Sequence[float | None], ends: Sequence[float]) -> Edge:
    known = [lr for lr in rates if lr is not None]
    if not known:
        return Edge(None, None, None, seeds=0)
    mean = 2.0 ** fmean(map(math.log2, known))
    return Edge(mean, min(known), max(known), len(known), open=sum(lr in ends for lr in known))


def sensitivity(grid: Grid, rates: Rates) -> float | None:
    """Learning-rate sensitivity (Wortsman et al. 2023, arXiv:2309.14322).

    The mean over a range of rates of min(loss, first loss), minus the best loss. The loss is the validation loss, its
    mean over the seeds; a trial that diverged counts at its first loss. The best is the lowest of all rates tried. None
    where every trial diverged.
    """
    if not any(trial.outcome != "diverged" for trials in grid.values() for trial in trials):
        return None
    capped = {lr: fmean(map(_capped, trials)) for lr, trials in grid.items()}
    return fmean(capped[lr] for lr in rates) - min(capped.values())


def _capped(trial: Trial) -> float:
    return trial.first_loss if trial.val_loss is None else min(trial.val_loss, trial.first_loss)
