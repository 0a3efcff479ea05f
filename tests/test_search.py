import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from normwise.diagnose.lattice import STEP, rate, rung
from normwise.errors import StudyError
from normwise.tuning.outcomes import best_rate, diverge_edge, train_edges
from normwise.tuning.rates import RANGES, declared_rates
from normwise.tuning.records import Record, Request, Settings
from normwise.tuning.search import (
    confirmation_scores,
    expected_trials,
    imputed_score,
    next_requests,
    reference_loss,
    selection,
)
from normwise.tuning.seeds import seeds

CHANCE = math.log(10)
TWO = Settings("mlp", "digits", (("batch", "batch"), ("none", "none")), seeds=2, confirm=3, steps=100)


def network(request, *, best=-1.0, edge=2.0, diverges=4.0):
    """A trial of a network with a best rate, a training edge and a divergence edge, in octaves."""
    octave = math.log2(request.lr)
    if octave >= diverges:
        return Record(request, "diverged", first_loss=2.4)
    if octave > edge:
        return Record(request, "stuck", 10.0, 2.4, tail_loss=2.3, val_loss=2.3)
    score = 95 - (octave - best) ** 2
    loss = min(0.1 + (octave - best) ** 2 / 50, 2.3)
    return Record(request, "trains" if loss < CHANCE / 2 else "stuck", score, 2.4, loss, loss)


def run(settings, trial, records=(), chance=CHANCE):
    records = list(records)
    while requests := next_requests(settings, records, chance=chance):
        records += [trial(request) for request in requests]
    return records


def in_octaves(lr):
    return math.log2(lr)


# -------------------------------------------------------------------------------------------------- what it finds


@pytest.mark.parametrize(
    ("best", "edge", "diverges"), [(-1, 2, 4), (-3, -1.5, 0), (0.5, 6, 9.5), (-11, -10, -9), (1, 3, 99)]
)
def test_the_optimum_and_the_edges_are_found_to_half_an_octave(best, edge, diverges):
    settings = replace(TWO, norms=(("batch", "batch"),))
    records = run(settings, lambda r: network(r, best=best, edge=edge, diverges=diverges))
    trials = selection(settings, records, "batch")
    assert abs(in_octaves(best_rate(trials, "max")) - best) <= 0.5
    loosest = train_edges(trials, CHANCE)["0.9"]
    assert edge - 0.5 < in_octaves(loosest.high) <= edge
    found = diverge_edge(trials)
    if diverges < 12:
        assert diverges <= in_octaves(found.low) < diverges + 0.5
    else:
        assert (found.mean, found.censored, found.seeds) == (rate(RANGES["sgd"].cap), 2, 2)


def test_each_threshold_has_its_own_edge():
    settings = replace(TWO, norms=(("batch", "batch"),))

    def rising(request):  # the loss at the end passes 0.25, 0.5 and 0.9 of chance at 0, 1.5 and 3 octaves
        octave = math.log2(request.lr)
        loss = CHANCE * (0.25 * 2 ** (octave / 1.5)) if octave < 3.1 else CHANCE
        return Record(request, "trains" if loss < CHANCE / 2 else "stuck", 95 - abs(octave + 2), 2.4, loss, loss)

    edges = train_edges(selection(settings, run(settings, rising), "batch"), CHANCE)
    assert {share: in_octaves(edge.mean) for share, edge in edges.items()} == pytest.approx(
        {"0.9": 2.5, "0.5": 1.0, "0.25": -0.5}
    )


def test_seeds_have_edges_of_their_own():
    settings = replace(TWO, norms=(("batch", "batch"),))
    records = run(settings, lambda r: network(r, edge=1.0 if r.seed % 2 else 5.0, diverges=6.0 if r.seed % 2 else 8.0))
    trials = selection(settings, records, "batch")
    edge = train_edges(trials, CHANCE)["0.9"]
    assert (in_octaves(edge.low), in_octaves(edge.high), in_octaves(edge.mean)) == pytest.approx((1.0, 5.0, 3.0))
    assert (in_octaves(diverge_edge(trials).low), in_octaves(diverge_edge(trials).high)) == pytest.approx((6.0, 8.0))


def test_the_search_looks_past_the_first_failure():
    settings = replace(TWO, norms=(("batch", "batch"),))

    def gap(request):  # trains up to 4, not at 4 to 12, again at 16
        octave = math.log2(request.lr)
        return network(request, edge=4.2, diverges=9) if not 1.5 < octave < 3.9 else network(request, edge=-99)

    assert train_edges(selection(settings, run(settings, gap), "batch"), CHANCE)["0.9"].mean == pytest.approx(16.0)


def test_rates_per_normalization_stay_affordable():
    settings = replace(TWO, norms=(("batch", "batch"),))
    for best, edge, diverges in ((-1, 2, 4), (-2, -1.3, 0), (0.5, 3.2, 99), (-1, 1.7, 8.5)):
        records = run(settings, lambda r, b=best, e=edge, d=diverges: network(r, best=b, edge=e, diverges=d))
        assert 10 <= len(selection(settings, records, "batch")) <= 20


