"""Exact population statistics for a finished model: what its memories would hold had they seen all batches at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normwise.batches import Forward, Loss, device_of, feed, moved, rows_of, target_of
from normwise.errors import SurgeryError
from normwise.record import Line, Record, shown
from normwise.surgery.edits import Edits
from normwise.surgery.exchange import opened, sites
from normwise.surgery.pooled import Measured, Pooled
from normwise.surgery.stand_in import standing_in
from normwise.untouched import untouched


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    layerwise: bool = False,
    copy: bool = False,
) -> Record:
    """Give every layer with a memory the statistics of these batches joined; nothing is trained.

    For a model whose weights are not those that its statistics were gathered with: after weight averaging, pruning,
    a swap of layers, training with small batches, or for other data. Batches are merged by their counts (Chan's
    formula): those of 3, 5 and 8 rows give the statistics of the 16 rows. What a memory held before does not count,
    whatever its update rate; `num_batches_tracked` is then the number of these batches, as
    `torch.optim.swa_utils.update_bn` leaves it.

    The model runs in evaluation mode, without dropout. In one pass the layers with a memory normalize each batch by
    its own statistics, as in training, which is good enough for large batches. With `layerwise` they are measured one
    after another, each behind layers that normalize by their new statistics already: what is remembered is then what
    the layer sees in evaluation, exactly (but for one that is called again on what it has computed itself). That costs
    one pass over the batches a layer, and up to one more to find their order.

    Layers of torch's, timm's and Hugging Face's are measured by normwise's in their place, and stay what they are, with
    the same tensors. Masks that the model gives to normwise's layers are respected. Batch renormalization and ghost
    batches are put aside. Within `nw.domain` it is the domain's memory that is replaced.

    Args:
        model: A model, in any mode.
        batches: Anything that gives batches: tensors, mappings of keywords, tuples or lists that begin with the input.
            With `loss` or `layerwise` it must be readable more than once, as a list or a loader is.
        forward: `forward(model, batch)`, for models that are called otherwise.
        loss: `loss(output, target)`, a number, with the second element of a tuple or list as the target; of other
            batches the target is the batch. Its mean over the batches in evaluation, weighted by their rows (the first
            dimension of a batch's first tensor), is then in the record, before and after.
        layerwise: See above.
        copy: Operate on a copy.

    Returns:
        A record. Left as they are, with the reason: layers that are frozen, that no batch reached, or that are unknown.
        `record.measured` has "loss_before" and "loss_after". `record.undo()` puts the old statistics back bit for bit.

    Raises:
        SurgeryError: there are no batches, or they cannot be read as often as needed; sizes that are not known yet.
        NonFiniteError: a batch is not finite, and the layer's policy is to raise. The model is then as it was.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    >>> x = torch.randn(16, 4)
    >>> record = recalibrate(model, x.split([3, 5, 8]))
    >>> record, torch.allclose(model[1].running_var, model[0](x).var(0)), model[1].num_batches_tracked
    (Record('recalibrate', 1 changed, 0 left), True, tensor(3))
    """
    _check_batches(batches, several=layerwise or loss is not None)
    model = opened(model, copy=copy)
    _check_sizes(model)
    whole = nn.ModuleList(site.module for site in sites(model))  # what stands in plain lists included
    with _evaluating(whole):
        before = None if loss is None else _mean_loss(model, batches, forward, loss)
    with _evaluating(whole), standing_in(model) as (running, layers, left):
        measure = _layer_by_layer if layerwise else _in_one_pass
        found = measure(running, batches, forward, layers) if layers else []
    with Edits() as edits:
        lines = [_remember(layer, memories, edits) for layer, memories in zip(layers, found, strict=True)]
        record = _recorded(model, lines, left, edits)
        if before is not None and loss is not None:
            with _evaluating(whole):
                after = _mean_loss(model, batches, forward, loss)
            record.measured = {"loss_before": before, "loss_after": after}
            record.notes += (f"mean loss in evaluation: {before:.6g} before, {after:.6g} after",)
        return record


def _recorded(model: nn.Module, lines: list[Line], left: list[Line], edits: Edits) -> Record:
    """What became of the layers that were measured, and which were not."""
    changed = tuple(line for line in lines if line.after is not None)
    kept = (*left, *(line for line in lines if line.after is None))
    notes = () if changed or kept else ("no layer remembers anything",)
    return Record("recalibrate", model, changed, kept, notes=notes, inverse=edits.undo)


def _check_batches(batches: Any, *, several: bool) -> None:
    """Refuse what gives no batches, or not often enough."""
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        kind = type(batches).__name__
        raise SurgeryError(f"batches is a list or a loader of batches, not one {kind}: [batch] is a list of one")
    if several and isinstance(batches, Iterator):
        raise SurgeryError(
            f"batches is a {type(batches).__name__}, which can be read once, and loss= and layerwise=True read it "
            "several times: give a list or a loader"
        )


def _check_sizes(model: nn.Module) -> None:
    """Refuse a model that would get its sizes only from the batches."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise SurgeryError(f"{name} has no size yet: run a batch through the model first")


@contextmanager
def _evaluating(modules: nn.Module) -> Iterator[None]:
    """Everything in evaluation mode and without gradients; afterwards as it was, whatever happens.

    Modes are set one by one: a `train` of the model's own may do more, or less.
    """
    with untouched(modules), torch.no_grad():
        for module in modules.modules():
            module.training = False
        yield


# ------------------------------------------------------------------------------------------------------- measuring


def _in_one_pass(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None, layers: list[Pooled]
) -> list[list[Measured]]:
    """All layers at once, each normalizing by the statistics of the batch."""
    for pooled in layers:
        pooled.layer.training = True
    count = _run(model, batches, forward, layers)
    return [pooled.found(count) for pooled in layers]


def _layer_by_layer(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None, layers: list[Pooled]
) -> list[list[Measured]]:
    """Each layer behind others that remember already what was found for them."""
    found: dict[Pooled, list[Measured]] = {}
    for pooled in _in_order(model, batches, forward, layers):
        pooled.layer.training = True
        count = _run(model, batches, forward, [pooled])
        pooled.layer.training = False
        found[pooled] = pooled.found(count)
        for memory in found[pooled]:
            if memory.new is not None:
                memory.new.put(pooled.layer)
    return [found[pooled] for pooled in layers]


def _run(model: nn.Module, batches: Iterable[Any], forward: Forward | None, layers: list[Pooled]) -> int:
    """Run the model on all batches; how many they were."""
    count = 0
    for batch in batches:
        feed(model, batch, forward)
        count += 1
        for pooled in layers:
            pooled.take_stock()
    return _some(count)


def _some(count: int) -> int:
    if count == 0:
        raise SurgeryError("there are no batches to recalibrate with")
    return count


def _in_order(model: nn.Module, batches: Iterable[Any], forward: Forward | None, layers: list[Pooled]) -> list[Pooled]:
    """The layers in the order of their first call.

    A layer that is never called as a module, because the module that holds it computes with it step by step, comes
    where that module is called, or after the layer before it in there.
    """
    firsts: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        firsts.setdefault(module, len(firsts))

    count, held = 0, sites(model)
    with ExitStack() as hooks:
        for site in held:
            if isinstance(site.module, torch.jit.ScriptModule):  # it takes no hooks
                continue
            hooks.callback(site.module.register_forward_pre_hook(note).remove)
        for batch in batches:
            feed(model, batch, forward)
            count += 1
            if all(pooled.layer in firsts for pooled in layers):
                break
    _some(count)
    by_path = {place.path: firsts[site.module] for site in held if site.module in firsts for place in site.places}
    keys: dict[Pooled, int] = {}
    previous = ("", 0)
    for pooled in layers:
        key = firsts.get(pooled.layer)
        if key is None:
            holder = _called_holder(pooled.path, by_path)
            beside = not holder or previous[0].startswith(f"{holder}.")
            key = max(by_path.get(holder, 0), previous[1] if beside else 0)
        keys[pooled], previous = key, (pooled.path, key)
    return sorted(layers, key=keys.__getitem__)


def _called_holder(path: str, called: Mapping[str, int]) -> str:
    """The path of the innermost module above a layer that was called; the model's, if none was."""
    while path and path not in called:
        path = path.rpartition(".")[0]
    return path


# -------------------------------------------------------------------------------------------------------- the record


def _remember(layer: Pooled, memories: list[Measured], edits: Edits) -> Line:
    """Let the model's layer remember what was found."""
    described, changes = shown(layer.original), False
    for memory in memories:
        if memory.new is not None:
            old = layer.remembered(memory.new.domain)
            edits.make(partial(memory.new.put, layer.original), partial(old.put, layer.original))
            changes = True
    return Line(layer.path, described, described if changes else None, "; ".join(memory.why for memory in memories))


def _mean_loss(model: nn.Module, batches: Iterable[Any], forward: Forward | None, loss: Loss) -> float:
    """The mean loss over the batches, weighted by their rows."""
    total, rows = 0.0, 0
    for given in batches:
        batch = moved(given, device_of(model))
        output = feed(model, batch, forward)
        value = loss(output, target_of(batch))
        if isinstance(value, Tensor) and value.numel() != 1:
            raise SurgeryError(f"loss gives a tensor of shape {tuple(value.shape)}, and has to give one number")
        weight = rows_of(batch)
        total, rows = total + float(value) * weight, rows + weight
    return total / _some(rows)
