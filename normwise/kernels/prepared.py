"""A call that is prepared for a compiled kernel, and the function that autograd differentiates.

`Kernel` is what is known of a call before its tensors come: it is made once for a declaration, a shape, strides and a
dtype, so that a call looks little up. What a backend adds is how a call's numbers reach its kernels, forward and
backward. The tensors are checked here, because kernels are given addresses only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from normwise.kernels.geometry import Geometry, mask_shape
from normwise.kernels.reference import Recalled, Steps, four_steps, gated, placed
from normwise.moments import Moments
from normwise.normalizers import L2, RMS, Standardize
from normwise.plan import Over
from normwise.recoveries import OffsetScale
from normwise.transforms import derivatives, is_mapped, is_wrapped

Inputs: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # and residual, weight and bias
Saved: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, Tensor]  # input, weight, bias and statistics
Gradients: TypeAlias = tuple[Tensor | None, ...]  # of input, weight and bias, and of the gate if the kernel has one

PLAIN = (Parameter, Tensor)  # a class made of them may be anything


class Kernel(ABC):
    """One call, prepared."""

    __slots__ = (
        *("centers", "columns", "dtype", "eps", "geometry", "has_bias", "has_weight", "offset"),
        *("over", "size", "steps"),
    )

    on_cpu: ClassVar[bool]  # where its tensors are
    multiplies: ClassVar[bool] = False  # whether it multiplies by the function of a gate itself

    def __init__(self, steps: Steps, geometry: Geometry, over: Over, dtype: torch.dtype) -> None:
        self.steps, self.geometry, self.over, self.dtype = steps, geometry, over, dtype
        parameters = () if steps.recovery is None else tuple(steps.recovery.parameters)
        self.has_weight, self.has_bias = "weight" in parameters, "bias" in parameters
        self.columns, self.size = geometry.columns, geometry.weights.size
        self.centers = isinstance(steps.normalizer, Standardize)
        self.offset = 1.0 if isinstance(steps.recovery, OffsetScale) else 0.0
        eps = cast("Standardize | RMS | L2", steps.normalizer).eps
        self.eps = torch.finfo(dtype).eps if eps is None else eps

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.steps, self.geometry, self.over, self.dtype)

    @abstractmethod
    def forward(self, given: Given, inputs: Inputs) -> Forward:
        """Run the kernel, without autograd; what there is of tensors lies as the kernel reads it."""

    @abstractmethod
    def backward(
        self, given: Given, saved: Saved, d_output: Tensor, d_total: Tensor | None, wanted: tuple[bool, ...]
    ) -> Gradients:
        """Those gradients of input, weight and bias, and of a gate, that are wanted."""

    @abstractmethod
    def moments(self, given: Given, statistics: Tensor) -> Moments | None:
        """The batch's moments, with a dimension for each of the view's, if they are wanted."""


class Given(NamedTuple):
    """What a call has beside its input and parameters."""

    residual: bool = False
    valid: Tensor | None = None  # shaped to broadcast against the view
    recalled: Recalled | None = None  # statistics used instead of the batch's
    remembers: bool = False  # whether the moments are wanted
    gate: Tensor | None = None  # lies as the input does


class Output(NamedTuple):
    """The output, the sum of input and residual, and the batch's moments, shaped to broadcast against the view."""

    output: Tensor
    total: Tensor | None
    moments: Moments | None


class Forward(NamedTuple):
    """What a forward gives, and what the kernel read."""

    output: Tensor
    total: Tensor | None
    statistics: Tensor  # of the columns, as the kernel keeps them
    weight: Tensor | None  # as the kernel reads it
    bias: Tensor | None
    mask: Tensor | None


