"""What a program knows of a tile: where its elements and parameters lie, its columns' moments, and their lines.

A tile has three dimensions (R, K, S): reduced, kept and reduced positions (r, k, s) of one outermost kept position a,
as csrc/call.h has them. The element lies at ((a * r0 + r) * k1 + k) * r1 + s, and every k is a column. All sums are of
float32, in an order that depends on the tile's shape, and on how many elements the compiler lets a thread load at once:
where columns lie side by side (r1 is 1), that is the power of two up to 16 that divides their number.

A column is measured about one of its elements, then about the mean that this gives, and what rounding left of that mean
is kept: x - high is exact where it matters. Where squares may have left float's range, the column is measured once more
times a power of two, `scale`. Its line is

    value = ((x * scale - high) - low) * inverse
"""

# mypy: ignore-errors
# A kernel's arguments are what Triton makes of them; neither it nor its compiler reads annotations.

import triton
from triton import language as tl

STANDARDIZE, L2 = tl.constexpr(0), tl.constexpr(2)  # in the order of csrc/call.h

# The rows of a column's numbers; a part of a column has no inverse.
SCALE, HIGH, LOW, SQUARES, COUNT, INVERSE = (tl.constexpr(row) for row in range(6))

_LARGE, _SMALL = tl.constexpr(1e30), tl.constexpr(1e-30)  # mean squares within are far from float's limits
_SHRINK, _GROW = tl.constexpr(2.0**-80), tl.constexpr(2.0**80)
_APART = tl.constexpr(1e15)  # means that differ by less have mean squares within _LARGE
_TINY = tl.constexpr(2.0**-126)  # the smallest normal float


# --- places -----------------------------------------------------------------------------------------------------------


@triton.jit
def sizes(known, k0, r0, k1, r1):
    """The shape (k0, r0, k1, r1), of which the compiler knows what `arguments.Known` says."""
    k0, k1 = k0.to(tl.int64), k1.to(tl.int64) * known.unit_k
    r0 = r0.to(tl.int64) if known.has_r else 1
    r1 = r1.to(tl.int64) * known.unit_s if known.has_s else 1
    return k0, r0, k1, r1


@triton.jit
def columns_of(shape):
    """How many columns there are."""
    return shape[0] * shape[2]


@triton.jit
def positions(first_r, first_k, first_s, R: tl.constexpr, K: tl.constexpr, S: tl.constexpr):
    """r (R, 1, 1), k (1, K, 1) and s (1, 1, S) of a tile."""
    r = (first_r + tl.arange(0, R)).to(tl.int64)[:, None, None]
    k = (first_k + tl.arange(0, K)).to(tl.int64)[None, :, None]
    s = (first_s + tl.arange(0, S)).to(tl.int64)[None, None, :]
    return r, k, s


@triton.jit
def placed(places, a, r, k, s, has_r, has_k, has_s):
    """Where parameters, or the bytes of a mask, lie for a tile's positions, and which of them there are.

    Only along the axes that tell them apart: they are broadcast against the tile.
    """
    if places.repeats_a:
        a = a % places.period_a
    at = tl.zeros((1, 1, 1), tl.int64) + a * places.a
    inside = tl.full((1, 1, 1), 1, tl.int1)
    if places.along_r:
        at = at + r * places.r
        inside = inside & has_r
    if places.along_k:
        at = at + (k % places.period_k if places.repeats_k else k) * places.k
        inside = inside & has_k
    if places.along_s:
        at = at + s * places.s
        inside = inside & has_s
    return at, inside


@triton.jit
def counted(mask, places, a, r, k, s, has_r, has_k, has_s):
    """Which elements of a tile there are, and count."""
    inside = has_r & has_k & has_s
    if mask is not None:
        at, is_there = placed(places, a, r, k, s, has_r, has_k, has_s)
        inside = inside & (tl.load(mask + at, mask=is_there, other=0) != 0)
    return inside


@triton.jit
def parameters(weight, bias, places, a, r, k, s, has_r, has_k, has_s):
    """Weight and bias of a tile's positions, 1 and 0 where there is none."""
    at, is_there = placed(places, a, r, k, s, has_r, has_k, has_s)
    w = tl.full((1, 1, 1), 1.0, tl.float32)
    b = tl.zeros((1, 1, 1), tl.float32)
    if weight is not None:
        w = tl.load(weight + at, mask=is_there, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + at, mask=is_there, other=0.0).to(tl.float32)
    return w, b


