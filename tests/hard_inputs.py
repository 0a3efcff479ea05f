"""Columns that have broken normalizations, as matrices of samples x columns (an even number of columns)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def far_away(mean: float) -> Tensor:
    """Spread 1 around a large mean."""
    return torch.randn(4096, 16) + mean


def tight() -> Tensor:
    """Spread of a few rounding steps at 10,000."""
    return (10000 + torch.arange(16) * 1e-3).unsqueeze(1).repeat(1, 4)


def few() -> Tensor:
    """Five samples at 2000."""
    return torch.randn(5, 4) + 2000


def largest(magnitude: float) -> Tensor:
    """Scaled until the largest magnitude is the one given."""
    x = torch.randn(512, 8)
    return (x / x.abs().max() * magnitude).clamp(-magnitude, magnitude)


def mixed() -> Tensor:
    """Ordinary columns beside huge ones and tiny ones."""
    return torch.randn(512, 4) * torch.tensor([1e-15, 1.0, 1e12, 1e37])


LEVELS: dict[str, Callable[[], Tensor]] = {
    "mean 1e4": partial(far_away, 1e4),
    "mean 1e6": partial(far_away, 1e6),
    "mean -1e6": partial(far_away, -1e6),
    "10,000 in steps of 0.001": tight,
    "five at 2000": few,
}
MAGNITUDES: dict[str, Callable[[], Tensor]] = {
    **{f"up to {magnitude:.0e}": partial(largest, magnitude) for magnitude in (1e18, 1e20, 1e25, 1e30, 3e38)},
    "1e-15, 1, 1e12 and 1e37": mixed,
}
CONSTANTS = (0.0, 1e3 / 3, 1e7 / 3, 1e10 / 3, 2.2e37, 3e37, 3.4e38, -1e20, 1e-40)
WIDTHS = (2, 3, 1023, 16385, 32769, 65537, 200003)
LONG = (65535, 65536, 131071, 140000)


def outlier(rows: int) -> Tensor:
    """One value of 1e6, the first, among values of size 1."""
    x = torch.randn(rows, 4)
    x[0] = 1e6
    return x
