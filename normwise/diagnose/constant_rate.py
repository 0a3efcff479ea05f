"""One training at a constant learning rate, from the start, and what came of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from normwise.batches import Forward, Loss, loss_of
from normwise.diagnose.objective import Objective, measuring
from normwise.diagnose.rate_grid import Outcome, Trial
from normwise.diagnose.stepping import descend, finite, stepper
from normwise.errors import DiagnosisError, NonFiniteError
from normwise.untouched import seed as seed_all

MakeModel = Callable[[], nn.Module]
MakeOptimizer = Callable[[list[nn.Parameter], float], Optimizer]


@dataclass(frozen=True)
class Task:
    """All that a trial needs besides its rate and seed."""

    model: nn.Module | MakeModel
    batches: list[Any]
    validation: list[Any]
    loss: Loss | None
    forward: Forward | None
    optimizer: MakeOptimizer
    steps: int


def trial(task: Task, lr: float, seed: int, first: float, trains: float) -> Trial:
    """Train anew at a constant rate, and see what came of it; `trains` is the loss below which it does."""
    losses: list[float] = []
    value = math.nan
    with _anew(task, seed) as model, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the batch's statistics are not finite")  # here that is a result
        if _descend(task, model, lr, seed, losses):
            model.eval()
            value = Objective(model, task.validation, task.loss, task.forward).value()
    tail = fmean(losses[-max(1, task.steps // 10) :]) if math.isfinite(value) else math.nan
    if not math.isfinite(tail):
        return Trial(lr, seed, "diverged", first, None, None, len(losses))
    outcome: Outcome = "trains" if max(tail, value) < trains else "stuck"
    return Trial(lr, seed, outcome, first, tail, value, len(losses))


def _descend(task: Task, model: nn.Module, lr: float, seed: int, losses: list[float]) -> bool:
    """Take the steps and note the losses; whether every parameter stayed finite."""
    optimizer = stepper(lambda parameters: task.optimizer(parameters, lr), model, lr)
    for batch in islice(_ordered(task.batches, seed), task.steps):
        try:
            losses.append(descend(model, batch, task.loss, task.forward, optimizer))
        except NonFiniteError:  # of a memory that is declared to raise
            return False
        if not finite(model):
            return False
    return True


def first_loss(task: Task, seed: int) -> float:
    """The loss before the first step, which is the same at every rate."""
    with _anew(task, seed) as model, torch.no_grad():
        loss = loss_of(model, next(_ordered(task.batches, seed)), task.loss, task.forward).item()
    if not math.isfinite(loss):
        raise DiagnosisError(f"the loss is {loss} before the first step: nw.first_nonfinite tells where it begins")
    return loss


def _ordered(batches: list[Any], seed: int) -> Iterator[Any]:
    """Endless batches, every time through in another order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (batches[at] for at in torch.randperm(len(batches), generator=generator))


@contextmanager
def _anew(task: Task, seed: int) -> Iterator[nn.Module]:
    """The model at the start of a trial, in training mode; afterwards it is there again."""
    if isinstance(task.model, nn.Module):
        with measuring(task.model, "train"):
            seed_all(seed)
            yield task.model
    else:
        seed_all(seed)
        model = task.model()
        if not isinstance(model, nn.Module):
            raise DiagnosisError(f"model made a {type(model).__name__}, not a torch.nn.Module")
        with measuring(model, "train"):
            yield model
