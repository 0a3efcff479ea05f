"""Loss against learning rate: every trial of the selection."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from normwise.report import words
from normwise.report.figures import (
    CLEAR,
    MUTED,
    PAPER,
    Figure,
    Json,
    Mark,
    axis,
    chance_line,
    hover,
    layout,
    legend_entry,
    log_axis,
    margin,
    marks,
    padded,
    short,
)
from normwise.report.tables import Table, table
from normwise.tuning.records import NormSummary, Record, Summary

_HEIGHT = 400  # of the main panel, in pixels
_ROW = 17  # of a row of the strip above it
_STRIP_NOTE = {
    "text": f"{words.TIMES} diverged",
    "xref": "paper",
    "yref": "paper",
    "x": 0,
    "y": 1,
    "xanchor": "left",
    "yanchor": "bottom",
    "showarrow": False,
    "font": {"size": 11, "color": MUTED},
}
_BESIDE = 0.08  # octaves between the seeds of one rate in the strip, where their height cannot tell them apart


@dataclass(frozen=True)
class Measure:
    """What is drawn over the learning rate."""

    field: str  # of a Record
    name: str
    unit: str

    def of(self, record: Record) -> float | None:
        """The record's number; None if it diverged or has none."""
        return None if record.outcome == "diverged" else getattr(record, self.field)

    @property
    def axis(self) -> str:
        """The axis title, with the unit if there is one."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True)
class Frame:
    """The main panel's ends. Numbers above `top` are drawn on it."""

    bottom: float
    top: float
    log: bool

    def inside(self, value: float) -> float:
        """Where a value is drawn."""
        return min(value, self.top)


def figure(summary: Summary) -> Figure | None:
    """Every selection trial by learning rate, or None if there are none."""
    records = [record for norm in summary.norms for record in norm.selection]
    if not records:
        return None
    measure = choose(summary)
    frame = _frame(records, measure, summary.chance)
    strip = [norm for norm in summary.norms if any(measure.of(record) is None for record in norm.selection)]
    looks = marks(summary.norms)
    traces = [trace for norm in summary.norms for trace in _traces(norm, looks[norm.label], measure, frame)]
    traces += [_outcomes(norm, looks[norm.label], row, measure) for row, norm in enumerate(strip)]
    return Figure(
        name="rates",
        title=f"{measure.name} against learning rate",
        finding=_finding(summary, measure),
        reading=_reading(measure, bool(strip), above=any(frame.top < (measure.of(record) or 0) for record in records)),
        table=_table(summary, measure),
        traces=traces,
        layout=_layout(summary, records, measure, frame, strip),
    )


def choose(summary: Summary) -> Measure:
    """Validation loss; from a user's own loop training loss, or the score itself where that reports no losses."""
    records = [record for norm in summary.norms for record in norm.selection]
    unit = words.loss_unit(summary.settings)
    if not summary.settings.own_loop or any(record.val_loss is not None for record in records):
        return Measure("val_loss", "Validation loss", unit)
    if any(record.tail_loss is not None for record in records):
        return Measure("tail_loss", "Training loss", unit)
    return Measure("score", words.metric_name(summary.settings), summary.settings.unit)


def by_rate(records: Iterable[Record]) -> dict[float, list[Record]]:
    """The records of each learning rate, in rising order."""
    groups = defaultdict(list)
    for record in records:
        groups[record.request.lr].append(record)
    return {lr: groups[lr] for lr in sorted(groups)}


def middle(records: list[Record], measure: Measure) -> float | None:
    """The seeds' median, a diverged seed counting as infinite; None where that is infinite.

    A score that has no number counts the same way, so that the line breaks where half of the seeds fail.
    """
    values = [measure.of(record) for record in records]
    found = median(math.inf if value is None else value for value in values)
    return found if math.isfinite(found) else None


