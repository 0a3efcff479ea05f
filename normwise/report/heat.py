"""A map of normalization and learning rate: the mean validation score of each cell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from statistics import fmean

from normwise.report import words
from normwise.report.figures import INK, MUTED, PAPER, Figure, Json, axis, hover, layout, log_ticks, short
from normwise.report.rates import by_rate
from normwise.report.tables import Table, table
from normwise.tuning.records import NormSummary, Record, Settings, Summary

_PITCH = 34  # pixels of a row
_ALONE = math.log10(2) / 2  # half the width of a cell that has no neighbour: half an octave
_STAR = "★"
_LETTERS = {"diverged": "D", "stuck": "S", "trains": ""}


def figure(summary: Summary) -> Figure | None:
    """Every normalization's own grid of rates, or None where the rates are no grid or nothing has a score."""
    cells = [cell for norm in summary.norms for cell in _cells(norm)]
    if summary.settings.sampler != "grid" or not any(mean is not None for *_, mean in cells):
        return None
    return Figure(
        name="map",
        title="Validation score by normalization and learning rate",
        finding=_finding(summary),
        reading="The mean over selection seeds, stronger where it is better. A star is the best rate. D: at least half "
        "of the seeds diverged; S: at least half did not train, the diverged ones counted. Cells are as wide as the "
        "steps of the normalization's own grid.",
        table=_table(summary),
        traces=[*_maps(summary), _marks(summary)],
        layout=_layout(summary),
    )


def _cells(norm: NormSummary) -> Iterator[tuple[float, list[Record], float | None]]:
    """Rate, records, and the mean of the scores that there are."""
    for lr, records in by_rate(norm.selection).items():
        scores = [record.score for record in records if record.score is not None]
        yield lr, records, fmean(scores) if scores else None


def _letter(records: list[Record]) -> str:
    """D or S where half of the seeds failed, and nothing where most trained."""
    half = len(records) / 2
    outcomes = [record.outcome for record in records]
    if outcomes.count("diverged") >= half:
        return _LETTERS["diverged"]
    return _LETTERS["trains" if outcomes.count("trains") > half else "stuck"]


def _maps(summary: Summary) -> Iterator[Json]:
    """One map of one row for each normalization, because no two need have tried the same rates."""
    unit = summary.settings.unit
    for row, norm in enumerate(summary.norms):
        cells = list(_cells(norm))
        if cells:
            yield {
                "type": "heatmap",
                "x": _ends([math.log10(lr) for lr, *_ in cells]),
                "y": [-row - 0.47, -row + 0.47],
                "z": [[None if _letter(records) == "D" else mean for _, records, mean in cells]],
                "coloraxis": "coloraxis",
                "xgap": 1,
                "hoverongaps": True,
                "hoverinfo": "text",
                "text": [[_describe(norm, lr, records, mean, unit) for lr, records, mean in cells]],
            }


def _ends(places: list[float]) -> list[float]:
    """Where cells meet: halfway between their middles.

    >>> _ends([0.0, 1.0, 3.0])
    [-0.5, 0.5, 2.0, 4.0]
    """
    if len(places) == 1:
        return [places[0] - _ALONE, places[0] + _ALONE]
    inner = [(left + right) / 2 for left, right in pairwise(places)]
    return [2 * places[0] - inner[0], *inner, 2 * places[-1] - inner[-1]]


def _describe(norm: NormSummary, lr: float, records: list[Record], mean: float | None, unit: str) -> str:
    shown = "no score" if mean is None else f"mean {words.with_unit(words.score(mean, unit), unit)}"
    return hover(norm.label, f"learning rate {words.number(lr)}", shown, _counts(records))


def _counts(records: list[Record]) -> str:
    outcomes = [record.outcome for record in records]
    return ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("trains", "stuck", "diverged") if kind in outcomes)


