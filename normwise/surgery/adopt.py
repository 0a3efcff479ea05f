"""From other libraries' normalization layers to normwise's, and back to torch's."""

from __future__ import annotations

import copy as copying
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normwise.batches import Forward, tensors_in
from normwise.layers import InstanceNorm
from normwise.norm import Norm
from normwise.pattern import ELLIPSIS
from normwise.record import Record
from normwise.spec import NormSpec
from normwise.surgery.converters import BY_RANK, TORCH, to_torch
from normwise.surgery.edits import Edits
from normwise.surgery.exchange import Decide, Decision, Site, exchange, leave_fast_path, move_over, opened
from normwise.surgery.flow import HOOKS
from normwise.surgery.kinds import kind_of
from normwise.surgery.probes import Probe, found_batch, probes_for
from normwise.surgery.proof import Proof, distance, outputs_of

_TOLERANCE = 1e-5


def adopt(
    model: nn.Module,
    batch: Any = None,
    *,
    forward: Forward | None = None,
    copy: bool = False,
    tolerance: float = _TOLERANCE,
) -> Record:
    """Exchange torch's, timm's and Hugging Face's normalization layers for normwise's, with the same numbers.

    Parameters and buffers stay the same objects under the same names: `state_dict` does not change, an optimizer goes
    on, checkpoints load both ways. A layer that is not torch's own is compared with its replacement on hard inputs in
    float64, in training and evaluation; then the model with itself, on the given batch or one that is found, and harder
    ones.

    Args:
        model: A model, or a single layer, whose replacement is then `record.model`.
        batch: What to compare on: a tensor, a mapping of keywords, or a tuple that begins with the input.
        forward: `forward(model, batch)`, for models that are called otherwise.
        copy: Operate on a copy.
        tolerance: The largest difference allowed, relative to outputs above 1.

    Returns:
        A record. Left as they are, with the reason: layers that are unknown or do more than their class says.

    Raises:
        SurgeryError: the model computes something else then; it is as it was.

    >>> record = nw.adopt(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    >>> record, type(record.model[1]).__name__
    (Record('adopt', 1 changed, 0 left), 'BatchNorm')
    """
    model, alike = opened(model, copy=copy), set[tuple[type, str]]()
    return _proved(
        "adopt", model, lambda site: _adopted(site, alike), _probes(model, batch, forward), forward, tolerance
    )


def release(
    model: nn.Module,
    batch: Any = None,
    *,
    forward: Forward | None = None,
    copy: bool = False,
    tolerance: float = _TOLERANCE,
) -> Record:
    """Exchange normwise's layers for torch's: the way back from `adopt`.

    Arguments, record and errors are those of `adopt`. What torch has no layer for is left: a `Norm` declared by a
    pattern, channels-first layer and RMS norms, layers with an activation or a gate, frozen ones, memories of domains.
    A `BatchNorm` becomes the class it was adopted from, or the one for the inputs that it sees in a forward.

    >>> record = nw.release(nn.Sequential(nw.LayerNorm(4)))
    >>> type(record.model[0])
    <class 'torch.nn.modules.normalization.LayerNorm'>
    """
    model = opened(model, copy=copy)
    probes = _probes(model, batch, forward)
    ranks = _ranks(model, probes[:1], forward)
    return _proved("release", model, lambda site: _released(site, ranks), probes, forward, tolerance)


def _probes(model: nn.Module, batch: Any, forward: Forward | None) -> list[Probe]:
    """None, where no batch is given and none is found."""
    batch = found_batch(model) if batch is None and forward is None else batch
    return [] if batch is None else probes_for(model, batch, forward)


def _proved(
    operation: str,
    model: nn.Module,
    decide: Decide,
    probes: Sequence[Probe],
    forward: Forward | None,
    tolerance: float,
) -> Record:
    """Exchange the layers, and compare the model with what it was."""
    proof = Proof(operation, model, probes, forward, exact=True)
    with Edits() as edits:
        record = exchange(model, edits, decide)
        record.operation = operation
        leave_fast_path(record.model, edits)
        if record.changed:
            record.proof = proof.check(record.model, edits, tolerance)
        if not probes:
            record.notes += ("no input of the model was found, and it was not run: give a batch",)
        elif not proof.probes:
            record.notes += ("on the meta device there are no numbers to compare",)
        return record


def _adopted(site: Site, alike: set[tuple[type, str]]) -> Decision | None:
    """What becomes of a layer; `alike` are the classes and declarations that have been compared."""
    layer, kind = site.module, kind_of(site.module)
    if kind is None or kind.converted is layer:
        return None
    new = kind.converted
    if new is None:
        return Decision(None, kind.reason)
    compared = (type(layer), repr(new))
    reason = move_over(layer, new) or (None if compared in alike else difference(layer, new))
    if reason is not None:
        return Decision(None, reason)
    alike.add(compared)
    new.__dict__["adopted_from"] = type(layer)
    if isinstance(new, InstanceNorm) and isinstance(layer, _InstanceNorm):
        new.single_example_rank = layer._get_no_batch_dim()  # type: ignore[no-untyped-call]  # torch does not annotate it
    return Decision(new, "the same declaration, parameters and memory")


