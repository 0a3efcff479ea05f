"""Every normalization of a model: what it is, what it holds, who uses it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normwise.batches import Forward, feed
from normwise.record import shown, table
from normwise.surgery.exchange import Site, check_readable, sites
from normwise.surgery.flow import Flow, trace
from normwise.surgery.kinds import Kind, kind_of
from normwise.surgery.probes import found_batch
from normwise.untouched import untouched


@dataclass(frozen=True)
class Found:
    """One normalization of a model.

    Attributes:
        path: Its path; further ones of the same layer are in `also`.
        layer: Its class and sizes.
        kind: "batch", "instance", "group", "layer", "rms", "l2", "other", or "unknown".
        pattern: Its declaration; None where it is not known.
        sizes: The sizes of the pattern's axes that are known.
        activation: The one in its declaration, "relu", "silu" or "gelu"; None: there is none.
        gate: The function of a gate in its declaration, an activation's name or "sigmoid"; None: there is none.
        parameters: Shapes by name.
        memory: For each remembered statistic its smallest and largest value; None: nothing is remembered.
        batches: How many batches have entered the memory; None: nobody counts.
        training: Its mode.
        calls: How often it is called in one forward; None: no forward was seen.
        users: The layers and operations that read its output.
        also: Other paths of the same layer.
        registered: Whether `state_dict`, `to` and `train` reach it.
        reason: Why its meaning is not known.
    """

    path: str
    layer: str
    kind: str
    pattern: str | None
    sizes: dict[str, int]
    activation: str | None
    gate: str | None
    parameters: dict[str, tuple[int, ...]]
    memory: dict[str, tuple[float, float]] | None
    batches: int | None
    training: bool
    calls: int | None
    users: tuple[str, ...]
    also: tuple[str, ...]
    registered: bool
    reason: str


class Normalizations(tuple[Found, ...]):
    """The normalizations of a model, in its order; `print` shows a table, `to_dict` gives plain data."""

    __slots__ = ()

    def __str__(self) -> str:
        if not self:
            return "no normalization"
        head = ("path", "layer", "pattern", "parameters", "memory", "calls", "read by")
        return table(head, [_row(found) for found in self])

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data."""
        return [asdict(found) for found in self]


def find(model: nn.Module, batch: Any = None, *, forward: Forward | None = None) -> Normalizations:
    """Every normalization of a model by path, whatever library it comes from.

    Args:
        model: A model; wrappers for several processes are looked into.
        batch: What to run it on once, to see how often each layer is called and who reads its output: a tensor, a
            mapping of keywords, or a tuple that begins with the input; a small one, because all that is computed is
            held for a while. Without one an input is looked for; if none is found, `calls` is None. Nothing of the
            model changes.
        forward: `forward(model, batch)`, for models that are called otherwise.

    >>> print(nw.find(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())))
    path  layer           pattern      parameters           memory                         calls  read by
    1     BatchNorm1d(8)  [n] c [...]  weight (8) bias (8)  mean 0..0 var 1..1, 0 batches  1      relu in 2
    """
    check_readable(model)
    kinds = {site: kind for site in sites(model) if (kind := kind_of(site.module)) is not None}
    batch = found_batch(model) if batch is None and forward is None and kinds else batch
    flow = None
    if batch is not None and kinds:
        flow = _flow(model, batch, forward, [site.module for site in kinds])
    return Normalizations(_found(site, kind, flow) for site, kind in kinds.items())


def _flow(model: nn.Module, batch: Any, forward: Forward | None, layers: list[nn.Module]) -> Flow | None:
    """The flow of a forward; None where it runs but cannot be looked into, as higher-order operators cannot."""
    try:
        with untouched(model):
            return trace(model, lambda: feed(model, batch, forward), layers)
    except Exception:  # noqa: BLE001 - what is wrong with the batch, the model itself says next
        with untouched(model), torch.no_grad():
            feed(model, batch, forward)
        return None


def _found(site: Site, kind: Kind, flow: Flow | None) -> Found:
    layer, spec = site.module, kind.spec
    calls = [] if flow is None else flow.calls(layer)
    readers = (str(step) for call in calls for value in call.writes for step in value.readers)
    batches = dict(layer.named_buffers(recurse=False)).get("num_batches_tracked")
    return Found(
        path=site.path,
        layer=shown(layer),
        kind=kind.name,
        pattern=None if spec is None else spec.text,
        sizes={} if spec is None else dict(spec.sizes),
        activation=None if spec is None else spec.activation,
        gate=None if spec is None else spec.gate,
        parameters={name: _shape(parameter) for name, parameter in layer.named_parameters(recurse=False)},
        memory=dict(_memory(layer)) or None,
        batches=None if batches is None or batches.is_meta else int(batches.max()) if batches.numel() else 0,
        training=layer.training,
        calls=None if flow is None else len(calls),
        users=tuple(dict.fromkeys(readers)),
        also=tuple(place.path for place in site.places[1:]),
        registered=any(place.registered for place in site.places),
        reason=kind.reason,
    )


def _memory(layer: nn.Module) -> Iterator[tuple[str, tuple[float, float]]]:
    for name, buffer in layer.named_buffers(recurse=False):
        if name.startswith("running_") and not (buffer.is_meta or is_lazy(buffer) or buffer.numel() == 0):
            low, high = torch.aminmax(buffer)
            yield name.removeprefix("running_"), (float(low), float(high))


def _row(found: Found) -> tuple[str, ...]:
    parameters = " ".join(f"{name} {_written(shape)}" for name, shape in found.parameters.items())
    memory = " ".join(f"{name} {low:.3g}..{high:.3g}" for name, (low, high) in (found.memory or {}).items())
    if found.batches is not None and memory:
        memory += f", {found.batches} batches"
    calls = "?" if found.calls is None else str(found.calls)
    path = ", ".join([found.path, *found.also])
    pattern = found.pattern or f"? {found.reason}"
    pattern += "" if found.activation is None else f", then {found.activation}"
    pattern += "" if found.gate is None else f", times {found.gate} of a gate"
    return path, found.layer, pattern, parameters, memory, calls, ", ".join(found.users)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape; none for what has no size yet."""
    return () if is_lazy(tensor) else tuple(tensor.shape)


def _written(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
