"""Measuring while a model trains, in any training loop, without a trace in the training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from normwise.batches import Forward, Loss
from normwise.diagnose.activations import activations
from normwise.diagnose.gap import gap
from normwise.diagnose.results import Result, number, reason_of
from normwise.diagnose.sharpness import sharpness
from normwise.diagnose.smoothness import smoothness
from normwise.diagnose.thresholds import stability_threshold
from normwise.errors import DiagnosisError

_PRODUCTS = 30  # with the Hessian, at most: a training is not to wait for the last digit


@dataclass(frozen=True)
class Snapshot:
    """What was measured before one training step.

    Attributes:
        step: How many steps the monitor had seen before it.
        lr: The learning rate of the step, None where it is unknown.
        threshold: The curvature that the optimizer's step is stable for; None where that is unknown.
        results: Each measurement by its name.
        failed: Why a measurement could not be made, by its name.
    """

    step: int
    lr: float | None
    threshold: float | None
    results: Mapping[str, Result]
    failed: Mapping[str, str]

    def row(self) -> dict[str, Any]:
        """The headline numbers as one row."""
        row: dict[str, Any] = {"step": self.step, "lr": self.lr, "threshold": self.threshold}
        for result in self.results.values():
            row |= result.headline()
        return row


@dataclass(frozen=True, repr=False)
class History(Result):
    """The snapshots of a training, in order."""

    snapshots: tuple[Snapshot, ...]

    @property
    def meaning(self) -> str:
        """What was found, in one line."""
        if not self.snapshots:
            return "nothing was measured yet"
        last = self.snapshots[-1]
        numbers = ", ".join(f"{name} {number(value)}" for name, value in last.row().items() if name != "step")
        return f"{len(self.snapshots)} snapshots; before step {last.step}: {numbers}"

    def rows(self) -> list[dict[str, Any]]:
        """One row a snapshot."""
        return [snapshot.row() for snapshot in self.snapshots]

    def traces(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Every headline number over the steps; those of the legend can be switched off."""
        rows = self.rows()
        names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "lr"))
        steps = [row["step"] for row in rows]
        lines = [{"type": "scatter", "name": name, "x": steps, "y": [row.get(name) for row in rows]} for name in names]
        return lines, {"xaxis": {"title": {"text": "step"}}, "yaxis": {"type": "log"}}


