"""One normalization's trials, condensed: its best choice, its edges, its scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import NamedTuple

from scipy.special import stdtrit

from normwise.tuning.axes import variants
from normwise.tuning.caveats import HEADLINE
from normwise.tuning.outcomes import Trials, diverge_edge, sensitivity, standing, train_edges
from normwise.tuning.rates import declared_rates
from normwise.tuning.records import Edge, NormSummary, Phase, Record, Settings, Variant, VariantSummary
from normwise.tuning.search import Choice, reference_loss, selection

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Layer:
    """What is known of a normalization besides its trials."""

    label: str
    declaration: str
    described: str
    parameters: int | None
    ms_per_step: float | None


def condense(
    settings: Settings,
    records: Sequence[Record],
    layer: Layer,
    choice: Choice | None,
    scores: tuple[float, ...],
    chance: float | None,
) -> NormSummary:
    """One normalization: at its best choice, None where every selection trial diverged, and with its scores."""
    label = layer.label
    variant, lr_best = choice or (variants(settings)[0], None)
    trials = selection(settings, records, label, variant)
    confirmation = of_phase(records, label, "confirm")
    edges = _edges_of(settings, records, trials, chance)
    control = _edges_of(settings, records, selection(settings, records, label, variant, phase="control"), chance)
    low, high = _within_percent(settings, mean_interval(scores))
    weights = [r.weight_norm for r in confirmation if r.weight_norm is not None]
    grid = settings.sampler == "grid"
    return NormSummary(
        label=label,
        declaration=layer.declaration,
        described=layer.described,
        lr_best=lr_best,
        lr_train=edges.train,
        lr_diverge=edges.diverge,
        margin_octaves=_octaves(edges.train.get(HEADLINE), lr_best),
        sensitivity=sensitivity(trials, declared_rates(settings.at(variant))) if grid and choice else None,
        selection=_sorted(record for rows in trials.values() for record in rows),
        confirmation=confirmation,
        horizon=of_phase(records, label, "horizon"),
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
        variant=variant,
        variants=_variants(settings, records, label, chance),
        control=control.train if settings.control else None,
        control_diverge=control.diverge if settings.control else None,
    )


def _variants(
    settings: Settings, records: Sequence[Record], label: str, chance: float | None
) -> tuple[VariantSummary, ...]:
    """What each combination of the axes' values came to; nothing where there is but one."""
    if not settings.axes:
        return ()
    return tuple(_one_variant(settings, records, label, variant, chance) for variant in variants(settings))


def _one_variant(
    settings: Settings, records: Sequence[Record], label: str, variant: Variant, chance: float | None
) -> VariantSummary:
    trials = selection(settings, records, label, variant)
    lr_best = _best_lr(settings, trials)
    rows = () if lr_best is None else trials[lr_best]
    scores = [r.score for r in rows if r.score is not None]
    edge = _edges_of(settings, records, trials, chance).train.get(HEADLINE)
    failed = len(rows) - len(scores)
    return VariantSummary(variant, lr_best, fmean(scores) if scores else None, edge, failed)


def _best_lr(settings: Settings, trials: Trials) -> float | None:
    """The best rate; of points that a sampler drew, the best one by itself."""
    groups = [trials] if settings.sampler == "grid" else [{lr: rows} for lr, rows in trials.items()]
    found = [stands for group in groups if (stands := standing(group, settings.direction)) is not None]
    return max(found, key=lambda stands: stands[:-1]).lr if found else None


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


def of_phase(records: Sequence[Record], label: str, phase: Phase) -> tuple[Record, ...]:
    """A normalization's records of a phase, by rate and seed."""
    return _sorted(r for r in records if r.request.norm == label and r.request.phase == phase)


def _sorted(records: Iterable[Record]) -> tuple[Record, ...]:
    return tuple(sorted(records, key=lambda r: (r.request.lr, r.request.seed)))


class _Edges(NamedTuple):
    """Where training ends and divergence begins."""

    train: dict[str, Edge]
    diverge: Edge


def _edges_of(settings: Settings, records: Sequence[Record], trials: Trials, chance: float | None) -> _Edges:
    """The edges of a grid. Rates that a sampler drew enclose none, and without logged losses nothing can be told."""
    reference = reference_loss(settings, records, chance)
    if settings.sampler != "grid" or not trials:
        return _Edges({}, Edge(None, None, None, seeds=0))
    train = {} if reference is None else train_edges(trials, reference, own_loop=settings.own_loop)
    return _Edges(train, diverge_edge(trials))


def _octaves(edge: Edge | None, lr_best: float | None) -> float | None:
    return None if edge is None or edge.mean is None or lr_best is None else math.log2(edge.mean / lr_best)
