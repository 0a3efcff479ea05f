"""What looks on while a layer runs: a compiler, a function transform, a recomputation, a second derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # what a transform left behind: it has no address
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of `torch.autograd.grad(..., is_grads_batched=True)`


def is_mapped(gradient: Tensor) -> bool:
    """Whether a gradient stands for many, or is followed by a transform, and so has no address."""
    return is_wrapped(gradient) or _is_batched(gradient)


def being_traced() -> bool:
    """Whether a compiler, a tracer, functorch or forward-mode differentiation follows the operations themselves."""
    return is_compiling() or _is_tracing() or _len_torch_dispatch_stack() > 0 or being_transformed()


def being_transformed() -> bool:
    """Whether functorch or forward-mode differentiation follows the operations, also under a compiler."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def recomputing() -> bool:
    """Whether this runs inside of a backward pass, as a checkpointed forward does when it is run again."""
    return torch._C._current_graph_task_id() != -1


def derivatives(
    definition: Callable[..., Any], inputs: Sequence[Any], d_outputs: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients: those that autograd makes of a definition, for the inputs that want one.

    One input may have been computed from another, a way on which autograd goes by itself: here each stands alone.
    """
    inputs = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
    outputs = definition(*inputs)
    chosen = [x for x, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(outputs, chosen, d_outputs, create_graph=True))
    return tuple(next(found) if is_wanted else None for is_wanted in wanted)
