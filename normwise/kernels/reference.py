"""The definition: the four steps in plain torch operations, for every pattern and every device.

Every other kernel is checked against this one, and this one against torch.nn and the formula in float64. Under
`torch.compile` it is also what runs, so that the compiler can fuse it with its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from normwise.moments import Moments
from normwise.normalizers import Normalized, Normalizer
from normwise.plan import Over, Plan, place
from normwise.recoveries import Recovery

Normalize: TypeAlias = Callable[[Normalizer, Tensor, tuple[int, ...], torch.dtype], Normalized]


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that statistics and parameters are computed in: the input's, float32 at least."""
    if not x.is_floating_point():
        raise TypeError(f"a normalization needs floating-point input, not {x.dtype}")
    return torch.promote_types(x.dtype, torch.float32)


def by_definition(normalizer: Normalizer, view: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Normalized:
    """Step 2 as the normalizer has it."""
    return normalizer.normalize(view, dims, dtype)


def four_steps(
    x: Tensor,
    plan: Plan,
    normalizer: Normalizer,
    recovery: Recovery | None = None,
    parameters: Sequence[Tensor | None] = (),
    parameter_over: Over = (),
    remembered: tuple[Tensor, ...] | None = None,
    memory_over: Over = (),
    normalize: Normalize = by_definition,
) -> tuple[Tensor, Moments | None]:
    """Reshape, normalize, recover, output: the layer's result and, if this batch was measured, its moments.

    Args:
        x: The input, of the plan's shape.
        plan: The pattern's view of that shape.
        normalizer: Step 2.
        recovery: Step 3, or None.
        parameters: The recovery's parameters, over the axes `parameter_over`; None: the value it starts from.
        parameter_over: See `parameters`.
        remembered: Statistics to normalize with, over the axes `memory_over`; None: measure this batch.
        memory_over: See `remembered`.
        normalize: How step 2 is computed when this batch is measured.
    """
    wide = wide_dtype(x)
    view = x.to(wide).reshape(plan.view)
    moments = None
    if x.numel() == 0:
        normalized = view
    elif remembered is None:
        normalized, _, moments = normalize(normalizer, view, plan.reduced, x.dtype)
    else:
        statistics = tuple(place(statistic.to(wide), memory_over, plan) for statistic in remembered)
        normalized = normalizer.apply(view, statistics, x.dtype)
    if recovery is not None:
        starts = recovery.parameters.values()
        placed = [
            start if parameter is None else place(parameter.to(wide), parameter_over, plan)
            for start, parameter in zip(starts, parameters, strict=True)
        ]
        normalized = recovery.recover(normalized, *placed)
    return normalized.to(x.dtype).reshape(plan.shape), moments