def fits(x: Tensor, weight: Tensor | None, bias: Tensor | None, kernel: Kernel) -> bool:
    """Whether the tensors are what the kernel may read: plain ones, where it runs, of the size that was prepared."""
    if x.is_cpu is not kernel.on_cpu or not (kernel.on_cpu or x.is_cuda) or x.is_neg() or is_wrapped(x):
        return False
    for parameter in (weight, bias):
        if parameter is not None and not (
            type(parameter) in PLAIN
            and parameter.is_cpu is kernel.on_cpu
            and (kernel.on_cpu or parameter.device == x.device)
            and parameter.numel() == kernel.size
            and not parameter.is_neg()
            and not is_wrapped(parameter)
        ):
            return False
    return True


def normalize_with(
    kernel: Kernel, given: Given, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Output:
    """A call with a residual, a mask, remembered statistics, a gate, or whose moments are wanted."""
    inputs, gate = (x, residual, weight, bias), given.gate
    if not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (*inputs, gate))):
        found = kernel.forward(given, inputs)
        return Output(found.output, found.total, kernel.moments(given, found.statistics))
    outputs = _Compiled.apply(kernel, given._replace(gate=None), *inputs, gate)  # type: ignore[no-untyped-call]
    output, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
    total = rest.pop(0) if given.residual else None
    return Output(output, total, kernel.moments(given, rest[0]) if given.remembers else None)


class _Compiled(torch.autograd.Function):
    """Input, residual, weight, bias and gate -> output, sum of input and residual, statistics (not differentiable).

    The derivative is in closed form, as in closed_form.py; where a derivative of it is wanted, that of the definition.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        given: Given,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        gate: Tensor | None,
    ) -> Any:
        found = kernel.forward(given._replace(gate=gate), (x, residual, weight, bias))
        recalled = () if given.recalled is None else given.recalled.statistics
        seen = x if found.total is None else found.total
        ctx.save_for_backward(seen, weight, bias, gate, found.statistics, given.valid, *recalled)
        ctx.kernel, ctx.given, ctx.strides = kernel, given._replace(valid=None), x.stride()
        ctx.set_materialize_grads(False)
        if not (given.residual or given.remembers):
            return found.output
        outputs: tuple[Any, ...] = (found.output,)
        if given.residual:
            outputs += (found.total,)
        if given.remembers:
            ctx.mark_non_differentiable(found.statistics)
            outputs += (found.statistics,)
        return outputs

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        kernel: Kernel = ctx.kernel
        given: Given = ctx.given
        x, weight, bias, gate, statistics, valid, *recalled = ctx.saved_tensors
        x = lying(x, ctx.strides, x.dtype)
        gate = None if gate is None else lying(gate, ctx.strides, gate.dtype)
        if given.recalled is not None:
            given = given._replace(recalled=given.recalled._replace(statistics=tuple(recalled)))
        given = given._replace(valid=valid, gate=gate)
        d_total = others[0] if given.residual else None
        wants_x, wants_residual, *wanted = ctx.needs_input_grad[2:]
        wants = (wants_x or wants_residual, *(wanted[:2] if gate is None else wanted))
        d_others: list[Tensor | None] = [None, None]
        if d_output is None:
            d_x = d_total
        elif torch.is_grad_enabled() or is_mapped(d_output) or (d_total is not None and is_mapped(d_total)):
            d_x, *d_others = by_definition(kernel, given, (x, weight, bias), d_output, wants)
            d_x = d_total if d_x is None else d_x if d_total is None else d_x + d_total
        else:
            d_x, *d_others = kernel.backward(given, (x, weight, bias, statistics), d_output, d_total, wants)
        return None, None, d_x if wants_x else None, d_x if wants_residual else None, *[*d_others, None][:3]


def by_definition(
    kernel: Kernel, given: Given, inputs: tuple[Tensor, ...], d_output: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients: those that autograd makes of the definition; also mapped over many cotangents."""
    steps = kernel.steps._replace(valid=given.valid, recalled=given.recalled)
    inputs = inputs if given.gate is None else (*inputs, given.gate)

    def defined(x: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None = None) -> Tensor:
        names = () if steps.recovery is None else steps.recovery.parameters
        own = placed(steps.recovery, (weight, bias)[: len(names)], kernel.over, steps.plan, x)
        output = four_steps(x, steps, own).output
        return output if gate is None else gated(output, gate, steps)

    with torch.enable_grad():
        return derivatives(defined, inputs, (d_output,), wanted)


