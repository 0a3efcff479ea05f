"""Derivatives of the recurrent nets: by gradcheck, and the derivative by hand against that of the definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import normwise as nw
from normwise import Norm
from normwise.recurrent import RNN
from tests.recurrent_nets import (
    EVERY_NORM,
    KINDS,
    LAYER,
    randomized,
    standardized,
    states,
)
from tests.tolerances import EXACT, GRADIENTS, check


@KINDS
@EVERY_NORM
@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 2, 3])], ids=["full", "lengths"])
def test_derivatives(kind: type, norm: Norm, lengths: Tensor | None) -> None:
    layer = randomized(kind(2, 2, bidirectional=True, norm=norm, dtype=torch.float64))
    layer(torch.randn(3, 4, 2, dtype=torch.float64))
    parameters = dict(layer.named_parameters())

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(parameters, values, strict=True))
        with nw.no_update(layer):
            output, last = torch.func.functional_call(layer, given, (x,), {"lengths": lengths})
        return output, *states(last)

    inputs = [torch.randn(3, 3, 2, dtype=torch.float64), *(p.detach() for p in parameters.values())]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs], fast_mode=True)


@KINDS
@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 2])], ids=["full", "lengths"])
def test_the_derivative_by_hand_and_its_derivative_are_those_of_the_definition(
    kind: type, lengths: Tensor | None
) -> None:
    narrow = randomized(kind(3, 8, 2, bidirectional=True, norm=LAYER))
    wide = copy.deepcopy(narrow).double()
    x, cotangent, second = torch.randn(3, 2, 3), torch.randn(3, 2, 16), torch.randn(3, 2, 3)
    found = []
    for layer in (narrow, wide):
        leaf = x.to(layer.weight_ih_l0.dtype).requires_grad_()
        output, _ = layer(leaf, lengths=lengths)
        (grad,) = torch.autograd.grad(output, leaf, cotangent.to(leaf.dtype), create_graph=True)
        leaves = [leaf, layer.weight_hh_l0, layer.norms["hh_l0"].weight]
        found.append([grad, *torch.autograd.grad(grad, leaves, second.to(leaf.dtype))])
    for ours, exact in zip(*found, strict=True):
        check(ours.double(), exact, GRADIENTS)


def test_large_products_are_normalized_right() -> None:
    layer = RNN(3, 512, norm=LAYER)
    with torch.no_grad():
        layer.weight_ih_l0.add_(1e5)
    x = torch.randn(2, 4, 3)
    output, _ = layer(x)
    wide = copy.deepcopy(layer).double()
    products = (x @ layer.weight_ih_l0.T).double()
    expected = standardized(products, -1)
    check(nw.LayerNorm(512)(products.float()).double(), expected, EXACT)
    hidden = standardized(output.double()[0] @ wide.weight_hh_l0.T, -1)
    check(output.double()[1], (expected[1] + wide.bias_ih_l0 + wide.bias_hh_l0 + hidden).tanh(), EXACT)


@KINDS
@pytest.mark.parametrize("lengths", [None, torch.tensor([40, 3, 20])], ids=["full", "lengths"])
def test_gradients_through_large_products_of_a_long_sequence(kind: type, lengths: Tensor | None) -> None:
    narrow = randomized(kind(3, 16, bidirectional=True, norm=LAYER))
    with torch.no_grad():
        for place in ("ih_l0", "hh_l0", "ih_l0_reverse", "hh_l0_reverse"):
            getattr(narrow, f"weight_{place}").add_(10.0)
    wide = copy.deepcopy(narrow).double()
    x, cotangent = torch.randn(40, 3, 3), torch.randn(40, 3, 32)
    found = []
    for layer in (narrow, wide):
        output, _ = layer(x.to(layer.weight_ih_l0.dtype), lengths=lengths)
        leaves = [p for name, p in layer.named_parameters() if not name.startswith("weight")]
        found.append([output, *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))])
    for ours, exact in zip(*found, strict=True):
        size = exact.detach().abs().max().clamp_min(1)
        check(ours.double() / size, exact / size, GRADIENTS)
