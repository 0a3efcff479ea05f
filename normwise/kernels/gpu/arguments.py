"""What the kernels are given, as named tuples: Triton passes them on as they are.

Triton compiles anew where a number in a tuple becomes 1, or a multiple of 16. So sizes of the input are no part of one:
another size of a batch compiles nothing, but where strides of a mask are such numbers. What the compiler should know is
a `constexpr`: which sizes and strides are 1, and what divides the size of the innermost axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from triton import language as tl

from normwise.kernels.launch import View, unit


class Known(NamedTuple):
    """What the compiler is told of k0, r0, k1, r1, of which the innermost, r1 or otherwise k1, is given in units."""

    has_r: tl.constexpr  # whether r0 is not 1
    has_s: tl.constexpr
    unit_k: tl.constexpr
    unit_s: tl.constexpr


class Places(NamedTuple):
    """Where what is for (a, r, k, s) lies: (a % period_a) * a + r * r + (k % period_k) * k + s * s.

    A remainder in 64 bits takes as long as what is done with a tile: the compiler is told where nothing repeats.
    """

    period_a: int | None
    period_k: int | None
    a: int
    r: int
    k: int
    s: int
    along_r: tl.constexpr
    along_k: tl.constexpr
    along_s: tl.constexpr
    repeats_a: tl.constexpr
    repeats_k: tl.constexpr


class ForwardTensors(NamedTuple):
    """Those that there are, and that are wanted."""

    x: Tensor
    residual: Tensor | None
    total: Tensor | None
    y: Tensor
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None
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
    gate: Tensor | None
    d_gate: Tensor | None
    mask: Tensor | None
    statistics: Tensor
    d_weight: Tensor | None
    d_bias: Tensor | None
    partial: Tensor | None = None
    sums: Tensor | None = None
    counters: Tensor | None = None


def sizes_of(view: View) -> tuple[Known, int, int, int, int]:
    """What is known of a view's sizes, and the sizes."""
    k0, r0, k1, r1 = view.sizes
    unit_k, unit_s = unit(k1) if r1 == 1 else 1, unit(r1)
    known = Known(*(tl.constexpr(number) for number in (r0 != 1, r1 != 1, unit_k, unit_s)))
    return known, k0, r0, k1 // unit_k, r1 // unit_s


def parameter_places(view: View) -> Places:
    """Where weight and bias lie."""
    weights, (k0, _, k1, _) = view.weights, view.sizes
    periods = [period if period < size else None for period, size in ((weights.period_k0, k0), (weights.period_k1, k1))]
    return _places(weights.k0, weights.r0, weights.k1, weights.r1, *periods)


def mask_places(view: View, strides: tuple[int, ...]) -> Places:
    """Where the bytes of a mask lie, from its strides in the geometry's four groups."""
    a, r, k, s = strides
    if view.sizes[0] == 1 and k == 0:  # the view numbers columns by k
        a, k = 0, a
    return _places(a, r, k, s)


def _places(a: int, r: int, k: int, s: int, period_a: int | None = None, period_k: int | None = None) -> Places:
    """None: a period that ends nowhere."""
    along: list[Any] = [tl.constexpr(stride != 0) for stride in (r, k, s)]
    repeats: list[Any] = [tl.constexpr(period is not None) for period in (period_a, period_k)]
    return Places(period_a, period_k, a, _known(r), _known(k), _known(s), *along, *repeats)


def _known(number: int) -> Any:
    """A number that the compiler is told if it is 1."""
    return tl.constexpr(1) if number == 1 else number


NO_MASK = _places(0, 0, 0, 0)
