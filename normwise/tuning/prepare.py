"""Everything before the first trial: from what the user asked for to a problem that is known to run."""

from __future__ import annotations

import inspect
import math
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from statistics import fmean

from normwise.errors import StudyError
from normwise.tuning.axes import option, value_text, variants
from normwise.tuning.data import Data, Source, chance, load
from normwise.tuning.models import Factory, find
from normwise.tuning.norms import NormChoice, parse_norms
from normwise.tuning.options import Options, make_settings
from normwise.tuning.preflight import Check, preflight
from normwise.tuning.progress import span
from normwise.tuning.rates import declared_rates
from normwise.tuning.records import Settings
from normwise.tuning.reproduce import command
from normwise.tuning.search import expected_budget, expected_trials
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
_DECAYING = {
    "sgd": "SGD without momentum, weight decay {}",
    "momentum": "SGD with momentum 0.9, weight decay {}",
    "adamw": "AdamW (betas 0.9 and 0.999), weight decay {}",
}
_MOST_TRIALS = 5000  # beyond which a dry run warns
_INSTEAD = 60  # points a normalization, as good as a grid of many axes (Bergstra and Bengio 2012)
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
        settings = self.settings
        steps = [(variant, settings.at(variant).steps) for variant in variants(settings)]
        times = [(check.seconds(variant), count) for variant, count in steps for check in self.checks.values()]
        known = [seconds * count for seconds, count in times if seconds is not None and count is not None]
        if not known:
            return None
        return _START_SECONDS + expected_budget(settings).full * fmean(known) / max(workers, 1)

    def text(self, workers: int) -> str:
        """What would be done, for a person to read before doing it."""
        seconds, settings = self.seconds(workers), self.settings
        trials = expected_trials(settings)
        rows = {
            **self.facts,
            "normalizations": ", ".join(label for label, _ in settings.norms),
            "learning rates": _rates(settings),
            **_search(settings),
            "seeds": f"{settings.seeds} to select, {settings.confirm} fresh ones to confirm",
            "metric": f"{settings.metric}, margin {settings.margin:g} {settings.unit}".rstrip(),
            "trials": f"about {trials}",
            "time": f"about {span(seconds)} {_hands(workers)}" if seconds else "unknown: the loop is yours",
        }
        if trials > _MOST_TRIALS:
            rows["warning"] = _too_many(settings, trials)
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _hands(workers: int) -> str:
    return "in this process" if workers == 0 else f"with {workers} worker{'s' * (workers > 1)}"


def _rates(settings: Settings) -> str:
    """The learning rates that every normalization runs first, or the range that they are drawn from, by optimizer."""
    grid = settings.sampler == "grid"
    spans = {}
    for name in dict(settings.axes).get("optimizer", (settings.optimizer,)):
        rates = declared_rates(settings.at((("optimizer", name),)))
        spans[name] = f"{f'{len(rates)} ' if grid else ''}from {rates[0]:.3g} to {rates[-1]:.3g}"
    same = len(set(spans.values())) == 1
    text = next(iter(spans.values())) if same else ", ".join(f"{span} ({name})" for name, span in spans.items())
    how = "widened and refined as needed" if settings.lrs is None else "fixed"
    return f"{text}, {how if grid else 'drawn by logarithm'}"


def _search(settings: Settings) -> dict[str, str]:
    """Axes, sampler and control, in words; nothing for a study of learning rates alone."""
    rows = {}
    if settings.axes:
        product = " x ".join(f"{len(own)} {option(name)}" for name, own in settings.axes)
        rows["axes"] = f"{product} = {len(variants(settings))} combinations, each normalization at its own best"
    if settings.sampler != "grid":
        halved = ", cut short by successive halving within a normalization" if settings.prune else ""
        rows["sampler"] = f"{settings.sampler}, {settings.trials} points a normalization{halved}"
    if settings.control:
        rows["control"] = "the same rates once more, with gamma, beta and the output layer frozen"
    return rows


