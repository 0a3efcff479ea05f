"""What stands in the place of a normalization that is exchanged, and what it takes over from it."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normwise.errors import PatternError, ShapeError, SurgeryError
from normwise.norm import Norm
from normwise.places import all_modules
from normwise.pointwise import FUNCTIONS, Activation
from normwise.recoveries import OffsetScale
from normwise.spec import NormSpec
from normwise.surgery.activated import Activated
from normwise.surgery.exchange import Decision, Site, home_of, inherit
from normwise.surgery.flow import HOOKS
from normwise.surgery.kinds import Kind, kind_of

Make = Callable[[Any, Kind], nn.Module]  # from an old layer and its kind to the new one


class Successors:
    """Decides what becomes of each layer, and knows afterwards what was lost."""

    def __init__(
        self, model: nn.Module, chosen: list[tuple[Site, Kind]], make: Make, *, keeps_values: bool = True
    ) -> None:
        self._model, self._make, self._keeps_values = model, make, keeps_values
        self._kinds = {site.module: kind for site, kind in chosen}
        self._held = all_modules(model)  # and what was made for it
        self._in_steps = _norms_of_recurrent_nets(self._held)
        self._anew: list[tuple[nn.Module, nn.Module]] = []  # old and new, where the new one knows no batch of the old

    def decide(self, site: Site) -> Decision | None:
        """As `exchange` asks for it.

        Raises:
            SurgeryError: the layer cannot become another.
        """
        kind = self._kinds.get(site.module)
        if kind is None:
            return None
        try:
            return self._decided(site, kind)
        except (PatternError, ShapeError, SurgeryError) as error:
            raise SurgeryError(f"{site.path}: {error}") from error

    def _decided(self, site: Site, kind: Kind) -> Decision:
        old = site.module
        new = self._make(old, kind)
        if not isinstance(new, nn.Module):
            raise SurgeryError(f"the function gave {new!r}, which is no module")
        if new is old:
            return Decision(None, "it stays what it is")
        self._check_exchangeable(old)
        self._check_fresh(site, new)
        home = home_of(old, self._model)
        new = new if home is None else new.to(*home)
        if old in set(new.modules()):
            _set_mode(old, new)
            return Decision(new, "the layer itself is kept within")
        memory = self._keeps_values and _keep_memory(old, new, kind)
        if not memory:
            self._anew.append((old, new))
        kept = _keep(old, new, kind, memory=memory) if self._keeps_values else "it starts anew"
        new = _with_activation(_with_gate(new, kind), old, kind)
        _inherit(old, new)
        return Decision(new, kept)

    def _check_exchangeable(self, layer: nn.Module) -> None:
        if isinstance(layer, Norm) and layer.frozen:
            raise SurgeryError("it is frozen: nw.unfreeze first")
        if layer in self._in_steps:
            raise SurgeryError(
                "the recurrent net around it computes with it step by step: make a net with another norm="
            )

    def _check_fresh(self, site: Site, new: nn.Module) -> None:
        """Refuse what stands in the model already, whose values and hooks would be overwritten."""
        own = set(site.module.modules())
        added = [module for module in new.modules() if module not in own]
        where = next((self._held[module] or "the top" for module in added if module in self._held), None)
        if where is not None:
            raise SurgeryError(f"the function gave a layer that stands at {where} already, not a new one")
        self._held.update(dict.fromkeys(added, site.path))

    def lost_training(self) -> bool:
        """Whether a layer that was trained is gone."""
        return any(_is_trained(old) for old, _ in self._anew)

    def advice(self) -> str:
        """What the model needs now."""
        remembers = any(m._buffers.get("running_mean") is not None for _, new in self._anew for m in new.modules())
        hint = ", and nw.recalibrate(model, batches) before it is evaluated sooner" if remembers else ""
        return f"swap: the weights were trained with other normalizations: train the model before you use it{hint}"


def _norms_of_recurrent_nets(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """The norms that a recurrent net of ours holds and computes with itself."""
    held = [getattr(module, "norms", None) for module in modules if isinstance(module, nn.RNNBase)]
    return {norm for norms in held if isinstance(norms, nn.ModuleDict) for norm in norms.values()}


def _with_activation(new: nn.Module, old: Any, kind: Kind) -> nn.Module:
    """A layer without parts of its own, followed by what the old one did after it normalized.

    Raises:
        SurgeryError: one with parts, of which none applies the old one's activation.
    """
    if kind.spec is not None and kind.spec.activation is not None:
        new = _applying(kind.spec.activation, new)
    if isinstance(kind.converted, Activated) and not any(new.children()):
        return nn.Sequential(OrderedDict(norm=new, drop=old.drop, act=old.act))
    return new


def _with_gate(new: nn.Module, kind: Kind) -> nn.Module:
    """A layer that takes the gate which the calls of the old one bring, if they bring one.

    Raises:
        SurgeryError: it is none of ours, and so takes no gate.
    """
    gate = None if kind.spec is None else kind.spec.gate
    if gate is None:
        return new
    if not isinstance(new, Norm):
        raise SurgeryError(f"the calls of the layer bring a gate, and {type(new).__name__} is no layer of normwise's")
    new.spec = replace(new.spec, gate=new.spec.gate or gate)
    return new


def _applying(activation: Activation, new: nn.Module) -> nn.Module:
    """A layer with the activation in it or after it; one of ours that has an activation keeps its own."""
    if isinstance(new, Norm):
        new.spec = replace(new.spec, activation=new.spec.activation or activation)
        return new
    layer = FUNCTIONS[activation].layer
    if not any(new.children()):
        return nn.Sequential(OrderedDict(norm=new, act=layer()))
    parts = list(new.modules())
    if not any(isinstance(m, layer) or (isinstance(m, Norm) and m.spec.activation == activation) for m in parts):
        raise SurgeryError(
            f"the function gave a {type(new).__name__} without '{activation}', which the layer applies: put it in"
        )
    return new


def _set_mode(old: nn.Module, new: nn.Module) -> None:
    own = set(old.modules())
    for module in new.modules():
        if module not in own:
            module.training = old.training


def _inherit(old: nn.Module, new: nn.Module) -> None:
    """Mode, hooks and what somebody put on the old layer; not its settings, which say what that computed.

    Raises:
        SurgeryError: both have hooks of one sort; in one table the handles of one of them would not find theirs.
    """
    own, brought = set(new.__dict__), {name: new.__dict__[name] for name in HOOKS if new.__dict__[name]}
    for name in brought:
        if old.__dict__[name]:
            raise SurgeryError(f"the layer that is there and the function's both have {name.strip('_')}: keep one's")
    inherit(old, new)
    new.__dict__.update(brought)
    for base in type(old).__mro__:
        for setting in inspect.signature(base.__init__).parameters:  # type: ignore[misc]  # of an instance's class
            for name in {setting, f"_{setting}"} - own:
                new.__dict__.pop(name, None)


def _keep(old: nn.Module, new: nn.Module, kind: Kind, *, memory: bool) -> str:
    """Give the new layer the old one's gain and bias where it has them; in words, with the memory."""
    kept, lost = [], []
    shift = _gain_offset(kind.spec) - _gain_offset(new.spec if isinstance(new, Norm) else None)
    for name, word, added in (("weight", "gain", shift), ("bias", "bias", 0)):
        given = getattr(old, name, None)
        if not isinstance(given, Tensor):
            continue
        place = new._parameters.get(name)
        if place is None or place.shape != given.shape:
            lost.append(word)
            continue
        same = isinstance(given, nn.Parameter) and not added
        if not same:
            given = nn.Parameter(given.detach() + added, given.requires_grad)
        new._parameters[name] = cast("nn.Parameter", given)
        kept.append(word)
    own = [parameter for parameter in old._parameters.values() if parameter is not None]
    if own and not any(parameter.requires_grad for parameter in own):
        new.requires_grad_(False)
    kept += ["memory"] if memory else []
    return "; ".join(filter(None, (_listed("keeps", kept), _listed("without", lost)))) or "it had no gain and no bias"


