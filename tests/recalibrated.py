"""Nets, batches and looks that the tests of recalibration share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normwise import Average, BatchNorm, Moving, Norm, Renorm
from tests.tolerances import MEMORY, Tolerance, check

SIZES = [3, 5, 8]


def data(*shape: int) -> Tensor:
    """Rows whose batches of 3, 5 and 8 differ, so that a mean of batches is not the mean of rows."""
    x = torch.randn(shape) * 2 + 1
    x[:3] += 3
    x[8:] *= 3
    return x


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that recalibration could have left behind."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers, "_skips": module.__dict__.get("_skips")}
        found[path] = (
            type(module).__name__,
            module.training,
            {n: (id(t), tuple(t.shape), t.detach().numpy().tobytes()) for n, t in tensors.items() if t is not None},
            {
                n: None if p.grad is None else p.grad.numpy().tobytes()
                for n, p in module._parameters.items()
                if p is not None
            },
            [len(hooks) for name, hooks in module.__dict__.items() if "_hooks" in name and isinstance(hooks, dict)],
            [getattr(module, name, None) for name in ("spec", "_fed", "_window", "frozen", "domains")],
            sorted(module._non_persistent_buffers_set),
        )
    return found


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


def memory(layer: nn.Module) -> list[Tensor]:
    return [layer.running_mean.clone(), layer.running_var.clone()]


def check_memory(layer: nn.Module, x: Tensor, tolerance: Tolerance = MEMORY, *, unbiased: bool = True) -> None:
    """The memory is that of the rows of x, in float64."""
    rows = x.double()
    check(layer.running_mean.double(), rows.mean(0), tolerance)
    check(layer.running_var.double(), rows.var(0, unbiased=unbiased), tolerance)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.BatchNorm1d(4),
    "torch, cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "torch, momentum 0": lambda: nn.BatchNorm1d(4, momentum=0.0),
    "ours": lambda: BatchNorm(4),
    "moving": lambda: Norm("[n] c", memory=Moving("c", decay=0.99), c=4),
    "average": lambda: Norm("[n] c", memory=Average("c"), c=4),
    "falls back": lambda: Norm("[n] c", memory=Moving("c", decay=0.9, degenerate="memory"), c=4),
    "ghost": lambda: Norm("[n] c", memory=Moving("c", decay=0.9, ghost=2), c=4),
    "renorm": lambda: Norm("[n] c", memory=Moving("c", decay=0.9, renorm=Renorm(warmup=0)), c=4),
}

every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)

both_ways = pytest.mark.parametrize("layerwise", [False, True], ids=["one pass", "layerwise"])


def deep(ours: bool = False) -> nn.Sequential:
    """Three norms on top of each other, with dropout between."""
    norm = BatchNorm if ours else nn.BatchNorm1d
    parts: list[nn.Module] = []
    for _ in range(3):
        parts += [nn.Linear(4, 4), norm(4), nn.ReLU(), nn.Dropout(0.5)]
    model = nn.Sequential(*parts, nn.Linear(4, 2))
    for layer in model:
        if hasattr(layer, "running_mean"):
            nn.init.normal_(layer.weight), nn.init.normal_(layer.bias), nn.init.normal_(layer.running_mean)
    return model


def truth(
    model: nn.Sequential, batches: list[Tensor], *, layerwise: bool
) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """Each norm with the mean and unbiased variance of all that it sees, computed in float64 without normwise."""
    hidden = [batch.double() for batch in batches]
    for layer in model:
        if isinstance(layer, nn.Linear):
            hidden = [h @ layer.weight.double().T + layer.bias.double() for h in hidden]
        elif isinstance(layer, nn.ReLU):
            hidden = [h.clamp_min(0) for h in hidden]
        elif not isinstance(layer, nn.Dropout):
            rows = torch.cat(hidden)
            yield layer, rows.mean(0), rows.var(0)
            own = [(rows.mean(0), rows.var(0)) if layerwise else (h.mean(0), h.var(0, unbiased=False)) for h in hidden]
            scaled = [(h - mean) / (var + layer.eps).sqrt() for h, (mean, var) in zip(hidden, own, strict=True)]
            hidden = [h * layer.weight.double() + layer.bias.double() for h in scaled]
