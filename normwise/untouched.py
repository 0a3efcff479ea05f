"""Run a model and leave no trace: buffers, modes, gradients and random numbers are put back, bit for bit."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from normwise.places import all_modules

_COUNTS = ("_skips", "_fed")  # what a layer of normwise keeps beside its buffers


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens within, an exception and Ctrl-C included, the model and the generators are then as before.

    Put back are the buffers (their values, and which tensors they are), which tensors the parameters are, their `grad`
    and `requires_grad`, the mode of every module, and the random number generators of torch, Python and NumPy. A layer
    whose sizes were found within waits for them again: a probe decides neither on them nor on the first weights. The
    values of other parameters are not copied, because a forward does not change them. Modules that are exchanged within
    stay exchanged.

    >>> model = nn.Sequential(nn.LazyLinear(2), nn.BatchNorm1d(2))
    >>> with untouched(model):
    ...     _ = model(torch.randn(8, 5))
    >>> model[0], model[1].num_batches_tracked
    (LazyLinear(in_features=0, out_features=2, bias=True), tensor(0))
    """
    modules = list(all_modules(model))
    modes = [(module, module.training) for module in modules]
    tables = [(table, dict(table)) for module in modules for table in _tables(module)]
    counts = [(module, _counts(module)) for module in modules]
    values = [(tensor, tensor.detach().clone()) for tensor in _values(modules)]
    gradients = [(p, p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in _parameters(modules)]
    unsized = _Unsized(modules)
    devices = sorted({tensor.device.index or 0 for tensor, _ in values if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices), _other_generators():
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for table, kept in tables:
                _restore(table, kept)
            for module, kept in counts:
                for name in _counts(module).keys() - kept.keys():
                    del module.__dict__[name]
                module.__dict__.update(kept)
            with torch.no_grad():
                for tensor, value in values:
                    _put_back(tensor, value)
                for parameter, requires_grad, grad, copied in gradients:
                    parameter.requires_grad = requires_grad
                    if parameter.grad is not grad:
                        parameter.grad = grad
                    if grad is not None and copied is not None:
                        grad.copy_(copied)
            unsized.put_back()


class _Unsized:
    """The layers that wait for their sizes: normwise's, and torch's lazy modules.

    Where sizes are found, tensors stay the same objects and get data and another class. A lazy module also changes its
    own class, its attributes, and its tables of hooks, which must stay the same dictionaries: the handles know them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        waiting = [m for m in modules if isinstance(m, LazyModuleMixin) or any(map(is_lazy, _tensors(m)))]
        self._tensors = [(t, type(t), t.data) for module in waiting for t in _tensors(module) if is_lazy(t)]
        self._modules = [(module, type(module), dict(module.__dict__)) for module in waiting]
        hooks = [value for m in waiting for name, value in m.__dict__.items() if "hook" in name]
        self._hooks = [(table, dict(table)) for table in hooks if isinstance(table, dict)]

    def put_back(self) -> None:
        for tensor, its_class, data in self._tensors:
            tensor.data, tensor.__class__ = data, its_class
        for module, own_class, attributes in self._modules:
            module.__class__ = own_class
            _restore(module.__dict__, attributes)
        for table, kept in self._hooks:
            _restore(table, kept)


@contextmanager
def _other_generators() -> Iterator[None]:
    """Python's and, where it is loaded, NumPy's generator go on afterwards where they were."""
    numpy = sys.modules.get("numpy")
    state, numpys = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpys)


def seed(number: int) -> None:
    """Seed the generators of torch, Python and, where it is loaded, NumPy."""
    torch.manual_seed(number)
    random.seed(number)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number)


def _tables(module: nn.Module) -> Iterator[dict[str, Any]]:
    """The dictionaries of a module's tensors; those of a scripted one cannot be changed."""
    yield from (table for table in (module._parameters, module._buffers) if isinstance(table, dict))


def _parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters, each once."""
    held = (p for module in modules for p in module._parameters.values() if p is not None)
    return list({id(parameter): parameter for parameter in held}.values())


def _counts(module: nn.Module) -> dict[str, Any]:
    return {name: module.__dict__[name] for name in _COUNTS if name in module.__dict__}


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """A module's own parameters and buffers."""
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)


def _values(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The tensors that a forward may change: buffers and counts, each once."""
    held = [value for module in modules for value in (*module._buffers.values(), *_counts(module).values())]
    yield from {id(tensor): tensor for tensor in held if isinstance(tensor, Tensor) and not is_lazy(tensor)}.values()


def _restore(table: dict[str, Any], kept: dict[str, Any]) -> None:
    """The same dictionary with what it held, in the same order."""
    table.clear()
    table.update(kept)


def _put_back(tensor: Tensor, value: Tensor) -> None:
    if tensor.is_meta:
        return
    if tensor.shape != value.shape:  # it grew
        tensor.set_(value)  # type: ignore[call-overload]  # its stubs know storages only
    elif not torch.equal(tensor, value):
        tensor.copy_(value)
