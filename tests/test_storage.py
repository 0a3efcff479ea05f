"""Optuna keeps the study: what goes in comes out, and what goes wrong is said."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy.exc

from normwise.errors import MissingExtraError, StudyError
from normwise.tuning import address, storage
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
            "the storage redis://localhost cannot be used: Can't load plugin: sqlalchemy.dialects:redis",
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


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:s3cret@host:99999/db",
        "postgresql://host:99999/db?user=ada&password=s3cret",
        "postgresql+nosuchdriver://ada:s3cret@host/db",
        "s3cret",
    ],
)
def test_no_form_of_a_password_is_ever_shown(url: str) -> None:
    with pytest.raises(StudyError) as caught:
        storage.create(url, "one", SETTINGS, FACTS)
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in address.without_password(url)
    assert address.purged(f"no access with s3cret to {url}", url).count("s3cret") == 0


def test_postgresql_without_its_driver_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "find_spec", lambda name: None)
    for url in ("postgresql://host/db", "postgres://host/db", "postgresql+psycopg://host/db"):
        with pytest.raises(MissingExtraError) as caught:
            storage.create(url, "one", SETTINGS, FACTS)
        assert str(caught.value) == (
            "a PostgreSQL storage needs packages that are not installed: pip install 'normwise[postgres]'"
        )


def test_a_study_of_before_there_were_variants_is_read(url: str) -> None:
    store = storage.create(url, "one", SETTINGS, FACTS)
    old = TRAINED.to_dict()
    del old["request"]["variant"]
    store.study.add_trial(optuna.create_trial(value=97.5, user_attrs={"record": old}))
    assert storage.open_study(url, "one").records() == [TRAINED]
    assert storage.request_of(store.study.trials[0]) == TRAINED.request


def test_a_folder_with_braces_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "{runs}"
    folder.mkdir()
    storage.create(f"sqlite:///{folder / 'study.db'}", "one", SETTINGS, FACTS).add(TRAINED)
    assert [path.name for path in folder.iterdir()] == ["study.db"]


def test_every_transaction_on_a_file_takes_its_turn(url: str) -> None:
    """Optuna reads that a trial waits, and then that it runs: nobody may write in between."""
    first, second = (address.connect(url)._backend.engine for _ in range(2))
    with first.begin() as mine:
        assert mine.exec_driver_sql("SELECT count(*) FROM trials").scalar() == 0
        with second.connect() as other:
            other.connection.cursor().execute("PRAGMA busy_timeout = 1")
            with pytest.raises(sqlalchemy.exc.OperationalError, match="database is locked"):
                other.exec_driver_sql("SELECT count(*) FROM trials")


def test_only_what_is_finished_is_a_record(url: str) -> None:
    store = storage.create(url, "one", SETTINGS, FACTS)
    store.enqueue(TRAINED.request)
    store.study.add_trial(optuna.create_trial(value=1.0))  # somebody else's
    store.add(DIVERGED)
    assert store.records() == [DIVERGED]
    assert [storage.request_of(trial) for trial in store.study.trials] == [TRAINED.request, None, DIVERGED.request]


def test_a_variant_is_part_of_a_trials_parameters(url: str) -> None:
    settings = replace(SETTINGS, axes=(("batch_size", (8, 32)), ("start", ("he", "torch"))), control=True)
    request = Request("control", "batch", 0.1, 1, 5, (("batch_size", 32), ("start", "he")))
    store = storage.create(url, "one", settings, FACTS)
    store.enqueue(request)
    store.add(Record(request, "trains", 1.0))
    waiting, done = optuna.load_study(study_name="one", storage=url).trials
    asked = {"norm": "batch", "lr": 0.1, "seed": 1, "phase": "control", "steps": 5, "batch_size": 32, "start": "he"}
    assert waiting.params == done.params == asked
    assert storage.request_of(waiting) == storage.request_of(done) == request


def test_a_study_that_was_deleted_is_missed(url: str) -> None:
    store = storage.create(url, "one", SETTINGS, FACTS)
    storage.open_study(url, "one").discard()
    with pytest.raises(StudyError) as caught:
        store.records()
    assert str(caught.value) == f"the study is no longer in the storage {url}: it was deleted"


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
