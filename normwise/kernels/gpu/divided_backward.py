"""The backward for columns that no program holds: see divided.py."""

# mypy: ignore-errors
# A kernel's arguments are what Triton makes of them; neither it nor its compiler reads annotations.

import triton
from triton import language as tl

from normwise.kernels.gpu.divided import (
    is_last,
    tell,
    ticket,
    tile_positions,
    tiles_of,
    wait,
)
from normwise.kernels.gpu.elements import recovered_gradient, store_gate_gradient, store_gradient, through_statistics
from normwise.kernels.gpu.tile import (
    COUNT,
    add_up,
    column_sum,
    columns_of,
    counted,
    keep_row,
    kept_line,
    kept_row,
    parameters,
    positions,
    sizes,
    slot_of,
)

TOTAL, ALONG = tl.constexpr(0), tl.constexpr(1)  # the rows of a column's sums of gradients


@triton.jit(do_not_specialize=["k0", "r0", "k1", "r1", "tiles", "parts", "per_group", "loop"])
def backward(
    t,
    known,
    weights,
    valid,
    k0,
    r0,
    k1,
    r1,
    tiles,
    parts,
    per_group,
    loop,
    eps,
    R: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    PARTS: tl.constexpr,
    NORMALIZER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    IS_GIVEN: tl.constexpr,
    IS_MEASURED: tl.constexpr,
):
    """Sum the gradients of a part of a block of columns, or write those of x for `loop` blocks.

    Where no gradient comes back through statistics (not `IS_MEASURED`), nothing is summed, and nobody waits.
    """
    shape = sizes(known, k0, r0, k1, r1)
    k_blocks = tl.cdiv(shape[2], K)
    if IS_MEASURED:
        measures, group, within, part = ticket(t.counters, per_group, parts)
        if measures:
            block = group * per_group + within
            if block < shape[0] * k_blocks:
                a, first_k = block // k_blocks, block % k_blocks * K
                sum_part(
                    t,
                    shape,
                    weights,
                    valid,
                    tiles,
                    parts,
                    a,
                    first_k,
                    part,
                    eps,
                    R,
                    K,
                    S,
                    ACTIVATION,
                    GATE,
                    IS_GIVEN,
                )
                if is_last(t.counters, block, parts):
                    sum_parts(t, shape, parts, a, first_k, K, PARTS)
                    tell(t.counters, block)
        else:
            block = group * per_group + within * loop
            if (group >= 0) & (within * loop < per_group) & (block < shape[0] * k_blocks):
                for turn in range(loop):
                    if block + turn < shape[0] * k_blocks:
                        wait(t.counters, block + turn)
                a, k_block = block // k_blocks, block % k_blocks
                differentiate_part(
                    t,
                    shape,
                    weights,
                    valid,
                    tiles,
                    loop,
                    a,
                    k_block,
                    part,
                    eps,
                    R,
                    K,
                    S,
                    NORMALIZER,
                    ACTIVATION,
                    GATE,
                    IS_GIVEN,
                    True,
                )
    else:
        program = tl.program_id(0).to(tl.int64)
        block, part = program // parts * loop, program % parts
        differentiate_part(
            t,
            shape,
            weights,
            valid,
            tiles,
            loop,
            block // k_blocks,
            block % k_blocks,
            part,
            eps,
            R,
            K,
            S,
            NORMALIZER,
            ACTIVATION,
            GATE,
            IS_GIVEN,
            False,
        )


