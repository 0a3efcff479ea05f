"""Before a call of the compiled kernels: the kernel that is chosen, and tensors that it can read."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from normwise.kernels.backends import compiled, requested
from normwise.kernels.choose import NORMALIZERS, RECOVERIES, choose
from normwise.kernels.cpu import CpuKernel
from normwise.kernels.geometry import is_dense, lies_as
from normwise.kernels.prepared import PLAIN, Kernel
from normwise.kernels.reference import Steps, Use
from normwise.plan import Over


def kernel_for(x: Tensor, steps: Steps, over: Over, use: Use | None) -> Kernel | None:
    """The compiled kernel for a call in which remembered statistics are for `use`, if one is chosen."""
    if type(x) not in PLAIN or x.layout is not torch.strided:
        return None
    if type(steps.normalizer) not in NORMALIZERS or type(steps.recovery) not in RECOVERIES:
        return None  # a part of the user's own need not even be hashable
    declared = steps._replace(valid=None, recalled=None)
    return _prepared(declared, x.stride(), x.dtype, x.device.type, over, use)


@lru_cache(maxsize=4096)
def _prepared(
    steps: Steps, strides: tuple[int, ...], dtype: torch.dtype, device: str, over: Over, use: Use | None
) -> Kernel | None:
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
        compiled=compiled(),
    )
    if choice.geometry is None:
        return None
    return _kernels(choice.kernel)(steps, choice.geometry, over, dtype)


def _kernels(backend: str) -> type[Kernel]:
    """The class of a backend's kernels; Triton is loaded when it is first wanted."""
    if backend == "cpu":
        return CpuKernel
    from normwise.kernels.gpu.kernel import GpuKernel

    return GpuKernel


def as_read(x: Tensor, like: Tensor) -> Tensor:
    """The tensor as the kernel reads it: dense, with the axes in the order of another's."""
    if is_dense(x.shape, x.stride()) and not x.is_neg() and lies_as(x.shape, x.stride(), like.stride()):
        return x
    return torch.empty_like(like).copy_(x)
