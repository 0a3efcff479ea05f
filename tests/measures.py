"""Every measure, and a training in mid-epoch that none of them may leave a trace in."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from normwise.diagnose.activations import activations
from normwise.diagnose.gap import gap
from normwise.diagnose.lr_range import lr_range
from normwise.diagnose.nonfinite import first_nonfinite
from normwise.diagnose.results import Result
from normwise.diagnose.sharpness import sharpness
from normwise.diagnose.smoothness import smoothness
from normwise.diagnose.stable_lr import max_stable_lr
from tests.test_untouched import everything

Loss = Callable[[Any, Any], Tensor]


class Block(nn.Module):
    """A residual block of ResNet-18, with dropout."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.drop = nn.Dropout(0.1)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(torch.relu(self.norm1(self.first(x))))
        return torch.relu(self.norm2(self.second(y)) + self.short(x))


class ResNet(nn.Module):
    """Eight blocks as in ResNet-18, narrow, with everything that a measure could disturb.

    The last two blocks share a convolution's weight and a norm; the head has a spectral norm, whose vectors move in
    training; a buffer follows the features as a moving average; a Python number and random numbers take part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        sizes = [(4, 4, 1), (4, 4, 1), (4, 8, 2), (8, 8, 1), (8, 8, 1), (8, 8, 1), (8, 8, 1), (8, 8, 1)]
        self.blocks = nn.Sequential(*(Block(*size) for size in sizes))
        self.blocks[7].first.weight = self.blocks[6].first.weight
        self.blocks[7].norm1 = self.blocks[6].norm1
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4))
        self.register_buffer("average", torch.zeros(8))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        features = self.blocks(torch.relu(self.norm(self.stem(x)))).mean((2, 3))
        if self.training:
            with torch.no_grad():
                self.average.lerp_(features.mean(0), 0.1)
            features = features * (1 + 0.01 * random.random() + 0.01 * float(np.random.rand()))
        return self.head(features)


@dataclass
class Training:
    """A model in the middle of an epoch, with all that takes part."""

    model: nn.Module
    optimizer: Optimizer
    loader: DataLoader[tuple[Tensor, ...]]
    coming: Iterator[Any]

    def step(self) -> Tensor:
        """Train on the next batch; the loss before."""
        inputs, targets = next(self.coming)
        loss = cross_entropy(self.model(inputs), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state(self) -> dict[str, object]:
        """Everything that can be seen, as values that compare bit for bit, and which objects they are."""
        numpys = np.random.get_state()
        return {
            **everything(self.model),
            "attributes": self.model.calls,
            "hooks": [(path, *map(list, _hooks(module))) for path, module in self.model.named_modules()],
            "random": (torch.get_rng_state().tolist(), random.getstate(), numpys[1].tolist(), numpys[2]),
            "generator": self.loader.generator.get_state().tolist(),
            "optimizer": _plain(self.optimizer.state_dict()),
            "moments": [id(value) for known in self.optimizer.state.values() for value in known.values()],
        }

    def future(self) -> list[object]:
        """Steps of this epoch and of the next: the batches, the losses, and the weights that come of it."""
        seen: list[object] = []
        for _ in range(2):
            seen += [self.step().tolist() for _ in range(2)]
            self.coming = iter(self.loader) if len(seen) == 2 else self.coming
            seen.append([batch.tolist() for batch in next(self.coming)])
        return [*seen, [p.tolist() for p in self.model.parameters()]]


def training(workers: int = 0) -> Training:
    """Two steps of Adam into the first epoch; the last batch left gradients, and the first two blocks are frozen."""
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    model = ResNet()
    for parameter in model.blocks[:2].parameters():
        parameter.requires_grad_(False)
    model.blocks[0].eval()
    model.register_forward_hook(lambda module, inputs, output: 1.01 * output)
    model.norm.register_full_backward_hook(lambda module, into, out: None)
    model.blocks[3].drop.register_forward_pre_hook(lambda module, inputs: None)
    optimizer = Adam([{"params": model.blocks.parameters(), "lr": 1e-3}, {"params": model.head.parameters()}], lr=1e-2)
    data = TensorDataset(torch.randn(40, 3, 8, 8), torch.randint(4, (40,)))
    order = torch.Generator().manual_seed(5)
    loader = DataLoader(data, 8, shuffle=True, generator=order, num_workers=workers, persistent_workers=workers > 0)
    started = Training(model, optimizer, loader, iter(loader))
    started.step(), started.step()
    return started


def _stable(at: Training, loss: Loss) -> Result:
    return max_stable_lr(at.model, at.loader, loss, steps=2, seeds=1, rates=(0.5, 0.5))


def _range(at: Training, loss: Loss) -> Result:
    return lr_range(at.model, at.loader, loss, steps=20, optimizer=at.optimizer, low=1e-4)


def _four_times(measure: Callable[..., Result], at: Training, loss: Loss) -> Result:
    """A measure that asks for the loss once a batch, often enough to be interrupted late."""
    return [measure(at.model, at.loader, loss) for _ in range(4)][-1]


# Each measures a training with a loss. A new measure is one line here, and has its conformance tests for free.
MEASURES: Mapping[str, Callable[[Training, Loss], Result]] = {
    "sharpness": lambda at, loss: sharpness(at.model, at.loader, loss, most=3, modules=["head*"]),
    "sharpness in evaluation": lambda at, loss: sharpness(at.model, at.loader, loss, mode="eval", most=3),
    "sharpness by differences": lambda at, loss: sharpness(at.model, at.loader, loss, method="differences", most=3),
    "smoothness": lambda at, loss: smoothness(at.model, at.loader, loss, steps=3, optimizer=at.optimizer),
    "smoothness with SGD": lambda at, loss: smoothness(at.model, at.loader, loss, steps=3, every=2),
    "max_stable_lr": _stable,
    "lr_range": _range,
    "lr_range with SGD": lambda at, loss: lr_range(at.model, at.loader, loss, steps=20),
    "activations": lambda at, loss: _four_times(activations, at, loss),
    "gap": lambda at, loss: gap(at.model, at.loader, loss),
    "first_nonfinite": lambda at, loss: _four_times(first_nonfinite, at, loss),
}


def raising(error: type[BaseException], at: int) -> Loss:
    """A loss that raises when it is called for the nth time."""
    calls = iter(range(1, at))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise error
        return cross_entropy(output, target)

    return loss


def _hooks(module: nn.Module) -> list[Mapping[int, object]]:
    return [value for name, value in sorted(module.__dict__.items()) if "hook" in name and isinstance(value, dict)]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
