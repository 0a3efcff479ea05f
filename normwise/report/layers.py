"""Inside the network: how activations grow with depth, and what evaluation makes of the training's statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from normwise.report import words
from normwise.report.figures import MUTED, Figure, Json, axis, hover, marks, rows, short
from normwise.report.panels import Panel, Point, stacked
from normwise.report.tables import Table, table
from normwise.tuning.records import ActivationPoint, GapPoint, NormSummary, Summary

_LANES = {"moving": 0.06, "batch": -0.16, "recalibrated": -0.38}  # where in a row each bar lies
_PITCH = 84  # pixels between rows
_TINTS = {"moving": 1.0, "batch": 0.6, "recalibrated": 0.35}  # of the bars
_LEAST = 0.01  # gaps below this share of the loss are none


def activations(summary: Summary) -> Figure | None:
    """The rms of every layer's output by depth, before training and after; None if not measured."""
    known = [norm for norm in summary.norms if any(map(_measured, _layers(norm)))]
    if not known:
        return None
    panels = [
        _by_depth("rms of the output before training", known, lambda layer: layer.rms_start),
        _by_depth("rms of the output after training", known, lambda layer: layer.rms_end),
    ]
    depth = axis("Depth, from the first layer (0) to the last (1)", range=[-0.03, 1.03])
    traces, layout = stacked(summary.norms, [panel for panel in panels if panel.values], depth)
    return Figure(
        name="activations",
        title="Activations by depth",
        finding=_growth_finding(known),
        reading="The root mean square of each layer's output on one batch of training data, layers in the order of "
        "their calls. Networks may differ in their number of layers, so depth is a share; a hover names the layer.",
        table=table(
            "Normalization",
            "Layer",
            "rms before training",
            "rms after training",
            rows=[
                (norm.label, layer.layer, words.number(layer.rms_start), words.number(layer.rms_end))
                for norm in known
                for layer in _layers(norm)
            ],
        ),
        traces=traces,
        layout=layout,
    )


def gap(summary: Summary) -> Figure | None:
    """The loss by moving, batch and recalibrated statistics, for what remembers any; None if nothing does."""
    known = [(norm, found) for norm in summary.norms if (found := _gap(norm)) and _values(found)]
    if not known:
        return None
    unit = words.loss_unit(summary.settings)
    ends = [0.0, *(value for _, found in known for value in _values(found))]
    low, high = min(ends), max(ends)
    return Figure(
        name="gap",
        title="The gap between training and evaluation",
        finding=" ".join(_gap_finding(norm, found, unit) for norm, found in known),
        reading="The loss on the same training data with the statistics that evaluation uses (moving), with those of "
        "each batch, as in training, and with moving ones measured anew with the weights held still (recalibrated). "
        "Normalizations without a memory do the same in both modes, and have no bars.",
        table=_gap_table(known, unit),
        traces=list(_bars(summary, known, unit)),
        layout=rows(
            [short(norm.label) for norm, _ in known],
            _PITCH,
            xaxis=axis(f"Loss ({unit})" if unit else "Loss", range=[low, high + 0.45 * (high - low)]),
            showlegend=False,
        ),
    )


def _layers(norm: NormSummary) -> tuple[ActivationPoint, ...]:
    return norm.measures.activations if norm.measures else ()


def _measured(layer: ActivationPoint) -> bool:
    return layer.rms_start is not None or layer.rms_end is not None


def _gap(norm: NormSummary) -> GapPoint | None:
    return norm.measures.gap if norm.measures else None


def _by_depth(title: str, norms: list[NormSummary], of: Callable[[ActivationPoint], float | None]) -> Panel:
    return Panel(title, {norm.label: list(_line(norm, of)) for norm in norms})


def _line(norm: NormSummary, of: Callable[[ActivationPoint], float | None]) -> Iterator[Point]:
    layers = _layers(norm)
    for index, layer in enumerate(layers):
        text = hover(norm.label, f"layer {layer.layer}, {index + 1} of {len(layers)}", f"rms {words.number(of(layer))}")
        yield Point(index / max(len(layers) - 1, 1), of(layer), text)


def _growth_finding(norms: list[NormSummary]) -> str:
    """How many times its size at the first layer the output has at the last."""
    parts = []
    for norm in norms:
        first, last = _layers(norm)[0], _layers(norm)[-1]
        before, after = (_times(last.rms_start, first.rms_start), _times(last.rms_end, first.rms_end))
        parts.append(f"{norm.label} {before} before training, {after} after")
    return f"From the first layer to the last the rms changes by: {'; '.join(parts)}."


def _times(last: float | None, first: float | None) -> str:
    return words.MISSING if last is None or not first else f"{words.number(last / first)}{words.TIMES}"


def _parts(found: GapPoint) -> dict[str, float | None]:
    return {"moving": found.moving, "batch": found.batch, "recalibrated": found.recalibrated}


def _values(found: GapPoint) -> list[float]:
    return [value for value in _parts(found).values() if value is not None]


def _bars(summary: Summary, known: list[tuple[NormSummary, GapPoint]], unit: str) -> Iterator[Json]:
    """One trace a kind of statistics; every bar carries its name and number, so that none rests on its tint."""
    looks = marks(summary.norms)
    for kind, lane in _LANES.items():
        drawn = [
            (row, norm, value) for row, (norm, found) in enumerate(known) if (value := _parts(found)[kind]) is not None
        ]
        texts = [f"{kind} {words.with_unit(words.number(value), unit)}" for _, _, value in drawn]
        yield {
            "type": "bar",
            "orientation": "h",
            "x": [value for *_, value in drawn],
            "y": [lane - row for row, *_ in drawn],
            "width": 0.17,
            "marker": {"color": [looks[norm.label].colour for _, norm, _ in drawn], "opacity": _TINTS[kind]},
            "text": texts,
            "textposition": "outside",
            "textfont": {"size": 12, "color": MUTED},
            "cliponaxis": False,
            "hoverinfo": "text",
            "hovertext": [hover(norm.label, text) for (_, norm, _), text in zip(drawn, texts, strict=True)],
        }


def _gap_finding(norm: NormSummary, found: GapPoint, unit: str) -> str:
    if found.moving is None or found.batch is None:
        return f"{norm.label} has no finite loss in one of the two modes."
    excess = found.moving - found.batch
    if abs(excess) < _LEAST * abs(found.batch):
        return (
            f"The loss of {norm.label} is the same in both modes: {words.with_unit(words.number(found.moving), unit)}."
        )
    amount = words.with_unit(words.number(abs(excess)), unit)
    way = "higher" if excess > 0 else "lower"
    told = f"The loss of {norm.label} is {amount} {way} with moving statistics than with those of a batch"
    if found.recalibrated is None:
        return f"{told}."
    back = words.with_unit(words.number(found.recalibrated), unit)
    return f"{told}; recalibrated ones give {back} instead of {words.with_unit(words.number(found.moving), unit)}."


def _gap_table(known: list[tuple[NormSummary, GapPoint]], unit: str) -> Table:
    kinds = [f"{kind.capitalize()} ({unit})" if unit else kind.capitalize() for kind in _LANES]
    body = [(norm.label, *(words.number(value, 4) for value in _parts(found).values())) for norm, found in known]
    return table("Normalization", *kinds, rows=body)
