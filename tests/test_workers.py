"""Worker processes: the same records as in this process, what can be sent, what happens when one dies."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normwise.errors import StudyError
from normwise.tuning.models import Architecture
from normwise.tuning.norms import NormChoice
from normwise.tuning.records import Record, Request, Settings
from normwise.tuning.training import find_loss
from normwise.tuning.trial import Problem, Trial
from normwise.tuning.workers import Pool, Serial, default_workers, pack
from tests.settings import threads

SETTINGS = Settings("line", "own", (("none", "none"),), own_loop=True, steps=None, metric="score")
BROKEN = Request("select", "none", 9.0, 0, None)
REQUESTS = [Request("select", "none", lr, 0, None) for lr in (0.1, 0.2, 0.4)]


def problem(train: Any) -> Problem:
    line = Architecture("line", lambda norm: nn.Linear(2, 2), True, {})
    choices = {"none": NormChoice("none", "none")}
    return Problem(SETTINGS, line, choices, find_loss("mse"), None, None, train)


def packed(train: Any) -> bytes:
    data = pack(problem(train))
    assert data is not None
    return data


def report(model: nn.Module, *, lr: float, seed: int, trial: Trial) -> float:
    """A score from the seed and the rate, and what can be seen of the process that computes it."""
    if lr == BROKEN.lr:
        raise RuntimeError("out of luck")
    trial.log(0, torch.get_num_threads())
    trial.log(1, float(os.environ.get("OMP_NUM_THREADS", "0")))
    trial.log(2, signal.getsignal(signal.SIGINT) == signal.SIG_IGN)
    trial.log(3, float(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)
    trial.log(4, os.getpid())
    return lr + sum(p.sum().item() for p in model.parameters())


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(packed(report), 2) as pool:
        yield pool


def test_workers_and_this_process_agree(pool: Pool) -> None:
    there = sorted(pool.run(REQUESTS), key=lambda record: record.request.lr)
    again = sorted(pool.run(REQUESTS), key=lambda record: record.request.lr)
    with Serial(problem(report)) as serial:
        here = list(serial.run(REQUESTS))
    scores = [record.score for record in here]
    assert len(set(scores)) == 3
    assert [record.score for record in there] == [record.score for record in again] == scores
    assert [record.request for record in there] == REQUESTS


def test_a_worker_is_another_process_with_one_thread_and_no_interrupts(pool: Pool) -> None:
    seen = [dict(record.curve) for record in pool.run(REQUESTS)]
    assert {(one[0], one[1], one[2]) for one in seen} == {(1.0, 1.0, 1.0)}
    assert os.getpid() not in {one[4] for one in seen}
    assert signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_worker_needs_less_than_600_megabytes(pool: Pool) -> None:
    assert all(50 < dict(record.curve)[3] < 600 for record in pool.run(REQUESTS))


def test_a_failing_trial_is_the_studys_error(pool: Pool) -> None:
    with pytest.raises(StudyError, match=r"none at learning rate 9, seed 0, select\) raised RuntimeError: out of luck"):
        list(pool.run([BROKEN]))
    assert len(list(pool.run(REQUESTS))) == 3


def test_a_serial_trial_has_one_thread_too() -> None:
    with threads(2):
        with Serial(problem(report)) as serial:
            assert dict(next(iter(serial.run(REQUESTS))).curve)[0] == 1
        assert torch.get_num_threads() == 2


def test_what_cannot_be_pickled_cannot_be_packed() -> None:
    lock = threading.Lock()
    assert pack(problem(lambda model, **_: lock.locked())) is None


def test_a_dying_worker_is_a_clear_error_and_what_it_finished_is_kept() -> None:
    def die(model: nn.Module, *, lr: float, seed: int, trial: Trial) -> float:
        if lr > 0.3:
            os.kill(os.getpid(), signal.SIGKILL)
        return lr

    done: list[Record] = []
    with Pool(packed(die), 1) as pool:
        done.extend(pool.run(REQUESTS[:2]))
        with pytest.raises(StudyError) as caught:
            list(pool.run(REQUESTS[2:]))
    assert [record.score for record in done] == [0.1, 0.2]
    assert str(caught.value) == (
        "a worker process died in the middle of a trial, most likely for want of memory; "
        "try fewer workers, or a smaller batch"
    )


def test_the_default_is_a_worker_a_core() -> None:
    assert default_workers("cpu") == min(len(os.sched_getaffinity(0)), 32)
    assert default_workers("cuda:0") == 1
