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

import optuna
import postgres
import pytest
import torch
from optuna.trial import TrialState
from torch import nn

from normwise import cli
from normwise.errors import StudyError
from normwise.study import Study, StudyInterrupted, gather, join, tune
from normwise.tuning import address, shared, storage
from normwise.tuning.joining import Asked
from normwise.tuning.place import Place
from normwise.tuning.records import Record, Request, Settings
from normwise.tuning.shared import Claim, Queue

pytestmark = pytest.mark.skipif(not postgres.available(), reason="PostgreSQL is not installed")

# A worker that has died is noticed after two seconds here.
NORMWISE = """
from normwise.tuning import address
address.HEARTBEAT_SECONDS, address.GRACE_SECONDS = 1, 2
from normwise.cli import main
main()
"""
LOOP = """
import os, time
from pathlib import Path
import torch

def model(norm):
    return torch.nn.Sequential(torch.nn.Linear(2, 2), norm(2))

def train(model, lr, seed, trial):
    with Path(f"calls-{os.getpid()}").open("a") as file:
        file.write(f"{trial.phase} {lr} {seed}\\n")
    if "STUCK" in os.environ and len(Path(f"calls-{os.getpid()}").read_text().splitlines()) == 3:
        Path("stuck").touch()
        time.sleep(600)
    while "STUCK" not in os.environ and not Path("go").exists():
        time.sleep(0.02)
    return 50 + 10 * lr + torch.rand(1).item()
"""
WORDS = ["--norms", "batch,none", "--lrs", "0.1:1:5", "--seeds", "2", "--confirm", "3"]
ASKED: dict[str, Any] = {"norms": "batch,none", "lrs": "0.1:1:5", "seeds": 2, "confirm": 3}
TRIALS = 2 * 5 * 2 + 2 * 3

SMALL: dict[str, Any] = {"norms": "batch,none", "lrs": (0.25, 1.0), "seeds": 1, "confirm": 2, "progress": False}
QUIET: dict[str, Any] = {**SMALL, "workers": 0}


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    with postgres.server() as running:
        yield running


