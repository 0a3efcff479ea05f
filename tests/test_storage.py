"""Optuna keeps the study: what goes in comes out, and what goes wrong is said."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from normwise.errors import StudyError
from normwise.tuning import storage
from normwise.tuning.records import Record, Request, Settings

SETTINGS = Settings("mlp", "digits", (("batch", "batch"), ("mine", "[n] c")), lrs=(0.1, 2 ** (-1 / 3)))
FACTS = {"model": "mlp"}
TRAINED = Record(
    Request("select", "batch", 2 ** (-1 / 3), 10_000, 200), "trains", 97.5, 2.4, 0.1, 0.2, curve=((1, 2.4), (200, 0.1))
)
DIVERGED = Record(Request("confirm", "mine", 1e9, 1, None), "diverged", first_loss=2.4)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def test_what_goes_in_comes_out(url: str) -> None:
    store = storage.create(url, "one", SETTINGS, FACTS)
    store.add(TRAINED)
    store.add(DIVERGED)
    store.spend(1.5)
    store.spend(2.0)
    again = storage.open_study(url, "one")
    assert again.records() == [TRAINED, DIVERGED]
    assert (again.settings, again.facts, again.seconds()) == (SETTINGS, FACTS, 3.5)


def test_optuna_reads_it_as_its_own(url: str) -> None:
    store = storage.create(url, "one", SETTINGS, FACTS)
    store.add(TRAINED)
    store.add(DIVERGED)
    study = optuna.load_study(study_name="one", storage=url)
    trained, diverged = study.trials
    assert study.direction.name == "MAXIMIZE"
    assert (trained.state.name, trained.value) == ("COMPLETE", 97.5)
    assert trained.params == {"norm": "batch", "lr": 2 ** (-1 / 3), "seed": 10_000, "phase": "select", "steps": 200}
    assert (diverged.state.name, diverged.value) == ("PRUNED", None)
    assert study.best_trial.number == 0


def test_memory_is_a_storage_too() -> None:
    store = storage.create(None, "one", SETTINGS, FACTS)
    store.add(TRAINED)
    assert store.records() == [TRAINED]


def test_a_study_is_replaced_only_when_asked(url: str) -> None:
    storage.create(url, "one", SETTINGS, FACTS).add(TRAINED)
    with pytest.raises(StudyError) as caught:
        storage.create(url, "one", SETTINGS, FACTS)
    assert str(caught.value) == (
        "the storage has a study named 'one' already: --resume goes on with it, --force replaces it"
    )
    assert storage.open_study(url, "one").records() == [TRAINED]
    assert storage.create(url, "one", SETTINGS, FACTS, replace=True).records() == []


def test_a_discarded_study_is_gone_and_its_neighbour_is_not(url: str) -> None:
    storage.create(url, "one", SETTINGS, FACTS).discard()
    storage.create(url, "two", SETTINGS, FACTS)
    assert optuna.get_all_study_names(url) == ["two"]
    with pytest.raises(StudyError, match=r"has no study named 'one' to resume: leave --resume out to start it$"):
        storage.open_study(url, "one")


def test_a_study_of_someone_else_is_not_resumed(url: str) -> None:
    optuna.create_study(study_name="one", storage=url)
    with pytest.raises(StudyError, match=r"^the study 'one' was not written by normwise, or was killed while it began"):
        storage.open_study(url, "one")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("sqlite:////nowhere/x.db", "the storage sqlite:////nowhere/x.db cannot be used: unable to open database file"),
        ("nonsense", "the storage cannot be used: Could not parse SQLAlchemy URL from given URL string"),
        (
            "redis://localhost",
            "the storage redis://localhost cannot be used: RedisStorage is removed at Optuna v3.1.0.",
        ),
    ],
)
def test_a_storage_that_cannot_be_reached(url: str, text: str) -> None:
    with pytest.raises(StudyError) as caught:
        storage.create(url, "one", SETTINGS, FACTS)
    assert str(caught.value).startswith(text)


def test_a_password_is_never_shown() -> None:
    with pytest.raises(StudyError) as caught:
        storage.create("postgresql+nosuchdriver://ada:secret@host/db", "one", SETTINGS, FACTS)
    assert "secret" not in str(caught.value)
    assert "ada:***@host" in str(caught.value)


def test_a_trial_that_ran_twice_counts_once(url: str) -> None:
    store = storage.create(url, "one", SETTINGS, FACTS)
    store.add(TRAINED)
    store.add(replace(TRAINED, score=1.0))
    assert store.records() == [TRAINED]


def test_a_study_has_begun_when_its_settings_are_there(url: str) -> None:
    assert not storage.begun(url, "one")
    optuna.create_study(storage=url, study_name="one")
    assert not storage.begun(url, "one")
    storage.create(url, "one", SETTINGS, FACTS, replace=True)
    assert storage.begun(url, "one")
