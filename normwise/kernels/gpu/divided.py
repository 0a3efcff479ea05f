"""Columns that no program holds: some programs measure parts of them, others come back and normalize.

One launch does both, so that the second look at an element comes while the first is still in the chip's cache. Programs
take tickets in the order in which they start. The blocks of columns are taken in groups, and tickets alternate: group 0
is measured, group 1 is measured, group 0 normalized, group 2 measured, group 1 normalized ... A program that normalizes
waits for programs with smaller tickets only, which run already and themselves wait for nobody: none waits for ever,
however few programs run at once. Whoever measures the last part of a block joins the parts, in their own order.

In the backward it is the same with sums of gradients for moments.
"""

# mypy: ignore-errors
# A kernel's arguments are what Triton makes of them; neither it nor its compiler reads annotations.

import triton
from triton import language as tl

from normwise.kernels.gpu.tile import positions


@triton.jit
def ticket(counters, per_group, parts):
    """What a program does: whether it measures, of which group of blocks, and which of its blocks and parts."""
    taken = tl.atomic_add(counters, 1).to(tl.int64)
    turn, within = taken // (per_group * parts), taken % (per_group * parts)
    group = turn // 2 - turn % 2  # 0, none, 1, 0, 2, 1, ...
    return turn % 2 == 0, group, within // parts, within % parts


@triton.jit
def is_last(counters, block, parts):
    """Whether all other parts of a block are done with."""
    tl.debug_barrier()
    return tl.atomic_add(counters + 1 + 2 * block, 1, sem="acq_rel") == parts - 1


@triton.jit
def tell(counters, block):
    """Let those who wait for a block go on."""
    tl.debug_barrier()
    tl.atomic_add(counters + 2 + 2 * block, 1, sem="release")


@triton.jit
def wait(counters, block):
    """Wait until a block is measured."""
    while tl.atomic_add(counters + 2 + 2 * block, 0, sem="acquire") == 0:
        pass
    tl.debug_barrier()


@triton.jit
def tiles_of(shape, tiles, part, R: tl.constexpr, S: tl.constexpr):
    """The first and last tile of a part, and how many there are side by side."""
    _, r0, _, r1 = shape
    beside, above = tl.full((), tl.cdiv(r1, S), tl.int32), tl.full((), tl.cdiv(r0, R), tl.int32)
    first = (part * tiles).to(tl.int32)  # a tile is divided by `beside`: in 64 bits that takes as long as its sums
    return first, tl.minimum(first + tiles, above * beside), beside


@triton.jit
def tile_positions(tile, beside, first_k, R: tl.constexpr, K: tl.constexpr, S: tl.constexpr):
    """r, k and s of a tile of a block of columns."""
    return positions((tile // beside).to(tl.int64) * R, first_k, (tile % beside).to(tl.int64) * S, R, K, S)


@triton.jit
def samples_of(r0, r1, tile, beside, R: tl.constexpr, S: tl.constexpr):
    """How many elements of a column a tile has."""
    above, left = (tile // beside).to(tl.int64) * R, (tile % beside).to(tl.int64) * S
    return (tl.minimum(R, r0 - above) * tl.minimum(S, r1 - left)).to(tl.float32)