@triton.jit
def slot_of(places, a, k_slot, k_slots, r_slot, r_slots, s_slot, s_slots):
    """The number of a tile among those whose sums are for the same parameters."""
    slot = a
    if not places.along_k:
        slot = slot * k_slots + k_slot
    if not places.along_r:
        slot = slot * r_slots + r_slot
    if not places.along_s:
        slot = slot * s_slots + s_slot
    return slot


@triton.jit
def add_up(sums, x, places, slot, r, k, s, r0, k1, r1, has_r, has_k, has_s):
    """Store a tile's sums over the axes that do not tell parameters apart, in a slot of their own."""
    at = tl.zeros((1, 1, 1), tl.int64) + slot
    inside = tl.full((1, 1, 1), 1, tl.int1)
    if places.along_r:
        at = at * r0 + r
        inside = inside & has_r
    else:
        x = tl.sum(x, 0, keep_dims=True)
    if places.along_k:
        at = at * k1 + k
        inside = inside & has_k
    else:
        x = tl.sum(x, 1, keep_dims=True)
    if places.along_s:
        at = at * r1 + s
        inside = inside & has_s
    else:
        x = tl.sum(x, 2, keep_dims=True)
    if sums is not None:
        tl.store(sums + at, x, mask=inside)


@triton.jit
def read(x, residual, at, here):
    """Elements, or their sums with those of a residual, rounded as the sum is that is kept; 0 outside.

    Whole vectors are read: which of the elements count is no matter of `here`, but of `counting`.
    """
    found = tl.load(x + at, mask=here, other=0.0)
    if residual is not None:
        added = found.to(tl.float32) + tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
        found = added.to(found.dtype)
    return found.to(tl.float32)


@triton.jit
def counting(mask, x, inside):
    """Elements, 0 where they do not count; without a mask what lies outside is 0 as it was read."""
    if mask is not None:
        x = tl.where(inside, x, 0.0)
    return x


# --- what is kept of columns ------------------------------------------------------------------------------------------


@triton.jit
def keep_row(rows, row: tl.constexpr, columns, column, x, has_k):
    """Store one of the numbers of each column."""
    tl.store(rows + row * columns + column, x, mask=has_k)


@triton.jit
def kept_row(rows, row: tl.constexpr, columns, column, has_k, other: tl.constexpr):
    """One of the numbers of each column, as another program may just have stored it."""
    return tl.load(rows + row * columns + column, mask=has_k, other=other, cache_modifier=".cg")


@triton.jit
def kept_line(statistics, columns, column, has_k, eps, IS_GIVEN: tl.constexpr):
    """scale, high, low and inverse of columns that were measured, or of remembered mean and spread."""
    if IS_GIVEN:
        mean = kept_row(statistics, 0, columns, column, has_k, 0.0)
        scale, high, low, inverse = given_line(mean, kept_row(statistics, 1, columns, column, has_k, 1.0), eps)
    else:
        scale = kept_row(statistics, SCALE, columns, column, has_k, 1.0)
        high = kept_row(statistics, HIGH, columns, column, has_k, 0.0)
        low = kept_row(statistics, LOW, columns, column, has_k, 0.0)
        inverse = kept_row(statistics, INVERSE, columns, column, has_k, 0.0)
    return scale, high, low, inverse


@triton.jit
def keep_moments(rows, columns, column, has_k, scale, high, low, squares, count):
    """Store the moments of columns, or of parts of them."""
    keep_row(rows, SCALE, columns, column, scale, has_k)
    keep_row(rows, HIGH, columns, column, high, has_k)
    keep_row(rows, LOW, columns, column, low, has_k)
    keep_row(rows, SQUARES, columns, column, squares, has_k)
    keep_row(rows, COUNT, columns, column, count, has_k)


# --- columns ----------------------------------------------------------------------------------------------------------


@triton.jit
def column_sum(x):
    """(R, K, S) -> (1, K, 1)."""
    return tl.sum(tl.sum(x, 2, keep_dims=True), 0, keep_dims=True)


@triton.jit
def valid_element(x, inside):
    """One of the elements that count in each column, (1, K, 1): the largest; 0 if there is none."""
    largest = tl.max(tl.max(tl.where(inside, x, float("-inf")), 2, keep_dims=True), 0, keep_dims=True)
    return tl.where(largest > float("-inf"), largest, 0.0)


