"""Operations on the memories of a model: freeze, hold, tell domains apart, accumulate.

Each works on the whole tree below a module. None of them is undone by `model.train()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from normwise.errors import NormwiseError
from normwise.norm import Norm
from normwise.remembering import never_trained


class Change(AbstractContextManager["Change"]):
    """What an operation changed; `undo()`, or the end of a `with`, puts it back.

    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> freeze(model).paths
    ()
    """

    def __init__(self, paths: tuple[str, ...], before: ExitStack) -> None:
        self.paths = paths
        self._before = before

    def undo(self) -> None:
        """Put everything back as it was; a second time it does nothing."""
        self._before.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Change({', '.join(self.paths) or 'nothing'})"


def freeze(model: nn.Module, *, parameters: bool = True) -> Change:
    """Freeze the normalizations of a model: nothing in them moves until `unfreeze`.

    A frozen layer uses its remembered statistics in training as in evaluation, and updates none; its parameters take
    no gradient, and what waits in their `grad` is put aside until they are unfrozen. `model.train()`, `copy.deepcopy`,
    pickling and loading a checkpoint leave it frozen; a `state_dict` does not carry it. A layer without a memory still
    normalizes by its input; only its parameters are frozen. Run the backward pass of a checkpointed forward before it
    is unfrozen.

    Args:
        model: A module; every `Norm` in it is frozen.
        parameters: Whether the parameters are frozen as well.

    Returns:
        What was changed; as a context manager, it holds for a while: `with freeze(model): ...`.

    Raises:
        NormwiseError: torch's own layers with memory are in the model; their memory is not normwise's to freeze.

    >>> model = nn.Sequential(nn.Linear(4, 3), nw.BatchNorm(3))
    >>> freeze(model)
    Change(1)
    >>> _ = model.train()(torch.randn(8, 4))
    >>> model[1].running_mean
    tensor([0., 0., 0.])
    """
    before, layers = ExitStack(), _layers(model)
    for _, layer in layers:
        layer._freeze(parameters=parameters)
        before.callback(layer._thaw)
    return Change(tuple(path for path, _ in layers), before)


def unfreeze(model: nn.Module) -> Change:
    """Let the normalizations of a model move again: the inverse of `freeze`.

    Parameters that took no gradient before they were frozen still take none.

    Returns:
        What was changed, as `freeze` does.

    >>> model = nn.Sequential(nn.Linear(4, 3), nw.BatchNorm(3))
    >>> _ = freeze(model), unfreeze(model)
    >>> model[1].weight.requires_grad, model[1].frozen
    (True, False)
    """
    before, layers = ExitStack(), [(path, layer) for path, layer in _layers(model) if layer.frozen]
    for _, layer in layers:
        before.callback(_freeze_again, layer, layer._freezes, parameters=bool(layer._froze))
        layer._freezes = 1
        layer._thaw()
    return Change(tuple(path for path, _ in layers), before)


@contextmanager
def no_update(model: nn.Module) -> Iterator[None]:
    """Within this context nothing enters a memory; training still uses the batch's statistics.

    For forwards that are not steps of the training: the second one of sharpness-aware minimization, a probe.

    Raises:
        NormwiseError: torch's own layers with memory are in the model.

    >>> norm = nw.BatchNorm(3)
    >>> with no_update(norm):
    ...     _ = norm(torch.randn(8, 3))
    >>> norm.num_batches_tracked
    tensor(0)
    """
    layers = [layer for _, layer in _layers(model)]
    for layer in layers:
        layer._held += 1
    try:
        yield
    finally:
        for layer in layers:
            layer._held -= 1


@contextmanager
def domain(model: nn.Module, name: str) -> Iterator[None]:
    """Within this context every layer with memory uses and updates the memory of that name.

    The parameters stay shared. A domain's memory starts empty, at its first use in training, and is saved and loaded
    with the layer; outside of any domain the layer has its own memory. Run the backward pass of a checkpointed forward
    in the same domain.

    Args:
        model: A module; every `Norm` with a memory in it.
        name: Any text without a dot.

    Raises:
        NormwiseError: in evaluation, a name that was never trained; torch's own layers with memory are in the model.

    >>> norm = nw.BatchNorm(3)
    >>> with domain(norm, "night"):
    ...     _ = norm(torch.randn(8, 3))
    >>> norm.num_batches_tracked, norm.domains
    (tensor(0), ('night',))
    """
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"a domain's name is text without a dot, not {name!r}")
    layers = [(path, layer) for path, layer in _layers(model) if layer.spec.memory is not None]
    for path, layer in layers:
        if name not in layer.domains and (layer.frozen or not layer.training):
            raise NormwiseError(f"{path}: {never_trained(name, layer.domains)}")
    before = [layer._domain for _, layer in layers]
    try:
        for _, layer in layers:
            layer._add_domain(name)
            layer._domain = name
        yield
    finally:
        for (_, layer), previous in zip(layers, before, strict=True):
            layer._domain = previous
            if previous != name:
                layer._drop_domain(name)


@contextmanager
def accumulate(model: nn.Module, window: int) -> Iterator[None]:
    """Within this context the statistics of `window` batches are joined before they enter a memory, as one batch.

    For gradients that are accumulated over micro-batches: the memory then is that of the micro-batches joined (mean and
    variance of all their samples, counted once). Outputs and gradients stay those of the micro-batches, because each is
    normalized before the next is seen. What is left over at the end of the context enters as it is; after an exception
    it is dropped.

    Args:
        model: A module; every `Norm` with a memory in it. A layer that is called twice in a forward counts two.
        window: How many batches are joined.

    Raises:
        NormwiseError: a layer averages columns that cannot be joined; accumulation within accumulation; torch's own
            layers with memory are in the model.

    >>> norm = nw.BatchNorm(3, momentum=1.0)
    >>> x = torch.randn(32, 3)
    >>> with accumulate(norm, 4):
    ...     _ = [norm(part) for part in x.split(8)]
    >>> torch.allclose(norm.running_var, x.var(0)), norm.num_batches_tracked
    (True, tensor(1))
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window is a number of batches, from 1 on, not {window!r}")
    layers = [(path, layer) for path, layer in _layers(model) if layer.spec.memory is not None and layer._has_buffers()]
    for path, layer in layers:
        _check_accumulation(path, layer)
    pooled: list[Norm] = []
    try:
        for _, layer in layers:
            pooled.append(layer)
            layer._add_pool(window)
        yield
        for layer in pooled:
            layer._flush()
    finally:
        for layer in pooled:
            layer._drop_pool()


