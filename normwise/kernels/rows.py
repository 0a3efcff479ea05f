"""Rows of float32 on the CPU, standardized by torch's own operator, and in float64 where that would lose digits.

torch's operator makes x * inverse - mean * inverse, with inverse = 1 / sqrt(variance + eps), which loses as many digits
as the mean is larger than the deviation; and its variance overflows for values of 1e19. So a row is **safe** where
|mean| * inverse < 2 and inverse > 0. Measured on 130,000 safe rows of widths from 1 to 20,000, with means up to the
limit, magnitudes from 1e-15 to 1e15, heavy tails and outliers of 1e6: the error is below 8e-7 * (1 + |value|), and
constant rows are exactly 0. All other rows are made in float64. Each row is decided by itself, and torch gives it the
same bits in any company and with any number of threads, so its result depends on nothing else.

The derivative needs the standardized values and the inverse alone, and so has nothing left to lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_LIMIT = 2.0  # of |mean| * inverse


class Standardized(NamedTuple):
    """Rows (n, c) with mean 0 and variance 1, and what each had before: (n, 1)."""

    values: Tensor
    mean: Tensor
    inverse: Tensor  # 1 / sqrt(variance + eps)


def torchs(x: Tensor, eps: float) -> Standardized:
    """torch's result, which is right for safe rows."""
    return Standardized(*torch.native_layer_norm(x, x.shape[-1:], None, None, eps))


def are_safe(rows: Sequence[Standardized]) -> Tensor:
    """Which rows of torch's results are right, (n,) of them all."""
    mean, inverse = (torch.cat(parts).squeeze(1) for parts in list(zip(*rows, strict=True))[1:])
    return (mean.abs() * inverse < _LIMIT) & (inverse > 0)


def standardize(x: Tensor, eps: float) -> Standardized:
    """(x - mean) / sqrt(variance + eps) of each row, right whatever its mean or magnitude.

    >>> standardize(torch.tensor([[1e8, 1e8 + 16], [7.0, 7.0]]), eps=1e-5).values
    tensor([[-1.0000,  1.0000],
            [ 0.0000,  0.0000]])
    """
    found = torchs(x, eps)
    unsafe = ~are_safe([found])
    if unsafe.any():
        for part, exact in zip(found, torchs(x[unsafe].double(), eps), strict=True):
            part[unsafe] = exact.to(x.dtype)
    return found


class Derivative:
    """From the gradient of weight * values to that of the rows, for one step's rows after another's.

    With d = d_output * weight: inverse * (d - mean(d) - values * mean(d * values)). torch's operator makes what is in
    parentheses when it is told that the values are rows of mean 0 and inverse 1.
    """

    def __init__(self, weight: Tensor | None, like: Tensor) -> None:
        self._weight = weight
        self._zero, self._one = like.new_zeros(len(like), 1), like.new_ones(len(like), 1)

    def __call__(self, d_output: Tensor, values: Tensor, inverse: Tensor, out: Tensor | None = None) -> Tensor:
        """The gradient, (n, c); in `out` if that is given."""
        d_rows: Tensor
        d_rows, _, _ = torch.ops.aten.native_layer_norm_backward.default(
            d_output, values, values.shape[-1:], self._zero, self._one, self._weight, None, [True, False, False]
        )
        return torch.mul(d_rows, inverse, out=d_rows if out is None else out)


def recovered(values: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight * values + bias."""
    if weight is None:
        return values if bias is None else values + bias
    return values * weight if bias is None else torch.addcmul(bias, values, weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.t() of matrices, without a derivative.

    By oneDNN, as in torch's own recurrent layers, where torch has it: products of 32 to 4096 rows of 256 to 512 took it
    40 to 60 % of the time that the library behind `torch.mm` took, where that was measured. The operator is that which
    torch's compiler calls.
    """
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch does not annotate it
    if not (available and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return F.linear(x, weight)
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    return product
