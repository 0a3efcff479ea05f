"""Normalizations that end in an activation, every kind of declaration, and torch's function for each name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import normwise as nw
from normwise import L2, RMS, Affine, Frozen, Moving, Norm, Renorm, Scale
from normwise.recoveries import OffsetScale

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "silu": F.silu, "gelu": F.gelu}
OPEN = Renorm(r_max=1.5, d_max=0.5, warmup=0, r_ramp=0, d_ramp=0)
KINDS: dict[str, Callable[..., Norm]] = {
    "BatchNorm": lambda **o: nw.BatchNorm(6, **o),
    "InstanceNorm": lambda **o: nw.InstanceNorm(6, affine=True, track_running_stats=True, **o),
    "LayerNorm": lambda **o: nw.LayerNorm(5, **o),
    "RMSNorm": lambda **o: nw.RMSNorm(5, **o),
    "GroupNorm": lambda **o: nw.GroupNorm(2, 6, **o),
    "LayerNorm2d": lambda **o: nw.LayerNorm2d(6, **o),
    "RMSNorm2d": lambda **o: nw.RMSNorm2d(6, **o),
    "no recovery": lambda **o: Norm("n [c] ...", **o),
    "bias over others": lambda **o: Norm("n [c] ...", RMS(1e-3), Affine("c"), c=6, **o),
    "scale": lambda **o: Norm("[n] c d", recovery=Scale("d c"), memory=Frozen("c"), c=6, d=5, **o),
    "offset": lambda **o: Norm("n c [d]", recovery=OffsetScale("d"), d=5, **o),
    "euclidean": lambda **o: Norm("n c [d]", L2(), Affine("c"), c=6, **o),
    "corrected": lambda **o: Norm("[n] c d", None, Affine("c"), Moving("c", decay=0.9, renorm=OPEN), c=6, **o),
    "pieces": lambda **o: Norm("[n] c d", None, Affine("c"), Moving("c", decay=0.9, ghost=2), c=6, **o),
}
SHAPE = (4, 6, 5)

activations = pytest.mark.parametrize("name", FUNCTIONS)
