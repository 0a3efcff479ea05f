"""Exchange one normalization for another, with everything that can be kept."""

from __future__ import annotations

import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normwise.batches import Forward
from normwise.errors import NormwiseError, SurgeryError, TooFewSamplesError
from normwise.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, LayerNorm2d, RMSNorm, RMSNorm2d
from normwise.norm import Norm
from normwise.record import Record
from normwise.recoveries import OffsetScale
from normwise.surgery.activated import Activated
from normwise.surgery.edits import Edits
from normwise.surgery.exchange import Decision, Site, exchange, home_of, inherit, leave_fast_path, opened, sites
from normwise.surgery.kinds import Kind, channel_dim, channel_place, kind_of
from normwise.surgery.probes import Probe, found_batch
from normwise.surgery.proof import outputs_of
from normwise.surgery.words import WORDS, Axis, named_layer

What = str | type[nn.Module] | Callable[[nn.Module], bool] | Sequence[str | type[nn.Module]]
To = str | type[nn.Module] | Callable[[Any], nn.Module]
Make = Callable[[Any, Kind], nn.Module]  # from an old layer and its kind to the new one

_WORD_OF: dict[type[nn.Module], str] = {
    BatchNorm: "batch",
    GroupNorm: "group",
    InstanceNorm: "instance",
    LayerNorm: "layer",
    LayerNorm2d: "layer",
    RMSNorm: "rms",
    RMSNorm2d: "rms",
    nn.Identity: "none",
}


def swap(
    model: nn.Module,
    what: What,
    to: To,
    *,
    names: str | Sequence[str] | None = None,
    batch: Any = None,
    forward: Forward | None = None,
    copy: bool = False,
) -> Record:
    """Exchange normalizations of one kind for another.

    Kept are gain and bias (the same parameters, where the new layer has them), device, dtype, mode, `requires_grad`,
    hooks, and that a layer stands in several places. The model computes something else afterwards: a trained one needs
    training, or after a swap to batch normalization at least recalibration; a warning says so.

    Args:
        model: A model, or a single layer, whose replacement is then `record.model`.
        what: Which layers: a kind ("batch", "instance", "group", "layer", "rms", "l2"), which stands for all libraries'
            layers of that kind, as normwise's own classes do; any other class; a function of a layer that says yes or
            no; or several kinds and classes.
        to: What they become: "batch", "instance", "group" (at most 32 groups), "group:8", "layer", "rms", "none"; one
            of normwise's named classes; or a function from the old layer to a new one.
        names: Only layers of these paths: `"layer1.*"`, or several such patterns.
        batch: What the model is run on afterwards, to see that it still runs; without one an input is looked for.
        forward: `forward(model, batch)`, for models that are called otherwise.
        copy: Operate on a copy.

    Raises:
        SurgeryError: nothing fits; a layer's meaning is not known, or it cannot become what is asked; the model does
            not run any more. It is as it was then.

    >>> model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48))
    >>> record = nw.swap(model, "batch", "group")
    >>> model[1]
    GroupNorm(24, 48, eps=1e-05, affine=True)
    >>> _ = record.undo()
    >>> type(model[1]).__name__
    'BatchNorm2d'
    """
    model = opened(model, copy=copy)
    probe = _probe(model, batch, forward)
    chosen = _chosen(model, what, names)
    make, kinds = _maker(to), {id(site.module): kind for site, kind in chosen}
    trained = any(_is_trained(site.module) for site, _ in chosen)
    with Edits() as edits:
        record = exchange(model, edits, lambda site: _swapped(site, kinds.get(id(site.module)), make, model))
        record.operation = "swap"
        leave_fast_path(record.model, edits)
        record.notes += _check_runs(record.model, probe, forward, edits)
    if trained and not all("memory" in line.why for line in record.changed):
        record.notes += (_after_training(record),)
        warnings.warn(record.notes[-1], stacklevel=2)
    return record


# ------------------------------------------------------------------------------------------------------- which layers


