"""normwise: the normalization and tuning toolkit for deep networks in PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normwise import functional, textbook
from normwise.errors import (
    MissingExtraError,
    NonFiniteError,
    NormwiseError,
    PatternError,
    RecomputeError,
    ShapeError,
    StudyError,
    SurgeryError,
    TooFewSamplesError,
)
from normwise.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, LayerNorm2d, RMSNorm, RMSNorm2d
from normwise.memory import Average, Frozen, Moving, Renorm
from normwise.modes import accumulate, domain, freeze, no_update, unfreeze
from normwise.norm import Norm
from normwise.normalizers import L2, RMS, Standardize
from normwise.record import Record
from normwise.recoveries import Affine, OffsetScale, Scale
from normwise.recurrent import GRU, LSTM, RNN

if TYPE_CHECKING:
    from normwise.study import Study, tune
    from normwise.surgery.adopt import adopt, release
    from normwise.surgery.converters import register_converter
    from normwise.surgery.find import find
    from normwise.surgery.fold import fold
    from normwise.surgery.groups import param_groups
    from normwise.surgery.recalibrate import recalibrate
    from normwise.surgery.swap import swap

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "L2",
    "LSTM",
    "RMS",
    "RNN",
    "Affine",
    "Average",
    "BatchNorm",
    "Frozen",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "LayerNorm2d",
    "MissingExtraError",
    "Moving",
    "NonFiniteError",
    "Norm",
    "NormwiseError",
    "OffsetScale",
    "PatternError",
    "RMSNorm",
    "RMSNorm2d",
    "RecomputeError",
    "Record",
    "Renorm",
    "Scale",
    "ShapeError",
    "Standardize",
    "Study",
    "StudyError",
    "SurgeryError",
    "TooFewSamplesError",
    "accumulate",
    "adopt",
    "domain",
    "find",
    "fold",
    "freeze",
    "functional",
    "no_update",
    "param_groups",
    "recalibrate",
    "register_converter",
    "release",
    "swap",
    "textbook",
    "tune",
    "unfreeze",
]

_TUNING = ("Study", "tune")
_SURGERY = {  # and where it is
    "adopt": "adopt",
    "find": "find",
    "fold": "fold",
    "param_groups": "groups",
    "recalibrate": "recalibrate",
    "register_converter": "converters",
    "release": "adopt",
    "swap": "swap",
}


def __getattr__(name: str) -> Any:
    """Surgery and tuning are loaded when they are first asked for: an import stays fast, and needs torch alone."""
    if name in _SURGERY:
        return getattr(import_module(f"normwise.surgery.{_SURGERY[name]}"), name)
    if name not in _TUNING:
        raise AttributeError(f"module 'normwise' has no attribute {name!r}")
    try:
        from normwise import study
    except ImportError as error:
        if (error.name or "").startswith("normwise"):  # not an optional package, but a fault of ours
            raise
        raise MissingExtraError(f"normwise.{name}", "tune") from error
    return getattr(study, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
