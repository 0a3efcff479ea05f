"""What is tried before a study begins, and measured when it has ended: each network, one step, one evaluation.

Whatever is wrong with a factory, with shapes or with labels shows here, before anything is written.
"""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from normwise.errors import StudyError
from normwise.surgery.words import Axis
from normwise.tuning.data import Data, Split, check_labels
from normwise.tuning.norms import NormChoice
from normwise.tuning.seeding import one_thread, seeded
from normwise.tuning.training import Training, predict
from normwise.tuning.trial import Problem
from normwise.tuning.user import blame

_RATE = 1e-3  # of the steps that are timed; the time of a step does not depend on it
_ROUNDS = 7
_ROUND_SECONDS = 0.1
_MOST_STEPS = 20


@dataclass(frozen=True)
class Check:
    """What the first step of a normalization showed."""

    described: str  # its first layer's repr
    parameters: int
    samples: tuple[int, ...]  # a statistic over batch and positions, by layer: N·H·W; empty where no step was taken
    step_seconds: float | None  # None for the user's own loop


@dataclass
class _Watched:
    """A normalization whose layers are kept, with how many values of a channel each was given."""

    choice: NormChoice
    made: list[nn.Module] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)

    def __call__(self, features: int, axis: Axis = 1) -> nn.Module:
        layer = self.choice(features, axis)
        layer.register_forward_pre_hook(lambda _, inputs: self.samples.extend(x.numel() // features for x in inputs))
        self.made.append(layer)
        return layer


def preflight(problem: Problem) -> dict[str, Check]:
    """Build each network; with built-in training, evaluate it and take a step. By label.

    Raises StudyError that names the normalization and the culprit.
    """
    with one_thread():
        return {label: _check(problem, choice) for label, choice in problem.choices.items()}


def _check(problem: Problem, choice: NormChoice) -> Check:
    watched = _Watched(choice)
    with seeded(problem.settings.base_seed), blame(f"the model with normalization {choice.label!r} does not run:"):
        model = problem.architecture.build(watched).to(problem.settings.device)
        if not watched.made:
            raise StudyError(
                f"model {problem.architecture.label!r} takes norm and never calls it: "
                "it would be the same with every normalization"
            )
        samples, seconds = ((), None) if problem.data is None else _try(problem, problem.data, model, watched)
    parameters = sum(p.numel() for p in model.parameters() if not torch.nn.parameter.is_lazy(p))
    return Check(repr(watched.made[0]), parameters, samples, seconds)


def _try(problem: Problem, data: Data, model: nn.Module, watched: _Watched) -> tuple[tuple[int, ...], float | None]:
    """Evaluation, two steps, and evaluation again: samples a statistic by layer, seconds of the second step."""
    some = slice(problem.settings.batch_size)
    device = problem.settings.device
    outputs = predict(model, data.validation.inputs[some].to(device))
    _check_outputs(problem, data, outputs)
    watched.samples.clear()
    training = _training(problem, model, data.train.to(device))
    training.step()
    samples = tuple(watched.samples)
    started = time.perf_counter()
    training.step()
    seconds = time.perf_counter() - started
    problem.loss(predict(model, data.validation.inputs[some].to(device)), data.validation.targets[some].to(device))
    return samples, seconds


def _check_outputs(problem: Problem, data: Data, outputs: Tensor) -> None:
    if not isinstance(outputs, Tensor):
        raise StudyError(f"model {problem.architecture.label!r} puts out a {type(outputs).__name__}, not a tensor")
    if problem.settings.loss == "cross_entropy":
        if outputs.ndim < 2:
            raise StudyError(
                f"model {problem.architecture.label!r} puts out {tuple(outputs.shape)}; "
                "cross_entropy needs (examples, classes)"
            )
        check_labels(data, outputs.shape[1])


def measure_steps(problem: Problem, checks: dict[str, Check]) -> dict[str, float | None]:
    """Milliseconds of a training step by label: medians of rounds that take turns, one thread, nothing else running."""
    data = problem.data
    if data is None:
        return dict.fromkeys(problem.choices)
    train = data.train.to(problem.settings.device)
    times: dict[str, list[float]] = {label: [] for label in problem.choices}
    quiet = redirect_stdout(sys.stderr)
    with quiet, one_thread(), seeded(problem.settings.base_seed), blame("timing a step raised"):
        runs = {label: _training(problem, _model(problem, label), train) for label in problem.choices}
        for _ in range(_ROUNDS):
            for label, training in runs.items():
                times[label].append(_time(training, _steps(checks[label])))
    return {label: 1000 * median(seconds) for label, seconds in times.items()}


def _model(problem: Problem, label: str) -> nn.Module:
    return problem.architecture.build(problem.choices[label]).to(problem.settings.device)


def _training(problem: Problem, model: nn.Module, data: Split) -> Training:
    settings = problem.settings
    return Training(model, data, settings, problem.loss, lr=_RATE, seed=settings.base_seed, steps=settings.steps or 1)


def _steps(check: Check) -> int:
    return max(1, min(_MOST_STEPS, int(_ROUND_SECONDS / (check.step_seconds or _ROUND_SECONDS))))


def _time(training: Training, steps: int) -> float:
    training.step()  # brings this network back into the caches
    started = time.perf_counter()
    for _ in range(steps):
        training.step()
    return (time.perf_counter() - started) / steps
