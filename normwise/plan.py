"""Pattern x shape: which view of the tensor the four steps work on, and what its columns are. Integers only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from normwise.errors import ShapeError, caret
from normwise.pattern import ELLIPSIS, Axis, Pattern
from normwise.transforms import being_traced

Sizes: TypeAlias = tuple[tuple[str, int], ...]
Over: TypeAlias = tuple[tuple[str, ...], ...]


class Plan(NamedTuple):
    """How one shape is seen by one pattern.

    The matrix X' of the four steps is never formed: it is the `view` of the tensor in which every axis of the pattern
    is a dimension of its own; `reduced` are the dimensions that run down a column, the others number the columns.

    >>> from normwise.pattern import parse
    >>> plan = make_plan(parse("n (g [k]) [...]"), (2, 6, 4, 5), (("g", 3),))
    >>> plan.view, plan.reduced, plan.rows, plan.columns
    ((2, 3, 2, 4, 5), (2, 3, 4), 40, 6)
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    names: tuple[str, ...]  # one for each dimension of the view; those of '...' are all called '...'
    reduced: tuple[int, ...]
    parts: tuple[int, ...]  # into how many dimensions of the view each dimension of the shape is split

    @property
    def rows(self) -> int:
        """Samples in a column."""
        return dim_product(self.view, self.reduced)

    @property
    def columns(self) -> int:
        """Things to be normalized."""
        return math.prod([size for dim, size in enumerate(self.view) if dim not in self.reduced])

    def size(self, name: str) -> int:
        """The size of a named axis."""
        return self.view[self.names.index(name)]


def make_plan(pattern: Pattern, shape: tuple[int, ...], sizes: Sizes = ()) -> Plan:
    """See a shape through a pattern; `sizes` are the axis sizes already known.

    Raises:
        ShapeError: the rank does not fit, a dimension cannot be split, or a size contradicts a known one.
    """
    known = dict(sizes)
    spread = _spread(pattern, shape)
    view = [size for dim, axes in enumerate(spread) for size in _split(pattern, axes, dim, shape, known)]
    names = [axis.name for axes in spread for axis in axes]
    reduced = [dim for dim, axis in enumerate(axis for axes in spread for axis in axes) if axis.reduced]
    parts = [len(axes) for axes in spread]
    if not reduced:  # '[...]' that stands for no dimension: each element is a column of its own
        reduced.append(len(view))
        view.append(1)
        names.append(ELLIPSIS)
    return Plan(shape, tuple(view), tuple(names), tuple(reduced), tuple(parts))


cached_plan = lru_cache(maxsize=4096)(make_plan)


def plan_for(pattern: Pattern, shape: torch.Size, sizes: Sizes) -> Plan:
    """`make_plan`, remembered between eager calls; a compiler traces the plain function."""
    if being_traced():
        return make_plan(pattern, tuple(shape), sizes)
    return cached_plan(pattern, tuple(shape), sizes)


def place(tensor: Tensor, over: Over, plan: Plan) -> Tensor:
    """A parameter or a memory, over named axes, shaped to broadcast against the plan's view."""
    dims = _dims(over, plan)
    if dims != sorted(dims):
        order = sorted(range(len(dims)), key=dims.__getitem__)
        tensor = tensor.reshape([plan.view[dim] for dim in dims]).permute(order)
    return tensor.reshape([size if dim in dims else 1 for dim, size in enumerate(plan.view)])


def averaged(shape: Sequence[int], over: Over, plan: Plan) -> tuple[int, ...]:
    """The kept dimensions that a memory over the named axes does not tell apart."""
    dims = _dims(over, plan)
    return tuple(dim for dim, size in enumerate(shape) if size != 1 and dim not in dims)


