"""The forward for columns that no program holds: see divided.py."""

# mypy: ignore-errors
# A kernel's arguments are what Triton makes of them; neither it nor its compiler reads annotations.

import triton
from triton import language as tl

from normwise.kernels.gpu.divided import (
    is_last,
    samples_of,
    tell,
    ticket,
    tile_positions,
    tiles_of,
    wait,
)
from normwise.kernels.gpu.elements import store_output, values_of
from normwise.kernels.gpu.tile import (
    COUNT,
    HIGH,
    INVERSE,
    LOW,
    SCALE,
    SQUARES,
    STANDARDIZE,
    column_sum,
    columns_of,
    counted,
    counting,
    deviations,
    differs,
    inverse_root,
    joined,
    keep_moments,
    keep_row,
    kept_line,
    kept_row,
    mean_about,
    parameters,
    positions,
    read,
    sizes,
    undone,
    valid_element,
    wanted_scale,
)


@triton.jit(do_not_specialize=["k0", "r0", "k1", "r1", "tiles", "parts", "per_group"])
def forward(
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
    eps,
    R: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    PARTS: tl.constexpr,
    NORMALIZER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    ENLARGES: tl.constexpr,
    IS_GIVEN: tl.constexpr,
):
    """Measure a part of a block of columns, or normalize it. What it is given is made by arguments.py.

    With remembered statistics (`IS_GIVEN`) nothing is measured, and nobody waits.
    """
    shape = sizes(known, k0, r0, k1, r1)
    k_blocks = tl.cdiv(shape[2], K)
    if IS_GIVEN:
        program = tl.program_id(0).to(tl.int64)
        block, part = program // parts, program % parts
        normalize_part(
            t,
            shape,
            weights,
            valid,
            tiles,
            parts,
            block // k_blocks,
            block % k_blocks * K,
            part,
            eps,
            R,
            K,
            S,
            ACTIVATION,
            GATE,
            True,
        )
    else:
        measures, group, within, part = ticket(t.counters, per_group, parts)
        block = group * per_group + within
        a, first_k = block // k_blocks, block % k_blocks * K
        if (group >= 0) & (block < shape[0] * k_blocks):
            if measures:
                measure_part(
                    t, shape, valid, tiles, parts, a, first_k, part, R, K, S, NORMALIZER == STANDARDIZE, ENLARGES
                )
                if is_last(t.counters, block, parts):
                    join_parts(t, shape, parts, a, first_k, eps, K, PARTS, NORMALIZER)
                    tell(t.counters, block)
            else:
                wait(t.counters, block)
                normalize_part(
                    t, shape, weights, valid, tiles, parts, a, first_k, part, eps, R, K, S, ACTIVATION, GATE, False
                )


