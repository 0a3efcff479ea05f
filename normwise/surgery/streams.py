"""Along the data flow: through operations that only move channels, to the layers at either end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from normwise.surgery.flow import Step, Value

_SAME = {"clone", "detach", "alias", "contiguous", "lift_fresh"}
_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}


class End(NamedTuple):
    """Where a way along the flow ends: a step, and the channels' dimension in what it reads or writes."""

    step: Step | None  # None: the value came from outside
    dim: int
    reason: str = ""  # why the way ends before a layer


def upstream(value: Value, dim: int, reader: Step | None = None) -> End:
    """The step that has made a value, past operations that only move its channels and that nobody else listens to."""
    while True:
        if len(value.readers) > 1:
            others = ", ".join(str(step) for step in value.readers if step is not reader)
            return End(value.writer, dim, f"what it reads is also read by {others}")
        step = value.writer
        if step is None or step.layer is not None:
            return End(step, dim)
        before = dim_before(step, dim)
        if before is None:
            return End(step, dim)
        value, dim, reader = step.reads[0], before, step


def downstream(value: Value, dim: int) -> Iterator[End]:
    """The steps that read a value, past operations that only move its channels."""
    for step in value.readers:
        after = None if step.layer is not None or step.operation is None else dim_after(step, dim)
        if after is None:
            yield End(step, dim)
        else:
            yield from downstream(step.writes[0], after)


def dim_before(step: Step, dim: int) -> int | None:
    """Where a dimension of an operation's output was in its input; None: the operation does more than move it."""
    if len(step.reads) != 1:
        return None
    rank = step.reads[0].tensor.dim()
    return next((before for before in range(rank) if dim_after(step, before) == dim), None)


def dim_after(step: Step, dim: int) -> int | None:
    """Where a dimension of an operation's input is in its output; None: the operation does more than move it."""
    if len(step.reads) != 1 or len(step.writes) != 1:
        return None
    x, y, rest = step.reads[0].tensor, step.writes[0].tensor, step.arguments[1:]
    name = step.operation.overloadpacket.__name__
    if name in _SAME:
        return dim
    if name in _VIEWS:
        return _in_view(x, y, dim)
    mover = _MOVERS.get(name)
    return None if mover is None else mover(x, y, dim, rest)


def _in_view(x: Tensor, y: Tensor, dim: int) -> int | None:
    """The dimension of the same size with as many elements before it."""
    before, size = math.prod(x.shape[:dim]), x.shape[dim]
    for at in range(y.dim()):
        if y.shape[at] == size and math.prod(y.shape[:at]) == before:
            return at
    return None


def _permuted(x: Tensor, y: Tensor, dim: int, rest: tuple[Any, ...]) -> int | None:
    return [d % x.dim() for d in rest[0]].index(dim)


def _transposed(x: Tensor, y: Tensor, dim: int, rest: tuple[Any, ...]) -> int | None:
    a, b = (d % x.dim() for d in rest) if rest else (0, 1)
    return {a: b, b: a}.get(dim, dim)


def _sliced(x: Tensor, y: Tensor, dim: int, rest: tuple[Any, ...]) -> int | None:
    return dim if x.shape[dim] == y.shape[dim] else None


def _selected(x: Tensor, y: Tensor, dim: int, rest: tuple[Any, ...]) -> int | None:
    gone = int(rest[0]) % x.dim()
    return None if gone == dim else dim - (gone < dim)


def _unsqueezed(x: Tensor, y: Tensor, dim: int, rest: tuple[Any, ...]) -> int | None:
    return dim + (int(rest[0]) % y.dim() <= dim)


def _expanded(x: Tensor, y: Tensor, dim: int, rest: tuple[Any, ...]) -> int | None:
    after = dim + y.dim() - x.dim()
    return after if x.shape[dim] == y.shape[after] else None


_MOVERS = {
    "permute": _permuted,
    "transpose": _transposed,
    "t": _transposed,
    "slice": _sliced,
    "select": _selected,
    "unsqueeze": _unsqueezed,
    "expand": _expanded,
}