def _gain_offset(spec: NormSpec | None) -> int:
    """What is added to the weight to make the gain."""
    return int(spec is not None and isinstance(spec.recovery, OffsetScale))


def _keep_memory(old: nn.Module, new: nn.Module, kind: Kind) -> bool:
    """Give the new layer the old one's memory where both remember the same statistics of batches."""
    known = kind_of(new)
    kinds = (kind.name, None if known is None else known.name)
    if kinds != ("batch", "batch") or not all(isinstance(layer, (Norm, _BatchNorm)) for layer in (old, new)):
        return False
    buffers = {name: buffer for name, buffer in old._buffers.items() if buffer is not None}
    places = {name: new._buffers.get(name) for name in buffers}
    if not buffers or any(place is None or place.shape != buffers[name].shape for name, place in places.items()):
        return False
    new._buffers.update(buffers)
    if isinstance(new, Norm):
        new._widen()
    return True


def _listed(how: str, words: list[str]) -> str:
    return f"{how} {', '.join(words)}" if words else ""


def _is_trained(layer: nn.Module) -> bool:
    """Whether a batch has entered its memory, or its values have moved from where they start, where all are equal."""
    batches = layer._buffers.get("num_batches_tracked")
    if batches is not None and not batches.is_meta and bool((batches > 0).any()):
        return True
    held = (tensor for slots in (layer._parameters, layer._buffers) for tensor in slots.values() if tensor is not None)
    there = (tensor for tensor in held if not tensor.is_meta and tensor.numel() > 0)
    return any(bool((tensor != tensor.flatten()[0]).any()) for tensor in there)
