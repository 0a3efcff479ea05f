"""The whole study in Python: its files, its going on, its ends."""

import builtins
import csv
import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn

from normwise.errors import StudyError
from normwise.report import render
from normwise.study import Study, StudyInterrupted, tune
from normwise.tuning import output
from normwise.tuning.records import Request
from normwise.tuning.summary import summary_from_dict

SMALL: dict[str, Any] = {
    "norms": "batch,none", "lrs": (0.25, 1.0), "seeds": 1, "confirm": 2, "steps": 5, "workers": 0, "progress": False,
}  # fmt: skip
OWN = {**SMALL, "steps": None}
TRIALS = 2 * 2 + 2 * 2 + 2 * 2  # selection, confirmation, horizon


def deep(norm: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), norm(2))


class Loop:
    """A training loop that counts, and may fail at a call."""

    def __init__(self, fails: int = -1, error: BaseException | None = None) -> None:
        self.calls: list[tuple[float, int]] = []
        self.fails, self.error = fails, error

    def __call__(self, model: nn.Module, lr: float, seed: int, trial: Any) -> float:
        if len(self.calls) == self.fails and self.error is not None:
            raise self.error
        self.calls.append((lr, seed))
        return 50 + 10 * lr + torch.rand(1).item()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return tune(**SMALL, out=tmp_path_factory.mktemp("runs") / "mlp-digits")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_study_answers(study: Study) -> None:
    assert study.verdict.winner == "batch"
    assert study.verdict.sentence in repr(study)
    assert study.table().splitlines()[0].split()[:2] == ["normalization", "score"]
    assert [line.split()[0] for line in study.table().splitlines()[1:]] == ["batch", "none"]
    assert len({len(line.rstrip()) for line in study.table().splitlines()}) == 1
    assert "<table>" in study._repr_html_()


def test_the_records_are_the_requests_that_were_made(study: Study) -> None:
    phases = [record.request.phase for record in study.records]
    assert phases == ["select"] * 4 + ["confirm"] * 4 + ["horizon"] * 4
    assert {record.request.steps for record in study.records[:8]} == {5}
    assert {record.request.steps for record in study.records[8:]} == {10}
    assert all(record.test_loss is None for record in study.records[:4])
    assert all(record.test_loss is not None for record in study.records[4:])


def test_its_files_agree(study: Study) -> None:
    assert study.out is not None
    assert files(study.out) == ["report.html", "study.db", "summary.json", "trials.csv"]
    summary = json.loads((study.out / "summary.json").read_text())
    rows = list(csv.DictReader((study.out / "trials.csv").read_text().splitlines()))
    stored = optuna.load_study(study_name="normwise", storage=f"sqlite:///{study.out / 'study.db'}")
    assert summary["verdict"]["sentence"] == study.verdict.sentence
    assert summary["trials"] == len(rows) == len(stored.trials) == TRIALS
    assert summary["reproduce"]["command"].startswith('nw.tune("mlp", "digits", norms="batch,none", lrs=(0.25, 1.0)')
    assert summary["facts"]["data fingerprint"] == "726a1a910d69"
    assert study.verdict.sentence in (study.out / "report.html").read_text()
    assert [float(row["score"]) for row in rows] == [record.score for record in study.records]
    assert all(norm.ms_per_step is not None and norm.ms_per_step > 0 for norm in study.summary.norms)


def test_the_report_can_be_written_anywhere(study: Study, tmp_path: Path) -> None:
    path = study.report(tmp_path / "mine.html")
    assert study.verdict.sentence in path.read_text()


def test_every_trial_as_a_frame(study: Study) -> None:
    pytest.importorskip("pandas")
    frame = study.to_frame()
    assert frame.shape == (TRIALS, 13)
    assert list(frame["score"]) == [record.score for record in study.records]


