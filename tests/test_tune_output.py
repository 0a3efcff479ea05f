"""The output folder: never overwritten unasked, never left behind by a failed start."""

import csv
import io
from pathlib import Path

import pytest

from normwise.errors import StudyError
from normwise.tuning import output
from normwise.tuning.records import Record, Request

RECORDS = (
    Record(Request("select", "batch", 0.1, 0, 200), "trains", score=91.5, seconds=0.5),
    Record(Request("select", "a,b", 64.0, 1, None), "diverged"),
)


def message(out: Path, *, resume: bool = False, force: bool = False) -> str:
    with pytest.raises(StudyError) as caught:
        output.check(out, resume=resume, force=force)
    return str(caught.value)


def test_a_folder_that_is_there_needs_a_word(tmp_path: Path) -> None:
    output.check(tmp_path, resume=False, force=False)  # empty: nothing to overwrite
    (tmp_path / "thesis.tex").touch()
    assert message(tmp_path) == (
        f"{tmp_path} exists already: --resume goes on with the study in it, --force replaces it, "
        "--out names another folder"
    )
    output.check(tmp_path, resume=True, force=False)
    output.check(tmp_path, resume=False, force=True)
    output.check(tmp_path / "new" / "deep", resume=False, force=False)
    assert not (tmp_path / "new").exists()


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert message(file) == f"{file} is a file, not a folder"
    assert message(file / "runs") == f"{file / 'runs'} cannot be made: {file} is a file"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert message(tmp_path / "x") == f"{tmp_path / 'x'} cannot be written to: no permission in {tmp_path}"


def test_a_failed_start_leaves_nothing_behind(tmp_path: Path) -> None:
    with output.Folder(tmp_path / "a" / "b", resume=False, force=False):
        (tmp_path / "a" / "b" / "study.db").touch()
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_stays(tmp_path: Path) -> None:
    with output.Folder(tmp_path / "a", resume=False, force=False) as folder:
        (tmp_path / "a" / "study.db").touch()
        folder.keep()
    assert (tmp_path / "a" / "study.db").exists()


def test_files_of_others_keep_their_folder(tmp_path: Path) -> None:
    with output.Folder(tmp_path / "a", resume=False, force=False):
        (tmp_path / "a" / "study.db").touch()
        (tmp_path / "a" / "thesis.tex").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["thesis.tex"]


STUDY_FILES = ("report.html", "study.db", "summary.json", "trials.csv")


def finished_study(folder: Path) -> None:
    for name in (*STUDY_FILES, "thesis.tex"):
        (folder / name).write_text("old")


def test_force_removes_a_study_and_nothing_else(tmp_path: Path) -> None:
    finished_study(tmp_path)
    with output.Folder(tmp_path, resume=False, force=True) as folder:
        assert not any((tmp_path / name).exists() for name in STUDY_FILES)
        folder.keep()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_force_puts_the_old_study_back_if_nothing_comes_of_the_new_one(tmp_path: Path) -> None:
    finished_study(tmp_path)
    with output.Folder(tmp_path, resume=False, force=True):
        (tmp_path / "study.db").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((*STUDY_FILES, "thesis.tex"))
    assert all(path.read_text() == "old" for path in tmp_path.iterdir())


@pytest.mark.parametrize("how", [{"resume": True, "force": False}, {"resume": False, "force": True}], ids=str)
def test_two_studies_never_run_in_one_folder(tmp_path: Path, how: dict[str, bool]) -> None:
    with output.Folder(tmp_path / "a", resume=False, force=False) as folder:
        (tmp_path / "a" / "study.db").touch()
        folder.keep()
        with pytest.raises(StudyError) as caught:
            output.Folder(tmp_path / "a", **how)
        assert str(caught.value) == f"{tmp_path / 'a'} is in use: another study is running in it"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["study.db"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert output.write(tmp_path, "a.txt", "first").read_text() == "first"

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StudyError) as caught:
        output.write(tmp_path, "a.txt", "second")
    assert str(caught.value) == f"{tmp_path / 'a.txt'} cannot be written: No space left on device"
    assert (tmp_path / "a.txt").read_text() == "first"


def test_the_table_of_trials_is_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(output.to_csv(RECORDS))))
    assert rows[0] == {
        "phase": "select", "norm": "batch", "lr": "0.1", "seed": "0", "steps": "200", "outcome": "trains",
        "score": "91.5", "first_loss": "", "tail_loss": "", "val_loss": "", "test_loss": "", "weight_norm": "",
        "seconds": "0.5",
    }  # fmt: skip
    assert (rows[1]["norm"], rows[1]["steps"], rows[1]["score"]) == ("a,b", "", "")


def test_a_summary_that_is_not_there_or_is_none(tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        output.read_summary(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds no finished study: there is no summary.json in it"
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(StudyError, match=r"summary.json is not a study's summary$"):
        output.read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(StudyError, match=r"summary.json cannot be read: Expecting"):
        output.read_summary(tmp_path)
