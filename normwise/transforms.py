"""What looks on while a layer runs: a compiler, a function transform, a recomputation."""

from __future__ import annotations

import torch


def being_traced() -> bool:
    """Whether a compiler, a tracer, functorch or forward-mode differentiation follows the operations themselves."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def recomputing() -> bool:
    """Whether this runs inside of a backward pass, as a checkpointed forward does when it is run again."""
    return torch._C._current_graph_task_id() != -1