def test_without_pandas_it_says_so(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(StudyError, match=r"^to_frame\(\) needs pandas, which is not installed: pip install pandas$"):
        study.to_frame()


def test_a_finished_study_is_not_overwritten(study: Study) -> None:
    assert study.out is not None
    before = (study.out / "report.html").read_bytes()
    with pytest.raises(StudyError, match=r"exists already: --resume goes on with the study in it, --force replaces it"):
        tune(**SMALL, out=study.out)
    assert (study.out / "report.html").read_bytes() == before


def test_resuming_a_finished_study_runs_nothing(tmp_path: Path) -> None:
    first = tune(deep, train=Loop(), **OWN, out=tmp_path / "own")
    again = Loop()
    resumed = tune(deep, train=again, **OWN, out=tmp_path / "own", resume=True)
    assert again.calls == []
    assert resumed.records == first.records
    assert resumed.verdict == first.verdict


def test_ctrl_c_keeps_what_is_done_and_resume_goes_on(tmp_path: Path) -> None:
    whole = tune(deep, train=Loop(), **OWN)
    out = tmp_path / "own"
    stopped, rest = Loop(5, KeyboardInterrupt()), Loop()
    with pytest.raises(StudyInterrupted) as caught:
        tune(deep, train=stopped, **OWN, out=out)
    assert str(caught.value) == f"interrupted; 5 finished trials are kept in {out}; go on with resume=True"
    assert files(out) == ["study.db"]
    resumed = tune(deep, train=rest, **OWN, out=out, resume=True)
    assert len(stopped.calls) == 5
    assert not set(stopped.calls) & set(rest.calls)
    assert [(r.request, r.score) for r in resumed.records] == [(r.request, r.score) for r in whole.records]


def test_a_failing_trial_keeps_what_is_done(tmp_path: Path) -> None:
    out = tmp_path / "own"
    with pytest.raises(
        StudyError,
        match=r"raised RuntimeError: out of luck \(test_study.py:\d+\); a loop may .*; 3 finished trials are",
    ):
        tune(deep, train=Loop(3, RuntimeError("out of luck")), **OWN, out=out)
    assert files(out) == ["study.db"]


def test_a_failing_start_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "own"
    with pytest.raises(StudyError, match=r"; no trial had finished, nothing is kept$"):
        tune(deep, train=Loop(0, RuntimeError("out of luck")), **OWN, out=out)
    with pytest.raises(StudyError):
        tune(deep, train=Loop(), **OWN, out=out, storage="sqlite:////nowhere/study.db")
    with pytest.raises(StudyError):
        tune("mlp", lambda: None, **SMALL, out=out)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_differ_are_named(study: Study) -> None:
    assert study.out is not None
    with pytest.raises(StudyError) as caught:
        tune(**{**SMALL, "steps": 7, "confirm": 3}, out=study.out, resume=True)
    assert str(caught.value) == (
        "the study was started with other settings: confirm (3, was 2), steps (7, was 5); "
        "resume with those, or start anew"
    )


def test_data_that_differ_are_noticed(tmp_path: Path) -> None:
    def sets(shift: float) -> Any:
        x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        return tuple((x + shift, (x[:, 0] > 0).long()) for _ in range(3))

    tune("mlp", sets(0.0), **SMALL, measures=False, out=tmp_path / "a")
    with pytest.raises(StudyError, match=r"^the study was started with another data fingerprint: \w+, was \w+$"):
        tune("mlp", sets(1.0), **SMALL, out=tmp_path / "a", resume=True)


def test_an_unbounded_interval_survives_json(tmp_path: Path, study: Study) -> None:
    verdict = study.verdict
    pair = replace(verdict.comparisons[0], low=-math.inf, high=math.inf, verdict="undecided")
    unbounded = replace(study.summary, verdict=replace(verdict, comparisons=(pair,)))
    text = output.to_json(unbounded)
    (tmp_path / "summary.json").write_text(text)
    assert "Infinity" not in text
    assert summary_from_dict(output.read_summary(tmp_path)) == unbounded
    assert "undecided" in render(unbounded)


def test_where_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"has no study to resume: leave --resume out to start one$"):
        tune(**SMALL, out=tmp_path, resume=True)
    with pytest.raises(
        StudyError, match=r"^there is nothing to resume: give the out folder or the storage of the study$"
    ):
        tune(**SMALL, resume=True)
    with pytest.raises(StudyError, match=r"^resume goes on with a study, force replaces it: choose one$"):
        tune(**SMALL, out=tmp_path, resume=True, force=True)
    with pytest.raises(StudyError, match=r"^workers=-1: must be 0 \(this process\) or more$"):
        tune(**{**SMALL, "workers": -1})


