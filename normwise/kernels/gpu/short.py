"""The short way to the kernels for GPUs: statistics stay where they are, and the host waits for nothing."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from normwise.commit import Store, is_unbiased
from normwise.kernels.gpu.commit import commit
from normwise.kernels.gpu.kernel import ROWS, GpuKernel
from normwise.kernels.gpu.start import facts, start
from normwise.kernels.prepared import Given, Gradients, shaped
from normwise.kernels.reference import Recalled
from normwise.kernels.short import Ready
from normwise.memory import Memory
from normwise.moments import Moments
from normwise.transforms import recomputing

_REMEMBERED = Given(remembers=True)
MOST_COLUMNS = 2**16  # autograd does not free their statistics with what it saved: 1.5 MB at most
_BLOCK = 1024  # columns that the program of a commit takes at a time


class GpuReady(Ready):
    """The statistics are a tensor: the rows of tile.py, or given ones, mean and spread."""

    __slots__ = ()

    kernel: GpuKernel

    def room(self, x: Tensor) -> Tensor:
        """Where the numbers of each column go."""
        return x.new_empty((ROWS if self.use is None else 2, self.kernel.columns), dtype=torch.float32)

    def forward(
        self, statistics: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Output, and the sum of input and residual, if there is one; without autograd."""
        inputs = x, residual, weight, bias
        return self.kernel.launch_forward(inputs, None, statistics, is_given=self.use is not None)

    def backward(
        self,
        statistics: Tensor,
        saved: tuple[Tensor, Tensor | None, Tensor | None],
        d_output: Tensor,
        d_total: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> Gradients:
        """The gradients of the saved input or sum, of weight and of bias; all lie as the kernel reads them."""
        known = (*saved, statistics)
        return self.kernel.launch_backward(known, None, (d_output, d_total), wanted, is_given=self.use is not None)

    def moments(self, statistics: Tensor) -> Moments:
        """The batch's moments, with a dimension for each of the view's."""
        return cast("Moments", self.kernel.moments(_REMEMBERED, statistics))

    def commit(
        self, memory: Memory, remembers: tuple[str, ...], store: Store, statistics: Tensor, *, least: int
    ) -> bool:
        """Let a batch enter a memory that skips what is not finite, and has a number for each column, in order."""
        if recomputing():
            return True
        samples, rate, batches = self.plan.rows, memory.update_rate, store.batches
        if samples < least or store.pool or store.samples is not None or memory.nonfinite != "skip":
            return False
        counters = [counter for counter in (batches, store.skips) if counter is not None]
        if batches is not None and (batches.dtype is not torch.long or batches.numel() != 1):
            return False
        if (rate is None and batches is None) or not all(_is_plain(counter, statistics) for counter in counters):
            return False
        if not self._lie_in_order(store.statistics, statistics):
            return False
        *mean, spread = store.statistics
        tensors = statistics, mean[0] if mean else None, spread, batches, store.skips
        divisor, weight = float(samples - is_unbiased(memory, remembers)), -1.0 if rate is None else float(rate)
        start(
            self.kernel.started,
            facts(tensors),
            commit,
            1,
            (*tensors, self.kernel.columns, divisor, weight),
            {"BLOCK": _BLOCK},
            x=statistics,
        )
        increment_version((*store.statistics, *counters))
        return True

    def recall(self, remembered: tuple[Tensor, ...], statistics: Tensor) -> bool:
        """Put remembered statistics where the kernel finds them; whether they could be read."""
        if any(statistic.requires_grad for statistic in remembered):
            return False
        if not self._lie_in_order(remembered, statistics):
            return False
        *mean, spread = remembered
        torch.stack([(mean[0] if mean else torch.zeros_like(spread)).view(-1), spread.view(-1)], out=statistics)
        return True

    def recalled(self, statistics: Tensor) -> Recalled:
        """Given statistics as they were remembered."""
        kept = statistics if self.kernel.centers else statistics[1:]
        return Recalled(tuple(shaped(self.kernel, row) for row in kept))

    def _lie_in_order(self, remembered: tuple[Tensor, ...], statistics: Tensor) -> bool:
        """Whether a kernel may read and write remembered statistics: a float32 for each column, side by side."""
        return all(
            _is_plain(statistic, statistics)
            and statistic.dtype is torch.float32
            and statistic.numel() == self.kernel.columns
            and statistic.is_contiguous()
            for statistic in remembered
        )


def _is_plain(buffer: Tensor, statistics: Tensor) -> bool:
    """Whether a kernel may write a buffer: where the statistics are, and nothing looks on."""
    return (
        type(buffer) is Tensor
        and buffer.device == statistics.device
        and not buffer.is_inference()
        and not buffer.is_neg()
    )
