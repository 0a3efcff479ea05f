"""The definition: the four steps in plain torch operations, for every pattern and every device.

Every other kernel is checked against this one, and this one against torch.nn and the formula in float64. Whoever traces
a call is shown this one, but for what operator.py takes under `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from normwise.moments import Moments, only
from normwise.normalizers import Line, Normalizer, Standardize
from normwise.plan import Over, Plan, place
from normwise.pointwise import FUNCTIONS, OF_GATES, Activation, Gate
from normwise.recoveries import Affine, Recovery

Parameters: TypeAlias = Sequence[Tensor | float]
Use: TypeAlias = Literal["instead", "fallback", "correct"]


class Recalled(NamedTuple):
    """Remembered statistics, shaped to broadcast against the view, and what they are for.

    "instead": of this batch's statistics; "fallback": for columns with fewer than `least` samples; "correct": batch
    renormalization within `limits`, which are r_max and d_max.
    """

    statistics: tuple[Tensor, ...]
    use: Use = "instead"
    least: int = 2
    limits: tuple[Tensor, Tensor] | None = None


class Steps(NamedTuple):
    """What is done to a tensor of the plan's shape."""

    plan: Plan
    normalizer: Normalizer
    recovery: Recovery | None = None
    valid: Tensor | None = None  # what counts, shaped to broadcast against the view
    recalled: Recalled | None = None
    activation: Activation | None = None  # of the recovered values
    gate: Gate | None = None  # the function of a gate, by which the output is multiplied: `gated` does that


class Result(NamedTuple):
    """The output, the batch's moments if it was measured, and how the normalized values come from the view."""

    output: Tensor
    moments: Moments | None
    line: Line | None  # None where there is nothing to normalize
    correction: tuple[Tensor, Tensor] | None = None  # r and d
    enough: Tensor | None = None  # which columns were normalized with the batch's statistics; None: all or none


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that statistics and parameters are computed in: the input's, float32 at least."""
    if not x.is_floating_point():
        raise TypeError(f"a normalization needs floating-point input, not {x.dtype}")
    return torch.promote_types(x.dtype, torch.float32)


def four_steps(x: Tensor, steps: Steps, parameters: Parameters = ()) -> Result:
    """Reshape, normalize, recover, output.

    Args:
        x: The input, of the plan's shape.
        steps: What is done to it.
        parameters: The recovery's, shaped to broadcast against the view: `placed` does that.
    """
    view = only(x.to(wide_dtype(x)).reshape(steps.plan.view), steps.valid)
    if x.numel() == 0:
        values, result = view, Result(view, None, None)
    else:
        values, result = _normalize(view, steps, x.dtype)
    if result.line is not None and _multiplies_out(steps, parameters):
        weight, bias = parameters
        values = result.line.recovered(view, weight, bias)
    elif steps.recovery is not None:
        values = steps.recovery.recover(values, *parameters)
    if steps.activation is not None:
        values = FUNCTIONS[steps.activation].apply(values)
    output = only(values, steps.valid).to(x.dtype).reshape(steps.plan.shape)
    return result._replace(output=output)


def gated(output: Tensor, gate: Tensor, steps: Steps) -> Tensor:
    """The output times the function of a gate.

    Args:
        output: Of the four steps, so 0 where nothing counts.
        gate: Of the same shape, and of any dtype.
        steps: What was done, with the function.
    """
    factor = OF_GATES[cast("Gate", steps.gate)].apply(counted(gate, steps).to(wide_dtype(output)))
    return (output * factor).to(output.dtype)


def counted(x: Tensor, steps: Steps) -> Tensor:
    """What is of the input's shape, 0 where nothing counts."""
    return x if steps.valid is None else only(x.reshape(steps.plan.view), steps.valid).reshape(x.shape)


def placed(
    recovery: Recovery | None, parameters: Sequence[Tensor | None], over: Over, plan: Plan, x: Tensor
) -> Parameters:
    """The recovery's parameters for the view of an input; one that is None has the value it starts from."""
    if recovery is None:
        return ()
    starts = recovery.parameters.values()
    wide = wide_dtype(x)
    return [
        start if parameter is None else place(parameter.to(wide), over, plan)
        for start, parameter in zip(starts, parameters, strict=True)
    ]


def _normalize(view: Tensor, steps: Steps, dtype: torch.dtype) -> tuple[Tensor, Result]:
    """Step 2: the normalized values, and the rest of the result."""
    recalled, valid = steps.recalled, steps.valid
    remembered = None if recalled is None else steps.normalizer.recall(recalled.statistics, dtype)
    if recalled is not None and remembered is not None and recalled.use == "instead":
        values = remembered.values(view, valid)
        return values, Result(values, None, remembered)
    values, line, moments = steps.normalizer.normalize(view, steps.plan.reduced, dtype, valid)
    result = Result(values, moments, line)
    if recalled is None or remembered is None:
        return values, result
    enough = torch.zeros_like(moments.mean) + moments.count >= recalled.least
    if recalled.limits is not None:
        r, d = _correction(line, moments, remembered, recalled.limits)
        r, d = torch.where(enough, r, torch.ones_like(r)), torch.where(enough, d, torch.zeros_like(d))
        values, result = values * r + d, result._replace(correction=(r, d))
    if recalled.use == "fallback":
        line = _where(enough, line, remembered)
        values, result = line.values(view, valid), result._replace(line=line, enough=enough)
        if result.correction is not None:
            r, d = result.correction
            values = values * r + d
    return values, result


def _multiplies_out(steps: Steps, parameters: Parameters) -> bool:
    """Whether a compiler is shown one slope for each column and weight, and not the normalized values.

    Gradients of statistics, weight and bias are then all made of two sums over the elements with the same slope, in one
    loop; from values they are sums over different axes, in a loop each. There must be such elements: those of a
    normalized axis that the parameters do not run along. A mask and remembered statistics need the values themselves,
    and a remembered mean is too large to be multiplied out.
    """
    if not is_compiling() or type(steps.normalizer) is not Standardize or type(steps.recovery) is not Affine:
        return False
    if steps.valid is not None or steps.recalled is not None:
        return False
    shapes = [parameter.shape for parameter in parameters if isinstance(parameter, Tensor)]
    view, reduced = steps.plan.view, steps.plan.reduced
    return any(view[dim] != 1 and all(shape[dim] == 1 for shape in shapes) for dim in reduced)


def _where(condition: Tensor, a: Line, b: Line) -> Line:
    """The one line where the condition holds, the other elsewhere."""
    one, none = torch.ones_like(a.inverse), torch.zeros_like(a.inverse)
    scale = None
    if a.scale is not None or b.scale is not None:
        scale = torch.where(condition, one if a.scale is None else a.scale, one if b.scale is None else b.scale)
    offsets = zip_longest(a.offsets, b.offsets, fillvalue=none)
    return Line(
        scale,
        tuple(torch.where(condition, of_a, of_b) for of_a, of_b in offsets),
        torch.where(condition, a.inverse, b.inverse),
    )


def _correction(line: Line, moments: Moments, remembered: Line, limits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Batch renormalization's r and d: what turns this batch's line into the memory's, within the limits."""
    r_max, d_max = limits
    slope = remembered.slope.detach()
    r = (slope / line.slope.detach()).clamp(1 / r_max, r_max)
    distance = moments.mean
    for offset in remembered.offsets:
        distance = distance - offset
    return r, (distance * slope).clamp(-d_max, d_max).to(r.dtype)
