"""Operations on the memories of a model: freeze, hold, tell domains apart, accumulate.

Each works on the whole tree below a module. None of them is undone by `model.train()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from normwise.errors import NormwiseError, SurgeryError
from normwise.norm import Norm
from normwise.places import places
from normwise.record import Line, Record, shown
from normwise.remembering import never_trained

_TORCHS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_TORCHS_OWN = "torch's own, whose parameters learn on: nw.adopt(model) makes it a layer that can be frozen"
_SHOWN_PATHS = 6  # in an error


def freeze(model: nn.Module, names: str | Sequence[str] | None = None, *, parameters: bool = True) -> Record:
    """Freeze the normalizations of a model: nothing in them moves until `unfreeze`.

    A frozen layer uses its remembered statistics in training as in evaluation, and updates none; its parameters take
    no gradient, and what waits in their `grad` is put aside until they are unfrozen. `model.train()`, `copy.deepcopy`,
    pickling and loading a checkpoint leave it frozen; a `state_dict` does not carry it. A layer without a memory still
    normalizes by its input; only its parameters are frozen. Run the backward pass of a checkpointed forward before it
    is unfrozen.

    Args:
        model: A module; every `Norm` in it is frozen.
        names: Which of them, by path: `"layer1.*"`, `"*.bn1"`, or several such patterns of which one has to fit. `*` is
            any text, dots included, `?` one character. Default: all. A layer held twice goes by either of its paths.
        parameters: Whether the parameters are frozen as well.

    Returns:
        A record of what was frozen, and of torch's own layers without memory, which are left as they are. As a context
        manager it holds for a while: `with freeze(model): ...`. Freezings nest; each is undone by itself.

    Raises:
        NormwiseError: among the layers are some of torch's own with memory, which is not normwise's to freeze.
        SurgeryError: no normalization fits a pattern.

    >>> model = nn.Sequential(nn.Linear(4, 3), nw.BatchNorm(3))
    >>> print(freeze(model))
    freeze: 1 changed, 0 left as they were
    <BLANKLINE>
    changed  before        after                 why
    1        BatchNorm(3)  BatchNorm(3), frozen  memory and parameters frozen
    >>> _ = model.train()(torch.randn(8, 4))
    >>> model[1].running_mean
    tensor([0., 0., 0.])
    """
    found = _normalizations(model, names)
    layers = _ours(found)
    undone: list[Callable[[], None]] = []
    changed: list[Line] = []
    with _whole(undone):
        for path, layer in layers:
            before = _described(layer)
            layer._freeze(parameters=parameters)
            undone.append(layer._thaw)
            changed.append(Line(path, before, _described(layer), _frozen_parts(layer, parameters=parameters)))
    left = [Line(path, shown(layer), None, _TORCHS_OWN) for path, layer in found if not isinstance(layer, Norm)]
    return Record("freeze", model, tuple(changed), tuple(left), inverse=partial(_take_back, undone))


def unfreeze(model: nn.Module, names: str | Sequence[str] | None = None) -> Record:
    """Let the normalizations of a model move again: the inverse of `freeze`, however often they were frozen.

    Parameters that took no gradient before they were frozen still take none.

    Args:
        model: A module; every `Norm` in it moves again.
        names: Which of them, as in `freeze`.

    Returns:
        A record of what was unfrozen, and of the layers that were not frozen; its `undo()` freezes them as they were.

    Raises:
        NormwiseError, SurgeryError: as `freeze`.

    >>> model = nn.Sequential(nw.BatchNorm(3), nw.BatchNorm(3))
    >>> _ = freeze(model)
    >>> unfreeze(model, "1").paths, model[0].frozen, model[1].frozen
    (('1',), True, False)
    """
    undone: list[Callable[[], None]] = []
    changed: list[Line] = []
    left: list[Line] = []
    with _whole(undone):
        for path, layer in _ours(_normalizations(model, names)):
            before = _described(layer)
            if not layer.frozen:
                left.append(Line(path, before, None, "it was not frozen"))
                continue
            undone.append(partial(_freeze_again, layer, layer._freezes, parameters=bool(layer._froze)))
            layer._freezes = 1
            layer._thaw()
            changed.append(Line(path, before, _described(layer), "it moves again"))
    return Record("unfreeze", model, tuple(changed), tuple(left), inverse=partial(_take_back, undone))


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


@contextmanager
def _whole(undone: list[Callable[[], None]]) -> Iterator[None]:
    """All of it or nothing."""
    try:
        yield
    except BaseException:
        _take_back(undone)
        raise


def _take_back(inverses: list[Callable[[], None]]) -> None:
    """The last first."""
    while inverses:
        inverses.pop()()


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
    return _ours(_normalizations(model, None))


def _normalizations(model: nn.Module, names: str | Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """The normalizations of normwise and torch by path, each once; the class stands for the path of a root.

    Raises:
        SurgeryError: no path fits one of the patterns.
    """
    paths: dict[nn.Module, list[str]] = {}
    for place in places(model):
        if isinstance(place.module, (Norm, *_TORCHS)):
            paths.setdefault(place.module, []).append(place.path or type(place.module).__name__)
    if names is None:
        return [(held[0], module) for module, held in paths.items()]
    chosen: set[nn.Module] = set()
    for pattern in [names] if isinstance(names, str) else names:
        fitting = {module for module, held in paths.items() if any(fnmatchcase(path, pattern) for path in held)}
        if not fitting:
            known = [held[0] for held in paths.values()]
            shown_paths = ", ".join(known[:_SHOWN_PATHS]) + (", ..." if len(known) > _SHOWN_PATHS else "")
            raise SurgeryError(f"no normalization has a path like {pattern!r}; there are: {shown_paths or 'none'}")
        chosen |= fitting
    return [(held[0], module) for module, held in paths.items() if module in chosen]


def _ours(found: list[tuple[str, nn.Module]]) -> list[tuple[str, Norm]]:
    """Those of normwise.

    Raises:
        NormwiseError: there is one of torch's that keeps a memory.
    """
    for path, module in found:
        if isinstance(module, _NormBase) and not isinstance(module, Norm) and module.track_running_stats:
            raise NormwiseError(
                f"{path}: the memory of torch.nn.{type(module).__name__} is not normwise's to change; "
                "nw.adopt(model) exchanges such layers for normwise's with the same numbers"
            )
    return [(path, module) for path, module in found if isinstance(module, Norm)]


def _described(layer: Norm) -> str:
    return shown(layer) + (", frozen" if layer.frozen else "")


def _frozen_parts(layer: Norm, *, parameters: bool) -> str:
    """What a freezing has made stand still."""
    parts = ["memory"] if layer.spec.memory is not None else []
    parts += ["parameters"] if parameters and any(True for _ in layer.parameters()) else []
    what = f"{' and '.join(parts)} frozen" if parts else f"it has no memory{' and no parameters' if parameters else ''}"
    return what if layer._freezes == 1 else f"{what}; frozen {layer._freezes} times now"
