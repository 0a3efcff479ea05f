"""Several plots under one another over one horizontal axis, a line a normalization in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normwise.report.figures import Json, Mark, axis, layout, legend_entry, log_axis, margin, marks, plain
from normwise.tuning.records import NormSummary

_HEIGHT, _BETWEEN = 145, 40  # pixels of a panel, and between two, where the lower one's title stands


@dataclass(frozen=True)
class Point:
    """A place on a line, and what a hover over it says."""

    x: float
    y: float | None  # None breaks the line
    text: str


@dataclass(frozen=True)
class Panel:
    """One plot: its title, a line for each label, and what else is drawn in it."""

    title: str  # with the unit
    lines: dict[str, list[Point]]
    more: Sequence[Json] = ()  # traces, without their axis
    also: Sequence[float] = ()  # values besides the lines' that the axis must hold

    @property
    def values(self) -> list[float]:
        """Everything that the axis is to hold."""
        return [point.y for line in self.lines.values() for point in line if point.y is not None] + [*self.also]


def stacked(norms: Sequence[NormSummary], panels: Sequence[Panel], xaxis: Json) -> tuple[list[Json], Json]:
    """Traces and layout of the panels, the first on top. A click in the legend hides a normalization in all of them."""
    looks = marks(norms)
    named = [norm.label for norm in norms if any(panel.lines.get(norm.label) for panel in panels)]
    traces = [legend_entry(label, looks[label]) for label in named]
    for index, panel in enumerate(panels):
        own = [_line(label, line, looks[label]) for label, line in panel.lines.items() if line]
        traces += [{**trace, "yaxis": _name("y", index)} for trace in (*panel.more, *own)]
    return traces, _layout(panels, xaxis)


def steps_axis() -> Json:
    """The horizontal axis of what is followed over the steps."""
    return axis("Step", rangemode="tozero")


def _line(label: str, points: list[Point], mark: Mark) -> Json:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [point.x for point in points],
        "y": [point.y for point in points],
        "line": {"color": mark.colour, "width": 2, "dash": mark.dash},
        "marker": {"color": mark.colour, "symbol": mark.symbol, "size": 8},
        "legendgroup": label,
        "showlegend": False,
        "hoverinfo": "text",
        "hovertext": [point.text for point in points],
    }


def _layout(panels: Sequence[Panel], xaxis: Json) -> Json:
    count = len(panels)
    total = count * _HEIGHT + (count - 1) * _BETWEEN
    vertical: Json = {}
    titles = []
    for index, panel in enumerate(panels):
        top = 1 - index * (_HEIGHT + _BETWEEN) / total
        domain = [max(top - _HEIGHT / total, 0.0), top]
        vertical[f"yaxis{index + 1 if index else ''}"] = {**_axis(panel), "domain": domain, "anchor": "x"}
        titles.append(_title(panel.title, top))
    return layout(
        total + 80,
        xaxis={**xaxis, "anchor": _name("y", count - 1)},
        **vertical,
        annotations=titles,
        margin=margin(top=28),
    )


def _axis(panel: Panel) -> Json:
    """Logarithmic where the values span more than a factor of ten, and from zero otherwise, if they are positive."""
    values = panel.values
    low, high = min(values), max(values)
    if low > 0 and high > 10 * low:
        return log_axis("", low * 0.75, high * 1.35)
    return axis("", **({"range": [0, high * 1.1]} if low >= 0 and high else {}), nticks=5)


def _title(text: str, top: float) -> Json:
    place: dict[str, Any] = {"xref": "paper", "yref": "paper", "x": 0, "y": top, "xanchor": "left", "yanchor": "bottom"}
    return {**place, "yshift": 4, "showarrow": False, "text": f"<b>{plain(text)}</b>", "font": {"size": 12}}


def _name(letter: str, index: int) -> str:
    return f"{letter}{index + 1}" if index else letter
