"""The gap between training and evaluation: the same data by moving, by batch and by recalibrated statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normwise.batches import Forward, Loss, device_of, feed, moved, rows_of
from normwise.diagnose.memories import CAUSES, MemoryGap, Seen, shares_of
from normwise.diagnose.objective import Batches, measuring, read
from normwise.diagnose.results import Result, number
from normwise.diagnose.watch import loss_if_any
from normwise.errors import DiagnosisError, SurgeryError
from normwise.places import all_modules
from normwise.surgery.recalibrate import recalibrate
from normwise.surgery.stand_in import standing_in
from normwise.untouched import Moment


@dataclass(frozen=True, repr=False)
class Gap(Result):
    """The gap between training and evaluation; see `gap`.

    Attributes:
        moving: The loss in evaluation mode, with what is remembered.
        batch: The loss with each batch's own statistics, and everything else in evaluation mode: no dropout.
        recalibrated: The loss in evaluation mode, with the statistics of these batches joined.
        training: The loss in training mode; what it is above `batch` is dropout and its like.
        batches: How many batches.
        bessel: The product over the layers of sqrt((n - 1) / n): where they follow one another, with nothing between
            that adds to the stream, the outputs of evaluation are that much smaller than those of training.
        shares: The share of each cause in what all memories differ by; see `MemoryGap`.
        layers: Each layer with a memory.
        left: Why a layer with a memory was not measured, by path.
    """

    moving: float | None
    batch: float | None
    recalibrated: float | None
    training: float | None
    batches: int
    bessel: float
    shares: Mapping[str, float]
    layers: tuple[MemoryGap, ...]
    left: Mapping[str, str]

    @property
    def gap(self) -> float | None:
        """What evaluation loses by its memories: `moving` - `batch`."""
        return None if self.moving is None or self.batch is None else self.moving - self.batch

    @property
    def worst(self) -> MemoryGap | None:
        """The layer whose memory differs most."""
        return max(self.layers, key=lambda layer: layer.difference, default=None)

    @property
    def meaning(self) -> str:
        """What was found, in one line."""
        losses = "no loss to compare" if self.moving is None else f"loss {number(self.moving)} in evaluation"
        worst = self.worst
        if worst is None:
            why = "; not measured: " + ", ".join(self.left) if self.left else ": no layer has a memory"
            trained = "" if self.training is None else f", {number(self.training)} in training mode"
            return f"{losses}{trained}{why}; what differs is dropout's and its like"
        if self.moving is not None:
            losses += (
                f", {number(self.batch)} with batch statistics, {number(self.recalibrated)} recalibrated, "
                f"{number(self.training)} in training mode"
            )
        if any(loss is not None and not math.isfinite(loss) for loss in (self.moving, self.batch)):
            return f"{losses}; nw.first_nonfinite tells where it begins"
        cause = max(self.shares, key=self.shares.__getitem__)
        return (
            f"{losses}; memories differ most in {worst.path} (by {number(worst.difference)}), in all "
            f"{100 * self.shares[cause]:.0f} % by {_WORDS[cause]}; Bessel's factor along a chain: {number(self.bessel)}"
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer with a memory, with a column for the share of each cause."""
        return [
            {
                **{name: value for name, value in vars(layer).items() if name not in ("parts", "shares")},
                **{f"share_{cause}": share for cause, share in layer.shares.items()},
            }
            for layer in self.layers
        ]

    def headline(self) -> dict[str, float | None]:
        """The losses by moving, batch and recalibrated statistics, and the largest difference of a memory."""
        worst = self.worst
        return {
            "moving": self.moving,
            "batch": self.batch,
            "recalibrated": self.recalibrated,
            "memory_difference": None if worst is None else worst.difference,
        }

    def traces(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The difference of each memory, divided by cause."""
        paths = [layer.path for layer in self.layers]
        bars = [
            {
                "type": "bar",
                "name": _WORDS[cause],
                "x": paths,
                "y": [layer.difference * layer.shares[cause] for layer in self.layers],
            }
            for cause in CAUSES
        ]
        return bars, {"barmode": "stack", "yaxis": {"title": {"text": "difference of memory and batches"}}}


_WORDS = {
    "updates": "too few updates",
    "bessel": "Bessel's factor",
    "noise": "batch noise",
    "drift": "drift",
    "nonfinite": "non-finite memory",
}


def gap(
    model: nn.Module,
    batches: Batches,
    loss: Loss | None = None,
    *,
    forward: Forward | None = None,
    layerwise: bool = False,
) -> Gap:
    """Compare what is remembered with the batches, layer by layer; the model is left as it was, bit for bit.

    The loss of the same batches, a mean weighted by their rows, is computed with moving statistics (evaluation), with
    each batch's own (layers with a memory as in training, everything else as in evaluation), with recalibrated ones
    (`nw.recalibrate` on these batches), and in training mode. Ghost batches and batch renormalization are put aside
    where a layer uses its batch's statistics.

    For each memory: how far it is from the batches, in standard deviations, effective samples and updates, and the
    share of each cause. `MemoryGap` has the formulas. Several batches tell noise from drift better than one.

    Args:
        model: A model, in any mode.
        batches: A batch, a list of batches or a loader; all of them are read once and kept. Those of training, of
            training's size.
        loss: `loss(output, target)`, with the second element of a tuple or list as the target. None: the model's own,
            its output or the `loss` in it, and if it has none, only memories are compared.
        forward: `forward(model, batch)`, for models that are called otherwise.
        layerwise: Recalibrate layer by layer, which is exact and takes a pass a layer.

    Returns:
        A record; `repr` says what it means in one line. A model without memories gives one without layers.

    Raises:
        DiagnosisError: there is no batch; the loss that is given is not one number; a model that cannot be operated on.
        TooFewSamplesError: a batch leaves a single sample a statistic.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    >>> found = gap(model, torch.randn(64, 4))
    >>> found.layers[0].samples, found.layers[0].updates, round(found.layers[0].shares["updates"], 2) > 0.9
    (64.0, 0, True)
    """
    with measuring(model, "eval", batches=batches), torch.no_grad():
        given = [moved(batch, device_of(model)) for batch in read(batches)]
        for module in all_modules(model):
            module.training = False
        moment = Moment(model)
        try:
            moving = _mean_loss(model, given, loss, forward)
            batch, layers, left = _by_batches(model, given, loss, forward)
            training = recalibrated = None
            if moving is not None:
                moment.back()
                model.train()
                training = _mean_loss(model, given, loss, forward)
                moment.back()
                recalibrate(model, given, forward=forward, layerwise=layerwise)
                recalibrated = _mean_loss(model, given, loss, forward)
        except SurgeryError as error:
            raise DiagnosisError(str(error)) from error
    return Gap(
        moving=moving,
        batch=batch,
        recalibrated=recalibrated,
        training=training,
        batches=len(given),
        bessel=math.prod(layer.bessel for layer in layers),
        shares=shares_of([layer.parts for layer in layers]),
        layers=layers,
        left=left,
    )


def _by_batches(
    model: nn.Module, batches: Sequence[Any], loss: Loss | None, forward: Forward | None
) -> tuple[float | None, tuple[MemoryGap, ...], dict[str, str]]:
    """The loss by batch statistics, what they say of each memory, and why others are left."""
    with standing_in(model) as (running, layers, lines):
        seen = [Seen(pooled) for pooled in layers]
        for pooled in layers:
            pooled.layer.training = True

        def take() -> None:
            for layer in seen:
                layer.take()

        value = _mean_loss(running, batches, loss, forward, take)
    gaps = {layer.path: layer.gap() for layer in seen}
    left = {line.path: line.why for line in lines}
    left |= {path: "no batch reached it" for path, found in gaps.items() if found is None}
    return value, tuple(found for found in gaps.values() if found is not None), left


def _mean_loss(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss | None,
    forward: Forward | None,
    after: Callable[[], None] | None = None,
) -> float | None:
    """The mean loss over the batches, weighted by their rows; None where there is none; `after` follows each batch."""
    weighted, rows, has_loss = 0.0, 0, True
    for batch in batches:
        value = loss_if_any(model, batch, feed(model, batch, forward), loss)
        has_loss &= value is not None
        weighted += 0.0 if value is None else float(value) * rows_of(batch)
        rows += rows_of(batch)
        if after is not None:
            after()
    return weighted / rows if has_loss else None
