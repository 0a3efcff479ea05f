"""The study in Optuna's storage: its settings, what was noted of it, and its trials, one transaction each.

A trial is written when it has finished, in one call, so that killing the process at any moment loses the trials in
flight and nothing else. A diverged trial is stored as pruned: it has no score, and it is data, not a failure. A study
that several machines share has trials that wait or run as well; `shared` tells of those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from normwise.errors import NormwiseError, StudyError
from normwise.tuning.address import connect, purged, shown
from normwise.tuning.records import Record, Request, Settings

_RATES = FloatDistribution(1e-30, 1e30, log=True)
_WHOLE = IntDistribution(0, 2**62)
_PHASES = ("select", "confirm", "horizon")
_RECORD, _REQUEST, _SETTINGS, _FACTS, _SECONDS = "record", "request", "settings", "facts", "seconds"
KEPT = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Store:
    """An Optuna study that holds the records of one normwise study."""

    study: optuna.Study
    storage: Any
    settings: Settings  # that it was started with
    facts: dict[str, str]  # what it was started on: data, model, and what was fixed
    url: str | None = None
    _read: dict[int, Record] = field(default_factory=dict)  # by trial number; a finished trial never changes

    def reached(self) -> AbstractContextManager[None]:
        """What the storage raises in here becomes one line."""
        return reached(self.url)

    def seconds(self) -> float:
        """Wall time spent so far, by all runs of this study."""
        return float(self.study.user_attrs.get(_SECONDS, 0.0))

    def spend(self, seconds: float) -> None:
        """Add to the wall time."""
        with self.reached():
            self.study.set_user_attr(_SECONDS, self.seconds() + seconds)

    def note(self, name: str, value: Any) -> None:
        """Write down something about the whole study, as plain data."""
        with self.reached():
            self.study.set_user_attr(name, value)

    def recall(self, name: str) -> Any:
        """What was written down under a name, None if nothing."""
        with self.reached():
            return self.study.user_attrs.get(name)

    def discard(self) -> None:
        """Remove the study from the storage."""
        with self.reached():
            optuna.delete_study(study_name=self.study.study_name, storage=self.storage)

    def alone(self) -> bool:
        """Whether no trial waits or runs, here or elsewhere."""
        with self.reached():
            return all(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))

    def records(self) -> list[Record]:
        """Every finished trial, in the order they were begun; one that two machines ran counts once."""
        with self.reached():
            trials = self.study.get_trials(deepcopy=False)
        return self.read(trials)

    def read(self, trials: list[FrozenTrial]) -> list[Record]:
        """The records of those that are finished, likewise."""
        records: dict[Request, Record] = {}
        for trial in trials:
            if trial.state in KEPT and _RECORD in trial.user_attrs:
                if trial.number not in self._read:
                    self._read[trial.number] = Record.from_dict(trial.user_attrs[_RECORD])
                record = self._read[trial.number]
                records.setdefault(record.request, record)
        return list(records.values())

    def add(self, record: Record) -> None:
        """Write one finished trial."""
        with self.reached():
            self.study.add_trial(_trial(record.request, self.settings, record))

    def enqueue(self, request: Request) -> None:
        """Write a trial that waits for somebody to run it."""
        self.study.add_trial(_trial(request, self.settings))

    def finish(self, trial_id: int, record: Record) -> None:
        """Finish a trial that is running; Optuna's UpdateFinishedTrialError if it is no longer."""
        state, value = _end(record)
        self.storage.set_trial_user_attr(trial_id, _RECORD, record.to_dict())
        self.storage.set_trial_state_values(trial_id, state, None if value is None else [value])


def request_of(trial: FrozenTrial) -> Request | None:
    """What a trial was asked for; None for a trial that somebody else put into the study."""
    if _REQUEST in trial.user_attrs:
        return Request.from_dict(trial.user_attrs[_REQUEST])
    return Request.from_dict(trial.user_attrs[_RECORD]["request"]) if _RECORD in trial.user_attrs else None