def gather(statistic: Tensor, over: Over, plan: Plan) -> Tensor:
    """The inverse of `place`, for a statistic that has size 1 along every other dimension."""
    dims = _dims(over, plan)
    if dims != sorted(dims):
        inverse = [sorted(dims).index(dim) for dim in dims]
        statistic = statistic.reshape([plan.view[dim] for dim in sorted(dims)]).permute(inverse)
    return statistic.reshape(over_shape(over, {name: plan.size(name) for dim in over for name in dim}))


def _dims(over: Over, plan: Plan) -> list[int]:
    """The dimensions of the view that hold the named axes."""
    return [plan.names.index(name) for dim in over for name in dim]


def dim_product(shape: Sequence[int], dims: Iterable[int]) -> int:
    """How many elements the given dimensions of a shape span."""
    return math.prod([shape[dim] for dim in dims])


def over_shape(over: Over, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a parameter or memory over named axes."""
    return tuple(math.prod([sizes[name] for name in dim]) for dim in over)


def memory_word(plan: Plan, strides: Sequence[int]) -> str:
    """The order of kept (K) and reduced (R) axes as they lie in memory, neighbours of one kind merged.

    A kernel belongs to a word, not to a layer's name. `strides` are those of the tensor with the plan's shape.

    >>> from normwise.pattern import parse
    >>> memory_word(make_plan(parse("[n] c [...]"), (8, 3, 4, 4)), (48, 16, 4, 1))
    'RKR'
    >>> memory_word(make_plan(parse("[n] c [...]"), (8, 3, 4, 4)), (48, 1, 12, 3))  # channels last
    'RK'
    """
    lies = view_strides(plan, strides)
    outermost_first = sorted((dim for dim, size in enumerate(plan.view) if size != 1), key=lambda dim: -lies[dim])
    letters = ["R" if dim in plan.reduced else "K" for dim in outermost_first]
    return "".join(letter for letter, _ in groupby(letters))


def becomes_contiguous(plan: Plan, strides: Sequence[int]) -> bool:
    """Whether the result is contiguous, although the input is a view that is not.

    It is where the last axes are normalized over, by name, and an axis that is kept lies closer together in memory than
    they do: the next matrix product reads rows, and would have to copy them. torch.nn.LayerNorm does the same. `[...]`
    is no row, but an image's positions; and channels_last is kept whatever is normalized over.

    >>> from normwise.pattern import parse
    >>> becomes_contiguous(make_plan(parse("... [d]"), (8, 4, 4, 64)), (1024, 4, 1, 16))  # x.permute(0, 2, 3, 1)
    True
    >>> becomes_contiguous(make_plan(parse("... [d]"), (8, 32, 64)), (64, 512, 1))  # x.transpose(0, 1)
    False
    """
    first = plan.reduced[0]
    if plan.reduced != tuple(range(first, len(plan.view))):
        return False
    if ELLIPSIS in plan.names[first:] or _is_channels_last(plan.shape, strides):
        return False
    lies = view_strides(plan, strides)
    # an axis of one element lies nowhere, and one that is repeated lies wherever a copy has it
    real = [dim for dim, size in enumerate(plan.view) if size != 1 and lies[dim] != 0]
    return any(lies[kept] < lies[row] for kept in real if kept < first for row in real if row >= first)


def _is_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether an image or a volume lies in torch's memory format of that name, with or without gaps."""
    if len(shape) not in (4, 5):
        return False
    in_order = [strides[dim] for dim in (0, *range(2, len(shape)), 1) if shape[dim] != 1]
    return shape[1] != 1 and all(outer >= inner for outer, inner in pairwise(in_order))


def view_strides(plan: Plan, strides: Sequence[int]) -> list[int]:
    """Strides of the view: the last axis of a split dimension has the dimension's stride, the others multiples."""
    lies: list[int] = []
    for stride, parts in zip(strides, plan.parts, strict=True):
        sizes = plan.view[len(lies) : len(lies) + parts]
        lies.extend(stride * math.prod(sizes[part + 1 :]) for part in range(parts))
    lies.extend([1] * (len(plan.view) - len(lies)))  # the dimension of one element that '[...]' for none adds
    return lies


def _spread(pattern: Pattern, shape: tuple[int, ...]) -> list[tuple[Axis, ...]]:
    """The axes of each dimension of the shape, `...` repeated as often as it stands for a dimension."""
    spare = len(shape) - len(pattern.dims)
    if spare < -1 or (spare != 0 and not pattern.open_ended):
        least = len(pattern.dims) - pattern.open_ended
        wants = f"{'at least ' if pattern.open_ended else ''}{least} dimension{'s' if least != 1 else ''}"
        message = f"the pattern names {wants}, the input has {len(shape)}: shape {shape}"
        raise ShapeError(f"{message}\n{caret(pattern.text, None)}")
    spread: list[tuple[Axis, ...]] = []
    for axes in pattern.dims:
        spread.extend([axes] * (spare + 1 if axes[0].name == ELLIPSIS else 1))
    return spread


def _split(
    pattern: Pattern, axes: tuple[Axis, ...], dim: int, shape: tuple[int, ...], known: Mapping[str, int]
) -> list[int]:
    """The sizes of the axes of one dimension; at most one of them may be unknown."""
    total = shape[dim]
    sizes = [known.get(axis.name) for axis in axes]
    unknown = [axis for axis, size in zip(axes, sizes, strict=True) if size is None]
    given = math.prod([size for size in sizes if size is not None])
    if len(axes) == 1 and not unknown and given != total:
        hint = _elsewhere(pattern, axes[0], given, shape)
        message = f"axis '{axes[0].name}' has size {given}, but dimension {dim} has {total}"
        raise _misfit(pattern, axes[0], message + hint, shape)
    if len(unknown) > 1:
        way_out = f"give the size of one of them, for example {unknown[0].name}={2 if total % 2 == 0 else 1}"
        raise _misfit(pattern, axes[0], f"dimension {dim} cannot be split into {_group(axes)}: {way_out}", shape)
    if not unknown and given != total:
        product = " x ".join(f"{axis.name}={known[axis.name]}" for axis in axes)
        raise _misfit(pattern, axes[0], f"dimension {dim} has {total}, but {product} makes {given}", shape)
    if unknown and total % given:
        knowns = " ".join(f"{axis.name}={known[axis.name]}" for axis in axes if axis.name in known)
        reason = f"{total} is not a multiple of {given} ({knowns})"
        raise _misfit(pattern, axes[0], f"dimension {dim} cannot be split into {_group(axes)}: {reason}", shape)
    return [total // given if size is None else size for size in sizes]


def _elsewhere(pattern: Pattern, axis: Axis, size: int, shape: tuple[int, ...]) -> str:
    """A hint for a tensor whose dimensions come in another order than the pattern's."""
    dims = [dim for dim, found in enumerate(shape) if found == size]
    if len(dims) != 1:
        return ""
    others = [_written(axes) for axes in pattern.dims if axis not in axes]
    place = len(others) if dims[0] == len(shape) - 1 else dims[0]
    hint = f" (axis {dims[0]} has {size}: if that is '{axis.name}'"
    if place not in (0, len(others)) and pattern.open_ended:
        return f"{hint}, the pattern must name the axes in that order)"
    text = " ".join([*others[:place], _written((axis,)), *others[place:]])
    return f"{hint}, declare Norm('{text}', ...), or move it)"


def _written(axes: Iterable[Axis]) -> str:
    """A dimension as a pattern has it."""
    names = [f"[{axis.name}]" if axis.reduced else axis.name for axis in axes]
    return names[0] if len(names) == 1 else f"({' '.join(names)})"


def _group(axes: Iterable[Axis]) -> str:
    return f"({' '.join(axis.name for axis in axes)})"


def _misfit(pattern: Pattern, axis: Axis, message: str, shape: tuple[int, ...]) -> ShapeError:
    return ShapeError(f"{message}: shape {shape}\n{caret(pattern.text, axis.at)}")
