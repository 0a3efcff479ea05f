"""Points drawn by a sampler: the same for all who ask, diverged ones told, and halving inside a normalization."""

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from studies import summary

from normwise.tuning.points import missing_points, trials_by_points
from normwise.tuning.records import Record, Request, Settings
from normwise.tuning.samplers import BATCH, Point, Told, draw
from normwise.tuning.search import best_choices, expected_budget, next_requests
from normwise.tuning.summary import rows

CHANCE = math.log(10)
NORMS = (("batch", "batch"), ("none", "none"))
AXES = (("batch_size", (8, 32)), ("optimizer", ("sgd", "adamw")))
BASE = Settings("mlp", "digits", NORMS, seeds=2, confirm=3, steps=90, axes=AXES, batch_size=8)
TPE = replace(BASE, sampler="tpe", trials=20)
QMC = replace(BASE, sampler="qmc", trials=20)
HALVED = replace(TPE, trials=18, prune=True)
SAMPLED = pytest.mark.parametrize(
    "settings", [TPE, QMC, HALVED, replace(QMC, prune=True)], ids=["tpe", "qmc", "tpe-halved", "qmc-halved"]
)


def network(request: Request) -> Record:
    """A network that wants SGD at 2**-1 and batches of 32; longer is better; it diverges from 2**1.5."""
    octave = math.log2(request.lr)
    if octave >= 1.5:
        return Record(request, "diverged", first_loss=2.4)
    best = dict(request.variant)
    score = 90 - 2 * abs(octave + 1) - 5 * (best["batch_size"] == 8) - 9 * (best["optimizer"] == "adamw")
    return Record(request, "trains", score + (request.steps or 0) / 45 + request.seed % 3 / 10, 2.4, 0.2, val_loss=0.2)


