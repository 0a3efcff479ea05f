"""The study on disk: finished trials in Optuna's storage, one transaction each.

A trial is written when it has finished, in one call, so that killing the process at any moment loses the trials in
flight and nothing else. A diverged trial is stored as pruned: it has no score, and it is data, not a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import make_url

from normwise.errors import StudyError
from normwise.tuning.records import Record, Request, Settings

_RATES = FloatDistribution(1e-30, 1e30, log=True)
_WHOLE = IntDistribution(0, 2**62)
_PHASES = CategoricalDistribution(("select", "confirm", "horizon"))
_RECORD, _SETTINGS, _FACTS, _SECONDS = "record", "settings", "facts", "seconds"


@dataclass(frozen=True)
class Store:
    """An Optuna study that holds the records of one normwise study."""

    study: optuna.Study
    storage: Any
    settings: Settings  # that it was started with
    facts: dict[str, str]  # what it was started on: data, model, and what was fixed

    def seconds(self) -> float:
        """Wall time spent so far, by all runs of this study."""
        return float(self.study.user_attrs.get(_SECONDS, 0.0))

    def spend(self, seconds: float) -> None:
        """Add to the wall time."""
        with _reached("the storage"):
            self.study.set_user_attr(_SECONDS, self.seconds() + seconds)

    def discard(self) -> None:
        """Remove the study from the storage."""
        with _reached("the storage"):
            optuna.delete_study(study_name=self.study.study_name, storage=self.storage)

    def records(self) -> list[Record]:
        """Every finished trial, in the order they finished; one that two machines ran counts once."""
        records: dict[Request, Record] = {}
        for trial in self.study.get_trials(deepcopy=False):
            record = Record.from_dict(trial.user_attrs[_RECORD])
            records.setdefault(record.request, record)
        return list(records.values())

    def add(self, record: Record) -> None:
        """Write one finished trial."""
        with _reached("the storage"):
            self.study.add_trial(_trial(record, self.settings))


def create(url: str | None, name: str, settings: Settings, facts: dict[str, str], *, replace: bool = False) -> Store:
    """A new study in a storage (None: in memory); `replace` deletes one of the same name first.

    Raises StudyError when the storage cannot be reached, or has a study of that name.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = _connect(url)
    with _reached(shown(url)):
        names = optuna.get_all_study_names(storage)
        if name in names and not replace:
            raise StudyError(
                f"the storage has a study named {name!r} already: --resume goes on with it, --force replaces it"
            )
        if name in names:
            optuna.delete_study(study_name=name, storage=storage)
        direction = StudyDirection.MAXIMIZE if settings.direction == "max" else StudyDirection.MINIMIZE
        study = optuna.create_study(storage=storage, study_name=name, direction=direction)
        study.set_user_attr(_FACTS, facts)
        study.set_user_attr(_SETTINGS, settings.to_dict())
    return Store(study, storage, settings, facts)


def begun(url: str, name: str) -> bool:
    """Whether a storage holds the study, and all of it that is written before the first trial.

    Raises StudyError when the storage cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = _connect(url)
    with _reached(shown(url)):
        known = name in optuna.get_all_study_names(storage)
        return known and _SETTINGS in optuna.load_study(study_name=name, storage=storage).user_attrs


def open_study(url: str, name: str) -> Store:
    """A study that is there.

    Raises StudyError when the storage cannot be reached, or has no such study.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = _connect(url)
    with _reached(shown(url)):
        if name not in optuna.get_all_study_names(storage):
            raise StudyError(f"{shown(url)} has no study named {name!r} to resume: leave --resume out to start it")
        study = optuna.load_study(study_name=name, storage=storage)
        known = study.user_attrs
    if _SETTINGS not in known:
        raise StudyError(f"the study {name!r} was not written by normwise, or was killed while it began: use --force")
    return Store(study, storage, Settings.from_dict(known[_SETTINGS]), dict(known[_FACTS]))


def shown(url: str | None) -> str:
    """The storage's address without its password.

    >>> shown("postgresql://ada:secret@host/studies")
    'the storage postgresql://ada:***@host/studies'
    """
    if url is None:
        return "the storage in memory"
    try:
        return f"the storage {make_url(url).render_as_string(hide_password=True)}"
    except sqlalchemy.exc.ArgumentError:
        return "the storage"


def _connect(url: str | None) -> Any:
    with _reached(shown(url)):
        return optuna.storages.get_storage(url)


@contextmanager
def _reached(what: str) -> Iterator[None]:
    try:
        yield
    except StudyError:
        raise
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, OSError, ValueError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise StudyError(f"{what} cannot be used: {reason}") from error


def _trial(record: Record, settings: Settings) -> FrozenTrial:
    request = record.request
    params: dict[str, Any] = {"norm": request.norm, "lr": request.lr, "seed": request.seed, "phase": request.phase}
    distributions: dict[str, BaseDistribution] = {
        "norm": CategoricalDistribution(tuple(label for label, _ in settings.norms)),
        "lr": _RATES,
        "seed": _WHOLE,
        "phase": _PHASES,
    }
    if request.steps is not None:
        params["steps"], distributions["steps"] = request.steps, _WHOLE
    return create_trial(
        state=TrialState.PRUNED if record.score is None else TrialState.COMPLETE,
        value=record.score,
        params=params,
        distributions=distributions,
        user_attrs={_RECORD: record.to_dict()},
    )
