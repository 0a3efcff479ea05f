"""Starting a kernel: by Triton the first time, and from then on as it was compiled.

At each call Triton looks at every argument to find what it has compiled for such ones, which takes longer than the rest
of a launch. A caller knows what can differ between two of its calls, and keeps what was compiled by that; its options,
as the number of warps, never do. Triton's own switches for how a kernel is compiled count until its first start.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

Started: TypeAlias = dict[Hashable, tuple[Any, tuple[Any, ...]]]  # compiled kernels, and the values of their constexprs

_NOTHING: AbstractContextManager[None] = nullcontext()


def start(
    started: Started,
    known_by: tuple[Hashable, ...],
    kernel: Any,
    programs: int,
    given: tuple[Any, ...],
    told: Mapping[str, Any],
    *,
    x: Tensor,
    **options: int,
) -> None:
    """Run a kernel's programs on a tensor's device.

    Args:
        started: What was compiled so far.
        known_by: All that Triton compiles anew for: `facts` of tensors, and what of the rest may differ between calls.
        kernel: A function that Triton compiles.
        programs: How many.
        given: Its arguments but the constexprs, which come last.
        told: The constexprs, by name.
        x: A tensor on the device.
        **options: Triton's own, as `num_warps`.
    """
    key = id(kernel), x.get_device(), known_by  # Triton hashes a kernel's source, and locks it to do so
    with _current(x):
        found = started.get(key)
        if found is not None:
            compiled, constants = found
            compiled[(programs, 1, 1)](*given, *constants)
            return
        compiled = kernel[(programs,)](*given, **told, **options)
    if compiled is not None:  # it is None where it was interpreted
        started[key] = compiled, tuple([told[name] for name in kernel.arg_names[len(given) :]])


def facts(tensors: Iterable[Tensor | None]) -> tuple[Hashable, ...]:
    """What Triton compiles anew for: which tensors there are, of which dtype, and whether each begins a vector."""
    return tuple([None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors])


def _current(x: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device the current one, which Triton launches on."""
    is_elsewhere = x.is_cuda and x.get_device() != torch.cuda.current_device()
    return torch.cuda.device(x.device) if is_elsewhere else _NOTHING
