"""Rows made by torch's operator: right whatever their mean and magnitude, the same in any company."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normwise.kernels.rows import Derivative, are_safe, linear, recovered, standardize, torchs
from tests.tolerances import EXACT, GRADIENTS, OUTLIER, check

EPS = 1e-5
WIDTHS = pytest.mark.parametrize("width", [2, 3, 17, 96, 768, 20000])


def exactly(x: Tensor) -> Tensor:
    """The formula in float64."""
    wide = x.double()
    centered = wide - wide.mean(1, keepdim=True)
    return centered / (centered.square().mean(1, keepdim=True) + EPS).sqrt()


HARD: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "at the limit": lambda x: x + 1.99 * x.std(1, keepdim=True),
    "mean 1e4": lambda x: x + 1e4,
    "mean 1e6": lambda x: x + 1e6,
    "1e-20": lambda x: x * 1e-20,
    "1e15": lambda x: x * 1e15,
    "1e30": lambda x: x * 1e30,
    "all kinds of means": lambda x: x + torch.logspace(-3, 6, len(x)).unsqueeze(1),
    "all magnitudes": lambda x: x * torch.logspace(-30, 36, len(x)).unsqueeze(1),
}


@WIDTHS
@pytest.mark.parametrize("hard", HARD.values(), ids=HARD)
def test_right_to_the_last_digit(hard: Callable[[Tensor], Tensor], width: int) -> None:
    x = hard(torch.randn(40, width))
    check(standardize(x, EPS).values.double(), exactly(x), EXACT)


@WIDTHS
def test_an_outlier(width: int) -> None:
    x = torch.randn(8, width)
    x[:, 0] = 1e6
    check(standardize(x, EPS).values.double(), exactly(x), OUTLIER)


def test_torch_alone_is_not_right_where_a_row_is_not_safe() -> None:
    x = torch.randn(4, 768) + torch.tensor([[0.0], [1e4], [1e6], [0.0]])
    x[3] *= 1e30
    found = torchs(x, EPS)
    assert are_safe([found]).tolist() == [True, False, False, False]
    assert (found.values.double() - exactly(x)).abs().amax(1).nan_to_num(nan=1.0)[1:].min() > 1e-4


@pytest.mark.parametrize("value", [0.0, 1e-3, -6e-3, 1e3 / 3, 3e37, -1e20, 1e-40])
@WIDTHS
def test_a_constant_row_is_zero(value: float, width: int) -> None:
    assert standardize(torch.full((4, width), value), EPS).values.abs().max() == 0


@pytest.mark.parametrize("width", [1, 17, 768, 65537])
def test_the_same_bits_in_any_company(width: int) -> None:
    x, cotangent = torch.randn(2, 12, width)
    x[::3] += 1e5
    whole = standardize(x, EPS)
    gradient = Derivative(None, x)(cotangent, whole.values, whole.inverse)
    for rows in (slice(0, 1), slice(1, 2), slice(2, 7)):
        alone = standardize(x[rows], EPS)
        assert torch.equal(alone.values, whole.values[rows])
        assert torch.equal(alone.inverse, whole.inverse[rows])
        part = Derivative(None, x[rows])(cotangent[rows], alone.values, alone.inverse)
        assert torch.equal(part, gradient[rows])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_spoils_no_other(bad: float) -> None:
    x = torch.randn(3, 64)
    expected = standardize(x, EPS).values
    x[1, 5] = bad
    found = standardize(x, EPS).values
    assert found[1].isnan().any()
    assert torch.equal(found[::2], expected[::2])


@WIDTHS
@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
def test_the_derivative(mean: float, width: int) -> None:
    x, cotangent, weight = torch.randn(12, width) + mean, torch.randn(12, width), torch.rand(width) + 0.5
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(exactly(wide) * weight.double(), wide, cotangent.double())
    rows = standardize(x, EPS)
    found = Derivative(weight, x)(cotangent, rows.values, rows.inverse)
    size = expected.abs().amax(1, keepdim=True).clamp_min(1)  # two values of a row may be close to each other
    check(found.double() / size, expected / size, GRADIENTS)


def test_recovered() -> None:
    values, weight, bias = torch.randn(3, 5), torch.randn(5), torch.randn(5)
    assert recovered(values, None, None) is values
    assert torch.equal(recovered(values, weight, None), values * weight)
    assert torch.equal(recovered(values, None, bias), values + bias)
    check(recovered(values, weight, bias), values * weight + bias, EXACT)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 7, 64])
def test_linear(rows: int, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x, weight = torch.randn(rows, 5), torch.randn(12, 5)
    for given in (weight, weight.t().contiguous().t()):
        check(linear(x, given).double(), x.double() @ weight.double().t(), EXACT)
