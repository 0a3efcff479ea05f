"""The declaration of a normalization: a frozen value whose repr is the code that makes it again."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, SupportsIndex

from normwise.errors import PatternError, ShapeError, TooFewSamplesError
from normwise.memory import Memory
from normwise.normalizers import Normalizer
from normwise.pattern import Pattern, check_known, parse, parse_names
from normwise.plan import Over, Plan, Sizes
from normwise.pointwise import Activation, Gate, check_functions
from normwise.recoveries import Recovery


@dataclass(frozen=True)
class NormSpec:
    """Pattern, normalizer, recovery, memory, the axis sizes known so far, and what is done after the recovery.

    Raises:
        PatternError: the pattern cannot be read; a recovery, a memory or a size names an axis that is not there; a
            memory names an axis that is normalized over; nothing is normalized over.
        ValueError: there is no such activation, or function of a gate.
    """

    text: str
    normalizer: Normalizer
    recovery: Recovery | None = None
    memory: Memory | None = None
    sizes: Sizes = ()
    activation: Activation | None = None
    gate: Gate | None = None  # the function of a gate that calls bring, by which the output is multiplied
    pattern: Pattern = field(init=False, repr=False, compare=False)
    parameter_over: Over = field(init=False, repr=False, compare=False)
    memory_over: Over = field(init=False, repr=False, compare=False)
    memory_buffers: tuple[str, ...] = field(init=False, repr=False, compare=False)  # their names in a layer
    unknown: tuple[str, ...] = field(init=False, repr=False, compare=False)  # axes that calls must agree on, unsized
    call_sizes: Sizes = field(init=False, repr=False, compare=False)  # what is known of the sizes of a call's input
    ready: dict[Any, Any] = field(init=False, repr=False, compare=False, default_factory=dict)  # see `Norm._shortly`

    def __post_init__(self) -> None:
        pattern = parse(self.text)
        object.__setattr__(self, "pattern", pattern)
        check_functions(self.activation, self.gate)
        object.__setattr__(self, "sizes", checked_sizes(self.sizes))
        object.__setattr__(self, "parameter_over", () if self.recovery is None else parse_names(self.recovery.over))
        object.__setattr__(self, "memory_over", () if self.memory is None else parse_names(self.memory.over))
        object.__setattr__(self, "memory_buffers", tuple(f"running_{name}" for name in self.normalizer.remembers))
        if not any(axis.reduced for axis in pattern.axes):
            raise PatternError("nothing is normalized over: put an axis in brackets", self.text)
        check_known(pattern, _flat(self.parameter_over), type(self.recovery).__name__)
        check_known(pattern, _flat(self.memory_over), type(self.memory).__name__)
        check_known(pattern, (name for name, _ in self.sizes), "a size")
        if self.memory is not None:
            self._check_memory(self.memory)
        known = dict(self.sizes)
        axes = dict.fromkeys((*_flat(self.parameter_over), *_flat(self.memory_over)))
        fixed = tuple(name for name in axes if name != self.elastic)
        object.__setattr__(self, "unknown", tuple(name for name in fixed if name not in known))
        object.__setattr__(self, "call_sizes", tuple(pair for pair in self.sizes if pair[0] != self.elastic))

    def _check_memory(self, memory: Memory) -> None:
        kind = type(memory).__name__
        if not self.normalizer.remembers:
            raise PatternError(f"{type(self.normalizer).__name__} has no statistics for {kind} to remember", self.text)
        for name in _flat(self.memory_over):
            if self.pattern.axis(name).reduced:
                raise self.pattern.error(
                    f"{kind} remembers axis '{name}', which is normalized over and so is gone", name
                )
        elastic = self.elastic
        if elastic is not None:
            check_known(self.pattern, [elastic], f"{kind}'s beyond")
            if any(len(axes) > 1 for axes in self.pattern.dims if elastic in [axis.name for axis in axes]):
                message = f"the length of axis '{elastic}' may differ, so it is a dimension of its own"
                raise self.pattern.error(message, elastic)
            if (elastic,) not in self.memory_over:
                raise self.pattern.error(
                    f"{kind} says what is beyond axis '{elastic}', but does not remember it", elastic
                )
            if elastic in _flat(self.parameter_over):
                raise self.pattern.error(
                    f"the length of axis '{elastic}' may differ, so it can have no parameters", elastic
                )
        first = self.pattern.dims[0]
        if memory.ghost is not None and not (len(first) == 1 and first[0].reduced):
            raise self.pattern.error(
                f"{kind} divides the batch, the first axis, which is not normalized over", first[0].name
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy finds out anew what calls need."""
        return {**self.__dict__, "ready": {}}

    def __repr__(self) -> str:
        """As a dataclass's; no activation and no gate are not mentioned."""
        absent = {name for name in ("activation", "gate") if getattr(self, name) is None}
        shown = [f.name for f in fields(self) if f.repr and f.name not in absent]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @property
    def elastic(self) -> str | None:
        """The remembered axis whose length may differ from call to call."""
        return None if self.memory is None else self.memory.elastic

    @property
    def joins_batches(self) -> bool:
        """Whether two batches of columns are joined sample by sample: the batch is normalized over."""
        return self.pattern.axes[0].reduced

    def with_sizes(self, sizes: Mapping[str, int]) -> NormSpec:
        """The same declaration with more sizes known."""
        return replace(self, sizes=tuple({**dict(self.sizes), **sizes}.items()))

    def sizes_from(self, shapes: Iterable[tuple[Over, Sequence[int]]]) -> dict[str, int]:
        """The unknown sizes, read from the shapes of parameters or memories over named axes (a checkpoint's).

        Raises:
            ShapeError: a flat axis such as "(g k)" of which no part is known, or shapes that do not fit.
        """
        known = dict(self.call_sizes)  # the elastic axis is as long as the checkpoint has it
        for over, shape in shapes:
            if len(over) != len(shape):
                raise ShapeError(f"expected a shape over {_written(over)}, got {tuple(shape)}")
            for names, size in zip(over, shape, strict=True):
                known.update(_solve(names, size, known))
        return {name: known[name] for name in self.unknown if name in known}