def _frame(records: list[Record], measure: Measure, chance: float | None) -> Frame:
    values = [value for record in records if (value := measure.of(record)) is not None]
    if measure.field == "score":
        low, high = padded(values or [0.0, 1.0])
        return Frame(low, high, log=False)
    ceiling = 2 * chance if chance else max(values, default=1.0)
    low, high = min([*values, ceiling / 4]), max(min(max(values, default=ceiling), ceiling), ceiling / 2)
    if low > 0:
        return Frame(low * 0.85, high * 1.15, log=True)
    low, high = padded([low, high])
    return Frame(low, high, log=False)


def _traces(norm: NormSummary, mark: Mark, measure: Measure, frame: Frame) -> list[Json]:
    """The median line, the best rate on it, and every seed, switched on and off together."""
    medians = {lr: middle(records, measure) for lr, records in by_rate(norm.selection).items()}
    group = {"legendgroup": norm.label, "showlegend": False}
    line = {
        **group,
        "type": "scatter",
        "mode": "lines",
        "x": list(medians),
        "y": list(medians.values()),
        "line": {"color": mark.colour, "width": 2, "dash": mark.dash},
        "hoverinfo": "skip",
    }
    best = [_best(norm, mark, measure, found, frame) | group] if (found := medians.get(norm.lr_best or 0)) else []
    return [legend_entry(norm.label, mark), line, _seeds(norm, mark, measure, frame) | group, *best]


def _seeds(norm: NormSummary, mark: Mark, measure: Measure, frame: Frame) -> Json:
    shown = [(record, value) for record in norm.selection if (value := measure.of(record)) is not None]
    symbols = [_symbol(record, value, mark, frame) for record, value in shown]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [record.request.lr for record, _ in shown],
        "y": [frame.inside(value) for _, value in shown],
        "marker": {"color": mark.colour, "symbol": symbols, "size": 7, "line": {"width": 1.2, "color": mark.colour}},
        "hoverinfo": "text",
        "hovertext": [_describe(record, measure) for record, _ in shown],
    }


def _symbol(record: Record, value: float, mark: Mark, frame: Frame) -> str:
    if value > frame.top:
        return "arrow-up"
    return mark.symbol if record.outcome == "trains" else f"{mark.symbol}-open"


def _best(norm: NormSummary, mark: Mark, measure: Measure, value: float, frame: Frame) -> Json:
    text = words.with_unit(words.number(value), measure.unit)
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [norm.lr_best],
        "y": [frame.inside(value)],
        "marker": {"color": mark.colour, "symbol": mark.symbol, "size": 15, "line": {"color": PAPER, "width": 2.5}},
        "hoverinfo": "text",
        "hovertext": [hover(norm.label, f"best learning rate {words.number(norm.lr_best)}", f"median {text}")],
    }


def _outcomes(norm: NormSummary, mark: Mark, row: int, measure: Measure) -> Json:
    """A row of the strip: the trials that have no number to draw."""
    lost = [record for record in norm.selection if measure.of(record) is None]
    seeds = sorted({record.request.seed for record in norm.selection})
    middle_seed = (len(seeds) - 1) / 2
    shift = {seed: 2 ** (_BESIDE * (index - middle_seed)) for index, seed in enumerate(seeds)}
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [record.request.lr * shift[record.request.seed] for record in lost],
        "y": [-row] * len(lost),
        "yaxis": "y2",
        "marker": {
            "color": mark.colour,
            "symbol": ["x" if record.outcome == "diverged" else f"{mark.symbol}-open" for record in lost],
            "size": 7,
        },
        "hoverinfo": "text",
        "hovertext": [_describe(record, measure) for record in lost],
        "legendgroup": norm.label,
        "showlegend": False,
    }


