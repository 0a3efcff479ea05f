"""What is true in float64, and how near a layer comes to it, output and gradient alike.

Errors are counted in roundings: one is half an ulp of 1 in float32, 2**-24. Output errors are relative to the column's
largest normalized value, gradient errors to the largest cotangent and to the slope 1 / sqrt(var + eps): a column at
1e30 and one at 1e-30 are held to the same bound.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import normwise as nw
from tests.catalogue import FAMILIES, ChannelsFirstLayerNorm, ChannelsFirstRMSNorm, Family, Relay
from tests.tolerances import EXACT, OUTLIER, ROUNDINGS

_MakeTwin = {
    "BatchNorm": lambda rows, columns, **o: nn.BatchNorm1d(columns, **o),
    "BatchNorm of images": lambda rows, columns, **o: nn.BatchNorm2d(columns, **o),
    "LayerNorm": lambda rows, columns, **o: nn.LayerNorm(rows, **o),
    "LayerNorm2d": lambda rows, columns, **o: ChannelsFirstLayerNorm(rows, **o),
    "InstanceNorm": lambda rows, columns, **o: nn.InstanceNorm1d(columns, **o),
    "GroupNorm": lambda rows, columns, **o: nn.GroupNorm(2, 2 * rows, **o),
    "RMSNorm": lambda rows, columns, **o: nn.RMSNorm(rows, **o),
    "RMSNorm2d": lambda rows, columns, **o: ChannelsFirstRMSNorm(rows, **o),
}
TORCH = {name: replace(family, layer=_MakeTwin[name]) for name, family in ((f.name, f) for f in FAMILIES)}
DECLARED = (
    Family(
        "Norm of time steps",
        lambda rows, columns, **o: nw.Norm(
            "[n] t c", nw.Standardize(**o), memory=nw.Moving("t c", decay=0.9), t=2, c=columns // 2
        ),
        lambda m: m.reshape(m.shape[0], 2, m.shape[1] // 2),
        lambda y: y.flatten(1),
    ),
    Family(
        "Norm, rms over the middle",
        lambda rows, columns, **o: nw.Norm("a [d] b", nw.RMS(**o)),
        lambda m: m.reshape(m.shape[0], 2, m.shape[1] // 2).transpose(0, 1),
        lambda y: y.transpose(0, 1).flatten(1),
        centers=False,
    ),
)
EVERY = (*FAMILIES, *DECLARED)


class Truth(NamedTuple):
    """Output, gradient and slope in float64."""

    y: Tensor
    dx: Tensor
    slope: Tensor


class Errors(NamedTuple):
    """The largest error of the output, as it is and in roundings, and of the gradient, in roundings."""

    absolute: float
    output: float
    gradient: float

    @property
    def roundings(self) -> float:
        """The larger of the two."""
        return max(self.output, self.gradient)


def truth(x: Tensor, dy: Tensor, dims: tuple[int, ...], eps: float, *, centers: bool = True) -> Truth:
    """The formula and its derivative in float64, with the mean of what is left taken out once more."""
    wide, cotangent = x.double(), dy.double()
    mean = partial(torch.mean, dim=dims, keepdim=True)
    if centers:
        wide = wide - mean(wide)
        wide = wide - mean(wide)
    slope = (mean(wide.square()) + eps).rsqrt()
    y = wide * slope
    centered = cotangent - mean(cotangent) if centers else cotangent
    return Truth(y, slope * (centered - y * mean(cotangent * y)), slope)


def measured(y: Tensor, dx: Tensor, true: Truth, dy: Tensor, dims: tuple[int, ...]) -> Errors:
    """How far a result is from the truth, once the rounding to its own dtype is taken off."""
    largest = true.y.abs().amax(dims, keepdim=True)
    gradients = dy.double().abs().amax(dims, keepdim=True) * largest.clamp_min(1) * true.slope
    return Errors(
        _worst((y.double() - true.y).abs(), torch.ones_like(largest)),
        _worst(_left(y, true.y, true.slope), largest * 2**-24),
        _worst(_left(dx, true.dx, true.slope), gradients * 2**-24),
    )


def errors(family: Family, matrix: Tensor, relay: Relay = Tensor.clone, eps: float | None = None) -> Errors:
    """A family's errors on a matrix with a random cotangent; `relay` decides how the input lies in memory."""
    rows, columns = matrix.shape
    layer = family.layer(rows, columns, **({} if eps is None else {"eps": eps}))
    x = relay(family.fill(matrix.clone())).requires_grad_()
    y = family.matrix(layer(x))
    dy = torch.randn(matrix.shape).to(matrix.dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    default = 1e-5 if family.centers else torch.finfo(matrix.dtype).eps
    true = truth(matrix, dy, (0,), default if eps is None else eps, centers=family.centers)
    return measured(y.detach(), family.matrix(dx), true, dy, (0,))


def is_right(found: Errors) -> bool:
    """Within the roundings that the formula takes."""
    return found.roundings <= ROUNDINGS


def is_exact(found: Errors) -> bool:
    """Right, and within the promise of the statistics in absolute terms."""
    return is_right(found) and found.absolute <= EXACT.absolute


def is_right_beside_an_outlier(found: Errors, rows: int) -> bool:
    """Right, where an outlier itself becomes sqrt(rows)."""
    return is_right(found) and found.absolute <= OUTLIER.absolute + OUTLIER.relative * rows**0.5


def _left(actual: Tensor, expected: Tensor, slope: Tensor) -> Tensor:
    """The error beyond rounding to a low-precision dtype, and beyond the last place of the smallest numbers."""
    info = torch.finfo(actual.dtype)
    relative = info.eps / 2 if info.bits < 32 else 0.0
    absolute = 4 * 2.0**-149 * (1 + slope) + info.smallest_normal * info.eps / 2
    return ((actual.double() - expected).abs() - relative * expected.abs() - absolute).clamp_min(0)


def _worst(error: Tensor, unit: Tensor) -> float:
    """The largest error in its unit; of nothing, 0; a NaN is infinitely wrong, and so is any error where 0 is due."""
    if error.numel() == 0:
        return 0.0
    return float(torch.where(error == 0, error, error / unit).nan_to_num(nan=torch.inf).max())
