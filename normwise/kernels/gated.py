"""The output times the function of a gate, for kernels that do not multiply themselves."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from normwise.kernels.reference import Steps, counted, gated, wide_dtype
from normwise.pointwise import OF_GATES, Gate
from normwise.transforms import being_traced, derivatives, is_mapped


def multiply(output: Tensor, gate: Tensor, steps: Steps) -> Tensor:
    """`reference.gated`, of which autograd keeps no more than output and gate."""
    if being_traced() or not (torch.is_grad_enabled() and (output.requires_grad or gate.requires_grad)):
        return gated(output, gate, steps)
    product: Tensor = _Gated.apply(steps._replace(recalled=None), output, gate)  # type: ignore[no-untyped-call]
    return product


class _Gated(torch.autograd.Function):
    """Output y and gate g -> y f(g), with the gradients d f(g) and d y f'(g); derivatives of these by definition."""

    @staticmethod
    def forward(ctx: Any, steps: Steps, output: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(output, gate, steps.valid)
        ctx.steps = steps._replace(valid=None)
        return gated(output, gate, steps)

    @staticmethod
    def backward(ctx: Any, d_product: Tensor) -> tuple[Tensor | None, ...]:
        output, gate, valid = ctx.saved_tensors
        steps: Steps = ctx.steps._replace(valid=valid)
        _, *wanted = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_mapped(d_product):
            with torch.enable_grad():
                return None, *derivatives(lambda y, g: gated(y, g, steps), (output, gate), (d_product,), wanted)
        function, wide = OF_GATES[cast("Gate", steps.gate)], wide_dtype(output)
        d_product, seen = counted(d_product, steps).to(wide), counted(gate, steps).to(wide)
        d_output = (d_product * function.apply(seen)).to(output.dtype) if wanted[0] else None
        d_gate = function.backward(d_product * output, seen).to(gate.dtype) if wanted[1] else None
        return None, d_output, d_gate
