"""A normalization followed by what its foreign model did right after it, in one layer: a dropout and an activation.

The submodules are called `drop` and `act`, as in timm, so that the keys of a checkpoint stay.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from normwise.layers import BatchNorm, GroupNorm, LayerNorm, LayerNorm2d, RMSNorm, RMSNorm2d
from normwise.norm import Norm


class Activated(Norm):
    """What the layers below share: `act(drop(norm(x)))`; with a residual, the activated output and the plain sum."""

    drop: nn.Module
    act: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the normalization, then `drop`, then `act`."""
        output = super().forward(*args, **kwargs)
        if isinstance(output, tuple):
            return self.act(self.drop(output[0])), output[1]
        return self.act(self.drop(output))


class BatchNormAct(Activated, BatchNorm):  # type: ignore[misc]  # eps, as in BatchNorm
    """`BatchNorm`, then `drop` and `act`."""


class GroupNormAct(Activated, GroupNorm):  # type: ignore[misc]  # eps, as in GroupNorm
    """`GroupNorm`, then `drop` and `act`."""


class LayerNormAct(Activated, LayerNorm):  # type: ignore[misc]  # eps, as in LayerNorm
    """`LayerNorm`, then `drop` and `act`."""


class LayerNorm2dAct(Activated, LayerNorm2d):  # type: ignore[misc]  # eps, as in LayerNorm2d
    """`LayerNorm2d`, then `drop` and `act`."""


class RMSNormAct(Activated, RMSNorm):
    """`RMSNorm`, then `drop` and `act`."""


class RMSNorm2dAct(Activated, RMSNorm2d):
    """`RMSNorm2d`, then `drop` and `act`."""


ACTIVATED: dict[type[Norm], type[Activated]] = {
    BatchNorm: BatchNormAct,
    GroupNorm: GroupNormAct,
    LayerNorm: LayerNormAct,
    LayerNorm2d: LayerNorm2dAct,
    RMSNorm: RMSNormAct,
    RMSNorm2d: RMSNorm2dAct,
}