def _chosen(model: nn.Module, what: What, names: str | Sequence[str] | None) -> list[tuple[Site, Kind]]:
    """The layers that are meant, all of them known.

    Raises:
        SurgeryError: there are none, or there is one of which nothing is known.
    """
    patterns = None if names is None else [names] if isinstance(names, str) else list(names)
    chosen, others = [], []
    for site in sites(model):
        kind = kind_of(site.module)
        if kind is None:
            continue
        fits = patterns is None or any(fnmatchcase(place.path, p) for place in site.places for p in patterns)
        if not (fits and _is_meant(site.module, kind, what)):
            others.append(f"{site.path} ({kind.name})")
            continue
        if kind.name == "unknown":
            raise SurgeryError(f"{site.path}: {kind.reason}")
        chosen.append((site, kind))
    if not chosen:
        there = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
        raise SurgeryError(f"no normalization is meant by {what!r}{_at(patterns)}; there are: {there or 'none'}")
    return chosen


def _at(patterns: list[str] | None) -> str:
    return "" if patterns is None else f" at {', '.join(patterns)}"


def _is_meant(layer: nn.Module, kind: Kind, what: What) -> bool:
    if isinstance(what, (list, tuple)):
        return any(_is_meant(layer, kind, one) for one in what)
    if isinstance(what, str):
        if what not in _KINDS:
            raise SurgeryError(f"no kind of normalization is called {what!r}; there are {', '.join(_KINDS)}")
        return what == kind.name or (kind.name == "unknown" and isinstance(layer, _TORCHS_OF.get(what, ())))
    if isinstance(what, type):
        word = _WORD_OF.get(what)
        return isinstance(layer, what) if word is None else _is_meant(layer, kind, word)
    return bool(cast("Callable[[nn.Module], bool]", what)(layer))


_KINDS = ("batch", "instance", "group", "layer", "rms", "l2", "other")
_TORCHS_OF: dict[str, tuple[type[nn.Module], ...]] = {  # so that a subclass of unknown meaning is not passed over
    "batch": (_BatchNorm,),
    "instance": (_InstanceNorm,),
    "group": (nn.GroupNorm,),
    "layer": (nn.LayerNorm,),
    "rms": (nn.RMSNorm,),
}


# ------------------------------------------------------------------------------------------------- what they become


def _maker(to: To) -> Make:
    """From an old layer and its kind to the new one, without the old one's values.

    Raises:
        SurgeryError: no layer is called so.
    """
    word = _WORD_OF.get(to) if isinstance(to, type) else to
    if isinstance(word, str):
        if not re.fullmatch(r"group:[1-9]\d*", word) and word not in WORDS:
            raise SurgeryError(f"no layer is called {word!r}; there are {', '.join(WORDS)}, and group:G")
        return lambda layer, kind: _by_word(word, layer, kind)
    if isinstance(to, type) or not callable(to):
        raise SurgeryError(f"{to!r} is no layer to become: give a word, one of normwise's named classes, or a function")
    return lambda layer, kind: to(layer)


def _by_word(word: str, layer: nn.Module, kind: Kind) -> nn.Module:
    features, axis = features_of(kind)
    affine = any(parameter is not None for parameter in layer._parameters.values())
    new = named_layer(word, features, axis, affine=affine)
    if isinstance(kind.converted, Activated):
        after: Any = layer
        return nn.Sequential(OrderedDict(norm=new, drop=after.drop, act=after.act))
    return new


def features_of(kind: Kind) -> tuple[int, Axis]:
    """How many channels a layer normalizes, and on which axis they are: the second, or the last.

    Raises:
        SurgeryError: it is declared over several dimensions, or none that is its channels.
    """
    spec = kind.spec
    if spec is None:
        raise SurgeryError("it has no declaration")
    place = channel_place(spec)
    if place is None or len(spec.parameter_over) > 1:
        raise SurgeryError(f"'{spec.text}' is over several dimensions, not over channels")
    rank = 4 if spec.pattern.open_ended else len(spec.pattern.dims)
    dim, sizes = channel_dim(spec, rank), dict(spec.sizes)
    known = [sizes.get(axis.name, 0) for axis in spec.pattern.dims[place]]
    if dim not in (1, rank - 1) or 0 in known:
        raise SurgeryError(f"'{spec.text}' has no known number of channels on its second or last axis")
    return math.prod(known), 1 if dim == 1 else -1


