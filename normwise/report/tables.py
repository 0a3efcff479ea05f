"""Tables of text: a column says its unit and what it means, a row is ready to print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from normwise.report import words
from normwise.tuning.axes import value_text, variant_text
from normwise.tuning.records import Edge, NormSummary, Settings, Summary

THRESHOLDS = ("0.9", "0.5", "0.25")
HEADLINE = "0.5"
_LEFT_TO_OWN_LOOP = ("data", "batch size", "loss", "optimizer", "schedule", "device")


@dataclass(frozen=True)
class Column:
    """A heading, its unit, and one line that explains it."""

    name: str
    unit: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """The first cell of a row is its heading."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def explained(self) -> tuple[Column, ...]:
        """The columns that need a legend."""
        return tuple(column for column in self.columns if column.meaning)


_COMBINATION = Column(
    "Setting", "", "The combination of what was varied that has the best selection score; the row is read at it."
)


def table(*columns: str, rows: Sequence[tuple[str, ...]]) -> Table:
    """A table whose headings explain themselves."""
    return Table(tuple(Column(name) for name in columns), tuple(rows))


def overview(summary: Summary) -> Table:
    """Everything that was found, one normalization a row."""
    settings = summary.settings
    return Table(_overview_columns(settings), tuple(_overview_row(norm, settings) for norm in summary.norms))


def _overview_columns(settings: Settings) -> tuple[Column, ...]:
    unit, loss = settings.unit, words.loss_unit(settings)
    better = "higher" if settings.direction == "max" else "lower"
    metric = words.metric_name(settings)
    own = "95 % interval of this normalization's own mean"
    return (
        Column("Normalization", "", "The label, and the declaration where it differs."),
        Column(metric, unit, f"Mean over the confirmation seeds; {better} is better. In brackets the {own}."),
        Column("Median", unit, f"Median {metric.lower()} of the confirmation seeds."),
        *([_COMBINATION] if settings.axes else []),
        Column("lr_best", "rate", "The learning rate with the best selection score; confirmation ran at it."),
        Column("lr_train", "rate", "The largest rate that trains, to below half of chance; the seeds' range follows."),
        Column(
            "lr_diverge", "rate", "The rate from which training ends in non-finite numbers; the seeds' range follows."
        ),
        Column("Margin", "octaves", "log₂(lr_train / lr_best): how many doublings the best rate lies below the edge."),
        Column("Sensitivity", loss, "Mean excess loss over the declared range of rates: what a wrong rate costs."),
        Column("Failures", "seeds", "Confirmation seeds that did not train; one that diverged has an imputed score."),
        Column("Time", "ms a step", "Time of one training step, measured alone after the study."),
        Column("‖W‖", "", "L2 norm of all weight matrices and kernels at the end, median over confirmation seeds."),
        Column("Trials", "runs", "Training runs that the study spent on this normalization."),
        Column("Parameters", "", "Numbers that training can change."),
    )


def _overview_row(norm: NormSummary, settings: Settings) -> tuple[str, ...]:
    interval = words.interval(norm.low, norm.high, settings.unit)
    return (
        _name(norm),
        "\n".join(filter(None, (words.score(norm.mean, settings.unit), interval))),
        words.score(norm.median, settings.unit),
        *([variant_text(norm.variant).replace(", ", "\n")] if settings.axes else []),
        words.number(norm.lr_best),
        _stacked(tolerated(norm, HEADLINE)),
        _stacked(words.edge(norm.lr_diverge, "none up to")),
        words.number(norm.margin_octaves, 2),
        words.number(norm.sensitivity),
        f"{norm.failures} of {len(norm.confirmation)}" if norm.confirmation else words.MISSING,
        words.number(norm.ms_per_step),
        words.number(norm.weight_norm),
        f"{norm.trials:,}",
        words.MISSING if norm.parameters is None else f"{norm.parameters:,}",
    )


def _name(norm: NormSummary) -> str:
    """The label, and the declaration where it says more."""
    return norm.label if norm.label == norm.declaration else f"{norm.label} ({norm.declaration})"


def tolerated(norm: NormSummary, threshold: str) -> str:
    """The largest rate that trains below a share of chance, in words."""
    return words.edge(
        norm.lr_train.get(threshold), "at least", absent="none trains" if norm.lr_train else words.MISSING
    )


def _stacked(text: str) -> str:
    """A number over its range, so that columns stay narrow."""
    return text.replace(" (", "\n(", 1).replace("; ", ";\n")


def reference(norms: tuple[NormSummary, ...]) -> NormSummary:
    """What ratios are taken to: the network without normalization, or the one that tolerates the least.

    A study always has a normalization; one without any edge comes last, so that a ratio exists if it can.
    """
    bare = [norm for norm in norms if norm.declaration == "none" and _mean(norm, HEADLINE) is not None]
    return min(bare or norms, key=lambda norm: _mean(norm, HEADLINE) or float("inf"))


