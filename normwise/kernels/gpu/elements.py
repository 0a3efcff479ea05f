"""What becomes of a tile's elements: normalized, recovered, activated, gated; and back, for their gradients."""

# mypy: ignore-errors
# A kernel's arguments are what Triton makes of them; neither it nor its compiler reads annotations.

import triton
from triton import language as tl

from normwise.kernels.gpu.tile import L2, STANDARDIZE, counting

RELU, SILU, GELU, SIGMOID = (tl.constexpr(function) for function in range(1, 5))


@triton.jit
def values_of(x, scale, high, low, inverse):
    """The normalized values."""
    return ((x * scale - high) - low) * inverse


@triton.jit
def applied(z, FUNCTION: tl.constexpr):
    """The activation of recovered values, or the function of a gate; 0: none."""
    if FUNCTION == RELU:
        z = tl.where(z < 0, 0.0, z)
    elif FUNCTION == SILU:
        z = z * tl.sigmoid(z)
    elif FUNCTION == GELU:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif FUNCTION == SIGMOID:
        z = tl.sigmoid(z)
    return z


@triton.jit
def store_output(t, at, z, inside, here, ACTIVATION: tl.constexpr, GATE: tl.constexpr):
    """What becomes of recovered values: activated, times the function of a gate; 0 where nothing counts."""
    y = applied(z, ACTIVATION)
    if t.gate is not None:
        y = y * applied(tl.load(t.gate + at, mask=here, other=0.0).to(tl.float32), GATE)
    tl.store(t.y + at, tl.where(inside, y, 0.0).to(t.y.dtype.element_ty), mask=here)


@triton.jit
def through_statistics(v, total, along, count, NORMALIZER: tl.constexpr):
    """The part of the gradient of values that would only move the statistics, from its sums, alone and times v."""
    if NORMALIZER == L2:
        return v * along
    if NORMALIZER == STANDARDIZE:
        return v * (along / count) + total / count
    return v * (along / count)


@triton.jit
def through_function(d_y, z, FUNCTION: tl.constexpr):
    """The gradient of what a function is applied to, from that of what it gives; 0: none."""
    if FUNCTION == RELU:
        d_y = tl.where(z > 0, d_y, 0.0)
    elif FUNCTION == SILU:
        sigmoid = tl.sigmoid(z)
        d_y = d_y * sigmoid * (1.0 + z * (1.0 - sigmoid))
    elif FUNCTION == GELU:
        phi = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        d_y = d_y * (0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * phi)
    elif FUNCTION == SIGMOID:
        sigmoid = tl.sigmoid(z)
        d_y = d_y * sigmoid * (1.0 - sigmoid)
    return d_y


@triton.jit
def recovered_gradient(t, at, inside, here, line, w, b, ACTIVATION: tl.constexpr, GATE: tl.constexpr):
    """A tile's values, and the gradients of what the recovery makes of them and of the gate; 0 where nothing counts.

    Without a gate the last one is the gradient that came, of which nothing is made.
    """
    scale, high, low, inverse = line
    x = tl.load(t.x + at, mask=here, other=0.0).to(tl.float32)
    v = tl.where(inside, values_of(x, scale, high, low, inverse), 0.0)
    d_y = counting(t.mask, tl.load(t.d_y + at, mask=here, other=0.0).to(tl.float32), inside)
    recovered = v * w + b
    d_gate = d_y
    if t.gate is not None:
        gate = counting(t.mask, tl.load(t.gate + at, mask=here, other=0.0).to(tl.float32), inside)
        d_gate = through_function(d_y * applied(recovered, ACTIVATION), gate, GATE)
        d_y = d_y * applied(gate, GATE)
    return v, through_function(d_y, recovered, ACTIVATION), d_gate


@triton.jit
def store_gate_gradient(t, at, d_gate, here):
    """The gradient of the gate, if it is wanted."""
    if t.d_gate is not None:
        tl.store(t.d_gate + at, d_gate.to(t.d_gate.dtype.element_ty), mask=here)


@triton.jit
def store_gradient(t, at, d, line, inside, here):
    """From the gradient of values to that of x, with what comes through the sum with a residual."""
    scale, _, _, inverse = line
    d = tl.where(inside, d * (inverse * scale), 0.0)
    if t.d_total is not None:
        d += tl.load(t.d_total + at, mask=here, other=0.0).to(tl.float32)
    tl.store(t.d_x + at, d.to(t.d_x.dtype.element_ty), mask=here)
