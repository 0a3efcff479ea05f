"""A normalization step by step along an axis, as a recurrent net computes its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normwise.errors import NormwiseError, PatternError, ShapeError
from normwise.kernels.reference import Recalled, Steps, four_steps, placed, wide_dtype
from normwise.kernels.run import run
from normwise.moments import Moments
from normwise.norm import Norm
from normwise.normalizers import Standardize
from normwise.plan import Plan, plan_for
from normwise.recoveries import Affine, Scale
from normwise.spec import NormSpec

TIME = "t"  # what a pattern calls the axis


def has_time(spec: NormSpec) -> bool:
    """Whether the pattern names the time; if not, every step is normalized by itself."""
    return TIME in spec.pattern.names


def check_scannable(spec: NormSpec) -> None:
    """Refuse what cannot be computed step by step, or for places of different widths.

    Raises:
        PatternError: the pattern's axes are others than features, or batch, time and features; a recovery or memory
            names an axis that it cannot have.
        ShapeError: the features have a size.
        NormwiseError: the memory needs the whole batch at once; there is an activation, or a gate.
    """
    pattern = spec.pattern
    dims = [[axis.name for axis in dim] for dim in pattern.dims]
    features = set(dims[-1])
    if not has_time(spec):
        if len(dims) != 2 or any(axis.reduced for axis in pattern.dims[0]):
            raise PatternError(
                "norm normalizes features alone, as '... [c]', or its three axes are batch, time and features, and "
                "time is called 't', as in '[n] t c'",
                spec.text,
            )
    elif len(dims) != 3 or dims[1] != [TIME] or len(dims[0]) > 1 or pattern.open_ended:
        raise pattern.error("norm's three axes are batch, time and features, as in '[n] t c'", TIME)
    elif pattern.axis(TIME).reduced:
        raise pattern.error(
            "a step cannot be normalized with the steps after it: one memory for all steps is '[n] t c' with "
            "Moving('c', ...)",
            TIME,
        )
    if features <= {name for name, _ in spec.sizes}:
        sizes = ", ".join(f"{name}={size}" for name, size in spec.sizes if name in features)
        raise ShapeError(f"norm is made for places of different widths, so leave out {sizes}")
    for name in (name for dim in spec.parameter_over for name in dim):
        if name not in features:
            raise pattern.error(f"norm has the same parameters at every step, so none over '{name}'", name)
    _check_memory(spec, features)
    for option, value in (("activation", spec.activation), ("gate", spec.gate)):
        if value is not None:
            raise NormwiseError(f"a cell applies functions of its own to what norm gives: leave out {option}={value!r}")


def _check_memory(spec: NormSpec, features: set[str]) -> None:
    memory = spec.memory
    if memory is None:
        return
    if memory.ghost is not None or memory.renorm is not None:
        option = "ghost" if memory.ghost is not None else "renorm"
        raise NormwiseError(f"norm is computed step by step, which {option}= cannot be: leave it out of {memory!r}")
    for name in (name for dim in spec.memory_over for name in dim):
        if name not in {*features, TIME}:
            raise spec.pattern.error(f"norm remembers time steps and features, and not '{name}'", name)
    if (TIME,) in spec.memory_over and spec.elastic is None and TIME not in dict(spec.sizes):
        raise spec.pattern.error(
            "a memory for each time step says how many there are, t=50, or what is beyond the last, "
            "beyond={'t': 'last'}",
            TIME,
        )


class Scan:
    """Calls a layer on one place of an axis after another; `close` lets all of them enter its memory as one batch.

    The result at each place, and the memory at the end, are bit for bit those of one call with all places.

    Args:
        norm: The layer.
        axis: The axis's name, a dimension of its own in the pattern, which keeps it.
        shape: Of the input with all places, as the pattern names it: (n, t, c).
        like: A tensor with the input's dtype and device, whose values tell this batch from others.
        alive: Which examples count at which place, (n, t); None: all do.
    """

    def __init__(
        self, norm: Norm, axis: str, shape: tuple[int, ...], like: Tensor, alive: Tensor | None = None
    ) -> None:
        spec = norm.spec
        self._norm, self._alive = norm, alive
        self._dim = [axes[0].name for axes in spec.pattern.dims].index(axis)
        self._measured: dict[int, Moments] = {}
        one = tuple(1 if dim == self._dim else size for dim, size in enumerate(shape))
        sizes = tuple(pair for pair in spec.call_sizes if pair[0] != axis)
        self._plan = plan_for(spec.pattern, torch.Size(shape), spec.call_sizes)
        self._one = plan_for(spec.pattern, torch.Size(one), sizes)
        mask = None if alive is None else self._mask(alive, self._plan)
        norm._check_mask(mask, self._plan)
        use = norm._checked_use(self._plan, mask)
        if spec.unknown:
            norm._materialize_for(self._plan)
        self._commits, self._length = norm._commits() and use != "instead", norm._length()
        if self._commits:
            norm._grow(self._plan)
        self._steps = Steps(self._one, spec.normalizer, spec.recovery)
        self._parameters, self._over = norm._parameters_of_recovery(), spec.parameter_over
        self._recalled: Recalled | None = None
        if use is not None:
            wide = wide_dtype(like)
            total = like.detach().to(wide).abs().sum().expand(norm._memory_shape())
            self._recalled = norm._recalled(use, self._plan, wide, lambda: norm._within(total), mask)

    def __call__(self, place: int, x: Tensor) -> Tensor:
        """Normalize the input at one place: (n, c)."""
        mask = None if self._alive is None else self._mask(self._alive[:, place : place + 1], self._one)
        steps = self._steps._replace(valid=mask, recalled=self._recalled_at(place))
        result, _ = run(x.unsqueeze(self._dim), steps, self._parameters, self._over, remembers=self._commits)
        if result.moments is not None and self._commits:
            self._measured[place] = result.moments
        return result.output.squeeze(self._dim)

    def close(self) -> None:
        """Let what was measured enter the memory."""
        if not self._measured:
            return
        parts = [self._measured[place] for place in sorted(self._measured)]

        def along(pieces: Sequence[Tensor | int]) -> Tensor:
            return torch.cat([torch.as_tensor(piece) for piece in pieces], self._dim)

        count = along([part.count for part in parts]) if isinstance(parts[0].count, Tensor) else parts[0].count
        mean, m2 = along([part.mean for part in parts]), along([part.m2 for part in parts])
        self._norm._enter(self._plan, Moments(count, mean, m2), self._length)

    def _mask(self, alive: Tensor, plan: Plan) -> Tensor:
        return alive.reshape([*alive.shape, *([1] * (len(plan.view) - alive.dim()))])

    def _recalled_at(self, place: int) -> Recalled | None:
        recalled, dim = self._recalled, self._dim
        if recalled is None:
            return None
        at = tuple(s.narrow(dim, place, 1) if s.shape[dim] != 1 else s for s in recalled.statistics)
        return recalled._replace(statistics=at)


class Rows:
    """Calls a layer that normalizes features alone, and remembers nothing, on one step's rows after another's.

    Args:
        norm: The layer.
        shape: Of each step: (n, c).
        like: A tensor with the input's dtype and device.
    """

    def __init__(self, norm: Norm, shape: tuple[int, int], like: Tensor) -> None:
        spec = norm.spec
        plan = plan_for(spec.pattern, torch.Size(shape), spec.call_sizes)
        self._steps = Steps(plan, spec.normalizer, spec.recovery)
        self._given, self._over = norm._parameters_of_recovery(), spec.parameter_over
        self._placed = placed(spec.recovery, self._given, self._over, plan, like)

    def __call__(self, place: int, x: Tensor) -> Tensor:
        """Normalize the rows of a step: (n, c)."""
        return run(x, self._steps, self._given, self._over)[0].output

    @property
    def eps(self) -> float | None:
        """Of the standardization that this is, where `kernels.rows` can do it; None: it is something else."""
        plan, normalizer = self._steps.plan, self._steps.normalizer
        whole = plan.view == plan.shape and plan.reduced == (1,)
        known = type(normalizer) is Standardize and type(self._steps.recovery) in (Affine, Scale, type(None))
        return normalizer.eps or None if whole and known and isinstance(normalizer, Standardize) else None

    @property
    def parameters(self) -> tuple[Tensor | None, Tensor | None]:
        """The recovery's weight and bias, (c,) each; None: there is none."""
        features = self._steps.plan.shape[-1]
        weight, bias, *_ = (*(torch.as_tensor(given).expand(1, features)[0] for given in self._placed), None, None)
        return weight, bias

    def define(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The same with these parameters, in operations that can be differentiated any number of times."""
        defined = four_steps(x, self._steps._replace(recovery=None)).output
        defined = defined if weight is None else defined * weight
        return defined if bias is None else defined + bias

    def close(self) -> None:
        """Nothing was remembered."""
