"""The kernels for GPUs: how a prepared call reaches them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from triton import knobs

from normwise.kernels import launch
from normwise.kernels.choose import NORMALIZERS
from normwise.kernels.geometry import Geometry
from normwise.kernels.gpu import divided_backward, divided_forward, resident
from normwise.kernels.gpu.arguments import (
    NO_MASK,
    BackwardTensors,
    ForwardTensors,
    mask_places,
    parameter_places,
    sizes_of,
)
from normwise.kernels.gpu.start import Started, facts, start
from normwise.kernels.launch import Device, Grid, Layout, grid_of, layout_of, sums_shape, view_of
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
    shaped,
    strides_of,
)
from normwise.kernels.reference import Recalled, Steps
from normwise.moments import Moments
from normwise.plan import Over
from normwise.pointwise import OF_GATES

_NAMED = (None, *OF_GATES)  # functions, in the order of elements.py
_INTERPRETED = Device(processors=2, cache=2**16)  # as small as the tensors that one interprets kernels on
ROWS, _ROWS_OF_PARTS = 6, 5  # of a column's numbers


class GpuKernel(Kernel):
    """A view, its layouts, and what the compiler is told.

    The statistics of a call are (6, columns) in float32, the rows of tile.py; remembered ones (2, columns), mean and
    spread.
    """

    on_cpu: ClassVar[bool] = knobs.runtime.interpret
    multiplies: ClassVar[bool] = True
    __slots__ = (
        "activation",
        "gate",
        "grids",
        "known",
        "layouts",
        "normalizer",
        "places",
        "samples",
        "sizes",
        "started",
        "view",
    )

    def __init__(self, steps: Steps, geometry: Geometry, over: Over, dtype: torch.dtype) -> None:
        super().__init__(steps, geometry, over, dtype)
        self.view = view_of(geometry)
        self.known, *self.sizes = sizes_of(self.view)
        self.places = parameter_places(self.view)
        _, r0, _, r1 = self.view.sizes
        self.samples = float(r0 * r1)
        self.layouts = tuple(layout_of(r0, r1, launch.LIMITS, backward=backward) for backward in (False, True))
        self.grids: dict[tuple[torch.device, Layout, bool], Grid] = {}
        self.started: Started = {}
        self.normalizer = NORMALIZERS.index(type(steps.normalizer))
        self.activation, self.gate = _NAMED.index(steps.activation), _NAMED.index(steps.gate)

    def forward(self, given: Given, inputs: Inputs) -> Forward:
        """Run the kernel, without autograd."""
        x, _, weight, bias = inputs
        mask = None if given.valid is None else mask_bytes(self, given.valid)
        if given.recalled is None:
            statistics = x.new_empty((ROWS, self.columns), dtype=torch.float32)
        else:
            statistics = self._recalled(given.recalled)
        output, total = self.launch_forward(inputs, mask, statistics, given.gate, is_given=given.recalled is not None)
        return Forward(output, total, statistics, weight, bias, mask)

    def launch_forward(
        self, inputs: Inputs, mask: Tensor | None, statistics: Tensor, gate: Tensor | None = None, *, is_given: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Output, and the sum of input and residual, if there is one; `statistics` are written, or given."""
        x, residual, weight, bias = inputs
        output = torch.empty_like(x)
        total = None if residual is None else torch.empty_like(x)
        read_weight, read_bias = self._read(weight), self._read(bias, offset=False)
        tensors = ForwardTensors(x, residual, total, output, read_weight, read_bias, gate, mask, statistics)
        layout = self.layouts[0]
        grid = self._grid(x, layout, adds_up=False)
        if layout.is_resident and not is_given:
            told = {"ENLARGES": self.eps == 0}
            self._launch(resident.forward, grid.blocks, layout, tensors, (self.samples, self.eps), told)
        else:
            self._launch_divided_forward(tensors, layout, grid, is_given=is_given)
        return output, total

    def _launch_divided_forward(self, tensors: ForwardTensors, layout: Layout, grid: Grid, *, is_given: bool) -> None:
        programs = grid.blocks * layout.parts
        if not is_given:
            programs = grid.tickets(layout.parts)
            tensors = tensors._replace(
                partial=tensors.statistics.new_empty((_ROWS_OF_PARTS, self.columns, layout.parts)),
                counters=_counters(tensors.x, grid),
            )
        told = {"PARTS": layout.joined_at_once, "ENLARGES": self.eps == 0, "IS_GIVEN": is_given}
        numbers = layout.tiles, layout.parts, grid.per_group, self.eps
        self._launch(divided_forward.forward, programs, layout, tensors, numbers, told)

    def backward(
        self, given: Given, saved: Saved, d_output: Tensor, d_total: Tensor | None, wanted: tuple[bool, ...]
    ) -> Gradients:
        """Those gradients of input, weight and bias, and of the gate if there is one, that are wanted."""
        x = saved[0]
        mask = None if given.valid is None else mask_bytes(self, given.valid)
        d_output = lying(d_output, x.stride(), x.dtype)
        d_total = None if d_total is None else lying(d_total, x.stride(), x.dtype)
        is_given = given.recalled is not None
        return self.launch_backward(saved, mask, (d_output, d_total), wanted, given.gate, is_given=is_given)

    def launch_backward(
        self,
        saved: Saved,
        mask: Tensor | None,
        d_outputs: tuple[Tensor, Tensor | None],
        wanted: tuple[bool, ...],
        gate: Tensor | None = None,
        *,
        is_given: bool,
    ) -> Gradients:
        """The same from gradients that lie as the input does: that of the output, and that of the sum."""
        x, weight, bias, statistics = saved
        layout = self.layouts[1]
        grid = self._grid(x, layout, adds_up=wanted[1] or wanted[2])
        sums = x.new_empty((sum(wanted[1:3]), *sums_shape(self.view, layout, grid)), dtype=torch.float32)
        left = iter(sums)
        tensors = BackwardTensors(
            x,
            *d_outputs,
            torch.empty_like(x) if wanted[0] else None,
            self._read(weight),
            self._read(bias, offset=False),
            gate,
            None if gate is None or not wanted[3] else torch.empty_like(gate),
            mask,
            statistics,
            next(left) if wanted[1] else None,
            next(left) if wanted[2] else None,
        )
        if layout.is_resident and not is_given:
            self._launch(resident.backward, grid.k0 * grid.slots, layout, tensors, (grid.loop,), {})
        else:
            self._launch_divided_backward(tensors, layout, grid, is_given=is_given)
        found = iter(self._summed(sums))
        d_weight, d_bias = (next(found) if is_wanted else None for is_wanted in wanted[1:3])
        gradients = tensors.d_x, _returned(d_weight, weight), _returned(d_bias, bias)
        return gradients if gate is None else (*gradients, tensors.d_gate)

    def _launch_divided_backward(self, tensors: BackwardTensors, layout: Layout, grid: Grid, *, is_given: bool) -> None:
        is_measured = not is_given and tensors.d_x is not None
        programs = grid.k0 * grid.slots * layout.parts
        if is_measured:
            programs = grid.tickets(layout.parts)
            tensors = tensors._replace(
                partial=tensors.statistics.new_empty((2, self.columns, layout.parts)),
                sums=tensors.statistics.new_empty((2, self.columns)),
                counters=_counters(tensors.x, grid),
            )
        told = {"PARTS": layout.joined_at_once, "IS_GIVEN": is_given, "IS_MEASURED": is_measured}
        numbers = layout.tiles, layout.parts, grid.per_group, grid.loop, self.eps
        self._launch(divided_backward.backward, programs, layout, tensors, numbers, told)

    def moments(self, given: Given, statistics: Tensor) -> Moments | None:
        """The batch's moments, with a dimension for each of the view's, if they are wanted."""
        if not given.remembers:
            return None
        scale, high, low, squares, count, _ = statistics.double()
        m2 = shaped(self, squares / scale / scale)
        mean = shaped(self, (high + low) / scale)
        return Moments(self.steps.plan.rows if given.valid is None else shaped(self, count), mean, m2)

    def _launch(
        self,
        kernel: Any,
        programs: int,
        layout: Layout,
        tensors: ForwardTensors | BackwardTensors,
        numbers: tuple[float, ...],
        told: Mapping[str, int],
    ) -> None:
        """Start a kernel's programs; `told` is for the compiler."""
        mask, tile = tensors.mask, layout.tile
        valid = NO_MASK if mask is None else mask_places(self.view, strides_of(mask.shape))  # type: ignore[arg-type]
        start(
            self.started,
            (None if mask is None else mask.shape, *told.values(), *facts(tensors)),
            kernel,
            programs,
            (tensors, self.known, self.places, valid, *self.sizes, *numbers),
            {
                "R": tile.r,
                "K": tile.k,
                "S": tile.s,
                "NORMALIZER": self.normalizer,
                "ACTIVATION": self.activation,
                "GATE": self.gate,
                **told,
            },
            x=tensors.x,
            num_warps=layout.warps,
            maxnreg=layout.registers,
        )

    def _grid(self, x: Tensor, layout: Layout, *, adds_up: bool) -> Grid:
        key = x.device, layout, adds_up
        grid = self.grids.get(key)
        if grid is None:
            device = _device(x.device)
            grid = grid_of(self.view, layout, device, self.dtype.itemsize, launch.LIMITS, adds_up=adds_up)
            self.grids[key] = grid
        return grid

    def _summed(self, sums: Tensor) -> Tensor:
        """The gradients of parameters, (n, size), from what tiles left of them, (n, *sums_shape)."""
        weights = self.view.weights
        n, k0, slots, r, k, s = sums.shape
        period_k = min(weights.period_k1, k)
        by_period = sums.view(n, k0 // weights.period_k0, weights.period_k0, slots, r, k // period_k, period_k, s)
        strides = weights.k0, weights.r0, weights.k1, weights.r1
        order = sorted(range(4), key=lambda axis: -strides[axis])
        return by_period.sum((1, 3, 5)).permute(0, *(1 + axis for axis in order)).reshape(n, self.size)

    def _read(self, parameter: Tensor | None, *, offset: bool = True) -> Tensor | None:
        """A parameter as the kernels read it: contiguous, of any dtype."""
        if parameter is None:
            return None
        parameter = parameter.detach()
        return (parameter.float() + self.offset if offset and self.offset else parameter).contiguous()

    def _recalled(self, recalled: Recalled) -> Tensor:
        """Remembered statistics as the kernels read them: mean and spread of each column."""
        *mean, spread = recalled.statistics
        return in_order(self, torch.stack([*mean, spread] if mean else [spread * 0, spread]).float()).contiguous()


def _returned(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gradient of the parameter's dtype and shape."""
    if gradient is None or parameter is None:
        return None
    return gradient.view(parameter.shape).to(parameter.dtype)


def _counters(x: Tensor, grid: Grid) -> Tensor:
    """The next ticket, and for each block how many of its parts are done, and whether they are joined."""
    return torch.zeros(1 + 2 * grid.blocks, dtype=torch.int32, device=x.device)


@lru_cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return _INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.L2_cache_size)
