"""Columns that one program holds on chip: read once, measured, normalized and written once.

A program of the forward takes one block of K neighbouring columns, of which it holds all samples (R, S). One of the
backward takes `loop` blocks in turn and sums what they say of the parameters; the sums of all programs are added later,
in a fixed order.
"""

# mypy: ignore-errors
# A kernel's arguments are what Triton makes of them; neither it nor its compiler reads annotations.

import triton
from triton import language as tl

from normwise.kernels.gpu.elements import (
    recovered_gradient,
    store_gate_gradient,
    store_gradient,
    store_output,
    through_statistics,
    values_of,
)
from normwise.kernels.gpu.tile import (
    COUNT,
    INVERSE,
    STANDARDIZE,
    add_up,
    column_sum,
    counted,
    counting,
    differs,
    inverse_root,
    keep_moments,
    keep_row,
    kept_line,
    kept_row,
    measured,
    parameters,
    positions,
    read,
    sizes,
    slot_of,
    valid_element,
    wanted_scale,
)


@triton.jit(do_not_specialize=["k0", "r0", "k1", "r1"])
def forward(
    t,
    known,
    weights,
    valid,
    k0,
    r0,
    k1,
    r1,
    samples,
    eps,
    R: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    NORMALIZER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    ENLARGES: tl.constexpr,
):
    """Measure and normalize a block of columns. What it is given is made by arguments.py."""
    k0, r0, k1, r1 = sizes(known, k0, r0, k1, r1)
    columns = k0 * k1
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(k1, K)
    a = block // blocks
    r, k, s = positions(0, block % blocks * K, 0, R, K, S)
    has_r, has_k, has_s = r < r0, k < k1, s < r1
    at = ((a * r0 + r) * k1 + k) * r1 + s
    column = a * k1 + k
    here = has_r & has_k & has_s
    inside = counted(t.mask, valid, a, r, k, s, has_r, has_k, has_s)
    x = read(t.x, t.residual, at, here)
    if t.total is not None:  # there for padding too
        tl.store(t.total + at, x.to(t.total.dtype.element_ty), mask=here)
    x = counting(t.mask, x, inside)

    if t.mask is None:
        count = tl.zeros((1, K, 1), tl.float32) + samples
        element = read(t.x, t.residual, (a * r0 * k1 + k) * r1, has_k)
    else:
        count = column_sum(inside.to(tl.float32))
        element = valid_element(x, inside)
    CENTERS: tl.constexpr = NORMALIZER == STANDARDIZE
    scale = tl.full((1, K, 1), 1.0, tl.float32)
    least = tl.maximum(count, 1.0)
    high, low, squares = measured(x, inside, element, least, scale, CENTERS)
    wanted = wanted_scale(high, squares, least, scale, ENLARGES)
    if differs(wanted, scale):
        scale = wanted
        high, low, squares = measured(x, inside, element, least, scale, CENTERS)
    inverse = inverse_root(squares, least, scale, eps, NORMALIZER)
    keep_moments(t.statistics, columns, column, has_k, scale, high, low, squares, count)
    keep_row(t.statistics, INVERSE, columns, column, inverse, has_k)

    w, b = parameters(t.weight, t.bias, weights, a, r, k, s, has_r, has_k, has_s)
    store_output(t, at, values_of(x, scale, high, low, inverse) * w + b, inside, here, ACTIVATION, GATE)


@triton.jit(do_not_specialize=["k0", "r0", "k1", "r1", "loop"])
def backward(
    t,
    known,
    weights,
    valid,
    k0,
    r0,
    k1,
    r1,
    loop,
    R: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    NORMALIZER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
):
    """The gradients of `loop` blocks of columns, one after another; 1 where parameters run along k."""
    k0, r0, k1, r1 = sizes(known, k0, r0, k1, r1)
    columns = k0 * k1
    program = tl.program_id(0).to(tl.int64)
    slots = tl.cdiv(tl.cdiv(k1, K), loop)
    a, slot = program // slots, program % slots
    r, k, s = positions(0, slot * loop * K, 0, R, K, S)
    has_r, has_s = r < r0, s < r1
    of_weight, of_bias = tl.zeros((R, K, S), tl.float32), tl.zeros((R, K, S), tl.float32)
    for turn in range(loop):
        k_now = k + turn * K
        has_k = k_now < k1
        at = ((a * r0 + r) * k1 + k_now) * r1 + s
        column = a * k1 + k_now
        here = has_r & has_k & has_s
        inside = counted(t.mask, valid, a, r, k_now, s, has_r, has_k, has_s)
        line = kept_line(t.statistics, columns, column, has_k, 0.0, False)
        w, b = parameters(t.weight, t.bias, weights, a, r, k_now, s, has_r, has_k, has_s)
        v, d, d_gate = recovered_gradient(t, at, inside, here, line, w, b, ACTIVATION, GATE)
        store_gate_gradient(t, at, d_gate, here)
        of_weight += d * v
        of_bias += d
        if t.d_x is not None:
            count = kept_row(t.statistics, COUNT, columns, column, has_k, 1.0)
            d = d * w
            d = d - through_statistics(v, column_sum(d), column_sum(d * v), tl.maximum(count, 1.0), NORMALIZER)
            store_gradient(t, at, d, line, inside, here)
    slot = slot_of(weights, a, slot, slots, 0, 1, 0, 1)
    add_up(t.d_weight, of_weight, weights, slot, r, k, s, r0, k1, r1, has_r, k < k1, has_s)
    add_up(t.d_bias, of_bias, weights, slot, r, k, s, r0, k1, r1, has_r, k < k1, has_s)
