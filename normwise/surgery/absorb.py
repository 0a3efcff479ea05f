"""The algebra of folding: a scale and a shift of each channel, absorbed by the weights of a linear layer.

Everything is computed in float64 and rounded once, to the weight's dtype. Layers are `Linear`, convolutions, transposed
convolutions, and Hugging Face's `Conv1D`, which is a linear layer with its weight transposed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Weights(NamedTuple):
    """Weight and bias of a layer; the bias None where it has none."""

    weight: Tensor
    bias: Tensor | None


class ChannelMap(NamedTuple):
    """`scale * x + shift`, one of each a channel, in float64.

    Whether it `shifts` does not depend on the values, so that what is folded does not: a model and the same model after
    training fold into the same layers.
    """

    scale: Tensor
    shift: Tensor
    shifts: bool = True


def is_linear(layer: nn.Module | None) -> bool:
    """Whether a layer multiplies by its weight and adds its bias, and its class does nothing else."""
    if layer is None or "forward" in layer.__dict__ or hasattr(layer, "parametrizations"):
        return False
    known = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
    base = next((kind for kind in known if isinstance(layer, kind)), None)
    if base is None:
        return _is_conv1d(layer)
    return all(getattr(type(layer), name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))


def _is_conv1d(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def channel_dim_of(layer: Any, rank: int) -> int:
    """The dimension of the channels in inputs and outputs of that many dimensions."""
    return rank - 1 if isinstance(layer, nn.Linear) or _is_conv1d(layer) else rank - 1 - len(layer.kernel_size)


def with_outputs(layer: Any, outer: ChannelMap) -> Weights:
    """The weights that make `scale * layer(x) + shift`.

    >>> layer = nn.Linear(3, 2)
    >>> twice = with_outputs(layer, ChannelMap(torch.tensor([2.0, 2.0]), torch.zeros(2)))
    >>> torch.equal(twice.weight, 2 * layer.weight.double())
    True
    """
    bias = outer.shift if layer.bias is None else layer.bias.detach().double() * outer.scale + outer.shift
    return Weights(_times(layer, outer.scale, inputs=False), bias)


def with_inputs(layer: Any, inner: ChannelMap) -> Weights:
    """The weights that make `layer(scale * x + shift)`; `misfit` says where that is not exact."""
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Linear):
        added = weight @ inner.shift
    elif _is_conv1d(layer):
        added = inner.shift @ weight
    elif isinstance(layer, TRANSPOSED):  # one tap an output, or no shift
        added = _by_group(layer, _times(layer, inner.shift, inputs=True)).sum((1, *_taps(layer))).flatten()
    else:
        added = _times(layer, inner.shift, inputs=True).flatten(1).sum(1)
    bias = None
    if layer.bias is not None or inner.shifts:
        bias = added if layer.bias is None else layer.bias.detach().double() + added
    return Weights(_times(layer, inner.scale, inputs=True), bias)


def misfit(layer: Any, inner: ChannelMap) -> str | None:
    """Why `layer(scale * x + shift)` is not the layer with other weights; None: it is."""
    if not inner.shifts or isinstance(layer, nn.Linear) or _is_conv1d(layer):
        return None
    if isinstance(layer, TRANSPOSED):
        sizes = (*layer.kernel_size, *layer.stride)
        plain = all(size == 1 for size in sizes) and not any((*layer.padding, *layer.output_padding))
        return None if plain else "reaches its edges with fewer taps, where the shift would count for less"
    if layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice):
        return "pads with zeros, to which the shift would not be added"
    return None


def centred_outputs(layer: Any) -> Weights:
    """The weights whose outputs have mean 0 over the channels; an embedding's are its rows."""
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Embedding) or _is_conv1d(layer):
        weight = weight - weight.mean(1, keepdim=True)
    elif isinstance(layer, TRANSPOSED):
        grouped = _by_group(layer, weight)
        weight = (grouped - grouped.mean(2, keepdim=True)).reshape(layer.weight.shape)
    else:
        weight = weight - weight.mean(0, keepdim=True)
    bias = getattr(layer, "bias", None)
    return Weights(weight, None if bias is None else bias.detach().double() - bias.detach().double().mean())


def can_centre(layer: nn.Module | None) -> bool:
    """Whether other weights take the mean out of a layer's outputs: one group of channels, no norm of its own."""
    if isinstance(layer, nn.Embedding):
        return type(layer).forward is nn.Embedding.forward and layer.max_norm is None
    return is_linear(layer) and getattr(layer, "groups", 1) == 1


def _times(layer: Any, factor: Tensor, *, inputs: bool) -> Tensor:
    """The weight times a factor for each input or output channel."""
    weight: Tensor = layer.weight.detach().double()
    factor = factor.to(weight.device)
    if isinstance(layer, nn.Linear):
        return weight * (factor if inputs else factor[:, None])
    if _is_conv1d(layer):
        return weight * (factor[:, None] if inputs else factor)
    grouped = _by_group(layer, weight)
    by_first = inputs == isinstance(layer, TRANSPOSED)  # a transposed weight is (in, out / groups, ...)
    shape = [layer.groups, -1, 1] if by_first else [layer.groups, 1, -1]
    return (grouped * factor.reshape(shape + [1] * len(layer.kernel_size))).reshape(weight.shape)


def _by_group(layer: Any, weight: Tensor) -> Tensor:
    """A convolution's weight as (groups, first channels a group, second channels a group, taps...)."""
    return weight.reshape(layer.groups, weight.shape[0] // layer.groups, *weight.shape[1:])


def _taps(layer: Any) -> tuple[int, ...]:
    return tuple(range(3, 3 + len(layer.kernel_size)))


def channel_map(scale: Tensor | None, shift: Tensor | None, channels: int) -> ChannelMap:
    """A scale (None: 1) and a shift (None: 0), in float64."""
    like = scale if scale is not None else shift
    device = None if like is None else like.device
    ones = torch.ones(channels, dtype=torch.float64, device=device)
    return ChannelMap(
        ones if scale is None else scale.detach().double().flatten(),
        torch.zeros_like(ones) if shift is None else shift.detach().double().flatten(),
        shifts=shift is not None,
    )
