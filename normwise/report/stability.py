"""Stability: which learning rates a normalization tolerates, and what a wrong one costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from normwise.report import words
from normwise.report.figures import INK, MUTED, Figure, Json, axis, hover, log_axis, marks, rows, short
from normwise.report.tables import HEADLINE, THRESHOLDS, Table, controlled, ratio, reference, table, tolerated
from normwise.tuning.records import Edge, NormSummary, Summary

_PITCH = 62  # pixels between rows
_CONTROL_READING = (
    " Right under each mark, open with a dot: the same edge in the control, with gamma, beta and the output layer "
    "frozen."
)
_LANES = {"0.9": 0.1, "0.5": -0.06, "0.25": -0.22, "diverges": -0.38}  # where in a row each edge is drawn
_SYMBOLS = {"0.9": "triangle-up-open", "0.5": "circle", "0.25": "triangle-down-open", "diverges": "x"}


@dataclass(frozen=True)
class _Look:
    """How edges are drawn: the study's own, or those of its control."""

    colour: str
    size: int
    bar: str  # colour of the seeds' range
    below: float = 0.0  # how far under its lane, in rows
    suffix: str = ""  # of the symbols
    note: str = ""  # for the hover text


_STUDY = _Look(INK, 9, MUTED)
_CONTROL = _Look(
    "var(--control)", 8, "var(--control)", 0.075, "-open-dot", "with gamma, beta and the output layer frozen"
)


def edges(summary: Summary) -> Figure | None:
    """Best rate and edges of every normalization, or None where no edge is known."""
    control = controlled(summary)
    rates = [rate for norm in (*summary.norms, *(control.norms if control else ())) for rate in _rates(norm)]
    if not any(norm.lr_train or norm.lr_diverge.mean for norm in summary.norms) or not rates:
        return None
    labels = [f"{short(norm.label)}{_weights(norm)}" for norm in summary.norms]
    return Figure(
        name="edges",
        title="Learning rates that are tolerated",
        finding=_edges_finding(summary),
        reading="Star: the best rate. Triangles and circle: the largest rate that trains to a loss below 0.9, 0.5 and "
        "0.25 of chance, the loss of the best constant prediction. Cross: the rate from which training diverges; an "
        "arrow, none up to there. Points are geometric means over seeds, thin bars the seeds' range. The broad band is "
        f"the margin, from the best rate to the edge at half of chance.{_CONTROL_READING if control else ''}",
        table=_edges_table(summary),
        traces=[
            *_margins(summary),
            _best(summary),
            *(_edge_trace(summary, kind, _STUDY) for kind in _LANES),
            *_beyond(summary, _STUDY),
            *(_control_traces(control) if control else []),
        ],
        layout=rows(
            labels, _PITCH + (24 if control else 0), xaxis=log_axis("Learning rate", min(rates) / 1.4, max(rates) * 1.4)
        ),
    )


def sensitivity(summary: Summary) -> Figure | None:
    """What a wrong rate costs, or None where no losses are known."""
    known = [norm for norm in summary.norms if norm.sensitivity is not None]
    if not known:
        return None
    unit = words.loss_unit(summary.settings)
    low, high = map(words.number, summary.lr_range)
    title = f"Mean excess loss ({unit})" if unit else "Mean excess loss"
    most = max(norm.sensitivity or 0.0 for norm in known)
    return Figure(
        name="sensitivity",
        title="Learning-rate sensitivity",
        finding=_sensitivity_finding(known, unit),
        reading=f"The mean of min(loss, first loss) {words.MINUS} best loss over learning rates from {low} to {high} "
        f"(Wortsman et al. 2023): what a rate chosen blindly from this range loses to the best one. Less is better.",
        table=table(
            "Normalization",
            f"Sensitivity ({unit})" if unit else "Sensitivity",
            "‖W‖ at the end",
            rows=[(norm.label, words.number(norm.sensitivity), words.number(norm.weight_norm)) for norm in known],
        ),
        traces=[_bars(summary, known, unit)],
        layout=rows(
            [f"{short(norm.label)}{_weights(norm)}" for norm in known],
            46,
            xaxis=axis(title, range=[0, most * 1.15 or 1.0]),
            showlegend=False,
        ),
    )


def _rates(norm: NormSummary) -> Iterator[float]:
    for edge in (*norm.lr_train.values(), norm.lr_diverge):
        yield from (rate for rate in (edge.mean, edge.low, edge.high) if rate)
    if norm.lr_best:
        yield norm.lr_best


