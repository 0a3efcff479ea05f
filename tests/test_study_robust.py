"""A study asked for in the wrong words, begun in the same moment as a worker looks, or that cannot be looked into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from shared_studies import call

from normwise.errors import StudyError
from normwise.study import join, tune
from normwise.tuning import measures, shared
from normwise.tuning.address import shown
from normwise.tuning.joining import ASKED, BACKGROUND, Asked
from normwise.tuning.place import Place
from normwise.tuning.records import Record, Request, Settings
from normwise.tuning.shared import Queue
from normwise.tuning.storage import create

SMALL: dict[str, Any] = {"norms": "batch,none", "lrs": [0.1, 0.5], "seeds": 1, "confirm": 2, "steps": 4}
QUIET: dict[str, Any] = {**SMALL, "workers": 0, "progress": False}


@pytest.mark.parametrize("url", ["postgresql://ada:secret@host:port/db", "postgresql://ada:s@host:ecret@host/db"])
def test_an_address_whose_port_is_no_number_is_one_line_without_the_password(url: str) -> None:
    with pytest.raises(StudyError) as caught:
        tune(**QUIET, storage=url)
    assert str(caught.value) == "the storage cannot be used: its port is no number; write an @ in a password as %40"
    assert shown(url) == "the storage"


@pytest.mark.parametrize("wait", [float("nan"), -1.0])
def test_a_worker_waits_no_negative_and_no_endless_time(wait: float, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=rf"^wait={wait:g}: must be 0 seconds or more$"):
        join(Asked(), Place(0, f"sqlite:///{tmp_path / 'none.db'}", study="one"), wait=wait)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--workers", "-3"], "workers=-3: must be 0 (this process) or more"),
        (["--resume", "--force"], "resume goes on with a study, force replaces it: choose one"),
        (["--study", "mine"], "study='mine' names a study in a storage: give the storage as well"),
        (["--json"], "json does nothing with dry-run"),
        (["--wait", "5"], "wait does nothing without worker"),
    ],
)
def test_a_dry_run_refuses_what_the_study_would_refuse(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("tune", "--dry-run", *words) == 2
    assert capsys.readouterr() == ("", f"error: {text}\n")


def test_whoever_sees_that_a_study_has_begun_finds_all_that_a_worker_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    plain = optuna.Study.set_user_attr

    def watched(study: optuna.Study, key: str, value: Any) -> None:
        written.append(key)
        plain(study, key, value)

    monkeypatch.setattr(optuna.Study, "set_user_attr", watched)
    tune(**QUIET, measures=False, storage=f"sqlite:///{tmp_path / 'shared.db'}")
    assert {"facts", ASKED, BACKGROUND} <= set(written[: written.index("settings")])


def test_what_cannot_be_looked_into_is_told_and_costs_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(measures, "doctor", fail)
    study = tune(**{**QUIET, "progress": True}, out=tmp_path / "out")
    winner = study.verdict.winner
    assert {norm.label for norm in study.summary.norms if norm.measures is None} == {winner}
    assert f"measuring inside the training of '{winner}' raised RuntimeError: out of luck" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_worker_that_waits_asks_the_search_only_when_there_is_something_new(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings("mlp", "digits", (("batch", "batch"),), lrs=(0.1, 0.5), seeds=1, confirm=2)
    store, asked = create(None, "one", settings, {}), []
    search = shared.next_requests

    def counted(*given: Any, **named: Any) -> tuple[Request, ...]:
        asked.append(given)
        return search(*given, **named)

    monkeypatch.setattr(shared, "next_requests", counted)
    queue = Queue(store, 2.3, print)
    queue._swept = float("inf")  # a storage in memory has no signs of life
    monkeypatch.setattr(store.storage, "record_heartbeat", lambda _: None, raising=False)
    claims = [queue.claim(), queue.claim()]
    assert None not in claims
    assert [queue.claim() for _ in range(5)] == [None] * 5
    assert len(asked) == 1
    for claim in claims:
        assert claim is not None
        queue.keep(claim, Record(claim.request, "trains", score=50.0, val_loss=1.0, tail_loss=1.0))
    assert queue.claim() is not None
    assert len(asked) == 2


def test_a_normalization_that_always_diverged_has_no_sensitivity() -> None:
    study = tune(**{**QUIET, "norms": "none", "lrs": [1e9, 1e10]}, measures=False)
    (norm,) = study.summary.norms
    assert (norm.lr_best, norm.sensitivity) == (None, None)
