"""What is started in place of what Triton would find by looking at every argument: is it the same? Without a GPU.

`python -m tests.started` makes random calls, and others like them, with tensors that begin anywhere, and compares every
compiled kernel that is started with the one that Triton's own way leads to. Nothing is compiled or launched: kernels
are stubs, one for each key of Triton's. It prints how many were started either way. Triton must not interpret.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import normwise as nw
from normwise.kernels import prepare
from normwise.kernels import run as running
from normwise.kernels.gpu.kernel import GpuKernel
from tests import compiled as calls
from tests.compiled import DTYPES, WORDS, Call, drawn, with_gates

SAMPLE, REPEATS = 2, 3  # calls of each word and dtype, and of each like them
OFFSETS = (0,) * 9 + (8, 1)  # elements before the first of a tensor


class Absent:
    """A GPU that Triton believes to be there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Stub:
    """A compiled kernel that counts how it is started, and that Triton would start the same."""

    function = packed_metadata = None

    def __init__(self, of: JITFunction, options: dict[str, Any], counts: Counter[str]) -> None:
        self.of, self.options, self.counts = of, options, counts

    def launch_metadata(self, *_: Any) -> None:
        """None is wanted."""

    def run(self, *_: Any) -> None:
        """Triton's way."""
        self.counts["found by Triton"] += 1

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def start(*arguments: Any) -> None:
            assert len(arguments) == len(self.of.arg_names)
            found = self.of.run(*arguments, grid=grid, warmup=True, **self.options)
            assert found is self, f"Triton would start another variant of {self.of.__name__}"
            self.counts["started"] += 1

        return start


@contextmanager
def nothing_is_launched() -> Iterator[Counter[str]]:
    """Calls on the CPU reach the kernels for GPUs, which are stubs."""
    counts: Counter[str] = Counter()

    def compile_nothing(self: JITFunction, key: str, *given: Any) -> Stub:
        device, options = given[1], given[3]
        told = {"num_warps": options.num_warps, "maxnreg": options.maxnreg} if options.maxnreg else {}
        stub = Stub(self, told, counts)
        self.device_caches[device][0][key] = stub
        counts["variants"] += 1
        return stub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Absent())
        patch.setattr(JITFunction, "_do_compile", compile_nothing)
        patch.setattr(GpuKernel, "on_cpu", True)
        for module in (prepare, running):
            patch.setattr(module, "requested", lambda: "triton")
        patch.setattr(prepare, "compiled", lambda: {"cpu": "triton"})
        prepare._prepared.cache_clear()
        yield counts


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """The same numbers, some elements after the beginning of their memory."""
    room = tensor.new_empty(tensor.numel() + elements)
    return room[elements:].view(tensor.shape).copy_(tensor)


def begin(call: Call, random_: random.Random) -> None:
    """Make a call, with tensors that begin anywhere."""

    def shift(tensor: Tensor) -> Tensor:
        return shifted(tensor, random_.choice(OFFSETS))

    given = calls.numbers(call)
    calls.compiled(
        call,
        given._replace(
            x=shift(given.x),
            residual=None if given.residual is None else shift(given.residual),
            gate=None if given.gate is None else shift(given.gate),
            parameters=[shift(parameter) for parameter in given.parameters],
            d_output=shift(given.d_output),
        ),
    )


def likes(call: Call, random_: random.Random) -> list[Call]:
    """Calls for which the same was prepared: with other masks, residuals, dtypes of parameters, and wishes."""
    names = call.plan.names
    others = [
        replace(
            call,
            strided=False,
            residual=random_.random() < 0.5,
            parameters=random_.choice(DTYPES),
            wanted=(random_.random() < 0.7, True, random_.random() < 0.7, True),
        )
        for _ in range(2)
    ]
    return [replace(other, masked=masked) for other in others for masked in (None, names, names[:1], names[-1:])]


def main() -> None:
    random_ = random.Random(0)
    with nothing_is_launched() as counts:
        for word in WORDS:
            for dtype in DTYPES:
                for call in with_gates(drawn(word, dtype, SAMPLE)):
                    for like in likes(call, random_) * REPEATS:
                        begin(like, random_)
        layer = nw.BatchNorm(64)
        for count in (8, 8, 8, 5):
            layer(torch.randn(count, 64, requires_grad=True)).sum().backward()
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main()
