"""The record of an operation: what it prints, what it gives as data, and that it takes back once."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest
from torch import nn

import normwise as nw
from normwise.record import Check, Line, Record, shown, table

CHANGED = (
    Line("bn", "BatchNorm2d(8)", "BatchNorm(8)", "the same numbers"),
    Line("layers.10.norm", "LN(4)", "LayerNorm((4,))", "too"),
)
LEFT = (Line("head.norm", "Strange(4)", None, "nothing is known of Strange"),)
PROOF = (Check("given", 3.4e-7, 1e-5), Check("a mean of 30", 2e-4, 1e-5, 1.5e-13, 3e-4, 2.5e-4))


def record(**parts: object) -> Record:
    return Record("adopt", nn.Identity(), **parts)


CHANGES_SHOWN = """\
changed         before          after            why
bn              BatchNorm2d(8)  BatchNorm(8)     the same numbers
layers.10.norm  LN(4)           LayerNorm((4,))  too"""
LEFT_SHOWN = """\
left       what        why
head.norm  Strange(4)  nothing is known of Strange"""
PROOF_SHOWN = """\
largest difference of the outputs
  given: 3.4e-07
  a mean of 30: 2.0e-04, in float64 1.5e-13 (rounding: 3.0e-04 before, 2.5e-04 after)"""

PRINTED: dict[str, tuple[dict[str, object], list[str]]] = {
    "nothing": ({}, ["adopt: 0 changed, 0 left as they were"]),
    "changes": ({"changed": CHANGED}, ["adopt: 2 changed, 0 left as they were", CHANGES_SHOWN]),
    "what was left": ({"left": LEFT}, ["adopt: 0 changed, 1 left as they were", LEFT_SHOWN]),
    "a proof": ({"proof": PROOF}, ["adopt: 0 changed, 0 left as they were", PROOF_SHOWN]),
    "notes": ({"notes": ("one", "two")}, ["adopt: 0 changed, 0 left as they were", "note: one", "note: two"]),
    "everything": (
        {"changed": CHANGED, "left": LEFT, "proof": PROOF, "notes": ("one",)},
        ["adopt: 2 changed, 1 left as they were", CHANGES_SHOWN, LEFT_SHOWN, PROOF_SHOWN, "note: one"],
    ),
}


@pytest.mark.parametrize(("parts", "paragraphs"), PRINTED.values(), ids=PRINTED)
def test_what_is_printed(parts: dict[str, object], paragraphs: list[str]) -> None:
    made = record(**parts)
    assert str(made).split("\n\n") == paragraphs
    assert repr(made) == f"Record('adopt', {len(made.changed)} changed, {len(made.left)} left)"


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    lines = table(("name", "size", "why"), [("a", 10_000, "b c"), ("longer", 1, ""), ("", None, "x")]).split("\n")
    assert lines == [
        "name    size   why",
        "a       10000  b c",
        "longer  1",  # nothing at the end of a line
        "        None   x",
    ]
    assert table(("only", "a head"), []) == "only  a head"


def test_plain_data_survives_json() -> None:
    made = record(changed=CHANGED, left=LEFT, proof=PROOF, notes=("one",), measured={"loss_before": 2.5})
    given = json.loads(made.to_json())
    assert given == made.to_dict()
    assert given.keys() == {"operation", "changed", "left", "proof", "notes", "measured"}
    assert tuple(Line(**line) for line in given["changed"]) == CHANGED
    assert tuple(Line(**line) for line in given["left"]) == LEFT
    assert tuple(Check(**check) for check in given["proof"]) == PROOF
    assert (given["operation"], given["notes"], given["measured"]) == ("adopt", ["one"], {"loss_before": 2.5})


def test_a_real_record_survives_json() -> None:
    made = nw.adopt(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    assert json.loads(made.to_json()) == made.to_dict()
    assert [line["path"] for line in made.to_dict()["changed"]] == ["1"]
    assert made.to_dict()["proof"]


def test_paths_and_the_largest_difference() -> None:
    made = record(changed=CHANGED, left=LEFT, proof=PROOF)
    assert made.paths == ("bn", "layers.10.norm")
    assert made.largest_difference == 2e-4
    assert record().paths == ()
    assert record().largest_difference is None
    with pytest.raises(FrozenInstanceError):
        CHANGED[0].path = "other"  # type: ignore[misc]


def test_undo_takes_back_once_and_gives_the_model_as_it_was() -> None:
    calls: list[str] = []
    before, after = nn.Linear(2, 2), nn.Linear(2, 2)
    exchanged = Record("adopt", after, inverse=lambda: calls.append("undone"), original=before)
    assert exchanged.model is after
    assert (exchanged.undo(), exchanged.undo(), exchanged.model) == (before, before, before)
    in_place = Record("freeze", after, inverse=lambda: calls.append("undone"))
    assert (in_place.undo(), in_place.model) == (after, after)
    nothing_to_undo = Record("find", after)
    assert nothing_to_undo.undo() is after
    assert calls == ["undone", "undone"]


def test_an_undo_that_was_interrupted_can_be_tried_again() -> None:
    calls: list[str] = []

    def fail_once() -> None:
        calls.append("tried")
        if len(calls) == 1:
            raise ZeroDivisionError

    made = Record("adopt", nn.Identity(), inverse=fail_once)
    with pytest.raises(ZeroDivisionError):
        made.undo()
    made.undo()
    made.undo()
    assert calls == ["tried", "tried"]


def test_as_a_context_it_holds_for_a_while() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    original = model[0]
    with nw.adopt(model) as made:
        assert made.model is model
        assert isinstance(model[0], nw.BatchNorm)
    assert model[0] is original

    def interrupted() -> None:
        with nw.adopt(model):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model[0] is original


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.BatchNorm2d(8, momentum=0.3), "BatchNorm2d(8)"),
        (nn.LayerNorm((4, 5)), "LayerNorm((4, 5))"),
        (nn.GroupNorm(2, 8), "GroupNorm(2, 8)"),
        (nn.Identity(), "Identity()"),
        (nn.Linear(3, 4), "Linear()"),
        (nw.BatchNorm(8), "BatchNorm(8)"),
        (nw.LayerNorm2d(8), "LayerNorm2d((8,))"),
        (nw.Norm("n (g [k])", g=2), "Norm('n (g [k])')"),
        (nw.Norm("[n] c", nw.RMS(), nw.Affine("c"), nw.Moving("c", decay=0.9), c=3), "Norm('[n] c')"),
    ],
    ids=str,
)
def test_a_layer_in_short(layer: nn.Module, text: str) -> None:
    assert shown(layer) == text
