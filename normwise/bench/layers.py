"""The layers that are compared: normwise's and torch's for each operation, filled with the same values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise import layers as catalogue
from normwise.bench.cases import DTYPES, Case

EPS = 1e-5
_GROUPS = 32

Outputs = tuple[Tensor, ...]


class Plain(nn.Module):
    """A layer whose only output is a tuple of one."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Outputs:
        """The normalized input."""
        return (self.norm(x),)


class Added(Plain):
    """As models written for torch add: the sum, then its norm."""

    def forward(self, x: Tensor, residual: Tensor) -> Outputs:  # type: ignore[override]  # one input more
        """The normalized sum, and the sum."""
        total = x + residual
        return self.norm(total), total


class Fused(Plain):
    """The residual is added by the layer."""

    def forward(self, x: Tensor, residual: Tensor) -> Outputs:  # type: ignore[override]  # one input more
        """The normalized sum, and the sum."""
        output: Outputs = self.norm(x, residual=residual)
        return output


class Multiplied(Plain):
    """The output is multiplied by SiLU of a gate afterwards."""

    def forward(self, x: Tensor, gate: Tensor) -> Outputs:  # type: ignore[override]  # one input more
        """The gated output."""
        return (self.norm(x) * F.silu(gate),)


class Gated(Plain):
    """The layer multiplies by SiLU of a gate."""

    def forward(self, x: Tensor, gate: Tensor) -> Outputs:  # type: ignore[override]  # one input more
        """The gated output."""
        return (self.norm(x, gate=gate),)


class Activated(Plain):
    """ReLU in place, as torchvision's networks have it."""

    def forward(self, x: Tensor) -> Outputs:
        """The normalized input, and nothing below zero."""
        return (F.relu(self.norm(x), inplace=True),)


class ChannelsFirst(Plain):
    """LayerNorm over the channels of images, as ConvNeXt has it for torch: channels last, and back."""

    def forward(self, x: Tensor) -> Outputs:
        """The normalized input."""
        return (self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),)


def groups(channels: int) -> int:
    """As many groups as the paper has, or as divide the channels.

    >>> groups(64), groups(48)
    (32, 16)
    """
    return math.gcd(_GROUPS, channels)


_TORCH_BATCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_OURS: dict[str, Callable[[Case], nn.Module]] = {
    "rms_norm": lambda case: Plain(catalogue.RMSNorm(case.shape[-1], EPS)),
    "layer_norm": lambda case: Plain(catalogue.LayerNorm(case.shape[-1], EPS)),
    "add_rms_norm": lambda case: Fused(catalogue.RMSNorm(case.shape[-1], EPS)),
    "add_layer_norm": lambda case: Fused(catalogue.LayerNorm(case.shape[-1], EPS)),
    "gated_rms_norm": lambda case: Gated(catalogue.RMSNorm(case.shape[-1], EPS, gate="silu")),
    "batch_norm": lambda case: Plain(catalogue.BatchNorm(case.shape[1], EPS)),
    "batch_norm_relu": lambda case: Plain(catalogue.BatchNorm(case.shape[1], EPS, activation="relu")),
    "instance_norm": lambda case: Plain(catalogue.InstanceNorm(case.shape[1], EPS, affine=True)),
    "layer_norm_2d": lambda case: Plain(catalogue.LayerNorm2d(case.shape[1], EPS)),
    "group_norm": lambda case: Plain(catalogue.GroupNorm(groups(case.shape[1]), case.shape[1], EPS)),
}
_TORCHS: dict[str, Callable[[Case], nn.Module]] = {
    "rms_norm": lambda case: Plain(nn.RMSNorm(case.shape[-1], EPS)),
    "layer_norm": lambda case: Plain(nn.LayerNorm(case.shape[-1], EPS)),
    "add_rms_norm": lambda case: Added(nn.RMSNorm(case.shape[-1], EPS)),
    "add_layer_norm": lambda case: Added(nn.LayerNorm(case.shape[-1], EPS)),
    "gated_rms_norm": lambda case: Multiplied(nn.RMSNorm(case.shape[-1], EPS)),
    "batch_norm": lambda case: Plain(_TORCH_BATCH[len(case.shape)](case.shape[1], EPS)),
    "batch_norm_relu": lambda case: Activated(nn.BatchNorm2d(case.shape[1], EPS)),
    "instance_norm": lambda case: Plain(nn.InstanceNorm2d(case.shape[1], EPS, affine=True)),
    "layer_norm_2d": lambda case: ChannelsFirst(nn.LayerNorm(case.shape[1], EPS)),
    "group_norm": lambda case: Plain(nn.GroupNorm(groups(case.shape[1]), case.shape[1], EPS)),
}


def ours(case: Case) -> Any:
    """normwise's layer."""
    return filled(_OURS[case.operation](case), case)


def torchs(case: Case) -> Any:
    """torch's layer, or what people write where torch has none."""
    return filled(_TORCHS[case.operation](case), case)


def filled(layer: nn.Module, case: Case) -> nn.Module:
    """Gains, biases and memory that training could have left, in the case's dtype and mode.

    The dtype is that of `layer.to(dtype)`: torch's memory follows it, normwise's stays float32.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if name.endswith(("weight", "running_var")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith(("bias", "running_mean")):
                tensor.normal_(0, 0.2, generator=generator)
    return layer.to(DTYPES[case.dtype]).train(case.what.mode == "training")


def tensors(case: Case, device: torch.device | str = "cpu") -> tuple[Outputs, Outputs]:
    """Inputs and the outputs' gradients of a case."""
    generator = torch.Generator(device).manual_seed(0)
    form = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format

    def drawn() -> Tensor:
        x = torch.empty(case.shape, device=device).normal_(0.5, 1.5, generator=generator)
        return x.to(DTYPES[case.dtype]).contiguous(memory_format=form)

    inputs = tuple(drawn() for _ in range(case.inputs))
    gradients = tuple(drawn() for _ in range(2 if case.adds else 1))
    training = case.what.mode == "training"
    return tuple(x.requires_grad_(training) for x in inputs), gradients
