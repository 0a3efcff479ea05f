"""LayerNorm to RMSNorm where all that is added up before it can be centred; the reason where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw
from tests.test_adopt import everything
from tests.test_fold import Wired, changes, check_same, folded, hugging_face, linear, lived, truth, wired
from tests.tolerances import DOUBLE, MODEL_OUTPUTS

WIDTH, WORDS = 8, 6
Body = Callable[[Any, Tensor], Any]


def norm(**options: Any) -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH, bias=False, **options)


def embedding() -> nn.Embedding:
    return nn.Embedding(WORDS, WIDTH)


def ids(rows: int = 3, length: int = 5) -> Tensor:
    return torch.randint(0, WORDS, (rows, length))


def block() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDTH), linear(out=16), nn.GELU(), linear(16))


class PreNorm(nn.Module):
    """A small pre-norm transformer, without the attention."""

    def __init__(self, scale: float = 1.0, drop: float = 0.0, *, cls: bool = False) -> None:
        super().__init__()
        self.words, self.scale, self.drop = embedding(), scale, nn.Dropout(drop)
        self.positions = nn.Parameter(torch.randn(1, 9, WIDTH))
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH)) if cls else None
        self.blocks = nn.ModuleList([block(), block()])
        self.last, self.head = nn.LayerNorm(WIDTH), linear(out=5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x) * self.scale
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = self.drop(x + self.positions[:, : x.shape[1]])
        for inner in self.blocks:
            x = x + self.drop(inner(x))
        return self.head(self.last(x))


def rms_in(model: nn.Module) -> list[str]:
    return [path for path, layer in model.named_modules() if type(layer) is nn.RMSNorm]


@pytest.mark.parametrize(
    "build", [PreNorm, lambda: PreNorm(WIDTH**0.5, 0.5), lambda: PreNorm(cls=True)], ids=["plain", "scaled", "cls"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_transformer(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model, x = lived(build()).to(dtype), ids()
    before, expected = everything(model), truth(model, x)
    record = nw.fold(model, x)
    check_same(model(x), expected, DOUBLE if dtype == torch.float64 else MODEL_OUTPUTS)
    assert rms_in(model) == ["blocks.0.0", "blocks.1.0", "last"]
    centred = "its input has mean 0: centred were words, blocks.0.3, blocks.1.3"
    assert changes(record)[3:] == [(path, centred) for path in rms_in(model)]
    assert not record.left
    assert record.notes == (
        "an optimizer that was made before still holds parameters that are gone: "
        "blocks.0.0.bias, blocks.1.0.bias, last.bias",
        "folded in evaluation: in training it is another model now",
    )
    assert not nw.fold(model, x).changed
    assert record.undo() is model
    assert everything(model) == before


def test_the_stream_then_has_mean_zero_at_every_place() -> None:
    model, streams = lived(PreNorm(cls=True)).double(), []
    nw.fold(model, ids())
    for path in rms_in(model):
        model.get_submodule(path).register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    model(ids())
    assert len(streams) == 3
    for stream in streams:
        check_same(stream.mean(-1), torch.zeros(stream.shape[:-1]), DOUBLE)


def test_the_gain_and_eps_go_on() -> None:
    model = wired(lambda m, x: m.n(m.e(x)), e=embedding(), n=norm(eps=0.25))
    weight = model.n.weight
    folded(model, ids())
    assert type(model.n) is nn.RMSNorm
    assert model.n.weight is weight
    assert (model.n.eps, model.n.normalized_shape) == (0.25, (WIDTH,))


def test_a_norm_of_normwise_stays_one() -> None:
    model = wired(lambda m, x: m.n(m.e(x)), e=embedding(), n=nw.LayerNorm(WIDTH, bias=False))
    folded(model, ids())
    assert type(model.n) is nw.RMSNorm


def test_a_norm_without_a_gain() -> None:
    model = wired(lambda m, x: m.n(m.e(x)), e=embedding(), n=nn.LayerNorm(WIDTH, elementwise_affine=False))
    folded(model, ids())
    assert type(model.n) is nn.RMSNorm
    assert model.n.weight is None


# --------------------------------------------------------------------------------------------------- what can be added


def hot(m: Any, x: Tensor) -> Tensor:
    return F.one_hot(x, WIDTH).to(m.e.weight.dtype)


CENTRED: dict[str, tuple[Body, dict[str, nn.Module]]] = {
    "a difference": (lambda m, x: m.e(x) - m.f(x), {"f": embedding()}),
    "a weighted sum": (lambda m, x: torch.add(m.e(x), m.f(x), alpha=-3), {"f": embedding()}),
    "itself twice": (lambda m, x: (lambda y: y + y)(m.e(x)), {}),
    "in place": (lambda m, x: m.e(x).add_(m.c(hot(m, x))), {}),
    "moved": (lambda m, x: (m.e(x).mT.contiguous()[:, None] / 3).mT[:, 0].flatten(0, 1), {}),
    "scaled by a learned number": (lambda m, x: m.s[0] * m.e(x), {"s": nn.ParameterList([torch.randn(())])}),
    "dropped by example": (lambda m, x: m.e(x) * (x[:, :1, None] > 2), {}),
    "a broadcast parameter": (lambda m, x: m.e(x) + m.p[0] - m.p[1], {"p": nn.ParameterList([*torch.randn(2, WIDTH)])}),
    "a matrix of positions": (lambda m, x: m.e(x) + m.p[0], {"p": nn.ParameterList([torch.randn(5, WIDTH)])}),
    "a convolution": (lambda m, x: m.v(hot(m, x).mT).mT, {"v": nn.Conv1d(WIDTH, WIDTH, 3, padding=1)}),
    "Conv1D": (lambda m, x: m.h(hot(m, x)), {"h": hugging_face()}),
    "no bias": (lambda m, x: m.b(hot(m, x)) + m.e(x), {"b": linear(bias=False)}),
    "joined": (lambda m, x: torch.cat([m.e(x), m.f(x)], 1), {"f": embedding()}),
}  # fmt: skip


def stream_of(body: Body, layers: dict[str, nn.Module]) -> nn.Module:
    return wired(lambda m, x: m.n(body(m, x)), e=embedding(), c=linear(), n=norm(), **layers)


@pytest.mark.parametrize(("body", "layers"), CENTRED.values(), ids=CENTRED)
def test_what_can_be_centred(body: Body, layers: dict[str, nn.Module]) -> None:
    model, x = stream_of(body, layers), ids()
    record = folded(model, x)
    assert record.paths == ("n",)
    assert type(model.n) is nn.RMSNorm


def test_channels_first() -> None:
    body = lambda m, x: m.up(m.n(m.a(x) + m.b(x)))  # noqa: E731 - as in the tables
    layers = {"a": nn.Conv2d(3, 8, 3, padding=1), "b": nn.ConvTranspose2d(3, 8, 3, padding=1)}
    model = wired(body, **layers, n=nw.LayerNorm2d(8), up=nn.Conv2d(8, 4, 1))
    record = folded(model, torch.randn(2, 3, 6, 5))
    assert record.paths == ("n", "n")
    assert type(model.n) is nw.RMSNorm2d


# --------------------------------------------------------------------------------------------------------- what cannot

INPUT = "what it normalizes is, or has added to it, an input or a constant"
LEFT: dict[str, tuple[Body, str]] = {
    "one-hot words": (lambda m, x: m.n(hot(m, x) + m.e(x)), "_to_copy before it is more than a sum"),
    "a constant": (lambda m, x: m.n(m.e(x) + m.ones), INPUT),
    "read by another layer": (
        lambda m, x: (lambda y: m.n(y) + m.c(y))(m.e(x)), "what it normalizes is also read by c"
    ),
    "read by an operation": (
        lambda m, x: (lambda y: m.n(y) * y.sigmoid())(m.e(x)), "what it normalizes is also read by sigmoid"
    ),
    "returned": (lambda m, x: (lambda y: (m.n(y), y))(m.e(x)), "what it normalizes is also read by the model's output"),
    "after the norm": (
        lambda m, x: (lambda y: m.n(y) + y)(m.e(x)), "what it normalizes is also read by the model's output"
    ),
    "a number": (lambda m, x: m.n(m.e(x) + 1), "add before it is more than a sum"),
    "a number in place": (lambda m, x: m.n(m.e(x).add_(1)), "add_ before it is more than a sum"),
    "an activation": (lambda m, x: m.n(m.e(x).relu()), "relu before it is more than a sum"),
    "a gain": (lambda m, x: m.n(m.e(x) * m.c.bias), "mul before it is more than a sum"),
    "a gate": (lambda m, x: m.n(m.e(x) + m.g(m.c.bias)), "add before it is more than a sum"),
    "a product with itself": (lambda m, x: m.n((lambda y: y * y)(m.e(x))), "mul before it is more than a sum"),
    "one over it": (lambda m, x: m.n(torch.ones(1) / m.e(x)), "div before it is more than a sum"),
    "rounded": (lambda m, x: m.n(m.e(x).div(0.1, rounding_mode="floor")), "div before it is more than a sum"),
    "joined along the features": (
        lambda m, x: m.n(torch.cat([m.e(x)[..., :4], m.e(x)[..., 4:]], -1)), "cat before it is more than a sum"
    ),
    "flipped": (lambda m, x: m.n(m.e(x).flip(-1)), "flip before it is more than a sum"),
    "the same numbers along two dimensions": (lambda m, x: m.n(m.p + m.p.t()), ""),
    "another dimension": (lambda m, x: m.n((lambda y: y + y.mT)(m.e(x.repeat(1, 2)[:, :8]))), ""),
    "a tied head": (
        lambda m, x: F.linear(m.n(m.e(x)), m.e.weight), "a parameter of e is also read by {}"
    ),
    "a function": (lambda m, x: m.n(F.embedding(x, m.e.weight)), "embedding before it is more than a sum"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "why"), LEFT.values(), ids=LEFT)
def test_what_cannot_be_centred_is_left(body: Body, why: str) -> None:
    square = nn.Parameter(torch.randn(WIDTH, WIDTH))
    model = Wired(body, e=embedding(), c=linear(), g=linear(out=1), n=norm(), p=square).eval()
    model.register_buffer("ones", torch.ones(WIDTH))
    before = everything(model)
    record = nw.fold(model, ids(), steps="center")
    assert not record.changed
    start, _, end = why.partition("{}")
    (left,) = record.left
    assert left.path == "n"
    assert start in left.why
    assert left.why.endswith(end)
    assert everything(model) == before


def test_an_input_that_is_added() -> None:
    model = wired(lambda m, x: m.n(m.c(x) + x), c=linear(), n=norm())
    (line,) = nw.fold(model, torch.randn(4, WIDTH)).left
    assert line.why == f"it is read by the model's output; {INPUT}"


def test_a_norm_that_keeps_its_bias_stays_and_the_others_do_not() -> None:
    body = lambda m, x: (lambda y: m.c(m.n(y)) + m.last(y))(m.e(x))  # noqa: E731 - as in the tables
    model = wired(body, e=embedding(), c=linear(), n=norm(), last=nn.LayerNorm(WIDTH))
    record = folded(model, ids())
    assert rms_in(model) == ["n"]
    assert [(line.path, line.why) for line in record.left] == [
        ("last", "it is read by add; it keeps a bias, which an RMS norm has not")
    ]


def test_after_the_sum_is_no_stream() -> None:
    """Post-norm: what the norm gives is added to what reads it."""
    body = lambda m, x: (lambda y: m.n(y + m.c(y)))(m.first(m.e(x)))  # noqa: E731 - as in the tables
    model = wired(body, e=embedding(), c=linear(), first=norm(), n=norm())
    record = folded(model, ids())
    assert rms_in(model) == ["first"]
    assert [line.path for line in record.left] == ["n"]


def test_dropout_on_the_stream_in_training() -> None:
    model = lived(PreNorm(drop=0.5)).train()
    record = nw.fold(model, ids(), steps="center")
    assert not record.changed
    assert rms_in(model) == []


def test_hooks_see_what_they_saw() -> None:
    model = wired(lambda m, x: m.n(m.e(x)), e=embedding(), n=norm())
    model.e.register_forward_hook(lambda *_: None)
    (line,) = nw.fold(model, ids()).left
    assert line.why == "it is read by the model's output; e has hooks, which would see other values"
