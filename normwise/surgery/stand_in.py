"""Which layers of a model have a memory that can be measured, with normwise's in the place of others meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from normwise.errors import SurgeryError
from normwise.norm import Norm
from normwise.record import Line, shown
from normwise.surgery.adopt import difference
from normwise.surgery.edits import Edits
from normwise.surgery.exchange import Site, move_over, sites
from normwise.surgery.kinds import kind_of
from normwise.surgery.pooled import Pooled


@contextmanager
def standing_in(model: nn.Module) -> Iterator[tuple[nn.Module, list[Pooled], list[Line]]]:
    """The model with normwise's layers in the place of others, those that are to be measured, and those that are left.

    Within this context what enters a layer in training mode is pooled.
    """
    layers, left, running = list[Pooled](), list[Line](), model
    edits = Edits()
    with ExitStack() as stack:
        stack.callback(edits.undo)
        for site in sites(model):
            if not _remembers(site.module):
                continue
            layer, reason = _stand_in(site)
            if layer is None:
                left.append(Line(site.path, shown(site.module), None, reason))
                continue
            for place in site.places if layer is not site.module else ():
                if place.path:
                    edits.exchange(place, layer)
                else:
                    running = layer
            layers.append(Pooled(site.path, site.module, layer))
        for pooled in layers:
            stack.enter_context(pooled.open())
        yield running, layers, left


def _remembers(layer: nn.Module) -> bool:
    return any(name.startswith("running_") and buffer is not None for name, buffer in layer._buffers.items())


def _stand_in(site: Site) -> tuple[Norm | None, str]:
    """The layer to measure in the place of another, or None and why there is none."""
    layer = site.module
    if isinstance(layer, Norm):
        reason = _obstacle(site.path, layer)
        return (None, reason) if reason else (layer, "")
    kind = kind_of(layer)
    if kind is None:
        return None, "it is no normalization that is known; say what it means with nw.register_converter"
    new = kind.converted
    if not isinstance(new, Norm):
        return None, kind.reason or f"it is converted to {type(new).__name__}, which declares no memory"
    reason = _obstacle(site.path, new) or move_over(layer, new) or difference(layer, new)
    return (None, reason) if reason else (new, "")


def _obstacle(path: str, layer: Norm) -> str | None:
    """Why nothing can enter a layer's memory, or not as it should; None: nothing speaks against it.

    Raises:
        SurgeryError: what the layer is accumulating would be lost.
    """
    spec = layer.spec
    if layer._window:
        raise SurgeryError(f"{path}: recalibrate within nw.accumulate: what is accumulated would be lost")
    if spec.memory is None or not getattr(layer, "track_running_stats", True):
        return "its track_running_stats is off"
    if not spec.memory.updates:
        return "its memory is declared to stay as it is"
    if layer.frozen:
        return "it is frozen: nw.unfreeze first"
    if layer._held:
        return "nothing enters its memory within nw.no_update"
    remembered = {name for dim in spec.memory_over for name in dim}
    averaged = [axis.name for axis in spec.pattern.axes if not axis.reduced and axis.name not in remembered]
    if spec.joins_batches and averaged:
        return (
            f"'{spec.text}' averages over {', '.join(averaged)} in its memory, and averages of batches are not joined"
        )
    return None
