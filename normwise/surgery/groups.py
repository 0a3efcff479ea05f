"""Which parameters of a model take weight decay, and which do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from normwise.errors import SurgeryError
from normwise.norm import Norm
from normwise.record import table
from normwise.surgery.exchange import check_readable
from normwise.surgery.kinds import Kind, kind_of

# What a parameter is. Of several answers, for a parameter that is shared, the first one holds.
_ROLES = ("normalization", "declared by the model", "bias", "unknown", "weight")
_DECAYS = "weight"
_SHOWN = 6  # names in an error


@dataclass(frozen=True)
class Grouped:
    """One parameter.

    Attributes:
        name: Its first name.
        shape: Its shape.
        group: "decay" or "no_decay".
        role: Why: "normalization", "declared by the model", "bias", "unknown", "weight".
        also: Its other names.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    role: str
    also: tuple[str, ...]


class ParameterGroups(list[dict[str, Any]]):
    """Parameter groups for any of torch's optimizers: dictionaries with `params`, `weight_decay` and `name`.

    `print` shows a table, `to_dict` gives plain data.

    Attributes:
        parameters: Every parameter, in the model's order.
    """

    def __init__(self, groups: list[dict[str, Any]], parameters: tuple[Grouped, ...]) -> None:
        super().__init__(groups)
        self.parameters = parameters

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """The parameters' names by group, in the order of the group's `params`."""
        return {group: tuple(p.name for p in self.parameters if p.group == group) for group in ("decay", "no_decay")}

    @property
    def unknown(self) -> tuple[str, ...]:
        """The names of the parameters without decay of which nothing says for sure what they are."""
        return tuple(p.name for p in self.parameters if p.role == "unknown")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, as plain data."""
        weight_decay = {group["name"]: group["weight_decay"] for group in self}
        return {"weight_decay": weight_decay, "parameters": [asdict(p) for p in self.parameters]}

    def __str__(self) -> str:
        weight_decay = {group["name"]: group["weight_decay"] for group in self}
        found = [(role, [p for p in self.parameters if p.role == role]) for role in reversed(_ROLES)]
        rows = [
            (like[0].group, weight_decay[like[0].group], role, len(like), like[0].name) for role, like in found if like
        ]
        parts = [table(("group", "weight decay", "what", "parameters", "the first"), rows)]
        if self.unknown:
            parts.append(f"nothing says what these are, and they get no decay: {', '.join(self.unknown)}")
        return "\n\n".join(parts)


def param_groups(model: nn.Module, weight_decay: float) -> ParameterGroups:
    """Groups for an optimizer that let the weights of a model decay, and not its normalizations and biases.

    Every parameter of `model.parameters()` is in exactly one group, once, whether it takes a gradient or not. No decay
    have

    - the parameters of every normalization that `find` finds, of any library and shape; but not those of layers within
      it, as of an activation;
    - what the model declares: parameters with a true attribute `_no_weight_decay` or `no_weight_decay` (Mamba), and
      what the methods `no_weight_decay()` and `no_weight_decay_keywords()` of it or a part of it return (timm, Swin);
    - biases: parameters called `bias`, `bias_...` or `..._bias`, of any shape (experts have a row each);
    - all others of at most one dimension: scales of layers, temperatures, class vectors. They are in `unknown`, as are
      matrices of a layer that nothing but its name makes a normalization.

    A parameter that is shared has no decay if one of its uses has none. Everything else decays, embeddings included
    (list them in `no_weight_decay()` if they should not), and so do both factors of a weight under weight
    normalization: its magnitude is the norm of the weight, which decay is meant for. A parametrized tensor is what the
    tensor was before.

    Args:
        model: A model. Ask again after an operation that exchanges parameters, and for every optimizer, because torch
            writes an optimizer's options into the groups.
        weight_decay: Of the group "decay"; the group "no_decay" has 0. An empty group is left out.

    Raises:
        ValueError: `weight_decay` is not a number from 0 on.
        SurgeryError: the model has no parameters, or some without sizes; it is scripted, or sharded into flat
            parameters.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    >>> groups = param_groups(model, weight_decay=0.05)
    >>> print(groups)
    group     weight decay  what           parameters  the first
    decay     0.05          weight         2           0.weight
    no_decay  0.0           bias           2           0.bias
    no_decay  0.0           normalization  2           1.weight
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    _check(model, weight_decay)
    roles = _roles(model)
    groups: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "weight_decay": float(weight_decay), "name": "decay"},
        "no_decay": {"params": [], "weight_decay": 0.0, "name": "no_decay"},
    }
    parameters = []
    for parameter, names in _names(model).items():
        role = roles[parameter]
        group = "decay" if role == _DECAYS else "no_decay"
        groups[group]["params"].append(parameter)
        parameters.append(Grouped(names[0], tuple(parameter.shape), group, role, tuple(names[1:])))
    return ParameterGroups([group for group in groups.values() if group["params"]], tuple(parameters))


