"""The stages of a grid of learning rates that widens and refines itself, one normalization at a time.

1. **The declared range**: coarse rates, a factor 4 apart.
2. **Widening**, until the best rate has a coarse rate on either side, two rates above the training edge train for no
   seed (the edge is where outcomes stop training, not where they first fail to), and the largest rate diverges for
   every seed; or until a cap, and the answer is "none up to X".
3. **Refining** to half an octave: around the best rate, and around each seed's training and divergence edges.
"""

from __future__ import annotations

from normwise.diagnose.lattice import Rates, finer, wider
from normwise.tuning.outcomes import SHARES, Trials, best_rate, largest_training, smallest_diverged, trains
from normwise.tuning.rates import range_of
from normwise.tuning.records import Settings


def next_stage(settings: Settings, trials: Trials, chance: float | None, *, edges_only: bool = False) -> Rates:
    """The rates that these trials leave open; none when the grid is complete, or was fixed.

    `edges_only` leaves the surroundings of the best rate as coarse as they are.
    """
    if settings.lrs is not None:
        return ()
    return _widen(settings, trials, chance) or _refine(settings, trials, chance, edges_only)


def _widen(settings: Settings, trials: Trials, chance: float | None) -> Rates:
    """Coarse rates below or above those tried, while an optimum or an edge is open on that side."""
    span, best, rates = range_of(settings.optimizer), best_rate(trials, settings.direction), tuple(trials)
    loosest, own = max(SHARES), settings.own_loop
    near_top = [r for lr in rates[-2:] for r in trials[lr]]
    return wider(
        rates,
        span.floor,
        span.cap,
        below=best is None or best == rates[0],
        above=best == rates[-1] or any(trains(r, loosest, chance, own_loop=own) for r in near_top),
        beyond=any(r.outcome != "diverged" for r in trials[rates[-1]]),
    )


def _refine(settings: Settings, trials: Trials, chance: float | None, edges_only: bool) -> Rates:
    """The middles beside the best rate, above each training edge and below each divergence edge."""
    best = [] if edges_only else [best_rate(trials, settings.direction)]
    training = [lr for share in SHARES for lr in largest_training(trials, share, chance, own_loop=settings.own_loop)]
    return finer(trials, upwards=(*best, *training), downwards=(*best, *smallest_diverged(trials)))
