"""Which normalization can be folded into which layer, and what the weights then are: rules over the data flow.

A rule looks at one normalization and gives a `Fold`, which says what to change, or the reason why it does not apply.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normwise.norm import Norm
from normwise.normalizers import Standardize
from normwise.pointwise import FUNCTIONS
from normwise.recoveries import Affine, OffsetScale, Scale
from normwise.spec import NormSpec
from normwise.surgery.absorb import (
    CONVOLUTIONS,
    TRANSPOSED,
    ChannelMap,
    Weights,
    channel_dim_of,
    channel_map,
    is_linear,
    misfit,
    with_inputs,
    with_outputs,
)
from normwise.surgery.activated import Activated
from normwise.surgery.edits import Edits
from normwise.surgery.exchange import Site
from normwise.surgery.flow import HOOKS, Flow, Step
from normwise.surgery.kinds import channel_dim
from normwise.surgery.streams import End, downstream, upstream


@dataclass(frozen=True)
class Subject:
    """A normalization in the flow."""

    site: Site
    converted: Norm  # in normwise's words
    flow: Flow

    @property
    def layer(self) -> Any:
        """The layer, whose attributes depend on its library."""
        return self.site.module

    @property
    def spec(self) -> NormSpec:
        """Its declaration."""
        return self.converted.spec

    @property
    def obstacle(self) -> str | None:
        """Why nothing at all can be done with it; None: something can."""
        if not self.calls:
            return "no forward reached it"
        if any(self.layer.__dict__[hooks] for hooks in HOOKS):
            return "it has hooks"
        if not all(call.takes_only_its_input for call in self.calls):
            return "it is called with a mask, lengths, a gate or a residual"
        if self._is_called_without_batch:
            return "it is called without a batch"
        if getattr(self.layer, "domains", ()):
            return "it has memories of several domains"
        if any(not place.path for place in self.site.places):
            return "it is the model itself"
        elsewhere = self.flow.elsewhere(self.layer)
        return None if elsewhere is None else f"a parameter of it {elsewhere}"

    @property
    def _is_called_without_batch(self) -> bool:
        """torch's instance norms take a single example as well."""
        if not isinstance(self.layer, _InstanceNorm) or isinstance(self.layer, Norm):
            return False
        rank = self.layer._get_no_batch_dim()  # type: ignore[no-untyped-call]  # torch does not annotate it
        return any(call.takes[0].tensor.dim() == rank for call in self.calls)

    @property
    def calls(self) -> list[Step]:
        """Its calls."""
        return self.flow.calls(self.layer)


@dataclass(frozen=True)
class Fold:
    """What to change.

    Attributes:
        new: What stands in the normalization's place; None: it stays.
        weights: The new weights of other layers.
        why: For the record.
        own: New values of the normalization's own parameters and buffers, by name.
    """

    new: nn.Module | None
    weights: dict[nn.Module, Weights]
    why: str
    own: dict[str, Tensor] = field(default_factory=dict)


def into_before(subject: Subject) -> Fold | str:
    """The whole normalization into the layer before it: `scale * W x + scale * b + shift`."""
    whole = fixed_map(subject)
    if isinstance(whole, str):
        return whole
    found = layer_before(subject)
    if isinstance(found, str):
        return found
    return Fold(remainder(subject), {found: with_outputs(found, whole)}, f"into {name_of(subject, found)} before it")


def into_after(subject: Subject) -> Fold | str:
    """The whole normalization into the layers that read it: `W (x * scale + shift) + b`."""
    whole = fixed_map(subject)
    if isinstance(whole, str):
        return whole
    if any(subject.flow.is_changed_after(call, call.takes[0].tensor) for call in subject.calls):
        return "what it reads is changed in place after it"
    weights = _taken_in_after(subject, whole)
    if isinstance(weights, str):
        return weights
    return Fold(remainder(subject), weights, f"into {_names(subject, weights)} after it")


def gain_into_after(subject: Subject) -> Fold | str:
    """The gain and bias of a normalization into the layers that read it; its own become 1 and 0.

    They stay as parameters: the keys of a checkpoint do not change, and code that looks at them still finds them.
    """
    gain = gain_map(subject)
    if isinstance(gain, str):
        return gain
    weights = _taken_in_after(subject, gain)
    if isinstance(weights, str):
        return weights
    is_done = bool((gain.scale == 1).all() and (gain.shift == 0).all())
    if is_done and not any(new.bias is not None and layer.bias is None for layer, new in weights.items()):
        return ""
    starts = subject.spec.recovery.parameters if subject.spec.recovery is not None else {}
    given = {name: getattr(subject.layer, name, None) for name in starts}
    own = {name: torch.full_like(tensor, starts[name]) for name, tensor in given.items() if tensor is not None}
    return Fold(None, weights, f"its gain into {_names(subject, weights)} after it", own)