def checked_sizes(sizes: Iterable[tuple[str, SupportsIndex]]) -> Sizes:
    """Axis sizes as whole numbers, sorted by name.

    Raises:
        ShapeError: a size that is no whole number from 1 on.
    """
    checked: dict[str, int] = {}
    for name, size in sizes:
        if isinstance(size, bool) or not hasattr(size, "__index__") or operator.index(size) < 1:
            raise ShapeError(f"the size of axis '{name}' is a whole number from 1 on, not {size!r}")
        checked[name] = operator.index(size)
    return tuple(sorted(checked.items()))


_WITH_MEMORY = ", evaluation mode, or degenerate='memory' for what evaluation would make of it"


def check_samples(pattern: Pattern, plan: Plan, *, remembers: bool) -> None:
    """Refuse to standardize columns of one sample, unless only features are normalized over and nothing is remembered.

    Raises:
        TooFewSamplesError: naming the pattern, the shape and the ways out.
    """
    if plan.rows >= 2 or (pattern.over_features_only and not remembers):
        return
    over = ", ".join(axis.name for axis in pattern.axes if axis.reduced)
    way_out = _way_out(pattern, plan) + _WITH_MEMORY * remembers
    raise TooFewSamplesError(
        f"shape {plan.shape} leaves {plan.rows} sample a column of '{pattern.text}' (over {over}), "
        f"and one sample has no variance: {way_out}"
    )


def _way_out(pattern: Pattern, plan: Plan) -> str:
    """What would give a column more samples."""
    if pattern.axes[0].reduced:
        return "use a larger batch"
    for axes, total in zip(pattern.dims, plan.shape, strict=False):
        kept = [axis.name for axis in axes if not axis.reduced]
        if len(axes) == 2 and len(kept) == 1:
            counts = [str(count) for count in range(1, total) if total % count == 0]
            return f"use fewer groups, {kept[0]} = {', '.join(counts)}" if counts else "use more channels"
    return "use larger maps"


def _flat(over: Over) -> tuple[str, ...]:
    return tuple(name for dim in over for name in dim)


def _written(over: Over) -> str:
    return " ".join(dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in over)


def _solve(names: tuple[str, ...], size: int, known: Mapping[str, int]) -> dict[str, int]:
    """The one unknown size among the axes of a flat dimension."""
    unknown = [name for name in names if name not in known]
    given = math.prod([known[name] for name in names if name in known])
    if len(unknown) > 1:
        group = f"({' '.join(names)})"
        raise ShapeError(
            f"a checkpoint of {size} cannot be split into {group}: give the size of {unknown[0]} or {unknown[1]}"
        )
    if size % given or (not unknown and size != given):
        raise ShapeError(
            f"a checkpoint of {size} does not fit {' x '.join(f'{n}={known[n]}' for n in names if n in known)}"
        )
    return {unknown[0]: size // given} if unknown else {}