@pytest.fixture
def url(server: postgres.Server, tmp_path: Path) -> str:
    """The address of an empty database."""
    return server.create(f"test_{tmp_path.name[-30:].strip('_').lower()}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "loop.py").write_text(LOOP)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "loop", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def call(*words: str) -> int:
    """Run the command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["normwise", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def wait_until(what: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def outcomes(study: Study) -> list[tuple[Request, float | None]]:
    return [(record.request, record.score) for record in study.records]


def trials(url: str, name: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=address.connect(url)).trials


def finished(url: str, name: str) -> Counter[Any]:
    """How often each request was finished."""
    return Counter(storage.request_of(trial) for trial in trials(url, name) if trial.state in storage.KEPT)


# ------------------------------------------------------------------------------------------------------ whole studies


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
    assert err.splitlines()[-1] == "interrupted; what was running is given back to the study 'shared'"
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


# --------------------------------------------------------------------------------------------------------- the queue

LITTLE = Settings("mlp", "digits", (("batch", "batch"),), lrs=(0.1, 0.2), seeds=1, confirm=2, steps=None)
FIRST, SECOND = (Request("select", "batch", lr, 0, None) for lr in (0.1, 0.2))


def told(message: str) -> None:
    raise AssertionError(message)


@pytest.fixture(params=["postgresql", "sqlite"])
def address_(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'shared.db'}"
    return str(request.getfixturevalue("url"))


def queues(url: str) -> tuple[Queue, Queue]:
    storage.create(url, "one", LITTLE, {})
    first, second = (Queue(storage.open_study(url, "one"), None, told) for _ in range(2))
    return first, second


def claimed(queue: Queue) -> Claim:
    claim = queue.claim()
    assert claim is not None
    return claim


def test_a_request_that_was_enqueued_twice_is_run_once(address_: str) -> None:
    mine, other = queues(address_)
    store = storage.open_study(address_, "one")
    store.enqueue(FIRST)
    store.enqueue(FIRST)
    assert claimed(mine).request == FIRST
    assert claimed(other).request == SECOND
    assert [trial.state.name for trial in trials(address_, "one")] == ["RUNNING", "FAIL", "RUNNING"]
    assert mine.claim() is None
    assert not mine.complete


def test_a_trial_without_a_sign_of_life_is_retried_and_its_late_result_refused(
    address_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(address, "GRACE_SECONDS", 1)
    slow, quick = queues(address_)
    late = claimed(slow)
    time.sleep(2.1)  # SQLite counts in whole seconds
    again = [claimed(quick), claimed(quick)]
    assert late.request in [claim.request for claim in again]
    retried = next(claim for claim in again if claim.request == late.request)
    assert quick.keep(retried, Record(late.request, "trains", score=2.0))
    assert not slow.keep(late, Record(late.request, "trains", score=1.0))
    assert [record.score for record in storage.open_study(address_, "one").records()] == [2.0]


def test_a_trial_with_signs_of_life_is_left_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(address, "GRACE_SECONDS", 2)
    slow, quick = queues(url)
    with slow.alive():
        claim, _ = claimed(slow), claimed(slow)
        time.sleep(3.2)
        assert quick.claim() is None
        assert slow.keep(claim, Record(claim.request, "trains", score=1.0))
    assert claimed(quick).request == ({FIRST, SECOND} - {claim.request}).pop()  # it was given back


def test_a_lost_answer_is_not_taken_for_a_refusal(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, _ = queues(url)
    claim = claimed(mine)
    finish = storage.Store.finish

    def unheard(store: storage.Store, trial_id: int, record: Record) -> None:
        finish(store, trial_id, record)
        monkeypatch.setattr(storage.Store, "finish", finish)
        raise optuna.exceptions.StorageInternalError("gone") from shared.sqlalchemy.exc.OperationalError("", {}, None)

    monkeypatch.setattr(storage.Store, "finish", unheard)
    monkeypatch.setattr(mine, "_say", lambda message: None)
    assert mine.keep(claim, Record(claim.request, "diverged"))


def test_a_study_that_was_deleted_ends_its_workers(url: str) -> None:
    mine, _ = queues(url)
    storage.open_study(url, "one").discard()
    with pytest.raises(StudyError) as caught:
        mine.claim()
    hidden = url.replace(postgres.PASSWORD, "***")
    assert str(caught.value) == f"the study is no longer in the storage {hidden}: it was deleted"


# --------------------------------------------------------------------------------------------------------- the worker


@pytest.fixture
def file(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'shared.db'}"


def begin(file: str, data: Any = None, **options: Any) -> None:
    """A study with one finished trial."""
    given = {"train": at(2, interrupt)} if data is None else {"data": data}
    model = deep if data is None else "mlp"
    with pytest.raises(StudyInterrupted):
        tune(model, **given, **{**QUIET, **options}, storage=file, study="one")


def test_a_worker_in_python_finishes_what_another_began(file: str) -> None:
    begin(file)
    study = tune(deep, train=score_as_begun(), storage=file, study="one", worker=True, workers=0, progress=False)
    assert outcomes(study) == outcomes(tune(deep, train=score, **QUIET))
    assert study.out is None


def test_an_interrupted_worker_gives_its_trial_back(file: str) -> None:
    begin(file)
    with pytest.raises(StudyInterrupted) as caught:
        tune(deep, train=at(1, interrupt), storage=file, study="one", worker=True, workers=0, progress=False)
    assert str(caught.value) == "interrupted; what was running is given back to the study 'one'"
    assert Counter(trial.state.name for trial in trials(file, "one")) == {"COMPLETE": 1, "FAIL": 2}


def test_a_worker_whose_trial_fails_says_so_and_gives_it_back(file: str) -> None:
    def fail() -> None:
        raise RuntimeError("out of luck")

    begin(file)
    with pytest.raises(StudyError, match=r"^trial \(.*\) raised RuntimeError: out of luck"):
        tune(deep, train=at(1, fail), storage=file, study="one", worker=True, workers=0, progress=False)
    assert TrialState.RUNNING not in {trial.state for trial in trials(file, "one")}


def test_a_report_of_an_unfinished_study_says_how_far_it_is(file: str, tmp_path: Path) -> None:
    begin(file)
    with pytest.raises(StudyError) as caught:
        gather(file, "one", tmp_path / "out")
    assert str(caught.value) == (
        "the study 'one' is not finished: 1 of about 8 trials are done, and the next 3 are to be run; "
        "a worker can join it with normwise tune --worker"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("report", "a report is made of a folder, or with --storage, --study and perhaps --out"),
        ("report runs --out x", "a report is made of a folder, or with --storage, --study and perhaps --out"),
        (
            "report --storage sqlite:///none.db --study one",
            "the storage sqlite:///none.db has no study named 'one'; there is none at all",
        ),
        ("tune --study one", "study='one' names a study in a storage: give the storage as well"),
        ("tune --worker --study one", "a worker joins a study that others can reach: give its storage"),
        (
            "tune --worker --study one --storage sqlite:///none.db --wait 0",
            "the storage sqlite:///none.db has no study named 'one'; there is none at all",
        ),
        ("tune --worker --study one --storage sqlite:///none.db --json", "json does nothing with worker"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(
    words: str, text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words.split()) == 2
    assert capsys.readouterr() == ("", f"error: {text}\n")
    assert not (folder / "runs").exists()


def test_a_report_does_not_replace_that_of_another_study(file: str, tmp_path: Path) -> None:
    tune(deep, train=score, **QUIET, out=tmp_path / "out")
    before = (tmp_path / "out" / "report.html").read_text()
    tune(deep, train=score, **{**QUIET, "confirm": 3}, storage=file, study="one")
    with pytest.raises(StudyError, match=r"/out holds the report of another study: --out names another folder$"):
        gather(file, "one", tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_text() == before


def sets(shift: float) -> Any:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    return tuple((x + shift, (x[:, 0] > 0).long()) for _ in range(3))


def test_a_worker_with_other_data_is_refused(file: str) -> None:
    tune("mlp", sets(0.0), **QUIET, steps=2, storage=file, study="one")
    with pytest.raises(StudyError, match=r"^the study was started with another data fingerprint: \w+, was \w+$"):
        tune("mlp", sets(1.0), storage=file, study="one", worker=True, workers=0, progress=False)


def test_a_worker_with_other_settings_is_refused(file: str) -> None:
    begin(file)
    with pytest.raises(StudyError) as caught:
        tune(deep, train=score, storage=file, study="one", worker=True, workers=0, progress=False)
    assert str(caught.value) == (
        "the study was started with other settings: data ('test_many_machines:score', was "
        "'test_many_machines:at.<locals>.train'); a worker runs what the study says"
    )


def test_other_versions_are_noted(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    begin(file)
    store = storage.open_study(file, "one")
    known = store.recall("background")
    known["reproduce"]["versions"] = "Python 3.99"
    store.note("background", known)
    tune(deep, train=score_as_begun(), storage=file, study="one", worker=True, workers=0)
    said = capsys.readouterr().err
    assert "note: versions differ, and so may numbers: here Python 3." in said
    assert "where the study was begun Python 3.99\n" in said


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"storage": None}, "a worker joins a study that others can reach: give its storage"),
        ({"study": None}, "a worker joins a study that others can reach: give its study"),
        ({"out": "x"}, "out does nothing with worker: a worker writes into the storage alone"),
        ({"resume": True}, "resume does nothing with worker: a worker writes into the storage alone"),
        ({"workers": -2}, "workers=-2: must be 0 (this process) or more"),
        ({"seeds": 5}, "seeds=5 does nothing with worker: the study says what is run; leave it out"),
        (
            {"model": "mlp", "train": None},
            "the study 'one' was begun in Python with a model and a train that has no name in a shell; "
            "join it from Python: nw.tune(make_model, data, storage=..., study='one', worker=True)",
        ),
    ],
)
def test_what_a_worker_cannot_do(given: dict[str, Any], text: str, file: str) -> None:
    begin(file)
    asked: dict[str, Any] = {"model": deep, "train": score_as_begun(), "storage": file, "study": "one", "workers": 0}
    with pytest.raises(StudyError) as caught:
        tune(**{**asked, "worker": True, "progress": False, **given})
    assert str(caught.value) == text


def test_a_study_that_is_not_there(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked, place = Asked("mlp", "digits"), Place(0, file, study="ome")
    with pytest.raises(StudyError) as caught:
        join(asked, place, wait=0.0)
    assert str(caught.value) == f"the storage {file} has no study named 'ome'; there is none at all"
    assert capsys.readouterr().err == ""
    begin(file)
    with pytest.raises(StudyError) as caught:
        join(asked, place, wait=0.3)
    assert str(caught.value) == f"the storage {file} has no study named 'ome'; there are one"
    assert capsys.readouterr().err == f"waiting up to 0.3 s for the study 'ome' to begin in the storage {file}\n"


def test_a_name_needs_a_storage() -> None:
    with pytest.raises(StudyError, match=r"^study='one' names a study in a storage: give the storage as well$"):
        tune(**QUIET, study="one")
