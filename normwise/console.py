"""How every command of the command line speaks: errors in one line, shapes as numbers with commas."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from normwise.errors import NormwiseError, StudyError


@contextmanager
def plainly() -> Iterator[None]:
    """Errors as one line on standard error: exit code 2 for what was asked wrongly, 130 for Ctrl-C."""
    try:
        yield
    except NormwiseError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        typer.echo(str(error) or "interrupted", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None


def shape_of(text: str) -> tuple[int, ...]:
    """The shape that is written so.

    Raises:
        StudyError: it is no list of whole numbers.

    >>> shape_of("32,64,56,56")
    (32, 64, 56, 56)
    """
    sizes = text.split(",")
    if not all(size.strip().isdecimal() for size in sizes):
        raise StudyError(f"shape {text!r}: write whole numbers with commas between them, as in 32,64,56,56")
    return tuple(int(size) for size in sizes)
