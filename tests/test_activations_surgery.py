"""Folding, swapping, releasing and adopting keep the activation that a normalization applies, and apply it once."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.surgery import converters
from normwise.surgery.swap import renew
from tests.activated import FUNCTIONS, KINDS, SHAPE, activations
from tests.test_fold import check_same, folded, line, truth
from tests.test_swap import quietly, refusal
from tests.tolerances import MODEL_OUTPUTS, VALUES, check

LAYERS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


@activations
def test_folding_leaves_the_activation(name: str) -> None:
    model = line(nn.Conv2d(3, 8, 3), nw.BatchNorm(8, activation=name), nn.Conv2d(8, 4, 1))
    record = folded(model, torch.randn(2, 3, 6, 6))
    assert (type(model[1]), model[1].training) == (LAYERS[name], False)
    assert [(change.path, change.why) for change in record.changed] == [("1", "into 0 before it")]
    record.undo()
    assert model[1].spec.activation == name


@activations
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda name: line(nw.BatchNorm(3, activation=name), nn.Conv2d(3, 8, 1)),
            "it reads an input of the model; it also applies an activation",
        ),
        (lambda name: line(nw.LayerNorm((6,), activation=name), nn.Linear(6, 8)), "it also applies an activation"),
    ],
    ids=["statistics", "gain"],
)
def test_nothing_is_folded_through_an_activation(make: Callable[[str], nn.Module], reason: str, name: str) -> None:
    model, x = make(name), torch.randn(2, 3, 6, 6)
    before, state = model(x), copy.deepcopy(model.state_dict())
    record = nw.fold(model, x)
    assert record.changed == ()
    assert record.left[0].why.startswith(reason)
    assert torch.equal(model(x), before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


@activations
def test_a_useless_bias_before_it_goes(name: str) -> None:
    model = line(nn.Linear(3, 6), nw.InstanceNorm(6, activation=name))
    model[0], x = nn.Conv1d(3, 6, 1), torch.randn(4, 3, 5)
    folded(model, x)
    assert model[0].bias is None
    assert model[1].spec.activation == name


@activations
def test_a_centred_layer_norm_keeps_it(name: str) -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(3, 8)
            self.norm = nw.LayerNorm(8, bias=False, activation=name)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.first(x) + self.second(x))

    model = line(Stream(), nn.Linear(8, 2))
    folded(model, torch.randn(5, 3))
    assert type(model[0].norm) is nw.RMSNorm
    assert model[0].norm.spec.activation == name


def model_of(name: str) -> Any:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nw.BatchNorm(8, activation=name)).eval()


def assert_ends_with(model: Any, name: str, norm: nn.Module, x: Tensor) -> None:
    check(model(x), FUNCTIONS[name](norm(model[0](x))), VALUES)


@activations
@pytest.mark.parametrize("word", ["group", "layer", "rms", "instance", nw.LayerNorm2d])
def test_swapping_by_name_keeps_it(word: Any, name: str) -> None:
    model, plain, x = model_of(name), nn.Sequential(model_of(name)[0], nw.BatchNorm(8)).eval(), torch.randn(2, 3, 6, 6)
    quietly(model, "batch", word)
    quietly(plain, "batch", word)
    assert type(model[1]) is type(plain[1])
    assert model[1].spec.activation == name
    assert_ends_with(model, name, plain[1], x)


@activations
def test_swapping_for_nothing_leaves_it(name: str) -> None:
    model = model_of(name)
    quietly(model, "batch", "none")
    assert_ends_with(model, name, nn.Identity(), torch.randn(2, 3, 6, 6))
    assert list(model[1].named_children()) == [("norm", model[1].norm), ("act", model[1].act)]
    assert (type(model[1].norm), type(model[1].act), model[1].act.training) == (nn.Identity, LAYERS[name], False)


MADE: dict[str, Callable[[str], nn.Module]] = {
    "torch's layer": lambda name: nn.GroupNorm(2, 8),
    "ours": lambda name: nw.GroupNorm(2, 8),
    "ours with it": lambda name: nw.GroupNorm(2, 8, activation=name),
    "followed by it": lambda name: nn.Sequential(nn.GroupNorm(2, 8), LAYERS[name]()),
    "ours with it, within": lambda name: nn.Sequential(nw.GroupNorm(2, 8, activation=name)),
}


@activations
@pytest.mark.parametrize("made", MADE)
def test_swapping_by_a_function_applies_it_once(made: str, name: str) -> None:
    model = model_of(name)
    quietly(model, "batch", lambda old: MADE[made](name))
    assert_ends_with(model, name, nn.GroupNorm(2, 8), torch.randn(2, 3, 6, 6))


def test_a_function_may_choose_another() -> None:
    model = model_of("relu")
    quietly(model, "batch", lambda old: nw.GroupNorm(2, 8, activation="gelu"))
    assert_ends_with(model, "gelu", nn.GroupNorm(2, 8), torch.randn(2, 3, 6, 6))


def test_a_function_that_would_lose_it_is_refused() -> None:
    model = model_of("gelu")
    old = model[1]
    message = refusal(model, "batch", lambda old: nn.Sequential(OrderedDict(norm=nn.GroupNorm(2, 8), act=nn.ReLU())))
    assert message == "1: the function gave a Sequential without 'gelu', which the layer applies: put it in"
    assert model[1] is old


@activations
def test_a_renewed_model_keeps_it(name: str) -> None:
    model = model_of(name)
    renew(model, lambda features, axis: nn.GroupNorm(2, features))
    assert_ends_with(model, name, nn.GroupNorm(2, 8), torch.randn(2, 3, 6, 6))


@activations
@pytest.mark.parametrize("kind", ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm"])
def test_torch_has_no_layer_with_it(kind: str, name: str) -> None:
    layer = KINDS[kind](activation=name)
    model = nn.Sequential(nn.Identity(), layer)
    record = nw.release(model, torch.randn(SHAPE))
    assert model[1] is layer
    assert [(left.path, left.why) for left in record.left] == [
        ("1", f"torch has no normalization that applies '{name}' as well")
    ]


class Rectified(nn.BatchNorm1d):
    """Somebody's batch normalization with a rectifier."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return super().forward(input).relu()


@pytest.mark.parametrize(
    ("activation", "changed"),
    [("relu", 1), ("gelu", 0), (None, 0)],
)
def test_a_converter_may_declare_it(monkeypatch: pytest.MonkeyPatch, activation: Any, changed: int) -> None:
    monkeypatch.setattr(converters, "_registered", {})
    nw.register_converter(Rectified, lambda old: nw.BatchNorm(old.num_features, old.eps, activation=activation))
    model = line(nn.Linear(3, 6), Rectified(6))
    x = torch.randn(5, 3)
    expected = truth(model, x)
    record = nw.adopt(model, x)
    assert len(record.changed) == changed
    assert (type(model[1]) is nw.BatchNorm) == bool(changed)
    check_same(model(x), expected, MODEL_OUTPUTS)
    if changed:
        folded(model, x)
        assert type(model[1]) is nn.ReLU


def test_it_is_found() -> None:
    found = nw.find(nn.Sequential(nn.Linear(4, 8), nw.BatchNorm(8, activation="relu"), nw.LayerNorm(8)))
    assert [(one.pattern, one.activation) for one in found] == [("[n] c [...]", "relu"), ("... [d]", None)]
    assert "[n] c [...], then relu  " in str(found)
