"""Who takes part in a case, and who is left out because it raises, or is normwise's and wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu import others, truth
from benchmarks.gpu.device import Device
from normwise.bench import gate, layers
from normwise.bench.cases import Case
from normwise.bench.layers import Outputs
from normwise.bench.operations import (
    COPY,
    OURS,
    TORCH,
    TORCH_COMPILED,
    Entrant,
    Prepared,
    call_of,
    copy_of,
    enter,
    found_by,
    state_of,
)

_WARM_UPS = 3
_LONGEST = 200  # characters of an error


def prepare(case: Case, device: Device) -> Prepared:
    """The calls of a case, each compared with the truth and warmed up."""
    inputs, gradients = layers.tensors(case, device.where)
    state = state_of(made(layers.ours, case, device))
    gradients = truth.settled(case, inputs, gradients, state)
    true = truth.truth(case, inputs, gradients, state)
    found = Prepared({}, {}, {}, COPY)
    for name, make in _entrants(case, inputs, gradients, device):
        try:
            _try(found, name, case, make(), true)
            device.synchronize()
        except Exception as error:  # noqa: BLE001 - whatever a contender raises, the others are measured
            found.calls.pop(name, None)
            found.excluded[name] = told(error)
            device.synchronize()
            device.release()
        if OURS in found.excluded:
            return found
    found.calls[COPY] = copy_of(inputs)
    return found


def told(error: Exception) -> str:
    r"""An error in a line.

    >>> told(ValueError("too long\nby far"))
    'ValueError: too long'
    """
    line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def made(make: Callable[[Case], Any], case: Case, device: Device) -> Any:
    """A layer on the device; parameters of batch norm are float32, as in mixed precision, for cuDNN takes no others."""
    of = replace(case, dtype="float32") if case.operation.startswith("batch_norm") else case
    return make(of).to(device.where)


def _try(found: Prepared, name: str, case: Case, entrant: Entrant, true: gate.Found) -> None:
    """Check a contender, and let it take part."""
    reason = gate.fault(found_by(case, entrant), true)
    call = call_of(case, entrant)
    enter(found, name, call, reason)
    for _ in range(_WARM_UPS if name in found.calls else 0):
        call()


def _entrants(
    case: Case, inputs: Outputs, gradients: Outputs, device: Device
) -> Iterator[tuple[str, Callable[[], Entrant]]]:
    """Who takes part, in turn; made when wanted."""

    def eager(make: Callable[[Case], Any]) -> Entrant:
        layer = made(make, case, device)
        return Entrant(layer, layer, inputs, gradients)

    def compiled() -> Entrant:
        layer = made(layers.torchs, case, device)
        return Entrant(torch.compile(layer, dynamic=False), layer, inputs, gradients)

    def another(name: str) -> Entrant:
        layer = made(layers.torchs, case, device)
        return Entrant(others.run(name, case, layer.norm), layer, inputs, gradients)

    yield OURS, lambda: eager(layers.ours)
    yield TORCH, lambda: eager(layers.torchs)
    if case.compiled:
        yield TORCH_COMPILED, compiled
    for name in others.who(case):
        yield name, lambda name=name: another(name)  # type: ignore[misc]  # of each its own