def ratio(top: Edge | None, bottom: Edge | None) -> str:
    """How many times as large one edge is; a bound where one of the two was not reached.

    >>> ratio(Edge(4.0, 4.0, 4.0, seeds=3), Edge(0.32, 0.3, 0.4, seeds=3))
    '12.5×'
    >>> ratio(Edge(8.0, 8.0, 8.0, seeds=3, censored=3), Edge(0.5, 0.5, 0.5, seeds=3))
    'at least 16×'
    >>> ratio(Edge(None, None, None, seeds=3), Edge(0.5, 0.5, 0.5, seeds=3))
    '–'
    """
    if top is None or bottom is None or not top.mean or not bottom.mean or _unknown(top, bottom):
        return words.MISSING
    bound = "" if top is bottom else "at least " if top.censored else "at most " if bottom.censored else ""
    return f"{bound}{words.number(top.mean / bottom.mean)}{words.TIMES}"


def _unknown(top: Edge, bottom: Edge) -> bool:
    """Two lower bounds have no ratio, unless they are one and the same."""
    return bool(top.censored and bottom.censored) and top is not bottom


def controlled(summary: Summary) -> Summary | None:
    """The study with the edges of its control instead of its own, or None where no control was run."""
    if all(norm.control is None for norm in summary.norms):
        return None
    return replace(summary, norms=tuple(map(_frozen, summary.norms)))


def _frozen(norm: NormSummary) -> NormSummary:
    """Its edges with gamma, beta and the output layer frozen; the control chooses no rate and leaves no weights."""
    diverge = norm.control_diverge or Edge(None, None, None, seeds=0)
    return replace(
        norm, lr_train=norm.control or {}, lr_diverge=diverge, lr_best=None, margin_octaves=None, weight_norm=None
    )


def tolerance(summary: Summary) -> Table:
    """The largest rates that train, at three thresholds, as ratios to the reference, with the weights' norm beside.

    Where a control was run, its row stands under the study's, with ratios to the control of the same reference.
    """
    base = reference(summary.norms)
    columns = [Column("Normalization")]
    for threshold in THRESHOLDS:
        columns += [Column(f"Rate at {threshold}", "of chance"), Column("Ratio", f"to {base.label}")]
    rows = [_tolerance_row(norm.label, norm, base) for norm in summary.norms]
    if control := controlled(summary):
        frozen = {norm.label: norm for norm in control.norms}
        beside = [_tolerance_row("· control", norm, frozen[base.label]) for norm in control.norms]
        rows = [row for pair in zip(rows, beside, strict=True) for row in pair]
    return Table((*columns, Column("‖W‖", "at the end")), tuple(rows))


def _tolerance_row(label: str, norm: NormSummary, base: NormSummary) -> tuple[str, ...]:
    cells = [label]
    for threshold in THRESHOLDS:
        top, bottom = norm.lr_train.get(threshold), base.lr_train.get(threshold)
        cells += [_stacked(tolerated(norm, threshold)), ratio(top, bottom)]
    return (*cells, words.number(norm.weight_norm))


def _mean(norm: NormSummary, threshold: str) -> float | None:
    edge = norm.lr_train.get(threshold)
    return None if edge is None else edge.mean


def settings_rows(settings: Settings) -> Table:
    """The settings of the study. Those that a user's own loop decides are left out."""
    lrs = "a grid that widens by itself" if settings.lrs is None else ", ".join(map(words.number, settings.lrs))
    aim = "higher is better" if settings.direction == "max" else "lower is better"
    margin = words.with_unit(words.number(settings.margin), words.difference_unit(settings))
    values = {
        "model": settings.model,
        "data": settings.data,
        "metric": f"{settings.metric}, {aim}",
        "margin": f"{margin}; equivalent means within twice the margin",
        "learning rates": lrs,
        "seeds": f"{settings.seeds} for selection, {settings.confirm} for confirmation",
        "base seed": str(settings.base_seed),
        "steps": "as the training loop decides" if settings.steps is None else f"{settings.steps:,}",
        "batch size": str(settings.batch_size),
        "loss": settings.loss,
        "optimizer": settings.optimizer,
        "schedule": settings.schedule,
        "device": settings.device,
        **_chosen(settings),
    }
    values |= {
        name.replace("_", " "): f"{', '.join(map(value_text, own))} (each at its best)" for name, own in settings.axes
    }
    shown = {key: value for key, value in values.items() if not (settings.own_loop and key in _LEFT_TO_OWN_LOOP)}
    return table("Setting", "Value", rows=[(key.capitalize(), value) for key, value in shown.items()])


def _chosen(settings: Settings) -> dict[str, str]:
    """What is told only where it was chosen."""
    drawn = f"{settings.sampler}, {words.plural(settings.trials or 0, 'point')} a normalization"
    values = {
        "start": settings.start,
        "placement": settings.placement,
        "weight decay": None if settings.weight_decay is None else value_text(settings.weight_decay),
        "epochs": None if settings.epochs is None else str(settings.epochs),
        "sampler": None if settings.sampler == "grid" else drawn,
        "pruning": "successive halving within a normalization" if settings.prune else None,
        "control": "gamma, beta and the output layer frozen" if settings.control else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def declarations(summary: Summary) -> Table:
    """What each label stands for."""
    rows = [(norm.label, norm.declaration, norm.described) for norm in summary.norms]
    return table("Normalization", "Declared as", "Is the layer", rows=rows)
