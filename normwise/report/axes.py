"""The score at the best learning rate against each setting that the study varied."""

from __future__ import annotations

import math
from collections.abc import Iterable

from normwise.report import words
from normwise.report.figures import PAPER, Figure, Json, Mark, axis, hover, layout, legend_entry, marks, padded, short
from normwise.report.tables import Table, table
from normwise.tuning.axes import value_text, variant_text
from normwise.tuning.records import NormSummary, Summary, Value, VariantSummary

Best = dict[Value, VariantSummary | None]  # by value of one axis: the combination with the best score, if any has one


def figures(summary: Summary) -> list[Figure]:
    """One figure an axis, in the settings' order; none where nothing was varied or nothing trained."""
    drawn = [_figure(summary, name, values) for name, values in summary.settings.axes]
    return [figure for figure in drawn if figure]


def named(summary: Summary) -> str:
    """The axes in words.

    >>> from normwise.tuning.records import Settings
    >>> settings = Settings("mlp", "digits", (), axes=(("batch_size", (8, 32)), ("optimizer", ("sgd", "adamw"))))
    >>> named(Summary(settings, {}, None, (0.1, 1.0), (), None, None, (), {}, 1.0, 0))  # type: ignore[arg-type]
    'batch size and optimizer'
    """
    return words.listed([name.replace("_", " ") for name, _ in summary.settings.axes])


def _figure(summary: Summary, name: str, values: tuple[Value, ...]) -> Figure | None:
    largest = summary.settings.direction == "max"
    found = {norm.label: _best(norm.variants, name, values, largest=largest) for norm in summary.norms}
    if not any(best for own in found.values() for best in own.values()):
        return None
    places = _places(values)
    heading, axis_title = name.replace("_", " "), words.metric_name(summary.settings)
    unit = summary.settings.unit
    looks = marks(summary.norms)
    return Figure(
        name=f"axis-{name.replace('_', '-')}",
        title=f"{axis_title} by {heading}",
        finding=_finding(found, heading, values, unit),
        reading=_reading(summary, heading),
        table=_table(summary, name),
        traces=[t for norm in summary.norms for t in _traces(norm, found[norm.label], places, looks[norm.label], unit)],
        layout=layout(
            400,
            xaxis=_axis(heading, values, places),
            yaxis=axis(f"Validation score ({unit})" if unit else "Validation score", range=_reach(found)),
        ),
    )


def _best(variants: Iterable[VariantSummary], name: str, values: tuple[Value, ...], *, largest: bool) -> Best:
    """For each value the best combination: the other axes are nuisances, as the learning rate is.

    As in selection, the one with the fewest failed seeds, and then the best score.
    """
    found: Best = dict.fromkeys(values)
    for own in variants:
        value = dict(own.variant).get(name)
        if own.score is None or value not in found:
            continue
        before = found[value]
        if before is None or _standing(own, largest) > _standing(before, largest):
            found[value] = own
    return found


def _standing(own: VariantSummary, largest: bool) -> tuple[int, float]:
    score = own.score or 0.0
    return -own.failed, score if largest else -score


def _places(values: tuple[Value, ...]) -> dict[Value, float]:
    """Where each value lies: numbers above zero by their logarithm, all others in a row."""
    if all(isinstance(value, int | float) and value > 0 for value in values):
        return {value: math.log10(float(value)) for value in values}
    return {value: float(index) for index, value in enumerate(values)}


def _axis(heading: str, values: tuple[Value, ...], places: dict[Value, float]) -> Json:
    ticks = {
        "tickvals": [places[value] for value in values],
        "ticktext": [short(value_text(value), 12) for value in values],
    }
    return axis(heading[:1].upper() + heading[1:], range=padded(places.values(), 0.08), **ticks)


def _reach(found: dict[str, Best]) -> list[float]:
    return padded(best.score for own in found.values() for best in own.values() if best and best.score is not None)


def _traces(norm: NormSummary, found: Best, places: dict[Value, float], mark: Mark, unit: str) -> list[Json]:
    """The line, and on it the value that the normalization was confirmed at."""
    group = {"type": "scatter", "legendgroup": norm.label, "showlegend": False}
    points = sorted(((places[value], best) for value, best in found.items()), key=lambda point: point[0])
    line = {
        **group,
        "mode": "lines+markers",
        "x": [place for place, _ in points],
        "y": [best.score if best else None for _, best in points],
        "line": {"color": mark.colour, "width": 2, "dash": mark.dash},
        "marker": {"color": mark.colour, "symbol": mark.symbol, "size": 9},
        "hoverinfo": "text",
        "hovertext": [_describe(norm, best, unit) if best else "" for _, best in points],
    }
    chosen = [(place, best) for place, best in points if best and best.variant == norm.variant]
    large = {
        **group,
        "mode": "markers",
        "x": [place for place, _ in chosen],
        "y": [best.score for _, best in chosen],
        "marker": {"color": mark.colour, "symbol": mark.symbol, "size": 15, "line": {"color": PAPER, "width": 2.5}},
        "hoverinfo": "text",
        "hovertext": [_describe(norm, best, unit) for _, best in chosen],
    }
    return [legend_entry(norm.label, mark), line, *([large] if chosen else [])]


def _describe(norm: NormSummary, best: VariantSummary, unit: str) -> str:
    edge = words.edge(best.lr_train, "at least")
    return hover(
        norm.label,
        variant_text(best.variant),
        words.with_unit(words.score(best.score, unit), unit),
        f"best learning rate {words.number(best.lr_best)}",
        "" if edge == words.MISSING else f"tolerates {edge}",
    )


def _finding(found: dict[str, Best], heading: str, values: tuple[Value, ...], unit: str) -> str:
    """Numbers from their smallest to their largest; names from the worst to the best."""
    if all(isinstance(value, int | float) for value in values):
        first, last = min(values), max(values)
        ends = [f"{label} {_score(own[first], unit)} to {_score(own[last], unit)}" for label, own in found.items()]
        return f"From {heading} {value_text(first)} to {value_text(last)}: {words.listed(ends)}."
    parts = [f"{label} {_listed(own, unit)}" for label, own in found.items()]
    return f"By {heading}: {'; '.join(parts)}."


def _listed(own: Best, unit: str) -> str:
    return ", ".join(f"{value_text(value)} {_score(best, unit)}" for value, best in own.items())


def _score(best: VariantSummary | None, unit: str) -> str:
    return words.with_unit(words.score(best.score if best else None, unit), unit)


def _reading(summary: Summary, heading: str) -> str:
    others = " and at the best value of the other axes" if len(summary.settings.axes) > 1 else ""
    seeds = words.plural(summary.settings.seeds, "selection seed")
    return (
        f"The mean over {seeds} on validation data, each at its own best learning rate for that {heading}{others}. "
        f"These scores chose, so they flatter; the large mark is what was confirmed on fresh seeds. A line breaks, "
        f"and a dash stands, where every run diverged."
    )


def _table(summary: Summary, name: str) -> Table:
    """Every combination, so that nothing is hidden behind the best one."""
    unit = summary.settings.unit
    order = {value: index for index, value in enumerate(dict(summary.settings.axes)[name])}
    rows = [
        (
            norm.label,
            variant_text(own.variant),
            words.number(own.lr_best),
            words.with_unit(words.score(own.score, unit), unit),
            words.edge(own.lr_train, "at least"),
        )
        for norm in summary.norms
        for own in sorted(norm.variants, key=lambda own: order.get(dict(own.variant)[name], 0))
    ]
    return table("Normalization", "Combination", "lr_best", "Validation score", "lr_train at 0.5", rows=rows)
