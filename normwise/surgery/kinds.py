"""Which normalization a layer is, whatever library it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from normwise.norm import Norm
from normwise.normalizers import L2, RMS
from normwise.pattern import ELLIPSIS, Pattern
from normwise.spec import NormSpec
from normwise.surgery.converters import (
    adds_behaviour,
    convert,
    is_registered,
    looks_like_one,
    mismatch,
    obstacle,
    unknown,
)


@dataclass(frozen=True)
class Kind:
    """What a normalization layer is.

    Attributes:
        name: "batch", "instance", "group", "layer", "rms", "l2"; "other" for one that a registered converter turns
            into a module that does more than normalize; "unknown" for one that cannot be converted.
        converted: The layer in normwise's words, without values; None for an unknown one.
        reason: Why it cannot be converted.
    """

    name: str
    converted: nn.Module | None = None
    reason: str = ""

    @property
    def spec(self) -> NormSpec | None:
        """Its declaration; None where there is none, or where it is not all that the layer does."""
        return self.converted.spec if isinstance(self.converted, Norm) and self.name != "other" else None


def kind_of(layer: nn.Module) -> Kind | None:
    """Which normalization a layer is; None: it is none.

    >>> kind_of(nn.BatchNorm2d(8)).name, kind_of(nn.BatchNorm2d(8)).spec.text
    ('batch', '[n] c [...]')
    >>> kind_of(nn.Linear(2, 2))
    """
    if not looks_like_one(layer):
        return None
    reason = obstacle(layer)
    if reason is not None:
        return Kind("unknown", reason=reason)
    converted = convert(layer)
    if converted is None:
        return Kind("unknown", reason=unknown(layer))
    misfit = mismatch(layer, converted) if is_registered(layer) else None
    if misfit is not None:
        return Kind("unknown", reason=misfit)
    if not isinstance(converted, Norm) or adds_behaviour(converted):
        return Kind("other", converted, "what its converter makes of it does more than normalize")
    return Kind(kind_of_spec(converted.spec), converted)


def kind_of_spec(spec: NormSpec) -> str:
    """The field's name for a declaration."""
    if isinstance(spec.normalizer, RMS):
        return "rms"
    if isinstance(spec.normalizer, L2):
        return "l2"
    pattern = spec.pattern
    if pattern.axes[0].reduced:
        return "batch"
    if pattern.over_features_only:
        return "layer"
    if any(len({axis.reduced for axis in dim}) == 2 for dim in pattern.dims):
        return "group"
    return "layer" if not _kept(pattern) else "instance"


def channel_dim(spec: NormSpec, rank: int) -> int | None:
    """The dimension of a tensor of that many dimensions that holds the channels; None: there is not one such."""
    found, dims = channel_place(spec), spec.pattern.dims
    if found is None:
        return None
    open_at = next((at for at, dim in enumerate(dims) if dim[0].name == ELLIPSIS), len(dims))
    return found if found < open_at else found - len(dims) + rank


def channel_place(spec: NormSpec) -> int | None:
    """Which of the pattern's dimensions holds the channels; None: there is not one such.

    It is the dimension of the recovery's or the memory's axes; without them the one that is split into groups, or the
    only named one after the first.
    """
    dims = spec.pattern.dims
    named = {name for over in (spec.parameter_over, spec.memory_over) for dim in over for name in dim}
    found = [at for at, dim in enumerate(dims) if named & {axis.name for axis in dim}]
    found = found or [at for at, dim in enumerate(dims) if len(dim) > 1]
    found = found or [at for at, dim in enumerate(dims) if at > 0 and dim[0].name != ELLIPSIS]
    return found[0] if len(found) == 1 else None


def _kept(pattern: Pattern) -> list[str]:
    return [axis.name for axis in pattern.axes[1:] if not axis.reduced]
