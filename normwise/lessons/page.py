"""Lessons on one self-contained page, in the style of the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from normwise.errors import StudyError
from normwise.lessons.lesson import Check, Lesson, shown
from normwise.report.figures import Figure, Json, Mark, axis, layout, legend_entry, plain
from normwise.report.paper import script, template, written
from normwise.report.tables import Column, Table, table

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon")


def render(lessons: Sequence[Lesson]) -> str:
    """The lessons as one HTML page with scripts and styles inside; nothing is loaded from anywhere.

    >>> from normwise.lessons import Chart
    >>> chart = Chart("A <title>", "x", "y", {"one": ([1, 2], [3.0, 4.0])})
    >>> checks = (Check("ratio", 2.0, low=1.0),)
    >>> page = render([Lesson("sums", "One and one is two.", "paper", ({"a": 1},), checks, chart, "small")])
    >>> "One and one is two." in page, "A &lt;title&gt;" in page, "Reproduced" in page
    (True, True, True)
    """
    figures = [_figure(lesson) for lesson in lessons]
    reproduced = sum(lesson.reproduced for lesson in lessons)
    return template("lessons.html", "normwise.lessons").render(
        lessons=list(zip(lessons, figures, (_checks(lesson.checks) for lesson in lessons), strict=True)),
        overview=_overview(lessons),
        answer=f"{reproduced} of {len(lessons)} claims reproduced.",
        sizes=" and ".join(dict.fromkeys(lesson.size for lesson in lessons)),
        drawings=[figure.drawing for figure in figures],
        plotly=script(),
    )


def write(lessons: Sequence[Lesson], path: str | os.PathLike[str]) -> Path:
    """Write the page, all of it or nothing.

    Raises:
        StudyError: the file cannot be written.
    """
    return written(render(lessons), path, "lessons")


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuse a place that no page can be written to, before minutes are spent on what it would say.

    Raises:
        StudyError: there is no such folder, or the path is one.
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        why = "it is a folder" if target.is_dir() else f"there is no folder {target.parent}"
        raise StudyError(f"cannot write the lessons to {target}: {why}. Give a file name in a folder that exists.")


def _overview(lessons: Sequence[Lesson]) -> Table:
    rows = [(lesson.name.replace("_", " "), lesson.claim, lesson.verdict) for lesson in lessons]
    return table("Lesson", "Claim", "Verdict", rows=rows)


def _checks(checks: Sequence[Check]) -> Table:
    columns = (Column("Number"), Column("Expected"), Column("Measured"), Column("Holds"), Column("Slack"))
    rows = [
        (check.what, check.expected, shown(check.measured), "yes" if check.holds else "no", check.why)
        for check in checks
    ]
    return Table(columns, tuple(rows))


def _figure(lesson: Lesson) -> Figure:
    chart, columns = lesson.chart, list(lesson.table[0])
    cells = tuple(tuple(shown(row[column]) for column in columns) for row in lesson.table)
    draw = _bars if chart.bars else _lines
    traces = [trace for at, name in enumerate(chart.series) for trace in draw(name, _look(at), *chart.series[name])]
    return Figure(
        name=f"chart-{lesson.name}",
        title=chart.title,
        finding="",
        reading="",
        table=table(*columns, rows=cells),
        traces=traces,
        layout=layout(
            400,
            barmode="group",
            xaxis=axis(chart.x, type="category" if chart.bars else "log" if "x" in chart.log else "linear"),
            yaxis=axis(chart.y, type="log" if "y" in chart.log else "linear"),
        ),
    )


def _look(at: int) -> Mark:
    """How the series in that place looks: seven colours, five symbols."""
    return Mark(f"var(--series-{at % 7})", _SYMBOLS[at % len(_SYMBOLS)], "solid")


def _lines(name: str, look: Mark, xs: Sequence[object], ys: Sequence[object]) -> list[Json]:
    drawn = {"x": list(xs), "y": list(ys), "legendgroup": name, "showlegend": False, "hoverinfo": "x+y"}
    marker = {"color": look.colour, "symbol": look.symbol, "size": 8, "maxdisplayed": 12}
    return [legend_entry(name, look), {**legend_entry(name, look), **drawn, "marker": marker}]


def _bars(name: str, look: Mark, xs: Sequence[object], ys: Sequence[object]) -> list[Json]:
    labels = [plain(str(x)) for x in xs]
    return [{"type": "bar", "name": plain(name), "x": labels, "y": list(ys), "marker": {"color": look.colour}}]
