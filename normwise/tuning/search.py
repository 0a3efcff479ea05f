"""Which trials a study wants next, as a pure function of what it has recorded.

`next_requests(settings, records)` is called again whenever trials have finished, until it returns nothing. It keeps
no state: every call replays the stages from the records. A study therefore resumes for free, never repeats a trial,
and is the same whatever the order in which trials finish, because a stage is decided only when every trial of the
stage before has been recorded.

1. **Selection**, every normalization by itself and with the same budget: by a grid of learning rates that widens and
   refines itself (`stages`), in every combination of the axes' values; or at the points that a sampler draws
   (`points`).
2. **Confirmation**, once every selection is complete: each normalization at its own best rate and combination, on
   fresh seeds. Beside it, if asked for, the **control**: the same grid with gamma, beta and the output layer frozen.
3. **Horizon**: winner and runner-up, the same seeds, each at twice its own steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import median
from typing import NamedTuple

from normwise.tuning.axes import variants
from normwise.tuning.judge import ranked
from normwise.tuning.outcomes import Standing, Trials, standing
from normwise.tuning.points import missing_points, trials_by_points
from normwise.tuning.rates import declared_rates
from normwise.tuning.records import Phase, Record, Request, Settings, Variant
from normwise.tuning.seeds import labels, seeds, select_requests
from normwise.tuning.stages import next_stage

RATES_PER_NORM = 18  # what the widening grid runs on typical outcomes; a progress bar's guess
CONTROL_RATES = 16  # likewise for the control, whose edges lie further out

Done = Mapping[Request, Record]


class Choice(NamedTuple):
    """Where a normalization is at its best: a combination of the axes' values, and its learning rate there."""

    variant: Variant
    lr: float


class Budget(NamedTuple):
    """What a study is expected to cost."""

    trials: int
    full: float  # trials of full length that cost as much


def next_requests(settings: Settings, records: Iterable[Record], *, chance: float | None = None) -> tuple[Request, ...]:
    """The trials to run next: all of them may run at once, in any order. Empty when the study is complete.

    `chance` is the loss of the best constant prediction, None where it is unknown (a user's own loop).
    """
    done = {record.request: record for record in records}
    missing = _select(settings, done, chance)
    if missing:
        return missing
    best = best_choices(settings, done.values())
    confirm = _confirm_requests(settings, best)
    missing = _missing(confirm, done) or _missing(_horizon_requests(settings, confirm, done, chance), done)
    return (*missing, *_control(settings, best, done, chance))


def expected_trials(settings: Settings) -> int:
    """About how many trials a study takes, for progress and a dry run; exact in selection for a fixed grid.

    >>> expected_trials(Settings("mlp", "digits", (("a", "batch"), ("b", "none")), lrs=(0.1, 0.2)))
    52
    """
    return expected_budget(settings).trials


def expected_budget(settings: Settings) -> Budget:
    """About how many trials a study takes, and how many of full length would take as long.

    >>> expected_budget(Settings("mlp", "digits", (("a", "batch"), ("b", "none")), lrs=(0.1, 0.2)))
    Budget(trials=52, full=72)
    """
    rates = len(variants(settings)) * _rates(settings, RATES_PER_NORM)
    trials, full = (rates, rates) if settings.sampler == "grid" else trials_by_points(settings)
    control = _rates(settings, CONTROL_RATES) if settings.control else 0
    horizon = 2 * settings.confirm if settings.steps is not None and len(settings.norms) > 1 else 0
    count, others = len(settings.norms), control * settings.seeds + settings.confirm
    return Budget(
        count * (trials * settings.seeds + others) + horizon, count * (full * settings.seeds + others) + 2 * horizon
    )


def _rates(settings: Settings, typical: int) -> int:
    return typical if settings.lrs is None else len(declared_rates(settings))


# Reading the study


def reference_loss(settings: Settings, records: Iterable[Record], chance: float | None) -> float | None:
    """Chance where it is known; else the median first loss over the declared range, which every normalization ran."""
    if chance is not None:
        return chance
    rates = {lr for variant in variants(settings) for lr in declared_rates(settings.at(variant))}
    picked = (r for r in records if r.request.phase == "select" and r.request.lr in rates)
    losses = [r.first_loss for r in picked if r.first_loss is not None]
    return median(losses) if losses else None


def selection(
    settings: Settings, records: Iterable[Record], label: str, variant: Variant = (), *, phase: Phase = "select"
) -> Trials:
    """The complete learning rates of a normalization's selection: one record a seed, by rate, ascending.

    Of a combination of the axes' values, where there are axes; trials that were cut short take no part. With the phase
    "control" those of the control.
    """
    own = _line(settings, label, variant, phase)
    done = {r.request: r for r in records if r.request.norm == label}
    rates = {r.lr for r in done if (r.norm, r.phase, r.variant, r.steps) == (label, phase, variant, own.steps)}
    return own.trials(sorted(rates), done)


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
    for label in labels(settings):
        rows = sorted((r for r in confirmed if r.request.norm == label), key=lambda r: r.request.seed)
        if rows and worst is not None:
            scores[label] = tuple(worst if r.score is None else r.score for r in rows)
    return scores


