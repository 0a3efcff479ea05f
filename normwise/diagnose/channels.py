"""Statistics of activations by channel, gathered batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normwise.moments import Moments, center, merge, sample_count
from normwise.surgery.kinds import channel_dim, kind_of

_NEAR = 0.01  # of the distance between the bounds


@dataclass(frozen=True)
class Range:
    """Where the values of an activation function end.

    Attributes:
        low: The lower bound, None where there is none, or where the function is cut off at 0.
        high: The upper bound.
        cut: Whether it is exactly 0 for every negative input.
    """

    low: float | None = None
    high: float | None = None
    cut: bool = False

    @property
    def bounded(self) -> bool:
        """Whether there is an end that a unit can saturate at."""
        return self.low is not None or self.high is not None

    def near(self, x: Tensor) -> Tensor:
        """Where values are within 1 % of the range of a bound; for a sigmoid or tanh, a slope below 4 % of the best."""
        low, high = (0.0 if self.low is None else self.low), (1.0 if self.high is None else self.high)
        slack = _NEAR * (high - low)
        near = torch.zeros_like(x, dtype=torch.bool)
        if self.low is not None:
            near |= x <= low + slack
        if self.high is not None:
            near |= x >= high - slack
        return near


_RANGES = {
    "sigmoid": Range(0.0, 1.0),
    "hardsigmoid": Range(0.0, 1.0),
    "tanh": Range(-1.0, 1.0),
    "softsign": Range(-1.0, 1.0),
    "relu6": Range(high=6.0, cut=True),
}
FUNCTIONS = frozenset({"relu", "elu", "selu", "celu", "gelu", "silu", "mish", "leaky_relu", "softplus", "hardswish"})
FUNCTIONS |= {"hardtanh", *_RANGES}


def range_of(name: str, bounds: tuple[float, float] | None = None) -> Range | None:
    """The range of an activation function by its name or class, in any case; None: it is none, or has no ends.

    Args:
        name: "relu", "ReLU", "Sigmoid", "hardtanh", ...
        bounds: Those of a hard tanh.

    >>> range_of("ReLU"), range_of("Hardtanh", (0.0, 6.0)), range_of("GELU")
    (Range(low=None, high=None, cut=True), Range(low=None, high=6.0, cut=True), None)
    """
    name = name.lower().rstrip("_")
    if name in _RANGES:
        return _RANGES[name]
    if name == "hardtanh":
        low, high = (-1.0, 1.0) if bounds is None else bounds
        return Range(None if low == 0 else low, high, cut=low == 0)
    return Range(cut=True) if name.startswith("relu") else None


def layout_of(layer: nn.Module, rank: int) -> int | None:
    """The dimension of a layer's output that holds the channels; None: the layer does not say."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return 1 if rank == len(layer.kernel_size) + 2 else 0
    if isinstance(layer, (nn.Linear, nn.Bilinear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)):
        return rank - 1
    kind = kind_of(layer)
    return None if kind is None or kind.spec is None else channel_dim(kind.spec, rank)


class Channels:
    """What is known of the channels of one activation; batches are joined by Chan's formula, in float64.

    Attributes:
        moments: Count, mean and sum of squared deviations, for each channel.
        largest: The largest magnitude of each channel.
        near: How many values of each channel are near a bound.
        nonfinite: How many values are not finite; they count nowhere else.
        apart: Whether the channels of all batches were as many, and so are the same.
        rounding: The relative distance of two neighbouring values, in the dtype that came.
    """

    def __init__(self, x: Tensor, dim: int, limits: Range | None) -> None:
        self.rounding = float(torch.finfo(x.dtype).eps)
        x = x.reshape(-1, 1) if x.dim() < 2 else x
        x = x.float() if x.element_size() < 4 else x  # half precision
        dims = tuple(d for d in range(x.dim()) if d != dim % x.dim())
        finite = x.isfinite()
        valid = None if finite.all() else finite
        self.nonfinite = 0 if valid is None else int((~valid).sum())
        x = x if valid is None else torch.where(valid, x, torch.zeros_like(x))
        centered = center(x, dims, valid)
        mean = centered.column_mean.flatten()
        m2 = centered.squares.to(mean.dtype)
        m2 = m2 if centered.scale is None else m2 / centered.scale.to(mean.dtype).square()
        self.moments = Moments(torch.zeros_like(mean) + _flat(sample_count(x.shape, dims, valid)), mean, m2.flatten())
        self.largest = x.abs().amax(dims).flatten()
        near = torch.zeros_like(finite) if limits is None else limits.near(x) & finite
        self.near = near.sum(dims).flatten()
        self.apart = True

    def join(self, other: Channels) -> None:
        """Add another batch; if it has another number of channels, they are no longer told apart."""
        if len(other.largest) != len(self.largest):
            self._pool()
            other._pool()
        self.moments = merge(self.moments, other.moments)
        self.largest = torch.maximum(self.largest, other.largest)
        self.near = self.near + other.near
        self.nonfinite += other.nonfinite

    def total(self) -> Moments:
        """The moments of all channels joined, as tensors of one element."""
        count, mean, m2 = self.moments
        whole = torch.as_tensor(count, device=mean.device).sum()
        center_of_all = (count * mean).sum() / whole.clamp_min(1)
        spread = (m2 + count * (mean - center_of_all).square()).sum()
        return Moments(whole, center_of_all, spread)

    def variance(self) -> Tensor:
        """Of each channel, biased."""
        return self.moments.m2 / torch.as_tensor(self.moments.count).clamp_min(1)

    def constant(self) -> Tensor:
        """Which channels do not vary by more than neighbouring values of the dtype differ."""
        varies = self.variance().sqrt() > self.rounding * self.moments.mean.abs()
        return ~varies & (torch.as_tensor(self.moments.count) > 1)

    def dead(self) -> Tensor:
        """Which channels are 0 everywhere."""
        return (self.largest == 0) & (torch.as_tensor(self.moments.count) > 0)

    def share_near(self) -> Tensor:
        """The share of each channel's values that are near a bound."""
        return self.near / torch.as_tensor(self.moments.count).clamp_min(1)

    def _pool(self) -> None:
        self.moments = Moments(*(part.reshape(1) for part in self.total()))  # type: ignore[union-attr]
        self.largest, self.near = self.largest.amax().reshape(1), self.near.sum().reshape(1)
        self.apart = False


def _flat(count: Tensor | int) -> Tensor | int:
    return count.flatten() if isinstance(count, Tensor) else count
