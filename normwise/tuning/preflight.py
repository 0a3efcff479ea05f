"""What is tried before a study begins, and measured when it has ended: each network, one step, one evaluation.

Whatever is wrong with a factory, with shapes or with labels shows here, before anything is written.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor, nn

from normwise.errors import StudyError
from normwise.surgery.words import Axis
from normwise.tuning.axes import variant_text, variants
from normwise.tuning.control import Freezer, Kept
from normwise.tuning.data import Data, Split, check_labels
from normwise.tuning.norms import NormChoice
from normwise.tuning.records import Settings, Value, Variant
from normwise.tuning.seeding import one_thread, seeded
from normwise.tuning.training import Training, predict
from normwise.tuning.trial import Problem, build
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
    others: tuple[tuple[tuple[str, Value], float], ...] = ()  # the same with one axis at another of its values

    def seconds(self, variant: Variant) -> float | None:
        """About how long a step takes with a combination of the axes' values: each axis by its own ratio."""
        if self.step_seconds is None:
            return None
        measured = dict(self.others)
        return self.step_seconds * math.prod(
            measured.get(own, self.step_seconds) / self.step_seconds for own in variant
        )


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

    Every value of every axis is tried once, with the first value of the others.

    Raises StudyError that names the normalization and the culprit.
    """
    with one_thread():
        return {label: _check(problem, choice) for label, choice in problem.choices.items()}


def _check(problem: Problem, choice: NormChoice) -> Check:
    first, *others = _one_by_one(problem.settings)
    check = _check_variant(problem, choice, first)
    if problem.settings.control:
        _try_control(problem, choice, first)
    times = {
        changed: seconds
        for variant in others
        if (seconds := _check_variant(problem, choice, variant).step_seconds) is not None
        for changed in set(variant) - set(first)
    }
    return replace(check, others=tuple(times.items()))


def _one_by_one(settings: Settings) -> Iterator[Variant]:
    """The first values of all axes, and then each other value by itself; the number of epochs changes no step."""
    first = dict(variants(settings)[0])
    yield tuple(first.items())
    for name, own in settings.axes:
        yield from (tuple({**first, name: value}.items()) for value in own[1:] if name != "epochs")


def _check_variant(problem: Problem, choice: NormChoice, variant: Variant) -> Check:
    watched = _Watched(choice)
    fixed = replace(problem, settings=problem.settings.at(variant))
    with seeded(fixed.settings.base_seed), _blamed(choice, variant):
        model = build(fixed, watched)
        if not watched.made:
            raise StudyError(
                f"model {fixed.architecture.label!r} takes norm and never calls it: "
                "it would be the same with every normalization"
            )
        samples, seconds = ((), None) if fixed.data is None else _try(fixed, fixed.data, model, watched)
    parameters = sum(p.numel() for p in model.parameters() if not torch.nn.parameter.is_lazy(p))
    return Check(repr(watched.made[0]), parameters, samples, seconds)


def _blamed(choice: NormChoice, variant: Variant) -> AbstractContextManager[None]:
    at = f" at {variant_text(variant)}" if variant else ""
    return blame(f"the model with normalization {choice.label!r}{at} does not run:")


def _try_control(problem: Problem, choice: NormChoice, variant: Variant) -> None:
    """One step with gamma, beta and the output layer frozen."""
    if problem.data is None:
        return
    kept = Kept(choice)
    fixed = replace(problem, settings=problem.settings.at(variant))
    with seeded(fixed.settings.base_seed), _blamed(choice, variant):
        model = build(fixed, kept)
        _training(fixed, model, problem.data.train.to(fixed.settings.device), Freezer(model, kept.made)).step()


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


def measure_steps(
    problem: Problem, checks: dict[str, Check], best: Mapping[str, Variant] | None = None
) -> dict[str, float | None]:
    """Milliseconds of a training step by label: medians of rounds that take turns, one thread, nothing else running.

    `best` are the combinations of the axes' values to measure each normalization at; the first ones by default.
    """
    data = problem.data
    if data is None:
        return dict.fromkeys(problem.choices)
    first = variants(problem.settings)[0]
    at = {label: (best or {}).get(label, first) for label in problem.choices}
    train = data.train.to(problem.settings.device)
    times: dict[str, list[float]] = {label: [] for label in problem.choices}
    quiet = redirect_stdout(sys.stderr)
    with quiet, one_thread(), seeded(problem.settings.base_seed), blame("the time of a step cannot be measured:"):
        runs = {label: _fresh(problem, label, at[label], train) for label in problem.choices}
        for _ in range(_ROUNDS):
            for label, training in runs.items():
                times[label].append(_time(training, _steps(checks[label].seconds(at[label]))))
    return {label: 1000 * median(seconds) for label, seconds in times.items()}


def _fresh(problem: Problem, label: str, variant: Variant, train: Split) -> Training:
    fixed = replace(problem, settings=problem.settings.at(variant))
    return _training(fixed, build(fixed, fixed.choices[label]), train)


def _training(problem: Problem, model: nn.Module, data: Split, freezer: Freezer | None = None) -> Training:
    settings, steps = problem.settings, problem.settings.steps or 1
    seed = settings.base_seed
    return Training(model, data, settings, problem.loss, lr=_RATE, seed=seed, steps=steps, freezer=freezer)


def _steps(step_seconds: float | None) -> int:
    return max(1, min(_MOST_STEPS, int(_ROUND_SECONDS / (step_seconds or _ROUND_SECONDS))))


def _time(training: Training, steps: int) -> float:
    training.step()  # brings this network back into the caches
    started = time.perf_counter()
    for _ in range(steps):
        training.step()
    return (time.perf_counter() - started) / steps
