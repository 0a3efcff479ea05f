"""Rounds with a clock of our own: who runs when, what is repeated, and what the statistics are."""

from __future__ import annotations

from itertools import chain, repeat

import pytest
from bench_stubs import Clock

from normwise.bench.timing import Round, Spread, Timing, clean, measure, spread


def timed(clock: Clock, calls: dict, budget: float = 0.0, yardstick: str | None = None) -> Timing:
    return measure(calls, yardstick, budget, clock=lambda: clock.now, waiting=lambda: clock.waited)


def test_everybody_takes_turns_and_the_order_rotates() -> None:
    clock = Clock()
    found = timed(clock, {name: clock.work(name, 0.01) for name in "abc"})
    warm, rounds = "aabbcc", "abcbcacababcbca"
    assert "".join(clock.calls) == warm + rounds
    assert (len(found.rounds), found.dirty) == (5, 0)


def test_a_short_call_is_repeated_within_a_measurement() -> None:
    clock = Clock()
    found = timed(clock, {"short": clock.work("short", 0.0005), "long": clock.work("long", 0.01)})
    assert clock.calls.count("short") == 2 + 4 * 5  # two of calibration, then 2 ms in each of five rounds
    assert clock.calls.count("long") == 2 + 5
    assert found.seconds("short").median == pytest.approx(0.0005)
    assert found.ratio("long", "short").median == pytest.approx(20)


def test_the_budget_sets_the_number_of_rounds() -> None:
    for budget, rounds in ((0.0, 5), (0.12, 12), (100.0, 25)):
        clock = Clock()
        found = timed(clock, {"a": clock.work("a", 0.004), "b": clock.work("b", 0.0055)}, budget)
        assert len(found.rounds) == rounds


def test_medians_and_quartiles_are_those_of_the_rounds() -> None:
    clock = Clock()
    extra = chain([0.0, 0.0], (0.01, 0.05, 0.02, 0.03, 0.04))
    call = clock.work("a", 1.0, None)

    def varying() -> None:
        call()
        clock.now += next(extra)

    found = timed(clock, {"a": varying})
    assert found.seconds("a") == pytest.approx((1.02, 1.03, 1.04))


def test_a_round_that_waited_for_a_core_is_run_again_and_counted() -> None:
    clock = Clock()
    delays = chain([0.0, 0.0], [0.0, 0.3], repeat(0.0))  # calibration, then the second round waits
    found = timed(clock, {"a": clock.work("a", 1.0, delays), "b": clock.work("b", 0.5)})
    assert (len(found.rounds), found.dirty) == (5, 1)
    assert clock.calls.count("a") == 2 + 6
    assert found.seconds("a").high == pytest.approx(1.0)
    assert found.ratio("a", "b") == pytest.approx((2, 2, 2))


def test_a_round_with_a_slow_yardstick_is_run_again_though_nobody_waited() -> None:
    clock = Clock()
    slow = iter([0.0] * 5 + [0.6])
    copy = clock.work("copy", 1.0)

    def disturbed() -> None:
        copy()
        clock.now += next(slow, 0.0)

    found = timed(clock, {"copy": disturbed, "a": clock.work("a", 2.0)}, yardstick="copy")
    assert (len(found.rounds), found.dirty) == (5, 1)
    assert found.seconds("copy").high == pytest.approx(1.0)
    assert found.ratio("a", "copy").low == pytest.approx(2.0)


def test_repeats_are_bounded_and_those_that_waited_least_count() -> None:
    clock = Clock()
    delays = chain(
        [0.0, 0.0], (0.1 * (10 - at) for at in range(10))
    )  # every round waits, each less than the one before
    found = timed(clock, {"a": clock.work("a", 1.0, delays)})
    assert (len(found.rounds), found.dirty) == (5, 10)
    assert clock.calls.count("a") == 2 + 10
    assert found.seconds("a") == pytest.approx((1.2, 1.3, 1.4))


def test_faults_are_those_of_a_call() -> None:
    rounds = tuple(Round({"a": 1.0}, {"a": faults}, 0.0, 1.0) for faults in (0.0, 7.0, 9.0))
    assert Timing(rounds, 0).faults("a") == 7.0


def test_clean_judges_a_yardstick_by_calm_rounds_only() -> None:
    def one(seconds: float, waited: float = 0.0) -> Round:
        return Round({"copy": seconds}, {"copy": 0.0}, waited, seconds)

    calm, slow = [one(1.0), one(1.1), one(1.2)], one(2.0)
    waiting = [one(9.0, waited=1.0)] * 4
    assert clean([*calm, slow, *waiting], "copy") == calm
    assert clean([*calm, slow, *waiting], None) == [*calm, slow]
    assert clean(waiting, "copy") == []


def test_the_spread_of_one_number() -> None:
    assert spread([2.0]) == Spread(2.0, 2.0, 2.0)