def test_force_starts_anew(tmp_path: Path) -> None:
    loop = Loop()
    tune(deep, train=Loop(), **OWN, out=tmp_path / "own")
    tune(deep, train=loop, **OWN, out=tmp_path / "own", force=True)
    assert len(loop.calls) == 8


def test_another_storage_keeps_the_study(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'all.db'}"
    tune(deep, train=Loop(), **OWN, out=tmp_path / "own", storage=url)
    assert files(tmp_path / "own") == ["report.html", "summary.json", "trials.csv"]
    assert optuna.get_all_study_names(url) == ["own"]
    again = Loop()
    tune(deep, train=again, **OWN, out=tmp_path / "own", storage=url, resume=True)
    assert again.calls == []


def test_what_cannot_be_sent_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    lock = threading.Lock()

    def locked(norm: Any) -> nn.Module:
        with lock:
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), norm(10))

    study = tune(locked, **{**SMALL, "workers": 2, "progress": True})
    assert len(study.records) == TRIALS
    assert "part of the study cannot be sent to worker processes; the trials run in this one" in capsys.readouterr().err


def test_shares_of_one_are_warned_of() -> None:
    def train(model: nn.Module, lr: float, seed: int, trial: Any) -> float:
        return lr / 2 + torch.rand(1).item() / 10

    warning = tune(deep, train=train, **OWN).summary.warnings[0]
    assert warning.startswith("scores look like fractions: all lie between 0 and 1")


def test_a_metric_to_minimize() -> None:
    def train(model: nn.Module, lr: float, seed: int, trial: Any) -> float:
        normalized = len(list(model.parameters())) > 2
        return (1.0 if normalized else 3.0) + lr + torch.rand(1).item() / 10

    study = tune(deep, train=train, **{**OWN, "metric": "error:min", "margin": 0.1})
    assert (study.verdict.winner, study.verdict.kind) == ("batch", "better")
    assert {norm.lr_best for norm in study.summary.norms} == {0.25}


def test_a_regression() -> None:
    x = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
    y = x.sum(dim=1) * 2 + 1
    sets = ((x[:80], y[:80]), (x[80:100], y[80:100]), (x[100:], y[100:]))
    asked = {**SMALL, "lrs": (0.003, 0.01), "steps": 60}
    study = tune("mlp", sets, loss="mse", metric="loss", margin=0.1, **asked)
    assert study.summary.chance == pytest.approx(y[:80].var(correction=0).item())
    assert study.summary.norms[1].mean is not None
    assert study.summary.norms[1].mean < 0.2 * study.summary.chance


def test_the_same_request_gives_the_same_record(study: Study) -> None:
    again = tune(**{**SMALL, "workers": 1}, measures=False)
    for mine, other in zip(study.records, again.records, strict=True):
        assert isinstance(mine.request, Request)
        assert (mine.request, mine.score, mine.curve) == (other.request, other.score, other.curve)


def test_a_loop_that_follows_neither_its_seed_nor_its_steps_is_warned_of() -> None:
    def train(model: nn.Module, lr: float, seed: int, trial: Any) -> float:
        return 90.0 - abs(math.log2(lr))

    summary = tune(deep, train=train, **{**OWN, "steps": 50}).summary
    assert summary.horizon is None
    assert any(warning.startswith("no spread: all ") for warning in summary.warnings)
    assert any(
        warning.startswith("horizon: at twice the steps every score is the same") for warning in summary.warnings
    )
