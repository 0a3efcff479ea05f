"""How a batch's statistics enter a memory, where they are: commit.py's arithmetic in float32, by one program.

The host learns nothing of it, and so waits for nothing: a batch that is not finite is counted where it is skipped.
"""

# mypy: ignore-errors
# A kernel's arguments are what Triton makes of them; neither it nor its compiler reads annotations.

import triton
from triton import language as tl

from normwise.kernels.gpu.tile import HIGH, LOW, SCALE, SQUARES, undone


@triton.jit
def entering(statistics, columns, column, is_there, divisor):
    """Mean and variance, or mean square, of measured columns."""
    back = undone(tl.load(statistics + SCALE * columns + column, mask=is_there, other=1.0))
    high = tl.load(statistics + HIGH * columns + column, mask=is_there, other=0.0)
    low = tl.load(statistics + LOW * columns + column, mask=is_there, other=0.0)
    squares = tl.load(statistics + SQUARES * columns + column, mask=is_there, other=0.0)
    return (high + low) * back, squares / divisor * back * back


@triton.jit(do_not_specialize=["columns"])
def commit(statistics, mean, spread, batches, skips, columns, divisor, rate, BLOCK: tl.constexpr):
    """Blend what was measured into the buffers; a negative rate: one over the number of batches.

    If a number of any column is not finite, nothing enters. Pointers that are None are buffers that there are not.
    """
    finite = 1
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        new_mean, new_spread = entering(statistics, columns, column, column < columns, divisor)
        is_finite = (new_mean - new_mean == 0) & (new_spread - new_spread == 0)
        finite = tl.minimum(finite, tl.min(is_finite.to(tl.int32), 0))
    if finite == 1:
        taken = rate
        if batches is not None:
            count = tl.load(batches) + 1
            tl.debug_barrier()  # all threads have loaded it before one of them stores
            tl.store(batches, count)
            taken = tl.where(rate < 0, 1.0 / count.to(tl.float32), rate)
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            is_there = column < columns
            new_mean, new_spread = entering(statistics, columns, column, is_there, divisor)
            if mean is not None:
                old = tl.load(mean + column, mask=is_there, other=0.0)
                tl.store(mean + column, old * (1.0 - taken) + new_mean * taken, mask=is_there)
            old = tl.load(spread + column, mask=is_there, other=0.0)
            tl.store(spread + column, old * (1.0 - taken) + new_spread * taken, mask=is_there)
    elif skips is not None:
        tl.store(skips, tl.load(skips) + 1)
