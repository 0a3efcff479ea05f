"""Where the channels go along the data flow, and that nothing is folded where they go elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import normwise as nw
from normwise.surgery.flow import Flow, Step, trace
from normwise.surgery.streams import dim_after, dim_before, downstream, upstream
from tests.test_fold import Wired, check_same, lived
from tests.tolerances import DOUBLE

Move = Callable[[Tensor], Any]


def moved(move: Move, shape: tuple[int, ...] = (2, 3, 4, 5)) -> Step:
    """The operation that a function does to a tensor."""
    flow = trace(nn.Identity(), lambda: move(torch.randn(shape)))
    return [step for step in flow.steps if step.reads][-1]


# Where each of the four dimensions of (2, 3, 4, 5) is afterwards; None: nowhere as a whole.
MOVES: dict[str, tuple[Move, list[int | None]]] = {
    "clone": (lambda x: x.clone(), [0, 1, 2, 3]),
    "detach": (lambda x: x.detach(), [0, 1, 2, 3]),
    "permute": (lambda x: x.permute(0, 3, -3, 2), [0, 2, 3, 1]),
    "movedim": (lambda x: x.movedim(1, -1), [0, 3, 1, 2]),
    "transpose": (lambda x: x.transpose(-1, 1), [0, 3, 2, 1]),
    "mT": (lambda x: x.mT, [0, 1, 3, 2]),
    "flatten the end": (lambda x: x.flatten(2), [0, 1, None, None]),
    "flatten the beginning": (lambda x: x.flatten(0, 2), [None, None, None, 1]),
    "flatten over them": (lambda x: x.flatten(1, 2), [0, None, None, 2]),
    "unflatten": (lambda x: x.unflatten(2, (2, 2)), [0, 1, None, 4]),
    "another dimension of the same size": (lambda x: x.reshape(2, 4, 3, 5), [0, None, None, 3]),
    "unsqueeze in front": (lambda x: x[None], [1, 2, 3, 4]),
    "unsqueeze within": (lambda x: x.unsqueeze(-2), [0, 1, 2, 4]),
    "expand": (lambda x: x.expand(6, 2, 3, 4, 5), [1, 2, 3, 4]),
    "slice": (lambda x: x[:, :, 1:], [0, 1, None, 3]),
    "select": (lambda x: x[:, :, -1], [0, 1, None, 2]),
    "select the first": (lambda x: x[0], [None, 0, 1, 2]),
    "flip": (lambda x: x.flip(1), [None] * 4),
    "roll": (lambda x: x.roll(1, 1), [None] * 4),
    "index": (lambda x: x[:, torch.tensor([2, 1, 0])], [None] * 4),
    "split": (lambda x: x.split(1, 1), [None] * 4),
    "a number times": (lambda x: x * 2, [None] * 4),
    "another dtype": (lambda x: x.double(), [None] * 4),
    "sum": (lambda x: x.sum(0), [None] * 4),
    "activation": (lambda x: x.relu(), [None] * 4),
}


@pytest.mark.parametrize(("move", "places"), MOVES.values(), ids=MOVES)
def test_where_each_dimension_goes_and_comes_from(move: Move, places: list[int | None]) -> None:
    step = moved(move)
    assert [dim_after(step, dim) for dim in range(4)] == places
    rank = step.writes[0].tensor.dim()
    came = {after: before for before, after in enumerate(places) if after is not None}
    assert [dim_before(step, dim) for dim in range(rank)] == [came.get(dim) for dim in range(rank)]


@pytest.mark.parametrize(
    "view", [lambda x: x.reshape(3, 3, 9), lambda x: x.reshape(9, 3, 3), lambda x: x.reshape(3, 9, 3)]
)
def test_equal_sizes_in_a_view_are_told_apart(view: Move) -> None:
    """What is said of a dimension holds for every element, not only for the sizes."""
    step = moved(view, (3, 3, 3, 3))
    before = torch.arange(81).reshape(3, 3, 3, 3)
    after = view(before)
    for dim in range(4):
        at = dim_after(step, dim)
        if at is not None:
            there = torch.arange(3).reshape([3 if d == dim else 1 for d in range(4)]).expand(3, 3, 3, 3)
            here = torch.arange(3).reshape([3 if d == at else 1 for d in range(after.dim())]).expand(after.shape)
            assert torch.equal(view(there), here)


def test_two_that_are_moved_together_are_two() -> None:
    step = moved(lambda x: torch.cat([x, x.clone()]))
    assert step.name == "cat"
    assert dim_after(step, 1) is None
    assert dim_before(step, 1) is None


# ------------------------------------------------------------------------------------------------------ to the ends


def traced(body: Callable[[Any, Tensor], Any]) -> tuple[Wired, Flow]:
    model = Wired(body, a=nn.Linear(8, 8), b=nn.Linear(8, 8), n=nn.LayerNorm(8))
    x = torch.randn(3, 5, 8)
    return model, trace(model, lambda: model(x), [model.n])


UP: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[str, int, str]]] = {
    "a layer": (lambda m, x: m.n(m.a(x)), ("a", 2, "")),
    "past moves": (lambda m, x: m.n(m.a(x).mT[:, :, 0].contiguous()), ("a", 2, "")),
    "an operation": (lambda m, x: m.n(m.a(x).sin().mT.mT), ("sin", 2, "")),
    "the input": (lambda m, x: m.n(x.mT.mT), ("None", 2, "")),
    "written over": (lambda m, x: m.n(m.a(x).mul_(2)), ("mul_", 2, "")),
}  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), UP.values(), ids=UP)
def test_upstream(body: Callable[[Any, Tensor], Any], expected: tuple[str, int, str]) -> None:
    model, flow = traced(body)
    (call,) = flow.calls(model.n)
    value = call.takes[0]
    end = upstream(value, value.tensor.dim() - 1)
    assert (str(end.step), end.dim, end.reason) == expected


DOWN: dict[str, tuple[Callable[[Any, Tensor], Any], list[tuple[str, int]]]] = {
    "two layers": (lambda m, x: (lambda y: m.a(y) + m.b(y))(m.n(x)), [("a", 2), ("b", 2)]),
    "past moves": (lambda m, x: (lambda y: (m.a(y.mT.mT), m.b(y[:, 0])))(m.n(x)), [("a", 2), ("b", 1)]),
    "an operation": (lambda m, x: (lambda y: m.a(y).add_(y))(m.n(x)), [("a", 2), ("add_", 2)]),
    "written over": (lambda m, x: m.a(m.n(x).mul_(2)), [("mul_", 2)]),
    "written over, by a view of it": (
        lambda m, x: (lambda y: (y[:, 0].zero_(), m.a(y)))(m.n(x)), [("zero_", 1), ("a", 2)]
    ),
    "the output": (lambda m, x: m.n(x).mT, [("the model's output", 1)]),
    "a part of it": (lambda m, x: m.n(x)[..., :4], [("slice", 2)]),
    "nobody": (lambda m, x: (m.n(x), m.a(x))[1], []),
}  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), DOWN.values(), ids=DOWN)
def test_downstream(body: Callable[[Any, Tensor], Any], expected: list[tuple[str, int]]) -> None:
    model, flow = traced(body)
    (call,) = flow.calls(model.n)
    assert [(str(end.step), end.dim) for end in downstream(call.writes[0], 2)] == expected


# --------------------------------------------------------------------------------------------- nothing is done wrongly

WIDTH = 6
NORMS: dict[str, Callable[[], nn.Module]] = {
    "bn": lambda: nn.BatchNorm2d(WIDTH),
    "bare bn": lambda: nn.BatchNorm2d(WIDTH, eps=1e-3, affine=False),
    "untracked bn": lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False),
    "in": lambda: nn.InstanceNorm2d(WIDTH, affine=True),
    "gn": lambda: nn.GroupNorm(3, WIDTH),
    "ln2d": lambda: nw.LayerNorm2d(WIDTH),
    "ln over the last": lambda: nn.LayerNorm(WIDTH, bias=False),
    "rms over the last": lambda: nn.RMSNorm(WIDTH, eps=1e-5),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
    "circular": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular", groups=2, bias=False),
    "pointwise": lambda: nn.Conv2d(WIDTH, WIDTH, 1, groups=3),
    "transposed": lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1, groups=2),
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "tanh": lambda: nn.Tanh(),
    "relu": lambda: nn.ReLU(inplace=True),
    "transpose": lambda: Wired(lambda m, x: x.transpose(1, 3)),
    "mirror": lambda: Wired(lambda m, x: x.mT),
    "rolled": lambda: Wired(lambda m, x: x.permute(0, 2, 3, 1)),
    "join": lambda: Wired(lambda m, x: x.flatten(2).unflatten(2, (WIDTH, WIDTH))),
    "twofold": lambda: Wired(lambda m, x: x + x.flip(2)),
}


def test_what_one_step_adds_and_another_takes_away_comes_to_an_end() -> None:
    """The shift of the first norm makes a bias, which is useless before the second one."""
    model = lived(
        nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH))
    ).train()
    assert "0" in nw.fold(model, torch.randn(5, WIDTH)).paths


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([*OTHERS, *NORMS]), min_size=2, max_size=6).filter(lambda names: set(names) & set(NORMS)),
    st.integers(0, 1000),
    st.booleans(),
)
def test_any_chain_computes_the_same(names: list[str], seed: int, training: bool) -> None:
    """Every dimension but the batch has the same size, so that a wrong one would not be noticed by its size."""
    torch.manual_seed(seed)
    layers = [(NORMS | OTHERS)[name]() for name in names]
    model = lived(nn.Sequential(nn.Conv2d(3, WIDTH, 1), *layers), seed).double().train(training)
    x = torch.randn(3, 3, WIDTH, WIDTH, dtype=torch.float64)
    original = copy.deepcopy(model)
    record = nw.fold(model, x)
    assert {line.path for line in (*record.changed, *record.left)} <= set(dict(original.named_modules()))
    check_same(model(x), original(x).detach(), DOUBLE)
    check_same(model.eval()(x), original.eval()(x).detach(), DOUBLE)
