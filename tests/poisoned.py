"""Fresh memory in which nothing can be mistaken for a result."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

_M_PERTURB = -6  # glibc's malloc.h


def poison() -> Iterator[None]:
    """Fresh memory is NaN, torch's, and nothing like a sensible number, the kernels' own."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    perturb = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # glibc's
    perturb(_M_PERTURB, 0x81)
    yield
    perturb(_M_PERTURB, 0)
    torch.use_deterministic_algorithms(False)
