"""Inputs that nobody thought of: any layer, pattern, shape, dtype, layout, scale and mean, against float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normwise import RMS, Norm, Standardize, TooFewSamplesError
from tests.catalogue import LAYOUTS, Family
from tests.memory_order import output_strides
from tests.truth import EVERY, errors, is_right, measured, truth

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
MEANS = (0.0, 1.0, -10.0, 1e3, -1e4, 1e6, 1e7)
SHAPES_OF_COLUMNS = ("normal", "outlier", "two values", "repeated", "constant", "uniform")


def column(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    """Columns of spread about 1, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    if kind == "outlier":
        x[seed % rows] *= 10.0 ** (seed % 9)
    elif kind == "two values":
        x = x.sign()
    elif kind == "repeated":
        x = x[torch.randint(0, 2, (rows,), generator=generator)]
    elif kind == "constant":
        x = x[:1].repeat(rows, 1)
    elif kind == "uniform":
        x = torch.rand(rows, columns, dtype=torch.float64, generator=generator)
    return x


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Samples x columns in a low precision: each column of its own kind, mean and scale, up to the dtype's largest."""
    dtype = draw(st.sampled_from(PRECISIONS))
    largest = torch.finfo(dtype).max
    rows = draw(st.one_of(st.integers(2, 40), st.sampled_from((255, 1025, 3000))))
    kinds = draw(st.lists(st.sampled_from(SHAPES_OF_COLUMNS), min_size=1, max_size=3))
    parts = []
    for kind in kinds:
        part = column(kind, rows, 2, draw(st.integers(0, 2**31))) + draw(st.sampled_from(MEANS))
        exponent = draw(st.one_of(st.just(0.0), st.floats(-30, 38.5)))
        scaled = part * 10.0**exponent
        if draw(st.booleans()) and scaled.abs().max() > 0 and exponent > 30:
            scaled = scaled / scaled.abs().max() * largest
        parts.append(scaled.clamp(-largest, largest))
    return torch.cat(parts, 1).to(dtype)


@given(
    family=st.sampled_from(EVERY),
    matrix=matrices(),
    layout=st.sampled_from(tuple(LAYOUTS)),
    eps=st.sampled_from((None, 1e-6, 0.1)),
)
def test_every_layer_is_right(family: Family, matrix: Tensor, layout: str, eps: float | None) -> None:
    found = errors(family, matrix, LAYOUTS[layout], eps)
    assert is_right(found), found


@st.composite
def patterns(draw: st.DrawFn) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """A pattern, a shape that it takes, with sizes from 0 on, and the dimensions that it normalizes over."""
    axes = draw(st.lists(st.booleans(), min_size=1, max_size=5).filter(any))
    shape = draw(st.tuples(*[st.integers(0 if index < 2 else 1, 5) for index in range(len(axes))]))
    text = " ".join(f"[{name}]" if reduced else name for name, reduced in zip("abcde", axes, strict=False))
    return text, shape, tuple(dim for dim, reduced in enumerate(axes) if reduced)


def scattered(x: Tensor, order: tuple[int, ...], step: int) -> Tensor:
    """The same values with the dimensions in another order in memory, and `step - 1` elements between neighbors."""
    spread = torch.full((*(x.shape[dim] for dim in order), step), torch.nan, dtype=x.dtype)
    spread[..., 0] = x.permute(order)
    back = sorted(range(x.dim()), key=order.__getitem__)
    return spread[..., 0].permute(back)


def strides(x: Tensor) -> list[int]:
    """Where they mean something."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@given(
    data=st.data(), drawn=patterns(), normalizer=st.sampled_from((Standardize(), Standardize(0.1), RMS(), RMS(1e-3)))
)
def test_every_pattern_is_right(data: Any, drawn: Any, normalizer: Standardize | RMS) -> None:
    text, shape, dims = drawn
    dtype = data.draw(st.sampled_from(PRECISIONS))
    orders = st.permutations(range(len(shape))).map(tuple)
    steps = st.integers(1, 2)
    values = column("normal", max(math.prod(shape), 1), 1, data.draw(st.integers(0, 2**31)))[: math.prod(shape)]
    values = values * data.draw(st.sampled_from((1e-30, 1.0, 1e15, 1e37))) + data.draw(st.sampled_from(MEANS))
    largest = torch.finfo(dtype).max
    x = values.clamp(-largest, largest).reshape(shape).to(dtype)
    dy = torch.randn(shape).to(dtype)
    leaf = scattered(x, data.draw(orders), data.draw(steps)).requires_grad_()
    norm = Norm(text, normalizer)
    try:
        y = norm(leaf)
    except TooFewSamplesError:
        assert math.prod(shape[dim] for dim in dims) == 1
        return
    (dx,) = torch.autograd.grad(y, leaf, scattered(dy, data.draw(orders), data.draw(steps)))
    assert y.shape == dx.shape == shape
    assert strides(y) == strides(torch.empty_strided(shape, output_strides(norm, leaf), device="meta"))
    if x.numel() == 0:
        return
    eps = torch.finfo(dtype).eps if normalizer.eps is None else normalizer.eps
    found = measured(y.detach(), dx, truth(x, dy, dims, eps, centers=isinstance(normalizer, Standardize)), dy, dims)
    assert is_right(found), found
