"""Freezing by names of layers, and the records of freezing and unfreezing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import normwise as nw
from normwise import BatchNorm, Norm, NormwiseError
from tests.test_modes import half_learning, network, norms


def residual() -> nn.ModuleDict:
    """Blocks with paths, a layer held twice, and torch's own layers in one part."""
    shared = BatchNorm(4)
    blocks = [nn.ModuleDict({"bn1": BatchNorm(4), "bn2": nw.LayerNorm(4)}) for _ in range(2)]
    theirs = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4))
    return nn.ModuleDict({"stem": shared, "layer1": nn.Sequential(*blocks), "again": shared, "theirs": theirs})


SELECTED: dict[str | tuple[str, ...], tuple[str, ...]] = {
    "layer1.*": ("layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2"),
    "*.bn1": ("layer1.0.bn1", "layer1.1.bn1"),
    "layer1.?.bn2": ("layer1.0.bn2", "layer1.1.bn2"),
    "stem": ("stem",),
    "again": ("stem",),  # the same layer, under its other path
    ("*.bn2", "stem", "*.0.bn*"): ("stem", "layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn2"),
    (): (),
}


@pytest.mark.parametrize("names", SELECTED, ids=str)
def test_freezing_by_a_pattern_of_names(names: str | tuple[str, ...]) -> None:
    model = residual()
    record = nw.freeze(model, names)
    assert record.paths == SELECTED[names]
    frozen = {path for path, module in model.named_modules() if isinstance(module, Norm) and module.frozen}
    assert frozen == set(SELECTED[names])
    assert nw.unfreeze(model, names).paths == SELECTED[names]
    assert not any(layer.frozen for layer in norms(model))


def test_unfreezing_a_part_of_what_is_frozen() -> None:
    model = residual()
    nw.freeze(model, ["layer1.*", "stem"])
    record = nw.unfreeze(model, "*.bn?")
    assert (model["stem"].frozen, [line.path for line in record.left]) == (True, [])
    record = nw.unfreeze(model, ["*.bn1", "stem"])
    assert record.paths == ("stem",)
    assert [(line.path, line.before, line.why) for line in record.left] == [
        ("layer1.0.bn1", "BatchNorm(4)", "it was not frozen"),
        ("layer1.1.bn1", "BatchNorm(4)", "it was not frozen"),
    ]
    record.undo()
    assert [layer.frozen for layer in norms(model)] == [True, False, False, False, False]


def test_a_root_goes_by_its_class() -> None:
    layer = BatchNorm(4)
    assert nw.freeze(layer, "BatchNorm").paths == ("BatchNorm",)
    assert layer.frozen


NO_SUCH: list[tuple[nn.Module, object, str]] = [
    (
        residual(),
        "layer2.*",
        "no normalization has a path like 'layer2.*'; there are: "
        "stem, layer1.0.bn1, layer1.0.bn2, layer1.1.bn1, layer1.1.bn2, theirs.0, ...",
    ),
    (nn.Sequential(BatchNorm(3)), ["0", "1"], "no normalization has a path like '1'; there are: 0"),
    (nn.Sequential(BatchNorm(3)), "", "no normalization has a path like ''; there are: 0"),
    (nn.Linear(2, 2), "*", "no normalization has a path like '*'; there are: none"),
]


@pytest.mark.parametrize(("model", "names", "message"), NO_SUCH, ids=[message for *_, message in NO_SUCH])
@pytest.mark.parametrize("operate", [nw.freeze, nw.unfreeze])
def test_a_pattern_that_nothing_fits(operate: Callable, model: nn.Module, names: object, message: str) -> None:
    with pytest.raises(nw.SurgeryError) as caught:
        operate(model, names)
    assert str(caught.value) == message
    assert not any(layer.frozen for layer in norms(model))


@pytest.mark.parametrize("operate", [nw.freeze, nw.unfreeze])
def test_torchs_layers_are_refused_only_where_they_are_meant(operate: Callable) -> None:
    model = residual()
    operate(model, "layer1.*")
    for names in (None, "*", "theirs.1", ["stem", "theirs.*"]):
        with pytest.raises(NormwiseError, match=r"^theirs\.1: the memory of torch\.nn\.BatchNorm1d is not normwise's"):
            operate(model, names)
    assert not model["stem"].frozen


def test_a_freezing_prints_what_it_did() -> None:
    model = nn.Sequential(network(), nn.LayerNorm(6), nw.LayerNorm(6, elementwise_affine=False))
    assert str(nw.freeze(model)) == (
        "freeze: 4 changed, 1 left as they were\n"
        "\n"
        "changed  before           after                    why\n"
        "0.1      BatchNorm(6)     BatchNorm(6), frozen     memory and parameters frozen\n"
        "0.4      Norm('[n] c')    Norm('[n] c'), frozen    memory and parameters frozen\n"
        "0.5      LayerNorm((6,))  LayerNorm((6,)), frozen  parameters frozen\n"
        "2        LayerNorm((6,))  LayerNorm((6,)), frozen  it has no memory and no parameters\n"
        "\n"
        "left  what             why\n"
        "1     LayerNorm((6,))  torch's own, whose parameters learn on: "
        "nw.adopt(model) makes it a layer that can be frozen"
    )
    assert str(nw.freeze(model, ["0.1", "0.5"], parameters=False)) == (
        "freeze: 2 changed, 0 left as they were\n"
        "\n"
        "changed  before                   after                    why\n"
        "0.1      BatchNorm(6), frozen     BatchNorm(6), frozen     memory frozen; frozen 2 times now\n"
        "0.5      LayerNorm((6,)), frozen  LayerNorm((6,)), frozen  it has no memory; frozen 2 times now"
    )
    record = nw.unfreeze(model, "0.*")
    assert str(record) == (
        "unfreeze: 3 changed, 0 left as they were\n"
        "\n"
        "changed  before                   after            why\n"
        "0.1      BatchNorm(6), frozen     BatchNorm(6)     it moves again\n"
        "0.4      Norm('[n] c'), frozen    Norm('[n] c')    it moves again\n"
        "0.5      LayerNorm((6,)), frozen  LayerNorm((6,))  it moves again"
    )
    assert repr(record) == "Record('unfreeze', 3 changed, 0 left)"


def test_a_record_of_a_freezing_holds_the_model_and_takes_it_back_once() -> None:
    model, before = half_learning()
    record = nw.freeze(model)
    again = nw.freeze(model)
    assert (record.operation, record.model, record.undo(), record.undo()) == ("freeze", model, model, model)
    assert all(layer.frozen for layer in norms(model))  # by the other one still
    again.undo()
    assert not any(layer.frozen for layer in norms(model))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