def lying(x: Tensor, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that lies in memory as the kernel's input did, without a change to what came.

    A gradient may come in any order, and so may a saved input that hooks have kept elsewhere.
    """
    if x.stride() == strides and x.dtype is dtype and not x.is_neg():
        return x
    return torch.empty_strided(x.shape, strides, dtype=dtype, device=x.device).copy_(x)


def reads(kernel: Kernel, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether parameters are as the kernel reads them."""
    return (weight is None or (weight.dtype is torch.float32 and weight.is_contiguous() and not kernel.offset)) and (
        bias is None or (weight is not None and bias.dtype is torch.float32 and bias.is_contiguous())
    )


def read(kernel: Kernel, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Parameters as the kernel reads them: float32, contiguous, and no bias without a weight."""
    if weight is not None and (weight.dtype is not torch.float32 or kernel.offset or not weight.is_contiguous()):
        weight = (weight.detach().float() + kernel.offset if kernel.offset else weight.detach().float()).contiguous()
    if bias is not None:
        if bias.dtype is not torch.float32 or not bias.is_contiguous():
            bias = bias.detach().float().contiguous()
        if weight is None:
            weight = torch.ones_like(bias)
    return weight, bias


def returned(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gradient of the parameter's dtype and shape."""
    if gradient is None or parameter is None or gradient.dtype is parameter.dtype:
        return gradient
    return gradient.to(parameter.dtype)


def in_order(kernel: Kernel, rows: Tensor) -> Tensor:
    """Numbers (n, ...) that broadcast against the view's columns, as rows (n, columns) in the kernel's order."""
    kept, plan = kernel.geometry.kept, kernel.steps.plan
    shape = [1 if dim in plan.reduced else size for dim, size in enumerate(plan.view)]
    order = [*kept, *(dim for dim in range(len(shape)) if dim not in kept)]
    return rows.expand(-1, *shape).permute(0, *(1 + dim for dim in order)).reshape(len(rows), -1)


def shaped(kernel: Kernel, rows: Tensor) -> Tensor:
    """Numbers of each column, (..., columns) in the kernel's order, shaped to broadcast against the view."""
    kept, view = kernel.geometry.kept, kernel.steps.plan.view
    first = rows.shape[:-1]
    order = sorted(range(len(kept)), key=kept.__getitem__)
    if order != list(range(len(kept))):
        rows = rows.reshape(*first, *(view[dim] for dim in kept))
        rows = rows.permute(*range(len(first)), *(len(first) + place for place in order))
    return rows.reshape(*first, *(size if dim in kept else 1 for dim, size in enumerate(view)))


def mask_bytes(kernel: Kernel, valid: Tensor) -> Tensor:
    """A mask as the kernel reads it: a byte for each element that it tells apart, in the four groups."""
    geometry, plan = kernel.geometry, kernel.steps.plan
    sizes = mask_shape(geometry, plan, valid.shape)
    dims = [dim for group in geometry.groups for dim in group]
    shape = list(valid.shape)
    for group, size in zip(geometry.groups, sizes, strict=True):
        for dim in group if size != 1 else ():
            shape[dim] = plan.view[dim]
    others = [dim for dim in range(len(shape)) if dim not in dims]
    return valid.expand(shape).permute([*dims, *others]).reshape(sizes).contiguous().view(torch.uint8)


def strides_of(sizes: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Those of a contiguous tensor, 0 for sizes of 1."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step if size != 1 else 0)
        step *= size
    return tuple(reversed(strides))
