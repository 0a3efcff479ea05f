"""What a shared study writes down of itself, and how a worker joins it by that.

A worker brings code (model, data, training loop, loss), which it finds by the names in the study, or is given where the
study was begun in Python with things that have no name in a shell. All else comes from the study.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import optuna

from normwise.errors import StudyError
from normwise.tuning.address import connect, shown
from normwise.tuning.data import Source
from normwise.tuning.models import Factory
from normwise.tuning.options import Options
from normwise.tuning.prepare import DEFAULT_DATA, DEFAULT_MODEL, Plan, make_plan
from normwise.tuning.records import Measures
from normwise.tuning.reproduce import reproduction
from normwise.tuning.storage import Store, begun, open_study, reached
from normwise.tuning.trial import OwnLoop

ASKED, BACKGROUND, MEASURES = "asked", "background", "measures"  # the names in the storage
WAIT_SECONDS = 60.0  # for a study that has not begun
_LOOK_SECONDS = 1.0
_CODE = {"model": DEFAULT_MODEL, "data": DEFAULT_DATA, "train": None}  # what it is when nobody says


@dataclass(frozen=True)
class Asked:
    """What a study is asked for, as the user wrote it; `tune` documents each."""

    model: str | Factory = DEFAULT_MODEL
    data: Source = DEFAULT_DATA
    train: str | OwnLoop | None = None
    options: Options = field(default_factory=Options)

    def plan(self) -> Plan:
        """The study, checked and tried. Raises StudyError that names the culprit."""
        return make_plan(self.model, self.data, self.train, self.options)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what has no name in a shell is None, and listed as such."""
        code = {name: getattr(self, name) for name in _CODE}
        nameless = [name for name, value in code.items() if not (value is None or isinstance(value, str))]
        options = {f.name: getattr(self.options, f.name) for f in fields(Options)}
        if not isinstance(options["loss"], str):
            nameless.append("loss")
        if not isinstance(options["lrs"], str):
            options["lrs"] = [float(lr) for lr in options["lrs"]]
        plain = {name: None if name in nameless else value for name, value in {**code, **options}.items()}
        return {**plain, "nameless": nameless}


@dataclass(frozen=True)
class Background:
    """What a report says besides the trials: found before the first of them, or measured after the last."""

    chance: float | None
    described: dict[str, str]  # by label
    parameters: dict[str, int]  # by label
    reproduce: dict[str, str]
    ms_per_step: dict[str, float | None] | None = None  # by label

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def background(plan: Plan, command: str, workers: int, times: dict[str, float | None] | None = None) -> Background:
    """What is known of a plan."""
    return Background(
        chance=plan.problem.chance,
        described={label: check.described for label, check in plan.checks.items()},
        parameters={label: check.parameters for label, check in plan.checks.items()},
        reproduce=reproduction(plan.settings, command, workers),
        ms_per_step=times,
    )


def background_in(store: Store) -> Background:
    """What was written down of a study. Raises StudyError for a study of a normwise that did not."""
    noted = store.recall(BACKGROUND)
    if noted is None:
        raise StudyError(
            f"the study {store.study.study_name!r} was begun by an older normwise, which kept no more than its trials: "
            "go on with it where it was begun, with --resume"
        )
    return Background(**noted)


def measures_in(store: Store) -> dict[str, Measures] | None:
    """What was measured inside the trainings, by label; None: nothing yet."""
    noted = store.recall(MEASURES)
    return None if noted is None else {label: Measures.from_dict(found) for label, found in noted.items()}


def await_study(url: str, name: str, seconds: float, say: Callable[[str], None]) -> Store:
    """The study, as soon as it has begun.

    Raises StudyError when it has not within the seconds, with the names of the studies that there are.
    """
    deadline = time.monotonic() + seconds
    if not begun(url, name) and seconds > 0:
        say(f"waiting up to {seconds:g} s for the study {name!r} to begin in {shown(url)}")
    while not begun(url, name):
        if time.monotonic() >= deadline:
            raise StudyError(f"{shown(url)} has no study named {name!r}; {_names(url)}")
        time.sleep(min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic())))
    return open_study(url, name)


def joined(given: Asked, store: Store) -> Asked:
    """What a worker runs: its own code where it was given some, and everything else as the study has it.

    Raises StudyError for options, which are the study's alone, and for code that the study cannot name.
    """
    name, noted = store.study.study_name, store.recall(ASKED)
    if noted is None:
        raise StudyError(f"the study {name!r} was begun by an older normwise: only --resume goes on with it")
    own = {part: getattr(given, part) for part, default in _CODE.items() if _said(getattr(given, part), default)}
    if _said(given.options.loss, Options.loss):
        own["loss"] = given.options.loss
    _check_options(given.options)
    missing = [part for part in noted["nameless"] if part not in own]
    if missing:
        raise StudyError(
            f"the study {name!r} was begun in Python with a {' and a '.join(missing)} that has no name in a shell; "
            f"join it from Python: nw.tune(make_model, data, storage=..., study={name!r}, worker=True)"
        )
    merged = {**noted, **own}
    code = {part: merged[part] for part in _CODE}
    return Asked(**code, options=_options({f: merged[f] for f in merged if f not in (*_CODE, "nameless")}))


def check_same(plan: Plan, store: Store, way_out: str) -> None:
    """Refuse to go on with a study on other settings, another model or other data; `way_out` says what to do."""
    different = plan.settings.differences(store.settings)
    if different:
        pairs = ", ".join(f"{name} ({mine!r}, was {theirs!r})" for name, (mine, theirs) in different.items())
        raise StudyError(f"the study was started with other settings: {pairs}; {way_out}")
    for fact in ("data fingerprint", "model"):
        if plan.facts.get(fact) != store.facts.get(fact):
            raise StudyError(
                f"the study was started with another {fact}: {plan.facts.get(fact)}, was {store.facts.get(fact)}"
            )


def _check_options(options: Options) -> None:
    for f in fields(Options):
        value = getattr(options, f.name)
        if f.name != "loss" and _said(value, f.default):
            raise StudyError(
                f"{f.name.replace('_', '-')}={value} does nothing with worker: the study says what is run; leave it out"
            )


def _said(value: Any, default: Any) -> bool:
    """Whether somebody said this; an array is no default, and is not compared item by item."""
    return not (value is default or (isinstance(value, str | int | float) and value == default))


def _options(noted: dict[str, Any]) -> Options:
    try:
        return Options(**noted).plain()
    except TypeError as error:
        raise StudyError(f"the study is of another version of normwise: {error}") from error


def _names(url: str) -> str:
    with reached(url):
        names = sorted(optuna.get_all_study_names(connect(url)))
    return f"there are {', '.join(names)}" if names else "there is none at all"
