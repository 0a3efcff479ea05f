"""A worker that joins a study: what it finishes, what it gives back, and what it is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState
from shared_studies import call, outcomes, trials
from shared_studies import folder as folder
from test_many_machines import QUIET, at, deep, interrupt, score, score_as_begun

from normwise.errors import StudyError
from normwise.study import StudyInterrupted, gather, join, tune
from normwise.tuning import storage
from normwise.tuning.joining import Asked
from normwise.tuning.place import Place


@pytest.fixture
def file(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'shared.db'}"


def begin(file: str) -> None:
    """A study with one finished trial."""
    with pytest.raises(StudyInterrupted):
        tune(deep, train=at(2, interrupt), **QUIET, storage=file, study="one")


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
    tune("mlp", sets(0.0), **QUIET, steps=2, measures=False, storage=file, study="one")
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
