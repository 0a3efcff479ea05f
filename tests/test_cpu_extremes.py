"""The compiled kernels where a product or a long sum of floats leaves float's range, though the result is within it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import L2, Affine, Moving, Norm, Standardize
from normwise.pointwise import FUNCTIONS, Activation
from tests.compiled import needs_kernels

pytestmark = needs_kernels


def gradients(layer: nn.Module, x: Tensor, d_output: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(layer(x), [x, *layer.parameters()], d_output))


@pytest.mark.parametrize("shape", [(1, 200_000, 16), (8, 50_000, 16), (128, 3136, 16)])
def test_a_weight_that_is_used_very_often_has_an_exact_gradient(shape: tuple[int, ...]) -> None:
    layer = Norm("b [t c]", Standardize(), Affine("c"), c=shape[2], t=shape[1])
    x, d_output = torch.randn(shape), torch.full(shape, 0.1)
    _, d_weight, d_bias = gradients(layer, x, d_output)
    value = (x.double() - x.double().mean((1, 2), keepdim=True)) / x.double().var((1, 2), False, True).add(1e-5).sqrt()
    expected = (value * d_output).sum((0, 1))
    assert (d_weight - expected).abs().max() <= 1e-5 * (value * d_output).square().sum((0, 1)).sqrt().max()
    torch.testing.assert_close(d_bias, torch.full_like(d_bias, 0.1 * shape[0] * shape[1]), rtol=1e-6, atol=0)


def test_a_zero_has_the_same_sign_for_any_number_of_columns() -> None:
    x, d_output = torch.randn(8, 24), -torch.rand(8, 24)
    found = []
    for columns in (17, 24):
        layer = Norm("[n] c", L2(), Affine("c"), c=columns, activation="relu")
        nn.init.constant_(layer.weight, -1)
        nn.init.constant_(layer.bias, -100)
        found.append(gradients(layer, x[:, :columns].clone(), d_output[:, :columns].clone())[0][:, :17])
    assert not found[0].any()
    assert torch.equal(*(d_x.view(torch.int32) for d_x in found))


@pytest.mark.parametrize(("text", "shape"), [("[n] c", (8, 24)), ("[n] c [l]", (4, 3, 128))])
def test_nothing_comes_back_through_given_statistics(text: str, shape: tuple[int, ...]) -> None:
    layer = Norm(text, recovery=Affine("c"), memory=Moving("c", decay=0.9), c=shape[1]).eval()
    layer.running_var.fill_(4.0)
    x = torch.randn(shape)
    x.view(-1)[5] = float("inf")
    d_x = gradients(layer, x, torch.ones(shape))[0]
    torch.testing.assert_close(d_x, torch.full(shape, 0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("text", "shape"), [("[n] c", (6, 16)), ("[n] c [l]", (2, 6, 64))])
def test_activations_of_numbers_at_the_ends_of_float(name: Activation, text: str, shape: tuple[int, ...]) -> None:
    layer = Norm(text, Standardize(0.0), None, Moving("c", decay=0.9), c=shape[1], activation=name).eval()
    for z in (-3e38, -1e38, -1e37, -200.0, -100.0, -50.0, 50.0, 200.0, 1e37, 3e38):
        x = torch.full(shape, z, requires_grad=True)
        output = layer(x)
        (slope,) = torch.autograd.grad(output, x, torch.ones(shape))
        exact = torch.full(shape, z, dtype=torch.float64, requires_grad=True)
        expected = FUNCTIONS[name].apply(exact)
        (expected_slope,) = torch.autograd.grad(expected, exact, torch.ones_like(exact))
        torch.testing.assert_close(output.double(), expected.detach(), rtol=1e-5, atol=1e-30)
        torch.testing.assert_close(slope.double(), expected_slope, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("text", ["[n] c", "c [n]"])
@pytest.mark.parametrize(
    ("size", "of_gradient"), [(1e14, 1e25), (1e5, 1e34), (1e3, 1e36), (1e-10, 1e-32), (1e-13, 1e-28)]
)
def test_gradients_far_from_one(text: str, size: float, of_gradient: float) -> None:
    layer = Norm(text, Standardize(0.0), Affine("c"), c=32)
    shape = (64, 32) if text == "[n] c" else (32, 64)
    x, d_output = torch.randn(shape) * size, torch.randn(shape) * of_gradient
    exact = Norm(text, Standardize(0.0), Affine("c"), c=32).double()
    for found, expected in zip(
        gradients(layer, x, d_output), gradients(exact, x.double(), d_output.double()), strict=True
    ):
        largest = expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=3e-6 * largest)


@pytest.mark.parametrize("text", ["[n] c", "[n] c [l]", "c [n]"])
@pytest.mark.parametrize(("size", "weight"), [(1e-13, 1e28), (1e14, 1e-28), (1e12, 1e-30)])
def test_weights_that_undo_the_scale(text: str, size: float, weight: float) -> None:
    shape = {"[n] c": (64, 20), "[n] c [l]": (4, 5, 64), "c [n]": (5, 64)}[text]
    layers = [
        Norm(text, Standardize(0.0), Affine("c"), c=shape[text.replace("[n] ", "x ").split().index("c")])
        for _ in (0, 1)
    ]
    for layer in layers:
        nn.init.constant_(layer.weight, weight)
    x = torch.randn(shape) * size
    found, expected = layers[0](x).double(), layers[1].double()(x.double())
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_a_batch_that_is_not_full_is_right() -> None:
    for rows, following in pairwise(range(1, 20)):
        x = torch.randn(following, 4, 5)
        layer = nw.GroupNorm(2, 4)
        assert torch.equal(layer(x)[:rows], layer(x[:rows]))