def _weights(norm: NormSummary) -> str:
    size = words.number(norm.weight_norm)
    return "" if norm.weight_norm is None else f" <span style='font-size:11px'>· ‖W‖ {size} at the end</span>"


def _margins(summary: Summary) -> Iterator[Json]:
    looks = marks(summary.norms)
    for row, norm in enumerate(summary.norms):
        edge = norm.lr_train.get(HEADLINE)
        if norm.lr_best and edge and edge.mean:
            yield {
                "type": "scatter",
                "mode": "lines",
                "x": [norm.lr_best, edge.mean],
                "y": [_LANES[HEADLINE] - row] * 2,
                "line": {"color": looks[norm.label].colour, "width": 9},
                "opacity": 0.45,
                "hoverinfo": "skip",
                "showlegend": False,
            }


def _best(summary: Summary) -> Json:
    drawn = [(row, norm) for row, norm in enumerate(summary.norms) if norm.lr_best]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "best rate",
        "x": [norm.lr_best for _, norm in drawn],
        "y": [_LANES[HEADLINE] - row for row, _ in drawn],
        "marker": {"color": INK, "symbol": "star", "size": 12},
        "hoverinfo": "text",
        "hovertext": [hover(norm.label, f"best learning rate {words.number(norm.lr_best)}") for _, norm in drawn],
    }


def _edges(summary: Summary, kind: str) -> Iterator[tuple[int, NormSummary, Edge]]:
    """Row, normalization and edge of one kind, where there is one."""
    for row, norm in enumerate(summary.norms):
        edge = norm.lr_diverge if kind == "diverges" else norm.lr_train.get(kind)
        if edge and edge.mean:
            yield row, norm, edge


def _edge_trace(summary: Summary, kind: str, look: _Look) -> Json:
    found = [(row, norm, edge) for row, norm, edge in _edges(summary, kind) if edge.censored < edge.seeds]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "diverges" if kind == "diverges" else f"{kind} of chance",
        "x": [edge.mean for _, _, edge in found],
        "y": [_LANES[kind] - look.below - row for row, _, _ in found],
        "marker": {"color": look.colour, "symbol": _symbol(kind, look), "size": look.size},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [_apart(edge.high, edge.mean) for _, _, edge in found],
            "arrayminus": [_apart(edge.mean, edge.low) for _, _, edge in found],
            "color": look.bar,
            "thickness": 1.2,
            "width": 3,
        },
        "hoverinfo": "text",
        "hovertext": [_describe(norm, kind, look) for _, norm, _ in found],
    }


def _symbol(kind: str, look: _Look) -> str:
    """The symbol of an edge; that of the control has the same shape, open and with a dot in it."""
    return f"{_SYMBOLS[kind].removesuffix('-open')}{look.suffix}" if look.suffix else _SYMBOLS[kind]


def _beyond(summary: Summary, look: _Look) -> Iterator[Json]:
    """Arrows where no seed reached the edge."""
    found = [(kind, *edge) for kind in _LANES for edge in _edges(summary, kind) if edge[2].censored == edge[2].seeds]
    if found:
        yield {
            "type": "scatter",
            "mode": "markers",
            "name": "none up to here",
            "x": [edge.mean for *_, edge in found],
            "y": [_LANES[kind] - look.below - row for kind, row, *_ in found],
            "marker": {"color": look.colour, "symbol": "arrow-right", "size": look.size + 1},
            "hoverinfo": "text",
            "hovertext": [_describe(norm, kind, look) for kind, _, norm, _ in found],
        }


def _control_traces(control: Summary) -> Iterator[Json]:
    """The edges of the control, under one entry of the legend."""
    group = {"legendgroup": "control", "showlegend": False}
    yield {
        "type": "scatter",
        "mode": "markers",
        "x": [None],
        "y": [None],
        "name": "control",
        "marker": {"color": _CONTROL.colour, "symbol": _symbol(HEADLINE, _CONTROL), "size": _CONTROL.size},
        "legendgroup": "control",
    }
    drawn = [*(_edge_trace(control, kind, _CONTROL) for kind in _LANES), *_beyond(control, _CONTROL)]
    yield from ({**trace, **group} for trace in drawn)


def _apart(high: float | None, low: float | None) -> float:
    return 0.0 if high is None or low is None else high - low


def _describe(norm: NormSummary, kind: str, look: _Look) -> str:
    if kind == "diverges":
        rate = words.edge(norm.lr_diverge, "none up to")
        return hover(norm.label, look.note, "learning rate at which it diverges:", rate)
    return hover(norm.label, look.note, f"largest rate that trains to {kind} of chance:", tolerated(norm, kind))


