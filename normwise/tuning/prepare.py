"""Everything before the first trial: from what the user asked for to a problem that is known to run."""

from __future__ import annotations

import inspect
import math
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from statistics import fmean

from normwise.errors import StudyError
from normwise.tuning.data import Data, Source, chance, load
from normwise.tuning.models import Factory, find
from normwise.tuning.norms import NormChoice, parse_norms
from normwise.tuning.options import Options, make_settings
from normwise.tuning.preflight import Check, preflight
from normwise.tuning.progress import span
from normwise.tuning.records import Settings
from normwise.tuning.reproduce import command
from normwise.tuning.search import declared_rates, expected_trials
from normwise.tuning.training import find_loss
from normwise.tuning.trial import OwnLoop, Problem
from normwise.tuning.user import name_of, resolve

DEFAULT_MODEL, DEFAULT_DATA = "mlp", "digits"
_DIGITS = 10  # outputs of a built-in model in a loop that brings its own data
_START_SECONDS = 4.0  # of the worker processes
_OPTIMIZERS = {
    "sgd": "SGD without momentum or weight decay",
    "momentum": "SGD with momentum 0.9, no weight decay",
    "adamw": "AdamW, torch's defaults (betas 0.9 and 0.999, weight decay 0.01)",
}
_SCHEDULES = {"constant": "constant learning rate", "cosine": "cosine from the learning rate to 0, no warm-up"}


