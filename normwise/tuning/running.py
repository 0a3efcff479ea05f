"""Running a plan to its end: the study in the storage, its trials, and what is said of it when it ends early."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from normwise.errors import StudyError
from normwise.tuning import output, storage
from normwise.tuning.address import shown, without_password
from normwise.tuning.joining import ASKED, BACKGROUND, Asked, Background, background, check_same
from normwise.tuning.place import Place
from normwise.tuning.prepare import Plan
from normwise.tuning.progress import Progress
from normwise.tuning.records import Record, Settings
from normwise.tuning.search import expected_trials, next_requests
from normwise.tuning.shared import Queue, work
from normwise.tuning.workers import Pool, Serial, pack

_PHASES = ("select", "confirm", "horizon", "control")
_SAME_SETTINGS = "resume with those, or start anew"


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C: the study has ended early, and its finished trials are kept. The message says how to go on."""


def open_store(asked: Asked, plan: Plan, place: Place) -> storage.Store:
    """The study in its storage, new or gone on with, and all that a worker or a report needs to know of it.

    Raises StudyError when it cannot be written, is there already, or was started on something else.
    """
    return _store(plan, place, {ASKED: asked.to_dict(), BACKGROUND: background_here(plan, place).to_dict()})


def background_here(plan: Plan, place: Place, times: dict[str, float | None] | None = None) -> Background:
    """What is known of the study besides its trials; `times` are the milliseconds of a step by label."""
    return background(plan, full_command(plan, place), place.count(plan.settings.device), times)


def run_all(plan: Plan, place: Place, store: storage.Store, folder: output.Folder, view: Progress) -> list[Record]:
    """Every trial that the search asks for, those of an earlier run and of other machines included."""
    clock = _Clock(store)
    try:
        if place.storage is None:
            _run(plan, place, store, folder, view, clock)
        else:
            run_shared(plan, place, store, view)
    finally:
        view.stop()
        with suppress(StudyError):  # a storage that has gone away is what the study ends with, or has come back
            clock.tick(least=0.0)
    folder.keep()
    return ordered(plan.settings, store.records())


def run_shared(plan: Plan, place: Place, store: storage.Store, view: Progress) -> int:
    """Run what is missing, beside whoever else does; the number of trials finished here."""
    queue = Queue(store, plan.problem.chance, view.say)
    queue.refresh()
    records = queue.fresh()
    view.start(max(expected_trials(plan.settings), len(records)), records)
    with _runner(plan, place, view) as runner:
        return work(queue, runner, view)


class _Clock:
    """Writes down the time that a study takes as it passes: a process that is killed loses seconds of it."""

    def __init__(self, store: storage.Store) -> None:
        self._store, self._noted = store, time.monotonic()

    def tick(self, least: float = 5.0) -> None:
        """Write down what has passed, if it is so many seconds."""
        passed = time.monotonic() - self._noted
        if passed >= least:
            self._store.spend(passed)
            self._noted += passed


def _run(plan: Plan, place: Place, store: storage.Store, folder: output.Folder, view: Progress, clock: _Clock) -> None:
    records = store.records()
    view.start(max(expected_trials(plan.settings), len(records)), records)
    with _runner(plan, place, view) as runner:
        while requests := next_requests(plan.settings, records, chance=plan.problem.chance):
            for record in runner.run(requests):
                store.add(record)
                folder.keep()
                records.append(record)
                view.finished(record)
                clock.tick()


def _runner(plan: Plan, place: Place, view: Progress) -> Serial | Pool:
    workers = place.count(plan.settings.device)
    packed = pack(plan.problem) if workers else None
    if workers and packed is None:
        view.say("part of the study cannot be sent to worker processes; the trials run in this one")
    return Serial(plan.problem) if packed is None else Pool(packed, workers)


def ordered(settings: Settings, records: list[Record]) -> list[Record]:
    """The records by phase, normalization, learning rate, seed, steps and variant, whoever finished first."""
    labels = [label for label, _ in settings.norms]

    def key(record: Record) -> tuple[int, int, float, int, int, str]:
        asked = record.request
        place = _PHASES.index(asked.phase), labels.index(asked.norm)
        return *place, asked.lr, asked.seed, asked.steps or 0, repr(asked.variant)

    return sorted(records, key=key)


def _store(plan: Plan, place: Place, notes: dict[str, Any]) -> storage.Store:
    new = partial(storage.create, place.url, place.study_name, plan.settings, plan.facts, notes=notes)
    if not place.resume or place.url is None:
        return new(replace=place.force)
    if place.storage is None and not storage.begun(place.url, place.study_name):  # killed in its first moments
        return new(replace=True)
    store = storage.open_study(place.url, place.study_name)
    check_same(plan, store, _SAME_SETTINGS)
    for name, value in notes.items():
        store.note(name, value)
    return store


# ------------------------------------------------------------------------------------------- a study that ends early


@contextmanager
def told(plan: Plan, place: Place, store: storage.Store) -> Iterator[None]:
    """Say in the error what is kept and how to go on; a new study without a finished trial is not kept."""
    try:
        yield
    except (KeyboardInterrupt, StudyError) as error:
        message = _kept(plan, place, store)
        if isinstance(error, KeyboardInterrupt):
            raise StudyInterrupted(f"interrupted; {message}") from None
        raise StudyError(f"{error}; {message}") from error


def _kept(plan: Plan, place: Place, store: storage.Store) -> str:
    try:
        count, alone = len(store.records()), store.alone()
    except StudyError:
        return f"what had finished is kept; go on with {_resume(plan, place)}"
    if count == 0 and alone and not place.resume:
        store.discard()
        return "no trial had finished, nothing is kept"
    if place.url is None:
        return "nothing is kept without an out folder or a storage"
    where = shown(place.storage) if place.storage else place.out
    return f"{count} finished trials are kept in {where}; go on with {_resume(plan, place)}"


def _resume(plan: Plan, place: Place) -> str:
    if plan.command.startswith("nw.tune("):
        return "resume=True"
    return " ".join([full_command(plan, place), "--resume"])


def full_command(plan: Plan, place: Place) -> str:
    """The command with its folder and storage; a password is not repeated."""
    if plan.command.startswith("nw.tune("):
        return plan.command
    words = ["--storage", without_password(place.storage)] if place.storage else []
    words += ["--study", place.study] if place.study else []
    words += ["--out", str(place.out)] if place.out else []
    return " ".join([plan.command, shlex.join(words)]).strip()
