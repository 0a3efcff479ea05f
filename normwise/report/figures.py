"""What every figure of the report shares: its parts, its axes, and the marks of a normalization.

A figure is plain plotly JSON, except for its colours: they are names of CSS variables, which the page resolves, so
that one figure serves light, dark and print.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from normwise.report import words
from normwise.report.tables import Table
from normwise.tuning.records import NormSummary

Json = dict[str, Any]

INK, MUTED, RULE, PAPER = "var(--ink)", "var(--muted)", "var(--rule)", "var(--paper)"
CLEAR = "rgba(0,0,0,0)"
# Okabe and Ito's colours, in an order that keeps the first five far apart for every kind of colour vision.
_COLOURS = tuple(f"var(--series-{index})" for index in range(7))
# No cross: a cross means "diverged" in every figure.
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagram", "star")
_DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Figure:
    """A drawing, what it shows in words, and its data as a table."""

    name: str  # the element's id
    title: str
    finding: str  # what the figure shows, in one or two sentences: its text alternative
    reading: str  # what its marks mean
    table: Table
    traces: list[Json]
    layout: Json

    @property
    def drawing(self) -> Json:
        """The part that plotly reads."""
        return {"name": self.name, "data": self.traces, "layout": self.layout}


@dataclass(frozen=True)
class Mark:
    """How a normalization looks in every figure. Colour never stands alone: the symbol differs too."""

    colour: str
    symbol: str
    dash: str


def marks(norms: Sequence[NormSummary]) -> dict[str, Mark]:
    """A mark for every label, no two alike up to 56 normalizations; the first "none" is drawn in ink."""
    bare = next((norm.label for norm in norms if norm.declaration == "none"), None)
    others = [norm.label for norm in norms if norm.label != bare]
    looks = {label: _mark(index) for index, label in enumerate(others)}
    return looks if bare is None else {**looks, bare: Mark(INK, "triangle-left", "solid")}


def _mark(index: int) -> Mark:
    """Seven colours and eight symbols have no common factor, so that the pairs repeat only after 56."""
    dash = _DASHES[index // len(_COLOURS) % len(_DASHES)]
    return Mark(_COLOURS[index % len(_COLOURS)], _SYMBOLS[index % len(_SYMBOLS)], dash)


def plain(text: str) -> str:
    """Text that plotly shows as it is: it would take <b> or <a> in a label for markup.

    >>> plain("<b>mine</b>")
    '&lt;b&gt;mine&lt;/b&gt;'
    """
    return html.escape(text, quote=False)


def short(text: str, width: int = 24) -> str:
    """A label cut to fit beside a drawing; the hover text and the table have all of it.

    >>> short("batch"), short("a very long label of a normalization")
    ('batch', 'a very long label of a …')
    """
    return plain(text if len(text) <= width else f"{text[: width - 1]}…")


def hover(*lines: str) -> str:
    """Lines of one hover text; empty ones are left out."""
    return "<br>".join(plain(line) for line in lines if line)


def layout(height: int, **parts: Any) -> Json:
    """The frame of every figure. Height in pixels, without the legend; the page adds that, and the width."""
    return {
        "height": height,
        "margin": margin(),
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"family": "system-ui, 'Segoe UI', 'Liberation Sans', Arial, sans-serif", "size": 13, "color": INK},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": MUTED, "font": {"color": INK, "size": 13}, "align": "left"},
        # A finger on a plot scrolls the page; the buttons above the plot zoom.
        "dragmode": False,
        # Anything constant: it keeps what the reader toggled when the page redraws in other colours.
        "uirevision": "kept",
        "modebar": {"bgcolor": CLEAR, "color": MUTED, "activecolor": INK},
        "legend": {
            "orientation": "h",
            "x": 0,
            "xref": "container",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "bgcolor": CLEAR,
            "tracegroupgap": 0,
        },
        **parts,
    }


def margin(top: int = 10) -> Json:
    """The space around a plot in pixels, besides that of titles and ticks."""
    return {"l": 8, "r": 14, "t": top, "b": 8}


def axis(title: str, **parts: Any) -> Json:
    """A linear axis with its title and quiet lines."""
    lines = {"gridcolor": RULE, "linecolor": MUTED, "tickcolor": MUTED, "zeroline": False, "automargin": True}
    heading = {"text": plain(title), "standoff": 10, "font": {"size": 13, "color": MUTED}}
    return {"title": heading, "ticks": "outside", "ticklen": 4, "showline": True, **lines, **parts}


def log_axis(title: str, low: float, high: float, **parts: Any) -> Json:
    """A logarithmic axis from `low` to `high`, labelled with plain numbers. A narrow one is left to plotly."""
    ticks = log_ticks(low, high)
    labels = {"tickvals": ticks, "ticktext": [words.number(tick) for tick in ticks]} if len(ticks) > 2 else {}
    return axis(title, type="log", range=[math.log10(low), math.log10(high)], **labels, **parts)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, or 1, 2 and 5 times them where a range holds few.

    >>> log_ticks(0.05, 3.0)
    [0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    >>> log_ticks(0.0005, 20.0)
    [0.001, 0.01, 0.1, 1.0, 10.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 3.2 else (1,)
    return [tick for power, step in product(powers, steps) if low <= (tick := float(f"{step}e{power}")) <= high]


def legend_entry(label: str, mark: Mark) -> Json:
    """The line of the legend that switches everything of a normalization on and off."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [None],
        "y": [None],
        "name": short(label),
        "legendgroup": label,
        "line": {"color": mark.colour, "width": 2, "dash": mark.dash},
        "marker": {"color": mark.colour, "symbol": mark.symbol, "size": 9},
    }


def chance_line(chance: float | None, unit: str, log: bool) -> Json:
    """A dotted line at the loss of the best constant prediction; nothing where that is unknown."""
    if chance is None or chance <= 0:
        return {}
    line = {"color": MUTED, "width": 1, "dash": "dot"}
    shape = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": chance, "y1": chance, "line": line}
    note = {
        "xref": "paper",
        "x": 1,
        "xanchor": "right",
        "y": math.log10(chance) if log else chance,  # plotly places shapes by value, but notes by its logarithm
        "yanchor": "bottom",
        "text": plain(f"chance, {words.with_unit(words.number(chance), unit)}"),
        "showarrow": False,
        "font": {"size": 11, "color": MUTED},
    }
    return {"shapes": [shape], "annotations": [note]}


def padded(values: Iterable[float], share: float = 0.06) -> list[float]:
    """The range of some numbers with a little room on both sides."""
    numbers = list(values)
    room = (max(numbers) - min(numbers)) * share or abs(numbers[0]) * share or 1.0
    return [min(numbers) - room, max(numbers) + room]


def rows(labels: Sequence[str], pitch: int, **parts: Any) -> Json:
    """The layout of a figure of one row a thing, row r at y = -r, each with its label above it at the left.

    Labels above their rows leave the whole width to the data, on a phone too.
    """
    place = {"xref": "paper", "x": 0, "xanchor": "left", "yanchor": "bottom", "showarrow": False, "align": "left"}
    place |= {"bgcolor": PAPER, "borderpad": 1}
    notes = [{**place, "y": 0.18 - row, "text": label} for row, label in enumerate(labels)]
    lines = {"range": [-len(labels) + 0.45, 0.75], "visible": False, "fixedrange": True}
    return layout(pitch * len(labels) + 90, annotations=notes, yaxis=lines, **parts)
