"""How a compiled kernel sees a tensor: four groups of axes as they lie in memory, and where parameters and masks are.

The groups are kept, reduced, kept, reduced, outermost first: any word of up to four letters, with groups of one element
for letters that it lacks. Integers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from normwise.plan import Over, Plan, view_strides

Groups = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]

# Runs at least so long are worked through run by run, shorter ones row by row with their columns side by side.
SHORTEST_RUN = 64

_PLACES = {
    "": (),
    "K": (0,),
    "R": (3,),
    "KR": (0, 3),
    "RK": (1, 2),
    "RKR": (1, 2, 3),
    "KRK": (0, 1, 2),
    "KRKR": (0, 1, 2, 3),
}


class Weights(NamedTuple):
    """Where the parameters of the element (a, r, k, s) lie: see csrc/call.h."""

    period_k0: int = 1
    period_k1: int = 1
    k0: int = 0
    r0: int = 0
    k1: int = 0
    r1: int = 0
    size: int = 1


class Geometry(NamedTuple):
    """The dimensions of a plan's view in the four groups, and what follows from them."""

    groups: Groups
    sizes: tuple[int, int, int, int]
    weights: Weights
    by_runs: bool  # whether columns are worked through run by run

    @property
    def kept(self) -> tuple[int, ...]:
        """The dimensions that number the columns, in the order of the kernel's statistics."""
        return self.groups[0] + self.groups[2]

    @property
    def has_dense_columns(self) -> bool:
        """Whether the runs of a column follow one another, however many columns there are."""
        return not self.groups[2]

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return self.sizes[0] * self.sizes[2]


class Misfit(NamedTuple):
    """Why no kernel sees a tensor so."""

    reason: str


def geometry_of(plan: Plan, strides: Sequence[int], over: Over) -> Geometry | Misfit:
    """See a dense tensor of the plan's shape through its word, with parameters over the named axes.

    >>> from normwise.pattern import parse
    >>> from normwise.plan import make_plan
    >>> plan = make_plan(parse("[n] c [h w]"), (8, 64, 14, 14))
    >>> geometry_of(plan, (64 * 196, 196, 14, 1), (("c",),)).sizes
    (1, 8, 64, 196)
    >>> geometry_of(plan, (64 * 196, 1, 14 * 64, 64), (("c",),)).sizes  # channels last
    (1, 1568, 64, 1)
    """
    groups = _groups(plan, strides)
    if groups is None:
        return Misfit("its axes lie in an order that no kernel knows")
    found = _with_weights(plan, groups, over)
    if isinstance(found, Misfit):
        return found
    groups, weights = found
    sizes = tuple(_size(plan, group) for group in groups)
    by_runs = _has_no_inner_columns(plan, strides) or sizes[3] >= SHORTEST_RUN
    if by_runs and weights.r1 not in (0, 1):
        return Misfit("its parameters do not lie in the order of its elements")
    if not by_runs and weights.r0 and (weights.k1 or weights.r1):
        return Misfit("its parameters differ along rows and columns")
    return Geometry(groups, sizes, weights, by_runs)  # type: ignore[arg-type]  # a tuple of four


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order, each once."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def lies_as(shape: Sequence[int], strides: Sequence[int], others: Sequence[int]) -> bool:
    """Whether two tensors of one shape have their elements in the same places."""
    return all(a == b for size, a, b in zip(shape, strides, others, strict=True) if size != 1)


def mask_shape(geometry: Geometry, plan: Plan, mask: Sequence[int]) -> tuple[int, int, int, int]:
    """The sizes of a mask in the four groups, 1 where it tells no elements apart; `mask` is its shape in the view."""
    covered = [any(mask[dim] != 1 for dim in group) for group in geometry.groups]
    if not geometry.by_runs and (covered[2] or covered[3]):
        covered[2] = covered[3] = True  # a byte for each lane
    return tuple(  # type: ignore[return-value]  # of four
        size if is_covered else 1 for size, is_covered in zip(geometry.sizes, covered, strict=True)
    )


