"""The loss along the gradient, by step of the training, at each normalization's own best learning rate."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import median

from normwise.report import words
from normwise.report.figures import Figure, Json, Mark, hover, marks
from normwise.report.panels import Panel, Point, stacked, steps_axis
from normwise.report.tables import table
from normwise.tuning.records import NormSummary, SmoothnessPoint, Summary


def along_gradient(summary: Summary) -> Figure | None:
    """Range of the loss, change of the gradient and beta by step, with ‖W‖ under them; None if not measured."""
    known = [norm for norm in summary.norms if any(map(_measured, _steps(norm)))]
    if not known:
        return None
    unit = words.loss_unit(summary.settings)
    panels = [
        _ranges(summary, known),
        _over_steps("Gradient predictiveness: the largest ‖Δg‖", known, lambda point: point.predictiveness),
        _over_steps("Effective β: the largest ‖Δg‖ / distance", known, lambda point: point.beta),
        _over_steps("‖W‖", known, lambda point: point.weight_norm),
    ]
    traces, layout = stacked(summary.norms, [panel for panel in panels if panel.values], steps_axis())
    return Figure(
        name="gradient",
        title="The loss along the gradient",
        finding=_gradient_finding(known, unit),
        reading="Before a step of training, with the same batch and in training mode, the weights are moved along the "
        "negative gradient by several step sizes. Bars: the range of the loss on the way; an arrow goes on above the "
        "plot. ‖Δg‖: how far the gradient there is from the one before. After a normalization all of them shrink as "
        "‖W‖ grows, so ‖W‖ stands under them.",
        table=table(
            "Normalization",
            "Step",
            f"Loss ({unit})" if unit else "Loss",
            "‖Δg‖",
            "β",
            "‖W‖",
            rows=[_gradient_row(norm, point) for norm in known for point in _steps(norm)],
        ),
        traces=traces,
        layout=layout,
    )


def _steps(norm: NormSummary) -> tuple[SmoothnessPoint, ...]:
    return norm.measures.smoothness if norm.measures else ()


def _measured(point: SmoothnessPoint) -> bool:
    return any(value is not None for value in (point.loss_low, point.predictiveness, point.beta, point.weight_norm))


def _over_steps(title: str, norms: list[NormSummary], of: Callable[[SmoothnessPoint], float | None]) -> Panel:
    name = title.split(":")[0]
    lines = {
        norm.label: [Point(point.step, of(point), _describe(norm, point, name, of(point))) for point in _steps(norm)]
        for norm in norms
    }
    return Panel(title, lines)


def _describe(norm: NormSummary, point: SmoothnessPoint, name: str, value: float | None) -> str:
    beside = "" if name == "‖W‖" else f"‖W‖ {words.number(point.weight_norm)}"
    return hover(norm.label, f"step {point.step}", f"{name} {words.number(value)}", beside)


def _ranges(summary: Summary, norms: list[NormSummary]) -> Panel:
    """The range of the loss at each step, side by side: tints over one another could not be told apart."""
    top = _top(summary, norms)
    looks, unit = marks(summary.norms), words.loss_unit(summary.settings)
    apart = _spacing(norms) * 0.6 / len(norms)
    more = [
        _bars(norm, looks[norm.label], (row - (len(norms) - 1) / 2) * apart, top, unit)
        for row, norm in enumerate(norms)
        if _known(norm)
    ]
    ends = [end for norm in norms for point in _known(norm) for end in (point.loss_low or 0.0, _shown(point, top))]
    return Panel(f"Range of the loss ({unit})" if unit else "Range of the loss", {}, more, also=ends)


def _known(norm: NormSummary) -> list[SmoothnessPoint]:
    return [point for point in _steps(norm) if point.loss_low is not None]


def _top(summary: Summary, norms: list[NormSummary]) -> float:
    """Where the plot ends: far above chance, all losses are alike."""
    points = [point for norm in norms for point in _known(norm)]
    highest = max((p.loss_high for p in points if p.loss_high is not None), default=None)
    lowest = max((p.loss_low for p in points if p.loss_low is not None), default=0.0)
    if highest is None:
        return summary.chance or 2 * lowest or 1.0
    return max(min(highest, 2 * summary.chance), lowest) if summary.chance else highest


def _shown(point: SmoothnessPoint, top: float) -> float:
    """Where the upper end of a range is drawn."""
    return top if point.loss_high is None else min(point.loss_high, top)


def _spacing(norms: list[NormSummary]) -> float:
    """Between two steps that were looked at."""
    steps = sorted({point.step for norm in norms for point in _steps(norm)})
    return min((right - left for left, right in pairwise(steps)), default=1)


def _bars(norm: NormSummary, mark: Mark, shift: float, top: float, unit: str) -> Json:
    """One bar a step, with the mark at its upper end; an arrow where it goes on above the plot."""
    points = _known(norm)
    texts = [hover(norm.label, f"step {point.step}", _range_text(point, unit)) for point in points]
    beyond = [point.loss_high is None or point.loss_high > top for point in points]
    symbols = ["arrow-up" if above else mark.symbol for above in beyond]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [point.step + shift for point in points for _ in range(3)],
        "y": [end for point in points for end in (point.loss_low, _shown(point, top), None)],
        "line": {"color": mark.colour, "width": 4},
        "marker": {"color": mark.colour, "symbol": [s for own in symbols for s in ("line-ew", own, own)], "size": 8},
        "hoverinfo": "text",
        "hovertext": [text for text in texts for _ in range(3)],
        "legendgroup": norm.label,
        "showlegend": False,
        "cliponaxis": False,
    }


def _range_text(point: SmoothnessPoint, unit: str) -> str:
    high = "infinite" if point.loss_high is None else words.with_unit(words.number(point.loss_high), unit)
    return f"loss {words.number(point.loss_low)} to {high}"


def _gradient_finding(norms: list[NormSummary], unit: str) -> str:
    """Medians over the steps, ‖W‖ beside every beta."""
    ranges = {norm.label: _median(_widths(norm)) for norm in norms}
    betas = {norm.label: _median([p.beta for p in _steps(norm) if p.beta is not None]) for norm in norms}
    sizes = {norm.label: _median([p.weight_norm for p in _steps(norm) if p.weight_norm is not None]) for norm in norms}
    parts = []
    if known := {label: value for label, value in ranges.items() if value is not None}:
        order = sorted(known, key=lambda label: known[label])
        listed = words.listed([f"{label} {words.with_unit(words.number(known[label]), unit)}" for label in order])
        parts.append(f"the loss ranges over {listed}")
    if known := {label: value for label, value in betas.items() if value is not None}:
        order = sorted(known, key=lambda label: known[label])
        listed = words.listed(
            [f"{label} {words.number(known[label])} (‖W‖ {words.number(sizes[label])})" for label in order]
        )
        parts.append(f"β is {listed}")
    return f"Medians over the steps: {'; '.join(parts)}." if parts else "No step left a finite number."


def _widths(norm: NormSummary) -> list[float]:
    """How far the loss ranges at each step, where that is finite."""
    return [p.loss_high - p.loss_low for p in _steps(norm) if p.loss_high is not None and p.loss_low is not None]


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _gradient_row(norm: NormSummary, point: SmoothnessPoint) -> tuple[str, ...]:
    loss = words.MISSING if point.loss_low is None else _range_text(point, "").removeprefix("loss ")
    numbers = map(words.number, (point.predictiveness, point.beta, point.weight_norm))
    return (norm.label, f"{point.step:,}", loss, *numbers)
