"""The short way to a compiled kernel, for a call of which everything but its numbers is known from one before.

There is an input, perhaps a residual, and no mask. The statistics are an array of the caller's, in which the
kernel leaves what it has measured, or finds what it is given. For few columns making an array takes a tenth of a
tensor's time; but autograd does not watch over it, so what it may hold is limited.
"""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from normwise.kernels.backends import extension
from normwise.kernels.cpu import CpuKernel
from normwise.kernels.prepared import Given, by_definition, is_mapped, lying, read, reads, returned, shaped
from normwise.kernels.reference import Recalled, Use
from normwise.moments import Moments
from normwise.plan import Plan

MOST_COLUMNS = 8192  # their statistics are 192 KB at most

Numbers: TypeAlias = "array[float]"

_ZERO = array("d", [0.0])
_REMEMBERED = Given(remembers=True)


class Ready(NamedTuple):
    """What is known of a call that every check has let pass, for those that follow."""

    kernel: CpuKernel
    call: bytes  # the kernel's, for measured statistics or for given ones
    strides: tuple[int, ...]  # as the kernel reads the input: its own, or contiguous
    plan: Plan
    rows: int
    numbers: int  # of the statistics
    use: Use | None  # what remembered statistics are for: "instead" of the batch's, or nothing
    has_memory: bool
    is_copied: bool  # whether the input does not lie as the kernel reads it


def made_ready(
    kernel: CpuKernel, strides: tuple[int, ...], use: Use | None, *, has_memory: bool, is_copied: bool
) -> Ready:
    """For inputs that are read with these strides, and have the shape that the kernel was made for."""
    call = kernel.bytes_measured if use is None else kernel.bytes_given
    plan, numbers = kernel.steps.plan, kernel.columns * (3 if has_memory else 2)
    return Ready(kernel, call, strides, plan, plan.rows, numbers, use, has_memory, is_copied)


def room(ready: Ready) -> Numbers:
    """Where the numbers of each column go: inverse and mean; for a memory, inverse, mean and m2."""
    return _ZERO * ready.numbers


def rows_of(statistics: Numbers) -> Tensor:
    """Inverse, mean, and what stands in the third row, for a layer with a memory."""
    return torch.frombuffer(statistics, dtype=torch.float64).view(3, -1)


def moments_in(kernel: CpuKernel, statistics: Numbers) -> Moments:
    """The batch's moments, with a dimension for each of the view's."""
    return cast("Moments", kernel.moments(_REMEMBERED, rows_of(statistics)))


