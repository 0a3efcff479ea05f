"""Smoothness along the gradient: how far a step's first-order picture of the loss can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.batches import Forward, Loss
from normwise.diagnose.objective import Batches, Mode, Objective, measuring, read, weight_norm
from normwise.diagnose.results import Result, number
from normwise.diagnose.stepping import MakeOptimizer, descend, stepper
from normwise.errors import DiagnosisError

MULTIPLES = (0.5, 1.0, 2.0, 4.0)  # of the learning rate
DISTANCES = (0.05, 0.1, 0.2, 0.4)
_LR = 0.1


@dataclass(frozen=True)
class Along:
    """The loss on a grid of points along the negative gradient; g is the gradient before the step, g_s after.

    What is not finite, here or at a point, counts as infinite, and as a cosine of -1: so medians over a training that
    breaks can be taken.

    Attributes:
        losses: The loss at each point, the starting point first.
        predictiveness: The largest ‖g_s − g‖ (gradient predictiveness; small is smooth).
        beta: The largest ‖g_s − g‖ / ‖s g‖: effective beta-smoothness.
        relative: The largest ‖g_s − g‖ / ‖g‖.
        cosine: The smallest cosine between g_s and g.
    """

    losses: tuple[float, ...]
    predictiveness: float
    beta: float
    relative: float
    cosine: float

    @property
    def loss_range(self) -> float:
        """The largest loss minus the smallest."""
        highest = max(self.losses)
        return highest - min(self.losses) if math.isfinite(highest) else math.inf


@dataclass(frozen=True)
class Step:
    """One training step, looked at before it was taken.

    Attributes:
        step: 0 for the first.
        loss: The loss before it.
        gradient_norm: ‖g‖.
        weight_norm: ‖W‖, the L2 norm of all weights.
        by_step: At w − s g, for the step sizes s.
        by_distance: At w − d g/‖g‖, for the distances d.
    """

    step: int
    loss: float
    gradient_norm: float
    weight_norm: float
    by_step: Along
    by_distance: Along


@dataclass(frozen=True, repr=False)
class Smoothness(Result):
    """The smoothness of the loss along the gradient over some training steps; see `smoothness`.

    Attributes:
        mode: "train", "eval" or "current".
        lr: The learning rate that the step sizes are multiples of.
        sizes: The step sizes of `by_step`.
        distances: The distances of `by_distance`.
        steps: What was measured at each step.
    """

    mode: Mode
    lr: float
    sizes: tuple[float, ...]
    distances: tuple[float, ...]
    steps: tuple[Step, ...]

    @property
    def loss_range(self) -> float:
        """The median over the steps of the loss's range along the gradient, by step size."""
        return median(step.by_step.loss_range for step in self.steps)

    @property
    def predictiveness(self) -> float:
        """The median over the steps of max ‖g_s − g‖, by step size."""
        return median(step.by_step.predictiveness for step in self.steps)

    @property
    def beta(self) -> float:
        """The median over the steps of max ‖g_s − g‖ / ‖s g‖, by step size."""
        return median(step.by_step.beta for step in self.steps)

    @property
    def weight_norm(self) -> float:
        """The median of ‖W‖ over the steps."""
        return median(step.weight_norm for step in self.steps)

    @property
    def meaning(self) -> str:
        """What was found, in one line."""
        low, high = (number(end) for end in (self.sizes[0], self.sizes[-1]))
        text = (
            f"along the gradient, steps of {low} to {high}, median of {len(self.steps)}: loss range "
            f"{number(self.loss_range)}, ‖Δg‖ {number(self.predictiveness)}, effective beta {number(self.beta)}, "
            f"‖W‖ {number(self.weight_norm)} in {self.mode} mode"
        )
        return text if math.isfinite(self.loss_range) else f"{text}; nw.first_nonfinite tells where it begins"

    def rows(self) -> list[dict[str, Any]]:
        """One row a training step; `_d` marks what was measured by distance."""
        return [
            {
                "step": step.step,
                "loss": step.loss,
                "gradient_norm": step.gradient_norm,
                "weight_norm": step.weight_norm,
                **_columns(step.by_step, ""),
                **_columns(step.by_distance, "_d"),
            }
            for step in self.steps
        ]

    def headline(self) -> dict[str, float | None]:
        """The loss before the first step, and the medians."""
        return {
            "loss": self.steps[0].loss,
            "loss_range": self.loss_range,
            "predictiveness": self.predictiveness,
            "beta": self.beta,
            "weight_norm": self.weight_norm,
        }

    def traces(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The band of the loss along the gradient, step by step."""
        steps = [step.step for step in self.steps]
        low = [min(step.by_step.losses) for step in self.steps]
        high = [max(step.by_step.losses) for step in self.steps]
        band: dict[str, Any] = {"type": "scatter", "mode": "lines", "x": steps, "line": {"width": 0.5}}
        lines = [
            {**band, "name": "lowest", "y": low},
            {**band, "name": "highest", "y": high, "fill": "tonexty"},
            {**band, "name": "loss", "y": [step.loss for step in self.steps], "line": {"width": 2}},
        ]
        return lines, {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "loss along the gradient"}}}


def smoothness(
    model: nn.Module,
    batches: Batches,
    loss: Loss | None = None,
    *,
    lr: float | None = None,
    steps: int | None = None,
    every: int = 1,
    optimizer: Optimizer | MakeOptimizer | None = None,
    multiples: Sequence[float] = MULTIPLES,
    distances: Sequence[float] = DISTANCES,
    mode: Mode = "train",
    forward: Forward | None = None,
) -> Smoothness:
    """Measure how the loss changes along the gradient at training steps; the model is left as it was, bit for bit.

    As Santurkar et al. 2018 (arXiv:1805.11604): at each step with weights w and gradient g, the loss and its gradient
    are computed again at w − s g, for step sizes s around the learning rate, and at w − d g/‖g‖ for fixed distances d,
    because what is measured by step size grows with ‖g‖. Batch, mode, memory and random numbers stay the same. Then the
    optimizer takes its step, and the next batch comes.

    What a normalization does to these numbers depends on its place, the start, and ‖W‖: behind it g goes as 1/‖W‖ and
    the curvature as 1/‖W‖².

    Args:
        model: A model, in any mode.
        batches: A batch, a list of batches or a loader; the first `steps` of them are read once and used in turn.
        loss: `loss(output, target)`, with the second element of a tuple or list as the target. None: the model's own.
        lr: What the multiples multiply, and the learning rate of the steps that SGD takes. None: that of the
            optimizer's first group, and 0.1 without an optimizer.
        steps: How many training steps; by default one a batch.
        every: Measure at each such step.
        optimizer: Takes the steps, at its own rates: one over the model's parameters, which is put back afterwards, or
            a function that makes one of parameters, as `lambda p: torch.optim.AdamW(p, 1e-3)`. None: SGD with `lr`.
        multiples: The step sizes, as multiples of `lr`.
        distances: The distances, in the space of the parameters.
        mode: "train", "eval", or "current": every module in the mode that it is in.
        forward: `forward(model, batch)`, for models that are called otherwise.

    Returns:
        A record with every step and the medians over them.

    Raises:
        DiagnosisError: there is no batch or no gradient; a number that is not positive.

    >>> model, x = nn.Linear(1, 1, bias=False), torch.ones(4, 1)
    >>> found = smoothness(model, (x, 0 * x), nn.functional.mse_loss, lr=0.1, steps=3)
    >>> round(found.beta, 4), len(found.steps)  # the second derivative of w² is 2
    (2.0, 3)
    """
    given_lr, given_steps = () if lr is None else (lr,), () if steps is None else (steps,)
    _check(lr=given_lr, every=(every,), steps=given_steps, multiples=multiples, distances=distances)
    live = optimizer if isinstance(optimizer, Optimizer) else None
    far = tuple(sorted(distances))
    with measuring(model, mode, optimizer=live, batches=batches):
        given, found = read(batches, steps), []
        taking = stepper(optimizer, model, _LR if lr is None else lr)
        lr = float(taking.param_groups[0]["lr"]) if lr is None else lr
        sizes = tuple(sorted(lr * m for m in multiples))
        for step, batch in enumerate(islice(cycle(given), steps or len(given))):
            if step % every == 0:
                found.append(_measured(step, Objective(model, [batch], loss, forward), model, sizes, far))
            descend(model, batch, loss, forward, taking)
    return Smoothness(mode, lr, sizes, far, tuple(found))


def _check(**values: Sequence[float]) -> None:
    for name, numbers in values.items():
        for value in numbers:
            if not isinstance(value, (int, float)) or not value > 0:
                raise DiagnosisError(f"{name}: {value} is not a positive number")
    for name in ("multiples", "distances"):
        if not values[name]:
            raise DiagnosisError(f"{name} is empty: give one number or more")


def _measured(
    step: int, objective: Objective, model: nn.Module, sizes: tuple[float, ...], far: tuple[float, ...]
) -> Step:
    loss, gradient = objective.value_and_gradient()
    length = float(gradient.double().norm())
    unit = gradient / length if length else gradient
    return Step(
        step=step,
        loss=loss,
        gradient_norm=_or(length, math.inf),
        weight_norm=_or(weight_norm(model.parameters()), math.inf),
        by_step=_along(objective, loss, gradient, gradient, sizes),
        by_distance=_along(objective, loss, gradient, unit, far),
    )


def _along(objective: Objective, loss: float, gradient: Tensor, direction: Tensor, sizes: Sequence[float]) -> Along:
    """The grid of points at minus `sizes` times the direction."""
    losses, changes, cosines, betas = [_or(loss, math.inf)], [], [], []
    length, unit = gradient.norm().item(), float(direction.norm())
    for size in sizes:
        with objective.moved(-size * direction):
            there, moved = objective.value_and_gradient()
        change = _or((moved - gradient).norm().item(), math.inf)
        losses.append(_or(there, math.inf))
        changes.append(change)
        betas.append(_or(change / (size * unit), math.inf) if unit else 0.0)
        cosines.append(_or(torch.cosine_similarity(moved, gradient, dim=0).item(), -1.0))
    relative = _or(max(changes) / length, math.inf) if length else 0.0
    return Along(tuple(losses), max(changes), max(betas), relative, min(cosines))


def _or(value: float, worst: float) -> float:
    return value if math.isfinite(value) else worst


def _columns(along: Along, suffix: str) -> dict[str, float]:
    values = {
        "loss_low": min(along.losses),
        "loss_high": max(along.losses),
        "predictiveness": along.predictiveness,
        "beta": along.beta,
        "relative": along.relative,
        "cosine": along.cosine,
    }
    return {f"{name}{suffix}": value for name, value in values.items()}
