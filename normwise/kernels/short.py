"""The short way to a compiled kernel, for a call of which everything but its numbers is known from one before.

There is an input, perhaps a residual, and no mask. The statistics are the caller's, in which the kernel leaves what it
has measured, or finds what it is given. Autograd does not watch over them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from normwise.commit import Store
from normwise.kernels.prepared import Given, Gradients, Kernel, by_definition, lying
from normwise.kernels.reference import Recalled, Use
from normwise.memory import Memory
from normwise.moments import Moments
from normwise.transforms import is_mapped


class Ready(ABC):
    """What is known of a call that every check has let pass, for those that follow.

    Args:
        kernel: Made for such a call.
        strides: As the kernel reads the input: its own, or contiguous.
        use: What remembered statistics are for: "instead" of the batch's, or nothing.
        has_memory: Whether the layer has one.
        is_copied: Whether the input does not lie as the kernel reads it.
    """

    __slots__ = ("has_memory", "is_copied", "kernel", "plan", "strides", "use")

    kernel: Kernel

    def __init__(
        self, kernel: Kernel, strides: tuple[int, ...], use: Use | None, *, has_memory: bool, is_copied: bool
    ) -> None:
        self.kernel, self.strides, self.use, self.plan = kernel, strides, use, kernel.steps.plan
        self.has_memory, self.is_copied = has_memory, is_copied

    @abstractmethod
    def room(self, x: Tensor) -> Any:
        """Where the numbers of each column go."""

    @abstractmethod
    def forward(
        self, statistics: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Output, and the sum of input and residual, if there is one; without autograd."""

    @abstractmethod
    def backward(
        self,
        statistics: Any,
        saved: tuple[Tensor, Tensor | None, Tensor | None],
        d_output: Tensor,
        d_total: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> Gradients:
        """The gradients of the saved input or sum, of weight and of bias; all lie as the kernel reads them."""

    @abstractmethod
    def moments(self, statistics: Any) -> Moments:
        """The batch's moments, with a dimension for each of the view's."""

    @abstractmethod
    def commit(self, memory: Memory, remembers: tuple[str, ...], store: Store, statistics: Any, *, least: int) -> bool:
        """Let a batch enter a memory.

        Returns:
            Whether it is done with; if not, nothing was touched, and the rest is up to `commit.commit`.
        """

    @abstractmethod
    def recall(self, remembered: tuple[Tensor, ...], statistics: Any) -> bool:
        """Put remembered statistics where the kernel finds them; whether they could be read."""

    @abstractmethod
    def recalled(self, statistics: Any) -> Recalled:
        """Given statistics as they were remembered."""


def normalize(ready: Ready, statistics: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The four steps.

    Args:
        ready: Made for such an input.
        statistics: From its `room`; given ones from `recall`.
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
    return ready.forward(statistics, x, None, weight, bias)[0]


def normalize_sum(
    ready: Ready, statistics: Any, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The four steps of `x + residual`, and that sum; the residual lies as the input does."""
    if ready.is_copied:
        x, residual = x.contiguous(), residual.contiguous()
    inputs = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        outputs: tuple[Tensor, Tensor] = _apply_sum(ready, statistics, *inputs)
        return outputs
    return ready.forward(statistics, *inputs)  # type: ignore[return-value]  # with a residual there is a sum


def _backward(
    known: tuple[Ready, Any],
    saved: tuple[Tensor, Tensor | None, Tensor | None],
    d_output: Tensor,
    d_total: Tensor | None,
    wanted: tuple[bool, ...],
) -> Gradients:
    """The gradients of the saved input or sum, of weight and of bias."""
    (ready, statistics), (x, weight, bias) = known, saved
    if torch.is_grad_enabled() or is_mapped(d_output) or (d_total is not None and is_mapped(d_total)):
        given = Given() if ready.use is None else Given(recalled=ready.recalled(statistics))
        d_x, d_weight, d_bias = by_definition(ready.kernel, given, saved, d_output, wanted)  # type: ignore[arg-type]
        return d_x if d_x is None or d_total is None else d_x + d_total, d_weight, d_bias
    strides, dtype = ready.strides, x.dtype
    if x.stride() != strides:
        saved = lying(x, strides, dtype), weight, bias
    if d_output.stride() != strides or d_output.dtype is not dtype or d_output.is_neg():
        d_output = lying(d_output, strides, dtype)
    if d_total is not None:
        d_total = lying(d_total, strides, dtype)
    return ready.backward(statistics, saved, d_output, d_total, wanted)


class _Short(torch.autograd.Function):
    """Input, weight and bias -> output; the derivatives are those of `prepared.py`."""

    @staticmethod
    def forward(
        ctx: Any, ready: Ready, statistics: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.known = ready, statistics
        return ready.forward(statistics, x, None, weight, bias)[0]

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_backward(ctx.known, ctx.saved_tensors, d_output, None, ctx.needs_input_grad[2:])


class _ShortSum(torch.autograd.Function):
    """Input, residual, weight and bias -> output, and the sum of the first two."""

    @staticmethod
    def forward(
        ctx: Any,
        ready: Ready,
        statistics: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        output, total = ready.forward(statistics, x, residual, weight, bias)
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
