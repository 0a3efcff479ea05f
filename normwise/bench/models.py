"""Whole models, small and in plain torch: where a normalization's speed is felt, among everything else."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.bench.cases import ModelCase
from normwise.bench.operations import OURS, TORCH, Prepared
from normwise.bench.timing import Call
from normwise.errors import SurgeryError
from normwise.surgery.adopt import adopt

_RATE = 1e-3
_CLASSES = 10
_OUTPUT = 1e-3  # of the largest: float32 through some twenty layers, against float64
_GRADIENT = 0.05  # of the length of all: a ReLU at zero turns over by one rounding, and 0.02 was measured


class Residual(nn.Module):
    """x + f(x), or shortcut(x) + f(x), and perhaps an activation behind it."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut, self.after = body, shortcut or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        output: Tensor = self.after(self.shortcut(x) + self.body(x))
        return output


class Permute(nn.Module):
    """Axes in another order."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """A view."""
        return x.permute(self.axes)


class Attention(nn.Module):
    """Causal self-attention with several heads; without rotary positions, which no normalization meets."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inner, self.outer = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, d) to (n, t, d)."""
        parts = self.inner(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        output: Tensor = self.outer(mixed.transpose(1, 2).flatten(2))
        return output


class Gated(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, d) to (n, t, d)."""
        output: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return output


def resnet() -> nn.Module:
    """ResNet-18: four stages of two basic blocks, batch norm behind every convolution."""

    def conv(inner: int, outer: int, stride: int = 1, size: int = 3) -> list[nn.Module]:
        return [nn.Conv2d(inner, outer, size, stride, size // 2, bias=False), nn.BatchNorm2d(outer)]

    def block(inner: int, outer: int, stride: int) -> nn.Module:
        body = nn.Sequential(*conv(inner, outer, stride), nn.ReLU(inplace=True), *conv(outer, outer))
        shortcut = nn.Sequential(*conv(inner, outer, stride, 1)) if stride > 1 else None
        return Residual(body, shortcut, nn.ReLU(inplace=True))

    widths = (64, 64, 128, 256, 512)
    blocks = [
        block(inner if first else outer, outer, (1 if outer == inner else 2) if first else 1)
        for inner, outer in pairwise(widths)
        for first in (True, False)
    ]
    stem = [*conv(3, 64, 2, 7), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, _CLASSES))


def convnext() -> nn.Module:
    """ConvNeXt with half of Atto's depth: depthwise convolutions and layer norm over channels."""

    def over_channels(width: int) -> list[nn.Module]:
        return [Permute(0, 2, 3, 1), nn.LayerNorm(width, 1e-6), Permute(0, 3, 1, 2)]

    def block(width: int) -> nn.Module:
        depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        inner = [nn.LayerNorm(width, 1e-6), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        return Residual(nn.Sequential(depthwise, Permute(0, 2, 3, 1), *inner, Permute(0, 3, 1, 2)))

    parts: list[nn.Module] = [nn.Conv2d(3, 40, 4, 4), *over_channels(40)]
    widths, depths = (40, 80, 160, 320), (1, 1, 3, 1)
    for at, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if at:
            parts += [*over_channels(widths[at - 1]), nn.Conv2d(widths[at - 1], width, 2, 2)]
        parts += [block(width) for _ in range(depth)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(320, 1e-6), nn.Linear(320, _CLASSES)]
    return nn.Sequential(*parts, *head)


def llama(width: int = 256, depth: int = 4, tokens: int = 512) -> nn.Module:
    """Llama's blocks: RMS norm before causal attention and before SwiGLU."""
    block = [
        part
        for _ in range(depth)
        for part in (
            Residual(nn.Sequential(nn.RMSNorm(width, 1e-6), Attention(width, 8))),
            Residual(nn.Sequential(nn.RMSNorm(width, 1e-6), Gated(width, 11 * width // 4))),
        )
    ]
    return nn.Sequential(
        nn.Embedding(tokens, width), *block, nn.RMSNorm(width, 1e-6), nn.Linear(width, tokens, bias=False)
    )


def _images() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 3, 64, 64), torch.randint(_CLASSES, (16,))


def _tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(512, (4, 256)), torch.randint(512, (4 * 256,))


class Model(NamedTuple):
    """How a model and its batch are made."""

    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


MODELS = {"resnet": Model(resnet, _images), "convnext": Model(convnext, _images), "llama": Model(llama, _tokens)}


def prepare(case: ModelCase) -> Prepared:
    """A step with torch's layers, and the same with normwise's in their places."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        parts = MODELS[case.model]
        model, (inputs, targets) = parts.make().train(case.mode == "training"), parts.batch()
    try:
        adopted = adopt(model, copy=True).model
    except SurgeryError as error:
        return Prepared({}, {OURS: str(error)}, {}, TORCH)
    true = _found(copy.deepcopy(model).double(), inputs, targets)
    reason = fault(_found(copy.deepcopy(adopted), inputs, targets), true)
    if reason is not None:
        return Prepared({}, {OURS: reason}, {}, TORCH)
    contenders = {OURS: adopted, TORCH: model}
    return Prepared({name: _step(own, inputs, targets, case) for name, own in contenders.items()}, {}, {}, TORCH)


def fault(found: Sequence[Tensor], true: Sequence[Tensor]) -> str | None:
    """What is wrong with an output and the gradients behind it, and by how much; None: nothing."""
    output = float((found[0].double() - true[0]).abs().max() / true[0].abs().max())
    if not output <= _OUTPUT:
        return f"the output is off by {output:.2g} of its largest value"
    error = sum(float((a.double() - b).square().sum()) for a, b in zip(found[1:], true[1:], strict=True))
    gradient = math.sqrt(error / sum(float(b.square().sum()) for b in true[1:]))
    return None if gradient <= _GRADIENT else f"the gradient is off by {gradient:.2g} of its length"


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The output, (examples, classes), and the loss."""
    dtype = next(model.parameters()).dtype
    output = model(inputs.to(dtype) if inputs.is_floating_point() else inputs).flatten(0, -2)
    return output, F.cross_entropy(output, targets)


def _found(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    with torch.enable_grad():
        output, loss = _loss(model, inputs, targets)
        return [output.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def _step(model: nn.Module, inputs: Tensor, targets: Tensor, case: ModelCase) -> Call:
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE)

    def train() -> None:
        optimizer.zero_grad()
        _loss(model, inputs, targets)[1].backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        optimizer.step()

    return train if case.mode == "training" else lambda: model(inputs)
