"""normwise: the normalization and tuning toolkit for deep networks in PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normwise import functional, textbook
from normwise.errors import (
    DiagnosisError,
    GateError,
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

if TYPE_CHECKING:
    from normwise.diagnose.activations import activations
    from normwise.diagnose.doctor import doctor
    from normwise.diagnose.gap import gap
    from normwise.diagnose.lr_range import lr_range
    from normwise.diagnose.monitor import Monitor
    from normwise.diagnose.nonfinite import first_nonfinite
    from normwise.diagnose.sharpness import sharpness
    from normwise.diagnose.smoothness import smoothness
    from normwise.diagnose.stable_lr import max_stable_lr
    from normwise.diagnose.thresholds import stability_threshold
    from normwise.kernels.backends import Backend, BackendError, backends
    from normwise.recurrent import GRU, LSTM, RNN
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
    "Backend",
    "BackendError",
    "BatchNorm",
    "DiagnosisError",
    "Frozen",
    "GateError",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "LayerNorm2d",
    "MissingExtraError",
    "Monitor",
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
    "activations",
    "adopt",
    "backends",
    "doctor",
    "domain",
    "find",
    "first_nonfinite",
    "fold",
    "freeze",
    "functional",
    "gap",
    "lr_range",
    "max_stable_lr",
    "no_update",
    "param_groups",
    "recalibrate",
    "register_converter",
    "release",
    "sharpness",
    "smoothness",
    "stability_threshold",
    "swap",
    "textbook",
    "tune",
    "unfreeze",
]

_TUNING = ("Study", "tune")
_LATER = {  # and where it is
    "GRU": "recurrent",
    "LSTM": "recurrent",
    "RNN": "recurrent",
    "Backend": "kernels.backends",
    "BackendError": "kernels.backends",
    "Monitor": "diagnose.monitor",
    "activations": "diagnose.activations",
    "adopt": "surgery.adopt",
    "backends": "kernels.backends",
    "doctor": "diagnose.doctor",
    "find": "surgery.find",
    "first_nonfinite": "diagnose.nonfinite",
    "fold": "surgery.fold",
    "gap": "diagnose.gap",
    "lr_range": "diagnose.lr_range",
    "max_stable_lr": "diagnose.stable_lr",
    "param_groups": "surgery.groups",
    "recalibrate": "surgery.recalibrate",
    "register_converter": "surgery.converters",
    "release": "surgery.adopt",
    "sharpness": "diagnose.sharpness",
    "smoothness": "diagnose.smoothness",
    "stability_threshold": "diagnose.thresholds",
    "swap": "surgery.swap",
}


def __getattr__(name: str) -> Any:
    """Recurrent nets, surgery, diagnoses and tuning are loaded when they are asked for: an import is fast."""
    if name in _LATER:
        return getattr(import_module(f"normwise.{_LATER[name]}"), name)
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
