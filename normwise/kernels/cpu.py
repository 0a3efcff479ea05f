"""The compiled kernels for the CPU: how a prepared call reaches csrc/."""

from __future__ import annotations

import struct
from typing import ClassVar

import torch
from torch import Tensor

from normwise.kernels.backends import extension
from normwise.kernels.choose import DTYPES, NORMALIZERS
from normwise.kernels.geometry import Geometry
from normwise.kernels.prepared import (
    Forward,
    Given,
    Gradients,
    Inputs,
    Kernel,
    Saved,
    in_order,
    lying,
    mask_bytes,
    read,
    returned,
    shaped,
    strides_of,
)
from normwise.kernels.reference import Recalled, Steps
from normwise.moments import Moments
from normwise.plan import Over
from normwise.pointwise import FUNCTIONS

_ACTIVATIONS = (None, *FUNCTIONS)  # in the order of csrc/call.h
_CALL = struct.Struct("=15qd6i")
_WIDE = torch.float64


class CpuKernel(Kernel):
    """What `csrc/call.h` wants to know, for the batch's statistics and for given ones.

    The statistics of a call are (4, columns) in float64: inverse, mean, m2, count, as many as are wanted.
    """

    __slots__ = ("bytes_given", "bytes_measured", "row")

    on_cpu: ClassVar[bool] = True

    def __init__(self, steps: Steps, geometry: Geometry, over: Over, dtype: torch.dtype) -> None:
        super().__init__(steps, geometry, over, dtype)
        self.row = self.columns * _WIDE.itemsize
        self.bytes_measured = self._call((1, 1, 1, 1), measured=True)
        self.bytes_given = self._call((1, 1, 1, 1), measured=False)

    def forward(self, given: Given, inputs: Inputs) -> Forward:
        """Run the kernel, without autograd."""
        x, residual, weight, bias = inputs
        output = torch.empty_like(x)
        total = None if residual is None else torch.empty_like(x)
        weight, bias = read(self, weight, bias)
        mask = None if given.valid is None else mask_bytes(self, given.valid)
        measured = given.recalled is None
        statistics = self._room(given) if given.recalled is None else self._recalled(given.recalled)
        inverse, mean, m2, count = self._addresses(statistics, given)
        extension.forward(  # type: ignore[union-attr]  # whoever made a kernel has seen it there
            self._bytes(None if mask is None else mask.shape, measured=measured),  # type: ignore[arg-type]
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            0 if total is None else total.data_ptr(),
            output.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            mean,
            inverse,
            m2,
            count,
            torch.get_num_threads(),
        )
        return Forward(output, total, statistics, weight, bias, mask)

    def backward(
        self, given: Given, saved: Saved, d_output: Tensor, d_total: Tensor | None, wanted: tuple[bool, ...]
    ) -> Gradients:
        """Those gradients of input, weight and bias that are wanted."""
        x, weight, bias, statistics = saved
        strides = x.stride()
        d_output = lying(d_output, strides, x.dtype)
        d_total = None if d_total is None else lying(d_total, strides, x.dtype)
        d_x = torch.empty_like(x) if wanted[0] else None
        read_weight, read_bias = read(self, weight, bias)
        d_weight = torch.empty_like(read_weight) if wanted[1] and read_weight is not None else None
        d_bias = torch.empty_like(read_bias) if wanted[2] and read_bias is not None else None
        mask = None if given.valid is None else mask_bytes(self, given.valid)
        inverse, mean, _, count = self._addresses(statistics, given)
        extension.backward(  # type: ignore[union-attr]  # whoever made a kernel has seen it there
            self._bytes(None if mask is None else mask.shape, measured=given.recalled is None),  # type: ignore[arg-type]
            x.data_ptr(),
            d_output.data_ptr(),
            0 if d_total is None else d_total.data_ptr(),
            0 if d_x is None else d_x.data_ptr(),
            0 if read_weight is None else read_weight.data_ptr(),
            0 if read_bias is None else read_bias.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            mean,
            inverse,
            count,
            0 if d_weight is None else d_weight.data_ptr(),
            0 if d_bias is None else d_bias.data_ptr(),
            torch.get_num_threads(),
        )
        return d_x, returned(d_weight, weight), returned(d_bias, bias)

    def moments(self, given: Given, statistics: Tensor) -> Moments | None:
        """The batch's moments, with a dimension for each of the view's, if they are wanted."""
        if not given.remembers:
            return None
        m2 = shaped(self, statistics[2])
        mean = shaped(self, statistics[1]) if self.centers else m2 * 0
        return Moments(self.steps.plan.rows if given.valid is None else shaped(self, statistics[3]), mean, m2)

    def _bytes(self, mask: tuple[int, int, int, int] | None, *, measured: bool) -> bytes:
        """The bytes of `Call`; `mask` is the mask's sizes in the four groups."""
        if mask is None:
            return self.bytes_measured if measured else self.bytes_given
        return self._call(mask, measured=measured)

    def _call(self, mask: tuple[int, int, int, int], *, measured: bool) -> bytes:
        geometry, steps = self.geometry, self.steps
        return _CALL.pack(
            *geometry.sizes,
            *geometry.weights,
            *strides_of(mask),
            self.eps,
            DTYPES.index(self.dtype),
            NORMALIZERS.index(type(steps.normalizer)),
            _ACTIVATIONS.index(steps.activation),
            0 if geometry.by_runs else 1,
            measured,
            geometry.has_dense_columns,
        )

    def _room(self, given: Given) -> Tensor:
        """Where the kernel puts the numbers of each column."""
        rows = 4 if given.valid is not None else 3 if given.remembers else 2 if self.centers else 1
        return torch.empty((rows, self.columns), dtype=_WIDE, device="cpu")  # whatever the default device is

    def _addresses(self, statistics: Tensor, given: Given) -> tuple[int, int, int, int]:
        """Where the rows of the statistics begin; 0 for those that are not there, or not wanted."""
        first, row = statistics.data_ptr(), statistics.shape[1] * statistics.element_size()
        rows = statistics.shape[0]
        mean = first + row if rows > 1 and self.centers else 0
        m2 = first + 2 * row if rows > 2 else 0
        return first, mean, m2, first + 3 * row if rows > 3 else 0

    def _recalled(self, recalled: Recalled) -> Tensor:
        """Remembered statistics as the kernel reads them: inverse and mean of each column."""
        *mean, spread = recalled.statistics
        return in_order(self, torch.stack([(spread.to(_WIDE) + self.eps).rsqrt(), *(m.to(_WIDE) for m in mean)]))
