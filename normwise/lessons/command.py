"""The command `normwise lessons`: what is said of normalization, measured here, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normwise.console import plainly

if TYPE_CHECKING:
    from normwise.lessons.lesson import Lesson

app = typer.Typer()


@app.command()
def lessons(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Which lessons. [default: all of them]")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="The size of continuous integration: about a minute, instead of several.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("lessons.html"),
    workers: Annotated[int, typer.Option(min=0, help="Lessons at a time; 0: in this process.")] = 2,
) -> None:
    """Measure what is said of normalization: claim, setting, numbers, verdict, and a plot of each on one page.

    The exit code is 1 where a claim is not reproduced.
    """
    with plainly():
        from normwise.lessons.gather import NAMES, run
        from normwise.lessons.page import check_place, write

        chosen = tuple(dict.fromkeys(names or NAMES))
        check_place(out)
        done: list[Lesson] = []

        def tell(lesson: Lesson) -> None:
            done.append(lesson)
            typer.echo(f"{len(done)} of {len(chosen)}: {lesson.name} {lesson.verdict}", err=True)

        found = run(chosen, "small" if small else "full", workers=workers, progress=tell)
        page = write(found, out)
        typer.echo("\n".join([*_table(found), "", f"page: {page}"]))
    if not all(lesson.reproduced for lesson in found):
        raise typer.Exit(1)


def _table(found: Sequence[Lesson]) -> list[str]:
    """One line a number that decides."""
    from normwise.lessons.lesson import shown
    from normwise.lessons.words import grid

    return grid(
        [
            {
                "lesson": lesson.name,
                "number": check.what,
                "expected": check.expected,
                "measured": shown(check.measured),
                "holds": "yes" if check.holds else "NO",
            }
            for lesson in found
            for check in lesson.checks
        ]
    )