@triton.jit
def sum_part(
    t,
    shape,
    weights,
    valid,
    tiles,
    parts,
    a,
    first_k,
    part,
    eps,
    R: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    IS_GIVEN: tl.constexpr,
):
    """The sums of a part's gradients of values, alone and times the values."""
    _, r0, k1, r1 = shape
    first, last, beside = tiles_of(shape, tiles, part, R, S)
    _, k, _ = positions(0, first_k, 0, 1, K, 1)
    has_k = k < k1
    line = kept_line(t.statistics, columns_of(shape), a * k1 + k, has_k, eps, IS_GIVEN)
    total, along = tl.zeros((R, K, S), tl.float32), tl.zeros((R, K, S), tl.float32)
    for tile in range(first, last):
        r, k, s = tile_positions(tile, beside, first_k, R, K, S)
        has_r, has_s = r < r0, s < r1
        at = ((a * r0 + r) * k1 + k) * r1 + s
        inside = counted(t.mask, valid, a, r, k, s, has_r, has_k, has_s)
        w, b = parameters(t.weight, t.bias, weights, a, r, k, s, has_r, has_k, has_s)
        v, d, _d_gate = recovered_gradient(t, at, inside, has_r & has_k & has_s, line, w, b, ACTIVATION, GATE)
        total += d * w
        along += d * w * v
    columns = columns_of(shape) * parts
    column = (a * k1 + k) * parts + part
    keep_row(t.partial, TOTAL, columns, column, column_sum(total), has_k)
    keep_row(t.partial, ALONG, columns, column, column_sum(along), has_k)


@triton.jit
def sum_parts(t, shape, parts, a, first_k, K: tl.constexpr, PARTS: tl.constexpr):
    """The sums of a block of columns, from those of all its parts."""
    k1 = shape[2]
    _, k, part = positions(0, first_k, 0, 1, K, PARTS)
    columns = columns_of(shape) * parts
    column = (a * k1 + k) * parts + part
    there = (k < k1) & (part < parts)
    total = column_sum(kept_row(t.partial, TOTAL, columns, column, there, 0.0))
    along = column_sum(kept_row(t.partial, ALONG, columns, column, there, 0.0))
    keep_row(t.sums, TOTAL, columns_of(shape), a * k1 + k, total, k < k1)
    keep_row(t.sums, ALONG, columns_of(shape), a * k1 + k, along, k < k1)


@triton.jit
def differentiate_part(
    t,
    shape,
    weights,
    valid,
    tiles,
    loop,
    a,
    k_block,
    part,
    eps,
    R: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    NORMALIZER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    IS_GIVEN: tl.constexpr,
    IS_MEASURED: tl.constexpr,
):
    """Write a part of the gradient of x, tile by tile, for `loop` blocks, and its sums for the parameters."""
    _, r0, k1, r1 = shape
    first, last, beside = tiles_of(shape, tiles, part, R, S)
    slots = tl.cdiv(tl.cdiv(k1, K), loop)
    for tile in range(first, last):
        r, k, s = tile_positions(tile, beside, k_block * K, R, K, S)
        has_r, has_s = r < r0, s < r1
        of_weight, of_bias = tl.zeros((R, K, S), tl.float32), tl.zeros((R, K, S), tl.float32)
        for turn in range(loop):
            k_now = k + turn * K
            has_k = k_now < k1
            at = ((a * r0 + r) * k1 + k_now) * r1 + s
            column = a * k1 + k_now
            inside = counted(t.mask, valid, a, r, k_now, s, has_r, has_k, has_s)
            line = kept_line(t.statistics, columns_of(shape), column, has_k, eps, IS_GIVEN)
            w, b = parameters(t.weight, t.bias, weights, a, r, k_now, s, has_r, has_k, has_s)
            here = has_r & has_k & has_s
            v, d, d_gate = recovered_gradient(t, at, inside, here, line, w, b, ACTIVATION, GATE)
            store_gate_gradient(t, at, d_gate, here)
            of_weight += d * v
            of_bias += d
            if t.d_x is not None:
                d = d * w
                if IS_MEASURED:
                    total = kept_row(t.sums, TOTAL, columns_of(shape), column, has_k, 0.0)
                    along = kept_row(t.sums, ALONG, columns_of(shape), column, has_k, 0.0)
                    count = kept_row(t.statistics, COUNT, columns_of(shape), column, has_k, 1.0)
                    d = d - through_statistics(v, total, along, tl.maximum(count, 1.0), NORMALIZER)
                store_gradient(t, at, d, line, inside, here)
        slot = slot_of(weights, a, k_block // loop, slots, tile // beside, tl.cdiv(r0, R), tile % beside, beside)
        add_up(t.d_weight, of_weight, weights, slot, r, k, s, r0, k1, r1, has_r, k < k1, has_s)
        add_up(t.d_bias, of_bias, weights, slot, r, k, s, r0, k1, r1, has_r, k < k1, has_s)
