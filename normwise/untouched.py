"""Run a model and leave no trace: buffers, modes, gradients and random numbers are put back, bit for bit."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_COUNTS = ("_skips", "_fed")  # what a layer of normwise keeps beside its buffers


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens within, an exception and Ctrl-C included, the model and the generators are then as before.

    Put back are the buffers (their values, and which tensors they are), which tensors the parameters are, their `grad`
    and `requires_grad`, the mode of every module, and the random number generators of torch, Python and NumPy. The
    values of parameters are not copied: a forward does not change them. Modules that are exchanged within stay
    exchanged.

    >>> model = nn.BatchNorm1d(2)
    >>> with untouched(model):
    ...     _ = model(torch.randn(8, 2))
    >>> model.num_batches_tracked
    tensor(0)
    """
    modules = [(module, module.training, _slots(module)) for module in model.modules()]
    values = {id(tensor): (tensor, tensor.detach().clone()) for _, _, slots in modules for tensor in _tensors(slots)}
    gradients = [(p, p.requires_grad, p.grad, _copied(p.grad)) for p in model.parameters()]
    devices = sorted({t.device.index or 0 for t, _ in values.values() if t.device.type == "cuda"})
    with torch.random.fork_rng(devices), _other_generators():
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in values.values():
                    _put_back(tensor, value)
                for parameter, requires_grad, grad, copied in gradients:
                    parameter.requires_grad_(requires_grad)
                    parameter.grad = grad
                    if grad is not None and copied is not None:
                        grad.copy_(copied)
            for module, training, slots in modules:
                module.training = training
                for holder, kept in slots:
                    for name in [name for name in holder if name not in kept and holder is not module.__dict__]:
                        del holder[name]
                    holder.update(kept)


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


def _slots(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The dictionaries that hold a module's tensors, and what they hold now."""
    counts = {name: module.__dict__[name] for name in _COUNTS if name in module.__dict__}
    holders: list[dict[str, Any]] = [module._parameters, module._buffers]
    return [*((holder, dict(holder)) for holder in holders), (module.__dict__, counts)]


def _tensors(slots: list[tuple[dict[str, Any], dict[str, Any]]]) -> Iterator[Tensor]:
    for _, kept in slots:
        for value in kept.values():
            if isinstance(value, Tensor) and not is_lazy(value) and not isinstance(value, nn.Parameter):
                yield value


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _put_back(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape != value.shape:  # it grew
        tensor.set_(value)  # type: ignore[call-overload]  # its stubs know storages only
    elif not torch.equal(tensor, value):
        tensor.copy_(value)
