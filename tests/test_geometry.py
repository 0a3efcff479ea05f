"""How a compiled kernel sees a tensor: the groups of its word, and where parameters and masks lie, by counting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normwise.kernels.geometry import (
    SHORTEST_RUN,
    Geometry,
    Misfit,
    Weights,
    geometry_of,
    is_dense,
    lies_as,
    mask_shape,
)
from normwise.pattern import parse, parse_names
from normwise.plan import Plan, make_plan, view_strides


def seen(text: str, shape: Sequence[int], over: str = "", strides: Sequence[int] | None = None) -> Geometry | Misfit:
    plan = make_plan(parse(text), tuple(shape), (("g", 2),) if "(g" in text else ())
    strides = torch.empty(tuple(shape), device="meta").stride() if strides is None else strides
    return geometry_of(plan, strides, parse_names(over) if over else ())


def channels_last(n: int, c: int, h: int, w: int) -> tuple[int, ...]:
    return (c * h * w, 1, w * c, c)


@pytest.mark.parametrize(
    ("text", "shape", "strides", "sizes"),
    [
        ("n [d]", (5, 7), None, (5, 1, 1, 7)),
        ("n t [d]", (5, 3, 7), None, (15, 1, 1, 7)),
        ("[n] c", (5, 7), None, (1, 5, 7, 1)),
        ("n [d]", (5, 7), (1, 5), (1, 7, 5, 1)),
        ("[n] c [h w]", (5, 7, 2, 3), None, (1, 5, 7, 6)),
        ("[n] c [h w]", (5, 7, 2, 3), channels_last(5, 7, 2, 3), (1, 30, 7, 1)),
        ("n c [h w]", (5, 7, 2, 3), None, (35, 1, 1, 6)),
        ("n c [h w]", (5, 7, 2, 3), channels_last(5, 7, 2, 3), (5, 6, 7, 1)),
        ("n [c] h w", (5, 7, 2, 3), None, (5, 7, 6, 1)),
        ("n [c] h w", (5, 7, 2, 3), channels_last(5, 7, 2, 3), (30, 1, 1, 7)),
        ("n (g [k]) [h w]", (5, 8, 2, 3), None, (10, 1, 1, 24)),
        ("n (g [k]) [h w]", (5, 8, 2, 3), channels_last(5, 8, 2, 3), (5, 6, 2, 4)),
        ("[n]", (5,), None, (1, 1, 1, 5)),
        ("[n]", (1,), None, (1, 1, 1, 1)),
    ],
)
def test_the_sizes_of_the_groups(
    text: str, shape: tuple[int, ...], strides: tuple[int, ...] | None, sizes: tuple[int, ...]
) -> None:
    found = seen(text, shape, "", strides)
    assert isinstance(found, Geometry)
    assert found.sizes == sizes
    assert found.columns == sizes[0] * sizes[2]


@pytest.mark.parametrize(
    ("text", "over", "reason"),
    [
        ("[a] b [c] d", "", "its axes lie in an order that no kernel knows"),
        ("a [b] c [d] e", "", "its axes lie in an order that no kernel knows"),
        ("[a] b c", "b", "its parameters do not lie in the order of its elements"),
        ("[a] b c", "c b", "its parameters do not lie in the order of its elements"),
        ("[a b] c", "b", "its parameters do not lie in the order of its elements"),
        ("a [b c d]", "b d", "its parameters do not lie in the order of its elements"),
        ("[a] b c", "a c", "its parameters differ along rows and columns"),
        ("[a] b [c]", "a c", "its parameters differ along rows and columns"),
    ],
)
def test_what_no_kernel_sees(text: str, over: str, reason: str) -> None:
    shape = [3 + place for place in range(len(text.split()))]
    assert seen(text, shape, over) == Misfit(reason)


def test_runs_of_one_column_after_another_from_a_length_on() -> None:
    for length, by_runs in ((SHORTEST_RUN - 1, False), (SHORTEST_RUN, True)):
        found = seen("[n] c [l]", (4, 3, length))
        assert isinstance(found, Geometry)
        assert found.by_runs is by_runs
    for text in ("n [d]", "[n d]"):
        assert seen(text, (4, 3)).by_runs  # type: ignore[union-attr]
    assert not seen("[n] d", (4, 1000)).by_runs  # type: ignore[union-attr]


def places(found: Geometry) -> list[tuple[int, int]]:
    """For each element its place in memory by call.h, and that of its parameter."""
    k0, r0, k1, r1 = found.sizes
    w = found.weights
    return [
        (
            ((a * r0 + r) * k1 + k) * r1 + s,
            (a % w.period_k0) * w.k0 + r * w.r0 + (k % w.period_k1) * w.k1 + s * w.r1,
        )
        for a, r, k, s in itertools.product(range(k0), range(r0), range(k1), range(r1))
    ]


def parameter_places(plan: Plan, strides: Sequence[int], over: str) -> dict[int, int]:
    """The same by the plan: from an element's place in memory to that of its parameter, with torch's help."""
    names = [name for dim in parse_names(over) for name in dim] if over else []
    numbers = torch.arange(math.prod(plan.size(name) for name in names))
    in_order = [name for name in plan.names if name in names]
    numbers = numbers.reshape([plan.size(name) for name in names])
    numbers = numbers.permute([names.index(name) for name in in_order])
    spread = numbers.reshape([size if name in names else 1 for name, size in zip(plan.names, plan.view, strict=True)])
    lies = view_strides(plan, strides)
    memory = torch.zeros(plan.view, dtype=torch.long)
    for dim, (stride, size) in enumerate(zip(lies, plan.view, strict=True)):
        memory += (torch.arange(size) * stride).reshape([size if d == dim else 1 for d in range(len(plan.view))])
    return dict(zip(memory.flatten().tolist(), spread.expand(plan.view).flatten().tolist(), strict=True))


PATTERNS = (
    "n [d]",
    "[n] c",
    "[n] c [l]",
    "n [c] l",
    "n [h] g [k]",
    "n c [l]",
    "[n] t c",
    "n [k l]",
    "n g [k l]",
    "[n d]",
)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, tuple[int, ...], tuple[int, ...], str]:
    """A pattern, a shape, the strides of a dense tensor in any order of its axes, and the axes of a parameter."""
    text = draw(st.sampled_from(PATTERNS))
    names = parse(text).names
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=len(names), max_size=len(names))))
    if draw(st.booleans()):
        shape = (*shape[:-1], SHORTEST_RUN)
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), 1
    for dim in order:
        strides[dim], step = step, step * shape[dim]
    over = draw(st.lists(st.sampled_from(names), unique=True))
    return text, shape, tuple(strides), " ".join(over)


@given(tensors())
def test_every_element_finds_its_parameter(tensor: tuple[str, tuple[int, ...], tuple[int, ...], str]) -> None:
    text, shape, strides, over = tensor
    found = seen(text, shape, over, strides)
    if isinstance(found, Misfit):
        return
    plan = make_plan(parse(text), shape)
    expected = parameter_places(plan, strides, over)
    listed = places(found)
    assert sorted(at for at, _ in listed) == list(range(math.prod(shape)))
    assert all(expected[at] == parameter for at, parameter in listed)
    assert found.weights.size == max(expected.values()) + 1


@given(tensors(), st.data())
def test_every_element_finds_its_byte_of_a_mask(
    tensor: tuple[str, tuple[int, ...], tuple[int, ...], str], data: st.DataObject
) -> None:
    text, shape, strides, _ = tensor
    found = seen(text, shape, "", strides)
    if isinstance(found, Misfit):
        return
    plan = make_plan(parse(text), shape)
    covered = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    mask = [size if is_covered else 1 for size, is_covered in zip(plan.view, covered, strict=True)]
    sizes = mask_shape(found, plan, mask)
    assert all(size in (1, whole) for size, whole in zip(sizes, found.sizes, strict=True))
    for group, size, whole in zip(found.groups, sizes, found.sizes, strict=True):
        if any(mask[dim] != 1 for dim in group):
            assert size == whole
    if not found.by_runs and math.prod(sizes[2:]) > 1:
        assert sizes[2:] == found.sizes[2:]  # a byte for each lane


@given(tensors(), st.integers(1, 9))
def test_the_way_depends_on_the_length_of_a_column_alone(
    tensor: tuple[str, tuple[int, ...], tuple[int, ...], str], more: int
) -> None:
    """With more columns, in the same order of axes, the kernel is the same; only those of size 1 have no order."""
    text, shape, strides, _ = tensor
    plan = make_plan(parse(text), shape)
    kept = [dim for dim in range(len(shape)) if dim not in plan.reduced and shape[dim] > 1]
    if not kept:
        return
    grown = tuple(size + more if dim == kept[0] else size for dim, size in enumerate(shape))
    order = sorted((dim for dim in range(len(shape))), key=lambda dim: (strides[dim], shape[dim] != 1))
    wider, step = [0] * len(shape), 1
    for dim in order:
        wider[dim], step = step, step * grown[dim]
    few, many = seen(text, shape, "", strides), seen(text, grown, "", tuple(wider))
    assert type(few) is type(many)
    if isinstance(few, Geometry) and isinstance(many, Geometry):
        assert few.by_runs == many.by_runs
        assert few.groups == many.groups
        assert (few.sizes[1], few.sizes[3]) == (many.sizes[1], many.sizes[3])


def _tensors() -> list[tuple[Tensor, bool]]:
    x = torch.empty(4, 6, 5)
    return [
        (x, True),
        (x.permute(2, 0, 1), True),
        (x.mT, True),
        (x[..., ::2], False),
        (x[1:], True),
        (x[:, 1:], False),
        (x[:, :1], False),
        (x[:1, :, 1:], False),
        (x[:, :, :1], False),
        (x.new_empty(1, 5).expand(4, 5), False),
        (x.new_empty(4, 1, 5).expand(4, 1, 5), True),
        (x.new_empty(()), True),
        (x.new_empty(1, 1), True),
        (x.as_strided((4, 6), (1, 1)), False),
        (x.new_empty(3, 1, 5)[:, ::7], True),
    ]


@pytest.mark.parametrize("number", range(len(_tensors())))
def test_dense_is_what_fills_one_stretch_of_memory(number: int) -> None:
    x, expected = _tensors()[number]
    assert is_dense(x.shape, x.stride()) is expected
    if expected:
        assert torch.empty_like(x).stride() == x.stride() or any(size == 1 for size in x.shape)


def test_two_lie_alike_whatever_the_stride_of_a_single_one() -> None:
    assert lies_as((4, 1, 5), (5, 5, 1), (5, 1, 1))
    assert not lies_as((4, 2, 5), (10, 5, 1), (1, 4, 8))


def test_no_parameters_are_one_that_nobody_reads() -> None:
    found = seen("n [d]", (5, 7))
    assert isinstance(found, Geometry)
    assert found.weights == Weights()
    assert found.weights.size == 1