def _describe(record: Record, measure: Measure) -> str:
    request, value = record.request, measure.of(record)
    shown = words.with_unit(words.number(value, 4), measure.unit)
    return hover(
        request.norm,
        f"learning rate {words.number(request.lr)}, seed {request.seed}",
        record.outcome if value is None else f"{measure.name.lower()} {shown}, {record.outcome}",
        "" if record.weight_norm is None else f"‖W‖ {words.number(record.weight_norm)}",
    )


def _layout(summary: Summary, records: list[Record], measure: Measure, frame: Frame, strip: list[NormSummary]) -> Json:
    rates = [record.request.lr for record in records]
    room = _ROW * len(strip) + 14 if strip else 0
    split = _HEIGHT / (_HEIGHT + room)
    notes = chance_line(None if measure.field == "score" else summary.chance, measure.unit, frame.log)
    return layout(
        _HEIGHT + room + 50,
        xaxis=log_axis("Learning rate", min(rates) / 1.3, max(rates) * 1.3, anchor="y"),
        yaxis=(log_axis if frame.log else _linear)(measure.axis, frame.bottom, frame.top, domain=[0, split]),
        **({"yaxis2": _strip_axis(strip, split), "margin": margin(top=26)} if strip else {}),
        shapes=notes.get("shapes", []),
        annotations=notes.get("annotations", []) + ([_STRIP_NOTE] if strip else []),
    )


def _strip_axis(strip: list[NormSummary], split: float) -> Json:
    names = {"tickvals": [-row for row in range(len(strip))], "ticktext": [short(norm.label, 12) for norm in strip]}
    small = {"tickfont": {"size": 10, "color": MUTED}, "ticks": "", "linecolor": CLEAR, "showgrid": False}
    return axis("", domain=[min(split + 0.02, 1), 1], range=[0.7 - len(strip), 0.7], **names, **small)


def _linear(title: str, low: float, high: float, **parts: Any) -> Json:
    return axis(title, range=[low, high], **parts)


def _finding(summary: Summary, measure: Measure) -> str:
    found = {
        norm.label: value
        for norm in summary.norms
        if norm.lr_best is not None
        and (value := middle(by_rate(norm.selection).get(norm.lr_best, []) or [*norm.selection], measure)) is not None
    }
    if not found:
        return "No learning rate gave a finite median for any normalization."
    largest = measure.field == "score" and summary.settings.direction == "max"
    order = sorted(found, key=lambda label: found[label], reverse=largest)
    rates = {norm.label: norm.lr_best for norm in summary.norms}
    parts = [
        f"{label} {words.with_unit(words.number(found[label]), measure.unit)} at {words.number(rates[label])}"
        for label in order
    ]
    return f"Median {measure.name.lower()} at each one's best learning rate: {words.listed(parts)}."


def _reading(measure: Measure, strip: bool, above: bool) -> str:
    parts = [
        "Every point is one seed: filled if it trained, open if it is stuck.",
        "The line joins the seeds' medians.",
        "The large mark is the best learning rate, which is chosen by score, not by loss.",
    ]
    if strip:
        parts.append("A cross in the rows on top is a seed that diverged.")
    if measure.field == "score":
        parts.append("The training loop reported no losses, so the score itself is drawn.")
    if above:
        parts.append("An arrow is a finite loss above the axis.")
    return " ".join([*parts, "A click in the legend hides or shows a normalization."])


def _table(summary: Summary, measure: Measure) -> Table:
    rows = [
        _table_row(norm.label, lr, records, measure)
        for norm in summary.norms
        for lr, records in by_rate(norm.selection).items()
    ]
    return table("Normalization", "Learning rate", f"Median {measure.axis.lower()}", "Every seed", "Outcome", rows=rows)


def _table_row(label: str, lr: float, records: list[Record], measure: Measure) -> tuple[str, ...]:
    seeds = ", ".join(words.number(measure.of(record), 4) for record in records)
    outcomes = [record.outcome for record in records]
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("trains", "stuck", "diverged") if kind in outcomes)
    return label, words.number(lr), words.number(middle(records, measure), 4), seeds, counts
