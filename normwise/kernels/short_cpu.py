"""The short way to the kernels for the CPU.

The statistics are an array: for few columns making one takes a tenth of a tensor's time. Since autograd does not watch
over them, what they may hold is limited.
"""

from __future__ import annotations

from array import array
from typing import TypeAlias, cast

import torch
from torch import Tensor

from normwise.commit import Store, commit_columns, recall_columns
from normwise.kernels.backends import extension
from normwise.kernels.cpu import CpuKernel
from normwise.kernels.prepared import Given, Gradients, read, reads, returned, shaped
from normwise.kernels.reference import Recalled, Use
from normwise.kernels.short import Ready
from normwise.memory import Memory
from normwise.moments import Moments

MOST_COLUMNS = 8192  # their statistics are 192 KB at most

Numbers: TypeAlias = "array[float]"

_ZERO = array("d", [0.0])
_REMEMBERED = Given(remembers=True)


class CpuReady(Ready):
    """What csrc/ is called with. The statistics are rows: inverse and mean; for a memory, inverse, mean and m2.

    Given ones are inverse, mean, and what the inverse was made of.
    """

    __slots__ = ("call", "numbers", "rows")

    kernel: CpuKernel

    def __init__(
        self, kernel: CpuKernel, strides: tuple[int, ...], use: Use | None, *, has_memory: bool, is_copied: bool
    ) -> None:
        super().__init__(kernel, strides, use, has_memory=has_memory, is_copied=is_copied)
        self.call = kernel.bytes_measured if use is None else kernel.bytes_given
        self.numbers, self.rows = kernel.columns * (3 if has_memory else 2), self.plan.rows

    def room(self, x: Tensor) -> Numbers:
        """Where the numbers of each column go."""
        return _ZERO * self.numbers

    def forward(
        self, statistics: Numbers, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Output, and the sum of input and residual, if there is one; without autograd."""
        output = torch.empty_like(x)
        total = None if residual is None else torch.empty_like(x)
        kernel = self.kernel
        if not reads(kernel, weight, bias):
            weight, bias = read(kernel, weight, bias)
        inverse, row = statistics.buffer_info()[0], kernel.row
        extension.forward(  # type: ignore[union-attr]  # whoever made a kernel has seen it there
            self.call,
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            0 if total is None else total.data_ptr(),
            output.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0,
            inverse + row if kernel.centers else 0,
            inverse,
            inverse + 2 * row if self.has_memory and self.use is None else 0,
            0,
            torch.get_num_threads(),
        )
        return output, total

    def backward(
        self,
        statistics: Numbers,
        saved: tuple[Tensor, Tensor | None, Tensor | None],
        d_output: Tensor,
        d_total: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> Gradients:
        """The gradients of the saved input or sum, of weight and of bias; all lie as the kernel reads them."""
        x, weight, bias = saved
        kernel = self.kernel
        is_read = reads(kernel, weight, bias)
        read_weight, read_bias = (weight, bias) if is_read else read(kernel, weight, bias)
        d_x = torch.empty_like(x) if wanted[0] else None
        d_weight = torch.empty_like(read_weight) if wanted[1] else None  # type: ignore[arg-type]  # it was given
        d_bias = torch.empty_like(read_bias) if wanted[2] else None  # type: ignore[arg-type]
        inverse = statistics.buffer_info()[0]
        extension.backward(  # type: ignore[union-attr]  # whoever made a kernel has seen it there
            self.call,
            x.data_ptr(),
            d_output.data_ptr(),
            0 if d_total is None else d_total.data_ptr(),
            0 if d_x is None else d_x.data_ptr(),
            0 if read_weight is None else read_weight.data_ptr(),
            0 if read_bias is None else read_bias.data_ptr(),
            0,
            inverse + kernel.row if kernel.centers else 0,
            inverse,
            0,
            0 if d_weight is None else d_weight.data_ptr(),
            0 if d_bias is None else d_bias.data_ptr(),
            torch.get_num_threads(),
        )
        if not is_read:
            d_weight, d_bias = returned(d_weight, weight), returned(d_bias, bias)
        return d_x, d_weight, d_bias

    def moments(self, statistics: Numbers) -> Moments:
        """The batch's moments, with a dimension for each of the view's."""
        return cast("Moments", self.kernel.moments(_REMEMBERED, _rows(statistics)))

    def commit(
        self, memory: Memory, remembers: tuple[str, ...], store: Store, statistics: Numbers, *, least: int
    ) -> bool:
        """Let a batch enter a memory, if it is the commonest: see `commit_columns`."""
        return commit_columns(memory, remembers, store, statistics, self.rows, least=least)

    def recall(self, remembered: tuple[Tensor, ...], statistics: Numbers) -> bool:
        """Put remembered statistics where the kernel finds them; whether they could be read."""
        return recall_columns(remembered, statistics, self.kernel.eps)

    def recalled(self, statistics: Numbers) -> Recalled:
        """Given statistics as they were remembered."""
        _, mean, spread = _rows(statistics).float()
        kept = (mean, spread) if self.kernel.centers else (spread,)
        return Recalled(tuple(shaped(self.kernel, row) for row in kept))


def _rows(statistics: Numbers) -> Tensor:
    """The three rows of a layer with a memory."""
    return torch.frombuffer(statistics, dtype=torch.float64).view(3, -1)
