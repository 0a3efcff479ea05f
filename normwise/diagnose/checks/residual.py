"""The residual streams of a model, by data flow: sums in which one side is computed from the other."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from normwise.surgery.flow import WHOLES, Flow, Step, Value


@dataclass(frozen=True, eq=False)
class Link:
    """From one residual sum to the next, along what is added unchanged.

    Attributes:
        start, end: The two sums.
        norms: The normalizations between them: some, where the stream itself is normalized.
    """

    start: Step
    end: Step
    norms: tuple[Step, ...]


def streams(flow: Flow, norms: Collection[nn.Module]) -> list[list[Link]]:
    """The residual streams of a forward, each as the links between its sums in order.

    A residual sum adds two tensors of one shape, of which one is computed from the other by parameters. The next sum
    belongs to the same stream if the older of its two sides is the sum, or made of it by normalizations and by
    operations that read nothing else.
    """
    order = {id(step): at for at, step in enumerate(flow.steps)}
    found: dict[int, list[Link]] = {}  # by the last sum of a stream
    ended: list[list[Link]] = []
    sums: set[int] = set()
    for step in flow.steps:
        skip = _skipped(flow, step, order)
        if skip is None:
            continue
        sums.add(id(step))
        start, between = _back(flow, skip, sums, norms)
        if start is not None:
            links = found.pop(id(start), [])
            if not links:
                ended.append(links)
            links.append(Link(start, step, between))
            found[id(step)] = links
    return ended


def _skipped(flow: Flow, step: Step, order: dict[int, int]) -> Value | None:
    """The side of a residual sum from which the other one is computed; None: it is no such sum."""
    if step.operation is None or step.operation.overloadpacket.__name__ not in ("add", "add_"):
        return None
    sides = _data(flow, step)
    if len(sides) != 2 or sides[0].tensor.shape != sides[1].tensor.shape or sides[0].tensor.dim() < 2:
        return None
    first, second = sides
    if _branches(flow, second, first, order):
        return first
    return second if _branches(flow, first, second, order) else None


def _branches(flow: Flow, value: Value, source: Value, order: dict[int, int]) -> bool:
    """Whether a value is computed from another one with the help of parameters."""
    since = -1 if source.writer is None else order.get(id(source.writer), -1)
    waiting, seen = [value], dict[int, Step]()
    while waiting:
        step = waiting.pop().writer
        if step is not None and id(step) not in seen and order.get(id(step), -1) > since:
            seen[id(step)] = step
            waiting += _all(step)
    reaches = any(read is source for step in seen.values() for read in _all(step))
    return reaches and any(_has_parameters(flow, step) for step in seen.values())


def _has_parameters(flow: Flow, step: Step) -> bool:
    return isinstance(step.layer, WHOLES) or any(id(value.tensor) in flow.holders for value in _all(step))


def _all(step: Step) -> list[Value]:
    return [*step.reads, *step.takes]


def _back(
    flow: Flow, value: Value, sums: set[int], norms: Collection[nn.Module]
) -> tuple[Step | None, tuple[Step, ...]]:
    """The residual sum that a value is made of without reading anything else, and the normalizations on the way."""
    between: list[Step] = []
    while (step := value.writer) is not None and id(step) not in sums:
        data = _data(flow, step)
        is_norm = step.layer in norms
        if len(data) != 1 or (not is_norm and _has_parameters(flow, step)):
            return None, ()
        if is_norm:
            between.append(step)
        value = data[0]
    return step, tuple(between)


def _data(flow: Flow, step: Step) -> list[Value]:
    """What a step reads besides parameters and single numbers."""
    values = step.takes if step.layer is not None else step.reads
    return [value for value in values if id(value.tensor) not in flow.holders and value.tensor.dim() > 0]
