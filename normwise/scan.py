"""A normalization step by step along an axis, as a recurrent net computes its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from normwise.errors import NormwiseError, PatternError, ShapeError
from normwise.kernels.closed_form import run
from normwise.kernels.reference import Recalled, Steps, four_steps, placed, wide_dtype
from normwise.moments import Moments
from normwise.norm import Norm
from normwise.normalizers import Standardize
from normwise.plan import Plan, plan_for
from normwise.recoveries import Affine, Scale
from normwise.spec import NormSpec
from normwise.transforms import being_traced

TIME = "t"  # what a pattern calls the axis
_BLOCK = 1 << 15  # elements of a block: 256 KiB of float64


def has_time(spec: NormSpec) -> bool:
    """Whether the pattern names the time; if not, every step is normalized by itself."""
    return TIME in spec.pattern.names


def check_scannable(spec: NormSpec) -> None:
    """Refuse what cannot be computed step by step, or for places of different widths.

    Raises:
        PatternError: the pattern's axes are others than features, or batch, time and features; a recovery or memory
            names an axis that it cannot have.
        ShapeError: the features have a size.
        NormwiseError: the memory needs the whole batch at once.
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
        self._commits, self._length = norm._commits(), norm._length()
        if self._commits:
            norm._grow(self._plan)
        self._steps = Steps(self._one, spec.normalizer, spec.recovery)
        self._parameters = placed(spec.recovery, norm._parameters_of_recovery(), spec.parameter_over, self._one, like)
        self._recalled: Recalled | None = None
        if use is not None:
            wide = wide_dtype(like)
            total = like.detach().to(wide).sum().expand(norm._memory_shape())
            self._recalled = norm._recalled(use, self._plan, wide, lambda: norm._within(total))

    def __call__(self, place: int, x: Tensor) -> Tensor:
        """Normalize the input at one place: (n, c)."""
        mask = None if self._alive is None else self._mask(self._alive[:, place : place + 1], self._one)
        steps = self._steps._replace(valid=mask, recalled=self._recalled_at(place))
        result = run(x.unsqueeze(self._dim), steps, self._parameters)
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


Kept: TypeAlias = tuple[Tensor, ...]  # what a derivative needs
Parameters64: TypeAlias = tuple[Tensor | None, Tensor | None]  # weight and bias in float64


class Rows:
    """Calls a layer that normalizes features alone, and remembers nothing, on one step's rows after another's.

    What the calls have in common is done once. On the CPU, rows of float32 or less are standardized in float64 by
    torch's own operator: right to the last digit whatever their mean or magnitude, in a tenth of the operations that
    float32 needs for it.

    Args:
        norm: The layer.
        shape: Of each step: (n, c).
        like: A tensor with the input's dtype and device.
        bias: Added to what a layer without a bias of its own returns. None: nothing is.
    """

    def __init__(self, norm: Norm, shape: tuple[int, int], like: Tensor, bias: Tensor | None = None) -> None:
        spec = norm.spec
        plan = plan_for(spec.pattern, torch.Size(shape), spec.call_sizes)
        self._steps = Steps(plan, spec.normalizer, spec.recovery)
        self._given = placed(spec.recovery, norm._parameters_of_recovery(), spec.parameter_over, plan, like)
        self.parameters: Parameters64 | None = None  # None: float64 is not used
        self._bias = bias
        if _fits_double(self._steps, like):
            wide = [torch.as_tensor(parameter, dtype=torch.float64) for parameter in self._given]
            weight, own, *_ = (*(parameter.expand(1, shape[1]).squeeze(0) for parameter in wide), None, None)
            self.parameters = (weight, own if bias is None else bias.double())

    def __call__(self, place: int, x: Tensor) -> Tensor:
        """Normalize the rows of a step: (n, c)."""
        if self.parameters is None:
            normalized = run(x, self._steps, self._given).output
            return normalized if self._bias is None else normalized + self._bias
        output: Tensor = _InDouble.apply(self, x, *self.parameters)  # type: ignore[no-untyped-call]
        return output

    def measure(self, x: Tensor) -> tuple[Tensor, Kept]:
        """The normalized rows, and what `differentiate` needs."""
        eps = cast("Standardize", self._steps.normalizer).eps
        weight, bias = cast("Parameters64", self.parameters)
        output, mean, inverse = torch.native_layer_norm(x.double(), x.shape[-1:], weight, bias, eps)
        return output.to(x.dtype), (x, mean, inverse)

    def differentiate(self, kept: Kept, d_output: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradients of the rows, and of the parameters in float64."""
        (x, mean, inverse), (weight, bias) = kept, cast("Parameters64", self.parameters)
        wanted = [True, weight is not None, bias is not None]
        d_x, *d_parameters = torch.ops.aten.native_layer_norm_backward.default(
            d_output.double(), x.double(), x.shape[-1:], mean, inverse, weight, bias, wanted
        )
        return d_x.to(x.dtype), *d_parameters

    def define(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        """The same in operations that can be differentiated any number of times."""
        *own, bias = parameters if self._bias is not None else (*parameters, None)
        defined = four_steps(x, self._steps, [parameter for parameter in own if parameter is not None]).output
        return defined if bias is None else defined + bias

    def close(self) -> None:
        """Nothing was remembered."""


def _fits_double(steps: Steps, like: Tensor) -> bool:
    """Whether float64 can be used: fast on a CPU only, right for narrower input, and torch's operator needs an eps."""
    plan, normalizer = steps.plan, steps.normalizer
    return (
        like.device.type == "cpu"
        and like.dtype != torch.float64
        and not being_traced()
        and plan.view == plan.shape
        and plan.reduced == (1,)
        and type(normalizer) is Standardize
        and normalizer.eps > 0
        and type(steps.recovery) in (Affine, Scale, type(None))
    )


class _InDouble(torch.autograd.Function):
    """`Rows` on many rows, block by block, so that what is wide stays in the cache."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.rows = rows
        output, numbers = torch.empty_like(x), []
        for block, normalized in zip(_blocks(x), _blocks(output), strict=True):
            values, (_, *kept) = rows.measure(block)
            normalized.copy_(values)
            numbers += kept
        ctx.save_for_backward(x, weight, bias, *numbers)
        return output

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *numbers = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *derivatives(ctx.rows.define, (x, weight, bias), (d_output,), ctx.needs_input_grad[1:])
        parts = zip(_blocks(x), numbers[::2], numbers[1::2], _blocks(d_output), strict=True)
        found = [ctx.rows.differentiate(kept, d_block) for *kept, d_block in parts]
        d_x, d_weight, d_bias = zip(*found, strict=True)
        return None, torch.cat(d_x), total(d_weight), total(d_bias)


def _blocks(x: Tensor) -> Any:
    return torch.split(x, max(1, _BLOCK // x.shape[-1]))


def total(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of gradients; None if there are none."""
    return None if not parts or parts[0] is None else torch.stack(cast("list[Tensor]", parts)).sum(0)


def derivatives(
    definition: Callable[..., Any], inputs: Sequence[Tensor | None], d_outputs: Sequence[Tensor], wanted: Sequence[bool]
) -> Iterator[Tensor | None]:
    """Differentiable gradients: those that autograd makes of a definition."""
    outputs = definition(*inputs)
    chosen = [cast("Tensor", x) for x, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(outputs, chosen, d_outputs, create_graph=True))
    return (next(found) if is_wanted else None for is_wanted in wanted)
