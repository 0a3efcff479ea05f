"""Training loss and norm of the weights over the steps, at each normalization's own best learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from normwise.report import words
from normwise.report.figures import Figure, Json, Mark, axis, chance_line, layout, legend_entry, log_axis, marks, plain
from normwise.report.tables import Table, table
from normwise.tuning.records import NormSummary, Record, Summary

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Course:
    """A quantity that is followed over the steps."""

    name: str  # of the figure
    title: str
    quantity: str  # as axes and hover texts call it
    unit: str
    of: Callable[[Record], Curve]


def losses(summary: Summary) -> Figure | None:
    """Every confirmation seed's loss curve and their median, or None where no losses were reported."""
    course = Course(
        name="curves",
        title="Loss curves at the best learning rates",
        quantity="training loss",
        unit=words.loss_unit(summary.settings),
        of=lambda record: record.curve,
    )
    return _figure(summary, course, summary.chance)


def weights(summary: Summary) -> Figure | None:
    """Every confirmation seed's norm of the weights and their median, or None where it was not followed."""
    course = Course(
        name="weights",
        title="‖W‖ over training",
        quantity="‖W‖",
        unit="",
        of=lambda record: record.weights,
    )
    return _figure(summary, course, None)


def _figure(summary: Summary, course: Course, chance: float | None) -> Figure | None:
    curves = [course.of(record) for norm in summary.norms for record in norm.confirmation if course.of(record)]
    if not curves:
        return None
    looks = marks(summary.norms)
    medians = {norm.label: median_curve(norm.confirmation, course.of) for norm in summary.norms}
    traces = [t for norm in summary.norms for t in _traces(norm, looks[norm.label], medians[norm.label], course)]
    return Figure(
        name=course.name,
        title=course.title,
        finding=_finding(medians, course),
        reading="Thin lines are the confirmation seeds, each at its normalization's own best learning rate; the bold "
        "line is their median. A thin line that ends early has diverged.",
        table=_table(summary, medians),
        traces=traces,
        layout=_layout(curves, course, chance),
    )


def median_curve(records: tuple[Record, ...], of: Callable[[Record], Curve]) -> dict[int, float]:
    """The seeds' median by step, as far as it is finite: a seed that diverged counts as infinite once it ends."""
    curves = [(dict(of(record)), record.outcome == "diverged") for record in records if of(record)]
    steps = sorted({step for curve, _ in curves for step in curve})
    found = {step: _median_at(step, curves) for step in steps}
    return {step: value for step, value in found.items() if math.isfinite(value)}


def _median_at(step: int, curves: list[tuple[dict[int, float], bool]]) -> float:
    here = [curve[step] for curve, _ in curves if step in curve]
    return median(here + [math.inf for curve, diverged in curves if diverged and step > max(curve)])


def _traces(norm: NormSummary, mark: Mark, middle: dict[int, float], course: Course) -> list[Json]:
    entry = legend_entry(norm.label, mark)
    thin = [_thin(norm, record, mark, course) for record in norm.confirmation if course.of(record)]
    bold = {
        **_line(norm.label, tuple(middle.items()), f"{norm.label}, median", course),
        "mode": "lines+markers",
        "line": {"color": mark.colour, "width": 3, "dash": mark.dash},
        "marker": {"color": mark.colour, "symbol": mark.symbol, "size": 9, "maxdisplayed": 8},
    }
    return [entry, *thin, bold] if thin else [entry]


def _thin(norm: NormSummary, record: Record, mark: Mark, course: Course) -> Json:
    name = f"{norm.label}, seed {record.request.seed}"
    return {
        **_line(norm.label, course.of(record), name, course),
        "mode": "lines",
        "line": {"color": mark.colour, "width": 1},
        "opacity": 0.35,
    }


def _line(label: str, curve: Curve, name: str, course: Course) -> Json:
    return {
        "type": "scatter",
        "x": [step for step, _ in curve],
        "y": [float(f"{value:.4g}") for _, value in curve],
        "legendgroup": label,
        "showlegend": False,
        # Names and units come from users: as data they are never read as a template.
        "meta": [plain(name), plain(course.quantity), plain(course.unit)],
        "hovertemplate": "%{meta[0]}<br>step %{x}<br>%{meta[1]} %{y:.3g} %{meta[2]}<extra></extra>",
    }


def _layout(curves: list[Curve], course: Course, chance: float | None) -> Json:
    values = [value for curve in curves for _, value in curve]
    low, high = min(values), max(values)
    # A spike that recovers may be a million times higher than everything that matters.
    high = min(high, 2 * chance) if chance else high
    log = low > 0 and high > 10 * low
    title = course.quantity[0].upper() + course.quantity[1:] + (f" ({course.unit})" if course.unit else "")
    vertical = log_axis(title, low * 0.85, max(high, low) * 1.15) if log else axis(title)
    return layout(
        440,
        xaxis=axis("Step", rangemode="tozero"),
        yaxis=vertical,
        **chance_line(chance, course.unit, log),
    )


def _finding(medians: dict[str, dict[int, float]], course: Course) -> str:
    ends = {label: curve[max(curve)] for label, curve in medians.items() if curve}
    if not ends:
        return "More than half of the seeds diverged, for every normalization: there is no finite median."
    order = sorted(ends, key=lambda label: ends[label])
    parts = [f"{label} {words.with_unit(words.number(ends[label]), course.unit)}" for label in order]
    return f"Median {course.quantity} at the end: {words.listed(parts)}."


def _table(summary: Summary, medians: dict[str, dict[int, float]]) -> Table:
    """The medians at five points along the way: a table is for reading, the curves are in summary.json."""
    steps = sorted({step for curve in medians.values() for step in curve})
    chosen = sorted({steps[round(share * (len(steps) - 1))] for share in (0, 0.1, 0.25, 0.5, 1)}) if steps else []
    rows = [
        (norm.label, words.number(norm.lr_best), *(words.number(medians[norm.label].get(step)) for step in chosen))
        for norm in summary.norms
    ]
    return table("Normalization", "Learning rate", *(f"Median at step {step}" for step in chosen), rows=rows)
