"""Step 2, normalize: from columns to normalized columns, with this batch's statistics or remembered ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from normwise.moments import Moments, center, magnitude_scale, square_sum
from normwise.plan import dim_product


class Normalized(NamedTuple):
    """What a normalizer makes of a batch: values = slope * (x - mean), or slope * x where no mean is subtracted."""

    values: Tensor
    slope: Tensor  # one number a column
    moments: Moments  # detached: what a memory may keep


class Normalizer(Protocol):
    """What `Norm` asks of a normalizer; any frozen dataclass with these members can be declared."""

    remembers: ClassVar[tuple[str, ...]]  # names of the statistics that a memory keeps
    needs_two: ClassVar[bool]  # whether a column of one sample is degenerate

    def normalize(self, view: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Normalized:
        """Normalize over `dims` with this batch's statistics. `dtype` is that of the layer's input."""
        ...

    def apply(self, view: Tensor, remembered: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Normalize with remembered statistics, in the order of `remembers`."""
        ...

    def statistics(self, moments: Moments, *, unbiased: bool) -> tuple[Tensor, ...]:
        """What a memory keeps of a batch, in the order of `remembers`."""
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

    def normalize(self, view: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Normalized:
        """(x - mean) / sqrt(var + eps) with the mean and biased variance over `dims`."""
        centered = center(view, dims)
        rows = dim_product(view.shape, dims)
        inverse = _inverse_root(centered.square_sum / rows, self.eps, centered.scale)
        m2 = centered.square_sum.detach() / centered.scale / centered.scale
        moments = Moments(rows, centered.mean.detach(), m2)
        return Normalized(centered.values * inverse, inverse * centered.scale, moments)

    def apply(self, view: Tensor, remembered: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """(x - mean) / sqrt(var + eps) with a remembered mean and variance."""
        mean, var = remembered
        return (view - mean) * (var + self.eps).rsqrt()

    def statistics(self, moments: Moments, *, unbiased: bool) -> tuple[Tensor, ...]:
        """Mean and variance."""
        return moments.mean, moments.variance(unbiased=unbiased)

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

    def normalize(self, view: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Normalized:
        """x / sqrt(mean(x^2) + eps) with the mean square over `dims`, returned as moments about 0."""
        scale = magnitude_scale(view, dims)
        scaled = view * scale
        squares = square_sum(scaled, dims)
        rows = dim_product(view.shape, dims)
        inverse = _inverse_root(squares / rows, self._eps(dtype), scale)
        moments = Moments(rows, torch.zeros_like(squares), squares.detach() / scale / scale)
        return Normalized(scaled * inverse, inverse * scale, moments)

    def apply(self, view: Tensor, remembered: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """x / sqrt(mean(x^2) + eps) with a remembered mean square."""
        (mean_square,) = remembered
        return view * (mean_square + self._eps(dtype)).rsqrt()

    def statistics(self, moments: Moments, *, unbiased: bool) -> tuple[Tensor, ...]:
        """The mean square; there is no unbiased variant of it, because no mean is estimated."""
        return (moments.variance(),)

    def formula(self) -> str:
        """The formula with its numbers."""
        return f"x / sqrt(mean(x^2) + {'machine epsilon' if self.eps is None else self.eps})"

    def _eps(self, dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps if self.eps is None else self.eps


def _check_eps(eps: float) -> None:
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps is a finite number from 0 on, not {eps}")


def _inverse_root(mean_square: Tensor, eps: float, scale: Tensor) -> Tensor:
    """1 / sqrt(mean_square + eps scale^2): eps keeps its meaning for a scaled column, and 0 stays out of the root."""
    return (mean_square + eps * scale * scale).clamp_min(torch.finfo(mean_square.dtype).tiny).rsqrt()
