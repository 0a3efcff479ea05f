"""Columns that have broken normalizations, as matrices of samples x columns (an even number of columns).

The marks hand them to a test, one after the other, under the name of its argument.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

Make = Callable[[], Tensor]


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


def both_ends() -> Tensor:
    """Both ends of float32, so that a distance from the mean is beyond it."""
    x = torch.full((512, 4), 3.4e38)
    x[::97] = -3.4e38
    return x


def denormal() -> Tensor:
    """Below the smallest normal number of float32."""
    return torch.randn(512, 4) * 1e-40


LEVELS: dict[str, Make] = {
    "mean 1e4": partial(far_away, 1e4),
    "mean 1e6": partial(far_away, 1e6),
    "mean -1e6": partial(far_away, -1e6),
    "10,000 in steps of 0.001": tight,
    "five at 2000": few,
}
MAGNITUDES: dict[str, Make] = {
    **{f"up to {magnitude:.0e}": partial(largest, magnitude) for magnitude in (1e18, 1e20, 1e25, 1e30, 3e38)},
    "1e-15, 1, 1e12 and 1e37": mixed,
}
EXTREMES: dict[str, Make] = {**MAGNITUDES, **LEVELS, "both ends": both_ends, "denormal": denormal}
CONSTANTS = (0.0, 1e3 / 3, 1e7 / 3, 1e10 / 3, 2.2e37, 3e37, 3.4e38, -1e20, 1e-40)
WIDTHS = (2, 3, 1023, 16385, 32769, 65537, 200003)
LONG = (65535, 65536, 131071, 140000)

every_level = pytest.mark.parametrize("make", LEVELS.values(), ids=LEVELS)
every_magnitude = pytest.mark.parametrize("make", MAGNITUDES.values(), ids=MAGNITUDES)
every_constant = pytest.mark.parametrize("value", CONSTANTS)
every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
at_either_end = pytest.mark.parametrize("place", ["first", "last"])


def outlier(rows: int, place: str = "first") -> Tensor:
    """One value of 1e6 among values of size 1."""
    x = torch.randn(rows, 4)
    x[0] = 1e6
    return x if place == "first" else x.flip(0)


def far_away_in(dtype: torch.dtype) -> Tensor:
    """A few dozen rounding steps of the dtype around 10,000."""
    spread = 100 * torch.finfo(dtype).eps
    return ((1 + spread * torch.randn(512, 4, dtype=torch.float64)) * 1e4).to(dtype)
