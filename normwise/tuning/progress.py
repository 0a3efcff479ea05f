"""How a study shows that it is under way: a live view on a terminal, plain lines elsewhere, on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from normwise.tuning.records import Record, Settings

_LINE_SECONDS = 10.0  # between two lines where there is no terminal


class Progress(Protocol):
    """What a study tells whoever watches it."""

    def start(self, expected: int, records: Iterable[Record]) -> None:
        """The number of trials to come in all, about, and those that are there already."""
        ...

    def finished(self, record: Record) -> None:
        """One more trial has finished."""
        ...

    def say(self, message: str) -> None:
        """Something that a person should know."""
        ...

    def stop(self) -> None:
        """The study has ended, one way or the other."""
        ...


class Silent:
    """Says nothing."""

    def start(self, expected: int, records: Iterable[Record]) -> None:
        """Nothing."""

    def finished(self, record: Record) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Tally:
    """What has been seen so far: how many trials, the best score of each normalization, the time left."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings, self._clock = settings, clock
        self.done = self.expected = self._before = 0
        self.best: dict[str, Record | None] = {label: None for label, _ in settings.norms}
        self._started = clock()

    def start(self, expected: int, records: Iterable[Record]) -> None:
        """Begin with what an earlier run has done."""
        for record in records:
            self.add(record)
        self.expected, self._before, self._started = expected, self.done, self._clock()

    def add(self, record: Record) -> None:
        """Count a trial in."""
        self.done += 1
        self.expected = max(self.expected, self.done)
        best = self.best[record.request.norm]
        if record.request.phase == "select" and record.score is not None and self._beats(record.score, best):
            self.best[record.request.norm] = record

    def left(self) -> float | None:
        """Seconds until the end at the pace so far; None before the first trial."""
        fresh = self.done - self._before
        return (self._clock() - self._started) / fresh * (self.expected - self.done) if fresh else None

    def _beats(self, score: float, best: Record | None) -> bool:
        if best is None or best.score is None:
            return True
        return score > best.score if self.settings.direction == "max" else score < best.score

    def line(self) -> str:
        """One line: trials done, time left."""
        left = self.left()
        return f"{self.done} of about {self.expected} trials" + (f", about {span(left)} left" if left else "")

    def lead(self, label: str) -> str:
        """The best score of a normalization and the learning rate it was reached at."""
        best = self.best[label]
        if best is None or best.score is None:
            return "no trial trained yet"
        unit = f" {self.settings.unit}" if self.settings.unit else ""
        return f"{best.score:.4g}{unit} at learning rate {best.request.lr:.3g}"


class Lines:
    """Plain lines, at most one in ten seconds."""

    def __init__(self, settings: Settings, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._tally, self._console, self._clock, self._last = Tally(settings, clock), console, clock, clock()

    def start(self, expected: int, records: Iterable[Record]) -> None:
        """The first line."""
        self._tally.start(expected, records)
        self.say(self._tally.line())

    def finished(self, record: Record) -> None:
        """A line, if the last one is old enough."""
        self._tally.add(record)
        if self._clock() - self._last >= _LINE_SECONDS:
            self.say(self._tally.line())

    def say(self, message: str) -> None:
        """A line at once."""
        self._last = self._clock()
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Nothing to take down."""


class LiveView:
    """A bar, the time left, and the best so far of each normalization, redrawn in place."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self._tally, self._console = Tally(settings), console
        self._live: Live | None = None

    def start(self, expected: int, records: Iterable[Record]) -> None:
        """Draw the view."""
        self._tally.start(expected, records)
        self._live = Live(get_renderable=self._view, console=self._console, refresh_per_second=4, transient=True)
        self._live.start()

    def finished(self, record: Record) -> None:
        """Count it; the view is redrawn by itself."""
        self._tally.add(record)

    def say(self, message: str) -> None:
        """A line above the view."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the view down."""
        if self._live is not None:
            self._live.stop()

    def _view(self) -> Table:
        tally = self._tally
        view = Table.grid(padding=(0, 2))
        view.add_row(ProgressBar(total=max(tally.expected, 1), completed=tally.done, width=24), tally.line())
        for label in tally.best:
            view.add_row(f"  {label}", f"best so far {tally.lead(label)}")
        return view


def watch(settings: Settings, *, shown: bool) -> Progress:
    """The right view for where standard error goes."""
    if not shown:
        return Silent()
    console = Console(stderr=True)
    return LiveView(settings, console) if console.is_terminal else Lines(settings, console)


def span(seconds: float) -> str:
    """A time as a person says it.

    >>> span(7.2), span(100), span(7260)
    ('7 s', '1 min 40 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
