"""The report as a file: the same twice, quick to make, written whole or not at all."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from pathlib import Path

import pytest
import report_example

from normwise.errors import MissingExtraError, StudyError
from normwise.report import paper, render, words, write
from normwise.tuning.summary import summary_from_dict


def test_a_summary_read_back_gives_the_same_page() -> None:
    full = report_example.measured()
    again = summary_from_dict(json.loads(json.dumps(full.to_dict())))
    assert again == full
    assert render(again) == render(full)


def test_a_page_with_everything_is_rendered_in_less_than_a_second() -> None:
    full = report_example.measured()
    render(full)
    start = time.process_time()
    render(full)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (99999.0, "1 × 10⁵"),  # noqa: RUF001
        (12345.0, "12345"),
        (0.00012, "0.00012"),
        (0.000012, "1.2 × 10⁻⁵"),  # noqa: RUF001
        (-0.5, "−0.5"),  # noqa: RUF001
        (math.nan, "–"),  # noqa: RUF001
        (math.inf, "–"),  # noqa: RUF001
        (None, "–"),  # noqa: RUF001
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert words.number(value) == text


def test_render_is_the_same_twice() -> None:
    assert render(report_example.example()) == render(report_example.example())


def test_write_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write(report_example.one(), path) == path
    assert path.read_text(encoding="utf-8") == render(report_example.one())
    assert list(tmp_path.iterdir()) == [path]


def test_write_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def half(self: Path, text: str, encoding: str) -> int:
        with self.open("w", encoding=encoding) as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(StudyError, match="No space left on device"):
        write(report_example.one(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_names_the_folder_that_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "report.html"
    with pytest.raises(StudyError) as caught:
        write(report_example.one(), path)
    assert str(caught.value) == (
        f"cannot write the report to {path}: No such file or directory. "
        "Give a file name in a folder that exists and can be written."
    )


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError) as caught:
        importlib.reload(paper)
    assert str(caught.value) == "the report needs packages that are not installed: pip install 'normwise[tune]'"
