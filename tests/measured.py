"""A residual network in the middle of training, and all about it that a measure could leave behind."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from tests.recalibrated import state


class Block(nn.Module):
    """A residual block, whose one ReLU is called twice and works in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))) + x)


class ResNet(nn.Module):
    """Convolutions, batch norms, dropout, a spectral norm, whose buffers move, hooks, gradients, a frozen parameter."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm, self.block = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), Block(width)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(width, 4))
        self.seen: list[int] = []
        self.norm.register_forward_hook(lambda module, args, output: self.seen.append(len(output)))
        self.stem.bias.requires_grad_(False)
        self(torch.randn(6, 3, 8, 8)).square().mean().backward()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.norm(self.stem(x))))
        return self.head(self.dropout(x.mean((2, 3))))


def labelled(rows: tuple[int, ...] = (6, 4)) -> list[tuple[Tensor, Tensor]]:
    """Batches of images and labels."""
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 4) for n in rows]


def everything_of(model: nn.Module) -> tuple[object, ...]:
    """Tensors by value and identity, gradients, modes, hooks, attributes, and the generators of random numbers."""
    attributes = [list(getattr(module, "seen", ())) for module in model.modules()]
    learns = [(name, p.requires_grad, id(p.grad), p._backward_hooks) for name, p in model.named_parameters()]
    return state(model), attributes, learns, torch.get_rng_state().tolist(), random.getstate()
