"""What a study shows while it runs."""

import io

from rich.console import Console

from normwise.tuning.progress import Lines, LiveView, Silent, Tally, watch
from normwise.tuning.records import Direction, Record, Request, Settings


def settings(direction: Direction = "max") -> Settings:
    return Settings("mlp", "digits", (("batch", "batch"), ("none", "none")), direction=direction)


def record(norm: str, lr: float, score: float | None, phase: str = "select") -> Record:
    outcome = "diverged" if score is None else "trains"
    return Record(Request(phase, norm, lr, 0, 200), outcome, score)  # type: ignore[arg-type]


def test_the_best_so_far_is_of_selection_and_in_the_metrics_direction() -> None:
    up, down = Tally(settings()), Tally(settings("min"))
    for tally in (up, down):
        for lr, score in ((0.1, 90.0), (0.5, 95.0), (1.0, 92.0), (64.0, None)):
            tally.add(record("batch", lr, score))
        tally.add(record("batch", 2.0, 99.0, "confirm"))
    assert up.lead("batch") == "95 % at learning rate 0.5"
    assert down.lead("batch") == "90 % at learning rate 0.1"
    assert up.lead("none") == "no trial trained yet"


def test_the_time_left_counts_this_run_only() -> None:
    now = 0.0
    tally = Tally(settings(), clock=lambda: now)
    tally.start(10, [record("batch", 0.1, 90.0)] * 4)
    assert tally.line() == "4 of about 10 trials"
    now = 6.0
    tally.add(record("batch", 0.1, 90.0))
    tally.add(record("batch", 0.1, 90.0))
    assert tally.line() == "6 of about 10 trials, about 12 s left"


def test_more_trials_than_expected_are_no_more_than_all() -> None:
    tally = Tally(settings())
    tally.start(1, [])
    for _ in range(3):
        tally.add(record("batch", 0.1, 90.0))
    assert tally.line() == "3 of about 3 trials"


def test_plain_lines_are_few() -> None:
    now = 0.0
    text = io.StringIO()
    lines = Lines(settings(), Console(file=text, width=40), clock=lambda: now)
    lines.start(100, [])
    for second in range(25):
        now = float(second)
        lines.finished(record("batch", 0.1, 90.0))
    lines.say("[brackets] stay, and a line longer than the console is wide is not broken in two")
    lines.stop()
    assert text.getvalue().splitlines() == [
        "0 of about 100 trials",
        "11 of about 100 trials, about 1 min 21 s left",
        "21 of about 100 trials, about 1 min 15 s left",
        "[brackets] stay, and a line longer than the console is wide is not broken in two",
    ]


def test_the_live_view_shows_each_normalization() -> None:
    text = io.StringIO()
    view = LiveView(settings(), Console(file=text, force_terminal=True, width=100, color_system=None))
    view.start(10, [record("batch", 0.1, 90.0)])
    view.finished(record("none", 0.5, 80.0))
    view.say("a word")
    view.stop()
    shown = text.getvalue()
    assert "2 of about 10 trials" in shown
    assert "best so far 90 % at learning rate 0.1" in shown
    assert "best so far 80 % at learning rate 0.5" in shown
    assert "a word" in shown


def test_where_standard_error_goes_decides() -> None:
    assert isinstance(watch(settings(), shown=False), Silent)
    assert isinstance(watch(settings(), shown=True), Lines)