# ------------------------------------------------------------------------------------------------- the order of things


def test_every_normalization_first_runs_the_same_declared_range():
    first = next_requests(TWO, [], chance=CHANCE)
    assert {r.norm: {q.lr for q in first if q.norm == r.norm} for r in first} == {
        label: set(declared_rates(TWO)) for label, _ in TWO.norms
    }
    assert len(first) == 2 * 2 * len(declared_rates(TWO))
    assert {r.phase for r in first} == {"select"}


@pytest.mark.parametrize("optimizer", RANGES)
def test_ranges_step_by_a_factor_of_four_and_leave_room_on_both_sides(optimizer):
    rates, span = declared_rates(replace(TWO, optimizer=optimizer)), RANGES[optimizer]
    assert {high / low for low, high in pairwise(rates)} == {4.0}
    assert span.floor <= span.low - STEP
    assert span.cap >= span.high + STEP


def test_confirmation_waits_for_every_selection_and_runs_at_the_best_rate():
    records = run(TWO, network)
    at = next(i for i, r in enumerate(records) if r.request.phase == "confirm")
    assert all(r.request.phase == "select" for r in records[:at])
    confirmed = [r.request for r in records if r.request.phase == "confirm"]
    for label, _ in TWO.norms:
        own = [r for r in confirmed if r.norm == label]
        assert {r.lr for r in own} == {best_rate(selection(TWO, records, label), "max")}
        assert tuple(r.seed for r in own) == seeds(TWO, label, "confirm")
        assert {r.steps for r in own} == {100}


def test_the_horizon_repeats_the_two_leaders_at_twice_the_steps():
    three = replace(TWO, norms=(("low", "none"), ("high", "batch"), ("middle", "layer")))
    lift = {"low": -5.0, "high": 0.0, "middle": -2.0}
    records = run(three, lambda r: replace(network(r), score=network(r).score and network(r).score + lift[r.norm]))
    horizon = [r.request for r in records if r.request.phase == "horizon"]
    confirm = [r.request for r in records if r.request.phase == "confirm" and r.request.norm != "low"]
    assert set(horizon) == {replace(r, phase="horizon", steps=200) for r in confirm}
    assert len(horizon) == 6


def test_no_horizon_without_steps_or_without_a_rival():
    for settings in (replace(TWO, steps=None), replace(TWO, norms=(("batch", "batch"),))):
        assert {r.request.phase for r in run(settings, network)} == {"select", "confirm"}


def test_a_normalization_that_always_diverges_is_not_confirmed():
    records = run(TWO, lambda r: network(r, diverges=-99) if r.norm == "none" else network(r))
    assert {r.request.norm for r in records if r.request.phase == "confirm"} == {"batch"}
    tried = selection(TWO, records, "none")
    assert min(tried) == rate(RANGES["sgd"].floor)


def test_a_normalization_that_trains_nowhere_is_confirmed_at_its_best_score():
    records = run(TWO, lambda r: replace(network(r), outcome="stuck", tail_loss=2.3, val_loss=2.3))
    assert {r.request.norm for r in records if r.request.phase == "confirm"} == {"batch", "none"}


def test_a_fixed_grid_runs_exactly_its_rates():
    settings = replace(TWO, lrs=(0.3, 0.1, 0.3))
    records = run(settings, network)
    assert declared_rates(settings) == (0.1, 0.3)
    assert {r.request.lr for r in records} == {0.1, 0.3}
    assert len(records) == expected_trials(settings) == 2 * (2 * 2 + 3) + 6


def test_a_loop_without_losses_is_searched_by_its_scores():
    settings = replace(TWO, own_loop=True, steps=None)

    def silent(request):
        octave = math.log2(request.lr)
        return Record(request, "diverged") if octave >= 3 else Record(request, "trains", 90 - (octave + 2) ** 2)

    records = run(settings, silent, chance=None)
    trials = selection(settings, records, "batch")
    assert best_rate(trials, "max") == 0.25
    assert diverge_edge(trials).mean == 8.0
    assert reference_loss(settings, records, None) is None


def test_chance_is_the_median_first_loss_where_it_is_not_known():
    settings = replace(TWO, own_loop=True, lrs=(0.1, 0.2))
    firsts = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 90.0])
    records = [Record(r, "trains", 50.0, first_loss=next(firsts)) for r in next_requests(settings, [])]
    assert reference_loss(settings, records, None) == 4.5
    assert reference_loss(settings, records, 2.3) == 2.3


# ----------------------------------------------------------------------------------------------------------- seeds


def test_no_seed_is_used_twice():
    many = replace(TWO, norms=tuple((f"n{i}", "batch") for i in range(5)), seeds=1000, confirm=9000, base_seed=7)
    used = [s for label, _ in many.norms for phase in ("select", "confirm") for s in seeds(many, label, phase)]
    assert len(set(used)) == len(used) == 5 * 10_000
    assert min(used) == 7


