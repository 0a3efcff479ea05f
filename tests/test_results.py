"""Results as plain data."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest

from normwise.diagnose.results import Result, number
from normwise.errors import DiagnosisError, MissingExtraError


@dataclass(frozen=True)
class Part:
    value: float
    name: str = "part"


@dataclass(frozen=True, repr=False)
class Found(Result):
    parts: tuple[Part, ...]
    by_name: Mapping[str, Part]
    largest: float
    nothing: None = None

    @property
    def meaning(self) -> str:
        return f"{len(self.parts)} parts"

    def rows(self) -> list[dict[str, Any]]:
        return [vars(part) for part in self.parts]

    def traces(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        return [{"type": "bar", "y": [part.value for part in self.parts]}], {"title": {"text": "parts"}}


FOUND = Found((Part(1.5), Part(math.nan, "lost")), {"a.b": Part(-math.inf)}, math.inf)
PLAIN = {
    "parts": [{"value": 1.5, "name": "part"}, {"value": "nan", "name": "lost"}],
    "by_name": {"a.b": {"value": "-inf", "name": "part"}},
    "largest": "inf",
    "nothing": None,
}


def test_plain_data_goes_through_json() -> None:
    assert FOUND.to_dict() == PLAIN
    assert json.loads(FOUND.to_json()) == PLAIN


def test_repr_is_one_line_of_meaning() -> None:
    assert repr(FOUND) == "Found: 2 parts"


def test_a_result_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        FOUND.largest = 0.0  # type: ignore[misc]


def test_a_frame_has_a_row_a_part() -> None:
    frame = FOUND.to_frame()
    assert list(frame.columns) == ["value", "name"]
    assert frame["name"].tolist() == ["part", "lost"]
    assert math.isnan(frame["value"][1])


def test_the_figure_is_plotlys() -> None:
    figure = FOUND.plot()
    assert figure.layout.title.text == "parts"
    assert figure.data[0].y[0] == 1.5


def test_without_pandas_or_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pandas", "plotly", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DiagnosisError) as frame:
        FOUND.to_frame()
    assert str(frame.value) == "to_frame() needs pandas, which is not installed: pip install pandas"
    with pytest.raises(MissingExtraError) as figure:
        FOUND.plot()
    assert str(figure.value) == "plot() needs packages that are not installed: pip install 'normwise[tune]'"


def test_a_result_without_a_meaning_cannot_be_made() -> None:
    @dataclass(frozen=True, repr=False)
    class Silent(Result):
        value: float

    with pytest.raises(TypeError, match=r"meaning.*rows.*traces"):
        Silent(1.0)  # type: ignore[abstract]


def test_what_is_not_followed_over_a_training_has_no_headline() -> None:
    assert FOUND.headline() == {}


def test_numbers_in_sentences() -> None:
    assert [number(v) for v in (1 / 3, 1e-9, math.inf, None)] == ["0.333", "1e-09", "inf", "-"]