def has_no_bias(subject: Subject) -> bool:
    """Whether a normalization has no bias, or one that has been folded: it is 0, and all that read it could take it."""
    bias = getattr(subject.layer, "bias", None)
    if bias is None:
        return True
    gain = gain_map(subject)
    return not bool(bias.any()) and not isinstance(gain, str) and not isinstance(_taken_in_after(subject, gain), str)


def _taken_in_after(subject: Subject, inner: ChannelMap) -> dict[nn.Module, Weights] | str:
    """The weights of all layers that read the normalization, with a map taken in."""
    if isinstance(subject.converted, Activated) or subject.spec.activation is not None:
        return "it also applies an activation"
    readers = layers_after(subject)
    if isinstance(readers, str):
        return readers
    reasons = [(layer, misfit(layer, inner)) for layer in readers]
    for layer, reason in reasons:
        if reason is not None:
            return f"{name_of(subject, layer)} after it {reason}"
    return {layer: with_inputs(layer, inner) for layer in readers}


def _names(subject: Subject, layers: Iterable[nn.Module]) -> str:
    return ", ".join(name_of(subject, layer) for layer in layers)


def useless_bias(subject: Subject) -> Fold | str:
    """The bias before a normalization that takes the mean out of each channel again."""
    axes = [axis for dim in subject.spec.pattern.dims for axis in dim if axis.name in _channel_names(subject.spec)]
    if not isinstance(subject.spec.normalizer, Standardize) or any(axis.reduced for axis in axes) or not axes:
        return ""
    found: Any = layer_before(subject)
    if isinstance(found, str):
        return found
    needed = not isinstance(found, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))  # Conv1D computes with its bias
    if found.bias is None or (needed and not bool(found.bias.any())):
        return ""
    mean = subject.layer._buffers.get("running_mean")
    if mean is not None:
        mean = mean.double() - found.bias.detach().double().reshape(mean.shape)
    why = f"the bias of {name_of(subject, found)}, which it takes out again"
    own = {} if mean is None else {"running_mean": mean}
    weights = Weights(found.weight, torch.zeros_like(found.bias) if needed else None)
    return Fold(None, {found: weights}, why, own)


# ---------------------------------------------------------------------------------- what a normalization multiplies by


def fixed_map(subject: Subject) -> ChannelMap | str:
    """What the layer computes, where that does not depend on the batch: `x * scale + shift`, channel by channel."""
    layer, spec = subject.layer, subject.spec
    if spec.memory is None:
        return "its statistics are those of the batch" if spec.pattern.axes[0].reduced else ""
    if layer.training and spec.memory.updates and not getattr(layer, "frozen", False):
        return "in training its statistics are those of the batch: model.eval() first"
    mean, variance = layer._buffers.get("running_mean"), layer._buffers.get("running_var")
    if mean is None or variance is None:
        return "it remembers no mean and variance"
    if len(spec.memory_over) != 1:
        return f"it remembers statistics over {len(spec.memory_over)} axes"
    gain = gain_map(subject) if spec.recovery is not None else channel_map(None, None, mean.numel())
    if isinstance(gain, str):
        return gain
    eps = spec.normalizer.eps  # type: ignore[attr-defined]  # what remembers a mean and a variance standardizes
    scale = gain.scale * (variance.double() + eps).rsqrt()
    return ChannelMap(scale, gain.shift - mean.double() * scale)


def gain_map(subject: Subject) -> ChannelMap | str:
    """What the layer multiplies by and adds after it has normalized."""
    layer, spec = subject.layer, subject.spec
    if spec.recovery is None:
        return ""
    if type(spec.recovery) not in (Affine, Scale, OffsetScale):
        return f"{type(spec.recovery).__name__} is no gain and bias"
    if len(spec.parameter_over) != 1:
        return f"its gain is over {len(spec.parameter_over)} dimensions"
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if isinstance(spec.recovery, OffsetScale):
        weight = 1 + weight.detach().double()
    given = weight if weight is not None else bias
    return "" if given is None else channel_map(weight, bias, given.numel())


def remainder(subject: Subject) -> nn.Module:
    """What is left to do where a normalization stood: nothing, or its activation."""
    if isinstance(subject.converted, Activated):
        left: nn.Module = nn.Sequential(OrderedDict(drop=subject.layer.drop, act=subject.layer.act))
    elif subject.spec.activation is not None:
        left = FUNCTIONS[subject.spec.activation].layer()
    else:
        left = nn.Identity()
    return left.train(subject.layer.training)


