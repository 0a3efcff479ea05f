"""Exchange layers of a model for others, wherever they are held, with everything that hangs on them."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from normwise.errors import SurgeryError
from normwise.norm import Norm
from normwise.places import OWN_ATTRIBUTES, Place, all_modules, places
from normwise.record import Line, Record, shown
from normwise.surgery.converters import mismatch
from normwise.surgery.edits import Edits
from normwise.surgery.flow import HOOKS


@dataclass(frozen=True)
class Site:
    """A module and every place that holds it."""

    module: nn.Module
    places: tuple[Place, ...]

    @property
    def path(self) -> str:
        """Its first path; the class of a root."""
        return self.places[0].path or type(self.module).__name__


@dataclass(frozen=True)
class Decision:
    """What becomes of a layer: `new` stands in its place, or it is left because of `why`."""

    new: nn.Module | None
    why: str


Decide = Callable[[Site], Decision | None]


def sites(model: nn.Module) -> list[Site]:
    """Every module of a model, each once, with the places that hold it."""
    held: dict[nn.Module, list[Place]] = {}
    for place in places(model):
        held.setdefault(place.module, []).append(place)
    return [Site(module, tuple(where)) for module, where in held.items()]


def opened(model: nn.Module, *, copy: bool) -> nn.Module:
    """The model to operate on: itself, or a copy.

    Raises:
        SurgeryError: it is no module, or one that cannot be operated on: scripted, compiled, or wrapped for several
            processes.
    """
    check_readable(model)
    for path, module in model.named_modules():
        for base in type(module).__mro__:
            for home, way_out in _WRAPPERS.items():
                if base.__module__.startswith(home):
                    raise SurgeryError(f"{path or 'the model'} is a {type(module).__name__}: {way_out}")
    return copying.deepcopy(model) if copy else model


def check_readable(model: nn.Module) -> None:
    """Refuse what is no module, or a scripted one.

    Raises:
        SurgeryError: as it says.
    """
    if not isinstance(model, nn.Module):
        raise SurgeryError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise SurgeryError("a scripted model cannot be looked into: operate on the module it was scripted from")


_WRAPPERS = {  # the modules of their classes
    "torch.nn.parallel.distributed": "operate on its .module before it is wrapped; its buckets know the old parameters",
    "torch.nn.parallel.data_parallel": "operate on its .module",
    "torch.distributed.fsdp": "operate on the model before it is sharded",
    "torch.distributed._composable": "operate on the model before it is sharded",
    "torch._dynamo": "operate on its ._orig_mod, and compile that again",
}


def exchange(model: nn.Module, edits: Edits, decide: Decide) -> Record:
    """Put other layers where `decide` says so; the record has no proof yet.

    Args:
        model: The model.
        edits: Takes the changes.
        decide: Asked of every module; None: it is none of the operation's business.
    """
    changed, left, root = [], [], model
    parameters = named_parameters(model)
    for site in sites(model):
        decision = decide(site)
        if decision is None:
            continue
        before, new = shown(site.module), decision.new
        if new is None:
            left.append(Line(site.path, before, None, decision.why))
            continue
        for place in site.places:
            if place.path:
                edits.exchange(place, new)
            else:
                root = new
        changed.append(Line(site.path, before, shown(new), _with_names(decision.why, site)))
    record = Record("", root, tuple(changed), tuple(left), inverse=edits.undo, original=model)
    return with_stale_parameters(record, parameters)


def leave_fast_path(model: nn.Module, edits: Edits) -> None:
    """Let torch's encoder layers call their norms, where these are not torch's LayerNorms any more.

    In evaluation a `TransformerEncoderLayer` computes layer norms itself, of the parameters of whatever stands there.
    That it knows the activation is one of its conditions.
    """
    for layer in all_modules(model):
        if isinstance(layer, nn.TransformerEncoderLayer) and _is_off_fast_path(layer):
            edits.set_attribute(layer, "activation_relu_or_gelu", 0)
        elif isinstance(layer, nn.TransformerEncoder) and any(map(_is_off_fast_path, layer.layers)):
            edits.set_attribute(layer, "use_nested_tensor", False)  # other layers take none


def _is_off_fast_path(layer: nn.Module) -> bool:
    norms = (getattr(layer, "norm1", None), getattr(layer, "norm2", None))
    return not all(type(norm) is nn.LayerNorm for norm in norms)


def _with_names(why: str, site: Site) -> str:
    """Say under which other names the layer stands."""
    others = [place.path for place in site.places[1:]]
    return f"{why}; also at {', '.join(others)}" if others else why


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name, a shared one under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


def with_stale_parameters(record: Record, before: dict[str, nn.Parameter]) -> Record:
    """A note of parameters that an optimizer made before does not have, or has in vain."""
    after = named_parameters(record.model)
    gone = _missing(before, after.values())
    new = _missing(after, before.values())
    notes = []
    if gone:
        notes.append(f"an optimizer that was made before still holds parameters that are gone: {_listed(gone)}")
    if new:
        notes.append(f"an optimizer that was made before lacks new parameters: {_listed(new)}")
    record.notes = (*record.notes, *notes)
    return record


def _missing(names: dict[str, nn.Parameter], there: Iterable[nn.Parameter]) -> list[str]:
    known = {id(parameter) for parameter in there}
    return [name for name, parameter in names.items() if id(parameter) not in known]


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def move_over(old: nn.Module, new: nn.Module) -> str | None:
    """Give a new layer the old one's parameters and buffers, mode, hooks and attributes; why that cannot be, or None.

    Parameters and buffers stay the same objects, so that an optimizer, a tied weight and an undo find them; only
    statistics in half precision are widened.
    """
    reason = mismatch(old, new)
    if reason is not None:
        return reason
    share_tensors(old, new)
    inherit(old, new)
    return None


def share_tensors(old: nn.Module, new: nn.Module) -> None:
    """Give a new layer the old one's parameters and buffers, those that it has a name for."""
    for slots, given in ((new._parameters, old._parameters), (new._buffers, old._buffers)):
        for name in [name for name, declared in slots.items() if declared is not None]:
            slots[name] = given.get(name)  # type: ignore[assignment]  # one loop for both kinds
    if isinstance(new, Norm):
        new._widen()
        home = next(iter((*new.parameters(), *new.buffers())), torch.empty(0)).device
        new._skips = None if new._skips is None else torch.zeros(2, dtype=torch.long, device=home)


def inherit(old: nn.Module, new: nn.Module) -> None:
    """Mode, hooks (handles of theirs stay valid) and attributes that somebody put on the old layer."""
    shared = set(old.modules())
    for module in new.modules():
        if module not in shared:
            module.training = old.training
    new._is_full_backward_hook = old._is_full_backward_hook
    for name in HOOKS:
        new.__dict__[name] = old.__dict__[name]
    for name, value in old.__dict__.items():
        if name not in OWN_ATTRIBUTES and name not in new.__dict__ and not hasattr(type(new), name):
            new.__dict__[name] = value


def home_of(old: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Device and floating-point dtype of a layer, or of the model if the layer has no tensors."""
    for module in (old, model):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return None
