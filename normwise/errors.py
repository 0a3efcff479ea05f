"""The error tree. Every error normwise raises on purpose descends from `NormwiseError`."""

from __future__ import annotations


class NormwiseError(Exception):
    """Base of every error that normwise raises on purpose."""


class PatternError(NormwiseError, ValueError):
    """A pattern, or a declaration over its axes, that cannot be read; a caret points at the culprit."""

    def __init__(self, message: str, text: str | None = None, at: int | None = None) -> None:
        self.text, self.at = text, at
        super().__init__(message if text is None else f"{message}\n{caret(text, at)}")


class ShapeError(NormwiseError, ValueError):
    """A tensor that does not fit the pattern: its rank, a dimension that cannot be split, a size that contradicts."""


class GateError(NormwiseError, TypeError):
    """A call that brings a gate where none is declared, or none where one is, or what cannot be a gate."""


class TooFewSamplesError(NormwiseError, ValueError):
    """Fewer than two samples in a column that is to be standardized."""


class NonFiniteError(NormwiseError, ArithmeticError):
    """A batch whose statistics are not finite, where the memory's policy is to raise."""


class RecomputeError(NormwiseError, RuntimeError):
    """A checkpointed forward that reads its memory is computed again, and what it first saw is gone."""


class StudyError(NormwiseError, ValueError):
    """A study that cannot be run as asked: an unknown name, a factory that raises, data that cannot be used."""


class SurgeryError(NormwiseError, ValueError):
    """An operation on a model that cannot be done, or whose proof failed; the model is as it was."""


class DiagnosisError(NormwiseError, ValueError):
    """A measurement that cannot be made as asked; the model is as it was."""


class MissingExtraError(NormwiseError, ImportError):
    """A part of normwise whose optional dependency is not installed."""

    def __init__(self, part: str, extra: str) -> None:
        super().__init__(f"{part} needs packages that are not installed: pip install 'normwise[{extra}]'")


def caret(text: str, at: int | None) -> str:
    """The text, indented, with a caret under position `at` (None: no caret)."""
    return f"  {text}" if at is None else f"  {text}\n  {' ' * at}^"
