"""The GPU, as the benchmark sees it: a clock, a cache that is emptied, memory that is given back."""

from __future__ import annotations

import gc
import time
from typing import Any, Protocol, cast

import torch

from normwise.bench.timing import Call

_HEAD_START = 2**21  # cycles, about a millisecond: longer than the host needs to launch what is timed


class Device(Protocol):
    """Where things are measured."""

    where: torch.device
    name: str

    def facts(self) -> dict[str, str | int]:
        """What it is."""

    def seconds(self, call: Call) -> float:
        """How long the device works on a call that finds none of its data in the cache."""

    def now(self) -> float:
        """Seconds of the host's clock."""

    def synchronize(self) -> None:
        """Wait until all is done; raises RuntimeError if the device has failed."""

    def release(self) -> None:
        """Give back memory that nobody holds."""


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.where = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.where)
        self.name = self._properties.name
        # Read, and not written, to empty the cache: what was written would go to memory while a call is timed.
        self._other = torch.zeros(max(self._properties.L2_cache_size, 2**24), device=self.where)  # four times its bytes
        self._sum = torch.zeros((), device=self.where)
        self._cuda: Any = torch.cuda
        self._begin, self._end = (self._cuda.Event(enable_timing=True) for _ in range(2))

    def facts(self) -> dict[str, str | int]:
        """Its properties and CUDA's version."""
        known, cudnn = self._properties, cast("Any", torch.backends.cudnn)
        return {
            "gpu": known.name,
            "compute capability": f"{known.major}.{known.minor}",
            "processors": known.multi_processor_count,
            "memory, MB": known.total_memory // 10**6,
            "L2, MB": known.L2_cache_size // 10**6,
            "CUDA": str(torch.version.cuda),
            "cuDNN": cudnn.version() or "none",
        }

    def seconds(self, call: Call) -> float:
        """How long the device works on a call that finds none of its data in the cache.

        The device sleeps first, so that what it is timed with has been launched when it wakes.
        """
        torch.sum(self._other, 0, out=self._sum)
        self._cuda._sleep(_HEAD_START)
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3

    def now(self) -> float:
        """Seconds of the host's clock."""
        return time.perf_counter()

    def synchronize(self) -> None:
        """Wait until all is done."""
        torch.cuda.synchronize(self.where)

    def release(self) -> None:
        """Give back memory that nobody holds."""
        gc.collect()
        torch.cuda.empty_cache()