def _channel_names(spec: NormSpec) -> set[str]:
    over = (*spec.parameter_over, *spec.memory_over)
    return {name for dim in over for name in dim} or {"c"}


# ------------------------------------------------------------------------------------------------------ its neighbours


def layer_before(subject: Subject) -> nn.Module | str:
    """The linear layer whose outputs, all of them and nobody else's, the normalization reads channel by channel."""
    ends: list[Step] = []
    for call in subject.calls:
        rank = call.takes[0].tensor.dim()
        dim = channel_dim(subject.spec, rank)
        if dim is None:
            return "it normalizes over several dimensions"
        end = upstream(call.takes[0], dim, call)
        reason = _unfit_before(subject, end)
        if reason is not None:
            return reason
        ends.append(end.step)  # type: ignore[arg-type]  # it fits
    layers = {step.layer for step in ends}
    if len(layers) != 1:
        return f"several layers stand before it: {', '.join(sorted(step.name for step in ends))}"
    (layer,) = layers
    if layer is None or {id(step) for step in subject.flow.calls(layer)} != {id(step) for step in ends}:
        return f"{ends[0].name} before it is also called elsewhere"
    return usable(subject, layer) or layer


def _unfit_before(subject: Subject, end: End) -> str | None:
    if end.reason:
        return end.reason
    if end.step is None:
        return "it reads an input of the model"
    if not is_linear(end.step.layer):
        return f"before it stands {end.step}, which is no linear layer"
    at = channel_dim_of(end.step.layer, end.step.writes[0].tensor.dim())
    if at != end.dim:
        return f"{end.step} before it has its channels along dimension {at}, and it normalizes dimension {end.dim}"
    return None


def layers_after(subject: Subject) -> list[nn.Module] | str:
    """The linear layers that read the normalization, if nothing else reads it and they read nothing else."""
    ends: list[End] = []
    for call in subject.calls:
        dim = channel_dim(subject.spec, call.takes[0].tensor.dim())
        if dim is None:
            return "it normalizes over several dimensions"
        ends += downstream(call.writes[0], dim)
    reasons = [_unfit_after(end) for end in ends] or ["nothing reads it"]
    layers = list(dict.fromkeys(end.step.layer for end in ends if end.step is not None and end.step.layer is not None))
    reasons += [_unusable_after(subject, layer, ends) for layer in layers]
    return next((reason for reason in reasons if reason is not None), layers)


def _unfit_after(end: End) -> str | None:
    if end.step is None or not is_linear(end.step.layer):
        return f"it is read by {end.step}"
    if channel_dim_of(end.step.layer, end.step.takes[0].tensor.dim()) != end.dim:
        return f"{end.step} after it has its channels along another dimension"
    return None


def _unusable_after(subject: Subject, layer: nn.Module, ends: list[End]) -> str | None:
    calls = {id(end.step) for end in ends}
    if not all(id(step) in calls for step in subject.flow.calls(layer)):
        return f"{name_of(subject, layer)} after it also reads something else"
    return usable(subject, layer)


def usable(subject: Subject, layer: nn.Module | None) -> str | None:
    """Why a linear layer's weights cannot be changed; None: they can."""
    linear: Any = layer
    name = name_of(subject, linear)
    if any(linear.__dict__[hooks] for hooks in HOOKS):
        return f"{name} has hooks, which would see other values"
    elsewhere = subject.flow.elsewhere(linear)
    return None if elsewhere is None else f"a parameter of {name} {elsewhere}"


def name_of(subject: Subject, layer: nn.Module | None) -> str:
    """A layer's path."""
    return next((step.name for step in subject.flow.steps if step.layer is layer), type(layer).__name__)


def set_weights(layer: Any, weights: Weights, norm: nn.Module, edits: Edits) -> None:
    """Give a linear layer other weights; a new bias takes a gradient if the weight or the normalization did."""
    edits.set_values(layer.weight, weights.weight)
    bias = getattr(layer, "bias", None)
    if weights.bias is not None and bias is not None:
        edits.set_values(bias, weights.bias)
    elif weights.bias is not None:
        trains = any(parameter.requires_grad for parameter in (layer.weight, *norm.parameters()))
        edits.set_parameter(layer, "bias", nn.Parameter(weights.bias.to(layer.weight), requires_grad=trains))
    elif bias is not None:
        edits.set_parameter(layer, "bias", None)
