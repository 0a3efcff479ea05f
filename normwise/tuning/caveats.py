"""What a reader must know before relying on a study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from normwise.tuning.axes import value_text
from normwise.tuning.rates import declared_rates
from normwise.tuning.records import Horizon, NormSummary, Settings, Verdict
from normwise.tuning.sentence import Wording, rate_text, seeds_needed

HEADLINE = "0.5"  # the share of chance that lr_train and the margin are read at


def caveats(
    settings: Settings,
    norms: Sequence[NormSummary],
    verdict: Verdict,
    horizon: Horizon | None,
    worst: float | None,
) -> Iterator[str]:
    """Everything to be warned of, the gravest first; `worst` is what a seed without a score was given."""
    yield from fractions(settings, norms)
    yield from _seedless(settings, norms)
    yield from _reversal(settings, horizon)
    yield from _same_horizon(settings, norms)
    yield from _boundaries(settings, norms)
    yield from _undecided(verdict)
    yield from _failures(settings, norms, worst)


def fractions(settings: Settings, norms: Sequence[NormSummary]) -> Iterator[str]:
    """A loop that returns 0.93 where 93 % is meant makes every difference smaller than the margin."""
    scores = [r.score for norm in norms for r in (*norm.selection, *norm.confirmation) if r.score is not None]
    inside = bool(scores) and all(0 <= score <= 1 for score in scores)
    if settings.own_loop and settings.unit == "%" and settings.margin >= 0.1 and inside:
        yield (
            f"scores look like fractions: all lie between 0 and 1, while the margin of {settings.margin:g} is in "
            "points of percent. The verdict cannot be trusted: return 100 times the score, or give a margin that fits"
        )


def _seedless(settings: Settings, norms: Sequence[NormSummary]) -> Iterator[str]:
    """A loop that ignores its seed gives the same score for every seed, and differences without any spread."""
    for norm in norms:
        if settings.own_loop and len(norm.scores) > 1 and len(set(norm.scores)) == 1:
            yield (
                f"no spread: all {len(norm.scores)} confirmation seeds of {norm.label} score exactly "
                f"{norm.scores[0]:g}. If the training loop does not follow its seed, the verdict cannot be trusted"
            )


def _same_horizon(settings: Settings, norms: Sequence[NormSummary]) -> Iterator[str]:
    if ignores_steps(settings, norms):
        yield (
            "horizon: at twice the steps every score is the same, seed for seed. The training loop does not follow "
            "trial.steps, so whether the lead lasts is not known"
        )


def ignores_steps(settings: Settings, norms: Sequence[NormSummary]) -> bool:
    """Whether a loop of the user's was asked for twice the steps and did just the same."""
    rerun = [norm for norm in norms if norm.horizon]
    same = all([r.score for r in norm.horizon] == [r.score for r in norm.confirmation] for norm in rerun)
    return settings.own_loop and bool(rerun) and same


def _reversal(settings: Settings, horizon: Horizon | None) -> Iterator[str]:
    if horizon is not None and horizon.reversed:
        gap, first, second = wording(settings).gap, horizon.winner, horizon.runner_up
        yield (
            f"reversal: {first} leads {second} by {gap(horizon.lead)} at {_steps(horizon, 1)} steps, "
            f"but {second} leads by {gap(-horizon.lead_doubled)} at {_steps(horizon, 2)}. "
            "Judge again with the number of steps that you will train for"
        )


def _steps(horizon: Horizon, times: int) -> str:
    """The steps of the two, the winner's first, where they are not the same."""
    both = [horizon.steps] if horizon.runner_up_steps is None else [horizon.steps, horizon.runner_up_steps]
    return " and ".join(str(times * steps) for steps in both)


def _boundaries(settings: Settings, norms: Sequence[NormSummary]) -> Iterator[str]:
    yield from _rate_boundaries(settings, norms) if settings.sampler == "grid" else _box_boundaries(settings, norms)
    yield from _axis_boundaries(settings, norms)


def _box_boundaries(settings: Settings, norms: Sequence[NormSummary]) -> Iterator[str]:
    """A sampler draws from a fixed range; what is best within a factor 2 of its ends may be better beyond."""
    for norm in norms:
        rates = declared_rates(settings.at(norm.variant))
        if norm.lr_best is None:
            yield f"no rate: every selection trial of {norm.label} diverged; it was not confirmed"
        elif not 2 * rates[0] < norm.lr_best < rates[-1] / 2:
            yield (
                f"boundary: the best learning rate of {norm.label}, {rate_text(norm.lr_best)}, is at the end of the "
                f"range that was drawn from, {rate_text(rates[0])} to {rate_text(rates[-1])}; give a wider one with "
                "--lrs LOW:HIGH:2, or use --sampler grid"
            )


def _axis_boundaries(settings: Settings, norms: Sequence[NormSummary]) -> Iterator[str]:
    """A size or a strength that is best at the end of what was tried; two values have no middle, and say nothing."""
    for name, values in settings.axes:
        if name not in ("batch_size", "weight_decay") or len(values) < 3:
            continue
        for norm in norms:
            best = dict(norm.variant).get(name)
            if best is not None and best in (min(values), max(values)) and best != 0:
                end = "smallest" if best == min(values) else "largest"
                yield (
                    f"boundary: the best {name.replace('_', ' ')} of {norm.label}, {value_text(best)}, is the {end} "
                    "one tried, so a better one may lie beyond"
                )


def _rate_boundaries(settings: Settings, norms: Sequence[NormSummary]) -> Iterator[str]:
    wider = "widen --lrs" if settings.lrs is not None else "the search goes no further"
    for norm in norms:
        rates = sorted({r.request.lr for r in norm.selection})
        if norm.lr_best is None:
            yield f"no rate: every selection trial of {norm.label} diverged; it was not confirmed"
        elif norm.lr_best in (rates[0], rates[-1]):
            end = "smallest" if norm.lr_best == rates[0] else "largest"
            yield (
                f"boundary: the best learning rate of {norm.label}, {rate_text(norm.lr_best)}, is the {end} one "
                f"tried, so a better one may lie beyond; {wider}"
            )
        edge = norm.lr_train.get(HEADLINE)
        if edge is not None and edge.censored:
            yield (
                f"boundary: {norm.label} still trains at {rate_text(rates[-1])}, the largest learning rate tried, "
                f"for {edge.censored} of {edge.seeds} seeds, so its lr_train is a lower bound; {wider}"
            )


def _undecided(verdict: Verdict) -> Iterator[str]:
    """The winner's open pairs; those behind it are in the table of pairs, and change nothing about the answer."""
    for pair in verdict.comparisons:
        if pair.verdict == "undecided" and pair.better == verdict.winner:
            yield f"undecided: {pair.better} against {pair.other}; {seeds_needed([pair])}"


def _failures(settings: Settings, norms: Sequence[NormSummary], worst: float | None) -> Iterator[str]:
    text = wording(settings)
    for norm in norms:
        diverged = sum(r.score is None for r in norm.confirmation)
        imputed = ""
        if diverged and worst is not None:
            imputed = f"; {diverged} diverged and count as {text.value(worst)}, the worst score or chance level"
        if norm.failures:
            yield f"failures: {norm.failures} of {len(norm.confirmation)} seeds of {norm.label} did not train{imputed}"


def wording(settings: Settings) -> Wording:
    """How numbers of this study are written."""
    return Wording(settings.unit, settings.margin, means={}, rates={})
