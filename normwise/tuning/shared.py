"""A study that several processes work on, on one machine or many, through one storage.

Every process is equal. It reads what is recorded, asks `next_requests` what is missing, and puts one request that
nobody has taken into Optuna's queue, as a trial that waits. Whoever changes its state from waiting to running, which
the database lets one do, runs it and writes its record. So each request is finished once, whoever dies on the way:

- Two processes may put the same request into the queue in one moment. The trial of the higher number is dropped.
- A trial that runs gives a sign of life every few seconds. Without one for a while it is marked as failed, which makes
  its request missing again. If the process was alive and only slow, its record comes too late and is refused.
- A storage that goes away is waited for, a minute, and then the study can be gone on with where it was.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import optuna
import sqlalchemy.exc
from optuna.exceptions import ExperimentalWarning, OptunaError, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from normwise.tuning import address
from normwise.tuning.progress import Progress
from normwise.tuning.records import Record, Request
from normwise.tuning.search import next_requests
from normwise.tuning.storage import Store, request_of
from normwise.tuning.trial import describe
from normwise.tuning.workers import Pool, Serial

PATIENCE_SECONDS = 60.0  # with a storage that has gone away
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # between two tries to reach it
_IDLE_SECONDS, _BUSY_SECONDS = 0.1, 1.0  # between two looks at what the others do: with nothing to run, and meanwhile
_PASSING = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, sqlalchemy.exc.TimeoutError)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Claim:
    """A trial that this process, and no other, runs."""

    trial_id: int
    request: Request


class Queue:
    """The requests of a study, as one of the processes that work on it sees them.

    `say` is told, in words, what a person should know. `chance` is the loss of the best constant prediction.
    """

    def __init__(self, store: Store, chance: float | None, say: Callable[[str], None]) -> None:
        self._store, self._chance, self._say = store, chance, say
        self._wanted: tuple[Request, ...] = ()  # missing when it was last asked
        self._records: dict[Request, Record] = {}
        self._asked = -1  # how many records there were then
        self._told = 0  # of the records
        self._requests: dict[int, Request | None] = {}  # by trial number
        self._open: frozenset[int] = frozenset()  # trials that this process runs
        self._swept = -math.inf  # when the trials of dead workers were last looked for

    @property
    def complete(self) -> bool:
        """Whether the last `claim` found nothing missing: not to be run, and not being run by anybody."""
        return not self._wanted

    def claim(self) -> Claim | None:
        """A trial to run; None when all that is missing is being run, here or elsewhere.

        Raises StudyError when the storage stays away, or no longer has the study.
        """
        self._fail_stale()
        while True:
            trials = self._read()
            for trial in trials:
                request = self._request(trial) if trial.state == TrialState.WAITING else None
                if request is None or not self._take(trial):
                    continue
                if request not in self._taken(earlier for earlier in trials if earlier.number < trial.number):
                    return Claim(trial._trial_id, request)
                self._fail(trial._trial_id)
            free = self._free(trials)
            if not free:
                return None
            self._enqueue(secrets.choice(free))  # the first would be that of all who choose in this moment

    def keep(self, claim: Claim, record: Record) -> bool:
        """Finish a trial with its record; False where it was given to another worker meanwhile, who finishes it."""
        try:
            self._patiently(lambda: self._store.finish(claim.trial_id, record))
        except UpdateFinishedTrialError:  # by others, as failed; or by us, in a try whose answer was lost
            trial = self._patiently(lambda: self._store.storage.get_trial(claim.trial_id))
            return bool(trial.state != TrialState.FAIL)
        finally:
            self._open -= {claim.trial_id}
        return True

    def give_back(self) -> None:
        """Let others run what this process has claimed. Where the storage is away, they notice by themselves."""
        for trial_id in self._open:
            with suppress(OptunaError, sqlalchemy.exc.SQLAlchemyError, KeyError):
                self._store.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        self._open = frozenset()

    def fresh(self) -> list[Record]:
        """The records, of all processes, that have come since the last call."""
        before, self._told = self._told, len(self._records)
        return list(self._records.values())[before:]

    def refresh(self) -> None:
        """Look at what the others have done."""
        self._read()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give a sign of life for every claimed trial now and then; give back at the end what is not finished."""
        ended = threading.Event()
        thread = threading.Thread(target=self._beat_until, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            self.give_back()
            thread.join(timeout=1.0)  # no longer, if the storage is away

    def _beat_until(self, ended: threading.Event) -> None:
        while not ended.wait(address.HEARTBEAT_SECONDS):
            for trial_id in self._open:
                with suppress(OptunaError, sqlalchemy.exc.SQLAlchemyError):  # the next may get through
                    self._store.storage.record_heartbeat(trial_id)

    def _read(self) -> list[FrozenTrial]:
        trials = self._patiently(lambda: self._store.study.get_trials(deepcopy=False))
        for record in self._store.read(trials):
            self._records.setdefault(record.request, record)
        return trials

    def _request(self, trial: FrozenTrial) -> Request | None:
        if trial.number not in self._requests:
            self._requests[trial.number] = request_of(trial)
        return self._requests[trial.number]

    def _taken(self, trials: Iterable[FrozenTrial]) -> set[Request | None]:
        """What waits, runs, or has been finished."""
        return {self._request(trial) for trial in trials if trial.state != TrialState.FAIL}

    def _free(self, trials: list[FrozenTrial]) -> list[Request]:
        """What is missing and neither waits nor runs."""
        taken = self._taken(trials)
        free = [request for request in self._wanted if request not in taken]
        if not free and len(self._records) != self._asked:
            self._asked = len(self._records)
            self._wanted = next_requests(self._store.settings, self._records.values(), chance=self._chance)
            free = [request for request in self._wanted if request not in taken]
        return free

    def _take(self, trial: FrozenTrial) -> bool:
        """Change a trial from waiting to running, if nobody has; its first sign of life comes before that.

        A process killed in between leaves a trial that waits, and one that runs has always given a sign.
        """
        storage, trial_id = self._store.storage, trial._trial_id
        try:
            self._patiently(lambda: storage.record_heartbeat(trial_id))
            taken = self._patiently(lambda: storage.set_trial_state_values(trial_id, TrialState.RUNNING))
        except UpdateFinishedTrialError:
            return False
        if taken:
            self._open |= {trial_id}
        return bool(taken)

    def _enqueue(self, request: Request) -> None:
        self._patiently(lambda: self._store.enqueue(request))

    def _fail(self, trial_id: int) -> None:
        with suppress(UpdateFinishedTrialError):
            self._patiently(lambda: self._store.storage.set_trial_state_values(trial_id, TrialState.FAIL))
        self._open -= {trial_id}

    def _fail_stale(self) -> None:
        """Mark the trials of dead workers as failed; once in a while, not at every claim."""
        if time.monotonic() - self._swept < address.HEARTBEAT_SECONDS:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._patiently(lambda: optuna.storages.fail_stale_trials(self._store.study))
        self._swept = time.monotonic()

    def _patiently(self, operation: Callable[[], Result]) -> Result:
        """The operation's result; while the storage is away it is tried again, up to a minute."""
        deadline, pause = time.monotonic() + PATIENCE_SECONDS, _FIRST_PAUSE
        while True:
            try:
                return operation()
            except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
                if time.monotonic() + pause > deadline or not isinstance(error.__cause__ or error, _PASSING):
                    with self._store.reached():
                        raise
                if pause == _FIRST_PAUSE:
                    where = address.shown(self._store.url)
                    self._say(f"{where} does not answer; it is tried again for {PATIENCE_SECONDS:g} s")
            except KeyError:
                with self._store.reached():
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def work(queue: Queue, runner: Serial | Pool, view: Progress) -> int:
    """Run what a study lacks, until nothing is missing anywhere; the number of trials finished here.

    Raises StudyError when a trial fails here or the storage stays away; what is claimed is given back.
    """
    running: dict[Future[Record], Claim] = {}
    mine = 0
    with queue.alive():
        while True:
            while len(running) < runner.size and (claim := queue.claim()) is not None:
                running[runner.submit(claim.request)] = claim
            for record in queue.fresh():
                view.finished(record)
            if not running and queue.complete:
                return mine
            for future in _ended(running, queue, runner):
                claim = running.pop(future)
                kept = queue.keep(claim, runner.result(future))
                mine += kept
                if not kept:
                    view.say(f"too late: {describe(claim.request)}, was given to another worker; the result is dropped")


def _ended(running: dict[Future[Record], Claim], queue: Queue, runner: Serial | Pool) -> set[Future[Record]]:
    """Trials that have ended here, after waiting a while for one."""
    if not running:
        time.sleep(_IDLE_SECONDS)
        return set()
    pause = _BUSY_SECONDS if len(running) == runner.size else _IDLE_SECONDS
    done = wait(running, timeout=pause, return_when=FIRST_COMPLETED).done
    if not done:
        queue.refresh()
    return done