def _marks(summary: Summary) -> Json:
    """The letters, and the star of each best rate, in a colour that stands out from the cell's."""
    middle, largest = fmean(_reach(summary)), summary.settings.direction == "max"
    cells = [(row, norm, cell) for row, norm in enumerate(summary.norms) for cell in _cells(norm)]
    texts = [_mark(norm, lr, records) for _, norm, (lr, records, _) in cells]
    drawn = [(row, cell, text) for (row, _, cell), text in zip(cells, texts, strict=True) if text]
    return {
        "type": "scatter",
        "mode": "text",
        "x": [math.log10(lr) for _, (lr, *_), _ in drawn],
        "y": [-row for row, *_ in drawn],
        "text": [text for *_, text in drawn],
        "textfont": {
            "color": [_colour(mean, _letter(records), middle, largest=largest) for _, (_, records, mean), _ in drawn],
            "size": [15 if text == _STAR else 11 for *_, text in drawn],
        },
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _mark(norm: NormSummary, lr: float, records: list[Record]) -> str:
    return (_STAR if lr == norm.lr_best else "") + _letter(records)


def _colour(mean: float | None, letter: str, middle: float, *, largest: bool) -> str:
    """Paper on what is nearer to the strongest colour than to the weakest, and ink on all else."""
    if mean is None or letter == _LETTERS["diverged"]:
        return INK
    return PAPER if (mean > middle) == largest else INK


def _layout(summary: Summary) -> Json:
    rates = [record.request.lr for norm in summary.norms for record in norm.selection]
    ticks = log_ticks(min(rates), max(rates))
    horizontal = {"tickvals": [math.log10(tick) for tick in ticks], "ticktext": [words.number(tick) for tick in ticks]}
    names = [short(norm.label, 12) for norm in summary.norms]
    rows = {"tickvals": [-row for row in range(len(names))], "ticktext": names}
    still = {"showgrid": False, "ticks": ""}
    return layout(
        _PITCH * len(names) + 130,
        xaxis=axis("Learning rate", showgrid=False, **horizontal),
        yaxis=axis("", range=[0.5 - len(names), 0.5], **rows, **still),
        coloraxis=_colours(summary),
        # The scale stands under the plot, where it takes no width from it.
        margin={"l": 8, "r": 14, "t": 10, "b": 112},
    )


def _colours(summary: Summary) -> Json:
    """From the worst cell that trains to the best one; what does not train has a letter, and the weakest colour."""
    settings = summary.settings
    low, high = _reach(summary)
    title = f"{words.metric_name(settings)}{f' ({settings.unit})' if settings.unit else ''}, mean of selection seeds"
    scale = [[0, "var(--heat-low)"], [1, "var(--heat-high)"]]
    return {
        "colorscale": scale,
        "reversescale": settings.direction == "min",
        "cmin": low,
        "cmax": high,
        "colorbar": {
            "orientation": "h",
            "title": {"text": title, "side": "bottom", "font": {"size": 11, "color": MUTED}},
            "thickness": 9,
            "len": 0.6,
            "x": 0,
            "xanchor": "left",
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
            "nticks": 5,
            "outlinewidth": 0,
            "tickfont": {"size": 11, "color": MUTED},
            "ypad": 4,
        },
    }


def _reach(summary: Summary) -> tuple[float, float]:
    cells = [cell for norm in summary.norms for cell in _cells(norm) if cell[2] is not None]
    trained = [mean for _, records, mean in cells if not _letter(records)] or [mean for *_, mean in cells]
    known = [mean for mean in trained if mean is not None]
    return min(known), max(known) if max(known) > min(known) else min(known) + 1.0


def _finding(summary: Summary) -> str:
    """The rates at which each normalization trains, and the best of them."""
    parts = [f"{norm.label} {_span(norm, summary.settings)}" for norm in summary.norms]
    return f"Rates at which more than half of the seeds train: {'; '.join(parts)}."


def _span(norm: NormSummary, settings: Settings) -> str:
    rates = [lr for lr, records, _ in _cells(norm) if not _letter(records)]
    if not rates:
        return "none"
    best = next((mean for lr, _, mean in _cells(norm) if lr == norm.lr_best), None)
    score = words.with_unit(words.score(best, settings.unit), settings.unit)
    reached = "" if best is None else f", {score} at {words.number(norm.lr_best)}"
    return f"{words.number(min(rates))} to {words.number(max(rates))}{reached}"


def _table(summary: Summary) -> Table:
    unit = summary.settings.unit
    rows = [
        (norm.label, words.number(lr), words.with_unit(words.score(mean, unit), unit), _counts(records))
        for norm in summary.norms
        for lr, records, mean in _cells(norm)
    ]
    return table("Normalization", "Learning rate", "Mean validation score", "Outcome", rows=rows)
