"""Workers that share a study through one storage: they die, come late, collide, and it is the same study."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import postgres
import pytest
import torch
from shared_studies import call, outcomes, trials
from shared_studies import folder as folder
from shared_studies import server as server
from shared_studies import url as url
from torch import nn

from normwise.errors import StudyError
from normwise.study import gather, tune
from normwise.tuning import address, shared, storage
from normwise.tuning.records import Request
from normwise.tuning.shared import Queue

pytestmark = pytest.mark.skipif(not postgres.available(), reason="PostgreSQL is not installed")

# A worker that has died is noticed after two seconds here.
NORMWISE = """
from normwise.tuning import address
address.HEARTBEAT_SECONDS, address.GRACE_SECONDS = 1, 2
from normwise.cli import main
main()
"""
WORDS = ["--norms", "batch,none", "--lrs", "0.1:1:5", "--seeds", "2", "--confirm", "3"]
ASKED: dict[str, Any] = {"norms": "batch,none", "lrs": "0.1:1:5", "seeds": 2, "confirm": 3}
TRIALS = 2 * 5 * 2 + 2 * 3

SMALL: dict[str, Any] = {"norms": "batch,none", "lrs": (0.25, 1.0), "seeds": 1, "confirm": 2, "progress": False}
QUIET: dict[str, Any] = {**SMALL, "workers": 0}
Start = Callable[..., subprocess.Popen[str]]


def deep(norm: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), norm(2))


def score(model: nn.Module, lr: float, seed: int, trial: Any) -> float:
    return 50 + 10 * lr + torch.rand(1).item()


def at(call: int, action: Callable[[], None]) -> Callable[..., float]:
    """A training loop that does something at one of its calls, counted from 1."""
    calls: list[int] = []

    def train(model: nn.Module, lr: float, seed: int, trial: Any) -> float:
        calls.append(seed)
        if len(calls) == call:
            action()
        return score(model, lr, seed, trial)

    return train


def interrupt() -> None:
    raise KeyboardInterrupt


def score_as_begun() -> Callable[..., float]:
    """A loop that goes by the name of what `at` gives, and does nothing else."""
    return at(0, interrupt)


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Begin the command in a process of its own; none outlives the test."""
    begun: list[subprocess.Popen[str]] = []

    def start(*words: str, **environment: str) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", NORMWISE, *words]
        own = {**os.environ, **environment}
        begun.append(subprocess.Popen(command, cwd=folder, env=own, start_new_session=True, **pipes))
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_until(what: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finished(url: str, name: str) -> Counter[Any]:
    """How often each request was finished."""
    return Counter(storage.request_of(trial) for trial in trials(url, name) if trial.state in storage.KEPT)


@pytest.mark.slow
def test_four_workers_one_of_them_killed_and_the_study_is_the_same(
    url: str, folder: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--storage", url, "--study", "shared", "--workers", "0"]
    starter = start("tune", "loop:model", "--train", "loop:train", *WORDS, *place, "--out", "out")
    workers = [start("tune", *place, "--worker") for _ in range(2)]
    victim = start("tune", *place, "--worker", STUCK="1")
    wait_until(lambda: (folder / "stuck").exists(), starter, *workers, victim)
    wait_until(lambda: all((folder / f"calls-{one.pid}").exists() for one in (starter, *workers)), starter, *workers)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    (folder / "go").touch()
    said = [one.communicate(timeout=60) for one in (starter, *workers)]
    assert [one.returncode for one in (starter, *workers)] == [0, 0, 0], said
    _the_lost_trial_was_run_again(folder, victim.pid, [one.pid for one in (starter, *workers)], said)

    alone = tune("loop:model", train="loop:train", **ASKED, workers=0, progress=False)
    shared_ = gather(url, "shared")
    assert outcomes(shared_) == outcomes(alone)
    assert shared_.verdict == alone.verdict
    assert len(alone.records) == TRIALS
    assert set(finished(url, "shared").values()) == {1}
    assert len(finished(url, "shared")) == TRIALS

    texts = [text for pair in said for text in pair] + [path.read_text() for path in (folder / "out").iterdir()]
    assert all(postgres.PASSWORD not in text for text in texts)
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert f"--storage '{url.replace(postgres.PASSWORD, '***')}' --study shared" in summary["reproduce"]["command"]
    _the_report_can_be_made_anywhere(folder, url, summary, capsys)


def _the_lost_trial_was_run_again(folder: Path, victim: int, others: list[int], said: list[tuple[str, str]]) -> None:
    calls = {pid: (folder / f"calls-{pid}").read_text().splitlines() for pid in (victim, *others)}
    lost = calls[victim][2]
    assert [pid for pid in others if lost in calls[pid]] != []
    assert sum(map(len, calls.values())) == TRIALS + 1
    for pid, (out, _) in zip(others[1:], said[1:], strict=True):
        assert out == f"the study 'shared' is complete: {len(calls[pid])} of its {TRIALS} trials were run here\n"


def _the_report_can_be_made_anywhere(
    folder: Path, url: str, summary: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(elsewhere)
        patched.delitem(sys.modules, "loop")
        (folder / "loop.py").unlink()
        capsys.readouterr()
        assert call("report", "--storage", url, "--study", "shared", "--out", "here") == 0
        assert capsys.readouterr().out == "here/report.html\n"
    assert json.loads((elsewhere / "here" / "summary.json").read_text()) == summary
    for name in ("trials.csv", "report.html"):
        assert (elsewhere / "here" / name).read_text() == (folder / "out" / name).read_text()


@pytest.mark.slow
def test_two_processes_share_a_file_and_ctrl_c_gives_a_trial_back(folder: Path, start: Start) -> None:
    url = f"sqlite:///{folder / 'all.db'}"
    place = ["--storage", url, "--study", "shared"]
    worker = start("tune", *place, "--worker", "--workers", "1")  # it waits for the study
    words = [*WORDS, *place, "--workers", "1", "--out", "out"]
    starter = start("tune", "loop:model", "--train", "loop:train", *words)
    wait_until(lambda: len(list(folder.glob("calls-*"))) == 2, worker, starter)
    assert [trial.state.name for trial in trials(url, "shared")].count("RUNNING") == 2
    os.killpg(worker.pid, signal.SIGINT)
    out, err = worker.communicate(timeout=30)
    assert (worker.returncode, out) == (130, "")
    own = [line for line in err.splitlines() if "resource_tracker" not in line]  # joblib's, a process of its own
    assert own[-1] == "interrupted; what was running is given back to the study 'shared'"
    assert [trial.state.name for trial in trials(url, "shared")].count("FAIL") == 1
    (folder / "go").touch()
    out, err = starter.communicate(timeout=60)
    assert starter.returncode == 0, err
    assert set(finished(url, "shared").values()) == {1}
    assert len(finished(url, "shared")) == TRIALS


def test_many_threads_begin_and_finish_one_study(url: str) -> None:
    """Each with a connection of its own, all choosing the first request that is free, so that they collide."""
    whole = tune(deep, train=score, **QUIET)
    tune(deep, train=score, **QUIET, storage=url, study="done")  # makes the tables
    store = storage.create(url, "one", whole.settings, {})
    barrier, scores = threading.Barrier(4), {record.request: record for record in whole.records}
    errors: list[BaseException] = []

    class First:
        @staticmethod
        def choice(free: list[Request]) -> Request:
            return free[0]

    def run() -> None:
        try:
            queue = Queue(storage.open_study(url, "one"), None, errors.append)  # type: ignore[arg-type]
            barrier.wait()
            while (claim := queue.claim()) is not None or not queue.complete:
                if claim is not None:
                    assert queue.keep(claim, scores[claim.request])
        except BaseException as error:  # noqa: BLE001 - told to the test below
            errors.append(error)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shared, "secrets", First)
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert errors == []
    assert finished(url, "one") == Counter(scores.keys())
    assert {record.request: record.score for record in store.records()} == {r: s.score for r, s in scores.items()}


def test_a_restarted_database_is_waited_for(
    server: postgres.Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def restart() -> None:
        server.stop()
        threading.Timer(0.7, server.start).start()

    study = tune(deep, train=at(3, restart), **{**QUIET, "progress": True}, storage=url, study="one")
    assert outcomes(study) == outcomes(tune(deep, train=score, **QUIET))
    assert set(finished(url, "one").values()) == {1}
    hidden = url.replace(postgres.PASSWORD, "***")
    assert f"the storage {hidden} does not answer; it is tried again for 60 s\n" in capsys.readouterr().err


def test_a_database_that_stays_away_ends_the_study_and_loses_nothing(
    server: postgres.Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(address, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(address, "GRACE_SECONDS", 1)  # the trial that could not be given back is retried so soon
    with pytest.raises(StudyError) as caught:
        tune(deep, train=at(3, server.stop), **QUIET, storage=url, study="one")
    server.start()
    hidden = url.replace(postgres.PASSWORD, "***")
    text = str(caught.value)
    assert text.startswith(f"the storage {hidden} cannot be used: ")
    assert text.endswith("; what had finished is kept; go on with resume=True")
    assert postgres.PASSWORD not in text
    assert len(finished(url, "one")) == 2
    study = tune(deep, train=score_as_begun(), **QUIET, storage=url, study="one", resume=True)
    assert outcomes(study) == outcomes(tune(deep, train=score, **QUIET))


def test_two_studies_do_not_disturb_one_another(url: str) -> None:
    one = tune(deep, train=score, **QUIET, storage=url, study="one")
    two = tune(deep, train=lambda *_, lr, **__: 100 - lr, **QUIET, storage=url, study="two")
    assert outcomes(gather(url, "one")) == outcomes(one)
    assert outcomes(gather(url, "two")) == outcomes(two)
    assert outcomes(one) != outcomes(two)
    with pytest.raises(StudyError, match=r"has a study named 'one' already: --resume goes on with it, --force replace"):
        tune(deep, train=score, **QUIET, storage=url, study="one")
    tune(deep, train=score, **QUIET, storage=url, study="one", force=True)
    assert outcomes(gather(url, "two")) == outcomes(two)
