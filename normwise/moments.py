"""The currency of statistics, its merge, and how a column is centred without losing digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from normwise.sums import column_sum
from normwise.transforms import being_traced

# The sum of 10**10 squares of larger magnitudes may leave the dtype's range; such columns are shrunk by a power of two.
_LARGE = {torch.float32: 1e14, torch.float64: 1e145}
_SHRINK = {torch.float32: 2.0**-80, torch.float64: 2.0**-600}
_SMALL = {dtype: 1 / large for dtype, large in _LARGE.items()}
# Before the magnitude of a column is known its elements times this are summed, which stays finite.
_PEEK = 2.0**-40


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
    share = b.count / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
    distance = b.mean - a.mean
    return Moments(count, a.mean + distance * share, a.m2 + b.m2 + distance * (a.count * share) * distance)


def _mean(moments: Moments, *, unbiased: bool) -> Tensor:
    return moments.mean


def _var(moments: Moments, *, unbiased: bool) -> Tensor:
    return moments.variance(unbiased=unbiased)


def _mean_square(moments: Moments, *, unbiased: bool) -> Tensor:
    return moments.variance() + moments.mean.square()


class Statistic(Protocol):
    """A number that a memory may keep of a column's moments."""

    def __call__(self, moments: Moments, *, unbiased: bool) -> Tensor:
        """Compute it; `unbiased` matters to the variance only."""
        ...


STATISTICS: dict[str, Statistic] = {"mean": _mean, "var": _var, "mean_square": _mean_square}


class Centered(NamedTuple):
    """A column minus its mean, multiplied by `scale` (a power of two; None: 1), and how it was made.

    values = x * scale - offset - offset ..., one after another: their sum would have lost what makes them right.
    """

    values: Tensor
    scale: Tensor | None
    offsets: tuple[Tensor, ...]
    squares: Tensor  # the sum of squares of the values, below 0 at most by rounding

    @property
    def column_mean(self) -> Tensor:
        """The mean of the column itself, not scaled, in float64 where there is such a thing.

        A memory may merge it with others, and a large mean that is rounded to float32 would cost them their variance.
        """
        first, *others = self.offsets
        mean = first.to(first.dtype if first.device.type == "mps" else torch.float64)
        for offset in others:
            mean = mean + offset
        return mean if self.scale is None else mean / self.scale


def center(x: Tensor, dims: tuple[int, ...], valid: Tensor | None = None, *, enlarge: bool = False) -> Centered:
    """Subtract the mean over `dims` without losing digits, however large it is.

    Scale, shift, subtract the mean, subtract the mean of what is left.

    Shifting by an element of the column makes a constant column exactly 0 and takes a common offset away before
    anything is summed; the second mean takes away what rounding left of the first. A centred column does not depend on
    constants that are subtracted before its mean, so all but one of these are constants to autograd, at every order.

    Args:
        x: Where `valid` is False it must be finite, and 0 to be left out of `magnitude_scale`.
        dims: The dimensions that run down a column.
        valid: What counts, a mask that broadcasts against `x`; elsewhere the values are 0. None: everything.
        enlarge: Whether columns of tiny magnitudes are scaled as well.
    """
    count = sample_count(x.shape, dims, valid)
    if isinstance(count, Tensor):
        count = count.clamp_min(1)
    if being_traced() and valid is None:  # a mask may leave few samples, whose squares would lose digits there
        return _center_traced(x, dims, count, enlarge=enlarge)
    scale = magnitude_scale(x, dims, enlarge=enlarge)
    scaled = x if scale is None else x * scale
    shift = _anchor(scaled.detach(), dims, valid)
    shifted = only(scaled - shift, valid)
    mean = column_sum(shifted, dims) / count
    almost = only(minus(shifted, mean), valid)
    rest = column_sum(almost.detach(), dims) / count
    values = only(minus(almost, rest), valid)
    return Centered(values, scale, (shift, mean, rest), square_sum(values, dims))


def _center_traced(x: Tensor, dims: tuple[int, ...], count: Tensor | int, *, enlarge: bool) -> Centered:
    """The same in operations that a compiler makes two loops of, and two more of their derivative.

    Shift and first mean are one constant, all but the mean. What is left has the small mean m, and its squares about it
    are sum(left^2) - count m^2, where nothing cancels.
    """
    fixed = x.detach() * _PEEK
    anchor = _anchor(x.detach(), dims, None)
    distance = fixed - anchor * _PEEK
    mean, mean_square = averaged(column_sum(distance, dims), count), averaged(square_sum(distance, dims), count)
    large = mean_square > (_LARGE[x.dtype] * _PEEK) ** 2
    small = (mean_square == 0) & (anchor.abs() < _SMALL[x.dtype]) if enlarge else None
    scale = _power(large, small, x.dtype)
    shift = anchor * scale + mean * (scale / _PEEK)
    left = x * scale - shift
    rest = averaged(column_sum(left, dims), count)
    squares = square_sum(left, dims) - count * rest.square()
    return Centered(left - rest, scale, (shift, rest), squares)


