"""Training steps within a measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from normwise.batches import Forward, Loss, loss_of
from normwise.errors import DiagnosisError

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


def stepper(optimizer: Optimizer | MakeOptimizer | None, model: nn.Module, lr: float) -> Optimizer:
    """What takes the steps: the optimizer itself, one that is made of the trained parameters, or SGD with a rate.

    Raises:
        DiagnosisError: nothing is trained; what was made is no optimizer.
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise DiagnosisError("no parameter requires a gradient, so there is nothing to train")
    made = SGD(trained, lr) if optimizer is None else optimizer(trained)
    if not isinstance(made, Optimizer):
        raise DiagnosisError(f"optimizer made a {type(made).__name__}, not a torch.optim.Optimizer")
    return made


def descend(model: nn.Module, batch: Any, loss: Loss | None, forward: Forward | None, optimizer: Optimizer) -> float:
    """Take one training step; the loss before it."""
    optimizer.zero_grad()
    torch.clear_autocast_cache()  # casts of the weights before the last step, where an autocast is around it
    value = loss_of(model, batch, loss, forward)
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return value.item()


def finite(model: nn.Module) -> bool:
    """Whether every parameter is finite. If one is not, no later step can mend it."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())