def difference(old: nn.Module, new: nn.Module) -> str | None:
    """What two layers compute differently, on hard inputs in float64 and in both modes; None: nothing.

    torch's own layers are known, and not run.
    """
    is_torchs = type(old) in TORCH and type(old).forward.__module__.startswith("torch.nn.")
    if is_torchs or not isinstance(new, Norm):
        return None
    compared = 0
    for x in _hard_inputs(new.spec):
        for training in (True, False):
            before = _computed(old, x, training=training)
            after = None if before is None else _computed(new, x, training=training)
            if before is None or after is None:  # a shape that only one of them takes shows when the model is run
                continue
            compared += 1
            if not distance(before, after) <= _TOLERANCE:
                mode = "training" if training else "evaluation"
                return f"it computes something else than '{new.spec.text}' with its settings, in {mode}"
    return None if compared else "no input was found that both layers take"


def _hard_inputs(spec: NormSpec) -> Iterator[Tensor]:
    """Inputs that fit a pattern: plain, of little spread (where eps counts), of a large mean, with a constant part."""
    generator, sizes = torch.Generator().manual_seed(0), dict(spec.sizes)
    for ellipsis in ((), (7,), (4, 3), (2, 3, 2)):
        shape: list[int] = []
        for dim in spec.pattern.dims:
            if dim[0].name == ELLIPSIS:
                shape += ellipsis
            else:
                shape.append(math.prod(sizes.get(axis.name, 5) for axis in dim))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        yield from (x, x * 1e-3, x + 30, torch.cat([x[:1], torch.full_like(x[1:], 3.0)]))


def _computed(layer: nn.Module, x: Tensor, *, training: bool) -> list[Tensor] | None:
    """Output, gradients and buffers of a copy in float64, without hooks; None: the layer does not take the input."""
    hooks = {id(value): type(value)() for name, value in layer.__dict__.items() if name in HOOKS}
    layer = copying.deepcopy(layer, hooks).double().train(training).requires_grad_()
    home = next((t.device for t in (*layer.parameters(), *layer.buffers())), x.device)
    x = x.to(home).clone().requires_grad_()
    with torch.random.fork_rng([]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        try:
            output = layer(x * 1)  # no leaf, so that it may be changed in place
            if not isinstance(output, Tensor) or output.shape != x.shape:
                return None
            cotangent = torch.randn(x.shape, dtype=x.dtype).to(home)
            gradients = torch.autograd.grad(output, [x, *layer.parameters()], cotangent, allow_unused=True)
        except Exception:  # noqa: BLE001 - a layer may refuse a shape with any error, or a warning
            return None
    found = [gradient for gradient in gradients if gradient is not None]
    return [output.detach(), *found, *(buffer for _, buffer in sorted(layer.named_buffers()))]


def _ranks(model: nn.Module, probes: Sequence[Probe], forward: Forward | None) -> dict[nn.Module, int]:
    """How many dimensions the input of each layer has whose torch class depends on it."""
    ranks: dict[nn.Module, int] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ranks[layer] = next(tensors_in((args, kwargs))).dim()

    with ExitStack() as hooks:
        for layer in model.modules():
            if type(layer) in BY_RANK:
                hooks.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        for probe in probes:
            outputs_of(model, probe, forward)
    return ranks


def _released(site: Site, ranks: dict[nn.Module, int]) -> Decision | None:
    layer: Any = site.module
    if not isinstance(layer, Norm):
        return None
    if layer.frozen:
        return Decision(None, "it is frozen, which torch's layers cannot be: nw.unfreeze first")
    if layer.domains:
        return Decision(None, f"it has memories of domains, {', '.join(layer.domains)}, and torch's have one")
    new = to_torch(layer, ranks.get(layer))
    if new is None:
        return Decision(None, _no_equal(layer))
    reason = _declined(layer) or move_over(layer, new)
    new.__dict__.pop("adopted_from", None)
    return Decision(None, reason) if reason else Decision(new, "the same declaration, parameters and memory")


def _no_equal(layer: Norm) -> str:
    if layer.spec.activation is not None:
        return f"torch has no normalization that applies '{layer.spec.activation}' as well"
    if layer.spec.gate is not None:
        return "torch has no normalization that takes a gate"
    if type(layer) in BY_RANK:
        return "whether torch's is the 1d, 2d or 3d one is not known: give a batch that reaches it"
    return f"torch has no equal of {type(layer).__name__}"


def _declined(layer: Norm) -> str | None:
    """What speaks against torch's layer: declared policies that it does not have."""
    memory = layer.spec.memory
    if memory is not None and (memory.nonfinite != "skip" or memory.degenerate != "raise"):
        return f"torch's has no policies: {memory!r}"
    return None