def control_sentence(summary: Summary) -> str | None:
    """How much of each ratio to the reference is left in the control, or None where none was run."""
    control = controlled(summary)
    if control is None:
        return None
    frozen = {norm.label: norm for norm in control.norms}
    base = reference(summary.norms)
    others = [norm for norm in summary.norms if norm is not base]
    if not others:
        held = tolerated(frozen[base.label], HEADLINE)
        return f"In the control, {base.label} tolerates {held} instead of {tolerated(base, HEADLINE)}."
    kept = [_kept(norm, base, frozen) for norm in others]
    return f"As a ratio to {base.label}, in the study and in the control: {'; '.join(kept)}."


def _kept(norm: NormSummary, base: NormSummary, frozen: dict[str, NormSummary]) -> str:
    """Both ratios, and their logarithms to base 2 where neither is a bound."""
    pairs = ((norm, base), (frozen[norm.label], frozen[base.label]))
    edges = [(top.lr_train.get(HEADLINE), bottom.lr_train.get(HEADLINE)) for top, bottom in pairs]
    text = f"{norm.label} {' and '.join(ratio(top, bottom) for top, bottom in edges)}"
    octaves = [_octaves(top, bottom) for top, bottom in edges]
    return text if None in octaves else f"{text} ({' and '.join(words.number(own, 2) for own in octaves)} octaves)"


def _octaves(top: Edge | None, bottom: Edge | None) -> float | None:
    """The logarithm of a ratio of two edges that were both reached."""
    if not (top and bottom and top.mean and bottom.mean) or top.censored or bottom.censored:
        return None
    return math.log2(top.mean / bottom.mean)


def _edges_finding(summary: Summary) -> str:
    base = reference(summary.norms)
    known = [norm for norm in summary.norms if (edge := norm.lr_train.get(HEADLINE)) and edge.mean]
    if not known:
        return "No normalization trains to half of chance at any rate that was tried."
    order = sorted(known, key=lambda norm: norm.lr_train[HEADLINE].mean or 0.0, reverse=True)
    text = words.listed([f"{norm.label} {tolerated(norm, HEADLINE)}" for norm in order])
    ratios = [_ratio(norm, base) for norm in order if norm is not base]
    compared = f" As a ratio to {base.label}: {words.listed(ratios)}." if ratios else ""
    return f"Largest learning rate tolerated at half of chance: {text}.{compared}"


def _edges_table(summary: Summary) -> Table:
    control = controlled(summary)
    frozen = [f"{norm.label}, control" for norm in control.norms] if control else []
    rows = [
        (
            label,
            words.number(norm.lr_best),
            *(tolerated(norm, threshold) for threshold in THRESHOLDS),
            words.edge(norm.lr_diverge, "none up to"),
            words.number(norm.margin_octaves, 2),
        )
        for label, norm in [
            *((norm.label, norm) for norm in summary.norms),
            *zip(frozen, control.norms if control else (), strict=True),
        ]
    ]
    edges = [f"lr_train at {threshold}" for threshold in THRESHOLDS]
    return table("Normalization", "lr_best", *edges, "lr_diverge", "Margin (octaves)", rows=rows)


def _ratio(norm: NormSummary, base: NormSummary) -> str:
    return f"{norm.label} {ratio(norm.lr_train[HEADLINE], base.lr_train.get(HEADLINE))}"


def _sensitivity_finding(known: list[NormSummary], unit: str) -> str:
    order = sorted(known, key=lambda norm: norm.sensitivity or 0.0)
    parts = [f"{norm.label} {words.with_unit(words.number(norm.sensitivity), unit)}" for norm in order]
    return f"A wrong learning rate costs on average: {words.listed(parts)}."


def _bars(summary: Summary, known: list[NormSummary], unit: str) -> Json:
    looks = marks(summary.norms)
    values = [words.with_unit(words.number(norm.sensitivity), unit) for norm in known]
    return {
        "type": "bar",
        "orientation": "h",
        "x": [norm.sensitivity for norm in known],
        "y": [-row for row in range(len(known))],
        "width": 0.3,
        "marker": {"color": [looks[norm.label].colour for norm in known]},
        "text": values,
        "textposition": "outside",
        "textfont": {"size": 12, "color": MUTED},
        "cliponaxis": False,
        "hoverinfo": "text",
        "hovertext": [
            hover(norm.label, f"{value} above its best loss on average")
            for norm, value in zip(known, values, strict=True)
        ],
    }
