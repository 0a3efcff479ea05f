"""Sums down a column: right, differentiable, and the same bits whatever stands beside the column."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from normwise.sums import column_sum
from tests.catalogue import LAYOUTS
from tests.settings import threads
from tests.tolerances import DOUBLE, SUMMED, VALUES, check

ROWS = (1, 2, 3, 16, 1023, 1024, 1025, 2048, 2049, 4099, 65537)


@pytest.mark.parametrize("rows", ROWS)
def test_a_sum_is_the_sum(rows: int) -> None:
    x = torch.rand(rows, 3)
    for dims in ((0,), (1,), (0, 1)):
        check(column_sum(x, dims).double(), x.double().sum(dims, keepdim=True), SUMMED)
        check(column_sum(x.double(), dims), x.double().sum(dims, keepdim=True), DOUBLE)


def test_no_dimension_is_no_sum() -> None:
    x = torch.randn(3, 4)
    assert column_sum(x, ()) is x


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4)], ids=str)
def test_sums_of_nothing_are_zero(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    for count in range(1, len(shape) + 1):
        for dims in itertools.combinations(range(len(shape)), count):
            total = column_sum(x, dims)
            assert total.shape == tuple(1 if dim in dims else size for dim, size in enumerate(shape))
            assert not total.any()


@pytest.mark.parametrize("rows", ROWS)
def test_a_column_has_the_same_bits_beside_any_others(rows: int) -> None:
    columns = torch.randn(rows, 40) * torch.logspace(-3, 3, 40)
    whole = column_sum(columns, (0,))
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33):
        assert torch.equal(column_sum(columns[:, :count], (0,)), whole[:, :count])
        assert torch.equal(column_sum(columns[:, -count:].clone(), (0,)), whole[:, -count:])
    assert torch.equal(column_sum(columns[:, 5], (0,)), whole[:, 5])


@pytest.mark.parametrize("rows", ROWS)
def test_a_column_has_the_same_bits_in_any_layout_and_with_any_number_of_threads(rows: int) -> None:
    columns = torch.randn(rows, 6)
    whole = column_sum(columns, (0,))
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(column_sum(columns, (0,)), whole)
            assert torch.equal(column_sum(columns.T, (1,)), whole.T)
            assert torch.equal(column_sum(columns.T.contiguous(), (1,)), whole.T)
            assert torch.equal(column_sum(columns[:, :1].clone(), (0,)), whole[:, :1])
            assert torch.equal(column_sum(columns.reshape(rows, 2, 3).transpose(0, 1), (1,)), whole.reshape(2, 1, 3))
            strided = torch.stack((columns, columns), -1).flatten(-2)[:, ::2]
            assert torch.equal(column_sum(strided, (0,)), whole)
            assert torch.equal(column_sum(columns[:, :1].expand(rows, 5), (0,)), whole[:, :1].expand(1, 5))


@pytest.mark.parametrize("dims", [(0, 2, 3), (2, 3), (1,), (0,), (1, 2, 3), (0, 1, 2, 3)], ids=str)
def test_several_dimensions_in_any_layout(dims: tuple[int, ...]) -> None:
    x = torch.rand(5, 6, 17, 13)
    whole = column_sum(x, dims)
    check(whole.double(), x.double().sum(dims, keepdim=True), SUMMED)
    for lay in LAYOUTS.values():
        assert torch.equal(column_sum(lay(x), dims), whole)
    assert torch.equal(column_sum(x, tuple(reversed(dims))), whole)


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    data=st.data(),
)
def test_any_shape(shape: list[int], scale: float, data: st.DataObject) -> None:
    dims = tuple(data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, max_size=len(shape), unique=True)))
    x = torch.randn(shape, dtype=torch.double)
    check(column_sum(x * scale, dims) / scale, x.sum(dims, keepdim=True), DOUBLE)


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_derivatives(dims: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, 2, dtype=torch.double, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return column_sum(x.square() * x, dims)

    assert gradcheck(call, (x,))
    assert gradgradcheck(call, (x,))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, at its first forward-mode derivative
def test_function_transforms() -> None:
    x = torch.randn(5, 4, 3)
    tangent = torch.randn(5, 4, 3)
    check(torch.vmap(lambda x: column_sum(x, (0,)))(x), torch.stack([column_sum(part, (0,)) for part in x]), VALUES)
    total, moved = torch.func.jvp(lambda x: column_sum(x, (0, 2)), (x,), (tangent,))
    check(total, column_sum(x, (0, 2)), VALUES)
    check(moved, column_sum(tangent, (0, 2)), VALUES)
    assert torch.equal(torch.func.grad(lambda x: (column_sum(x, (1,)) * 3).sum())(x), torch.full_like(x, 3.0))


def test_the_gradient_is_not_written_into_and_costs_no_memory() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    cotangent = torch.randn(1, 3)
    before = cotangent.clone()
    (grad,) = torch.autograd.grad(column_sum(x, (0,)), x, cotangent)
    assert torch.equal(grad, before.expand(4, 3))
    assert torch.equal(cotangent, before)
    with torch.no_grad():
        assert not column_sum(x, (0,)).requires_grad
