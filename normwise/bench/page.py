"""The results on one self-contained page, in the style of the report: bars up to the copy's speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

from normwise.bench import screen
from normwise.bench.cases import OPERATIONS, ModelCase
from normwise.bench.operations import CONTENDERS, COPY, CUDNN, FLASH, LIGER, OURS, QUACK
from normwise.bench.results import PAGE, Outcome, Results
from normwise.report.figures import MUTED, Figure, Json, axis, hover, layout, plain
from normwise.report.paper import script, template, written
from normwise.report.tables import Table, table

_PITCH = 16  # pixels a bar
_ON_A_GPU = {CUDNN: 2, LIGER: 4, FLASH: 5, QUACK: 6}  # they never meet those whose colours they have
_COLOURS = {name: f"var(--series-{_ON_A_GPU.get(name, at)})" for at, name in enumerate(CONTENDERS)}


def render(results: Results, more: Mapping[str, Table] = MappingProxyType({})) -> str:
    """The results as one HTML page with scripts and styles inside; nothing is loaded from anywhere.

    Args:
        results: What was measured.
        more: Further tables, by title.
    """
    figures = [_figure(name, group) for name, group in _groups(results.outcomes)]
    return template("bench.html", "normwise.bench").render(
        machine=results.machine,
        complete=results.complete,
        headline=screen.headline(results.outcomes),
        figures=figures,
        more=more,
        remarks=screen.remarks(results.outcomes),
        facts=table("Fact", "Value", rows=[(name, str(value)) for name, value in results.machine.items()]),
        drawings=[figure.drawing for figure in figures],
        plotly=script(),
    )


def write(results: Results, folder: Path) -> Path:
    """Write bench.html, all of it or nothing.

    Raises:
        StudyError: the file cannot be written.
    """
    return written(render(results), folder / PAGE, "benchmark")


def _groups(outcomes: Sequence[Outcome]) -> list[tuple[str, list[Outcome]]]:
    """What was timed, whole models first, then each operation."""
    timed = [outcome for outcome in outcomes if outcome.timed]
    order = ["models", *OPERATIONS]
    return [(name, list(group)) for name, group in groupby(sorted(timed, key=lambda o: order.index(_kind(o))), _kind)]


def _kind(outcome: Outcome) -> str:
    return "models" if isinstance(outcome.case, ModelCase) else outcome.case.operation


def _figure(name: str, group: Sequence[Outcome]) -> Figure:
    is_model = name == "models"
    names = [one for one in CONTENDERS if any(one in outcome.timed for outcome in group)]
    reach = "the speed with torch's layers" if is_model else "the copy's speed"
    what = f"{'Steps of whole models' if is_model else str(OPERATIONS[name])}, in percent of {reach}"
    what = what[0].upper() + what[1:]
    bars = sum(len(outcome.timed) for outcome in group)
    return Figure(
        name=f"bars-{name}",
        title=what,
        finding=f"{what}, for {len(group)} cases",
        reading=f"The line is {reach}; whiskers are quartiles.",
        table=_table(group, names),
        traces=[_bars(one, group) for one in names],
        layout=layout(
            _PITCH * bars + 24 * len(group) + 60,
            barmode="group",
            xaxis=axis(f"% of {reach}", rangemode="tozero"),
            yaxis=axis("", type="category", autorange="reversed"),
            shapes=[_line_at(100)],
        ),
    )


def _bars(name: str, group: Sequence[Outcome]) -> Json:
    """The bars of a contender, with quartiles; hovering tells time and speed."""
    found = [outcome for outcome in group if name in outcome.timed]
    middle = [_percent(outcome, name, outcome.timed[name].share.median) for outcome in found]
    high = [_percent(outcome, name, outcome.timed[name].share.high) for outcome in found]
    low = [_percent(outcome, name, outcome.timed[name].share.low) for outcome in found]
    whiskers = {
        "type": "data",
        "array": [top - value for top, value in zip(high, middle, strict=True)],
        "arrayminus": [value - bottom for value, bottom in zip(middle, low, strict=True)],
        "thickness": 1,
        "width": 2,
        "color": MUTED,
    }
    return {
        "type": "bar",
        "orientation": "h",
        "name": plain(name),
        "x": middle,
        "y": [plain(_label(outcome)) for outcome in found],
        "error_x": whiskers,
        "text": [hover(f"{name}, {outcome.case}", _told(outcome, name)) for outcome in found],
        "textposition": "none",
        "hoverinfo": "text",
        "marker": {"color": _COLOURS[name]},
    }


def _percent(outcome: Outcome, name: str, share: float) -> float:
    """A share of the reference's time as a percentage of its speed."""
    percent = outcome.percent(name)
    return 100 * share if percent is None else percent * share / outcome.timed[name].share.median


def _told(outcome: Outcome, name: str) -> str:
    speed = outcome.speed(name)
    return f"{screen.milliseconds(outcome, name)} ms" + ("" if speed is None else f", {speed:.1f} GB/s")


def _label(outcome: Outcome) -> str:
    words = str(outcome.case)
    return words if isinstance(outcome.case, ModelCase) else words.partition(" ")[2]


def _line_at(value: float) -> Json:
    line = {"color": MUTED, "width": 1, "dash": "dot"}
    return {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": value, "x1": value, "line": line}


def _table(group: Sequence[Outcome], names: Sequence[str]) -> Table:
    """Times of everybody; for operations speed and share of the copy's, then the ratios."""
    is_model = isinstance(group[0].case, ModelCase)
    others = [name for name in names if name != OURS]
    heads = ["Case", "normwise, ms", *([] if is_model else ["GB/s", "% of copy", "copy, ms"])]
    heads += [f"{name} / normwise" for name in others]
    return table(*heads, rows=[_row(outcome, others) for outcome in group])


def _row(outcome: Outcome, others: Sequence[str]) -> tuple[str, ...]:
    speed, percent = outcome.speed(OURS), outcome.percent(OURS)
    rates = () if speed is None or percent is None else (f"{speed:.1f}", f"{percent:.0f}")
    copy = (screen.milliseconds(outcome, COPY),) if COPY in outcome.timed else ()
    ratios = (screen.ratio(outcome, name) for name in others)
    return _label(outcome), screen.milliseconds(outcome, OURS), *rates, *copy, *ratios