@triton.jit
def mean_about(x, inside, element, count):
    """The mean of a tile's columns, summed as distances from one of the elements; of equal elements it is exact."""
    return element + column_sum(tl.where(inside, x - element, 0.0)) / count


@triton.jit
def deviations(total, squares, count, CENTERS: tl.constexpr):
    """What is left of the mean, and the sum of squared deviations, from sums of x - high and of its square."""
    low = total * 0.0
    if CENTERS:
        low = total / count
        squares = squares - total * low
    return low, tl.where(squares < 0, 0.0, squares)


@triton.jit
def measured(x, inside, element, count, scale, CENTERS: tl.constexpr):
    """high, low and the squared deviations of a tile's columns times `scale`."""
    x = x * scale
    high = scale * 0.0
    if CENTERS:
        high = mean_about(x, inside, element * scale, count)
        x = tl.where(inside, x - high, 0.0)
    low, squares = deviations(column_sum(x), column_sum(x * x), count, CENTERS)
    return high, low, squares


@triton.jit
def wanted_scale(high, squares, count, scale, ENLARGES: tl.constexpr):
    """The power of two for a column whose squares came out so; an eps of 0 wants tiny columns right as well."""
    mean_square = squares / count
    wanted = tl.where(mean_square < _LARGE, scale, _SHRINK)  # also for what is not finite
    if ENLARGES:
        wanted = tl.where((mean_square < _SMALL) & (tl.abs(high) < 1), _GROW, wanted)
    return wanted


@triton.jit
def differs(a, b):
    """Whether any number of two blocks does."""
    return tl.max(tl.ravel((a != b).to(tl.int32)), 0) != 0


@triton.jit
def inverse_root(squares, count, scale, eps, NORMALIZER: tl.constexpr):
    """1 / sqrt(mean square + eps) in the scaled column's unit; eps keeps its meaning, and 0 stays out of the root."""
    if NORMALIZER != L2:
        squares = squares / count
    under = squares + eps * scale * scale
    return 1.0 / tl.sqrt_rn(tl.where(under < _TINY, _TINY, under))


@triton.jit
def given_line(mean, spread, eps):
    """The line of remembered statistics: scale, high, low, inverse."""
    scale = tl.where(spread < _LARGE, 1.0, _SHRINK)
    under = spread * scale * scale + eps * scale * scale
    inverse = 1.0 / tl.sqrt_rn(tl.where((under < _TINY) & (under >= 0), _TINY, under))
    return scale, mean * scale, mean * 0.0, inverse


@triton.jit
def undone(scale):
    """1 / scale, exactly."""
    return tl.where(scale < 1, _GROW, tl.where(scale > 1, _SHRINK, 1.0))


@triton.jit
def step_to(common, scale):
    """What takes numbers of columns times `scale` to the common scale, which is not larger."""
    return tl.where(scale == common, 1.0, common * undone(scale))


@triton.jit
def joined(scale, high, low, squares, count):
    """The moments of columns that were measured in parts, along the last axis: Chan's formula for all parts at once.

    Distances are from a mean of the parts' means, itself summed as distances from one of them: a constant column stays
    exact. Where means are so far apart that the squares of distances would leave float's range, columns are shrunk.
    """
    there = count > 0
    total = tl.sum(count, 2, keep_dims=True)
    least = tl.maximum(total, 1.0)
    common = tl.where(total > 0, tl.min(tl.where(there, scale, _GROW), 2, keep_dims=True), 1.0)
    means = high * step_to(common, scale)
    largest = tl.max(tl.where(there, means, float("-inf")), 2, keep_dims=True)
    apart = largest - tl.min(tl.where(there, means, float("inf")), 2, keep_dims=True)
    common = tl.where(apart < _APART, common, common * _SHRINK)
    step = step_to(common, scale)
    high, low, squares = high * step, low * step, squares * step * step
    about = tl.max(tl.where(there, high, float("-inf")), 2, keep_dims=True)
    about = tl.where(about > float("-inf"), about, 0.0)
    about += tl.sum(tl.where(there, high - about, 0.0) * count, 2, keep_dims=True) / least
    distance = tl.where(there, (high - about) + low, 0.0)
    mean = tl.sum(distance * count, 2, keep_dims=True) / least
    left = distance - mean
    squares = tl.sum(tl.where(there, squares + left * left * count, 0.0), 2, keep_dims=True)
    joined_high = about + mean
    return common, joined_high, (about - joined_high) + mean, squares, total