@dataclass(frozen=True)
class Plan:
    """A study that is ready to run: its problem, what the first steps showed, and what the report says was fixed."""

    problem: Problem
    checks: dict[str, Check]
    facts: dict[str, str]
    command: str

    @property
    def settings(self) -> Settings:
        """What the outcome depends on, besides model and data."""
        return self.problem.settings

    def seconds(self, workers: int) -> float | None:
        """About how long the study takes; None for a loop whose time is unknown."""
        times = [check.step_seconds for check in self.checks.values() if check.step_seconds is not None]
        if not times or self.settings.steps is None:
            return None
        return _START_SECONDS + expected_trials(self.settings) * self.settings.steps * fmean(times) / max(workers, 1)

    def text(self, workers: int) -> str:
        """What would be done, for a person to read before doing it."""
        seconds, settings = self.seconds(workers), self.settings
        rates = declared_rates(settings)
        grid = "widened and refined as needed" if settings.lrs is None else "fixed"
        rows = {
            **self.facts,
            "normalizations": ", ".join(label for label, _ in settings.norms),
            "learning rates": f"{len(rates)} from {rates[0]:.3g} to {rates[-1]:.3g}, {grid}",
            "seeds": f"{settings.seeds} to select, {settings.confirm} fresh ones to confirm",
            "metric": f"{settings.metric}, margin {settings.margin:g} {settings.unit}".rstrip(),
            "trials": f"about {expected_trials(settings)}",
            "time": f"about {span(seconds)} with {workers} workers" if seconds else "unknown: the loop is yours",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def make_plan(model: str | Factory, data: Source, train: str | OwnLoop | None, options: Options) -> Plan:
    """Read, check and try everything that a study needs, without writing anything; what is printed goes to stderr.

    Raises StudyError that names the culprit.
    """
    with redirect_stdout(sys.stderr):
        return _plan(model, data, train, options)


def _plan(model: str | Factory, data: Source, train: str | OwnLoop | None, options: Options) -> Plan:
    if not isinstance(options.lrs, str):
        options = replace(options, lrs=tuple(map(float, options.lrs)))  # an array is compared item by item
    choices = parse_norms(options.norms)
    if train is None:
        problem = _built_in(model, data, options, choices)
    elif data == DEFAULT_DATA:
        problem = _own_loop(model, train, options, choices)
    else:
        raise StudyError("train brings its own data: leave data out")
    checks = preflight(problem)
    return Plan(problem, checks, _facts(problem, checks), command(model, data, train, options))


def default_name(model: str | Factory, data: Source, train: str | OwnLoop | None) -> str:
    """What a study is called when nobody says: its model and its data, fit for a file name.

    >>> default_name("mlp", "digits", None), default_name("my.nets:deep", "digits", "my.loops:train")
    ('mlp-digits', 'my.nets-deep-my.loops-train')
    """
    parts = (model, data if train is None else train)
    names = (part if isinstance(part, str) else name_of(part) if callable(part) else "data" for part in parts)
    return re.sub(r"[^\w.-]+", "-", "-".join(names)).strip("-.")


def _built_in(model: str | Factory, data: Source, options: Options, choices: tuple[NormChoice, ...]) -> Problem:
    name = options.loss if isinstance(options.loss, str) else name_of(options.loss)
    loss = find_loss(options.loss)
    loaded = load(data, name)
    architecture = find(model, loaded.train.inputs, _outputs(loaded, name))
    settings = make_settings(
        options, model=architecture.label, data=loaded.label, loss=name, choices=choices, own_loop=False
    )
    return Problem(settings, architecture, _by_label(choices), loss, loaded, chance(loaded.train.targets, name))


def _own_loop(model: str | Factory, train: str | OwnLoop, options: Options, choices: tuple[NormChoice, ...]) -> Problem:
    loop = resolve(train, "train") if isinstance(train, str) else train
    label = train if isinstance(train, str) else name_of(train)
    _check_signature(loop, label)
    architecture = find(model, None, _DIGITS)
    settings = make_settings(
        options, model=architecture.label, data=label, loss="the loop's own", choices=choices, own_loop=True
    )
    return Problem(settings, architecture, _by_label(choices), find_loss("mse"), None, None, loop)


def _check_signature(loop: OwnLoop, label: str) -> None:
    try:
        inspect.signature(loop).bind(None, lr=0.1, seed=0, trial=None)
    except (TypeError, ValueError) as error:
        raise StudyError(f"train {label!r} cannot be called as train(model, lr=, seed=, trial=): {error}") from error


def _by_label(choices: tuple[NormChoice, ...]) -> dict[str, NormChoice]:
    return {choice.label: choice for choice in choices}


def _outputs(data: Data, loss: str) -> int:
    """How many numbers a built-in model must put out."""
    if loss == "cross_entropy":
        return 1 + max(int(split.targets.max()) for _, split in data.splits())
    return math.prod(data.train.targets.shape[1:])


# ------------------------------------------------------------------------------------------------- what was fixed


def _facts(problem: Problem, checks: dict[str, Check]) -> dict[str, str]:
    settings, facts = problem.settings, dict(problem.architecture.facts)
    if problem.data is None:
        return {
            **facts,
            "training": f"{settings.data}, the user's own loop: data, loss, optimizer and metric are its own",
        }
    unit = " nats" if settings.loss == "cross_entropy" else ""
    chance = "" if problem.chance is None else f"; the best constant prediction has {problem.chance:.4g}{unit}"
    return {
        **problem.data.facts,
        **facts,
        "loss": settings.loss + chance,
        "optimizer": _OPTIMIZERS[settings.optimizer],
        "schedule": _SCHEDULES[settings.schedule],
        "batch size": _batch(problem, problem.data, checks),
        "steps": _steps(problem, problem.data),
        "evaluation": "validation data choose the learning rate; test data are used in confirmation only",
    }


def _steps(problem: Problem, data: Data) -> str:
    steps, examples = problem.settings.steps or 0, len(data.train)
    seen = steps * min(problem.settings.batch_size, examples)
    return f"{steps}, which is {seen / examples:.1f} epochs; twice as many for winner and runner-up"


def _batch(problem: Problem, data: Data, checks: dict[str, Check]) -> str:
    size = min(problem.settings.batch_size, len(data.train))
    whole = " (all training data)" if size == len(data.train) else ""
    seen = [count for check in checks.values() for count in check.samples]
    if not seen:
        return f"{size}{whole}"
    low, high = min(seen), max(seen)
    samples = f"{low}" if low == high else f"{low} to {high}"
    return f"{size}{whole}; a statistic over batch and positions has {samples} samples (N·H·W)"
