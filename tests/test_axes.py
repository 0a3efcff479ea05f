"""Axes beside normalization and rate: how they are read, and how each normalization is judged at its own best."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from studies import summary

from normwise.errors import StudyError
from normwise.tuning.axes import plain, values, variant_text, variants
from normwise.tuning.records import Record, Request, Settings
from normwise.tuning.search import best_choices, expected_trials, next_requests, selection
from normwise.tuning.seeds import seeds
from normwise.tuning.summary import rows

CHANCE = math.log(10)
NORMS = (("batch", "batch"), ("none", "none"))
SIZES = ("batch_size", (8, 32, 128))
OPTIMIZERS = ("optimizer", ("sgd", "adamw"))
GRID = Settings("mlp", "digits", NORMS, seeds=2, confirm=3, steps=100, lrs=(0.1, 0.4), axes=(SIZES,), batch_size=8)
PENALTY = {"batch": {8: 9.0, 32: 4.0, 128: 0.0}, "none": {8: 0.0, 32: 1.0, 128: 2.0}}


def network(request: Request) -> Record:
    """Batch wants large batches and a rate of 0.4, none small ones and 0.1."""
    best = 0.4 if request.norm == "batch" else 0.1
    size = dict(request.variant).get("batch_size", 32)
    score = 95 - PENALTY[request.norm][int(size)] - 3 * (request.lr != best) - 2 * (request.norm == "none")
    return Record(request, "trains", score + request.seed % 7 / 10, 2.4, tail_loss=0.1, val_loss=0.1)


def run(settings: Settings, trial: Any = network) -> list[Record]:
    records: list[Record] = []
    while requests := next_requests(settings, records, chance=CHANCE):
        assert not set(requests) & {record.request for record in records}
        records += [trial(request) for request in requests]
    return records


def message(name: str, given: Any) -> str:
    with pytest.raises(StudyError) as caught:
        values(name, given)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- how they are read


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("batch_size", 8, (8,)),
        ("batch_size", "8, 32,8", (8, 32)),
        ("batch_size", [8, 32], (8, 32)),
        ("batch_size", np.array([8, 32]), (8, 32)),
        ("optimizer", "sgd,adamw", ("sgd", "adamw")),
        ("weight_decay", "0,1e-4", (0.0, 1e-4)),
        ("weight_decay", 0, (0.0,)),
        ("epochs", (2, 5), (2, 5)),
        ("placement", "pre,post", ("pre", "post")),
        ("start", None, ()),
    ],
)
def test_an_axis_is_one_value_or_several(name: str, given: Any, read: tuple[Any, ...]) -> None:
    assert values(name, given) == read
    assert values(name, plain(name, given)) == read


def test_values_that_mean_nothing() -> None:
    assert message("batch_size", "8,1") == "batch-size=1: must be a whole number from 2"
    assert message("batch_size", "8,many") == "batch-size=many: must be a whole number from 2"
    assert message("batch_size", 8.5) == "batch-size=8.5: must be a whole number from 2"
    assert message("epochs", (2, 0)) == "epochs=0: must be a whole number from 1"
    assert message("weight_decay", "0,-1") == "weight-decay=-1: must be a number from 0"
    assert message("weight_decay", "small") == "weight-decay=small: must be a number from 0"
    assert message("weight_decay", "nan") == "weight-decay=nan: must be a number from 0"
    assert message("start", "he,ortogonal") == (
        "no start named 'ortogonal'; there are default, he, orthogonal; did you mean 'orthogonal'?"
    )
    assert message("batch_size", ()) == "batch-size has no value: leave it out, or give one or more"


def test_every_combination_is_tried() -> None:
    settings = replace(GRID, axes=(SIZES, OPTIMIZERS))
    assert len(variants(settings)) == len(set(variants(settings))) == 6
    assert variants(settings)[1] == (("batch_size", 8), ("optimizer", "adamw"))
    assert variant_text(variants(settings)[1]) == "batch size 8, optimizer adamw"
    first = next_requests(settings, [], chance=CHANCE)
    assert {request.variant for request in first} == set(variants(settings))
    assert len(first) == 2 * 6 * 2 * 2


def test_without_axes_there_is_one_combination_and_it_is_empty() -> None:
    assert variants(replace(GRID, axes=())) == ((),)
    assert {request.variant for request in next_requests(replace(GRID, axes=()), [], chance=CHANCE)} == {()}


# --------------------------------------------------------------------------------------------------------- what is done


def test_each_normalization_is_confirmed_at_its_own_best_combination() -> None:
    records = run(GRID)
    best = best_choices(GRID, records)
    assert best == {"batch": ((("batch_size", 128),), 0.4), "none": ((("batch_size", 8),), 0.1)}
    for label, choice in best.items():
        own = [r.request for r in records if r.request.phase == "confirm" and r.request.norm == label]
        assert {(r.variant, r.lr) for r in own} == {choice}
        assert tuple(r.seed for r in own) == seeds(GRID, label, "confirm")


def test_every_normalization_has_the_same_budget() -> None:
    records = run(GRID)
    counts = [sum(r.request.norm == label and r.request.phase == "select" for r in records) for label, _ in NORMS]
    assert counts == [3 * 2 * 2, 3 * 2 * 2]
    assert len(records) == expected_trials(GRID) == 2 * (12 + 3) + 6


def test_a_combination_with_failures_loses_to_one_without() -> None:
    def failing(request: Request) -> Record:
        lost = dict(request.variant)["batch_size"] == 128 and request.seed % 2 and request.phase == "select"
        return Record(request, "diverged") if lost else network(request)

    assert dict(best_choices(GRID, run(GRID, failing))["batch"].variant) == {"batch_size": 32}


def test_the_order_in_which_trials_finish_does_not_matter() -> None:
    records = run(GRID)
    select = [r for r in records if r.request.phase == "select"]
    assert set(next_requests(GRID, select, chance=CHANCE)) == set(next_requests(GRID, select[::-1], chance=CHANCE))


def test_each_optimizer_has_its_own_range_of_rates() -> None:
    settings = replace(GRID, lrs=None, axes=(OPTIMIZERS,), optimizer="sgd")
    by = {"sgd": set(), "adamw": set()}
    for request in next_requests(settings, [], chance=CHANCE):
        by[dict(request.variant)["optimizer"]].add(request.lr)
    assert (min(by["sgd"]), max(by["sgd"])) == (2**-8, 4.0)
    assert (min(by["adamw"]), max(by["adamw"])) == (2**-14, 2**-4)


def test_epochs_become_steps_by_the_batch_size() -> None:
    axes = (("batch_size", (8, 200)), ("epochs", (1, 2)))
    settings = replace(GRID, axes=axes, epochs=1, examples=100)
    steps = {request.variant: request.steps for request in next_requests(settings, [], chance=CHANCE)}
    assert [steps[variant] for variant in variants(settings)] == [12, 24, 1, 2]


def test_winner_and_runner_up_are_repeated_at_twice_their_own_steps() -> None:
    settings = replace(GRID, epochs=1, examples=256)
    whole = summary(settings, run(settings), CHANCE)
    assert (whole.horizon.winner, whole.horizon.steps) == ("batch", 2)
    assert (whole.horizon.runner_up, whole.horizon.runner_up_steps) == ("none", 32)
    assert {r.request.steps for r in whole.norms[0].horizon} == {4}
    assert {r.request.steps for r in whole.norms[1].horizon} == {64}


def test_what_was_best_and_what_else_was_tried_is_told() -> None:
    whole = summary(GRID, run(GRID), CHANCE)
    batch, none = whole.norms
    assert (batch.variant, batch.lr_best) == ((("batch_size", 128),), 0.4)
    assert [dict(own.variant)["batch_size"] for own in none.variants] == [8, 32, 128]
    assert [own.score for own in none.variants] == pytest.approx([93.45, 92.45, 91.45])
    assert {record.request.variant for record in batch.selection} == {batch.variant}
    assert batch.trials == 12 + 3 + 3
    head, first, second = rows(whole)
    at = head.index("batch-size")
    assert (head[at - 1], first[at], second[at]) == ("lr_best", "128", "8")
    assert "none at learning rate 0.1, batch size 8" in whole.verdict.sentence
    assert "boundary: the best batch size of none, 8, is the smallest one tried, so a better one may lie beyond" in (
        whole.warnings
    )


def test_records_of_an_older_study_have_no_combination() -> None:
    record = network(Request("select", "batch", 0.1, 0, 100))
    data = record.to_dict()
    del data["request"]["variant"]
    assert Record.from_dict(data) == record
    grown = replace(record, request=replace(record.request, variant=(("batch_size", 8),)))
    assert Record.from_dict(grown.to_dict()) == grown
    assert Settings.from_dict(GRID.to_dict()) == GRID


def test_a_selection_is_of_one_combination() -> None:
    records = run(GRID)
    trials = selection(GRID, records, "none", (("batch_size", 32),))
    assert list(trials) == [0.1, 0.4]
    assert all(len(own) == 2 for own in trials.values())
    assert selection(GRID, records, "none") == {}


def test_a_reversal_names_the_steps_of_both() -> None:
    settings = replace(GRID, epochs=1, examples=256)

    def reversing(request: Request) -> Record:
        record = network(request)
        fallen = request.phase == "horizon" and request.norm == "batch"
        return replace(record, score=record.score - 20 if fallen and record.score else record.score)

    warned = summary(settings, run(settings, reversing), CHANCE).warnings[0]
    assert warned.startswith("reversal: batch leads none by 1.83 points at 2 and 32 steps, but none leads by 18.17 ")
    assert " points at 4 and 64. Judge again" in warned