def run(settings: Settings, trial: Any = network, seed: int = 0) -> list[Record]:
    """A whole study, whose trials finish in any order and are asked about in between."""
    records: list[Record] = []
    shuffle = random.Random(seed).shuffle
    while requests := list(next_requests(settings, records, chance=CHANCE)):
        shuffle(requests)
        records += [trial(request) for request in requests[: max(1, 2 * len(requests) // 3)]]
        shuffle(records)
    return records


def selected(records: list[Record], label: str) -> list[Request]:
    return [r.request for r in records if r.request.phase == "select" and r.request.norm == label]


# ----------------------------------------------------------------------------------------------------------- the points


@SAMPLED
def test_a_study_is_the_same_whatever_the_order_in_which_its_trials_finish(settings: Settings) -> None:
    first, second = ({r.request for r in run(settings, seed=seed)} for seed in (0, 1))
    assert first == second


@pytest.mark.parametrize("settings", [TPE, QMC], ids=["tpe", "qmc"])
def test_every_point_runs_on_every_selection_seed(settings: Settings) -> None:
    for label in ("batch", "none"):
        asked = selected(run(settings), label)
        points = Counter((request.lr, request.variant) for request in asked)
        assert len(points) == 20
        assert set(points.values()) == {2}
        assert {request.steps for request in asked} == {90}


@SAMPLED
def test_rates_lie_in_the_range_of_the_points_own_optimizer(settings: Settings) -> None:
    asked = selected(run(settings), "batch")
    for name, low, high in (("sgd", 2**-8, 4.0), ("adamw", 2**-14, 2**-4)):
        rates = [request.lr for request in asked if dict(request.variant)["optimizer"] == name]
        assert rates
        assert low <= min(rates) <= max(rates) <= high
    assert {dict(request.variant)["batch_size"] for request in asked} == {8, 32}


def test_a_grid_that_was_given_is_the_range_to_draw_from() -> None:
    rates = [request.lr for request in next_requests(replace(QMC, lrs=(0.1, 0.2)), [])]
    assert 0.1 <= min(rates) < 0.12 < 0.18 < max(rates) <= 0.2


def test_normalizations_and_studies_draw_points_of_their_own() -> None:
    batch, none = (missing_points(QMC, label, {}) for label in ("batch", "none"))
    assert not {r.lr for r in batch} & {r.lr for r in none}
    assert not {r.lr for r in batch} & {r.lr for r in missing_points(replace(QMC, base_seed=1), "batch", {})}


def test_quasi_random_points_fill_the_range_evenly() -> None:
    heights = sorted(point.height for point in draw(replace(QMC, axes=()), 0, 0, (), 65)[1:])
    assert max(abs(height - (i + 0.5) / 64) for i, height in enumerate(heights)) < 1.5 / 64


def test_quasi_random_points_are_all_known_at_once_and_tpe_waits_for_its_batch() -> None:
    assert len(missing_points(QMC, "batch", {})) == 20 * 2
    assert len(missing_points(TPE, "batch", {})) == BATCH * 2


def test_tpe_learns_from_what_it_is_told() -> None:
    settings = replace(TPE, axes=())
    good = tuple(Told(Point(h / 40), 90 - abs(h / 40 - 0.7) * 100) for h in range(40))
    near = [point.height for batch in range(1, 6) for point in draw(settings, 0, batch, good, BATCH)]
    lost = tuple(Told(one.point, None if one.point.height > 0.5 else one.score) for one in good)
    far = [point.height for batch in range(1, 6) for point in draw(settings, 0, batch, lost, BATCH)]
    assert sum(abs(height - 0.7) < 0.15 for height in near) > 0.7 * len(near)
    assert sum(height > 0.55 for height in far) < 0.3 * len(far)


@SAMPLED
def test_the_best_point_is_confirmed(settings: Settings) -> None:
    records = run(settings)
    full = [r for r in records if r.request.phase == "select" and r.request.norm == "none" and r.request.steps == 90]
    means: dict[Any, list[float]] = {}
    for record in full:
        means.setdefault((record.request.variant, record.request.lr), []).append(record.score or -math.inf)
    best = max(means, key=lambda point: sum(means[point]))
    assert tuple(best_choices(settings, records)["none"]) == best
    assert dict(best[0]) == {"batch_size": 32, "optimizer": "sgd"}
    assert {(r.request.variant, r.request.lr) for r in records if r.request.phase == "confirm"} >= {best}


def test_points_that_diverge_are_data_and_stay_in_the_study() -> None:
    def lost(request: Request) -> Record:
        return Record(request, "diverged") if request.norm == "none" else network(request)

    records = run(TPE, lost)
    assert len(selected(records, "none")) == 40
    assert {r.request.norm for r in records if r.request.phase == "confirm"} == {"batch"}


# -------------------------------------------------------------------------------------------------------------- halving


def test_a_third_goes_on_to_three_times_the_steps() -> None:
    asked = selected(run(HALVED), "batch")
    counts = Counter(request.steps for request in asked)
    assert counts == {10: 18 * 2, 30: 6 * 2, 90: 2 * 2}
    assert trials_by_points(HALVED) == (26, 6.0)
    assert expected_budget(HALVED) == (2 * (26 * 2 + 3) + 6, 2 * (6 * 2 + 3) + 12)


def test_those_who_go_on_are_the_best_of_their_batch_and_normalization() -> None:
    def unequal(request: Request) -> Record:  # every point of none is worse than every point of batch
        record = network(request)
        return replace(record, score=record.score and record.score - 50 * (request.norm == "none"))

    records = run(HALVED, unequal)
    for label in ("batch", "none"):
        asked = selected(records, label)
        rungs = [{(r.lr, r.variant) for r in asked if r.steps == steps} for steps in (10, 30, 90)]
        assert [len(rung) for rung in rungs] == [18, 6, 2]
        assert rungs[0] > rungs[1] > rungs[2]
    scores = {r.request: r.score or -math.inf for r in records if r.request.norm == "batch"}
    first = draw(HALVED, 0, 0, (), BATCH)
    ranked = sorted(first, key=lambda p: -scores[Request("select", "batch", p.lr(HALVED), 0, 10, p.variant)])
    went_on = {r.lr for r in scores if r.steps == 30}
    assert {p.lr(HALVED) for p in first} & went_on == {p.lr(HALVED) for p in ranked[:3]}


def test_what_diverges_does_not_go_on() -> None:
    records = run(HALVED, lambda r: Record(r, "diverged") if r.norm == "none" else network(r))
    assert {request.steps for request in selected(records, "none")} == {10}


def test_a_short_trial_has_at_least_one_step() -> None:
    records = run(replace(HALVED, steps=2))
    assert {request.steps for request in selected(records, "batch")} == {1, 2}


def test_pruned_points_do_not_decide() -> None:
    """A point that is best at a ninth of its steps and poor in full is not what is confirmed."""

    def early(request: Request) -> Record:
        record = network(request)
        return replace(record, score=None if record.score is None else record.score + 40 * (request.steps == 10))

    records = run(HALVED, early)
    best = best_choices(HALVED, records)["batch"]
    assert best.lr in {request.lr for request in selected(records, "batch") if request.steps == 90}


# ----------------------------------------------------------------------------------------------------------- the report


def test_edges_need_a_grid() -> None:
    whole = summary(TPE, run(TPE), CHANCE)
    norm = whole.norms[0]
    assert (norm.lr_train, norm.lr_diverge.mean, norm.sensitivity, norm.margin_octaves) == ({}, None, None, None)
    row = dict(zip(*rows(whole)[:2], strict=True))
    assert [row[name] for name in ("lr_train", "lr_diverge", "margin", "sensitivity")] == ["-"] * 4
    assert row["optimizer"] == "sgd"


def test_a_best_rate_at_the_end_of_the_range_is_told() -> None:
    settings = replace(QMC, lrs=(0.001, 0.1))
    warned = [text for text in summary(settings, run(settings), CHANCE).warnings if text.startswith("boundary")]
    assert len(warned) == 2
    assert warned[0].endswith(
        ", is at the end of the range that was drawn from, 0.001 to 0.1; give a wider one with --lrs LOW:HIGH:2, "
        "or use --sampler grid"
    )