@pytest.mark.parametrize(
    ("name", "count", "phase", "most"), [("seeds", 1001, "select", 1000), ("confirm", 9001, "confirm", 9000)]
)
def test_too_many_seeds_are_refused(name, count, phase, most):
    with pytest.raises(StudyError) as caught:
        seeds(replace(TWO, **{name: count}), "batch", phase)
    message = f"{name}={count}: at most {most}, or the seeds of two normalizations would be the same"
    assert str(caught.value) == message


def test_an_optimizer_without_a_range_is_named():
    with pytest.raises(StudyError) as caught:
        next_requests(replace(TWO, optimizer="lion"), [])
    assert str(caught.value) == "optimizer 'lion': no range of learning rates; known: sgd, momentum, adamw"


# --------------------------------------------------------------------------------------------------- imputed scores


def confirmed(label, seed, score):
    return Record(Request("confirm", label, 0.1, seed, 100), "diverged" if score is None else "trains", score)


def test_a_failed_seed_is_given_the_worst_score_or_chance_level():
    records = [confirmed("batch", 1, 90.0), confirmed("batch", 2, None), confirmed("none", 1, 80.0)]
    assert confirmation_scores(TWO, records, None) == {"batch": (90.0, 80.0), "none": (80.0,)}
    assert confirmation_scores(TWO, records, CHANCE)["batch"] == pytest.approx((90.0, 10.0))
    lower = replace(TWO, direction="min", metric="loss", unit="nats")
    assert confirmation_scores(lower, records, CHANCE)["batch"] == (90.0, 90.0)
    assert imputed_score(TWO, [confirmed("batch", 1, None)], None) is None


def test_the_horizon_changes_no_imputed_score():
    records = [
        confirmed("batch", 1, 90.0),
        replace(confirmed("batch", 1, 3.0), request=Request("horizon", "a", 1, 1, 2)),
    ]
    assert imputed_score(TWO, records, None) == 90.0


# ------------------------------------------------------------------------------------------------------ properties


def chaotic(salt):
    """Outcomes without any order: every trial draws its own."""

    def trial(request):
        draw = random.Random(f"{salt} {request}")
        outcome = draw.choice(["trains", "stuck", "diverged"])
        if outcome == "diverged":
            return Record(request, outcome, first_loss=draw.choice([None, 2.3]))
        loss = draw.uniform(0, 3)
        return Record(request, outcome, draw.uniform(0, 100), 2.3, loss, draw.choice([None, loss]))

    return trial


STUDIES = st.builds(
    Settings,
    model=st.just("m"),
    data=st.just("d"),
    norms=st.sampled_from([(("a", "batch"),), (("a", "batch"), ("b", "none"))]),
    lrs=st.sampled_from([None, None, (0.1, 1.0)]),
    seeds=st.integers(1, 3),
    confirm=st.integers(1, 3),
    steps=st.sampled_from([None, 50]),
    optimizer=st.sampled_from(sorted(RANGES)),
    direction=st.sampled_from(["max", "min"]),
    own_loop=st.booleans(),
)
CHANCES = st.sampled_from([None, 2.3])


@given(STUDIES, st.integers(), CHANCES)
@given_settings(max_examples=40, deadline=None)
def test_it_ends_and_never_repeats_a_request(settings, salt, chance):
    records, trial = [], chaotic(salt)
    while requests := next_requests(settings, records, chance=chance):
        assert len(set(requests)) == len(requests)
        assert not set(requests) & {r.request for r in records}
        records += [trial(request) for request in requests]
    assert len(records) < 2 * (90 * 3 + 3) + 6


@given(STUDIES, st.integers(), CHANCES, st.randoms(use_true_random=False))
@given_settings(max_examples=25, deadline=None)
def test_the_order_and_number_in_which_trials_finish_change_nothing(settings, salt, chance, order):
    trial, records = chaotic(salt), []
    while requests := list(next_requests(settings, records, chance=chance)):
        order.shuffle(requests)
        finished = requests[: order.randint(1, len(requests))]
        records = [*records, *map(trial, finished)]
        order.shuffle(records)
    expected = run(settings, trial, chance=chance)
    assert {r.request for r in records} == {r.request for r in expected}


@given(STUDIES, st.integers(), CHANCES, st.floats(0, 1))
@given_settings(max_examples=25, deadline=None)
def test_a_study_resumes_from_any_prefix_of_its_records(settings, salt, chance, share):
    full = run(settings, chaotic(salt), chance=chance)
    prefix = [Record.from_dict(r.to_dict()) for r in full[: int(share * len(full))]]
    resumed = run(settings, chaotic(salt), records=prefix, chance=chance)
    assert {r.request: r for r in resumed} == {r.request: r for r in full}


@given(st.integers(-80, 80))
def test_rungs_and_rates_are_inverse_and_exact_after_doubling(k):
    assert rung(rate(k)) == k
    assert rate(k + 2) == 2 * rate(k)