def _swapped(
    site: Site, kind: Kind | None, make: Callable[[Any, Kind], nn.Module], model: nn.Module
) -> Decision | None:
    if kind is None:
        return None
    try:
        new = make(site.module, kind)
    except NormwiseError as error:
        raise SurgeryError(f"{site.path}: {error}") from error
    if not isinstance(new, nn.Module):
        raise SurgeryError(f"{site.path}: the function gave {new!r}, which is no module")
    if new is site.module:
        return None
    home = home_of(site.module, model)
    inner = new.norm if isinstance(new, nn.Sequential) and hasattr(new, "norm") else new
    if home is not None:
        new = new.to(*home)
    kept = _keep(site.module, cast("nn.Module", inner), kind)
    inherit(site.module, new)
    return Decision(new, kept)


def _keep(old: nn.Module, new: nn.Module, kind: Kind) -> str:
    """Give the new layer the old one's gain, bias and memory where it has them; in words."""
    kept, lost = [], []
    offset = kind.spec is not None and isinstance(kind.spec.recovery, OffsetScale)
    for name, word in (("weight", "gain"), ("bias", "bias")):
        given = getattr(old, name, None)
        if not isinstance(given, Tensor):
            continue
        place = new._parameters.get(name)
        if place is None or place.shape != given.shape:
            lost.append(word)
            continue
        if offset and name == "weight":
            given = nn.Parameter(1 + given.detach(), given.requires_grad)
        new._parameters[name] = given if isinstance(given, nn.Parameter) else nn.Parameter(given.detach().clone())
        kept.append(word)
    return "; ".join(filter(None, (_listed("keeps", [*kept, *_keep_memory(old, new)]), _listed("without", lost))))


def _keep_memory(old: nn.Module, new: nn.Module) -> list[str]:
    """The memory, where both remember the same statistics of batches."""
    known = kind_of(new)
    names = [name for name, buffer in old._buffers.items() if buffer is not None]
    same = known is not None and known.name == "batch" and isinstance(new, (Norm, _BatchNorm))
    if not names or not same or not isinstance(old, (Norm, _BatchNorm)) or kind_of(old).name != "batch":  # type: ignore[union-attr]
        return []
    if any(new._buffers.get(name) is None or new._buffers[name].shape != old._buffers[name].shape for name in names):  # type: ignore[union-attr]
        return []
    for name in names:
        new._buffers[name] = old._buffers[name]
    return ["memory"]


def _listed(how: str, words: list[str]) -> str:
    return f"{how} {', '.join(words)}" if words else ""


# ---------------------------------------------------------------------------------------------------- before and after


def _probe(model: nn.Module, batch: Any, forward: Forward | None) -> Probe | None:
    found = Probe("found", found_batch(model)) if batch is None and forward is None else Probe("given", batch)
    if found.batch is None:
        return None
    outputs_of(model, found, forward)  # what is wrong with it, its own error says
    return found


def _check_runs(model: nn.Module, probe: Probe | None, forward: Forward | None, edits: Edits) -> tuple[str, ...]:
    """Refuse a model that does not run any more; a note where only an input that was found may be too small."""
    if probe is None:
        return ()
    try:
        outputs_of(model, probe, forward)
    except Exception as error:
        if isinstance(error, TooFewSamplesError) and probe.name == "found":
            return (f"an input that was found is too small now: {error}",)
        edits.undo()
        raise SurgeryError(f"swap: the model then fails: {error}; it is as it was") from error
    return ()


def _is_trained(layer: nn.Module) -> bool:
    """Whether a batch has entered its memory, or its parameters have moved from where they start."""
    batches = layer._buffers.get("num_batches_tracked")
    if batches is not None and not batches.is_meta and bool((batches > 0).any()):
        return True
    moved = False
    for parameter in layer._parameters.values():
        if parameter is not None and not parameter.is_meta:
            moved |= not bool((parameter == parameter.flatten()[0]).all())
    return moved


def _after_training(record: Record) -> str:
    """What a trained model needs now."""
    layers = (record.model.get_submodule(path) for path in record.paths if record.model is record.original)
    remembers = any(layer._buffers.get("running_mean") is not None for layer in layers)
    hint = ", and nw.recalibrate(model, batches) before it is evaluated sooner" if remembers else ""
    return f"swap: the weights were trained with other normalizations: train the model before you use it{hint}"
