"""How to run a study again: the command, the versions, the seeds."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterable
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from normwise.tuning.options import Options
from normwise.tuning.records import Settings
from normwise.tuning.seeds import seeds
from normwise.tuning.user import name_of

_PACKAGES = ("normwise", "torch", "optuna", "scipy", "scikit-learn")


def command(model: Any, data: Any, train: Any, options: Options) -> str:
    """What to type to run the study: a shell command, or a call in Python where something has no name in a shell.

    >>> command("mlp", "digits", None, Options(norms="batch,none", steps=50))
    'normwise tune mlp --data digits --norms batch,none --steps 50'
    >>> command(command, "digits", None, Options(seeds=2))
    'nw.tune(normwise.tuning.reproduce:command, "digits", seeds=2)'
    """
    source = {"data": data} if train is None else {"train": train}
    asked = {f.name: getattr(options, f.name) for f in fields(Options) if getattr(options, f.name) != f.default}
    in_python = (model, *source.values(), options.loss, options.lrs)
    if all(isinstance(part, str) for part in in_python):
        words = ["normwise", "tune", model]
        for name, value in {**source, **asked}.items():
            words += [f"--{name.replace('_', '-')}", *_word(value)]
        return shlex.join(words)
    given = [_shown(model), *([_shown(data)] if train is None else [f"train={_shown(train)}"])]
    return f"nw.tune({', '.join([*given, *(f'{name}={_shown(value)}' for name, value in asked.items())])})"


def reproduction(settings: Settings, asked: str, workers: int) -> dict[str, str]:
    """Command, versions, seeds, when and where, for the report."""
    labels = [label for label, _ in settings.norms]
    return {
        "command": asked,
        "versions": ", ".join([f"Python {platform.python_version()}", *_versions()]),
        "seeds": "; ".join(
            f"{label}: {_range(seeds(settings, label, 'select'))} to select, "
            f"{_range(seeds(settings, label, 'confirm'))} to confirm"
            for label in labels
        ),
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "where": f"{platform.system()} {platform.machine()}, {settings.device}, "
        + (f"{workers} worker processes of one thread each" if workers else "one process, one thread"),
    }


def _versions() -> Iterable[str]:
    for package in _PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


def _range(numbers: tuple[int, ...]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _word(value: Any) -> list[str]:
    """What follows an option: nothing after a switch, and several values with commas."""
    if value is True:
        return []
    return [",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple) and not all(isinstance(part, str | float | int) for part in value):
        return "(train, validation, test)"
    return name_of(value) if callable(value) else repr(value)
