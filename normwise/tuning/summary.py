"""A finished study, condensed into what the report is drawn from, with its warnings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, stdev
from typing import Any, TypeVar

from scipy.special import stdtrit

from normwise.tuning.caveats import HEADLINE, caveats, fractions, ignores_steps, wording
from normwise.tuning.judge import Wording, judge, rate_text
from normwise.tuning.norms import NormChoice
from normwise.tuning.outcomes import Trials, best_rate, diverge_edge, sensitivity, train_edges
from normwise.tuning.records import Comparison, Edge, Horizon, NormSummary, Phase, Record, Settings, Summary, Verdict
from normwise.tuning.search import confirmation_scores, declared_rates, imputed_score, reference_loss, selection

CONFIDENCE = 0.95
MISSING = "-"
Number = TypeVar("Number", int, float)
HEADER = (
    "normalization",
    "score",
    "median",
    "lr_best",
    "lr_train",
    "lr_diverge",
    "margin",
    "sensitivity",
    "failures",
    "ms/step",
    "parameters",
)


def summarize(
    settings: Settings,
    records: Iterable[Record],
    *,
    chance: float | None,
    facts: Mapping[str, str],
    described: Mapping[str, str],
    parameters: Mapping[str, int | None],
    ms_per_step: Mapping[str, float | None] | None,
    reproduce: Mapping[str, str],
    seconds: float,
) -> Summary:
    """Condense a complete study: each normalization, the verdict, the horizon, and what to be warned of.

    `described`, `parameters` and `ms_per_step` go by label. A confirmation seed that diverged has no score and is given
    the worst one of the study, or chance level where that is known and worse; a warning says so.
    """
    records = tuple(records)
    scores = confirmation_scores(settings, records, chance)
    layers = {
        label: Layer(label, declaration, described[label], parameters.get(label), (ms_per_step or {}).get(label))
        for label, declaration in settings.norms
    }
    norms = tuple(_norm(settings, records, layers[label], scores.get(label, ()), chance) for label in layers)
    verdict = _withheld(_judged(settings, norms), tuple(fractions(settings, norms)))
    repeated = ignores_steps(settings, norms)
    horizon = None if repeated else _horizon(settings, records, verdict, scores, chance)
    rates = declared_rates(settings)
    return Summary(
        settings=settings,
        facts=dict(facts),
        chance=chance,
        lr_range=(rates[0], rates[-1]),
        norms=norms,
        verdict=verdict,
        horizon=horizon,
        warnings=tuple(caveats(settings, norms, verdict, horizon, imputed_score(settings, records, chance))),
        reproduce=dict(reproduce),
        seconds=seconds,
        trials=len(records),
    )


def rows(summary: Summary) -> list[tuple[str, ...]]:
    """The results as a table of text, the heading first, then one row a normalization."""
    return [HEADER, *(_row(norm, wording(summary.settings)) for norm in summary.norms)]


def summary_from_dict(data: dict[str, Any]) -> Summary:
    """The summary that `Summary.to_dict` wrote, JSON in between or not.

    Raises KeyError or TypeError for data that are no summary.
    """
    horizon = data["horizon"]
    return Summary(
        **{
            **data,
            "settings": Settings.from_dict(data["settings"]),
            "lr_range": tuple(data["lr_range"]),
            "norms": tuple(_norm_from_dict(norm) for norm in data["norms"]),
            "verdict": _verdict_from_dict(data["verdict"]),
            "horizon": None if horizon is None else Horizon(**horizon),
            "warnings": tuple(data["warnings"]),
        }
    )


def _norm_from_dict(data: dict[str, Any]) -> NormSummary:
    phases = ("selection", "confirmation", "horizon")
    return NormSummary(
        **{
            **data,
            **{phase: tuple(Record.from_dict(record) for record in data[phase]) for phase in phases},
            "lr_train": {share: Edge(**edge) for share, edge in data["lr_train"].items()},
            "lr_diverge": Edge(**data["lr_diverge"]),
            "scores": tuple(data["scores"]),
        }
    )


def _verdict_from_dict(data: dict[str, Any]) -> Verdict:
    return Verdict(**{**data, "comparisons": tuple(Comparison(**pair) for pair in data["comparisons"])})


# One normalization


@dataclass(frozen=True)
class Layer:
    """What is known of a normalization besides its trials."""

    label: str
    declaration: str
    described: str
    parameters: int | None
    ms_per_step: float | None


def _norm(
    settings: Settings, records: Sequence[Record], layer: Layer, scores: tuple[float, ...], chance: float | None
) -> NormSummary:
    label = layer.label
    trials = selection(settings, records, label)
    confirmation = _phase(records, label, "confirm")
    lr_best = best_rate(trials, settings.direction)
    lr_train = _train_edges(settings, records, trials, chance)
    low, high = _within_percent(settings, mean_interval(scores))
    weights = [r.weight_norm for r in confirmation if r.weight_norm is not None]
    return NormSummary(
        label=label,
        declaration=layer.declaration,
        described=layer.described,
        lr_best=lr_best,
        lr_train=lr_train,
        lr_diverge=diverge_edge(trials),
        margin_octaves=_octaves(lr_train.get(HEADLINE), lr_best),
        sensitivity=sensitivity(trials, declared_rates(settings)),
        selection=_phase(records, label, "select"),
        confirmation=confirmation,
        horizon=_phase(records, label, "horizon"),
        scores=scores,
        mean=fmean(scores) if scores else None,
        median=median(scores) if scores else None,
        low=low,
        high=high,
        failures=sum(r.outcome != "trains" for r in confirmation),
        ms_per_step=layer.ms_per_step,
        weight_norm=median(weights) if weights else None,
        trials=sum(r.request.norm == label for r in records),
        parameters=layer.parameters,
    )


def mean_interval(scores: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % interval of a mean by Student's t; None with fewer than two scores.

    >>> [round(end, 2) for end in mean_interval([1.0, 2.0, 3.0])]
    [-0.48, 4.48]
    """
    if len(scores) < 2:
        return None, None
    half = float(stdtrit(len(scores) - 1, (1 + CONFIDENCE) / 2)) * stdev(scores) / math.sqrt(len(scores))
    return fmean(scores) - half, fmean(scores) + half


