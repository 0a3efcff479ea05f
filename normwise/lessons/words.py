"""A lesson as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from normwise.lessons.lesson import Cell, Lesson, shown


def text_of(lesson: Lesson) -> str:
    """Claim, setting, what was measured, and the verdict, on lines for a terminal."""
    checks = [
        f"  {'ok ' if check.holds else 'NOT'} {check.what}: {shown(check.measured)}, expected {check.expected}"
        for check in lesson.checks
    ]
    head = [f"{lesson.name}: {lesson.claim}", f"setting ({lesson.size}): {lesson.setting}"]
    return "\n".join([*head, "", *grid(lesson.table), "", *checks, f"verdict: {lesson.verdict}"])


def grid(rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    """Rows as lines with aligned columns; text to the left, numbers to the right.

    >>> grid([{"norm": "batch", "error": 17.25}, {"norm": "none", "error": None}])
    ['norm   error', 'batch  17.25', 'none       -']
    """
    columns = list(rows[0])
    cells = [[shown(row[column]) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[at]) for line in cells)) for at, column in enumerate(columns)]
    text = [isinstance(rows[0][column], str) for column in columns]
    lines = [columns, *cells]
    return ["  ".join(_set(cell, widths[at], text[at]) for at, cell in enumerate(line)).rstrip() for line in lines]


def _set(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)
