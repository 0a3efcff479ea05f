"""Sums down a column whose bits depend on that column alone, not on how many columns stand beside it.

torch's `sum` adds in an order that depends on where a column lies among the others, and divides a single long column
among threads. Promise 7 of normwise is that the result for a row is the same in any batch, so the order is fixed here:
by the length of a column alone, and not by the number of columns or threads, or by how the tensor lies in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise.transforms import being_traced

_SHORT = 1024  # a row of so few elements is summed by torch, which does not divide it among threads


def column_sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum over `dims`, which stay as dimensions of size 1.

    Under a compiler or a function transform it is torch's sum.

    >>> column_sum(torch.ones(3, 4), (0,))
    tensor([[3., 3., 3., 3.]])
    """
    if not dims:
        return x
    if being_traced() or x.numel() == 0:
        return x.sum(dims, keepdim=True)
    if x.requires_grad and torch.is_grad_enabled():
        summed: Tensor = _ColumnSum.apply(x, dims)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return summed
    return _in_fixed_order(x, dims)


class _ColumnSum(torch.autograd.Function):
    """The sum in a fixed order, with a sum's derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.shape = x.shape
        return _in_fixed_order(x, dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.expand(ctx.shape), None


def _in_fixed_order(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """One run of neighbouring dimensions after the other, the last first."""
    shape = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
    for first, last in reversed(_runs(sorted(dims))):
        x = _sum_of_rows(x.flatten(first, last).movedim(first, -1))
        for dim in range(first, last + 1):
            x = x.unsqueeze(dim)
    return x.reshape(shape)


def _runs(dims: list[int]) -> list[tuple[int, int]]:
    """Neighbouring numbers as pairs of first and last."""
    runs: list[tuple[int, int]] = []
    for dim in dims:
        if runs and runs[-1][1] == dim - 1:
            runs[-1] = (runs[-1][0], dim)
        else:
            runs.append((dim, dim))
    return runs


def _sum_of_rows(x: Tensor) -> Tensor:
    """The sum over the last dimension: halves are added to each other until it is short, and then lies as a row."""
    odd = []
    while (size := x.shape[-1]) > _SHORT:
        half = size // 2
        if size % 2:
            odd.append(x[..., -1])
        x = x[..., :half] + x[..., half : 2 * half]
    total = x.contiguous().sum(-1)
    for element in odd:
        total = total + element
    return total