@triton.jit
def measure_part(
    t,
    shape,
    valid,
    tiles,
    parts,
    a,
    first_k,
    part,
    R: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    CENTERS: tl.constexpr,
    ENLARGES: tl.constexpr,
):
    """The moments of a part, about the mean of its first tile; once more if that needs another scale, or another mean.

    A mask may leave a single outlier of the first tile, far from all that follow.
    """
    _, r0, k1, r1 = shape
    first, last, beside = tiles_of(shape, tiles, part, R, S)
    scale = tl.full((1, K, 1), 1.0, tl.float32)
    high, low, moved = scale * 0.0, scale * 0.0, scale * 0.0
    count = scale * 0.0
    is_far, better = scale * 0.0, scale * 0.0  # whether a first tile says little of the column, and a better mean
    again = first < last
    while again:
        if CENTERS:
            r, k, s = tile_positions(first, beside, first_k, R, K, S)
            has_r, has_k, has_s = r < r0, k < k1, s < r1
            at = ((a * r0 + r) * k1 + k) * r1 + s
            inside = counted(t.mask, valid, a, r, k, s, has_r, has_k, has_s)
            x = counting(t.mask, read(t.x, t.residual, at, has_r & has_k & has_s), inside)
            if t.mask is None:
                few = tl.zeros((1, K, 1), tl.float32) + samples_of(r0, r1, first, beside, R, S)
                above, left = (first // beside).to(tl.int64) * R, (first % beside).to(tl.int64) * S
                element = read(t.x, t.residual, ((a * r0 + above) * k1 + k) * r1 + left, has_k)
            else:
                few = tl.maximum(column_sum(inside.to(tl.float32)), 1.0)
                element = valid_element(x, inside)
            high = mean_about(x * scale, inside, element * scale, few)
            if t.mask is not None:
                high = tl.where(is_far > 0, better, high)
        total, squares = tl.zeros((R, K, S), tl.float32), tl.zeros((R, K, S), tl.float32)
        count = scale * 0.0
        for tile in range(first, last):
            r, k, s = tile_positions(tile, beside, first_k, R, K, S)
            has_r, has_k, has_s = r < r0, k < k1, s < r1
            at = ((a * r0 + r) * k1 + k) * r1 + s
            inside = counted(t.mask, valid, a, r, k, s, has_r, has_k, has_s)
            here = has_r & has_k & has_s
            x = read(t.x, t.residual, at, here)
            if t.total is not None:
                tl.store(t.total + at, x.to(t.total.dtype.element_ty), mask=here)
            x = tl.where(inside, x * scale - high, 0.0)
            total += x
            squares += x * x
            if t.mask is None:
                count += samples_of(r0, r1, tile, beside, R, S)
            else:
                count += column_sum(inside.to(tl.float32))
        least = tl.maximum(count, 1.0)
        low, moved = deviations(column_sum(total), column_sum(squares), least, CENTERS)
        wanted = wanted_scale(high, moved, least, scale, ENLARGES)
        again = differs(wanted, scale)
        if t.mask is not None:
            far = tl.where((is_far > 0) | ((wanted == scale) & (least * low * low > 16 * moved)), 1.0, 0.0)
            again = again | differs(far, is_far)
            better = tl.where(far > is_far, high + low, better) * (wanted * undone(scale))
            is_far = far
        scale = tl.where(again, wanted, scale)
    _, k, _ = positions(0, first_k, 0, 1, K, 1)
    columns = columns_of(shape) * parts
    column = (a * k1 + k) * parts + part
    keep_moments(t.partial, columns, column, k < k1, scale, high, low, moved, count)


@triton.jit
def join_parts(t, shape, parts, a, first_k, eps, K: tl.constexpr, PARTS: tl.constexpr, NORMALIZER: tl.constexpr):
    """The line of a block of columns, from the moments of all its parts."""
    k1 = shape[2]
    _, k, part = positions(0, first_k, 0, 1, K, PARTS)
    columns = columns_of(shape) * parts
    column = (a * k1 + k) * parts + part
    there = (k < k1) & (part < parts)
    scale, high, low, squares, count = joined(
        kept_row(t.partial, SCALE, columns, column, there, 1.0),
        kept_row(t.partial, HIGH, columns, column, there, 0.0),
        kept_row(t.partial, LOW, columns, column, there, 0.0),
        kept_row(t.partial, SQUARES, columns, column, there, 0.0),
        kept_row(t.partial, COUNT, columns, column, there, 0.0),
    )
    inverse = inverse_root(squares, tl.maximum(count, 1.0), scale, eps, NORMALIZER)
    keep_moments(t.statistics, columns_of(shape), a * k1 + k, k < k1, scale, high, low, squares, count)
    keep_row(t.statistics, INVERSE, columns_of(shape), a * k1 + k, inverse, k < k1)


@triton.jit
def normalize_part(
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
    """Write a part of the output; of a sum with a residual what was written of it when it was measured is read."""
    _, r0, k1, r1 = shape
    first, last, beside = tiles_of(shape, tiles, part, R, S)
    _, k, _ = positions(0, first_k, 0, 1, K, 1)
    has_k = k < k1
    scale, high, low, inverse = kept_line(t.statistics, columns_of(shape), a * k1 + k, has_k, eps, IS_GIVEN)
    for tile in range(first, last):
        r, k, s = tile_positions(tile, beside, first_k, R, K, S)
        has_r, has_s = r < r0, s < r1
        at = ((a * r0 + r) * k1 + k) * r1 + s
        here = has_r & has_k & has_s
        inside = counted(t.mask, valid, a, r, k, s, has_r, has_k, has_s)
        if t.total is None:
            x = read(t.x, None, at, here)
        elif IS_GIVEN:
            x = read(t.x, t.residual, at, here)
            tl.store(t.total + at, x.to(t.total.dtype.element_ty), mask=here)
        else:
            x = read(t.total, None, at, here)
        w, b = parameters(t.weight, t.bias, weights, a, r, k, s, has_r, has_k, has_s)
        store_output(t, at, values_of(x, scale, high, low, inverse) * w + b, inside, here, ACTIVATION, GATE)
