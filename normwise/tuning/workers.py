"""Trials in worker processes: one torch thread each, the problem sent once, no worker left behind.

loky starts fresh interpreters, so that a script needs no `if __name__ == "__main__"`, and cloudpickle carries functions
defined in a notebook.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from types import TracebackType
from typing import Any, Self

import cloudpickle
import loky
import torch
from loky.process_executor import ProcessPoolExecutor

from normwise.errors import StudyError
from normwise.tuning.records import Record, Request
from normwise.tuning.seeding import one_thread
from normwise.tuning.trial import Problem, run
from normwise.tuning.user import blame

MOST_WORKERS = 32
_THREADS = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
_WATCH_SECONDS = 0.2


def default_workers(device: str) -> int:
    """One worker a core, 32 at most; one on an accelerator, whose memory and time they would share.

    >>> default_workers("cuda")
    1
    """
    return min(loky.cpu_count(), MOST_WORKERS) if device == "cpu" else 1


def pack(problem: Problem) -> bytes | None:
    """The problem as bytes for a worker, or None when part of it cannot be sent to another process."""
    try:
        return cloudpickle.dumps(problem)  # type: ignore[no-any-return]
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError):
        return None  # what pickle raises for locks, generators, open files, ... is no one type


class Serial(AbstractContextManager["Serial"]):
    """Trials one after the other in this process, with one thread as in a worker."""

    size = 1  # trials at a time

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def run(self, requests: Iterable[Request]) -> Iterator[Record]:
        """The records, in the order of the requests."""
        for request in requests:
            yield self.result(self.submit(request))

    def submit(self, request: Request) -> Future[Record]:
        """Run a trial, to its end."""
        future: Future[Record] = Future()
        with one_thread():
            future.set_result(run(self._problem, request))
        return future

    def result(self, future: Future[Record]) -> Record:
        """The record of a trial."""
        return future.result()

    def __exit__(self, *_: object) -> None:
        pass


class Pool(AbstractContextManager["Pool"]):
    """Trials in worker processes, as many at a time as there are workers."""

    def __init__(self, packed: bytes, workers: int) -> None:
        self.size = workers
        self._executor = ProcessPoolExecutor(
            max_workers=workers, initializer=_start, initargs=(packed, tuple(sys.path), os.getpid()), env=_THREADS
        )

    def run(self, requests: Iterable[Request]) -> Iterator[Record]:
        """The records, as they finish.

        Raises StudyError when a trial fails, or when a worker dies, as it does when memory runs out.
        """
        for future in as_completed([self.submit(request) for request in requests]):
            yield self.result(future)

    def submit(self, request: Request) -> Future[Record]:
        """Hand a trial to the workers, and return at once."""
        with _interrupts_blocked(), _deaths_told():
            return self._executor.submit(_work, request)  # type: ignore[no-any-return]

    def result(self, future: Future[Record]) -> Record:
        """The record of a trial that has ended.

        Raises StudyError when the trial failed, or when a worker died, as it does when memory runs out.
        """
        with _deaths_told():
            return future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True, kill_workers=kind is not None)


@contextmanager
def _deaths_told() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise StudyError(
            "a worker process died in the middle of a trial, most likely for want of memory; "
            "try fewer workers, or a smaller batch"
        ) from error


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Workers started here inherit a mask for SIGINT: Ctrl-C reaches the terminal's whole group, and is ours to handle.

    An interrupt that comes meanwhile is delivered afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where workers only ignore it once they have started
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ----------------------------------------------------------------------------------------------------- in the worker

_problem: dict[str, Any] = {}  # the packed problem, and the problem once a trial has unpacked it


def _start(packed: bytes, path: tuple[str, ...], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = path
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    _problem["packed"] = packed


def _exit_with(parent: int) -> None:
    """End this process when its parent is gone; a parent killed with SIGKILL tells nobody."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _work(request: Request) -> Record:
    if "packed" in _problem:
        unpacking = blame("the study could not be unpacked in a worker process (try workers=0):")
        with redirect_stdout(sys.stderr), unpacking:  # it imports the user's modules
            _problem["problem"] = pickle.loads(_problem.pop("packed"))  # noqa: S301 - written by the parent process
    return run(_problem["problem"], request)
