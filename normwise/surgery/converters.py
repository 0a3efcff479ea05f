"""What the normalization layers of other libraries mean here: from one of them to a layer of normwise's.

A converter makes a layer with the same declaration, without values; whoever uses it moves the values over by name. It
is a proposal: `adopt` compares the two layers on hard inputs before it exchanges them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from normwise.errors import NormwiseError, SurgeryError
from normwise.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, LayerNorm2d, RMSNorm, RMSNorm2d
from normwise.memory import Frozen
from normwise.norm import Norm
from normwise.normalizers import RMS, Standardize
from normwise.recoveries import Affine, OffsetScale
from normwise.surgery.activated import ACTIVATED

Converter = Callable[[nn.Module], nn.Module]

_registered: dict[type[nn.Module] | str, Converter] = {}


def register_converter(layer: type[nn.Module] | str, convert: Converter) -> None:
    """Say what a normalization layer means, so that `find`, `adopt`, `swap` and `fold` know it.

    Args:
        layer: Its class, or the class's full name, `"package.module.Class"`, which need not be importable. Subclasses
            are other layers: they may compute something else.
        convert: From a layer of that class to a new one of normwise's with the same declaration, and with parameters
            and buffers of the same names, which are moved over to it. A layer with others is left. What the old layer
            does after its normalization the new one does in a subclass of one of normwise's.

    Raises:
        TypeError: `convert` cannot be called.

    >>> class Logged(nn.BatchNorm1d):
    ...     def forward(self, input):
    ...         self.seen = input.shape
    ...         return super().forward(input)
    >>> def convert(old):
    ...     return nw.BatchNorm(old.num_features, old.eps, old.momentum)
    >>> nw.register_converter(Logged, convert)
    >>> nw.adopt(nn.Sequential(Logged(4)))
    Record('adopt', 1 changed, 0 left)
    """
    if not callable(convert):
        raise TypeError(f"convert is a function from a layer to one of normwise's, not {convert!r}")
    _registered[layer] = convert


def convert(layer: nn.Module) -> nn.Module | None:
    """A layer of normwise's with the same declaration and without values; None: nothing says what this one means.

    A layer that is normwise's already is its own conversion.
    """
    if _registered_for(layer) is not None:
        return _by_registered(layer)
    if isinstance(layer, Norm):
        return layer if _adds_nothing(type(layer)) else None
    known = _torchs(type(layer))
    return _by_name(layer) if known is None else TORCH[known](layer)


def looks_like_one(layer: nn.Module) -> bool:
    """Whether a layer is, or by its class or name seems to be, a normalization."""
    if _registered_for(layer) is not None or isinstance(layer, (_NormBase, *TORCH, Norm)) or _row(layer) is not None:
        return True
    kind = type(layer)
    if "norm" not in getattr(layer, "original_name", kind.__name__).lower() or kind.__module__.startswith(
        "torch.nn.utils.parametriz"
    ):
        return False
    return set(dict(layer.named_children())) <= {"parametrizations"} and not isinstance(layer, _MIXES)


_MIXES = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.RNNBase)  # layers that are normed, not norms


def obstacle(layer: nn.Module) -> str | None:
    """Why the layer cannot be converted, whatever its class; None: nothing stands in the way."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is scripted"
    if any(is_lazy(tensor) for tensor in (*layer.parameters(), *layer.buffers())):
        return "its sizes are not known yet: run a batch through the model first"
    if hasattr(layer, "parametrizations"):
        return "its parameters are parametrized: torch.nn.utils.parametrize.remove_parametrizations first"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the layer itself, and may do more"
    if isinstance(layer, nn.SyncBatchNorm):
        return "its statistics are those of several processes"
    if type(layer).__module__.startswith(("torch.ao.", "torch.nn.intrinsic", "torch.nn.quantized")):
        return "it is quantized"
    return None


def unknown(layer: nn.Module) -> str:
    """What to say of a layer that has no conversion."""
    kind = type(layer).__name__
    if isinstance(layer, (_NormBase, *TORCH, Norm)):
        return f"{kind} is a subclass that may do more; say what it means with nw.register_converter"
    return f"nothing is known of {kind}; say what it means with nw.register_converter"


def is_registered(layer: nn.Module) -> bool:
    """Whether a user has said what the layer means."""
    return _registered_for(layer) is not None


