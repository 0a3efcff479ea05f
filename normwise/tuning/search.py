"""Which trials a study wants next, as a pure function of what it has recorded.

`next_requests(settings, records)` is called again whenever trials have finished, until it returns nothing. It keeps
no state: every call replays the stages from the records. A study therefore resumes for free, never repeats a trial,
and is the same whatever the order in which trials finish, because a stage is decided only when every trial of the
stage before has been recorded.

1. **The declared range.** Every normalization runs the same coarse rates, a factor 4 apart.
2. **Widening**, each normalization by itself, until its best rate has a coarse rate on either side, two rates above
   its training edge train for no seed (the edge is where outcomes stop training, not where they first fail to), and
   the largest rate diverges for every seed; or until a cap, and the answer is "none up to X".
3. **Refining** to half an octave: around the best rate, and around each seed's training and divergence edges.
4. **Confirmation**, once every selection is complete: each normalization at its own best rate, on fresh seeds.
5. **Horizon**: winner and runner-up, the same seeds, twice the steps.

Rates lie on a half-octave lattice: rung k is the learning rate 2**(k/2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from normwise.errors import StudyError
from normwise.tuning.judge import ranked
from normwise.tuning.outcomes import SHARES, Trials, best_rate, largest_training, smallest_diverged, trains
from normwise.tuning.records import Phase, Record, Request, Settings

STEP = 4  # rungs between coarse rates: a factor 4
LEAP = 10  # rungs between the rates that look for divergence above the training edge: a factor 32
SEED_BLOCK, CONFIRM_OFFSET = 10_000, 1_000
RATES_PER_NORM = 18  # what the widening grid runs on typical outcomes; a progress bar's guess

Done = Mapping[Request, Record]


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


def rate(rung: int) -> float:
    """The learning rate 2**(rung/2), exact to the last bit on every machine (math.sqrt is; a power need not be).

    >>> rate(-2), rate(0), rate(1)
    (0.5, 1.0, 1.4142135623730951)
    """
    return math.ldexp(math.sqrt(2.0) if rung % 2 else 1.0, rung // 2)


def rung(lr: float) -> int:
    """The rung nearest to a learning rate.

    >>> rung(0.5), rung(rate(7))
    (-2, 7)
    """
    return round(2 * math.log2(lr))


def declared_rates(settings: Settings) -> tuple[float, ...]:
    """The rates that every normalization runs first: the declared range, or all of a fixed grid.

    >>> declared_rates(Settings("mlp", "digits", (("none", "none"),)))
    (0.00390625, 0.015625, 0.0625, 0.25, 1.0, 4.0)
    """
    if settings.lrs is not None:
        return tuple(sorted(set(settings.lrs)))
    span = _range(settings)
    return tuple(rate(k) for k in range(span.low, span.high + 1, STEP))


def seeds(settings: Settings, label: str, phase: Phase) -> tuple[int, ...]:
    """The seeds of a normalization in a phase: no two normalizations share one, selection and confirmation neither.

    Selection seed j of normalization i is `base_seed + 10000 i + j`, confirmation seed j is 1000 above that. Within a
    normalization the same seeds run at every learning rate, from the same start and in the same data order; the
    horizon repeats the confirmation seeds. With seeds shared between normalizations, two copies of one would be equal
    bit for bit, and their comparison would show nothing.

    Raises StudyError for more seeds than the blocks hold (1000 for selection, 9000 for confirmation).

    >>> settings = Settings("mlp", "digits", (("a", "batch"), ("b", "batch")), seeds=2, confirm=3)
    >>> seeds(settings, "b", "select"), seeds(settings, "b", "confirm")
    ((10000, 10001), (11000, 11001, 11002))
    """
    first, count, most = 0, settings.seeds, CONFIRM_OFFSET
    if phase != "select":
        first, count, most = CONFIRM_OFFSET, settings.confirm, SEED_BLOCK - CONFIRM_OFFSET
    if count > most:
        name = "seeds" if phase == "select" else "confirm"
        raise StudyError(f"{name}={count}: at most {most}, or the seeds of two normalizations would be the same")
    start = settings.base_seed + SEED_BLOCK * _labels(settings).index(label) + first
    return tuple(range(start, start + count))


def next_requests(settings: Settings, records: Iterable[Record], *, chance: float | None = None) -> tuple[Request, ...]:
    """The trials to run next: all of them may run at once, in any order. Empty when the study is complete.

    `chance` is the loss of the best constant prediction, None where it is unknown (a user's own loop).
    """
    done = {record.request: record for record in records}
    missing = _missing(_first_requests(settings), done)
    if missing:
        return missing
    reference = reference_loss(settings, done.values(), chance)
    missing = tuple(r for label in _labels(settings) for r in _selection(settings, label, done, reference))
    if missing:
        return missing
    return _missing(_confirm_requests(settings, done), done) or _missing(
        _horizon_requests(settings, done, chance), done
    )


def expected_trials(settings: Settings) -> int:
    """About how many trials a study takes, for progress and a dry run; exact in selection for a fixed grid.

    >>> expected_trials(Settings("mlp", "digits", (("a", "batch"), ("b", "none")), lrs=(0.1, 0.2)))
    52
    """
    rates = RATES_PER_NORM if settings.lrs is None else len(declared_rates(settings))
    horizon = 2 * settings.confirm if settings.steps is not None and len(settings.norms) > 1 else 0
    return len(settings.norms) * (rates * settings.seeds + settings.confirm) + horizon


# Reading the study


def reference_loss(settings: Settings, records: Iterable[Record], chance: float | None) -> float | None:
    """Chance where it is known; else the median first loss over the declared range, which every normalization ran."""
    if chance is not None:
        return chance
    rates = set(declared_rates(settings))
    picked = (r for r in records if r.request.phase == "select" and r.request.lr in rates)
    losses = [r.first_loss for r in picked if r.first_loss is not None]
    return median(losses) if losses else None


def selection(settings: Settings, records: Iterable[Record], label: str) -> Trials:
    """The complete learning rates of a normalization's selection: one record a seed, by rate, ascending."""
    done = {record.request: record for record in records}
    rates = sorted({r.lr for r in done if r.phase == "select" and r.norm == label})
    wanted = {lr: _select_requests(settings, label, (lr,)) for lr in rates}
    return {lr: tuple(done[r] for r in rows) for lr, rows in wanted.items() if not _missing(rows, done)}


def confirmation_scores(
    settings: Settings, records: Iterable[Record], chance: float | None
) -> dict[str, tuple[float, ...]]:
    """Each normalization's confirmation scores, a failed seed at its imputed value.

    A normalization without confirmation (every selection trial diverged) is left out.
    """
    records = tuple(records)
    confirmed = [r for r in records if r.request.phase == "confirm"]
    worst = imputed_score(settings, records, chance)
    scores: dict[str, tuple[float, ...]] = {}
    for label in _labels(settings):
        rows = sorted((r for r in confirmed if r.request.norm == label), key=lambda r: r.request.seed)
        if rows and worst is not None:
            scores[label] = tuple(worst if r.score is None else r.score for r in rows)
    return scores


def imputed_score(settings: Settings, records: Iterable[Record], chance: float | None) -> float | None:
    """What a seed without a score is given: the worst score seen in the study, or chance level if that is worse.

    Chance level is known for accuracy under cross-entropy: exp(-chance), which is 1/K for K classes of equal size.
    """
    scores = [r.score for r in records if r.request.phase != "horizon" and r.score is not None]
    if settings.metric == "accuracy" and settings.loss == "cross_entropy" and chance is not None:
        scores.append(math.exp(-chance) * (100.0 if settings.unit == "%" else 1.0))
    return (min if settings.direction == "max" else max)(scores, default=None)


# Requests


def _first_requests(settings: Settings) -> tuple[Request, ...]:
    rates = declared_rates(settings)
    return tuple(r for label in _labels(settings) for r in _select_requests(settings, label, rates))


def _select_requests(settings: Settings, label: str, rates: Iterable[float]) -> tuple[Request, ...]:
    own = seeds(settings, label, "select")
    return tuple(Request("select", label, lr, seed, settings.steps) for lr in rates for seed in own)


def _selection(settings: Settings, label: str, done: Done, chance: float | None) -> tuple[Request, ...]:
    """What a normalization's current stage still lacks; empty when its selection is complete."""
    trials: dict[float, tuple[Record, ...]] = {}
    stage = declared_rates(settings)
    while stage:
        missing = _missing(_select_requests(settings, label, stage), done)
        if missing:
            return missing
        trials |= {lr: tuple(done[r] for r in _select_requests(settings, label, (lr,))) for lr in stage}
        stage = _next_stage(settings, dict(sorted(trials.items())), chance)
    return ()


def _confirm_requests(settings: Settings, done: Done) -> tuple[Request, ...]:
    requests: list[Request] = []
    for label in _labels(settings):
        lr = best_rate(selection(settings, done.values(), label), settings.direction)
        if lr is not None:
            own = seeds(settings, label, "confirm")
            requests += [Request("confirm", label, lr, seed, settings.steps) for seed in own]
    return tuple(requests)


def _horizon_requests(settings: Settings, done: Done, chance: float | None) -> tuple[Request, ...]:
    """The two leaders' confirmation, at twice the steps; none where there is no second, or no number of steps."""
    leaders = ranked(confirmation_scores(settings, done.values(), chance), settings.direction)[:2]
    if settings.steps is None or len(leaders) < 2:
        return ()
    twice = 2 * settings.steps
    return tuple(
        replace(r, phase="horizon", steps=twice) for r in _confirm_requests(settings, done) if r.norm in leaders
    )


def _missing(requests: Iterable[Request], done: Done) -> tuple[Request, ...]:
    return tuple(r for r in requests if r not in done)


# Stages


def _next_stage(settings: Settings, trials: Trials, chance: float | None) -> tuple[float, ...]:
    if settings.lrs is not None:
        return ()
    return _widen(settings, trials, chance) or _refine(settings, trials, chance)


def _widen(settings: Settings, trials: Trials, chance: float | None) -> tuple[float, ...]:
    """Coarse rates below or above those tried, while an optimum or an edge is open on that side."""
    span, best, rates = _range(settings), best_rate(trials, settings.direction), tuple(trials)
    wider: set[int] = set()
    if best is None or best == rates[0]:
        wider.add(max(rung(rates[0]) - STEP, span.floor))
    loosest, own = max(SHARES), settings.own_loop
    if best == rates[-1] or any(trains(r, loosest, chance, own_loop=own) for lr in rates[-2:] for r in trials[lr]):
        wider.add(min(rung(rates[-1]) + STEP, span.cap))
    elif any(r.outcome != "diverged" for r in trials[rates[-1]]):
        wider.add(min(rung(rates[-1]) + LEAP, span.cap))
    return tuple(lr for lr in map(rate, sorted(wider)) if lr not in trials)


def _refine(settings: Settings, trials: Trials, chance: float | None) -> tuple[float, ...]:
    """The middle of every gap that is still wider than half an octave."""
    gaps = {(rung(low), rung(high)) for low, high in _gaps(settings, trials, chance)}
    return tuple(rate(k) for k in sorted({(low + high) // 2 for low, high in gaps if high - low > 1}))


def _gaps(settings: Settings, trials: Trials, chance: float | None) -> Iterator[tuple[float, float]]:
    """Pairs of neighbouring rates: beside the best rate, above each training edge, below each divergence edge."""
    above = dict(pairwise(trials))
    below = {high: low for low, high in above.items()}
    best, own = best_rate(trials, settings.direction), settings.own_loop
    training = [lr for share in SHARES for lr in largest_training(trials, share, chance, own_loop=own)]
    yield from ((lr, above[lr]) for lr in (best, *training) if lr in above)
    yield from ((below[lr], lr) for lr in (best, *smallest_diverged(trials)) if lr in below)


# Settings


def _labels(settings: Settings) -> tuple[str, ...]:
    return tuple(label for label, _ in settings.norms)


def _range(settings: Settings) -> Range:
    known = RANGES.get(settings.optimizer)
    if known is None:
        raise StudyError(f"optimizer {settings.optimizer!r}: no range of learning rates; known: {', '.join(RANGES)}")
    return known
