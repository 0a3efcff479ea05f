"""What a forward call costs the host where the tensor is so small that only the way to the kernel counts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from benchmarks.gpu.contenders import made
from benchmarks.gpu.device import Device
from normwise.bench import layers
from normwise.bench.cases import Case, Pass, Shape
from normwise.bench.operations import OURS, TORCH, Entrant, call_of
from normwise.bench.timing import Call, Spread, spread

SHAPES: tuple[Shape, ...] = ((8, 64), (64, 256), (256, 1024), (512, 4096))
WHAT = (
    ("layer_norm", Pass("evaluation")),
    ("layer_norm", Pass("training")),
    ("rms_norm", Pass("training")),
    ("add_layer_norm", Pass("training")),
    ("batch_norm", Pass("training")),
)
_CALLS, _ROUNDS = 50, 15  # fewer calls than a device's queue has room for: the host waits for nothing


@dataclass(frozen=True)
class HostTime:
    """The seconds of a call, from its beginning until all is launched.

    Attributes:
        case: What is called.
        ours: normwise's time.
        torchs: That of torch's layer.
        ratio: Ours over torch's, round by round.
    """

    case: Case
    ours: Spread
    torchs: Spread
    ratio: Spread


def host_times(device: Device, calls: int = _CALLS, rounds: int = _ROUNDS) -> list[HostTime]:
    """Of small calls in float32, normwise's and torch's in turn."""
    found = []
    for shape, (name, what) in product(SHAPES, WHAT):
        case = Case(name, shape, "float32", "contiguous", what)
        with torch.set_grad_enabled(what.mode == "training"):
            found.append(_of(case, device, calls, rounds))
    return found


def _of(case: Case, device: Device, calls: int, rounds: int) -> HostTime:
    inputs, gradients = layers.tensors(case, device.where)
    compared = {
        name: call_of(case, Entrant(layer, layer, inputs, gradients))
        for name, layer in ((OURS, made(layers.ours, case, device)), (TORCH, made(layers.torchs, case, device)))
    }
    for call in compared.values():
        _seconds(call, device, calls)
    times = [{name: _seconds(call, device, calls) for name, call in compared.items()} for _ in range(rounds)]
    ours, torchs = ([found[name] for found in times] for name in (OURS, TORCH))
    return HostTime(case, spread(ours), spread(torchs), spread([a / b for a, b in zip(ours, torchs, strict=True)]))


def _seconds(call: Call, device: Device, calls: int) -> float:
    """Of one call, of so many that nothing waits for."""
    device.synchronize()
    begin = device.now()
    for _ in range(calls):
        call()
    return (device.now() - begin) / calls