def create(
    url: str | None,
    name: str,
    settings: Settings,
    facts: dict[str, str],
    *,
    notes: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Store:
    """A new study in a storage (None: in memory); `replace` deletes one of the same name first.

    The settings are written last, after facts and notes: a study that has them has all that a worker asks for.

    Raises StudyError when the storage cannot be reached, or has a study of that name.
    """
    with reached(url):
        storage = connect(url)
        if replace and name in optuna.get_all_study_names(storage):
            optuna.delete_study(study_name=name, storage=storage)
        direction = StudyDirection.MAXIMIZE if settings.direction == "max" else StudyDirection.MINIMIZE
        try:
            study = optuna.create_study(storage=storage, study_name=name, direction=direction)
        except optuna.exceptions.DuplicatedStudyError:
            raise StudyError(
                f"the storage has a study named {name!r} already: --resume goes on with it, --force replaces it"
            ) from None
        for key, value in {_FACTS: facts, **(notes or {})}.items():
            study.set_user_attr(key, value)
        study.set_user_attr(_SETTINGS, settings.to_dict())
    return Store(study, storage, settings, facts, url)


def begun(url: str, name: str) -> bool:
    """Whether a storage holds the study, and all of it that is written before the first trial.

    Raises StudyError when the storage cannot be reached.
    """
    with reached(url):
        storage = connect(url)
        known = name in optuna.get_all_study_names(storage)
        return known and _SETTINGS in optuna.load_study(study_name=name, storage=storage).user_attrs


def open_study(url: str, name: str) -> Store:
    """A study that is there.

    Raises StudyError when the storage cannot be reached, or has no such study.
    """
    with reached(url):
        storage = connect(url)
        if name not in optuna.get_all_study_names(storage):
            raise StudyError(f"{shown(url)} has no study named {name!r} to resume: leave --resume out to start it")
        study = optuna.load_study(study_name=name, storage=storage)
        known = study.user_attrs
    if _SETTINGS not in known:
        raise StudyError(f"the study {name!r} was not written by normwise, or was killed while it began: use --force")
    return Store(study, storage, Settings.from_dict(known[_SETTINGS]), dict(known[_FACTS]), url)


@contextmanager
def reached(url: str | None) -> Iterator[None]:
    """Turn what a storage raises into one line, without its password."""
    try:
        yield
    except NormwiseError:
        raise
    except KeyError:
        raise StudyError(f"the study is no longer in {shown(url)}: it was deleted") from None
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, OSError, ValueError) as error:
        raise StudyError(f"{shown(url)} cannot be used: {purged(reason(error), url)}") from error


def reason(error: BaseException) -> str:
    """What a database says, in one line; Optuna wraps it once, SQLAlchemy once more."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else None
    said = cause or error
    return str(getattr(said, "orig", None) or said).strip().splitlines()[0]


def _trial(request: Request, settings: Settings, record: Record | None = None) -> FrozenTrial:
    """A finished trial, or one that waits."""
    axes = dict(settings.axes)
    params: dict[str, Any] = {"norm": request.norm, "lr": request.lr, "seed": request.seed, "phase": request.phase}
    distributions: dict[str, BaseDistribution] = {
        "norm": CategoricalDistribution(tuple(label for label, _ in settings.norms)),
        "lr": _RATES,
        "seed": _WHOLE,
        "phase": CategoricalDistribution((*_PHASES, "control") if settings.control else _PHASES),
    }
    if request.steps is not None:
        params["steps"], distributions["steps"] = request.steps, _WHOLE
    for name, own in request.variant:
        params[name], distributions[name] = own, CategoricalDistribution(axes[name])
    state, value = (TrialState.WAITING, None) if record is None else _end(record)
    attributes = {_REQUEST: asdict(request)} if record is None else {_RECORD: record.to_dict()}
    return create_trial(state=state, value=value, params=params, distributions=distributions, user_attrs=attributes)


def _end(record: Record) -> tuple[TrialState, float | None]:
    return (TrialState.PRUNED if record.score is None else TrialState.COMPLETE), record.score
