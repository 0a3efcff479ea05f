"""What a measurement gives: plain data, a table, a figure, and one line that says what it means."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from normwise.errors import DiagnosisError, MissingExtraError, NormwiseError


@dataclass(frozen=True, repr=False)
class Result(ABC):
    """A finished measurement; the fields are the numbers, and hold nothing of the model.

    A subclass says what it means in one line (`meaning`), and what its rows are (`rows`).
    """

    @property
    @abstractmethod
    def meaning(self) -> str:
        """What was found, in one line."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """The main table, one dictionary a row."""

    @abstractmethod
    def traces(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """What `plot` draws, as plotly's traces and layout."""

    def headline(self) -> dict[str, float | None]:
        """The few numbers that stand for it where it is followed over a training; none, if it is no such measure."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain data: dictionaries, lists, numbers and text; what is not finite is a string.

        The strings are "nan", "inf" and "-inf", because JSON knows no such numbers.
        """
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_frame(self) -> Any:
        """The rows as a `pandas.DataFrame`.

        Raises:
            DiagnosisError: pandas is not installed.
        """
        try:
            import pandas as pd  # type: ignore[import-untyped]
        except ImportError as error:
            raise DiagnosisError("to_frame() needs pandas, which is not installed: pip install pandas") from error
        return pd.DataFrame(self.rows())

    def plot(self) -> Any:
        """The figure, a `plotly.graph_objects.Figure`.

        Raises:
            MissingExtraError: plotly is not installed.
        """
        try:
            import plotly.graph_objects as go
        except ImportError as error:
            raise MissingExtraError("plot()", "tune") from error
        traces, layout = self.traces()
        return go.Figure(traces, {"template": "plotly_white", **layout})

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.meaning}"


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None, digits: int = 3) -> str:
    """A number for a sentence.

    >>> number(12345.678), number(0.00123), number(None)
    ('1.23e+04', '0.00123', '-')
    """
    return "-" if value is None else f"{value:.{digits}g}"


def reason_of(error: Exception) -> str:
    r"""An error for a list: its first line, after its class unless it is one of normwise's own.

    >>> reason_of(DiagnosisError("there is no batch")), reason_of(ValueError("no\nmore")), reason_of(KeyError())
    ('there is no batch', 'ValueError: no', 'KeyError')
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if isinstance(error, NormwiseError) else f"{type(error).__name__}: {lines[0]}"