def _within_percent(settings: Settings, ends: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    """An accuracy lies between 0 and 100 %, so its interval may end there and loses nothing."""
    low, high = ends
    if low is None or high is None or settings.metric != "accuracy" or settings.unit != "%":
        return ends
    return max(low, 0.0), min(high, 100.0)


def _phase(records: Sequence[Record], label: str, phase: Phase) -> tuple[Record, ...]:
    own = (r for r in records if r.request.norm == label and r.request.phase == phase)
    return tuple(sorted(own, key=lambda r: (r.request.lr, r.request.seed)))


def _train_edges(
    settings: Settings, records: Sequence[Record], trials: Trials, chance: float | None
) -> dict[str, Edge]:
    """The training edges; none where no losses were logged, because nothing can be held against a threshold."""
    reference = reference_loss(settings, records, chance)
    return {} if reference is None else train_edges(trials, reference, own_loop=settings.own_loop)


def _octaves(edge: Edge | None, lr_best: float | None) -> float | None:
    return None if edge is None or edge.mean is None or lr_best is None else math.log2(edge.mean / lr_best)


# The study


def _judged(settings: Settings, norms: Sequence[NormSummary]) -> Verdict:
    return judge(
        {norm.label: norm.scores for norm in norms if norm.scores},
        direction=settings.direction,
        margin=settings.margin,
        unit=settings.unit,
        confidence=CONFIDENCE,
        simplicity={norm.label: NormChoice(norm.label, norm.declaration).simplicity for norm in norms},
        rates={norm.label: norm.lr_best for norm in norms if norm.lr_best is not None},
        trained={norm.label: _trained(norm) for norm in norms},
    )


def _withheld(verdict: Verdict, faults: tuple[str, ...]) -> Verdict:
    """The verdict, or none where the scores cannot mean what the margin takes them to mean."""
    if not faults:
        return verdict
    return replace(verdict, kind="undecided", sentence=f"No verdict: {faults[0]}.")


def _trained(norm: NormSummary) -> tuple[float, ...]:
    return tuple(r.score for r in norm.confirmation if r.outcome == "trains" and r.score is not None)


def _horizon(
    settings: Settings,
    records: Sequence[Record],
    verdict: Verdict,
    scores: Mapping[str, Sequence[float]],
    chance: float | None,
) -> Horizon | None:
    """The lead at twice the steps; reversed when the runner-up then leads by more than the seeds' noise."""
    worst, sign = imputed_score(settings, records, chance), 1.0 if settings.direction == "max" else -1.0
    if verdict.runner_up is None or worst is None or settings.steps is None:
        return None
    pair = (verdict.winner, verdict.runner_up)
    rerun = {label: _phase(records, label, "horizon") for label in pair}
    if not all(rerun.values()):
        return None
    doubled = {label: [worst if r.score is None else r.score for r in rerun[label]] for label in pair}
    again = judge(doubled, direction=settings.direction, margin=0.0, confidence=CONFIDENCE)
    return Horizon(
        *pair,
        steps=settings.steps,
        lead=sign * (fmean(scores[pair[0]]) - fmean(scores[pair[1]])),
        lead_doubled=sign * (fmean(doubled[pair[0]]) - fmean(doubled[pair[1]])),
        reversed=again.winner == verdict.runner_up and again.kind == "better",
    )


# Text


def _row(norm: NormSummary, wording: Wording) -> tuple[str, ...]:
    return (
        norm.label,
        _shown(norm.mean, wording.value),
        _shown(norm.median, wording.value),
        _shown(norm.lr_best, rate_text),
        _edge_text(norm.lr_train.get(HEADLINE), "at least"),
        _edge_text(norm.lr_diverge, "none up to"),
        _margin_text(norm),
        _shown(norm.sensitivity, "{:.3g}".format),
        f"{norm.failures}/{len(norm.confirmation)}",
        _shown(norm.ms_per_step, "{:.2f}".format),
        _shown(norm.parameters, "{:,}".format),
    )


def _margin_text(norm: NormSummary) -> str:
    edge = norm.lr_train.get(HEADLINE)
    beyond = "at least " if edge is not None and edge.censored else ""
    return MISSING if norm.margin_octaves is None else f"{beyond}{norm.margin_octaves:.1f} oct"


def _edge_text(edge: Edge | None, beyond: str) -> str:
    """An edge in a cell: its mean, or that it lies beyond the rates tried for some seed."""
    if edge is None or edge.mean is None:
        return MISSING
    if edge.censored == edge.seeds:
        return f"{beyond} {rate_text(edge.mean)}"
    return f"{'at least ' * bool(edge.censored)}{rate_text(edge.mean)}"


def _shown(value: Number | None, write: Callable[[Number], str]) -> str:
    return MISSING if value is None else write(value)
