from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normwise.pattern import parse
from normwise.plan import (
    Over,
    Plan,
    averaged,
    becomes_contiguous,
    gather,
    make_plan,
    memory_word,
    over_shape,
    place,
    plan_for,
)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, Over]:
    """A plan, and some of its kept axes in any order and grouping, as a memory or a parameter may name them."""
    names = draw(st.permutations("abcde"))[: draw(st.integers(1, 5))]
    sizes = {name: draw(st.integers(1, 4)) for name in names}
    reduced = {name for name in names if draw(st.booleans())}
    words, shape, left = [], [], list(names)
    while left:
        group = [left.pop(0) for _ in range(draw(st.integers(1, min(2, len(left)))))]
        marked = [f"[{name}]" if name in reduced else name for name in group]
        words.append(marked[0] if len(group) == 1 else f"({' '.join(marked)})")
        shape.append(math.prod(sizes[name] for name in group))
    plan = make_plan(parse(" ".join(words)), tuple(shape), tuple(sizes.items()))
    kept = draw(st.permutations([name for name in names if name not in reduced]))
    taken = kept[: draw(st.integers(0, len(kept)))]
    over: list[tuple[str, ...]] = []
    while taken:
        step = draw(st.integers(1, len(taken)))
        over.append(tuple(taken[:step]))
        taken = taken[step:]
    return plan, tuple(over)


def _index(plan: Plan) -> Tensor:
    return torch.arange(math.prod(plan.view), dtype=torch.float64).reshape(plan.view)


@given(plans())
def test_the_view_holds_every_element_once(case: tuple[Plan, Over]) -> None:
    plan, _ = case
    assert math.prod(plan.view) == math.prod(plan.shape) == plan.rows * plan.columns
    assert len(plan.view) == len(plan.names) == max(sum(plan.parts), plan.reduced[-1] + 1)
    assert [plan.size(name) for name in plan.names] == list(plan.view)


@given(plans())
def test_gather_undoes_place(case: tuple[Plan, Over]) -> None:
    plan, over = case
    shape = over_shape(over, dict(zip(plan.names, plan.view, strict=True)))
    remembered = torch.randn(shape, dtype=torch.float64)
    placed = place(remembered, over, plan)
    assert torch.broadcast_shapes(placed.shape, plan.view) == plan.view
    assert torch.equal(gather(placed, over, plan), remembered)


