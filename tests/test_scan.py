"""Step by step is what one call is: outputs, gradients and memory, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from normwise import RMS, Affine, Moving, Norm, Scale
from normwise.scan import Rows, Scan
from tests.catalogue import randomize
from tests.tolerances import EXACT, GRADIENTS, check

DECLARED = {
    "per step": Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9, beyond={"t": "last"})),
    "fixed": Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9), t=6, c=5),
    "shared": Norm("[n] t c", recovery=Affine("c"), memory=Moving("c", decay=0.9)),
    "root mean square": Norm("[n] t c", RMS(), Scale("c"), memory=Moving("c", decay=0.9)),
    "nothing remembered": Norm("[n] t c", recovery=Affine("c")),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("alive", [None, torch.arange(6) < torch.tensor([[6], [2], [5], [3]])], ids=["full", "alive"])
@pytest.mark.parametrize("norm", DECLARED.values(), ids=DECLARED)
def test_step_by_step_is_one_call(norm: Norm, alive: Tensor | None, training: bool) -> None:
    whole = copy.deepcopy(norm)
    whole(torch.randn(4, 6, 5))
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.uniform_(0.5, 2.0)
    stepwise = copy.deepcopy(whole.train(training))
    leaves = [x.requires_grad_() for x in torch.randn(1, 4, 6, 5).repeat(2, 1, 1, 1)]
    scan = Scan(stepwise, "t", (4, 6, 5), leaves[1], alive)
    outputs = [whole(leaves[0], valid=alive), torch.stack([scan(t, leaves[1][:, t]) for t in range(6)], 1)]
    scan.close()
    assert torch.equal(*outputs)
    cotangent = torch.randn(4, 6, 5)
    grads = [torch.autograd.grad(y, x, cotangent)[0] for y, x in zip(outputs, leaves, strict=True)]
    assert torch.equal(*grads)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, stepwise.state_dict()[name])


@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("rows", [3, 3000])
def test_rows_are_right_to_the_last_digit(mean: float, rows: int) -> None:
    norm = Norm("... [c]", recovery=Affine("c"), c=64)
    randomize(norm)
    x = (torch.randn(rows, 64) + mean).requires_grad_()
    output, cotangent = Rows(norm, (rows, 64), x)(0, x), torch.randn(rows, 64)
    exact = x.detach().double().requires_grad_()
    centered = exact - exact.mean(1, keepdim=True)
    expected = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = expected * norm.weight.double() + norm.bias.double()
    check(output.double(), expected, EXACT)
    (grad,), (expected_grad,) = (
        torch.autograd.grad(output, x, cotangent),
        torch.autograd.grad(expected, exact, cotangent.double()),
    )
    check(grad.double(), expected_grad, GRADIENTS)


@pytest.mark.parametrize("value", [0.0, 1e3 / 3, 3e37, -1e20, 1e-40])
def test_a_constant_row_is_zero(value: float) -> None:
    x = torch.full((4, 96), value)
    assert Rows(Norm("... [c]", c=96), (4, 96), x)(0, x).abs().max() == 0
