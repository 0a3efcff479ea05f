"""Stand-ins of timm's, torchvision's and diffusers' normalization layers: the same names, attributes and keys.

The libraries themselves need torchvision's compiled part, or are large. What a converter looks at is here: the class's
module and name, its attributes, its signature and its children.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _with_act(layer: nn.Module, act: nn.Module | None, drop: nn.Module | None) -> None:
    layer.drop = nn.Identity() if drop is None else drop
    layer.act = nn.ReLU(inplace=True) if act is None else act


class BatchNormAct2d(nn.BatchNorm2d):
    __module__ = "timm.layers.norm_act"

    def __init__(self, num_features: int, *args: object, act=None, drop=None, **options: object) -> None:
        super().__init__(num_features, *args, **options)
        _with_act(self, act, drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class SyncBatchNormAct(nn.SyncBatchNorm):
    __module__ = "timm.layers.norm_act"

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class GroupNormAct(nn.GroupNorm):
    __module__ = "timm.layers.norm_act"

    def __init__(self, num_channels: int, num_groups: int = 32, act=None, drop=None, **options: object) -> None:
        super().__init__(num_groups, num_channels, **options)
        _with_act(self, act, drop)
        self._fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)))


class LayerNormAct(nn.LayerNorm):
    __module__ = "timm.layers.norm_act"

    def __init__(self, shape: int, act=None, drop=None, **options: object) -> None:
        super().__init__(shape, **options)
        _with_act(self, act, drop)
        self._fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)))


class LayerNormAct2d(nn.LayerNorm):
    __module__ = "timm.layers.norm_act"

    def __init__(self, channels: int, act=None, drop=None, **options: object) -> None:
        super().__init__(channels, **options)
        _with_act(self, act, drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))


class GroupNorm(nn.GroupNorm):
    __module__ = "timm.layers.norm"

    def __init__(self, num_channels: int, num_groups: int = 32, **options: object) -> None:
        super().__init__(num_groups, num_channels, **options)
        self._fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class GroupNorm1(nn.GroupNorm):
    __module__ = "timm.layers.norm"

    def __init__(self, num_channels: int, **options: object) -> None:
        super().__init__(1, num_channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class LayerNorm(nn.LayerNorm):
    __module__ = "timm.layers.norm"

    def __init__(self, num_channels: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__(num_channels, eps=eps, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerNorm2d(nn.LayerNorm):
    __module__ = "timm.layers.norm"

    def __init__(self, num_channels: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__(num_channels, eps=eps, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


class LayerNorm2dFp32(LayerNorm2d):
    __module__ = "timm.layers.norm"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype) if x.dtype == torch.float16 else super().forward(x)


class RmsNorm(nn.Module):
    __module__ = "timm.layers.norm"

    def __init__(self, channels: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.elementwise_affine = (channels,), eps, affine
        self.register_parameter("weight", nn.Parameter(torch.ones(channels)) if affine else None)
        self._fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class RmsNorm2d(RmsNorm):
    __module__ = "timm.layers.norm"

    def forward(self, x: Tensor) -> Tensor:
        x = x * (x.square().mean(1, keepdim=True) + self.eps).rsqrt()
        return x if self.weight is None else x * self.weight.reshape(1, -1, 1, 1)


class RmsNormAct(RmsNorm):
    __module__ = "timm.layers.norm_act"

    def __init__(self, channels: int, act=None, drop=None, **options: object) -> None:
        super().__init__(channels, **options)
        _with_act(self, act, drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class RmsNormAct2d(RmsNorm2d):
    __module__ = "timm.layers.norm_act"

    def __init__(self, channels: int, act=None, drop=None, **options: object) -> None:
        super().__init__(channels, **options)
        _with_act(self, act, drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class SimpleNorm(RmsNorm):
    """It divides by the standard deviation, and subtracts nothing: no converter knows it."""

    __module__ = "timm.layers.norm"

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.var(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class FrozenBatchNorm2d(nn.Module):
    __module__ = "torchvision.ops.misc"

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (buffer.reshape(1, -1, 1, 1) for buffer in self._buffers.values())
        slope = weight * (variance + self.eps).rsqrt()
        return x * slope + (bias - mean * slope)


class ConvNextLayerNorm2d(nn.LayerNorm):
    """torchvision's, which is called LayerNorm2d there."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


ConvNextLayerNorm2d.__name__ = "LayerNorm2d"
ConvNextLayerNorm2d.__module__ = "torchvision.models.convnext"


class GatedRMSNorm(RmsNorm):
    """One with a gate, as the newer state space models have it: it takes two inputs."""

    __module__ = "transformers.models.mamba2.modeling_mamba2"

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * F.silu(gate))


class BiasedRMSNorm(RmsNorm):
    """One with a bias, as diffusers' can have."""

    __module__ = "diffusers.models.normalization"

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias
