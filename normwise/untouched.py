"""Run a model and leave no trace: buffers, modes, gradients and random numbers are put back, bit for bit."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from normwise.places import OWN_ATTRIBUTES, all_modules


@contextmanager
def untouched(
    model: nn.Module, *, values: bool = False, optimizer: Optimizer | None = None, batches: Any = None
) -> Iterator[None]:
    """Whatever happens within, an exception and Ctrl-C included, the model and the generators are then as before.

    Put back are the buffers (their values, and which tensors they are), which tensors the parameters are, their `grad`
    and `requires_grad`, the mode of every module, and the random number generators of torch, Python, NumPy and the
    modules. A layer whose sizes were found within waits for them again: a probe decides neither on them nor on the
    first weights. Plain attributes are put back, with the items of lists and dictionaries; what is deeper in them is
    not. So are hooks, which run as in any forward. Modules that are exchanged within stay exchanged.

    Args:
        model: A model, in any mode.
        values: Put the values of the parameters back as well, which costs a copy of them. Without it only those of
            embeddings with a `max_norm` are copied, which a forward scales.
        optimizer: Put its state and its settings (learning rates, ...) back as well. Parameters that it has besides
            the model's, as of a loss that learns, are put back as the model's are.
        batches: A loader whose own random number generators are put back as well.

    >>> model = nn.Sequential(nn.LazyLinear(2), nn.BatchNorm1d(2))
    >>> with untouched(model):
    ...     _ = model(torch.randn(8, 5))
    >>> model[0], model[1].num_batches_tracked
    (LazyLinear(in_features=0, out_features=2, bias=True), tensor(0))
    """
    modules = list(all_modules(model))
    parameters = _parameters(modules, optimizer)
    kept: list[_Part] = [_Tables(modules), _Values(modules), *_scaled(modules)]
    kept += [_Gradients(parameters), _Unsized(modules), _Random(modules)]
    kept += [_Weights(parameters)] if values else []
    kept += [_Optimized(optimizer)] if optimizer is not None else []
    kept += [_Drawn(batches)] if batches is not None else []
    try:
        yield
    finally:
        for part in kept:
            part.put_back()
        torch.clear_autocast_cache()  # which may hold casts of weights as they were within


class Moment:
    """All that a forward may read and change, besides weights, as it is now: `back()` goes back to it any time.

    So a loss can be computed again and again from the same memory, with the same random numbers.

    >>> model, x = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)), torch.randn(8, 3)
    >>> moment = Moment(model)
    >>> first = model(x)
    >>> moment.back()
    >>> torch.equal(model(x), first)
    True
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(all_modules(model))
        self._kept: tuple[_Part, ...] = (_Tables(modules), _Values(modules), _Random(modules))

    def back(self) -> None:
        """Put buffers, modes, hooks, attributes and random number generators back."""
        for part in self._kept:
            part.put_back()


class _Part(Protocol):
    """A part of what a model is, as it was."""

    def put_back(self) -> None: ...


class _Tables:
    """Which tensors, hooks, attributes and mode each module has."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modes = [(module, module.training) for module in modules]
        self._tables = [(table, dict(table)) for module in modules for table in _tables(module)]
        self._attributes = [(module, _attributes(module)) for module in modules]
        self._contents = [_Contents(value) for _, kept in self._attributes for value in kept.values()]

    def put_back(self) -> None:
        for module, training in self._modes:
            module.training = training
        for table, kept in self._tables:
            _restore(table, kept)
        for module, kept in self._attributes:
            for name in _attributes(module).keys() - kept.keys():
                del module.__dict__[name]
            module.__dict__.update(kept)
        for contents in self._contents:
            contents.put_back()


class _Values:
    """The values of the tensors that a forward may change."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [(tensor, tensor.detach().clone()) for tensor in _values(modules)]

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, value in self._kept:
            _put_back(tensor, value)


class _Gradients:
    """The gradients of the parameters, and which of them take one."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        held = ((p, p.grad) for p in parameters)
        self._kept = [(p, p.requires_grad, grad, None if grad is None else grad.clone()) for p, grad in held]

    @torch.no_grad()
    def put_back(self) -> None:
        for parameter, requires_grad, grad, copied in self._kept:
            parameter.requires_grad = requires_grad
            if parameter.grad is not grad:
                parameter.grad = grad
            if grad is not None and copied is not None:
                grad.copy_(copied)


class _Weights:
    """The values of the parameters."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._kept = [(p, p.detach().clone()) for p in parameters if not is_lazy(p)]

    @torch.no_grad()
    def put_back(self) -> None:
        for parameter, value in self._kept:
            _put_back(parameter, value)


