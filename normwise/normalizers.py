"""Step 2, normalize: from columns to normalized columns, with this batch's statistics or remembered ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from normwise.errors import PatternError
from normwise.moments import Moments, averaged, center, minus, only, sample_count, scaled_square_sum, times


class Line(NamedTuple):
    """What normalizing is once a column is measured: values = (x * scale - offset - offset ...) * inverse.

    The offsets are subtracted one after another, because their sum would have lost what makes them right.
    """

    scale: Tensor | None  # None: 1
    offsets: tuple[Tensor, ...]
    inverse: Tensor

    def values(self, view: Tensor, valid: Tensor | None = None) -> Tensor:
        """The normalized values, 0 where `valid` is False."""
        values = view if self.scale is None else view * self.scale
        for offset in self.offsets:
            values = view - offset if values is view else minus(values, offset)
        return only(view * self.inverse if values is view else times(values, self.inverse), valid)

    def recovered(self, view: Tensor, weight: Tensor | float, bias: Tensor | float) -> Tensor:
        """The normalized values * weight + bias, multiplied out: left * slope + (bias - rest * slope).

        `left` is x * scale without all offsets but the last, which is `rest`, and `slope` is inverse * weight. It loses
        no digits where there is more than one offset: the last is then what rounding left of the column's mean.
        """
        *others, rest = self.offsets
        left = view if self.scale is None else view * self.scale
        for offset in others:
            left = left - offset
        slope = self.inverse * weight
        return left * slope + (bias - rest * slope)

    @property
    def slope(self) -> Tensor:
        """The derivative of a value by its own x, statistics held fixed."""
        return self.inverse if self.scale is None else self.inverse * self.scale


class Normalized(NamedTuple):
    """What a normalizer makes of a batch."""

    values: Tensor
    line: Line
    moments: Moments  # detached: what a memory may keep


class Normalizer(Protocol):
    """What `Norm` asks of a normalizer; any frozen dataclass with these members can be declared."""

    remembers: ClassVar[tuple[str, ...]]  # the statistics of `Moments` that a memory keeps: see `moments.STATISTICS`
    needs_two: ClassVar[bool]  # whether a column of one sample is degenerate

    def normalize(
        self, view: Tensor, dims: tuple[int, ...], dtype: torch.dtype, valid: Tensor | None = None
    ) -> Normalized:
        """Normalize over `dims` with this batch's statistics.

        `dtype` is that of the layer's input. Where `valid` is False, `view` is 0 and does not count.
        """
        ...

    def recall(self, remembered: tuple[Tensor, ...], dtype: torch.dtype) -> Line:
        """How to normalize with remembered statistics, in the order of `remembers`."""
        ...

    def formula(self) -> str:
        """One line for a reader."""
        ...


@dataclass(frozen=True)
class Standardize:
    """Standardization: (x - mean) / sqrt(var + eps), column by column.

    The variance is biased (divided by the number of samples) and eps stands under the root. Statistics are taken in
    float32 at least, in two passes with the residual mean taken out again; a constant column gives exactly 0.

    Args:
        eps: Added to the variance, in its unit.

    Raises:
        ValueError: eps is negative or not finite.
    """

    remembers: ClassVar[tuple[str, ...]] = ("mean", "var")
    needs_two: ClassVar[bool] = True

    eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def normalize(
        self, view: Tensor, dims: tuple[int, ...], dtype: torch.dtype, valid: Tensor | None = None
    ) -> Normalized:
        """(x - mean) / sqrt(var + eps) with the mean and biased variance over `dims`."""
        centered = center(view, dims, valid, enlarge=self.eps == 0)
        count = sample_count(view.shape, dims, valid)
        inverse = _inverse_root(_divided(centered.squares, count), self.eps, centered.scale)
        line = Line(centered.scale, centered.offsets, inverse)
        squares = centered.squares.detach().clamp_min(0)
        moments = Moments(count, centered.column_mean.detach(), _unscaled(squares, centered.scale))
        return Normalized(times(centered.values, inverse), line, moments)

    def recall(self, remembered: tuple[Tensor, ...], dtype: torch.dtype) -> Line:
        """(x - mean) / sqrt(var + eps) with a remembered mean and variance."""
        mean, var = remembered
        return Line(None, (mean,), (var + self.eps).rsqrt())

    def formula(self) -> str:
        """The formula with its numbers."""
        return f"(x - mean) / sqrt(var + {self.eps}), biased variance"


@dataclass(frozen=True)
class RMS:
    """Root mean square: x / sqrt(mean(x^2) + eps), column by column. No mean is subtracted.

    Args:
        eps: Added to the mean square. None: the machine epsilon of the input's dtype, as `torch.nn.RMSNorm` has it.

    Raises:
        ValueError: eps is negative or not finite.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    remembers: ClassVar[tuple[str, ...]] = ("mean_square",)
    needs_two: ClassVar[bool] = False

    eps: float | None = None

    def __post_init__(self) -> None:
        if self.eps is not None:
            _check_eps(self.eps)

    def normalize(
        self, view: Tensor, dims: tuple[int, ...], dtype: torch.dtype, valid: Tensor | None = None
    ) -> Normalized:
        """x / sqrt(mean(x^2) + eps) with the mean square over `dims`, returned as moments about 0."""
        return _by_root(view, dims, valid, self._eps(dtype), averages=True)

    def recall(self, remembered: tuple[Tensor, ...], dtype: torch.dtype) -> Line:
        """x / sqrt(mean(x^2) + eps) with a remembered mean square."""
        (mean_square,) = remembered
        return Line(None, (), (mean_square + self._eps(dtype)).rsqrt())

    def formula(self) -> str:
        """The formula with its numbers."""
        return f"x / sqrt(mean(x^2) + {'machine epsilon' if self.eps is None else self.eps})"

    def _eps(self, dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps if self.eps is None else self.eps


@dataclass(frozen=True)
class L2:
    """Euclidean norm: x / sqrt(sum(x^2) + eps), column by column, as `torch.nn.functional.normalize` does it.

    torch's takes the larger of the norm and its eps, 1e-12; here its square stands under the root, which is smooth. The
    norm of zeros in half precision is no 0 / 0: it is computed in float32 at least, and the result is 0.

    There is nothing to remember: a norm belongs to one vector.

    Args:
        eps: Added to the sum of squares.

    Raises:
        ValueError: eps is negative or not finite.

    >>> Norm("... [d]", L2())(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """

    remembers: ClassVar[tuple[str, ...]] = ()
    needs_two: ClassVar[bool] = False

    eps: float = 1e-24

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def normalize(
        self, view: Tensor, dims: tuple[int, ...], dtype: torch.dtype, valid: Tensor | None = None
    ) -> Normalized:
        """x / sqrt(sum(x^2) + eps) with the sum over `dims`, returned as moments about 0."""
        return _by_root(view, dims, valid, self.eps, averages=False)

    def recall(self, remembered: tuple[Tensor, ...], dtype: torch.dtype) -> Line:
        """Refuse: nothing is remembered, and a memory cannot be declared.

        Raises:
            PatternError: always.
        """
        raise PatternError("L2 has no statistics to recall")

    def formula(self) -> str:
        """The formula with its numbers."""
        return f"x / sqrt(sum(x^2) + {self.eps})"


def _by_root(view: Tensor, dims: tuple[int, ...], valid: Tensor | None, eps: float, *, averages: bool) -> Normalized:
    """x / sqrt(squares + eps), with the mean of the squares, or their sum."""
    scale, squares = scaled_square_sum(view, dims, enlarge=eps == 0)
    scaled = view if scale is None else view * scale
    count = sample_count(view.shape, dims, valid)
    inverse = _inverse_root(_divided(squares, count) if averages else squares, eps, scale)
    about = squares.detach() * 0  # 0, or nan where the column itself is not finite
    moments = Moments(count, about, _unscaled(squares.detach(), scale))
    return Normalized(scaled * inverse, Line(scale, (), inverse), moments)


def _check_eps(eps: float) -> None:
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps is a finite number from 0 on, not {eps}")


def _divided(total: Tensor, count: Tensor | int) -> Tensor:
    """A mean; 0 for a column without a sample."""
    return averaged(total, count.clamp_min(1) if isinstance(count, Tensor) else count)


def _unscaled(squares: Tensor, scale: Tensor | None) -> Tensor:
    return squares if scale is None else squares / scale / scale


def _inverse_root(mean_square: Tensor, eps: float, scale: Tensor | None) -> Tensor:
    """1 / sqrt(mean_square + eps scale^2): eps keeps its meaning for a scaled column, and 0 stays out of the root.

    Where a column is shrunk, eps scale^2 may be too small for the dtype; it matters only if the mean square is 0, and
    the root of it is not too small.
    """
    tiny = torch.finfo(mean_square.dtype).tiny
    if scale is None:
        return (mean_square + eps).clamp_min(tiny).rsqrt()
    inverse = (mean_square + eps * scale * scale).clamp_min(tiny).rsqrt()
    constant = (scale < 1) & (mean_square == 0)
    return torch.where(constant, (max(eps, tiny) ** 0.5 * scale).reciprocal(), inverse)
