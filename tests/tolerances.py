"""Every tolerance of the tests, once, with its reason. They are the same on every machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """|actual - expected| <= absolute + relative * |expected|, element by element."""

    absolute: float
    relative: float
    reason: str


VALUES = Tolerance(1e-6, 1e-6, "outputs are of size 1 to 8: two correct float32 results differ by some 2 ulps")
GRADIENTS = Tolerance(
    1e-5, 1e-5, "a parameter's gradient sums hundreds of float32 products, in another order than torch"
)
MEMORY = Tolerance(2e-6, 2e-6, "ten float32 blends of statistics of size 1 to 10")
DOUBLE = Tolerance(1e-10, 1e-10, "float64 against float64; 1e-10 is far below any float32 intermediate result")
POOLED = Tolerance(1e-12, 1e-12, "float64 moments merged a few times, each merge within some ulps")
EXACT = Tolerance(2e-6, 0.0, "the promise of the statistics: against the formula in float64 on the rounded input")
OUTLIER = Tolerance(2e-5, 1e-6, "one value of 1e6 among values of size 1, and first: the column is shifted by it")
COMPILED = Tolerance(2e-5, 2e-5, "a compiler sums in its own order, so the shift by an element helps it less")
MODEL_OUTPUTS = Tolerance(1e-5, 0.0, "whole models, outputs as parts of the largest: the promise of adopt")
MODEL_GRADIENTS = Tolerance(1e-4, 0.0, "whole models, gradients as parts of the largest: the promise of adopt")
SUMMED = Tolerance(0.0, 1e-5, "float32 partial sums over 65,536 rows, against float64")
HALF_ULP = "and half a unit in the last place of the output's dtype, where that is lower"
KERNELS = Tolerance(1e-6, 1e-6, f"compiled kernels, outputs of size 1 to 8: as VALUES, {HALF_ULP}")
KERNELS_GRADIENTS = Tolerance(
    3e-6, 3e-6, f"compiled kernels, gradients times slopes of up to 10: 3 KERNELS, {HALF_ULP}"
)
KERNELS_SUMS = Tolerance(
    2e-6,
    2e-6,
    f"compiled kernels, times sqrt(n): float32 sums of n products of size 1, up to 2,000 in a row, {HALF_ULP}",
)
LAYOUT = Tolerance(
    3e-6,
    2e-6,
    "another order of axes is another kernel: gradients times slopes of up to 3, some ulps, summed otherwise",
)
KERNELS_MOMENTS = Tolerance(
    1e-6, 1e-6, "sums of floats in short chains, added as doubles: n of them lose no more than one"
)

ROUNDINGS = 8.0  # of 2**-24: subtractions, slope, product and the sums behind them, measured at 6 over 50,000 columns
LOW_PRECISION_FACTOR = 2.0  # times the error of torch's operation in the same precision, both against float64


def check(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    """Equal within the tolerance, and of the same shape, dtype and device."""
    torch.testing.assert_close(actual, expected, atol=tolerance.absolute, rtol=tolerance.relative)
