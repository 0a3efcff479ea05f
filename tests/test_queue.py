"""The queue of a shared study: a trial is run once, a lost one again, a living one never twice."""

from __future__ import annotations

import time
from pathlib import Path

import optuna
import postgres
import pytest
from shared_studies import server as server
from shared_studies import trials
from shared_studies import url as url

from normwise.errors import StudyError
from normwise.tuning import address, shared, storage
from normwise.tuning.records import Record, Request, Settings
from normwise.tuning.shared import Claim, Queue

pytestmark = pytest.mark.skipif(not postgres.available(), reason="PostgreSQL is not installed")

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