def _by_registered(layer: nn.Module) -> nn.Module:
    """What a user's converter makes of a layer.

    Raises:
        SurgeryError: it fails, or makes no new module.
    """
    name = f"the converter of {type(layer).__name__}"
    try:
        converted = cast("Converter", _registered_for(layer))(layer)
    except Exception as error:
        raise SurgeryError(f"{name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(converted, nn.Module) or converted is layer:
        raise SurgeryError(
            f"{name} gave {'the layer itself' if converted is layer else repr(converted)}, not a new one"
        )
    return converted


def mismatch(old: nn.Module, new: nn.Module) -> str | None:
    """Why the tensors and parts of a layer cannot be moved over to another; None: they can."""
    keys, new_keys = set(old.state_dict(keep_vars=True)), set(new.state_dict(keep_vars=True))
    if keys != new_keys:
        return f"its state has the keys {', '.join(sorted(keys))}, and here it would have {', '.join(sorted(new_keys))}"
    held = [name for slots in (old._modules, old._buffers) for name, value in slots.items() if value is not None]
    more = [name for name in held if name not in (*new._modules, *new._buffers)]
    if more:
        return f"it holds more than a normalization does: {', '.join(more)}"
    for name, parameter in new._parameters.items():
        given = old._parameters.get(name)
        if parameter is not None and given is not None and parameter.shape != given.shape:
            return f"its {name} has shape {tuple(given.shape)}, where its settings say {tuple(parameter.shape)}"
    return None


def adds_behaviour(layer: nn.Module) -> bool:
    """Whether a layer is of a class that may do more than what its declaration says."""
    return not _adds_nothing(type(layer))


def _registered_for(layer: nn.Module) -> Converter | None:
    return _registered.get(type(layer)) or _registered.get(_full_name(type(layer)))


def _full_name(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# ------------------------------------------------------------------------------------------------------------ torch's


def _batch(layer: Any, make: type[BatchNorm] = BatchNorm) -> Norm:
    return make(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, device="meta")


def _instance(layer: Any) -> Norm:
    rates = layer.num_features, layer.eps, layer.momentum
    return InstanceNorm(*rates, layer.affine, layer.track_running_stats, device="meta")


def _group(layer: Any, make: type[GroupNorm] = GroupNorm) -> Norm:
    return make(layer.num_groups, layer.num_channels, layer.eps, layer.affine, device="meta")


def _layer(layer: Any, make: type[LayerNorm] = LayerNorm) -> Norm:
    return make(layer.normalized_shape, layer.eps, layer.weight is not None, layer.bias is not None, device="meta")


def _layer_2d(layer: Any, make: type[LayerNorm2d] = LayerNorm2d) -> Norm:
    return make(_width(layer), layer.eps, layer.weight is not None, layer.bias is not None, device="meta")


def _rms(layer: Any, make: type[RMSNorm] = RMSNorm) -> Norm:
    return make(_shape(layer), _eps(layer), layer.weight is not None, device="meta")


def _rms_2d(layer: Any, make: type[RMSNorm2d] = RMSNorm2d) -> Norm:
    return make(_width(layer), _eps(layer), layer.weight is not None, device="meta")


TORCH: dict[type[nn.Module], Callable[[Any], Norm]] = {
    nn.BatchNorm1d: _batch,
    nn.BatchNorm2d: _batch,
    nn.BatchNorm3d: _batch,
    nn.InstanceNorm1d: _instance,
    nn.InstanceNorm2d: _instance,
    nn.InstanceNorm3d: _instance,
    nn.GroupNorm: _group,
    nn.LayerNorm: _layer,
    nn.RMSNorm: _rms,
}
_HARMLESS = {"__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__parameters__", "__constants__"}
_HARMLESS |= {"extra_repr", "__repr__", "reset_parameters", "__firstlineno__", "__static_attributes__"}


def _torchs(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of torch's that a class is, or adds nothing to."""
    own = [base for base in kind.__mro__ if not base.__module__.startswith("torch.nn.") and base is not object]
    if any(not vars(base).keys() <= _HARMLESS for base in own):
        return None
    return next((base for base in kind.__mro__ if base in TORCH), None)


def _adds_nothing(kind: type[nn.Module]) -> bool:
    """Whether a class is one of normwise's, or a subclass that changes no behaviour."""
    others = [b for b in kind.__mro__ if not b.__module__.startswith(("normwise.", "torch.nn.")) and b is not object]
    return all(vars(base).keys() <= _HARMLESS for base in others)


# ---------------------------------------------------------------- timm's, Hugging Face's and torchvision's, by name


def _row(layer: nn.Module) -> Row | None:
    """The row of the table for a class name of one of the known libraries."""
    library = type(layer).__module__.partition(".")[0]
    if library not in ("timm", "transformers", "diffusers", "torchvision"):
        return None
    return next((row for row in _NAMES if re.fullmatch(row[0], type(layer).__name__)), None)


def _by_name(layer: nn.Module) -> nn.Module | None:
    row = _row(layer)
    if row is None or "forward" in layer.__dict__ or not _takes_one_input(layer):
        return None
    _, convert, plain = row
    children = dict(layer.named_children())
    if children and (set(children) != {"drop", "act"} or plain not in ACTIVATED):
        return None
    try:
        converted = convert(layer, ACTIVATED[plain]) if children else convert(layer)
    except (AttributeError, TypeError, NormwiseError):  # another class of that name
        return None
    for name, child in children.items():
        converted.add_module(name, child)
    return converted


def _takes_one_input(layer: nn.Module) -> bool:
    """Whether the layer is called with nothing but its input; a gate or a condition would be lost."""
    return len(inspect.signature(layer.forward).parameters) == 1


def _width(layer: Any) -> int:
    (width,) = _shape(layer)
    return width


def _shape(layer: Any) -> tuple[int, ...]:
    for name in ("normalized_shape", "dim"):
        if hasattr(layer, name):
            return tuple(getattr(layer, name))
    return tuple(cast("nn.Parameter", layer.weight).shape)


def _eps(layer: Any) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if hasattr(layer, name):
            return cast("float | None", getattr(layer, name))
    raise AttributeError("no eps")


def _either_layer(layer: Any) -> Norm:
    """Hugging Face's LayerNorm with a `data_format`."""
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return _layer_2d(layer) if first else _layer(layer)


def _either_rms(layer: Any) -> Norm:
    """An RMSNorm whose gain is the weight, or one plus the weight."""
    if getattr(layer, "bias", None) is not None:
        raise AttributeError("a bias")
    if layer.weight is None or not _is_offset(layer):
        return _rms(layer)
    return Norm("... [d]", RMS(_eps(layer)), OffsetScale("d"), d=_width(layer), device="meta")


@torch.no_grad()
def _is_offset(layer: Any) -> bool:
    """Whether the gain is 1 + weight: what becomes of an input of ones tells it from the weight."""
    weight = layer.weight
    if weight.is_meta:
        raise AttributeError("no values to tell it from")
    gain = layer.forward(torch.ones_like(weight)[None])[0]
    return bool((gain - weight).abs().mean() > (gain - weight - 1).abs().mean())


def _frozen_batch(layer: Any) -> Norm:
    eps, width = getattr(layer, "eps", 1e-5), layer.running_mean.shape[0]
    return Norm("[n] c [...]", Standardize(eps), Affine("c"), Frozen("c"), c=width, device="meta")


Row = tuple[str, Callable[..., Norm], type[Norm]]  # a class name, its converter, and what that makes of a plain layer

_NAMES: list[Row] = [
    (r"BatchNormAct2d", _batch, BatchNorm),
    (r"\w*FrozenBatchNorm2d", _frozen_batch, Norm),
    (r"GroupNorm1?(Act)?", _group, GroupNorm),
    (r"LayerNorm(Act|Exp)?2d(Fp32)?", _layer_2d, LayerNorm2d),
    (r"LayerNorm(Act)?(Fp32)?|FP32LayerNorm", _layer, LayerNorm),
    (r"RmsNorm(Act)?2d(Fp32)?", _rms_2d, RMSNorm2d),
    (r"RmsNorm(Act)?(Fp32)?", _rms, RMSNorm),
    (r"T5LayerNorm|\w*RMSNorm", _either_rms, RMSNorm),
    (r"\w+LayerNorm", _either_layer, LayerNorm),
]


# ------------------------------------------------------------------------------------------------------ back to torch

BY_RANK: dict[type[nn.Module], dict[int, Callable[..., nn.Module]]] = {
    BatchNorm: {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d},
    InstanceNorm: {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d},
}


def to_torch(layer: Norm, rank: int | None) -> nn.Module | None:
    """torch's layer with the same declaration and without values; None: there is none, or the rank is not known."""
    if layer.spec.activation is not None or layer.spec.gate is not None:
        return None
    like: Any = layer
    options: dict[str, Any] = {"device": "meta"}
    if type(layer) in BY_RANK:
        origin = layer.__dict__.get("adopted_from")
        make = origin if origin in BY_RANK[type(layer)].values() else BY_RANK[type(layer)].get(rank or 0)
        if make is None:
            return None
        rates = like.num_features, like.eps, like.momentum
        return cast("nn.Module", make(*rates, like.affine, like.track_running_stats, **options))
    if type(layer) is GroupNorm:
        return nn.GroupNorm(like.num_groups, like.num_channels, like.eps, like.affine, **options)
    if type(layer) is LayerNorm:
        has_weight, has_bias = layer.weight is not None, layer.bias is not None
        return nn.LayerNorm(like.normalized_shape, like.eps, has_weight, has_bias, **options)
    if type(layer) is RMSNorm:
        return nn.RMSNorm(like.normalized_shape, like.eps, layer.weight is not None, **options)
    return None
