"""What the kernels are given, as named tuples: Triton passes them on as they are."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from triton import language as tl

from normwise.kernels.gpu.launch import View, unit


class Shape(NamedTuple):
    """Sizes: k1 = k1 * unit_k and r1 = r1 * unit_s, so that the compiler knows what divides them."""

    k0: int
    r0: int
    k1: int
    r1: int
    columns: int
    unit_k: tl.constexpr
    unit_s: tl.constexpr


class Places(NamedTuple):
    """Where what is for (a, r, k, s) lies: (a % period_a) * a + r * r + (k % period_k) * k + s * s."""

    period_a: int
    period_k: int
    a: int
    r: int
    k: int
    s: int
    along_r: tl.constexpr
    along_k: tl.constexpr
    along_s: tl.constexpr


class Division(NamedTuple):
    """How columns that no program holds are divided: see `launch.Layout` and `launch.Grid`."""

    tiles: int
    parts: int
    per_group: int
    loop: int


class ForwardTensors(NamedTuple):
    """Those that there are, and that are wanted."""

    x: Tensor
    residual: Tensor | None
    total: Tensor | None
    y: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    statistics: Tensor
    partial: Tensor | None = None
    counters: Tensor | None = None


class BackwardTensors(NamedTuple):
    """Those that there are, and that are wanted."""

    x: Tensor
    d_y: Tensor
    d_total: Tensor | None
    d_x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    statistics: Tensor
    d_weight: Tensor | None
    d_bias: Tensor | None
    partial: Tensor | None = None
    sums: Tensor | None = None
    counters: Tensor | None = None


def shape_of(view: View) -> Shape:
    """The sizes of a view."""
    k0, r0, k1, r1 = view.sizes
    unit_k, unit_s = unit(k1), unit(r1)
    return Shape(k0, r0, k1 // unit_k, r1 // unit_s, k0 * k1, tl.constexpr(unit_k), tl.constexpr(unit_s))


def parameter_places(view: View) -> Places:
    """Where weight and bias lie."""
    weights = view.weights
    return _places(weights.period_k0, weights.period_k1, weights.k0, weights.r0, weights.k1, weights.r1)


def mask_places(view: View, strides: tuple[int, ...]) -> Places:
    """Where the bytes of a mask lie, from its strides in the geometry's four groups."""
    k0, _, k1, _ = view.sizes
    a, r, k, s = strides
    if k0 == 1 and k == 0:  # the view numbers columns by k
        a, k = 0, a
    return _places(k0, k1, a, r, k, s)


def _places(period_a: int, period_k: int, a: int, r: int, k: int, s: int) -> Places:
    along: list[Any] = [tl.constexpr(stride != 0) for stride in (r, k, s)]
    return Places(period_a, period_k, a, r, k, s, *along)