def averaged(total: Tensor, count: Tensor | int) -> Tensor:
    """A mean, where there is a sample."""
    # a compiler divides anew for every few elements; by a tensor of counts it does not know better either
    return total * (1 / count) if being_traced() and isinstance(count, int) else total / count


def minus(x: Tensor, y: Tensor) -> Tensor:
    """The difference, in the place of `x` where no derivative is recorded: fresh memory costs more than arithmetic."""
    return x - y if _is_watched() else x.sub_(y)


def times(x: Tensor, y: Tensor) -> Tensor:
    """The product, in the place of `x` where no derivative is recorded."""
    return x * y if _is_watched() else x.mul_(y)


def _is_watched() -> bool:
    """Whether a value may still be wanted as it was before it is changed in place."""
    return torch.is_grad_enabled() or being_traced()


def only(x: Tensor, valid: Tensor | None) -> Tensor:
    """`x` where it is valid, 0 elsewhere, whatever stands there."""
    return x if valid is None else torch.where(valid, x, torch.zeros((), dtype=x.dtype, device=x.device))


def sample_count(shape: Sequence[int], dims: tuple[int, ...], valid: Tensor | None) -> Tensor | int:
    """How many samples count in each column: one number without a mask, with one a whole number a column."""
    if valid is None:
        return math.prod([shape[dim] for dim in dims])
    repeated = math.prod([shape[dim] for dim in dims if valid.shape[dim] == 1])
    return valid.sum(dims, keepdim=True) * repeated


def square_sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum of squares over `dims`."""
    return column_sum(x.square(), dims)


def scaled_square_sum(x: Tensor, dims: tuple[int, ...], *, enlarge: bool = False) -> tuple[Tensor | None, Tensor]:
    """A power of two, and the sum of squares of the column times that: `magnitude_scale`, then `square_sum`.

    For a compiler the sums with and without the power are made in one loop, and the right one is taken.
    """
    if not being_traced():
        scale = magnitude_scale(x, dims, enlarge=enlarge)
        return scale, square_sum(x if scale is None else x * scale, dims)
    shrink = _SHRINK[x.dtype]
    squares, shrunk = square_sum(x, dims), square_sum(x * shrink, dims)
    mean_square = averaged(squares.detach(), sample_count(x.shape, dims, None))
    large = mean_square > _LARGE[x.dtype] ** 2
    small = mean_square < _SMALL[x.dtype] ** 2 if enlarge else None
    squares = torch.where(large, shrunk, squares)
    if small is not None:
        squares = torch.where(small, square_sum(x / shrink, dims), squares)
    return _power(large, small, x.dtype), squares


def magnitude_scale(x: Tensor, dims: tuple[int, ...], *, enlarge: bool = False) -> Tensor | None:
    """The power of two, for each column, that keeps sums of squares finite: 1 unless magnitudes pass 1e14 (float32).

    None, where the host can see it for nothing: every column's is 1. With `enlarge`, columns below 1e-14 are scaled up,
    so that their squares do not vanish: for a normalization without an eps that would outweigh them.
    """
    x = x.detach()
    largest = torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))
    large, small = largest > _LARGE[x.dtype], largest < (_SMALL[x.dtype] if enlarge else 0)
    if x.device.type == "cpu" and not being_traced() and not (large | small).any():
        return None
    return _power(large, small, x.dtype)


def _power(large: Tensor, small: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The power of two that brings large and small magnitudes near 1."""
    one, shrink = torch.ones((), dtype=dtype, device=large.device), _SHRINK[dtype]
    otherwise = one if small is None else torch.where(small, one / shrink, one)
    return torch.where(large, shrink * one, otherwise)


def _anchor(x: Tensor, dims: tuple[int, ...], valid: Tensor | None) -> Tensor:
    """An element of each column: the first, or with a mask the largest that is valid (0 where none is)."""
    if valid is not None:
        lowest = torch.full((), -torch.inf, dtype=x.dtype, device=x.device)
        largest = torch.where(valid, x, lowest).amax(dims, keepdim=True)
        return torch.where(largest == -torch.inf, torch.zeros_like(largest), largest)
    for dim in dims:
        x = x.narrow(dim, 0, 1)
    return x.clone()  # a view would keep the whole of x alive until the backward
