"""Layers whose calls take the short way, that way and the long one, and what a call leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import Affine, Frozen, Moving, Norm
from normwise.kernels import short_cpu
from normwise.kernels.backends import extension, requested

needs_kernels = pytest.mark.skipif(extension is None or requested() == "reference", reason="there are no kernels")
Call = Callable[[Tensor], Tensor]

MEMORY_LAYERS: dict[str, tuple[Callable[[], Norm], tuple[int, ...]]] = {
    "BatchNorm": (lambda: nw.BatchNorm(6), (8, 6)),
    "BatchNorm of images": (lambda: nw.BatchNorm(6), (4, 6, 3, 5)),
    "BatchNorm, average": (lambda: nw.BatchNorm(6, momentum=None), (8, 6)),
    "BatchNorm, relu": (lambda: nw.BatchNorm(6, activation="relu"), (4, 6, 3, 5)),
    "BatchNorm, plain": (lambda: nw.BatchNorm(6, affine=False), (8, 6)),
    "biased": (lambda: Norm("[n] c [...]", memory=Moving("c", decay=0.9, unbiased=False), c=6), (8, 6)),
    "time steps": (lambda: Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9)), (8, 3, 6)),
    "rms": (lambda: Norm("[n] c", nw.RMS(), Affine("c"), Moving("c", decay=0.9)), (8, 6)),
}
LAYERS: dict[str, tuple[Callable[[], Norm], tuple[int, ...]]] = {
    "LayerNorm": (lambda: nw.LayerNorm(16), (8, 16)),
    "LayerNorm, no bias": (lambda: nw.LayerNorm(16, bias=False), (8, 16)),
    "RMSNorm": (lambda: nw.RMSNorm(16), (8, 16)),
    "offset": (lambda: Norm("... [d]", nw.RMS(), nw.OffsetScale("d"), d=16), (8, 16)),
    "GroupNorm": (lambda: nw.GroupNorm(2, 6), (4, 6, 3, 5)),
    "LayerNorm2d, gelu": (lambda: nw.LayerNorm2d(6, activation="gelu"), (4, 6, 3, 5)),
    "InstanceNorm": (lambda: nw.InstanceNorm(6), (4, 6, 3, 5)),
    "Frozen": (lambda: Norm("[n] c", recovery=Affine("c"), memory=Frozen("c"), c=6), (8, 6)),
    **MEMORY_LAYERS,
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@contextmanager
def the_long_way() -> Iterator[None]:
    """Within this context no call takes the short way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Norm, "_known", lambda self, x: None)
        yield


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many calls take the short way, in the only element."""
    count, forward = [0], extension.forward

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(extension, name)

        def forward(self, *args: object) -> None:
            count[0] += 1
            forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(short_cpu, "extension", Counting())
        yield count


def made(name: str) -> tuple[Norm, Tensor]:
    """A layer whose parameters and memory are none of the usual ones, and an input."""
    make, shape = LAYERS[name]
    layer = make()
    layer(torch.randn(shape) * 3 - 1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    return layer, torch.randn(shape) * 2 + 1


@dataclass
class Outcome:
    """What a call leaves behind."""

    output: Tensor
    gradients: list[Tensor | None]
    state: dict[str, list[int]]


def bytes_of(layer: Norm) -> dict[str, list[int]]:
    """The state, bit for bit, in any dtype."""
    state = layer.state_dict().items()
    return {name: value.resolve_neg().contiguous().view(-1).view(torch.uint8).tolist() for name, value in state}


def outcome(layer: Norm, x: Tensor, call: Call | None = None) -> Outcome:
    leaf = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = (call or layer)(leaf)
    torch.manual_seed(3)
    if y.requires_grad:
        y.backward(torch.randn_like(y))
    grads = [leaf.grad, *(parameter.grad for parameter in layer.parameters())]
    return Outcome(y.detach(), grads, bytes_of(layer))


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert torch.equal(found.output, expected.output)
    assert found.output.stride() == expected.output.stride()
    for a, b in zip(found.gradients, expected.gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and a.dtype == b.dtype)
    assert found.state == expected.state