@given(plans())
def test_place_puts_every_element_where_its_axes_say(case: tuple[Plan, Over]) -> None:
    plan, over = case
    sizes = dict(zip(plan.names, plan.view, strict=True))
    flat = [name for dim in over for name in dim]
    parameter = torch.arange(math.prod(sizes[name] for name in flat)).reshape(over_shape(over, sizes))
    placed = place(parameter, over, plan).broadcast_to(plan.view)
    for element in {0, math.prod(plan.view) // 2, math.prod(plan.view) - 1}:
        at = [int(i) for i in torch.unravel_index(torch.tensor(element), plan.view)]
        expected = 0
        for name in flat:
            expected = expected * sizes[name] + at[plan.names.index(name)]
        assert placed[tuple(at)].item() == expected


@given(plans())
def test_averaged_are_the_kept_axes_that_are_not_named(case: tuple[Plan, Over]) -> None:
    plan, over = case
    statistic = _index(plan).mean(plan.reduced, keepdim=True) if plan.reduced else _index(plan)
    flat = [name for dim in over for name in dim]
    kept = [dim for dim, name in enumerate(plan.names) if dim not in plan.reduced and name not in flat]
    assert averaged(statistic.shape, over, plan) == tuple(dim for dim in kept if plan.view[dim] != 1)


@pytest.mark.parametrize(
    ("text", "shape", "sizes", "view", "reduced"),
    [
        ("[n] c [...]", (8, 3), {}, (8, 3), (0,)),
        ("[n] c [...]", (8, 3, 4, 5), {}, (8, 3, 4, 5), (0, 2, 3)),
        ("n (g [k]) [...]", (2, 6, 4), {"g": 3}, (2, 3, 2, 4), (2, 3)),
        ("n (g [k]) [...]", (2, 6, 4), {"k": 3}, (2, 2, 3, 4), (2, 3)),
        ("... [d]", (7,), {}, (7,), (0,)),
        ("... [d]", (2, 3, 4), {"d": 4}, (2, 3, 4), (2,)),
        ("n [(a b)]", (2, 6), {"a": 2, "b": 3}, (2, 2, 3), (1, 2)),
        ("n [...]", (5,), {}, (5, 1), (1,)),
        ("n (g [k])", (0, 6), {"g": 2}, (0, 2, 3), (2,)),
    ],
)
def test_make_plan(
    text: str, shape: tuple[int, ...], sizes: dict[str, int], view: tuple[int, ...], reduced: tuple[int, ...]
) -> None:
    plan = make_plan(parse(text), shape, tuple(sizes.items()))
    assert (plan.shape, plan.view, plan.reduced) == (shape, view, reduced)


def test_eager_calls_share_one_plan() -> None:
    pattern = parse("[n] c")
    assert plan_for(pattern, torch.Size((4, 3)), ()) is plan_for(parse(" [n]  c"), torch.Size((4, 3)), ())
    assert plan_for(pattern, torch.Size((5, 3)), ()).rows == 5


@pytest.mark.parametrize(
    ("text", "x", "expected"),
    [
        ("... [d]", torch.empty(8, 64, 4, 4).permute(0, 2, 3, 1), True),
        ("... [d]", torch.empty(8, 64, 4).mT, True),
        ("n t [d]", torch.empty(8, 64, 4).mT, True),
        ("n ([d])", torch.empty(64, 8).T, True),
        ("... [d]", torch.empty(8, 64, 1).mT, False),  # the axis that is kept has one element: it lies nowhere
        ("... [d]", torch.empty(32, 8, 64).transpose(0, 1), False),
        ("... [d e]", torch.empty(8, 6, 4).mT, False),  # a row in one piece, though in another order
        ("... [d e]", torch.empty(6, 8, 4).transpose(0, 1), True),
        ("... [d]", torch.empty(64).expand(8, 64), False),
        ("n c [...]", torch.empty(8, 4, 64).mT, False),
        ("n c [l]", torch.empty(8, 4, 64).mT, True),
        ("n c [h w]", torch.empty(8, 4, 5, 64).permute(0, 3, 1, 2), False),  # channels_last
        ("n c [d h w]", torch.empty(8, 3, 4, 5, 64).permute(0, 4, 1, 2, 3), False),
        ("n c [h w]", torch.empty(4, 5, 8, 64).permute(2, 3, 0, 1), True),
        ("n [c] ...", torch.empty(8, 64, 4, 4), False),
        ("[n] c", torch.empty(8, 64).T, False),
        ("[n] c [l]", torch.empty(8, 4, 64).mT, False),
    ],
)
def test_what_becomes_contiguous(text: str, x: torch.Tensor, expected: bool) -> None:
    assert becomes_contiguous(make_plan(parse(text), tuple(x.shape)), x.stride()) is expected


def _images(memory_format: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(8, 6, 4, 4, device="meta").contiguous(memory_format=memory_format).stride()


@pytest.mark.parametrize(
    ("text", "shape", "strides", "word"),
    [
        ("... [d]", (8, 5, 16), (80, 16, 1), "KR"),
        ("n c [...]", (8, 6, 4, 4), _images(torch.contiguous_format), "KR"),
        ("n (g [k]) [...]", (8, 6, 4, 4), _images(torch.contiguous_format), "KR"),
        ("[n] c", (8, 3), (3, 1), "RK"),
        ("[n] c", (8, 3), (1, 8), "KR"),
        ("[n] c [...]", (8, 6, 4, 4), _images(torch.channels_last), "RK"),
        ("[n] c [...]", (8, 6, 4, 4), _images(torch.contiguous_format), "RKR"),
        ("n [c] ...", (8, 6, 4, 4), _images(torch.contiguous_format), "KRK"),
        ("n [c] ...", (8, 6, 4, 4), _images(torch.channels_last), "KR"),
        ("n (g [k]) [...]", (8, 6, 4, 4), _images(torch.channels_last), "KRKR"),
        ("[n] c [...]", (1, 6, 4, 4), _images(torch.contiguous_format), "KR"),
        ("[n] c", (1, 1), (1, 1), ""),
    ],
)
def test_memory_word(text: str, shape: tuple[int, ...], strides: tuple[int, ...], word: str) -> None:
    assert memory_word(make_plan(parse(text), shape, (("g", 2),) if "g" in text else ()), strides) == word
