"""How an output has to lie in memory, found by looking at where each element of the input is."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise import Norm
from normwise.plan import Plan, make_plan

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def output_strides(norm: Norm, x: Tensor) -> tuple[int, ...]:
    """Those of the input, without gaps; contiguous where the last axes are normalized over and scattered."""
    dense = torch.empty_like(x)
    plan = make_plan(norm.spec.pattern, tuple(x.shape), norm.spec.call_sizes)
    is_format = dense.dim() in _FORMATS and dense.is_contiguous(memory_format=_FORMATS[dense.dim()])
    if x.numel() == 0 or is_format or not _names_the_last(plan) or _lies_together(dense, plan):
        return dense.stride()
    return torch.empty(x.shape).stride()


def _names_the_last(plan: Plan) -> bool:
    """Whether all axes from some one on are normalized over, and each has a name."""
    letters = "".join("R" if dim in plan.reduced else "K" for dim in range(len(plan.view)))
    return "RK" not in letters and all(plan.names[dim] != "..." for dim in plan.reduced)


def _lies_together(dense: Tensor, plan: Plan) -> bool:
    """Whether each column is one stretch of memory."""
    places = torch.as_strided(torch.arange(dense.numel()), dense.shape, dense.stride()).reshape(plan.view)
    stretch = places.amax(plan.reduced) - places.amin(plan.reduced) + 1
    return bool((stretch == plan.rows).all())
