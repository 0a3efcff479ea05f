"""Which kernel computes a call, and why: a pure function of what is declared, the shape and the strides.

Nothing depends on how many columns there are, so that the result for a column never does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from normwise.kernels.backends import Request
from normwise.kernels.geometry import Geometry, Misfit, geometry_of, is_dense
from normwise.kernels.reference import Use
from normwise.normalizers import L2, RMS, Normalizer, Standardize
from normwise.plan import Over, Plan, memory_word
from normwise.recoveries import Affine, OffsetScale, Recovery, Scale

NORMALIZERS: tuple[type[Normalizer], ...] = (Standardize, RMS, L2)  # in the order of csrc/call.h
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_RECOVERIES: tuple[type[Recovery] | type[None], ...] = (Affine, Scale, OffsetScale, type(None))


class Choice(NamedTuple):
    """A kernel's name, why it is taken, and what it sees of the tensor; no geometry: the definition runs."""

    kernel: str
    reason: str
    geometry: Geometry | None = None


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
    available: bool = True,
) -> Choice:
    """The kernel for an eager call.

    Args:
        plan: Of the input.
        strides: Of the input, which is copied to be dense if it is not.
        dtype: Of the input.
        device: "cpu", "cuda", ...
        normalizer: Step 2.
        recovery: Step 3.
        over: The axes of its parameters.
        use: What remembered statistics are for in this call.
        request: The backend that was asked for.
        available: Whether the compiled kernels are there.
    """
    refusal = _refusal(dtype, device, normalizer, recovery, use, request=request, available=available)
    if refusal:
        return Choice("reference", f"plain torch operations, because {refusal}")
    if not is_dense(plan.shape, strides):
        strides = _dense_strides(plan.shape, strides)
    found = geometry_of(plan, strides, over)
    if isinstance(found, Misfit):
        return Choice("reference", f"plain torch operations, because {found.reason}")
    word = memory_word(plan, strides) or "one element"
    way = "run by run" if found.by_runs else "row by row, columns side by side"
    return Choice("cpu", f"C++ for {word}, {way}: one look measures, the next finds the data in the cache", found)


def _refusal(
    dtype: torch.dtype,
    device: str,
    normalizer: Normalizer,
    recovery: Recovery | None,
    use: Use | None,
    *,
    request: Request,
    available: bool,
) -> str:
    """Why the compiled kernels do not take a call, or nothing."""
    if request == "reference":
        return "NORMWISE_BACKEND asks for them"
    if device != "cpu":
        return f"there is no kernel for {device} yet"
    if not available:
        return "the compiled kernels are not there: `normwise backends` says why"
    if dtype not in DTYPES:
        return f"no kernel computes in {str(dtype).removeprefix('torch.')}"
    for part, known in ((normalizer, NORMALIZERS), (recovery, _RECOVERIES)):
        if type(part) not in known:
            return f"no kernel knows {type(part).__name__}"
    if use not in (None, "instead"):
        return "the batch's statistics and remembered ones are mixed"
    return ""


def _dense_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Those of a dense copy, which keeps the order of the axes."""
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()
