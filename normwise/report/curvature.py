"""The curvature by step of the training, against what the learning rate bears."""

from __future__ import annotations

from collections.abc import Iterator

from normwise.report import words
from normwise.report.figures import MUTED, Figure, Json, Mark, hover, marks
from normwise.report.panels import Panel, Point, stacked, steps_axis
from normwise.report.tables import table
from normwise.tuning.records import NormSummary, SharpnessPoint, Summary


def sharpness(summary: Summary) -> Figure | None:
    """The Hessian's largest eigenvalue by step, and as a share of what the learning rate bears; None if unknown."""
    known = [norm for norm in summary.norms if any(point.largest is not None for point in _curvatures(norm))]
    if not known:
        return None
    panels = [_eigenvalues(summary, known), _shares(known)]
    traces, layout = stacked(summary.norms, [panel for panel in panels if panel.values], steps_axis())
    bounded = any(_share(point) is not None for norm in known for point in _curvatures(norm))
    return Figure(
        name="sharpness",
        title="Sharpness against the stability threshold",
        finding=_sharpness_finding(known),
        reading=_sharpness_reading(bounded),
        table=table(
            "Normalization",
            "Step",
            "Largest λ",
            "Smallest λ",
            "gᵀHg / gᵀg",
            "Threshold",
            "Largest λ / threshold",
            "‖W‖",
            rows=[_sharpness_row(norm, point) for norm in known for point in _curvatures(norm)],
        ),
        traces=traces,
        layout=layout,
    )


def _curvatures(norm: NormSummary) -> tuple[SharpnessPoint, ...]:
    return norm.measures.sharpness if norm.measures else ()


def _share(point: SharpnessPoint) -> float | None:
    """The largest eigenvalue as a share of the threshold."""
    return None if point.largest is None or not point.threshold else point.largest / point.threshold


def _eigenvalues(summary: Summary, norms: list[NormSummary]) -> Panel:
    looks = marks(summary.norms)
    lines = {norm.label: [_eigenvalue(norm, point) for point in _curvatures(norm)] for norm in norms}
    limits = [trace for norm in norms for trace in _limit(norm, looks[norm.label])]
    also = [point.threshold for norm in norms for point in _curvatures(norm) if point.threshold]
    return Panel("Largest λ of the Hessian; dotted: threshold", lines, limits, also=also)


def _eigenvalue(norm: NormSummary, point: SharpnessPoint) -> Point:
    limit = "" if point.threshold is None else f"threshold {words.number(point.threshold)}"
    size = "" if (found := _weight_norm(norm, point.step)) is None else f"‖W‖ {words.number(found)}"
    text = hover(norm.label, f"step {point.step}", f"largest λ {words.number(point.largest)}", limit, size)
    return Point(point.step, point.largest, text)


def _limit(norm: NormSummary, mark: Mark) -> Iterator[Json]:
    known = [(point.step, point.threshold) for point in _curvatures(norm) if point.threshold]
    if known:
        yield {
            "type": "scatter",
            "mode": "lines",
            "x": [step for step, _ in known],
            "y": [threshold for _, threshold in known],
            "line": {"color": mark.colour, "width": 1.5, "dash": "dot"},
            "hoverinfo": "text",
            "hovertext": [hover(norm.label, f"threshold {words.number(threshold)}") for _, threshold in known],
            "legendgroup": norm.label,
            "showlegend": False,
        }


def _shares(norms: list[NormSummary]) -> Panel:
    lines = {
        norm.label: [
            Point(p.step, share, hover(norm.label, f"step {p.step}", f"{words.number(share)} of the threshold"))
            for p in _curvatures(norm)
            if (share := _share(p)) is not None
        ]
        for norm in norms
    }
    if not any(lines.values()):
        return Panel("", {})
    last = max(point.x for line in lines.values() for point in line)
    edge = {"x": [0, last], "y": [1, 1], "mode": "lines", "line": {"color": MUTED, "width": 1, "dash": "dot"}}
    drawn = {"type": "scatter", "hoverinfo": "skip", "showlegend": False, **edge}
    return Panel("Largest λ / threshold; 1: edge of stability", lines, [drawn], also=[1.0])


def _sharpness_finding(norms: list[NormSummary]) -> str:
    ends = {norm.label: share for norm in norms if (share := _share(_curvatures(norm)[-1])) is not None}
    if ends:
        parts = [f"{label} {words.number(ends[label])}" for label in sorted(ends, key=lambda label: ends[label])]
        return f"Largest eigenvalue as a share of the threshold when last measured: {words.listed(parts)}."
    parts = [f"{norm.label} {words.number(_curvatures(norm)[-1].largest)}" for norm in norms]
    return f"Largest eigenvalue when last measured: {words.listed(parts)}."


def _sharpness_reading(bounded: bool) -> str:
    common = (
        "Curvature of training mode: that of evaluation mode is another one. After a normalization it shrinks as "
        "1/‖W‖², which the table has beside it."
    )
    if not bounded:
        return f"{common} This optimizer has no threshold of the kind 2/lr."
    return (
        f"{common} The threshold is the curvature that a step of the optimizer bears on a quadratic: 2/lr for SGD, "
        f"more with momentum. Training often ends up near it. It bounds no other rate: far more than 2/λ at the start "
        f"may train, because the curvature moves with the training."
    )


def _weight_norm(norm: NormSummary, step: int) -> float | None:
    """‖W‖ at the step, where the loss along the gradient was measured there too."""
    points = norm.measures.smoothness if norm.measures else ()
    return next((point.weight_norm for point in points if point.step == step), None)


def _sharpness_row(norm: NormSummary, point: SharpnessPoint) -> tuple[str, ...]:
    numbers = (point.largest, point.smallest, point.along_gradient, point.threshold, _share(point))
    size = _weight_norm(norm, point.step)
    return (norm.label, f"{point.step:,}", *map(words.number, numbers), words.number(size))