def normalize(ready: Ready, statistics: Numbers, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The four steps.

    Args:
        ready: Made for such an input.
        statistics: From `room`. Given ones are inverse, mean and what the inverse was made of.
        x: The input; copied if it does not lie as the kernel reads it.
        weight: The recovery's, as `prepared.fits` wants it.
        bias: The recovery's.
    """
    if ready.is_copied:
        x = x.contiguous()
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        output: Tensor = _apply(ready, statistics, x, weight, bias)
        return output
    return _Short.forward(None, ready, statistics, x, weight, bias)


def normalize_sum(
    ready: Ready, statistics: Numbers, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The four steps of `x + residual`, and that sum; the residual lies as the input does."""
    if ready.is_copied:
        x, residual = x.contiguous(), residual.contiguous()
    inputs = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        outputs: tuple[Tensor, Tensor] = _apply_sum(ready, statistics, *inputs)
        return outputs
    return _ShortSum.forward(None, ready, statistics, *inputs)


def _forward(
    ready: Ready, statistics: Numbers, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Output, and the sum of input and residual, if there is one."""
    output = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    kernel = ready.kernel
    if not reads(kernel, weight, bias):
        weight, bias = read(kernel, weight, bias)
    inverse, row = statistics.buffer_info()[0], kernel.row
    extension.forward(  # type: ignore[union-attr]  # whoever made a kernel has seen it there
        ready.call,
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if total is None else total.data_ptr(),
        output.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0,
        inverse + row if kernel.centers else 0,
        inverse,
        inverse + 2 * row if ready.has_memory and ready.use is None else 0,
        0,
        torch.get_num_threads(),
    )
    return output, total


def _backward(
    known: tuple[Ready, Numbers],
    saved: tuple[Tensor, Tensor | None, Tensor | None],
    d_output: Tensor,
    d_total: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the saved input or sum, of weight and of bias."""
    (ready, statistics), (x, weight, bias) = known, saved
    kernel, strides, dtype = ready.kernel, ready.strides, x.dtype
    if torch.is_grad_enabled() or is_mapped(d_output) or (d_total is not None and is_mapped(d_total)):
        given = Given() if ready.use is None else Given(recalled=_recalled(kernel, statistics))
        d_x, d_weight, d_bias = by_definition(kernel, given, saved, d_output, wanted)  # type: ignore[arg-type]
        return d_x if d_x is None or d_total is None else d_x + d_total, d_weight, d_bias
    if x.stride() != strides:
        x = lying(x, strides, dtype)
    if d_output.stride() != strides or d_output.dtype is not dtype or d_output.is_neg():
        d_output = lying(d_output, strides, dtype)
    if d_total is not None:
        d_total = lying(d_total, strides, dtype)
    is_read = reads(kernel, weight, bias)
    read_weight, read_bias = (weight, bias) if is_read else read(kernel, weight, bias)
    d_x = torch.empty_like(x) if wanted[0] else None
    d_weight = torch.empty_like(read_weight) if wanted[1] else None  # type: ignore[arg-type]  # it was given
    d_bias = torch.empty_like(read_bias) if wanted[2] else None  # type: ignore[arg-type]
    inverse = statistics.buffer_info()[0]
    extension.backward(  # type: ignore[union-attr]  # whoever made a kernel has seen it there
        ready.call,
        x.data_ptr(),
        d_output.data_ptr(),
        0 if d_total is None else d_total.data_ptr(),
        0 if d_x is None else d_x.data_ptr(),
        0 if read_weight is None else read_weight.data_ptr(),
        0 if read_bias is None else read_bias.data_ptr(),
        0,
        inverse + kernel.row if kernel.centers else 0,
        inverse,
        0,
        0 if d_weight is None else d_weight.data_ptr(),
        0 if d_bias is None else d_bias.data_ptr(),
        torch.get_num_threads(),
    )
    if not is_read:
        d_weight, d_bias = returned(d_weight, weight), returned(d_bias, bias)
    return d_x, d_weight, d_bias


class _Short(torch.autograd.Function):
    """Input, weight and bias -> output; the derivatives are those of `cpu.py`."""

    @staticmethod
    def forward(
        ctx: Any,  # None where nobody will want a gradient
        ready: Ready,
        statistics: Numbers,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        if ctx is not None:
            ctx.save_for_backward(x, weight, bias)
            ctx.known = ready, statistics
        return _forward(ready, statistics, x, None, weight, bias)[0]

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_backward(ctx.known, ctx.saved_tensors, d_output, None, ctx.needs_input_grad[2:])


class _ShortSum(torch.autograd.Function):
    """Input, residual, weight and bias -> output, and the sum of the first two."""

    @staticmethod
    def forward(
        ctx: Any,  # None where nobody will want a gradient
        ready: Ready,
        statistics: Numbers,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        output, total = cast("tuple[Tensor, Tensor]", _forward(ready, statistics, x, residual, weight, bias))
        if ctx is not None:
            ctx.save_for_backward(total, weight, bias)
            ctx.known = ready, statistics
            ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
        wants_x, wants_residual, *others = ctx.needs_input_grad[2:]
        d_x, d_weight, d_bias = d_total, None, None
        if d_output is not None:
            wanted = (wants_x or wants_residual, *others)
            d_x, d_weight, d_bias = _backward(ctx.known, ctx.saved_tensors, d_output, d_total, wanted)
        return None, None, d_x if wants_x else None, d_x if wants_residual else None, d_weight, d_bias


# Without the checks for function transforms, which a short call has behind it: they cost as much as a small kernel.
_apply: Any = super(torch.autograd.Function, _Short).apply
_apply_sum: Any = super(torch.autograd.Function, _ShortSum).apply


def _recalled(kernel: CpuKernel, statistics: Numbers) -> Recalled:
    """Given statistics as they were remembered."""
    _, mean, spread = rows_of(statistics).float()
    kept = (mean, spread) if kernel.centers else (spread,)
    return Recalled(tuple(shaped(kernel, row) for row in kept))
