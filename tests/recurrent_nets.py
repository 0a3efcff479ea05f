"""What the tests of the recurrent nets share: the kinds, the norms, and nets with numbers as after some training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normwise import Affine, Moving, Norm
from normwise.recurrent import GRU, LSTM, RNN

TWINS = {RNN: nn.RNN, LSTM: nn.LSTM, GRU: nn.GRU}
KINDS = pytest.mark.parametrize("kind", TWINS, ids=lambda kind: kind.__name__)
LAYER = Norm("... [c]", recovery=Affine("c"))
PER_STEP = Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9, beyond={"t": "last"}))
SHARED = Norm("[n] t c", recovery=Affine("c"), memory=Moving("c", decay=0.9))
NORMS = {"layer": LAYER, "per step": PER_STEP, "shared": SHARED}
EVERY_NORM = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
LENGTHS = torch.tensor([6, 2, 4, 5])


def states(hidden: Any) -> tuple[Tensor, ...]:
    return hidden if isinstance(hidden, tuple) else (hidden,)


def randomized(layer: nn.Module) -> Any:
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -0.7, 0.7)
    return layer


def trained(layer: nn.Module) -> Any:
    """Random parameters, and a batch in the memories."""
    randomized(layer)(torch.randn(6, 8, 3))
    return layer.eval()


def assert_same(actual: Any, expected: Any) -> None:
    for ours, theirs in zip((actual[0], *states(actual[1])), (expected[0], *states(expected[1])), strict=True):
        assert torch.equal(ours, theirs)


def standardized(x: Tensor, dim: int) -> Tensor:
    x = x - x.mean(dim, keepdim=True)
    return x / (x.square().mean(dim, keepdim=True) + 1e-5).sqrt()
