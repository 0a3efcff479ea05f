"""A finished study, condensed into what the report is drawn from, with its warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

from normwise.tuning.axes import option, value_text, variant_text, variants
from normwise.tuning.caveats import HEADLINE, caveats, fractions, ignores_steps, wording
from normwise.tuning.condense import CONFIDENCE, Layer, condense, of_phase
from normwise.tuning.judge import judge
from normwise.tuning.norms import NormChoice
from normwise.tuning.rates import declared_rates
from normwise.tuning.records import (
    Comparison,
    Edge,
    Horizon,
    Measures,
    NormSummary,
    Record,
    Settings,
    Summary,
    Variant,
    VariantSummary,
    Verdict,
)
from normwise.tuning.search import best_choices, confirmation_scores, imputed_score
from normwise.tuning.sentence import Wording, rate_text

MISSING = "-"
Number = TypeVar("Number", int, float)
Item = TypeVar("Item")
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
    best = best_choices(settings, records)
    norms = tuple(
        condense(settings, records, layer, best.get(label), scores.get(label, ()), chance)
        for label, layer in layers.items()
    )
    verdict = _withheld(_judged(settings, norms), tuple(fractions(settings, norms)))
    repeated = ignores_steps(settings, norms)
    horizon = None if repeated else _horizon(settings, records, verdict, scores, chance)
    rates = [lr for variant in variants(settings) for lr in declared_rates(settings.at(variant))]
    return Summary(
        settings=settings,
        facts=dict(facts),
        chance=chance,
        lr_range=(min(rates), max(rates)),
        norms=norms,
        verdict=verdict,
        horizon=horizon,
        warnings=tuple(caveats(settings, norms, verdict, horizon, imputed_score(settings, records, chance))),
        reproduce=dict(reproduce),
        seconds=seconds,
        trials=len(records),
    )


def rows(summary: Summary) -> list[tuple[str, ...]]:
    """The results as a table of text, the heading first, then one row a normalization.

    Each axis is a column, after the best learning rate, with the value that goes with it.
    """
    axes = [name for name, _ in summary.settings.axes]
    header, *body = [HEADER, *(_row(norm, wording(summary.settings)) for norm in summary.norms)]
    at = HEADER.index("lr_best") + 1
    best = [dict(norm.variant) for norm in summary.norms]
    named = [tuple(map(option, axes)), *(tuple(value_text(own[name]) for name in axes) for own in best)]
    return [(*row[:at], *own, *row[at:]) for row, own in zip([header, *body], named, strict=True)]


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
            "lr_train": _edges(data["lr_train"]),
            "lr_diverge": Edge(**data["lr_diverge"]),
            "scores": tuple(data["scores"]),
            "variant": _variant(data["variant"]),
            "variants": tuple(_variant_from_dict(own) for own in data["variants"]),
            "control": _optional(_edges, data["control"]),
            "control_diverge": _optional(_edge, data["control_diverge"]),
            "measures": _optional(Measures.from_dict, data["measures"]),
        }
    )


def _variant_from_dict(data: dict[str, Any]) -> VariantSummary:
    variant, lr_train = _variant(data["variant"]), _optional(_edge, data["lr_train"])
    return VariantSummary(**{**data, "variant": variant, "lr_train": lr_train})


def _variant(pairs: Iterable[Sequence[Any]]) -> Variant:
    return tuple((name, value) for name, value in pairs)


def _edge(data: dict[str, Any]) -> Edge:
    return Edge(**data)


def _edges(data: dict[str, dict[str, Any]]) -> dict[str, Edge]:
    return {share: _edge(edge) for share, edge in data.items()}


def _optional(read: Callable[[Any], Item], data: Any) -> Item | None:
    return None if data is None else read(data)


def _verdict_from_dict(data: dict[str, Any]) -> Verdict:
    return Verdict(**{**data, "comparisons": tuple(Comparison(**pair) for pair in data["comparisons"])})


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
        combinations={norm.label: variant_text(norm.variant) for norm in norms},
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
    if verdict.runner_up is None or worst is None:
        return None
    pair = (verdict.winner, verdict.runner_up)
    rerun = {label: of_phase(records, label, "horizon") for label in pair}
    if not all(rerun.values()):
        return None
    steps, others = (_steps(rerun[label][0]) // 2 for label in pair)
    doubled = {label: [worst if r.score is None else r.score for r in rerun[label]] for label in pair}
    again = judge(doubled, direction=settings.direction, margin=0.0, confidence=CONFIDENCE)
    return Horizon(
        *pair,
        steps=steps,
        lead=sign * (fmean(scores[pair[0]]) - fmean(scores[pair[1]])),
        lead_doubled=sign * (fmean(doubled[pair[0]]) - fmean(doubled[pair[1]])),
        reversed=again.winner == verdict.runner_up and again.kind == "better",
        runner_up_steps=None if others == steps else others,
    )


def _steps(record: Record) -> int:
    return record.request.steps or 0


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
