"""Training loss over the steps, at each normalization's own best learning rate."""

from __future__ import annotations

import math
from statistics import median

from normwise.report import words
from normwise.report.figures import Figure, Json, Mark, axis, chance_line, layout, legend_entry, log_axis, marks, plain
from normwise.report.tables import Table, table
from normwise.tuning.records import NormSummary, Record, Summary


def figure(summary: Summary) -> Figure | None:
    """Every confirmation seed's loss curve and their median, or None where no losses were reported."""
    curves = [record.curve for norm in summary.norms for record in norm.confirmation if record.curve]
    if not curves:
        return None
    unit = words.loss_unit(summary.settings)
    looks = marks(summary.norms)
    medians = {norm.label: median_curve(norm.confirmation) for norm in summary.norms}
    traces = [trace for norm in summary.norms for trace in _traces(norm, looks[norm.label], medians[norm.label], unit)]
    return Figure(
        name="curves",
        title="Loss curves at the best learning rates",
        finding=_finding(medians, unit),
        reading="Thin lines are the confirmation seeds, each at its normalization's own best learning rate; the bold "
        "line is their median. A thin line that ends early has diverged.",
        table=_table(summary, medians),
        traces=traces,
        layout=_layout(summary, curves, unit),
    )


def median_curve(records: tuple[Record, ...]) -> dict[int, float]:
    """The seeds' median loss by step, as far as it is finite: a seed that diverged counts as infinite once it ends."""
    curves = [(dict(record.curve), record.outcome == "diverged") for record in records if record.curve]
    steps = sorted({step for curve, _ in curves for step in curve})
    found = {step: _median_at(step, curves) for step in steps}
    return {step: value for step, value in found.items() if math.isfinite(value)}


def _median_at(step: int, curves: list[tuple[dict[int, float], bool]]) -> float:
    here = [curve[step] for curve, _ in curves if step in curve]
    return median(here + [math.inf for curve, diverged in curves if diverged and step > max(curve)])


def _traces(norm: NormSummary, mark: Mark, middle: dict[int, float], unit: str) -> list[Json]:
    entry = legend_entry(norm.label, mark)
    thin = [_thin(norm, record, mark, unit) for record in norm.confirmation if record.curve]
    bold = {
        **_line(norm.label, list(middle), list(middle.values()), mark, f"{norm.label}, median", unit),
        "mode": "lines+markers",
        "line": {"color": mark.colour, "width": 3, "dash": mark.dash},
        "marker": {"color": mark.colour, "symbol": mark.symbol, "size": 9, "maxdisplayed": 8},
    }
    return [entry, *thin, bold] if thin else [entry]


def _thin(norm: NormSummary, record: Record, mark: Mark, unit: str) -> Json:
    steps, losses = zip(*record.curve, strict=True)
    name = f"{norm.label}, seed {record.request.seed}"
    return {
        **_line(norm.label, list(steps), list(losses), mark, name, unit),
        "mode": "lines",
        "line": {"color": mark.colour, "width": 1},
        "opacity": 0.35,
    }


def _line(label: str, steps: list[int], losses: list[float], mark: Mark, name: str, unit: str) -> Json:
    return {
        "type": "scatter",
        "x": steps,
        "y": [float(f"{loss:.4g}") for loss in losses],
        "legendgroup": label,
        "showlegend": False,
        # Names and units come from users: as data they are never read as a template.
        "meta": [plain(name), plain(unit)],
        "hovertemplate": "%{meta[0]}<br>step %{x}<br>training loss %{y:.3g} %{meta[1]}<extra></extra>",
    }


def _layout(summary: Summary, curves: list[tuple[tuple[int, float], ...]], unit: str) -> Json:
    losses = [loss for curve in curves for _, loss in curve]
    low, high = min(losses), max(losses)
    # A spike that recovers may be a million times higher than everything that matters.
    high = min(high, 2 * summary.chance) if summary.chance else high
    log = low > 0
    title = f"Training loss ({unit})" if unit else "Training loss"
    vertical = log_axis(title, low * 0.85, max(high, low) * 1.15) if log else axis(title)
    return layout(
        440,
        xaxis=axis("Step", rangemode="tozero"),
        yaxis=vertical,
        **chance_line(summary.chance, unit, log),
    )


def _finding(medians: dict[str, dict[int, float]], unit: str) -> str:
    ends = {label: curve[max(curve)] for label, curve in medians.items() if curve}
    if not ends:
        return "More than half of the seeds diverged, for every normalization: there is no finite median."
    order = sorted(ends, key=lambda label: ends[label])
    parts = [f"{label} {words.with_unit(words.number(ends[label]), unit)}" for label in order]
    return f"Median training loss at the end: {words.listed(parts)}."


def _table(summary: Summary, medians: dict[str, dict[int, float]]) -> Table:
    """The medians at five points along the way: a table is for reading, the curves are in summary.json."""
    steps = sorted({step for curve in medians.values() for step in curve})
    chosen = sorted({steps[round(share * (len(steps) - 1))] for share in (0, 0.1, 0.25, 0.5, 1)}) if steps else []
    rows = [
        (norm.label, words.number(norm.lr_best), *(words.number(medians[norm.label].get(step)) for step in chosen))
        for norm in summary.norms
    ]
    return table("Normalization", "Learning rate", *(f"Median at step {step}" for step in chosen), rows=rows)
