"""Which kernel computes a call, and why: a pure function of what is declared, the shape and the strides.

Nothing depends on how many columns there are, so that the result for a column never does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch

from normwise.kernels.backends import Request
from normwise.kernels.geometry import Geometry, Misfit, geometry_of, is_dense
from normwise.kernels.launch import layout_of, view_of
from normwise.kernels.reference import Use
from normwise.normalizers import L2, RMS, Normalizer, Standardize
from normwise.plan import Over, Plan, becomes_contiguous, memory_word
from normwise.recoveries import Affine, OffsetScale, Recovery, Scale

NORMALIZERS: tuple[type[Normalizer], ...] = (Standardize, RMS, L2)  # in the order of csrc/call.h
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_COMPILED = 2**18  # elements of a call that is worth an operator's own time: see operator.py
RECOVERIES: tuple[type[Recovery] | type[None], ...] = (Affine, Scale, OffsetScale, type(None))

_WRITTEN_IN = {"cpu": "C++", "triton": "Triton"}


class Choice(NamedTuple):
    """A kernel's name, why it is taken, and what it sees of the tensor; no geometry: the definition runs.

    `refusal` is why no compiled kernel takes the call.
    """

    kernel: str
    reason: str
    geometry: Geometry | None = None
    refusal: str = ""


def choose(
    plan: Plan,
    strides: Sequence[int],
    dtype: torch.dtype,
    device: str,
    normalizer: Normalizer,
    recovery: Recovery | None,
    over: Over,
    use: Use | None = None,
    *,
    request: Request = "auto",
    compiled: Mapping[str, str] = MappingProxyType({"cpu": "cpu"}),
) -> Choice:
    """The kernel for an eager call.

    Args:
        plan: Of the input.
        strides: Of the input, which is copied if it is not dense, or is to become contiguous.
        dtype: Of the input.
        device: "cpu", "cuda", ...
        normalizer: Step 2.
        recovery: Step 3.
        over: The axes of its parameters.
        use: What remembered statistics are for in this call.
        request: The backend that was asked for.
        compiled: The backend whose kernels are taken, for each type of device that has one.
    """
    refusal = _refusal(dtype, device, normalizer, recovery, use, request=request, compiled=compiled)
    if refusal:
        return plainly(refusal)
    read, copied = _read(plan, strides)
    found = geometry_of(plan, read, over)
    if isinstance(found, Misfit):
        return plainly(found.reason)
    word = memory_word(plan, read) or "one element"
    backend = compiled[device]
    done = "normalized by what is remembered" if use == "instead" else _DONE[backend](found)
    return Choice(backend, f"{_WRITTEN_IN[backend]} for {word}{copied}, {_columns(found, dtype)}: {done}", found)


def is_operator(choice: Choice, elements: int, use: Use | None) -> bool:
    """Whether a chosen kernel runs under `torch.compile` as well; otherwise a layer dissolves into plain operations."""
    return choice.kernel == "cpu" and use is None and elements >= LEAST_COMPILED


def plainly(reason: str) -> Choice:
    """The definition, because of something that no kernel takes."""
    return Choice("reference", f"plain torch operations, because {reason}", refusal=reason)


def _columns(geometry: Geometry, dtype: torch.dtype) -> str:
    """How long columns are, and how they lie."""
    _, rows, columns, run = geometry.sizes
    size = readable(rows * run * dtype.itemsize)
    if geometry.by_runs:
        return f"columns of {size} in {'one run' if rows == 1 else f'{rows} runs'}"
    return f"{columns} columns of {size} side by side"


def _on_cpu(_: Geometry) -> str:
    return "measured, then normalized from the cache if they fit"


def _on_gpu(geometry: Geometry) -> str:
    """Whether a program holds whole columns, and otherwise in how many parts they are measured."""
    _, r0, _, r1 = view_of(geometry).sizes
    forward, backward = (layout_of(r0, r1, backward=is_backward) for is_backward in (False, True))
    if not forward.is_resident:
        return f"measured in {forward.parts} parts, then normalized from the cache"
    beside = f"{forward.tile.k} at a time " if forward.tile.k > 1 else ""
    divided = "" if backward.is_resident else f", in the backward in {backward.parts} parts"
    return f"held {beside}by one program, read once{divided}"


_DONE: dict[str, Callable[[Geometry], str]] = {"cpu": _on_cpu, "triton": _on_gpu}


def readable(count: int) -> str:
    """Bytes in the unit that suits them.

    >>> readable(999), readable(4096), readable(3_211_264)
    ('999 bytes', '4.1 kB', '3.2 MB')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _refusal(
    dtype: torch.dtype,
    device: str,
    normalizer: Normalizer,
    recovery: Recovery | None,
    use: Use | None,
    *,
    request: Request,
    compiled: Mapping[str, str],
) -> str:
    """Why the compiled kernels do not take a call, or nothing."""
    if request == "reference":
        return "NORMWISE_BACKEND=reference asks for them"
    if device not in compiled:
        if request == "triton":
            return f"NORMWISE_BACKEND=triton asks for kernels for GPUs, and the input is on {device}"
        return _MISSING.get(device, f"there is no kernel for {device} yet")
    if dtype not in DTYPES:
        return f"no kernel computes in {str(dtype).removeprefix('torch.')}"
    for name, part, known in (("normalizer", normalizer, NORMALIZERS), ("recovery", recovery, RECOVERIES)):
        if type(part) not in known:
            return f"no kernel knows the {name} {type(part).__name__}"
    return _MIXED.get(use, "")


# Why there are no compiled kernels for a type of device that could have some.
_MISSING = {
    "cpu": "the compiled kernels are not there: `normwise backends` says why",
    "cuda": "the kernels in Triton run when NORMWISE_BACKEND=triton asks for them",
}

# What is done with remembered statistics beside those of the batch, which no kernel does.
_MIXED: dict[Use | None, str] = {
    "fallback": "columns with too few samples take what is remembered",
    "correct": "batch renormalization corrects the batch's statistics by what is remembered",
}


def _read(plan: Plan, strides: Sequence[int]) -> tuple[Sequence[int], str]:
    """The strides of what a kernel reads, and what that is: the input itself, or a copy of it."""
    if becomes_contiguous(plan, strides):
        return torch.empty(plan.shape, device="meta").stride(), " of a contiguous copy"
    if is_dense(plan.shape, strides):
        return strides, ""
    in_order = torch.empty_like(torch.empty_strided(plan.shape, strides, device="meta"))
    return in_order.stride(), " of a copy without gaps"