def _groups(plan: Plan, strides: Sequence[int]) -> Groups | None:
    """The view's dimensions by letter of the word; those of size 1 keep their place if that makes a word."""
    lies = view_strides(plan, strides)
    in_order = sorted(range(len(plan.view)), key=lambda dim: (-lies[dim], plan.view[dim] == 1, dim))
    for order in (in_order, [dim for dim in in_order if plan.view[dim] != 1]):
        runs = [(letter, tuple(group)) for letter, group in groupby(order, lambda d: "R" if d in plan.reduced else "K")]
        places = _PLACES.get("".join(letter for letter, _ in runs))
        if places is not None:
            found: list[tuple[int, ...]] = [(), (), (), ()]
            for place, (_, group) in zip(places, runs, strict=True):
                found[place] = group
            return tuple(found)  # type: ignore[return-value]  # of four
    return None


def _has_no_inner_columns(plan: Plan, strides: Sequence[int]) -> bool:
    groups = _groups(plan, strides)
    return groups is not None and not groups[2]


def _with_weights(plan: Plan, groups: Groups, over: Over) -> tuple[Groups, Weights] | Misfit:
    """Where parameters over the named axes lie; a run whose first axes have parameters becomes rows of shorter runs."""
    steps = _parameter_strides(plan, over)
    if not steps:
        return groups, Weights()
    misfit = Misfit("its parameters do not lie in the order of its elements")
    k0, r0, k1, r1 = groups
    if r0 == () and k1 == ():
        r0, r1 = _divided(plan, r1, steps)
    groups = (k0, r0, k1, r1)
    found = []
    for group, may_repeat in zip(groups, (True, False, True, False), strict=True):
        if not may_repeat and _period(plan, group, steps) not in (1, _size(plan, group)):
            return misfit
        step = _step(plan, group, steps)
        if step is None:
            return misfit
        found.append(step)
    periods = _period(plan, k0, steps), _period(plan, k1, steps)
    size = math.prod(plan.view[dim] for dim in steps)
    return groups, Weights(*periods, *found, size)  # type: ignore[call-arg]  # four and one


def _parameter_strides(plan: Plan, over: Over) -> dict[int, int]:
    """The stride of each of the view's dimensions in a contiguous parameter over the named axes."""
    dims = [plan.names.index(name) for names in over for name in names]
    return {dim: math.prod(plan.view[later] for later in dims[place + 1 :]) for place, dim in enumerate(dims)}


def _divided(plan: Plan, run: tuple[int, ...], steps: dict[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A run in two where parameters begin or end: (k, h w) of a group, whose parameters are over k."""
    has = [dim in steps for dim in run if plan.view[dim] != 1]
    changes = [place for place in range(1, len(has)) if has[place] != has[place - 1]]
    if len(changes) != 1:
        return (), run
    real = [dim for dim in run if plan.view[dim] != 1]
    return tuple(real[: changes[0]]), tuple(real[changes[0] :])


def _period(plan: Plan, group: tuple[int, ...], steps: dict[int, int]) -> int:
    """After how many elements of a group its parameters repeat; 1 if it has none."""
    return math.prod(plan.view[dim] for dim in group if dim in steps)


def _step(plan: Plan, group: tuple[int, ...], steps: dict[int, int]) -> int | None:
    """How far apart in a parameter neighbours of a group are, 0 for a group without; None if that is not one number."""
    real = [dim for dim in group if plan.view[dim] != 1]
    having = [dim for dim in real if dim in steps]
    if not having:
        return 0
    if real[-len(having) :] != having:
        return None  # parameters are the same for neighbours, and differ further out
    if any(steps[a] != steps[b] * plan.view[b] for a, b in pairwise(having)):
        return None
    return steps[having[-1]]


def _size(plan: Plan, group: tuple[int, ...]) -> int:
    return math.prod(plan.view[dim] for dim in group)
