"""The four steps in eager mode: the reference's forward, and its derivative in closed form.

Autograd would record some twenty operations and keep most of what they made. The closed form keeps the input, which is
there anyway, and a few numbers a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from normwise.kernels.reference import Parameters, Result, Steps, four_steps
from normwise.moments import Moments, only, sample_count
from normwise.normalizers import L2, RMS, Line, Normalizer, Standardize
from normwise.pointwise import FUNCTIONS
from normwise.recoveries import Affine, Recovery, Scale
from normwise.sums import column_sum
from normwise.transforms import being_traced, derivatives, is_mapped

# The normalizers whose derivative this is; those that subtract a mean, and divide a sum of squares by the count; the
# recoveries that it knows.
_NORMALIZERS: tuple[type[Normalizer], ...] = (Standardize, RMS, L2)
_CENTERS, _AVERAGES = (Standardize,), (Standardize, RMS)
_RECOVERIES: tuple[type[Recovery] | type[None], ...] = (Affine, Scale, type(None))


def run(x: Tensor, steps: Steps, parameters: Parameters = ()) -> Result:
    """`four_steps`, differentiated in closed form where that is known and nothing but ordinary autograd looks on."""
    if x.numel() == 0 or being_traced() or not _known(steps) or not _differentiates(x, parameters):
        return four_steps(x, steps, parameters)
    weight, bias = [*parameters, None, None][:2]
    output, *moments = _ClosedForm.apply(steps, x, weight, bias)  # type: ignore[no-untyped-call]
    if moments[0] is None:
        return Result(output, None, None)
    count, mean, m2 = moments
    return Result(output, Moments(count, mean, m2), None)


def gradients(
    d_output: Tensor, x: Tensor, steps: Steps, parameters: Parameters, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of an input that is measured, and of the parameters, shaped as those; not differentiable."""
    weight, bias = [*parameters, None, None][:2]
    line = cast("Line", four_steps(x, steps, parameters).line)
    return _in_closed_form(_Saved(x, weight, bias, steps, line, None, None, True), d_output, wanted)


def _known(steps: Steps) -> bool:
    recalled = steps.recalled
    if recalled is not None and any(statistic.requires_grad for statistic in recalled.statistics):
        return False
    return type(steps.normalizer) in _NORMALIZERS and type(steps.recovery) in _RECOVERIES


def _differentiates(x: Tensor, parameters: Parameters) -> bool:
    wanted = x.requires_grad or any(isinstance(p, Tensor) and p.requires_grad for p in parameters)
    return wanted and torch.is_grad_enabled()


class _Saved(NamedTuple):
    """What the backward needs: the input and the parameters as they came, and the numbers of each column."""

    x: Tensor
    weight: Tensor | float | None
    bias: Tensor | float | None
    steps: Steps
    line: Line
    correction: tuple[Tensor, Tensor] | None
    enough: Tensor | None  # in which columns the line depends on the input; None: in all or none
    measured: bool  # whether it does in any


class _ClosedForm(torch.autograd.Function):
    """Input, weight and bias -> output, and the moments (not differentiable).

    With v the values, s the slope, n the samples of a column and means taken over the column:
    dx = s (dv - mean(dv) - v mean(dv v)), without mean(dv) where no mean is subtracted, with the sum of dv v where no
    mean square is taken, and dx = s dv where the statistics were remembered. An activation's derivative is taken at the
    recovered values, which are computed again. Where a derivative of this derivative is wanted, it is taken of the
    definition instead, and so is right at every order.
    """

    @staticmethod
    def forward(
        ctx: Any, steps: Steps, x: Tensor, weight: Tensor | float | None, bias: Tensor | float | None
    ) -> tuple[Tensor, Any, Tensor | None, Tensor | None]:
        result = four_steps(x, steps, _given(weight, bias))
        line = cast("Line", result.line)  # `run` has seen that there is something to normalize
        measured = result.moments is not None
        _save(ctx, _Saved(x, weight, bias, steps, line, result.correction, result.enough, measured))
        moments = result.moments or (None, None, None)
        ctx.mark_non_differentiable(*(m for m in moments if isinstance(m, Tensor)))
        # a view of the values, it would refuse to be changed in place, as `nn.ReLU(inplace=True)` does: `data` is none
        return result.output.data, *moments

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        saved, (_, *wanted) = _load(ctx), ctx.needs_input_grad
        by_definition = torch.is_grad_enabled() or is_mapped(d_output)
        return None, *(_by_definition if by_definition else _in_closed_form)(saved, d_output, wanted)


