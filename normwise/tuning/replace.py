"""Exchange the torch normalization layers of a finished model, where its factory takes no `norm`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normwise.errors import StudyError
from normwise.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, LayerNorm2d, RMSNorm, RMSNorm2d
from normwise.norm import Norm
from normwise.tuning.norms import Axis, NormFactory

_FEATURES = "num_features"
_SHAPE = "normalized_shape"
_KNOWN: dict[type[nn.Module], tuple[str, Axis]] = {  # the attribute that holds the channels, and their axis
    nn.BatchNorm1d: (_FEATURES, 1),
    nn.BatchNorm2d: (_FEATURES, 1),
    nn.BatchNorm3d: (_FEATURES, 1),
    nn.SyncBatchNorm: (_FEATURES, 1),
    nn.InstanceNorm1d: (_FEATURES, 1),
    nn.InstanceNorm2d: (_FEATURES, 1),
    nn.InstanceNorm3d: (_FEATURES, 1),
    nn.GroupNorm: ("num_channels", 1),
    nn.LayerNorm: (_SHAPE, -1),
    nn.RMSNorm: (_SHAPE, -1),
    BatchNorm: (_FEATURES, 1),
    InstanceNorm: (_FEATURES, 1),
    GroupNorm: ("num_channels", 1),
    LayerNorm: (_SHAPE, -1),
    RMSNorm: (_SHAPE, -1),
    LayerNorm2d: (_SHAPE, 1),
    RMSNorm2d: (_SHAPE, 1),
}
_NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, Norm)
_WAY_OUT = "give the factory a `norm` argument and let it make its layers as norm(features)"


def replace_norms(model: nn.Module, norm: NormFactory, name: str = "given") -> nn.Module:
    """The model with each normalization layer exchanged for `norm(channels, axis)`, in place.

    Device, dtype and mode are kept, and a layer that is used in two places stays one layer. `name` is the model's, for
    the error text.

    Raises StudyError for a model without normalization, or with one that cannot be exchanged faithfully.

    >>> replace_norms(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), lambda features, axis: nn.Identity())
    Sequential(
      (0): Linear(in_features=2, out_features=4, bias=True)
      (1): Identity()
    )
    """
    places = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if _is_norm(module)]
    if not places:
        raise StudyError(f"model {name!r} has no normalization layer to exchange: {_WAY_OUT}, or use torch.nn's")
    exchanged: dict[nn.Module, nn.Module] = {}
    for path, module in places:
        if module not in exchanged:
            channels, axis = _channels(path, module)
            exchanged[module] = _like(module, model, norm(channels, axis))
    if model in exchanged:
        return exchanged[model]
    for path, module in places:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, exchanged[module])
    return model


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMALIZATIONS)


def _channels(path: str, module: nn.Module) -> tuple[int, Axis]:
    if type(module) not in _KNOWN:
        raise StudyError(f"layer {path!r} is a {type(module).__name__}, whose meaning is not known here: {_WAY_OUT}")
    attribute, axis = _KNOWN[type(module)]
    size = getattr(module, attribute)
    if isinstance(size, int):
        return size, axis
    if len(size) != 1:
        raise StudyError(f"layer {path!r} normalizes over the dimensions {tuple(size)}, not over channels: {_WAY_OUT}")
    return int(size[0]), axis


def _like(old: nn.Module, model: nn.Module, new: nn.Module) -> nn.Module:
    """The new layer with the device, floating-point dtype and mode of the old; of the model if that has no tensors."""
    for module in (old, model):
        for tensor in (*module.parameters(), *module.buffers()):
            if _is_float(tensor):
                return new.to(tensor.device, tensor.dtype).train(old.training)
    return new.train(old.training)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()
