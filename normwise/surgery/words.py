"""The common normalizations by name, for a number of features on an axis: what `swap` and studies can be told.

======== ===================== ==============================================
name     channels first        statistics of
======== ===================== ==============================================
none     `torch.nn.Identity`   nothing
rms      `RMSNorm2d`           the features at each position
layer    `LayerNorm2d`         the features at each position
group:G  `GroupNorm`           a group of channels of each example
instance `InstanceNorm`        each channel of each example
batch    `BatchNorm`           each channel over batch and positions
======== ===================== ==============================================
"""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

from normwise.errors import ShapeError, SurgeryError
from normwise.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, LayerNorm2d, RMSNorm, RMSNorm2d
from normwise.memory import Moving
from normwise.norm import Norm
from normwise.normalizers import Standardize
from normwise.recoveries import Affine

Axis = Literal[1, -1]

WORDS = ("none", "rms", "layer", "group", "instance", "batch")  # the simplest first
UPDATE_RATE = 0.1
_EPS = 1e-5  # all but the RMS norms', whose is that of the input's dtype


def check_word(word: str) -> None:
    """Refuse what names no layer.

    Raises:
        SurgeryError: it is none of `WORDS`, and not `group:G`.
    """
    if word not in WORDS and not re.fullmatch(r"group:[1-9]\d*", word):
        raise SurgeryError(
            f"no normalization is called {word!r}; say one of {', '.join(map(repr, WORDS))}, or 'group:G'"
        )


def group_count(features: int, most: int = 32) -> int:
    """The largest number of groups, `most` at most, that divides the features and leaves two a group or more.

    Raises:
        ShapeError: there is only one feature.

    >>> group_count(48), group_count(7)
    (24, 1)
    """
    if features < 2:
        raise ShapeError(f"{features} feature cannot be split into groups of two or more")
    return max(groups for groups in range(1, min(most, features) + 1) if groups_fit(groups, features))


def groups_fit(groups: int, features: int) -> bool:
    """Whether so many groups divide the features and leave two a group or more."""
    return groups > 0 and features % groups == 0 and features // groups >= 2


def named_layer(
    word: str,
    features: int,
    axis: Axis = 1,
    *,
    affine: bool = True,
    eps: float | None = None,
) -> nn.Module:
    """The layer of that name.

    Args:
        word: One of `WORDS`, or `group:G`.
        features: Channels.
        axis: Where they are: 1, or -1 for the last.
        affine: Whether it has a gain, and a bias where its kind has one.
        eps: Added to the variance, or to the mean square; None: as usual for the layer.

    Raises:
        SurgeryError: no layer is called so.
        ShapeError: groups that do not divide the features, or leave one a group.

    >>> named_layer("group", 48)
    GroupNorm(24, 48, eps=1e-05, affine=True)
    """
    check_word(word)
    name, _, groups = word.partition(":")
    if name == "group":
        return _group(features, axis, int(groups) if groups else group_count(features), affine, eps)
    if name == "rms":
        return (RMSNorm2d if axis == 1 else RMSNorm)(features, eps, elementwise_affine=affine)
    eps = _EPS if eps is None else eps
    if name == "layer":
        return (LayerNorm2d if axis == 1 else LayerNorm)(features, eps, elementwise_affine=affine)
    recovery = Affine("c") if affine else None
    if name == "batch":
        memory = Moving("c", update_rate=UPDATE_RATE)
        if axis == 1:
            return BatchNorm(features, eps, affine=affine)
        return Norm("[...] c", Standardize(eps), recovery, memory, c=features)
    if name == "instance":
        if axis == 1:
            return InstanceNorm(features, eps, affine=affine)
        return Norm("n [...] c", Standardize(eps), recovery, c=features)
    return nn.Identity()


def _group(features: int, axis: Axis, groups: int, affine: bool, eps: float | None) -> nn.Module:
    if not groups_fit(groups, features):
        fitting = ", ".join(str(count) for count in range(1, features) if groups_fit(count, features))
        raise ShapeError(
            f"{groups} groups do not divide {features} features into two or more each; group counts that work: "
            f"{fitting or 'none'}"
        )
    return grouped(features, axis, groups, affine=affine, eps=eps)


def grouped(features: int, axis: Axis, groups: int, *, affine: bool = True, eps: float | None = None) -> nn.Module:
    """A group normalization of so many groups, which may be of one channel each."""
    eps = _EPS if eps is None else eps
    if axis == 1:
        return GroupNorm(groups, features, eps, affine=affine)
    recovery = Affine("(g k)") if affine else None
    return Norm("n [...] (g [k])", Standardize(eps), recovery, g=groups, k=features // groups)