def _check(model: nn.Module, weight_decay: float) -> None:
    check_readable(model)
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, Real) or not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay is a number from 0 on, not {weight_decay!r}")
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise SurgeryError(
                f"{path or 'the model'} is a FullyShardedDataParallel, whose flat parameters no longer tell weights "
                "from biases: shard with torch.distributed.fsdp.fully_shard, which keeps their shapes"
            )
    names = _names(model)
    if not names:
        raise SurgeryError(f"{type(model).__name__} has no parameters")
    unsized = [held[0] for parameter, held in names.items() if is_lazy(parameter)]
    if unsized:
        listed = ", ".join(unsized[:_SHOWN]) + (", ..." if len(unsized) > _SHOWN else "")
        raise SurgeryError(f"parameters have no sizes yet: {listed}; run a batch through the model first")


def _names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """The parameters in the model's order, each with all of its names."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _roles(model: nn.Module) -> dict[nn.Parameter, str]:
    """What every parameter is; where it has several uses, the role that comes first."""
    roles: dict[nn.Parameter, str] = {}
    for parameter, role in _uses(model):
        roles[parameter] = min(roles.get(parameter, role), role, key=_ROLES.index)
    return roles


def _uses(model: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    """Every use of every parameter, and what it is there."""
    for module in model.modules():
        held = [] if isinstance(module, ParametrizationList) else list(_held(module))  # its owner holds its parameters
        kind = kind_of(module) if held else None
        for parameter, name, dims in held:
            if kind is None:
                yield parameter, _role(parameter, name, dims)
            else:
                yield parameter, "unknown" if dims > 1 and _is_guess(module, kind) else "normalization"
        for parameter in _spared(module):
            yield parameter, "declared by the model"


def _is_guess(module: nn.Module, kind: Kind) -> bool:
    """Whether nothing but its name says that a layer is a normalization: `NormedLinear` is none."""
    known = (Norm, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return kind.name == "unknown" and not isinstance(module, known)


def _held(module: nn.Module) -> Iterator[tuple[nn.Parameter, str, int]]:
    """A module's own parameters, what each is called there, and how many dimensions what it is a part of has.

    Those of a parametrized tensor stand for that tensor: for a weight under weight normalization, a magnitude and a
    direction.
    """
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield parameter, name, parameter.dim()
    if is_parametrized(module):
        for name, parts in module.parametrizations.items():  # type: ignore[union-attr, operator]  # a ModuleDict
            own = list(parts.parameters(recurse=False))
            for parameter in own:
                yield parameter, name, max(part.dim() for part in own)


def _role(parameter: nn.Parameter, name: str, dims: int) -> str:
    """What a parameter is that belongs to no normalization."""
    if getattr(parameter, "_no_weight_decay", False) or getattr(parameter, "no_weight_decay", False):
        return "declared by the model"
    if name == "bias" or name.startswith("bias_") or name.endswith("_bias"):
        return "bias"
    return "weight" if dims > 1 else "unknown"


def _spared(module: nn.Module) -> Iterator[nn.Parameter]:
    """What a module itself declares to have no decay, by names or parts of names."""
    names, keywords = _returned(module, "no_weight_decay"), _returned(module, "no_weight_decay_keywords")
    if names or keywords:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if name in names or any(keyword in name for keyword in keywords):
                yield parameter


def _returned(module: nn.Module, method: str) -> set[str]:
    declared = getattr(module, method, None)
    return set(declared()) if callable(declared) else set()
