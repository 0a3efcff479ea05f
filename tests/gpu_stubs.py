"""A GPU that is the CPU, and layers of torch's that stand for normwise's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from normwise.bench import layers
from normwise.bench.cases import Case, Pass

LEARN, TRAIN, EVALUATE = Pass("training", backward=True), Pass("training"), Pass("evaluation")
ROWS = Case("add_rms_norm", (3, 40), "bfloat16", "contiguous", LEARN)
IMAGES = Case("batch_norm", (2, 3, 3, 2), "bfloat16", "channels_last", TRAIN)


class Fake:
    """The CPU, on which every measurement takes as long as calls say, or a millisecond."""

    where, name = torch.device("cpu"), "Abacus <GPU> 9000"

    def __init__(self) -> None:
        self.clock, self.order, self.broken = 0.0, list[str](), False

    def facts(self) -> dict[str, str | int]:
        return {"gpu": self.name, "processors": 2}

    def seconds(self, call: Callable[[], object]) -> float:
        before = self.clock
        call()
        return self.clock - before or 1e-3

    def now(self) -> float:
        self.clock += 1e-3
        return self.clock

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    def release(self) -> None:
        self.synchronize()

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that lasts so long, in turn."""
        turns = iter(seconds)

        def call() -> None:
            self.order.append(name)
            self.clock += next(turns)

        return call


def torchs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels are not the point, torch's layers stand for normwise's."""
    for name, make in layers._TORCHS.items():
        monkeypatch.setitem(layers._OURS, name, make)