def imputed_score(settings: Settings, records: Iterable[Record], chance: float | None) -> float | None:
    """What a seed without a score is given: the worst score seen in the study, or chance level if that is worse.

    Chance level is known for accuracy under cross-entropy: exp(-chance), which is 1/K for K classes of equal size.
    """
    scores = [r.score for r in records if r.request.phase in ("select", "confirm") and r.score is not None]
    if settings.metric == "accuracy" and settings.loss == "cross_entropy" and chance is not None:
        scores.append(math.exp(-chance) * (100.0 if settings.unit == "%" else 1.0))
    return (min if settings.direction == "max" else max)(scores, default=None)


# Selection


class _Line(NamedTuple):
    """One search of learning rates: a normalization at one combination of the axes' values."""

    settings: Settings  # of that combination
    label: str
    variant: Variant
    phase: Phase

    @property
    def steps(self) -> int | None:
        """Of a trial that is not cut short."""
        return self.settings.steps

    def requests(self, rates: Iterable[float]) -> tuple[Request, ...]:
        """Every rate on every seed."""
        return select_requests(self.settings, self.label, self.variant, rates, steps=self.steps, phase=self.phase)

    def trials(self, rates: Iterable[float], done: Done) -> dict[float, tuple[Record, ...]]:
        """The records of those rates that every seed has run."""
        wanted = {lr: self.requests((lr,)) for lr in rates}
        return {lr: tuple(done[r] for r in rows) for lr, rows in wanted.items() if not _missing(rows, done)}


def _line(settings: Settings, label: str, variant: Variant, phase: Phase = "select") -> _Line:
    return _Line(settings.at(variant), label, variant, phase)


def _select(settings: Settings, done: Done, chance: float | None) -> tuple[Request, ...]:
    """What selection still lacks; the stages of a grid are decided when every declared range has been run."""
    if settings.sampler != "grid":
        return tuple(r for label in labels(settings) for r in missing_points(settings, label, done))
    lines = [_line(settings, label, variant) for label in labels(settings) for variant in variants(settings)]
    missing = tuple(r for line in lines for r in _missing(line.requests(declared_rates(line.settings)), done))
    if missing:
        return missing
    reference = reference_loss(settings, done.values(), chance)
    return tuple(r for line in lines for r in _lacks(line, done, reference))


def _lacks(line: _Line, done: Done, chance: float | None) -> tuple[Request, ...]:
    """What the current stage of a line still lacks; empty when its grid is complete."""
    trials: dict[float, tuple[Record, ...]] = {}
    stage = declared_rates(line.settings)
    while stage:
        missing = _missing(line.requests(stage), done)
        if missing:
            return missing
        trials |= line.trials(stage, done)
        sorted_trials = dict(sorted(trials.items()))
        stage = next_stage(line.settings, sorted_trials, chance, edges_only=line.phase == "control")
    return ()


def best_choices(settings: Settings, records: Iterable[Record]) -> dict[str, Choice]:
    """Where each normalization is at its best; one that always diverged is left out.

    The best combination of the axes' values is the one with the best score at its own best rate, as `best_rate` smooths
    it. Points that a sampler drew are compared one by one. Ties go to the combination that comes first.
    """
    records = tuple(records)
    found = {label: _best(settings, records, label) for label in labels(settings)}
    return {label: choice for label, choice in found.items() if choice is not None}


def _best(settings: Settings, records: tuple[Record, ...], label: str) -> Choice | None:
    own = defaultdict(list)
    for record in records:
        if record.request.norm == label and record.request.phase == "select":
            own[record.request.variant].append(record)
    ranking: list[tuple[Standing, Variant]] = []
    for variant in variants(settings):
        trials = selection(settings, own[variant], label, variant)
        groups = [trials] if settings.sampler == "grid" else [{lr: rows} for lr, rows in trials.items()]
        stands = (standing(group, settings.direction) for group in groups)
        ranking += [(found, variant) for found in stands if found is not None]
    if not ranking:
        return None
    found, variant = max(ranking, key=lambda entry: entry[0][:-1])
    return Choice(variant, found.lr)


# After selection


def _confirm_requests(settings: Settings, best: Mapping[str, Choice]) -> tuple[Request, ...]:
    return tuple(
        Request("confirm", label, lr, seed, settings.at(variant).steps, variant)
        for label, (variant, lr) in best.items()
        for seed in seeds(settings, label, "confirm")
    )


def _horizon_requests(
    settings: Settings, confirm: Iterable[Request], done: Done, chance: float | None
) -> tuple[Request, ...]:
    """The two leaders' confirmation, at twice the steps; none where there is no second, or no number of steps."""
    leaders = ranked(confirmation_scores(settings, done.values(), chance), settings.direction)[:2]
    if len(leaders) < 2:
        return ()
    return tuple(
        replace(r, phase="horizon", steps=2 * r.steps) for r in confirm if r.norm in leaders and r.steps is not None
    )


def _control(settings: Settings, best: Mapping[str, Choice], done: Done, chance: float | None) -> tuple[Request, ...]:
    """What the control still lacks: each normalization at its best combination, with its scale and output frozen."""
    if not settings.control:
        return ()
    reference = reference_loss(settings, done.values(), chance)
    lines = [_line(settings, label, choice.variant, "control") for label, choice in best.items()]
    return tuple(r for line in lines for r in _lacks(line, done, reference))


def _missing(requests: Iterable[Request], done: Done) -> tuple[Request, ...]:
    return tuple(r for r in requests if r not in done)