def _by_definition(saved: _Saved, d_output: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Differentiable gradients: those that autograd makes of the definition; also mapped over many cotangents."""

    def defined(x: Tensor, weight: Tensor | float | None, bias: Tensor | float | None) -> Tensor:
        return four_steps(x, saved.steps, _given(weight, bias)).output

    with torch.enable_grad():
        return derivatives(defined, (saved.x, saved.weight, saved.bias), (d_output,), wanted)


def _in_closed_form(saved: _Saved, d_output: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    steps, line = saved.steps, saved.line
    plan, valid, wide = steps.plan, steps.valid, line.inverse.dtype
    values = line.values(only(saved.x.to(wide).reshape(plan.view), valid), valid)
    normalized = values if saved.correction is None else values * saved.correction[0] + saved.correction[1]
    d_values = only(d_output.to(wide).reshape(plan.view), valid)
    if steps.activation is not None:
        d_values = FUNCTIONS[steps.activation].backward(d_values, _recovered(normalized, saved))
    d_x = d_weight = d_bias = None
    if wanted[2]:
        d_bias = _sum_to(d_values, saved.bias)
    if wanted[1]:
        d_weight = _sum_to(d_values * normalized, saved.weight)
    if wanted[0]:
        for factor in (saved.weight, None if saved.correction is None else saved.correction[0]):
            if factor is not None:
                d_values = d_values * factor
        if saved.measured:
            d_values = d_values - only(_through_statistics(d_values, values, steps), saved.enough)
        d_x = only(line.slope * d_values, valid).to(saved.x.dtype).reshape(plan.shape)
    return d_x, d_weight, d_bias


def _recovered(normalized: Tensor, saved: _Saved) -> Tensor:
    """What the activation was applied to."""
    recovery = saved.steps.recovery
    return normalized if recovery is None else recovery.recover(normalized, *_given(saved.weight, saved.bias))


def _through_statistics(d_values: Tensor, values: Tensor, steps: Steps) -> Tensor:
    """The part of a gradient that would only move the column's statistics."""
    dims = steps.plan.reduced
    count = sample_count(values.shape, dims, steps.valid)
    if isinstance(count, Tensor):
        count = count.clamp_min(1)
    kind = type(steps.normalizer)
    along = values * (column_sum(d_values * values, dims) / (count if kind in _AVERAGES else 1))
    if kind in _CENTERS:
        along = along + column_sum(d_values, dims) / count
    return along


def _sum_to(x: Tensor, parameter: Tensor | float | None) -> Tensor:
    """The sum over the dimensions along which a parameter was repeated."""
    shape = () if not isinstance(parameter, Tensor) else parameter.shape
    return column_sum(x, tuple(dim for dim, size in enumerate(shape) if size == 1 and x.shape[dim] != 1))


def _given(weight: Tensor | float | None, bias: Tensor | float | None) -> Parameters:
    return [parameter for parameter in (weight, bias) if parameter is not None]


def _save(ctx: Any, saved: _Saved) -> None:
    """Tensors where autograd watches over them, the rest beside them."""
    steps, line = saved.steps, saved.line
    parameters = [p if isinstance(p, Tensor) else None for p in (saved.weight, saved.bias)]
    statistics = () if steps.recalled is None else steps.recalled.statistics
    of_line = (line.scale, line.inverse, *(saved.correction or (None, None)), saved.enough)
    single = (saved.x, *parameters, steps.valid, *of_line)
    ctx.save_for_backward(*single, *line.offsets, *statistics)
    recalled = None if steps.recalled is None else steps.recalled._replace(statistics=())
    ctx.steps, ctx.offsets = steps._replace(valid=None, recalled=recalled), len(line.offsets)
    ctx.numbers = [None if isinstance(p, Tensor) else p for p in (saved.weight, saved.bias)]
    ctx.measured = saved.measured


def _load(ctx: Any) -> _Saved:
    x, weight, bias, valid, scale, inverse, r, d, enough, *rest = ctx.saved_tensors
    weight, bias = (n if p is None else p for p, n in zip((weight, bias), ctx.numbers, strict=True))
    line = Line(scale, tuple(rest[: ctx.offsets]), inverse)
    recalled = ctx.steps.recalled
    if recalled is not None:
        recalled = recalled._replace(statistics=tuple(rest[ctx.offsets :]))
    steps = ctx.steps._replace(valid=valid, recalled=recalled)
    return _Saved(x, weight, bias, steps, line, None if r is None else (r, d), enough, ctx.measured)