class _Optimized:
    """What an optimizer remembers of each parameter, and its settings."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._state = {p: {k: (v, _copied(v)) for k, v in known.items()} for p, known in optimizer.state.items()}
        self._groups = [(group, {k: (v, _copied(v)) for k, v in group.items()}) for group in optimizer.param_groups]

    @torch.no_grad()
    def put_back(self) -> None:
        self._optimizer.state.clear()
        for parameter, known in self._state.items():
            self._optimizer.state[parameter] = {key: _original(*kept) for key, kept in known.items()}
        self._optimizer.param_groups[:] = [group for group, _ in self._groups]
        for group, settings in self._groups:
            _restore(group, {key: _original(*kept) for key, kept in settings.items()})


class _Drawn:
    """The generators that decide on the order of a loader's batches."""

    def __init__(self, batches: Any) -> None:
        holders = [batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)]
        holders.append(getattr(holders[-1], "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        generators = {id(g): g for g in found if isinstance(g, torch.Generator)}.values()
        self._kept = [(generator, generator.get_state()) for generator in generators]

    def put_back(self) -> None:
        for generator, state in self._kept:
            generator.set_state(state)


class _Random:
    """The generators of torch on the model's devices, of Python, of NumPy where it is loaded, and of the modules."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        devices = {t.device.index or 0 for m in modules for t in _tensors(m) if t.device.type == "cuda"}
        self._torchs = torch.get_rng_state()
        self._cudas = {device: torch.cuda.get_rng_state(device) for device in devices}
        held = [value for module in modules for value in _attributes(module).values()]
        self._held = [(value, value.get_state()) for value in held if isinstance(value, torch.Generator)]
        self._pythons = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpys = None if numpy is None else numpy.random.get_state()

    def put_back(self) -> None:
        torch.set_rng_state(self._torchs)
        for device, state in self._cudas.items():
            torch.cuda.set_rng_state(state, device)
        for generator, state in self._held:
            generator.set_state(state)
        random.setstate(self._pythons)
        if self._numpys is not None:
            sys.modules["numpy"].random.set_state(self._numpys)


class _Contents:
    """The items of a plain attribute that is a list, a set or a dictionary."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._kept = value.copy() if type(value) in (list, set, dict, OrderedDict) else None

    def put_back(self) -> None:
        if self._kept is None:
            return
        if isinstance(self._value, list):
            self._value[:] = self._kept
        else:
            self._value.clear()
            self._value.update(self._kept)


class _Unsized:
    """The layers that wait for their sizes: normwise's, and torch's lazy modules.

    Where sizes are found, tensors stay the same objects and get data and another class. A lazy module also changes its
    own class, its attributes, and its tables of hooks, which must stay the same dictionaries: the handles know them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        waiting = [m for m in modules if isinstance(m, LazyModuleMixin) or any(map(is_lazy, _tensors(m)))]
        self._tensors = [(t, type(t), t.data) for module in waiting for t in _tensors(module) if is_lazy(t)]
        self._modules = [(module, type(module), dict(module.__dict__)) for module in waiting]
        self._hooks = [(table, dict(table)) for module in waiting for table in _tables(module)]

    def put_back(self) -> None:
        for tensor, its_class, data in self._tensors:
            tensor.data, tensor.__class__ = data, its_class
        for module, own_class, attributes in self._modules:
            module.__class__ = own_class
            _restore(module.__dict__, attributes)
        for table, kept in self._hooks:
            _restore(table, kept)


def seed(number: int) -> None:
    """Seed the generators of torch, Python and, where it is loaded, NumPy."""
    torch.manual_seed(number)
    random.seed(number)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number)


def _tables(module: nn.Module) -> Iterator[dict[str, Any]]:
    """The dictionaries of a module's tensors and hooks; those of a scripted one cannot be changed."""
    hooks = (value for name, value in module.__dict__.items() if "hook" in name)
    yield from (table for table in (module._parameters, module._buffers, *hooks) if isinstance(table, dict))


def _parameters(modules: Iterable[nn.Module], optimizer: Optimizer | None) -> list[Tensor]:
    """The parameters of the modules and those that an optimizer has besides, each once."""
    held: list[Tensor] = [p for module in modules for p in module._parameters.values() if p is not None]
    held += [p for group in (() if optimizer is None else optimizer.param_groups) for p in group["params"]]
    return list({id(parameter): parameter for parameter in held}.values())


def _scaled(modules: Iterable[nn.Module]) -> list[_Part]:
    """The weights that a forward scales: those of embeddings with a `max_norm`."""
    held = [m for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None]
    return [_Weights({id(module.weight): module.weight for module in held}.values())]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's plain attributes."""
    return {name: value for name, value in module.__dict__.items() if name not in OWN_ATTRIBUTES}


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """A module's own parameters and buffers."""
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)


def _values(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The tensors besides weights that a forward may change, each once: buffers and attributes."""
    held: list[Any] = [value for module in modules for value in module._buffers.values()]
    held += [value for module in modules for value in _attributes(module).values()]
    yield from {id(tensor): tensor for tensor in held if isinstance(tensor, Tensor) and not is_lazy(tensor)}.values()


def _restore(table: dict[str, Any], kept: dict[str, Any]) -> None:
    """The same dictionary with what it held, in the same order."""
    table.clear()
    table.update(kept)


def _copied(value: Any) -> Any:
    """What is kept of a value that may be changed in place."""
    return value.detach().clone() if isinstance(value, Tensor) else value.copy() if isinstance(value, list) else value


def _original(value: Any, copied: Any) -> Any:
    """The same object with what it held."""
    if isinstance(value, Tensor):
        _put_back(value, copied)
    elif isinstance(value, list):
        value[:] = copied
    return value


def _put_back(tensor: Tensor, value: Tensor) -> None:
    if tensor.is_meta:
        return
    if not _is_plain(tensor):
        tensor.copy_(value)
    elif tensor.shape != value.shape:  # it grew
        tensor.set_(value)  # type: ignore[call-overload]  # its stubs know storages only
    elif not torch.equal(_bytes(tensor), _bytes(value)):  # NaN is NaN here, and 0 is not -0
        tensor.copy_(value)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values lie in memory one after another: it is not sparse, nested or quantized."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
