from __future__ import annotations

import math
from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normwise.moments import Moments, center, magnitude_scale, merge, only, square_sum
from tests.tolerances import DOUBLE, check

batches = st.lists(st.lists(st.floats(-1e3, 1e3, allow_nan=False), min_size=1, max_size=6), min_size=2, max_size=5)


def measured(x: Tensor) -> Moments:
    return Moments(x.shape[0], x.mean(0), (x - x.mean(0)).square().sum(0))


def _check(a: Moments, b: Moments) -> None:
    assert int(a.count) == int(b.count)
    size = max(1.0, float(torch.as_tensor(b.m2).abs().max()), float(b.mean.abs().max()))
    assert (a.mean - b.mean).abs().max() <= 1e-12 * size
    assert (a.m2 - b.m2).abs().max() <= 1e-12 * size


@given(batches)
def test_merged_moments_are_those_of_the_samples_joined(rows: list[list[float]]) -> None:
    parts = [torch.tensor(row, dtype=torch.float64) for row in rows]
    _check(reduce(merge, map(measured, parts)), measured(torch.cat(parts)))


@given(batches)
def test_merge_is_associative_and_commutative(rows: list[list[float]]) -> None:
    parts = [measured(torch.tensor(row, dtype=torch.float64)) for row in rows]
    _check(reduce(merge, parts), reduce(lambda a, b: merge(b, a), parts))
    _check(reduce(merge, parts), reduce(lambda a, b: merge(b, a), reversed(parts)))


def test_counts_may_be_tensors_one_for_each_column() -> None:
    a = Moments(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0]), torch.tensor([2.0, 6.0]))
    b = Moments(torch.tensor([1.0, 1.0]), torch.tensor([7.0, 4.0]), torch.tensor([0.0, 0.0]))
    joined = merge(a, b)
    assert joined.count.tolist() == [3, 4]
    assert joined.mean.tolist() == [3, 1]
    assert joined.m2.tolist() == [26, 18]


def test_merging_nothing_changes_nothing() -> None:
    a = Moments(3, torch.tensor([1.5]), torch.tensor([2.5]))
    assert merge(a, Moments(0, torch.tensor([0.0]), torch.tensor([0.0]))) == a
    assert merge(Moments(0, torch.tensor([0.0]), torch.tensor([0.0])), a) == a


def test_merge_keeps_small_spreads_far_from_zero() -> None:
    x = 1e6 + torch.arange(64, dtype=torch.float32).remainder(8) * 0.25
    joined = reduce(merge, [measured(part) for part in x.split(8)])
    assert joined.mean.item() == pytest.approx(x.double().mean().item(), rel=1e-7)
    assert joined.variance().item() == pytest.approx(x.double().var(unbiased=False).item(), rel=1e-5)


def test_variance() -> None:
    moments = Moments(5, torch.tensor(3.0), torch.tensor(10.0))
    assert moments.variance().item() == 2.0
    assert moments.variance(unbiased=True).item() == 2.5


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_center_equals_the_definition(dims: tuple[int, ...]) -> None:
    x = torch.randn(4, 3, 5, dtype=torch.float64) + 2
    centered = center(x, dims)
    mean = x.mean(dims, keepdim=True)
    check(centered.column_mean, mean, DOUBLE)
    check(centered.values, x - mean, DOUBLE)
    assert torch.equal(centered.values, ((x - centered.offsets[0]) - centered.offsets[1]) - centered.offsets[2])
    assert centered.scale is None


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e14, 1e15, 1e19, 3e38])
def test_squares_stay_finite_and_scaling_is_exact(magnitude: float) -> None:
    x = torch.linspace(-1, 1, 1000).unsqueeze(1) * magnitude
    scale = magnitude_scale(x, (0,))
    assert (scale is None) == (magnitude <= 1e14)
    scale = torch.ones(1, 1) if scale is None else scale
    assert math.log2(scale.item()).is_integer()
    assert square_sum(x * scale, (0,)).isfinite().all()
    assert torch.equal(x * scale / scale, x)


@pytest.mark.parametrize("value", [0.0, 1e3 / 3, 1e7 / 3, 1e10 / 3, 3.3e37])
def test_a_constant_column_is_centered_to_exact_zeros(value: float) -> None:
    centered = center(torch.full((777, 3), value), (0,))
    assert not centered.values.any()
    check(centered.column_mean, torch.full((1, 3), value).double(), DOUBLE)


@pytest.mark.parametrize("shape", [(1000, 2), (2, 1000)])
def test_the_mean_left_behind_is_rounding_only(shape: tuple[int, int]) -> None:
    dim = 0 if shape[0] > 2 else 1
    values = center(torch.randn(shape) + 1e6, (dim,)).values.double()
    assert values.mean(dim).abs().max() < 1e-7


@pytest.mark.parametrize("valid", [None, torch.arange(512) % 3 > 0], ids=["all", "some"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e13, 1e30, 3e37])
@pytest.mark.parametrize("first", [0.0, 1e3], ids=["noise", "outlier first"])
def test_in_operations_for_a_compiler_as_well(first: float, scale: float, valid: Tensor | None) -> None:
    x = torch.randn(4, 512)
    x[:, 0] += first
    x *= scale / x.abs().max()

    def centered(row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = center(only(row, valid), (0,), valid, enlarge=True)
        power = found.scale.double()
        return found.values / power, found.squares / power.square(), found.column_mean

    values, squares, mean = torch.func.vmap(centered)(x)
    wide = x.double()
    chosen = wide if valid is None else wide[:, valid]
    expected = only(wide - chosen.mean(1, keepdim=True), valid)
    deviation = expected.square().sum(1, keepdim=True)
    assert ((values - expected).abs() <= 2e-6 * (deviation / chosen.shape[1]).sqrt() + 3e-7 * expected.abs()).all()
    assert ((squares - deviation).abs() <= 1e-6 * deviation).all()
    assert (mean.flatten() - chosen.mean(1)).abs().max() <= 1e-6 * scale
    same = torch.func.vmap(lambda row: center(row, (0,)).values)(torch.full((2, 777), scale))
    assert not same.any()