def _freeze_again(layer: Norm, times: int, *, parameters: bool) -> None:
    layer._freeze(parameters=parameters)
    layer._freezes = times


def _check_accumulation(path: str, layer: Norm) -> None:
    spec = layer.spec
    if layer._window:
        raise NormwiseError(f"{path}: accumulation within accumulation")
    remembered = {name for dim in spec.memory_over for name in dim}
    lost = [axis.name for axis in spec.pattern.axes if not axis.reduced and axis.name not in remembered]
    if spec.joins_batches and lost:
        raise NormwiseError(
            f"{path}: '{spec.text}' averages over {', '.join(lost)} in its memory, and averages of batches cannot be "
            "joined exactly; normalize over it, or remember it"
        )


def _layers(model: nn.Module) -> list[tuple[str, Norm]]:
    """Every normalization of normwise by path.

    Raises:
        NormwiseError: there is one of torch's that keeps a memory.
    """
    layers = []
    for path, module in model.named_modules():
        if isinstance(module, Norm):
            layers.append((path or type(module).__name__, module))
        elif isinstance(module, _NormBase) and module.track_running_stats:
            kind = type(module).__name__
            ours = "BatchNorm" if isinstance(module, _BatchNorm) else "InstanceNorm"
            raise NormwiseError(
                f"{path or kind}: the memory of torch.nn.{kind} is not normwise's to change; "
                f"use nw.{ours}, which takes the same arguments and state_dict"
            )
    return layers