class Monitor:
    """Measures a model every so many training steps; the training goes on as if it had not been there.

    Call `step(batch)` once a training step, before the optimizer's: weights, gradients, memories, random numbers and
    the optimizer are afterwards what they were, bit for bit. A measurement that cannot be made is told in a warning,
    once, and never stops the training.

    Args:
        model: The model that is trained.
        loss: `loss(output, target)`. None: the model's own, its output or the `loss` in it.
        optimizer: The one that trains it; its learning rate and momentum give the curvature that its steps bear.
        every: Measure at the first step and at each `every`-th after it.
        measures: Some of "smoothness", "sharpness", "activations", "gap".
        forward: `forward(model, batch)`, for models that are called otherwise.

    Raises:
        DiagnosisError: an unknown measure, or `every` below 1.

    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
    >>> monitor = Monitor(model, nn.functional.mse_loss, optimizer=optimizer, every=2, measures=["sharpness"])
    >>> for _ in range(4):
    ...     batch = torch.randn(8, 2), torch.randn(8, 1)
    ...     monitor.step(batch)
    ...     nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
    ...     optimizer.step()
    >>> [(row["step"], row["threshold"], row["largest"] > 0) for row in monitor.history.rows()]
    [(0, 20.0, True), (2, 20.0, True)]
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        *,
        optimizer: Optimizer | None = None,
        every: int = 100,
        measures: Sequence[str] = ("smoothness", "sharpness", "activations"),
        forward: Forward | None = None,
    ) -> None:
        if isinstance(measures, str):
            raise DiagnosisError(f"measures={measures!r}: give a list of names, as [{measures!r}]")
        for name in measures:
            if name not in MEASURES:
                raise DiagnosisError(f"no measure named {name!r}; there are {', '.join(MEASURES)}")
        if every < 1:
            raise DiagnosisError(f"every={every}: measure at every step (1), or at fewer")
        self.model, self.loss, self.optimizer, self.forward = model, loss, optimizer, forward
        self._every, self._measures, self._seen = every, tuple(measures), 0
        self._snapshots: list[Snapshot] = []

    @property
    def history(self) -> History:
        """What was measured so far."""
        return History(tuple(self._snapshots))

    @property
    def due(self) -> bool:
        """Whether the next step is one to measure at."""
        return self._seen % self._every == 0

    @property
    def lr(self) -> float | None:
        """The learning rate of the optimizer's first group."""
        return None if self.optimizer is None else float(self.optimizer.param_groups[0]["lr"])

    def step(self, batch: Any, *, forward: Forward | None = None) -> None:
        """Measure, if this step is one to measure at.

        Args:
            batch: The batch of the step.
            forward: For this step, instead of the monitor's.
        """
        if self.due:
            self._snapshots.append(self._snapshot(batch, forward or self.forward))
        self._seen += 1

    def hugging_face(self) -> Any:
        """A callback for `transformers.Trainer(callbacks=[...])`, whose steps it follows.

        The batch is what the model is called with, and the loss the one in its output.

        Raises:
            DiagnosisError: transformers is not installed.
        """
        from normwise.diagnose.callbacks import hugging_face

        return hugging_face(self)

    def lightning(self) -> Any:
        """A callback for `lightning.Trainer(callbacks=[...])`, whose steps it follows.

        Without a loss of the monitor's, the loss is what `training_step` returns; nothing that it logs is kept.

        Raises:
            DiagnosisError: lightning is not installed.
        """
        from normwise.diagnose.callbacks import lightning

        return lightning(self)

    def __repr__(self) -> str:
        return f"Monitor of {', '.join(self._measures)} at every {self._every}. step; {self.history.meaning}"

    def _snapshot(self, batch: Any, forward: Forward | None) -> Snapshot:
        results, failed = {}, {}
        for name in self._measures:
            try:
                results[name] = MEASURES[name](self, batch, forward)
            except Exception as error:  # noqa: BLE001 - the user's model may raise anything, and the training goes on
                failed[name] = reason_of(error)
                self._warn(name, failed[name])
        return Snapshot(self._seen, self.lr, self._threshold(), results, failed)

    def _warn(self, name: str, why: str) -> None:
        if not any(name in snapshot.failed for snapshot in self._snapshots):
            warnings.warn(f"{name} cannot be measured at step {self._seen}: {why}", stacklevel=4)

    def _threshold(self) -> float | None:
        """The curvature that the optimizer's step bears; known for SGD with a rate above 0."""
        group = {} if self.optimizer is None else self.optimizer.param_groups[0]
        if not group.get("lr") or not {"momentum", "nesterov", "dampening"} <= group.keys():
            return None
        return stability_threshold(
            float(group["lr"]), group["momentum"], nesterov=group["nesterov"], dampening=group["dampening"]
        )


def _smoothness(monitor: Monitor, batch: Any, forward: Forward | None) -> Result:
    if monitor.lr == 0:
        raise DiagnosisError("the learning rate is 0, as a warm-up begins: there is no step to look along")
    return smoothness(monitor.model, [batch], monitor.loss, lr=monitor.lr, mode="current", forward=forward)


def _sharpness(monitor: Monitor, batch: Any, forward: Forward | None) -> Result:
    batches, loss = [batch], monitor.loss
    return sharpness(monitor.model, batches, loss, mode="current", forward=forward, tolerance=0.05, most=_PRODUCTS)


def _activations(monitor: Monitor, batch: Any, forward: Forward | None) -> Result:
    return activations(monitor.model, [batch], mode="current", forward=forward)


def _gap(monitor: Monitor, batch: Any, forward: Forward | None) -> Result:
    return gap(monitor.model, [batch], monitor.loss, forward=forward)


MEASURES: Mapping[str, Callable[[Monitor, Any, Forward | None], Result]] = {
    "smoothness": _smoothness,
    "sharpness": _sharpness,
    "activations": _activations,
    "gap": _gap,
}
