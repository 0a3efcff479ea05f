"""Converters that users register: right, wrong, failing, and for layers whose parameters have other names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import SurgeryError
from normwise.surgery import converters
from tests.tolerances import VALUES, check


class Scaled(nn.Module):
    """An RMS norm whose gain is called `scale`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


class Rectified(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Ours(nw.BatchNorm):
    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options).relu()


def rectified(old: Any) -> nn.Module:
    return Ours(old.num_features, old.eps, old.momentum)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[nn.Module], Any], None]:
    monkeypatch.setattr(converters, "_registered", {})
    return nw.register_converter


def model(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), layer, nn.Linear(8, 2)).eval()


def test_a_gain_of_another_name_is_left_by_all(register: Any) -> None:
    register(Scaled, lambda old: nw.RMSNorm(8, 1e-6))
    why = "its state has the keys scale, and here it would have weight"
    net = model(Scaled())
    for operate in (nw.adopt, nw.fold):
        assert [(line.path, line.why) for line in operate(net, torch.randn(5, 4), copy=True).left] == [("3", why)]
    with pytest.raises(SurgeryError, match=f"^3: {why}$"):
        nw.swap(net, Scaled, "layer")
    assert nw.find(net)[1].reason == why


def test_what_follows_a_normalization_is_adopted_and_neither_folded_nor_swapped(register: Any) -> None:
    register(Rectified, rectified)
    net, x = model(Rectified(8)), torch.randn(5, 4)
    expected, why = net(x), "what its converter makes of it does more than normalize"
    assert [(line.path, line.why) for line in nw.fold(net, x, copy=True).left] == [("3", why)]
    with pytest.raises(SurgeryError, match=f"^3: {why}: give a function for what it becomes$"):
        nw.swap(net, "batch", "group")
    assert nw.adopt(net, x).paths == ("1", "3")
    check(net(x), expected, VALUES)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda old: 1 / 0, "the converter of Scaled failed: ZeroDivisionError: division by zero"),
        (lambda old: old, "the converter of Scaled gave the layer itself, not a new one"),
        (lambda old: 3, "the converter of Scaled gave 3, not a new one"),
    ],
    ids=["fails", "itself", "no module"],
)
def test_a_converter_that_makes_no_layer(register: Any, convert: Any, message: str) -> None:
    register(Scaled, convert)
    with pytest.raises(SurgeryError, match=f"^{message}$"):
        nw.adopt(model(Scaled()))


def test_a_converter_that_cannot_be_called(register: Any) -> None:
    with pytest.raises(TypeError, match=r"^convert is a function from a layer to one of normwise's, not 5$"):
        register(Scaled, 5)


def test_folding_in_training_mode_says_what_it_waits_for() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).train()
    assert nw.fold(net, torch.randn(6, 4)).notes[-1] == (
        "the model is in training mode: after model.eval() more can be folded"
    )