def _too_many(settings: Settings, trials: int) -> str:
    way = f"--sampler tpe --trials {_INSTEAD}" if settings.sampler == "grid" and settings.axes else "fewer seeds"
    return f"{trials} trials are many; fewer values, or {way}, make the study shorter"


def make_plan(model: str | Factory, data: Source, train: str | OwnLoop | None, options: Options) -> Plan:
    """Read, check and try everything that a study needs, without writing anything; what is printed goes to stderr.

    Raises StudyError that names the culprit.
    """
    with redirect_stdout(sys.stderr):
        return _plan(model, data, train, options)


def _plan(model: str | Factory, data: Source, train: str | OwnLoop | None, options: Options) -> Plan:
    options = options.plain()
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
        options,
        model=architecture.label,
        data=loaded.label,
        loss=name,
        choices=choices,
        own_loop=False,
        examples=len(loaded.train),
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
        own = f"{settings.data}, the user's own loop: data, loss, optimizer and metric are its own"
        return {**facts, **_model_facts(settings), "training": own}
    unit = " nats" if settings.loss == "cross_entropy" else ""
    chance = "" if problem.chance is None else f"; the best constant prediction has {problem.chance:.4g}{unit}"
    return {
        **problem.data.facts,
        **facts,
        **_model_facts(settings),
        "loss": settings.loss + chance,
        "optimizer": _each(settings, "optimizer") or _optimizer(settings),
        **_decay(settings),
        "schedule": _SCHEDULES[settings.schedule],
        "batch size": _batch(problem, problem.data, checks),
        "steps": _steps(problem, problem.data),
        "evaluation": "validation data choose the learning rate; test data are used in confirmation only",
    }


def _each(settings: Settings, name: str) -> str:
    """The values of an axis, in words; empty where it has but one."""
    own = dict(settings.axes).get(name, ())
    return f"{', '.join(map(value_text, own))}: each normalization at its own best" if own else ""


def _model_facts(settings: Settings) -> dict[str, str]:
    """Start and placement, where the study asks for others than the factory's own."""
    asked = {"start": settings.start, "placement": settings.placement}
    return {name: _each(settings, name) or value for name, value in asked.items() if value is not None}


def _optimizer(settings: Settings) -> str:
    if settings.weight_decay is None:
        return _OPTIMIZERS[settings.optimizer]
    return _DECAYING[settings.optimizer].format(_each(settings, "weight_decay") or value_text(settings.weight_decay))


def _decay(settings: Settings) -> dict[str, str]:
    """Weight decay on a line of its own, where the optimizer is an axis."""
    if settings.weight_decay is None or not _each(settings, "optimizer"):
        return {}
    return {"weight decay": _each(settings, "weight_decay") or value_text(settings.weight_decay)}


def _steps(problem: Problem, data: Data) -> str:
    settings, examples = problem.settings, len(data.train)
    epochs = dict(settings.axes).get("epochs")
    if epochs:
        return (
            f"those of {', '.join(map(str, epochs))} epochs, each normalization at its own best; twice for the leaders"
        )
    counts = sorted({settings.at(variant).steps or 0 for variant in variants(settings)})
    if len(counts) > 1:
        return f"{counts[0]} to {counts[-1]}, {settings.epochs} epochs by batch size; twice as many for the two leaders"
    if _each(settings, "batch_size"):
        return f"{counts[0]} at every batch size; twice as many for winner and runner-up"
    steps = settings.steps or 0
    seen = steps * min(problem.settings.batch_size, examples)
    return f"{steps}, which is {seen / examples:.1f} epochs; twice as many for winner and runner-up"


def _batch(problem: Problem, data: Data, checks: dict[str, Check]) -> str:
    each = _each(problem.settings, "batch_size")
    if each:
        return each
    size = min(problem.settings.batch_size, len(data.train))
    whole = " (all training data)" if size == len(data.train) else ""
    seen = [count for check in checks.values() for count in check.samples]
    if not seen:
        return f"{size}{whole}"
    low, high = min(seen), max(seen)
    samples = f"{low}" if low == high else f"{low} to {high}"
    return f"{size}{whole}; a statistic over batch and positions has {samples} samples (N·H·W)"
