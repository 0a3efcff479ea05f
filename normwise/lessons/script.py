"""The command line of a single lesson: its table, its verdict, its page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from normwise.lessons.lesson import Lesson, Measure
from normwise.lessons.words import text_of


def tell(measure: Measure, arguments: Sequence[str] | None = None) -> None:
    """Measure a lesson and print it, as `python examples/lessons/linear.py [--small] [--plot FILE.html]` does.

    The exit code is 1 where the claim was not reproduced.
    """
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--small", action="store_true", help="the size that continuous integration runs")
    parser.add_argument("--plot", type=Path, metavar="FILE.html", help="write a page with the plot")
    options = parser.parse_args(arguments)
    lesson = measure("small" if options.small else "full")
    sys.stdout.write(text_of(lesson) + "\n")
    if options.plot:
        _write(lesson, options.plot)
    if not lesson.reproduced:
        raise SystemExit(1)


def _write(lesson: Lesson, path: Path) -> None:
    from normwise.lessons.page import write

    sys.stdout.write(f"page: {write([lesson], path)}\n")
