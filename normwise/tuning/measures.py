"""What is seen from inside one more training of each normalization, at its best rate, when the study has ended."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from normwise.diagnose.activations import activations
from normwise.diagnose.doctor import doctor
from normwise.diagnose.findings import Finding, in_range
from normwise.diagnose.gap import gap
from normwise.diagnose.monitor import Monitor, Snapshot
from normwise.diagnose.results import number
from normwise.errors import NormwiseError
from normwise.tuning.data import Data
from normwise.tuning.progress import Progress
from normwise.tuning.records import (
    ActivationPoint,
    Found,
    GapPoint,
    Measures,
    NormSummary,
    SharpnessPoint,
    SmoothnessPoint,
    Summary,
)
from normwise.tuning.seeding import one_thread, seeded
from normwise.tuning.training import Training, batches, predict
from normwise.tuning.trial import Problem, build
from normwise.tuning.user import blame
from normwise.untouched import untouched

_LOOKS = 6  # at a training, evenly spread
_BATCHES = 8  # of training data, for what is measured over several

Batch = tuple[Tensor, Tensor]


def measure(problem: Problem, summary: Summary, view: Progress) -> dict[str, Measures]:
    """The measures of every normalization that was confirmed, by label, with the doctor's word on the winner.

    A loop of the user's own cannot be looked into from here: a `Monitor` in it can.
    """
    data = problem.data
    if data is None:
        return {}
    found = {}
    for norm in summary.norms:
        if norm.confirmation:
            view.say(f"measuring inside the training of {norm.label}")
            try:
                found[norm.label] = _measures(problem, data, norm, examined=norm.label == summary.verdict.winner)
            except NormwiseError as error:  # the verdict stands without
                view.say(f"{error}; the report does without what was to be measured")
    return found


def with_measures(summary: Summary, found: Mapping[str, Measures]) -> Summary:
    """The summary with what was measured."""
    return replace(summary, norms=tuple(replace(norm, measures=found.get(norm.label)) for norm in summary.norms))


def _measures(problem: Problem, data: Data, norm: NormSummary, *, examined: bool) -> Measures:
    """One training from the first confirmation seed, looked into on its way and at its end."""
    request = norm.confirmation[0].request
    problem = replace(problem, settings=problem.settings.at(request.variant))
    train, steps = data.train.to(problem.settings.device), request.steps or 1
    quiet = redirect_stdout(sys.stderr)
    with quiet, one_thread(), seeded(request.seed), blame(f"measuring inside the training of {norm.label!r} raised"):
        model = build(problem, problem.choices[request.norm])
        predict(model, train.inputs[:2])  # gives lazy layers their sizes
        training = Training(model, train, problem.settings, problem.loss, lr=request.lr, seed=request.seed, steps=steps)
        first = training.peek()
        before = _sizes(model, first)
        snapshots = _followed(problem, training, steps)
        after = _sizes(model, first)
        some = list(islice(batches(train, problem.settings.batch_size, request.seed), _BATCHES))
        return Measures(
            seed=request.seed,
            smoothness=tuple(_smoothness(one) for one in snapshots if "smoothness" in one.results),
            sharpness=tuple(_sharpness(one) for one in snapshots if "sharpness" in one.results),
            activations=tuple(ActivationPoint(name, before.get(name), rms) for name, rms in after.items()),
            gap=_gap(problem, model, some),
            saved_bytes=saved_bytes(problem, model, first),
            findings=_findings(problem, training, some) if examined else None,
        )


def _followed(problem: Problem, training: Training, steps: int) -> tuple[Snapshot, ...]:
    """Train to the end, and measure before some of the steps, as long as the parameters are finite."""
    monitor = Monitor(
        training.model,
        problem.loss,
        optimizer=training.optimizer,
        every=max(1, math.ceil(steps / _LOOKS)),
        measures=("smoothness", "sharpness"),
    )
    for _ in range(steps):
        if training.finite():
            monitor.step(training.peek())
        training.step()
    return monitor.history.snapshots


def _smoothness(snapshot: Snapshot) -> SmoothnessPoint:
    found = snapshot.results["smoothness"]
    (row,) = found.rows()
    names = ("loss_low", "loss_high", "predictiveness", "beta", "weight_norm")
    return SmoothnessPoint(snapshot.step, *(_finite(row[name]) for name in names))


def _sharpness(snapshot: Snapshot) -> SharpnessPoint:
    found = snapshot.results["sharpness"].headline()
    largest, smallest, along = (_finite(found[name]) for name in ("largest", "smallest", "along_gradient"))
    return SharpnessPoint(snapshot.step, largest, smallest, along, _finite(snapshot.threshold))


def _sizes(model: nn.Module, batch: Batch) -> dict[str, float | None]:
    """The root mean square of what each call puts out, in training mode."""
    return {call.name: _finite(call.rms) for call in activations(model, [batch]).calls}


def _gap(problem: Problem, model: nn.Module, some: list[Batch]) -> GapPoint | None:
    """The training loss by moving, batch and recalibrated statistics; None where nothing is remembered."""
    try:
        found = gap(model, some, problem.loss)
    except NormwiseError:  # a memory that cannot be measured is no reason to lose a study
        return None
    if not found.layers:
        return None
    return GapPoint(_finite(found.moving), _finite(found.batch), _finite(found.recalibrated))


def saved_bytes(problem: Problem, model: nn.Module, batch: Batch) -> int:
    """What one training step keeps for its backward besides the parameters, each piece of memory counted once."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with untouched(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = problem.loss(model.train()(batch[0]), batch[1])  # noqa: F841 - the graph lives as long as the loss does
    return sum(kept.values())


def _findings(problem: Problem, training: Training, some: list[Batch]) -> tuple[Found, ...]:
    found = doctor(training.model, some, problem.loss, optimizer=training.optimizer)
    return tuple(map(_in_words, found.findings))


def _in_words(finding: Finding) -> Found:
    return Found(
        kind=finding.kind,
        what=finding.what,
        where=finding.where,
        measured=f"{finding.quantity}: {number(finding.measured)}",
        expected=in_range(*finding.expected),
        fix=finding.fix,
        confidence=finding.confidence,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
