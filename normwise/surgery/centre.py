"""LayerNorm to RMSNorm: where all that is added up before it can be centred, the mean is 0 and need not be taken out.

The stream of a pre-norm transformer is a sum: of embeddings, and of what linear layers add to it. If each of them is
made to have mean 0 over the features, so has the sum, at every place; a LayerNorm does not see the difference, and an
RMS norm of the result is the LayerNorm. This is exact only if nothing but LayerNorms reads the stream. A LayerNorm that
keeps a bias, which an RMS norm has not, stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from normwise.layers import LayerNorm, LayerNorm2d, RMSNorm, RMSNorm2d
from normwise.norm import Norm
from normwise.record import Line, shown
from normwise.surgery.absorb import can_centre, centred_outputs, channel_dim_of
from normwise.surgery.activated import Activated
from normwise.surgery.converters import to_torch
from normwise.surgery.edits import Edits
from normwise.surgery.exchange import inherit, share_tensors
from normwise.surgery.flow import Step, Value
from normwise.surgery.folding import Subject, has_no_bias, set_weights, usable
from normwise.surgery.kinds import channel_dim
from normwise.surgery.streams import dim_after, dim_before

_SUMS = {"add", "add_", "sub", "sub_"}
_SCALINGS = {"mul", "mul_", "div", "div_", "neg"}


@dataclass(eq=False)
class Stream:
    """Everything that is added up before some LayerNorms.

    Attributes:
        norms: The LayerNorms that read it.
        sources: The layers that write into it.
        constants: The parameters that are added to it, with the dimension of the features.
        refusal: Why it cannot be centred; empty where it can.
    """

    norms: list[Subject] = field(default_factory=list)
    sources: list[nn.Module] = field(default_factory=list)
    constants: list[tuple[Tensor, int]] = field(default_factory=list)
    refusal: str = ""


class _RefusedError(Exception):
    """A stream cannot be centred."""


def centre(subjects: Sequence[Subject], edits: Edits) -> tuple[list[Line], dict[str, str]]:
    """Centre what can be, and make LayerNorms of it RMS norms; the changes, and for others the reason by path."""
    lines: list[Line] = []
    reasons: dict[str, str] = {}
    done: set[int] = set()
    by_layer = {id(subject.layer): subject for subject in subjects if subject.calls}
    for subject in by_layer.values():
        if id(subject.layer) in done or not _takes_mean_out(subject):
            continue
        stream = _explored(subject, by_layer)
        done.update(id(norm.layer) for norm in stream.norms)
        biased = [norm for norm in stream.norms if not has_no_bias(norm)]
        if stream.refusal:
            reasons.update((norm.site.path, stream.refusal) for norm in stream.norms)
        elif len(biased) < len(stream.norms):
            lines += _carry_out(stream, edits)
        reasons.update((norm.site.path, "it keeps a bias, which an RMS norm has not") for norm in biased)
    return lines, reasons


def _takes_mean_out(subject: Subject) -> bool:
    """Whether it is a LayerNorm over one dimension, on which nothing else hangs."""
    known = isinstance(subject.converted, (LayerNorm, LayerNorm2d)) and not isinstance(subject.converted, Activated)
    return known and len(subject.spec.sizes) == 1 and subject.obstacle is None


def _explored(first: Subject, by_layer: dict[int, Subject]) -> Stream:
    """Follow all that is added up before a LayerNorm, up and down, to its ends."""
    stream = Stream()
    waiting: list[tuple[Value, int]] = []
    dims: dict[int, int] = {}  # of what has been looked at
    try:
        waiting += _of_norm(first, stream)
        while waiting:
            value, dim = waiting.pop()
            if dims.get(id(value), dim) != dim:
                raise _RefusedError("its features lie along two dimensions of what it normalizes")
            if id(value) not in dims:
                dims[id(value)] = dim
                waiting += _written_by(value, dim, stream)
                waiting += _read_by(value, dim, stream, by_layer)
    except _RefusedError as error:
        stream.refusal = str(error)
    return stream


def _of_norm(subject: Subject, stream: Stream) -> Iterator[tuple[Value, int]]:
    """A LayerNorm joins the stream, with all its calls."""
    if subject in stream.norms:
        return
    stream.norms.append(subject)
    for call in subject.calls:
        dim = channel_dim(subject.spec, call.takes[0].tensor.dim())
        if dim is None:
            raise _RefusedError(f"{subject.site.path} has no one dimension of features")
        yield call.takes[0], dim


def _written_by(value: Value, dim: int, stream: Stream) -> Iterator[tuple[Value, int]]:
    """What a value in the stream is made of."""
    step = value.writer
    if step is None:
        if not isinstance(value.tensor, nn.Parameter):
            raise _RefusedError("what it normalizes is, or has added to it, an input or a constant")
        held = stream.norms[0].flow.holders.get(id(value.tensor), ())
        if len(held) != 1:
            raise _RefusedError(f"what is added to it stands under {len(held)} names")
        stream.constants.append((value.tensor, dim))
    elif step.layer is not None:
        yield from _of_source(step, dim, stream)
    else:
        parts = _parts(step, dim)
        if not parts:
            raise _RefusedError(f"{step} before it is more than a sum")
        yield from parts


def _of_source(step: Step, dim: int, stream: Stream) -> Iterator[tuple[Value, int]]:
    """A layer that writes into the stream joins it, with all its calls."""
    layer: Any = step.layer
    if layer in stream.sources:
        return
    rank = step.writes[0].tensor.dim()
    at = rank - 1 if isinstance(layer, nn.Embedding) else channel_dim_of(layer, rank) if can_centre(layer) else None
    if not can_centre(layer) or at != dim:
        raise _RefusedError(f"what it normalizes comes from {step}, whose outputs cannot be centred by its weights")
    reason = usable(stream.norms[0], layer)
    if reason is not None:
        raise _RefusedError(reason)
    stream.sources.append(layer)
    for call in stream.norms[0].flow.calls(layer):
        yield call.writes[0], dim + call.writes[0].tensor.dim() - rank


def _parts(step: Step, dim: int) -> list[tuple[Value, int]]:
    """The values that an operation adds up, or moves; none: it is more than a sum."""
    before = dim_before(step, dim)
    if before is not None:
        return [(step.reads[0], before)]
    if len(step.writes) == 1:
        name, output = step.operation.overloadpacket.__name__, step.writes[0].tensor
        along = [(value, dim + value.tensor.dim() - output.dim()) for value in step.reads]
        wide = [(value, at) for value, at in along if at >= 0 and value.tensor.shape[at] == output.shape[dim]]
        if name in _SCALINGS and _scales(step, [value for value, _ in wide]):
            return wide
        sums = name in _SUMS and _has_no_number(step)
        joins = name == "cat" and _cat_dim(step) % output.dim() != dim
        if (sums or joins) and len(wide) == len(step.reads):
            return wide
    return []


def _scales(step: Step, wide: list[Value]) -> bool:
    """Whether one value is multiplied, by a number or by one number for all features; nothing is divided by it."""
    first, *others = step.arguments[:2]
    tensors = [value.tensor for value in wide]
    plain = not step.options and len(tensors) == 1
    by_itself = any(other is first for other in others)
    divides = step.operation.overloadpacket.__name__.startswith("div")
    return plain and not by_itself and not (divides and tensors[0] is not first)


def _has_no_number(step: Step) -> bool:
    """Whether only tensors are added: a number would be added to every feature."""
    return all(isinstance(argument, Tensor) for argument in step.arguments[:2])


def _cat_dim(step: Step) -> int:
    return int(step.arguments[1]) if len(step.arguments) > 1 else 0


def _read_by(value: Value, dim: int, stream: Stream, by_layer: dict[int, Subject]) -> Iterator[tuple[Value, int]]:
    """What reads a value in the stream: a LayerNorm, or an operation whose result is in the stream as well."""
    for step in value.readers:
        if step.layer is not None:
            norm = by_layer.get(id(step.layer))
            if norm is None or not _takes_mean_out(norm):
                raise _RefusedError(f"what it normalizes is also read by {step}")
            if channel_dim(norm.spec, step.takes[0].tensor.dim()) != dim:
                raise _RefusedError(f"{step} normalizes another dimension of it")
            yield from _of_norm(norm, stream)
        elif step.operation is None or len(step.writes) != 1:
            raise _RefusedError(f"what it normalizes is also read by {step}")
        else:
            after = dim_after(step, dim)
            output = step.writes[0]
            at = dim + output.tensor.dim() - value.tensor.dim() if after is None else after
            if not 0 <= at < output.tensor.dim() or value not in [part for part, _ in _parts(step, at)]:
                raise _RefusedError(f"what it normalizes is also read by {step}")
            yield output, at


def _carry_out(stream: Stream, edits: Edits) -> list[Line]:
    for layer in stream.sources:
        set_weights(layer, centred_outputs(layer), layer, edits)
    for constant, dim in stream.constants:
        edits.set_values(constant, constant.detach().double() - constant.detach().double().mean(dim, keepdim=True))
    return [_to_rms(norm, stream, edits) for norm in stream.norms if has_no_bias(norm)]


def _to_rms(norm: Subject, stream: Stream, edits: Edits) -> Line:
    new = as_rms(norm.layer, norm.converted)
    for place in norm.site.places:
        edits.exchange(place, new)
    names = [step.name for step in norm.flow.steps if step.layer in stream.sources]
    listed = ", ".join(dict.fromkeys(names))
    return Line(norm.site.path, shown(norm.layer), shown(new), f"its input has mean 0: centred were {listed}")


def as_rms(layer: Any, converted: Norm) -> nn.Module:
    """The RMS norm with the same eps, gain, activation and gate: torch's for one of torch's, where there is one."""
    options: dict[str, Any] = {"eps": converted.spec.normalizer.eps, "device": "meta"}  # type: ignore[attr-defined]
    options["activation"], options["gate"] = converted.spec.activation, converted.spec.gate
    options["elementwise_affine"] = layer._parameters.get("weight") is not None
    if isinstance(converted, LayerNorm2d):
        new: nn.Module = RMSNorm2d(converted.normalized_shape[0], **options)
    else:
        ours = RMSNorm(converted.normalized_shape, **options)  # type: ignore[arg-type]  # a LayerNorm
        new = ours if isinstance(layer, Norm) else to_torch(ours, None) or ours
    share_tensors(layer, new)
    inherit(layer, new)
    return new
