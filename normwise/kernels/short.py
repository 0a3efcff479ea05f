"""The short way to a compiled kernel, for a call of which everything but its numbers is known from one before.

There is an input, and nothing else: no mask, no residual. The statistics are an array of the caller's, in which the
kernel leaves what it has measured, or finds what it is given. For few columns making an array takes a tenth of a
tensor's time; but autograd does not watch over it, so what it may hold is limited.
"""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from normwise.kernels.backends import extension
from normwise.kernels.cpu import (
    Given,
    Kernel,
    by_definition,
    is_mapped,
    lying,
    moments_of,
    read,
    reads,
    returned,
    shaped,
)
from normwise.kernels.reference import Recalled, Use
from normwise.moments import Moments
from normwise.plan import Plan

MOST_COLUMNS = 8192  # their statistics are 192 KB at most

Numbers: TypeAlias = "array[float]"

_ZERO = array("d", [0.0])
_REMEMBERED = Given(remembers=True)


class Ready(NamedTuple):
    """What is known of a call that every check has let pass, for those that follow."""

    kernel: Kernel
    call: bytes  # the kernel's, for measured statistics or for given ones
    strides: tuple[int, ...]  # as the kernel reads the input: its own, or contiguous
    plan: Plan
    rows: int
    numbers: int  # of the statistics
    use: Use | None  # what remembered statistics are for: "instead" of the batch's, or nothing
    has_memory: bool
    is_copied: bool  # whether the input does not lie as the kernel reads it


def made_ready(
    kernel: Kernel, strides: tuple[int, ...], use: Use | None, *, has_memory: bool, is_copied: bool
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


def moments_in(kernel: Kernel, statistics: Numbers) -> Moments:
    """The batch's moments, with a dimension for each of the view's."""
    return cast("Moments", moments_of(kernel, _REMEMBERED, rows_of(statistics)))


def normalize(ready: Ready, statistics: Numbers, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The four steps.

    Args:
        ready: Made for such an input.
        statistics: From `room`. Given ones are inverse, mean and what the inverse was made of.
        x: The input; copied if it does not lie as the kernel reads it.
        weight: The recovery's, as `cpu.fits` wants it.
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
        output = torch.empty_like(x)
        if ctx is not None:
            ctx.save_for_backward(x, weight, bias)
            ctx.known = ready, statistics
        kernel = ready.kernel
        if not reads(kernel, weight, bias):
            weight, bias = read(kernel, weight, bias)
        inverse, row = statistics.buffer_info()[0], kernel.row
        extension.forward(  # type: ignore[union-attr]  # whoever made a kernel has seen it there
            ready.call,
            x.data_ptr(),
            0,
            0,
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
        return output

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        ready, statistics = ctx.known
        x, weight, bias = ctx.saved_tensors
        kernel, strides, dtype = ready.kernel, ready.strides, x.dtype
        wants_x, wants_weight, wants_bias = wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or is_mapped(d_output):
            given = Given() if ready.use is None else Given(recalled=_recalled(kernel, statistics))
            return None, None, *by_definition(kernel, given, (x, weight, bias), d_output, wanted)
        if x.stride() != strides:
            x = lying(x, strides, dtype)
        if d_output.stride() != strides or d_output.dtype is not dtype or d_output.is_neg():
            d_output = lying(d_output, strides, dtype)
        is_read = reads(kernel, weight, bias)
        read_weight, read_bias = (weight, bias) if is_read else read(kernel, weight, bias)
        d_x = torch.empty_like(x) if wants_x else None
        d_weight = torch.empty_like(read_weight) if wants_weight else None  # type: ignore[arg-type]  # it was given
        d_bias = torch.empty_like(read_bias) if wants_bias else None  # type: ignore[arg-type]
        inverse = statistics.buffer_info()[0]
        extension.backward(  # type: ignore[union-attr]  # whoever made a kernel has seen it there
            ready.call,
            x.data_ptr(),
            d_output.data_ptr(),
            0,
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
        return None, None, d_x, d_weight, d_bias


# Without the checks for function transforms, which a short call has behind it: they cost as much as a small kernel.
_apply: Any = super(torch.autograd.Function, _Short).apply


def _recalled(kernel: Kernel, statistics: Numbers) -> Recalled:
    """Given statistics as they were remembered."""
    _, mean, spread = rows_of(statistics).float()
    kept = (mean, spread) if kernel.centers else (spread,)
    return Recalled(tuple(shaped(kernel, row) for row in kept))
