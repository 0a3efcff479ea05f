"""The four steps of a call, by the kernel that is chosen for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import Parameter

from normwise.kernels import closed_form, cpu
from normwise.kernels.backends import extension, requested
from normwise.kernels.choose import choose
from normwise.kernels.geometry import is_dense, lies_as
from normwise.kernels.reference import Result, Steps, Use, placed
from normwise.plan import Over
from normwise.transforms import being_traced


def run(
    x: Tensor,
    steps: Steps,
    parameters: Sequence[Tensor | None],
    over: Over,
    residual: Tensor | None = None,
    *,
    remembers: bool = False,
) -> tuple[Result, Tensor | None]:
    """Normalize the input, or its sum with a residual.

    Args:
        x: The input, of the plan's shape.
        steps: What is done to it.
        parameters: The recovery's, over the named axes; None: the values they start from.
        over: The axes.
        residual: Added first.
        remembers: Whether the batch's moments are wanted.

    Returns:
        The result, and the sum, if there is a residual.
    """
    if residual is not None and (residual.dtype != x.dtype or not residual.is_cpu or type(residual) is not type(x)):
        x = total = x + residual
        return run(x, steps, parameters, over, remembers=remembers)[0], total
    weight, bias = [*parameters, None, None][:2]
    kernel = None if being_traced() or x.numel() == 0 else _kernel_for(x, steps, over)
    if kernel is None or not cpu.fits(x, weight, bias, kernel) or _is_watched(steps):
        total = x if residual is None else x + residual
        own = placed(steps.recovery, parameters, over, steps.plan, x)
        return closed_form.run(total, steps, own), None if residual is None else total
    given = cpu.Given(residual is not None, steps.valid, steps.recalled, remembers)
    x = _as(x, x)
    residual = None if residual is None else _as(residual, x)
    output, total, moments = cpu.normalize_with(kernel, given, x, residual, weight, bias)  # type: ignore[assignment]
    return Result(output, moments, None), total


def _kernel_for(x: Tensor, steps: Steps, over: Over) -> cpu.Kernel | None:
    """The compiled kernel for a call, if one is chosen."""
    if type(x) not in (Tensor, Parameter) or x.layout is not torch.strided:
        return None
    use = None if steps.recalled is None else steps.recalled.use
    declared = steps._replace(valid=None, recalled=None)
    return _prepared(declared, x.stride(), x.dtype, x.device.type, over, use)


@lru_cache(maxsize=4096)
def _prepared(
    steps: Steps, strides: tuple[int, ...], dtype: torch.dtype, device: str, over: Over, use: Use | None
) -> cpu.Kernel | None:
    choice = choose(
        steps.plan,
        strides,
        dtype,
        device,
        steps.normalizer,
        steps.recovery,
        over,
        use,
        request=requested(),
        available=extension is not None,
    )
    return None if choice.geometry is None else cpu.Kernel(steps, choice.geometry, over, dtype)


def _is_watched(steps: Steps) -> bool:
    """Whether remembered statistics want a gradient, which no kernel gives."""
    return steps.recalled is not None and any(statistic.requires_grad for statistic in steps.recalled.statistics)


def _as(x: Tensor, like: Tensor) -> Tensor:
    """The tensor as the kernel reads it: dense, with the axes in the order of another's."""
    if is_dense(x.shape, x.stride()) and not x.is_neg() and lies_as(x.shape, x.stride(), like.stride()):
        return x
    return torch.empty_like(like).copy_(x)
