"""What an operation on a model found, changed and left, with its proof, and the way back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Line:
    """One layer in a record: what stood there, what stands there now, and why.

    `after` is None where the layer was left as it was; `why` then says what spoke against a change.
    """

    path: str
    before: str
    after: str | None
    why: str


@dataclass(frozen=True)
class Check:
    """One comparison of a model before and after an operation.

    Attributes:
        probe: What went in.
        difference: The largest difference of two outputs, relative to the largest output where that is above 1.
        tolerance: What was allowed.
        in_double: The same difference in float64, where the one in the model's own dtype is above the tolerance;
            otherwise None.
        error_before: In that case, the distance of the first output from the one in float64.
        error_after: The same for the second output.
    """

    probe: str
    difference: float
    tolerance: float
    in_double: float | None = None
    error_before: float | None = None
    error_after: float | None = None

    def __str__(self) -> str:
        text = f"{self.probe}: {self.difference:.1e}"
        if self.in_double is not None:
            text += f", in float64 {self.in_double:.1e} (rounding: {self.error_before:.1e} before, "
            text += f"{self.error_after:.1e} after)"
        return text


@dataclass(repr=False)
class Record(AbstractContextManager["Record"]):
    """What an operation did. `print` shows a table; `to_dict` and `to_json` give plain data; `undo` takes it back.

    Attributes:
        operation: Its name.
        model: The result. In place it is the module that was given, unless that was itself exchanged.
        changed: Every change, in the model's order.
        left: What was looked at and left as it was, with the reason.
        proof: How the model computed before and after, for operations that claim that nothing changes.
        notes: What else to know.
        measured: Numbers that were measured, by name.

    As a context manager it holds for a while: `with nw.freeze(model): ...`.
    """

    operation: str
    model: nn.Module
    changed: tuple[Line, ...] = ()
    left: tuple[Line, ...] = ()
    proof: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    measured: dict[str, float] = field(default_factory=dict)
    inverse: Callable[[], None] | None = field(default=None, compare=False)
    original: nn.Module | None = field(default=None, compare=False)  # the root, where that was exchanged

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of what was changed."""
        return tuple(line.path for line in self.changed)

    @property
    def largest_difference(self) -> float | None:
        """The largest difference in the proof; None: nothing was compared."""
        return max((check.difference for check in self.proof), default=None)

    def undo(self) -> nn.Module:
        """Take back what the operation did, bit for bit, and give the model as it was.

        What was trained, loaded or moved since then stays in layers whose tensors the operation kept, and is lost where
        it changed them: undo a `fold` in the dtype in which it was done. A second call does nothing.

        Raises:
            SurgeryError: another operation has exchanged the same layers since: undo that first.
        """
        inverse = self.inverse
        if inverse is not None:
            inverse()
            self.inverse = None
            self.model = self.model if self.original is None else self.original
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as plain data."""
        return {
            "operation": self.operation,
            "changed": [asdict(line) for line in self.changed],
            "left": [asdict(line) for line in self.left],
            "proof": [asdict(check) for check in self.proof],
            "notes": list(self.notes),
            "measured": dict(self.measured),
        }

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(_finite(self.to_dict()), indent=2)

    def __repr__(self) -> str:
        return f"Record({self.operation!r}, {len(self.changed)} changed, {len(self.left)} left)"

    def __str__(self) -> str:
        parts = [f"{self.operation}: {len(self.changed)} changed, {len(self.left)} left as they were"]
        if self.changed:
            rows = [(line.path, line.before, line.after or "", line.why) for line in self.changed]
            parts.append(table(("changed", "before", "after", "why"), rows))
        if self.left:
            parts.append(table(("left", "what", "why"), [(line.path, line.before, line.why) for line in self.left]))
        if self.proof:
            parts.append("\n".join(["largest difference of the outputs", *(f"  {check}" for check in self.proof)]))
        parts += [f"note: {note}" for note in self.notes]
        return "\n\n".join(parts)


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(layer: nn.Module) -> str:
    """A layer's class and sizes.

    >>> shown(nn.GroupNorm(2, 8))
    'GroupNorm(2, 8)'
    """
    sizes = re.split(r",? ?\b\w+=|;|, \w+\(", layer.extra_repr(), maxsplit=1)[0]  # no options, no declared parts
    return f"{type(layer).__name__}({sizes})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns of text, aligned; the last one is not padded.

    >>> print(table(("name", "size"), [("a", 1), ("bcdef", 20)]))
    name   size
    a      1
    bcdef  20
    """
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
