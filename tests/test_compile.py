"""`torch.compile(fullgraph=True)`: one graph, no breaks, the same numbers, memory and gradients included.

Compiling takes seconds, so layers are compiled together, as the parts of one small model.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import RMS, Affine, Average, Frozen, Moving, Norm, Scale
from tests.catalogue import randomize
from tests.tolerances import COMPILED, EXACT, Tolerance, check

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),  # the compiler's own
]


class Side(nn.Module):
    """Layers side by side on one input: one graph for all of them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers])


def _named() -> list[nn.Module]:
    return [
        nw.BatchNorm(6),
        nw.InstanceNorm(6, affine=True, track_running_stats=True),
        nw.LayerNorm(5),
        nw.RMSNorm(5),
        nw.GroupNorm(2, 6),
        nw.LayerNorm2d(6),
        nw.RMSNorm2d(6),
    ]


def _declared() -> list[nn.Module]:
    return [
        Norm("[n] c [...]", recovery=Affine("c"), memory=Moving("c", decay=0.9), c=6),
        Norm("[n] c [h] w", recovery=Scale("w c"), memory=Average("w c"), c=6, w=5),
        Norm("n (g [k]) [...]", RMS(1e-3), Affine("(g k)"), g=3, k=2),
        Norm("[n] c [...]", memory=Frozen("c"), c=6),
        nw.BatchNorm(6, momentum=None),
    ]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [_named, _declared], ids=["named", "declared"])
def test_one_graph_with_the_same_numbers(make: type, training: bool) -> None:
    eager = Side(make())
    randomize(eager)
    eager.train(training)
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True)
    for _ in range(3):
        x = torch.randn(4, 6, 3, 5) * 2 + 1
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        y, y_compiled = eager(leaves[0]), compiled(leaves[1])
        cotangent = torch.randn(y.shape)
        grads = torch.autograd.grad(y, [leaves[0], *eager.parameters()], cotangent)
        grads_compiled = torch.autograd.grad(y_compiled, [leaves[1], *traced.parameters()], cotangent)
        check(y_compiled.detach(), y.detach(), COMPILED)
        for grad, grad_compiled in zip(grads, grads_compiled, strict=True):
            check(grad_compiled, grad, COMPILED)
    for name, value in eager.state_dict().items():
        check(traced.state_dict()[name], value, COMPILED)


def test_a_large_mean_and_a_non_finite_batch() -> None:
    layer = nw.BatchNorm(8, affine=False)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(256, 8) + 1e6
    wide = x.double() - x.double().mean(0)
    expected = wide / (wide.square().mean(0) + 1e-5).sqrt()
    check(compiled(x).double(), expected, Tolerance(COMPILED.absolute, 0.0, COMPILED.reason))
    check(layer(x).double(), expected, EXACT)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    compiled(torch.where(torch.arange(256).unsqueeze(1) == 7, torch.inf, x))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_another_batch_size_does_not_need_another_shape_each_time() -> None:
    layer = nw.GroupNorm(2, 6)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for shape in ((4, 6, 3), (7, 6, 3), (9, 6, 5)):
        x = torch.randn(shape)
        check(compiled(x).detach(), layer(x).detach(), COMPILED)
