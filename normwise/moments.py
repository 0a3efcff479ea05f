"""The currency of statistics, its merge, and how a column is centred without losing digits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Squares of larger magnitudes, or their sum, may leave the dtype's range; such columns are shrunk by a power of two.
_LARGE = {torch.float32: 1e18, torch.float64: 1e150}
_SHRINK = {torch.float32: 2.0**-80, torch.float64: 2.0**-600}


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of each column: all that a standardization needs, and mergeable.

    Masks, sub-batches, past batches and other processes are all `merge`.
    """

    count: Tensor | int  # type: ignore[assignment]  # hides tuple.count, which nobody counts with
    mean: Tensor
    m2: Tensor

    def variance(self, *, unbiased: bool = False) -> Tensor:
        """`m2 / count`, or `m2 / (count - 1)`, the unbiased estimate."""
        return self.m2 / (self.count - 1 if unbiased else self.count)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two sets of samples joined.

    With d = mean_b - mean_a and n = n_a + n_b: mean = mean_a + d n_b / n and m2 = m2_a + m2_b + d^2 n_a n_b / n.
    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).

    >>> a = Moments(2, torch.tensor(1.0), torch.tensor(2.0))  # 0, 2
    >>> b = Moments(1, torch.tensor(7.0), torch.tensor(0.0))  # 7
    >>> merge(a, b)
    Moments(count=3, mean=tensor(3.), m2=tensor(26.))
    """
    count = a.count + b.count
    share = b.count / count
    distance = b.mean - a.mean
    return Moments(count, a.mean + distance * share, a.m2 + b.m2 + distance.square() * (a.count * share))


class Centered(NamedTuple):
    """A column minus its mean, multiplied by `scale` (a power of two, 1 for ordinary magnitudes), and its moments."""

    values: Tensor
    scale: Tensor
    square_sum: Tensor  # of `values`
    mean: Tensor  # of the column itself, not scaled


def center(x: Tensor, dims: tuple[int, ...]) -> Centered:
    """Subtract the mean over `dims` without losing digits, however large it is.

    Scale, shift, subtract the mean, subtract the mean of what is left.

    Shifting by an element of the column makes a constant column exactly 0 and takes a common offset away before
    anything is summed; the second mean takes away what rounding left of the first. Both are constants to autograd: the
    result does not depend on the shift, and a centred column has mean 0 at every order.
    """
    scale = magnitude_scale(x, dims)
    scaled = x * scale
    shift = _first(scaled.detach(), dims)
    shifted = scaled - shift
    mean = shifted.mean(dims, keepdim=True)
    almost = shifted - mean
    rest = almost.detach().mean(dims, keepdim=True)
    values = almost - rest
    return Centered(values, scale, square_sum(values, dims), (shift + (mean + rest)) / scale)


def square_sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum of squares over `dims`."""
    return x.square().sum(dims, keepdim=True)


def magnitude_scale(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The power of two, for each column, that keeps sums of squares finite: 1 unless magnitudes pass 1e18 (float32)."""
    largest = x.detach().abs().amax(dims, keepdim=True)
    one = torch.ones((), dtype=x.dtype, device=x.device)
    return torch.where(largest > _LARGE[x.dtype], _SHRINK[x.dtype] * one, one)


def _first(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    for dim in dims:
        x = x.narrow(dim, 0, 1)
    return x
