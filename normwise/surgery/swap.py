"""Exchange one normalization for another, with everything that can be kept."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normwise.batches import Forward
from normwise.errors import SurgeryError, TooFewSamplesError
from normwise.layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, LayerNorm2d, RMSNorm, RMSNorm2d
from normwise.norm import Norm
from normwise.normalizers import RMS, Standardize
from normwise.record import Record
from normwise.spec import NormSpec
from normwise.surgery.edits import Edits
from normwise.surgery.exchange import Site, exchange, leave_fast_path, opened, sites
from normwise.surgery.kinds import Kind, channel_dim, channel_place, kind_of
from normwise.surgery.probes import Probe, found_batch
from normwise.surgery.proof import outputs_of
from normwise.surgery.successors import Make, Successors
from normwise.surgery.words import Axis, check_word, named_layer

What = str | type[nn.Module] | Callable[[nn.Module], bool] | Sequence[str | type[nn.Module]]
To = str | type[nn.Module] | Callable[[Any], nn.Module]

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
    hooks, an activation and a gate within the layer, and that a layer stands in several places; by a word also eps. A
    layer that is what it is to become already stays. The model computes something else afterwards: a trained one needs
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
    make = _maker(to)
    chosen = _chosen(model, what, names)
    probe = _probe(model, batch, forward)
    with Edits() as edits:
        swaps = Successors(model, chosen, make)
        record = exchange(model, edits, swaps.decide)
        record.operation = "swap"
        leave_fast_path(record.model, edits)
        record.notes += _check_runs(record.model, probe, forward)
        if swaps.lost_training():
            record.notes += (swaps.advice(),)
            warnings.warn(record.notes[-1], stacklevel=2)
        return record


def renew(model: nn.Module, make: Callable[[int, Axis], nn.Module]) -> nn.Module:
    """The model with each normalization exchanged, in place, for a new one that starts anew.

    Kept are device, dtype, mode, hooks, an activation and a gate within the layer, and that a layer stands in several
    places. A layer that is only called a normalization, and of which nothing is known, stays.

    Args:
        model: A model, or a single layer.
        make: From a number of channels, and the axis on which they are, to a layer.

    Raises:
        SurgeryError: there is nothing to exchange, or something that cannot be; the model is as it was.

    >>> renew(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), lambda features, axis: nn.Identity())[1]
    Identity()
    """
    chosen = [(site, kind) for site in sites(model) if (kind := _exchangeable(site)) is not None]
    if not chosen:
        raise SurgeryError("there is no normalization to exchange")
    with Edits() as edits:
        swaps = Successors(model, chosen, lambda layer, kind: make(*features_of(kind)), keeps_values=False)
        record = exchange(model, edits, swaps.decide)
        leave_fast_path(record.model, edits)
    return record.model


# ------------------------------------------------------------------------------------------------------- which layers


def _exchangeable(site: Site) -> Kind | None:
    """What a layer is; None for what is not known, and none of torch's or ours.

    Raises:
        SurgeryError: it is one of torch's or ours, but cannot be exchanged faithfully.
    """
    kind = _kind(site.module)
    if kind is None or kind.name != "unknown":
        return kind
    if isinstance(site.module, (*itertools.chain(*_TORCHS_OF.values()), Norm)):
        raise SurgeryError(f"{site.path}: {kind.reason}")
    return None


def _chosen(model: nn.Module, what: What, names: str | Sequence[str] | None) -> list[tuple[Site, Kind]]:
    """The layers that are meant, all of them known.

    Raises:
        SurgeryError: there are none, or there is one of which nothing is known.
    """
    _check_what(what)
    patterns = None if names is None else [names] if isinstance(names, str) else list(names)
    chosen, others = [], []
    for site in sites(model):
        kind = _kind(site.module)
        if kind is None:
            continue
        if not (_is_at(site, patterns) and _is_meant(site.module, kind, what)):
            others.append(f"{site.path} ({kind.name})")
            continue
        if kind.name == "unknown":
            raise SurgeryError(f"{site.path}: {kind.reason}")
        chosen.append((site, kind))
    if not chosen:
        there = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
        raise SurgeryError(f"no normalization is meant by {_said(what)}{_at(patterns)}; there are: {there or 'none'}")
    return chosen


def _kind(layer: nn.Module) -> Kind | None:
    """What a layer is; one that is synchronized has no equal among ours, but can become another."""
    if type(layer) is nn.SyncBatchNorm:
        return Kind("batch", BatchNorm(layer.num_features, layer.eps, affine=layer.affine, device="meta"))
    return kind_of(layer)


def _is_at(site: Site, patterns: list[str] | None) -> bool:
    if patterns is None:
        return True
    return any(place.path == p or fnmatchcase(place.path, p) for place in site.places for p in patterns)


def _said(what: What) -> str:
    """What was asked for, as it was written."""
    if isinstance(what, (list, tuple)):
        return " or ".join(map(_said, what)) or "nothing"
    return repr(what) if isinstance(what, str) else getattr(what, "__name__", repr(what))


def _at(patterns: list[str] | None) -> str:
    return "" if patterns is None else f" at {', '.join(patterns)}"


def _check_what(what: What) -> None:
    """Refuse what can mean no layer."""
    if isinstance(what, (list, tuple)):
        for one in what:
            _check_what(one)
    elif isinstance(what, str):
        if what not in _KINDS:
            raise SurgeryError(f"no kind of normalization is called {what!r}; there are {', '.join(_KINDS)}")
    elif isinstance(what, nn.Module) or not callable(what):
        raise SurgeryError(f"{what!r} means no layers: give a kind, a class, a function of a layer, or several of them")


def _is_meant(layer: nn.Module, kind: Kind, what: What) -> bool:
    if isinstance(what, (list, tuple)):
        return any(_is_meant(layer, kind, one) for one in what)
    if isinstance(what, str):
        return what == kind.name or (kind.name in ("unknown", "other") and isinstance(layer, _TORCHS_OF.get(what, ())))
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
        check_word(word)
        return lambda layer, kind: _by_word(word, layer, kind)
    if isinstance(to, (type, nn.Module)) or not callable(to):
        raise SurgeryError(f"{to!r} is no layer to become: give a word, one of normwise's named classes, or a function")
    return lambda layer, kind: to(layer)


def _by_word(word: str, layer: nn.Module, kind: Kind) -> nn.Module:
    if word == kind.name:
        return layer
    features, axis = features_of(kind)
    spec = cast("NormSpec", kind.spec)
    eps = spec.normalizer.eps if isinstance(spec.normalizer, (Standardize, RMS)) else None
    return named_layer(word, features, axis, affine=spec.recovery is not None, eps=eps)


def features_of(kind: Kind) -> tuple[int, Axis]:
    """How many channels a layer normalizes, and on which axis they are: the second, or the last.

    Raises:
        SurgeryError: its channels are several dimensions, unknown, or on another axis.
    """
    spec = kind.spec
    if spec is None:
        raise SurgeryError(
            "what its converter makes of it does more than normalize: give a function for what it becomes"
        )
    place = channel_place(spec)
    if place is None or len(spec.parameter_over) > 1:
        raise SurgeryError(f"'{spec.text}' has no single dimension that is known to be its channels")
    rank = 4 if spec.pattern.open_ended else len(spec.pattern.dims)
    dim, sizes = channel_dim(spec, rank), dict(spec.sizes)
    known = [sizes.get(axis.name, 0) for axis in spec.pattern.dims[place]]
    if dim not in (1, rank - 1) or 0 in known:
        raise SurgeryError(f"'{spec.text}' has no known number of channels on its second or last axis")
    return math.prod(known), 1 if dim == 1 else -1


# ---------------------------------------------------------------------------------------------------- before and after


def _probe(model: nn.Module, batch: Any, forward: Forward | None) -> Probe | None:
    found = Probe("found", found_batch(model)) if batch is None and forward is None else Probe("given", batch)
    if found.batch is None:
        return None
    outputs_of(model, found, forward)  # what is wrong with it, its own error says
    return found


def _check_runs(model: nn.Module, probe: Probe | None, forward: Forward | None) -> tuple[str, ...]:
    """Refuse a model that does not run any more; a note where only an input that was found may be too small."""
    if probe is None:
        return ("no input of the model was found, on which to see that it still runs: give a batch",)
    try:
        outputs_of(model, probe, forward)
    except Exception as error:
        if isinstance(error, TooFewSamplesError) and probe.name == "found":
            return (f"an input that was found is too small now: {error}",)
        raise SurgeryError(f"swap: the model then fails: {error}; it is as it was") from error
    return ()
