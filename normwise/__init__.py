"""normwise: the normalization and tuning toolkit for deep networks in PyTorch."""

from __future__ import annotations

from normwise.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, LayerNorm2d, RMSNorm, RMSNorm2d
from normwise.memory import Average, Frozen, Moving
from normwise.norm import Norm
from normwise.normalizers import RMS, Standardize
from normwise.recoveries import Affine, Scale

__version__ = "0.1.0"

__all__ = [
    "RMS",
    "Affine",
    "Average",
    "BatchNorm",
    "Frozen",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "LayerNorm2d",
    "Moving",
    "Norm",
    "RMSNorm",
    "RMSNorm2d",
    "Scale",
    "Standardize",
]
