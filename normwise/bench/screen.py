"""The results as text: one line a case while it is measured, tables at the end."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from normwise.bench.cases import ModelCase
from normwise.bench.compare import Comparison
from normwise.bench.operations import COPY, OURS, TORCH
from normwise.bench.results import Outcome
from normwise.report.words import number

MISSING = "-"
_WIDTH = 150  # where there is no terminal to ask


def line(outcome: Outcome) -> str:
    """What a case gave, in a line.

    >>> from normwise.bench.cases import ModelCase
    >>> line(Outcome(ModelCase("llama", "training"), {}, {"normwise": "the output is off by 0.2"}, {}, 0, 0))
    'llama training: FAILED, not timed: the output is off by 0.2'
    """
    if OURS not in outcome.timed:
        return f"{outcome.case}: FAILED, not timed: {outcome.excluded[OURS]}"
    parts = [f"{outcome.case}: {milliseconds(outcome, OURS)} ms"]
    percent = outcome.percent(OURS)
    parts += [] if percent is None else [f"{percent:.0f} % of the copy's speed"]
    parts += [f"{name} {ratio(outcome, name)}x" for name in outcome.timed if name not in (OURS, COPY)]
    return ", ".join(parts)


def milliseconds(outcome: Outcome, name: str) -> str:
    """The median time of a call, and half the distance of its quartiles; a question mark if it was disturbed."""
    low, median, high = outcome.timed[name].seconds
    return f"{number(1e3 * median)} ± {number(5e2 * (high - low), 1)}{'' if outcome.is_quiet else ' ?'}"


def ratio(outcome: Outcome, name: str) -> str:
    """A contender's time over normwise's; a star marks one whose numbers are inexact."""
    if name not in outcome.timed:
        return MISSING
    return f"{outcome.timed[name].ratio.median:.2f}{'*' if name in outcome.inexact else ''}"


def others(outcomes: Sequence[Outcome]) -> list[str]:
    """Everybody who took part, but for normwise's eager layer and the copy."""
    return list(dict.fromkeys(name for one in outcomes for name in one.timed if name not in (OURS, COPY)))


def show(outcomes: Sequence[Outcome]) -> None:
    """Print a table of the models and one of the operations, and what has to be known to read them."""
    console = _console()
    models = [one for one in outcomes if isinstance(one.case, ModelCase)]
    operations = [one for one in outcomes if not isinstance(one.case, ModelCase)]
    for title, group in (("Whole models", models), ("Operations", operations)):
        if group:
            console.print(f"{title}; the others' times as multiples of normwise's")
            console.print(_table(group))
    for text in remarks(outcomes):
        console.print(Text(text))


def remarks(outcomes: Sequence[Outcome]) -> list[str]:
    """What has to be known to read the tables: failures, stars, disturbed rounds."""
    failed = [f"FAILED, not timed: {one.case}: {one.excluded[OURS]}" for one in outcomes if OURS in one.excluded]
    left = [f"left out: {one.case}: {n}: {why}" for one in outcomes for n, why in one.excluded.items() if n != OURS]
    stars = [f"* {one.case}: {name}: {why}" for one in outcomes for name, why in one.inexact.items()]
    busy = sum(not one.is_quiet for one in outcomes)
    doubts = [f"? most rounds of {busy} of {len(outcomes)} cases were disturbed: the machine is busy"] if busy else []
    return [*failed, *left, *stars, *doubts]


def changes(comparison: Comparison) -> str:
    """What moved against an earlier run, in lines."""
    head = f"{len(comparison.moves)} of {comparison.compared} times moved"
    return "\n".join([*(f"note: {note}" for note in comparison.notes), head, *map(str, comparison.moves)])


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def _table(group: Sequence[Outcome]) -> Table:
    is_model = isinstance(group[0].case, ModelCase)
    compared = others(group)
    table = Table(box=None, pad_edge=False)
    table.add_column("case", no_wrap=True)
    columns = ["normwise, ms", *([] if is_model else ["GB/s", "% of copy"]), *compared]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=name == columns[0])
    for outcome in group:
        table.add_row(*_row(outcome, compared))
    return table


def _row(outcome: Outcome, compared: Sequence[str]) -> list[str]:
    if OURS not in outcome.timed:
        return [str(outcome.case), "FAILED"]
    speed, percent = outcome.speed(OURS), outcome.percent(OURS)
    rates = [] if speed is None or percent is None else [f"{speed:.1f}", f"{percent:.0f}"]
    return [str(outcome.case), milliseconds(outcome, OURS), *rates, *(ratio(outcome, name) for name in compared)]


def headline(outcomes: Sequence[Outcome]) -> str:
    """Whole models in one sentence; nothing where none was timed."""
    parts = [
        f"{one.case} {one.timed[TORCH].ratio.median:.2f}"
        for one in outcomes
        if isinstance(one.case, ModelCase) and TORCH in one.timed
    ]
    return f"A step with torch's layers, over one with normwise's: {', '.join(parts)}." if parts else ""
