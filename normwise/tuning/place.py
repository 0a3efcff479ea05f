"""How and where a study runs, which its outcome does not depend on, and whether it may."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from normwise.errors import StudyError
from normwise.tuning import output
from normwise.tuning.workers import default_workers


@dataclass(frozen=True)
class Place:
    """How and where a study runs."""

    workers: int | None = None  # None: one a core; 0: no worker process
    storage: str | None = None  # that several machines may share; None: a file in `out`
    out: Path | None = None
    resume: bool = False
    force: bool = False
    study: str | None = None  # its name in the storage
    name: str = "study"  # the same where nobody says
    measures: bool = True  # look into one more training of each normalization at the end

    @property
    def url(self) -> str | None:
        """The address of Optuna's storage; None: in memory."""
        if self.storage is not None or self.out is None:
            return self.storage
        return f"sqlite:///{(self.out / output.STUDY).absolute()}"

    def count(self, device: str) -> int:
        """The number of worker processes."""
        return default_workers(device) if self.workers is None else self.workers

    @property
    def study_name(self) -> str:
        """The study's name in the storage."""
        return "normwise" if self.storage is None else self.study or self.name


def check_place(place: Place) -> None:
    """Refuse what cannot be written to before anything is computed. Raises StudyError."""
    check_words(place)
    if place.out is None:
        return
    output.check(place.out, resume=place.resume, force=place.force)
    if place.resume and place.storage is None and not (place.out / output.STUDY).is_file():
        raise StudyError(f"{place.out} has no study to resume: leave --resume out to start one")


def check_words(place: Place) -> None:
    """Refuse what contradicts itself, wherever it would be written. Raises StudyError."""
    _check_workers(place)
    if place.resume and place.force:
        raise StudyError("resume goes on with a study, force replaces it: choose one")
    if place.resume and place.url is None:
        raise StudyError("there is nothing to resume: give the out folder or the storage of the study")
    if place.study is not None and place.storage is None:
        raise StudyError(f"study={place.study!r} names a study in a storage: give the storage as well")


def check_worker(place: Place) -> None:
    """Refuse what a worker cannot do: it joins a study that is named, and writes into the storage alone.

    Raises StudyError that names the option.
    """
    _check_workers(place)
    for name in ("storage", "study"):
        if getattr(place, name) is None:
            raise StudyError(f"a worker joins a study that others can reach: give its {name}")
    for name in ("out", "resume", "force"):
        if getattr(place, name):
            raise StudyError(f"{name} does nothing with worker: a worker writes into the storage alone")


def _check_workers(place: Place) -> None:
    if place.workers is not None and place.workers < 0:
        raise StudyError(f"workers={place.workers}: must be 0 (this process) or more")
