"""From what the user asked for to checked settings: rates, metric, margin, numbers, names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from normwise.errors import StudyError
from normwise.tuning.axes import AXES, fixed, known, option, plain, values, whole
from normwise.tuning.norms import NormChoice
from normwise.tuning.records import Direction, Settings, Value
from normwise.tuning.samplers import SAMPLERS
from normwise.tuning.training import Loss
from normwise.tuning.user import name_of

DEFAULT_NORMS = "batch,layer,group,rms,none"
AUTO = "auto"  # learning rates: a grid that widens by itself
DEFAULT_STEPS = 200
# The bundled example is short on purpose, so that it decides something, and this number was chosen by its result: on
# the digits the headline was "better" in 3 of 3 studies (other seeds) at 40 steps, in 2 of 3 at 60 and in none at 80.
# Batch normalization's lead is a lead early in training; the report repeats the comparison at twice the steps. The
# larger sets take half of the default, because a study of 340 trials of 200 steps would be one of hours on two cores.
BUILT_IN_STEPS = {"digits": 40, "wine": 40, "breast_cancer": 40, "fashion": 100, "text": 100, "sequences": 100}
DEFAULT_MARGIN = 0.5  # points of accuracy
SCHEDULES = ("constant", "cosine")

Rates = str | Sequence[float]
Wholes = int | str | Sequence[int]
Numbers = float | str | Sequence[float]
Names = str | Sequence[str]


class Metric(NamedTuple):
    """What a score is: its name, the better direction, its unit."""

    name: str
    direction: Direction
    unit: str


@dataclass(frozen=True)
class Options:
    """What a study is asked to do, as the user wrote it; `tune` documents each."""

    norms: str | Sequence[str] = DEFAULT_NORMS
    lrs: Rates = AUTO
    seeds: int = 3
    confirm: int = 10
    steps: int | None = None
    batch_size: Wholes | None = None
    loss: str | Loss = "cross_entropy"
    metric: str | None = None
    optimizer: Names = "sgd"
    schedule: str = "constant"
    margin: float | None = None
    device: str = "cpu"
    start: Names | None = None
    placement: Names | None = None
    weight_decay: Numbers | None = None
    epochs: Wholes | None = None
    sampler: str = "grid"
    trials: int | None = None
    prune: bool = False
    control: bool = False

    def plain(self) -> Options:
        """The same with every axis and the rates as Python has them: one value, or a tuple.

        Raises StudyError for what cannot be read.

        >>> Options(batch_size="8,32", optimizer="adamw").plain().batch_size
        (8, 32)
        """
        lrs = self.lrs if isinstance(self.lrs, str) else tuple(map(float, self.lrs))  # arrays compare item by item
        return replace(self, lrs=lrs, **{name: plain(name, getattr(self, name)) for name in AXES})


def make_settings(
    options: Options,
    *,
    model: str,
    data: str,
    loss: str,
    choices: Iterable[NormChoice],
    own_loop: bool,
    examples: int | None = None,
) -> Settings:
    """Checked settings. Raises StudyError that names the option, its value and what it may be.

    `examples` is the number of training examples, which epochs are counted in.
    """
    whole("seeds", options.seeds, 1)
    whole("confirm", options.confirm, 2)
    if options.steps is not None:
        whole("steps", options.steps, 1)
    known("schedule", options.schedule, SCHEDULES)
    axes = {name: values(name, getattr(options, name)) for name in AXES}
    if own_loop:
        _left_to_the_loop(options, axes)
    _length(options)
    _sampling(options, own_loop=own_loop)
    metric = read_metric(options.metric, loss, own_loop=own_loop)
    settings = Settings(
        model=model,
        data=data,
        norms=tuple((choice.label, choice.declaration) for choice in choices),
        lrs=read_rates(options.lrs),
        seeds=options.seeds,
        confirm=options.confirm,
        steps=_steps(options.steps, data, own_loop=own_loop),
        loss=loss,
        metric=metric.name,
        direction=metric.direction,
        unit=metric.unit,
        schedule=options.schedule,
        margin=_margin(options.margin, metric),
        own_loop=own_loop,
        device=_device(options.device),
        examples=examples if axes["epochs"] else None,
        sampler=options.sampler,
        trials=options.trials,
        prune=options.prune,
        control=options.control,
        **fixed(axes),
    )
    return replace(settings, steps=settings.at(()).steps)


def read_rates(lrs: Rates) -> tuple[float, ...] | None:
    """Learning rates from "auto" (which is None), "LOW:HIGH:COUNT" (evenly by logarithm), or a sequence of numbers.

    >>> read_rates("0.01:1:3")
    (0.01, 0.1, 1.0)
    """
    if isinstance(lrs, str):
        return None if lrs == AUTO else _grid(lrs)
    rates = tuple(float(lr) for lr in lrs)
    if len(rates) < 2:
        raise StudyError(f"lrs has {len(rates)} learning rates; a comparison needs 2 or more")
    for lr in rates:
        if not (math.isfinite(lr) and lr > 0):
            raise StudyError(f"lrs: {lr} is no learning rate; each must be positive and finite")
    return tuple(sorted(set(rates)))


def _grid(text: str) -> tuple[float, ...]:
    what = f"lrs {text!r} makes no grid"
    parts = text.split(":")
    if len(parts) != 3:
        raise StudyError(f"{what}: write auto, or LOW:HIGH:COUNT as in 0.001:10:9")
    try:
        low, high, count = float(parts[0]), float(parts[1]), int(parts[2])
    except ValueError as error:
        raise StudyError(f"{what}: LOW and HIGH must be numbers, COUNT a whole number") from error
    if not (low > 0 and math.isfinite(high)):
        raise StudyError(f"{what}: LOW and HIGH must be positive and finite")
    if not low < high:
        raise StudyError(f"{what}: LOW must be smaller than HIGH")
    if count < 2:
        raise StudyError(f"{what}: COUNT must be 2 or more")
    span = math.log10(high / low)
    inner = (low * 10 ** (span * i / (count - 1)) for i in range(1, count - 1))
    return (low, *(float(f"{lr:.12g}") for lr in inner), high)


def _steps(given: int | None, data: str, *, own_loop: bool) -> int | None:
    if given is not None or own_loop:
        return given
    return BUILT_IN_STEPS.get(data, DEFAULT_STEPS)


def _length(options: Options) -> None:
    if options.steps is not None and options.epochs is not None:
        raise StudyError(
            f"steps={options.steps} and epochs={_given(options.epochs)}: epochs are as many steps as they take, "
            "so give one of the two"
        )


def _sampling(options: Options, *, own_loop: bool) -> None:
    """A sampler needs a number of points; a grid has its own; pruning and the control need each its own of the two."""
    sampler = known("sampler", options.sampler, SAMPLERS)
    if sampler == "grid":
        if options.trials is not None:
            raise StudyError(f"trials={options.trials}: a grid decides by itself how many; use sampler qmc or tpe")
        if options.prune:
            raise StudyError(
                "prune with sampler grid: the edges lr_train and lr_diverge need every rate in full; use qmc or tpe"
            )
        return
    if options.trials is None:
        raise StudyError(f"sampler {sampler} needs trials, the number of points it may draw for each normalization")
    whole("trials", options.trials, 1)
    if options.control:
        raise StudyError(f"control with sampler {sampler}: it is held against edges, which only a grid has")
    if own_loop and options.prune and options.steps is None:
        raise StudyError("prune with train: it cuts trials short by trial.steps, so say with steps how long they are")


def read_metric(metric: str | None, loss: str, *, own_loop: bool) -> Metric:
    """The primary metric: accuracy or loss for built-in training, `name:max` or `name:min` for a loop of one's own.

    >>> read_metric(None, "cross_entropy", own_loop=False)
    Metric(name='accuracy', direction='max', unit='%')
    >>> read_metric("perplexity:min", "cross_entropy", own_loop=True)
    Metric(name='perplexity', direction='min', unit='')
    """
    if metric is None:
        metric = "accuracy" if own_loop or loss == "cross_entropy" else "loss"
    if metric == "accuracy":
        if not own_loop and loss != "cross_entropy":
            raise StudyError(f"metric accuracy needs the loss cross_entropy, not {loss}; use metric loss")
        return Metric("accuracy", "max", "%")
    if own_loop:
        name, _, direction = metric.rpartition(":")
        if not name or direction not in ("max", "min"):
            raise StudyError(f"metric {metric!r}: with train, say what is better, as in {metric}:max or {metric}:min")
        return Metric(name, "max" if direction == "max" else "min", "")
    if metric == "loss":
        return Metric("loss", "min", "nats" if loss == "cross_entropy" else "")
    raise StudyError(f"no metric named {metric!r}; there are accuracy and loss, and name:max or name:min with train")


def _margin(margin: float | None, metric: Metric) -> float:
    if margin is None and metric.name != "accuracy":
        raise StudyError(
            f"metric {metric.name!r} needs a margin, the smallest difference that matters, in its unit; "
            f"the default of {DEFAULT_MARGIN} is in points of accuracy"
        )
    margin = DEFAULT_MARGIN if margin is None else margin
    if not (math.isfinite(margin) and margin > 0):
        raise StudyError(f"margin={margin}: the smallest difference that matters is a positive number")
    return margin


def _device(device: str) -> str:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StudyError(f"device {device!r} cannot be used: {reason}") from error
    return device


def _left_to_the_loop(options: Options, axes: dict[str, tuple[Value, ...]]) -> None:
    """Refuse what a loop of the user's own would not hear of. Of the optimizer it does not either, but the rates do."""
    for name in ("loss", "batch_size", "schedule", "weight_decay", "epochs"):
        value, default = getattr(options, name), getattr(Options, name)
        if (axes[name] != values(name, default)) if name in axes else value != default:
            raise StudyError(f"{option(name)}={_given(value)} does nothing with train: the loop brings its own")
    if len(axes["optimizer"]) > 1:
        raise StudyError(
            f"optimizer={_given(options.optimizer)} does nothing with train: the loop brings its own; name the one it "
            "uses, whose learning rates are then searched"
        )
    if options.control:
        raise StudyError("control does nothing with train: it freezes part of the network, and the loop trains it")


def _given(value: Any) -> str:
    """An option's value as it was written."""
    if callable(value):
        return name_of(value)
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
