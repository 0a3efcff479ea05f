"""Step 2 in eager mode: the reference's forward, and its derivative in closed form.

Autograd would record some twenty operations and keep most of what they made. The closed form keeps the normalized
values, which the recovery needs anyway, and one number a column.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise.kernels.reference import by_definition
from normwise.moments import Moments
from normwise.normalizers import RMS, Normalized, Normalizer, Standardize
from normwise.plan import dim_product

# The normalizers whose derivative this is, and whether they subtract the mean.
_CENTERS: dict[type[Normalizer], bool] = {Standardize: True, RMS: False}


def closed_form(normalizer: Normalizer, view: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Normalized:
    """`normalizer.normalize`, differentiated by the closed form where nothing but ordinary autograd looks on."""
    known = type(normalizer) in _CENTERS
    if not (known and torch.is_grad_enabled() and view.requires_grad) or _under_a_transform():
        return by_definition(normalizer, view, dims, dtype)
    values, slope, mean, m2 = _ClosedForm.apply(normalizer, view, dims, dtype)  # type: ignore[no-untyped-call]
    return Normalized(values, slope, Moments(dim_product(view.shape, dims), mean, m2))


class _ClosedForm(torch.autograd.Function):
    """View -> values, slope, and the moments (not differentiable).

    With v the values, s the slope, n the rows of a column and means taken over the column:
    dx = s (dv - mean(dv) - v mean(dv v)) - ds s^2 v / n, without mean(dv) where no mean is subtracted. It is written in
    differentiable operations on the function's own outputs, so that derivatives of every order are right.
    """

    @staticmethod
    def forward(
        ctx: Any, normalizer: Normalizer, view: Tensor, dims: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values, slope, moments = normalizer.normalize(view, dims, dtype)
        ctx.save_for_backward(values, slope)
        ctx.mark_non_differentiable(moments.mean, moments.m2)
        ctx.set_materialize_grads(False)
        ctx.dims, ctx.centers = dims, _CENTERS[type(normalizer)]
        return values, slope, moments.mean, moments.m2

    @staticmethod
    def backward(
        ctx: Any, d_values: Tensor | None, d_slope: Tensor | None, *_: None
    ) -> tuple[None, Tensor | None, None, None]:
        values, slope = ctx.saved_tensors
        d_view = None
        if d_values is not None:
            along = values * (d_values * values).mean(ctx.dims, keepdim=True)
            level = d_values.mean(ctx.dims, keepdim=True) if ctx.centers else 0.0
            d_view = slope * (d_values - level - along)
        if d_slope is not None:
            through = -d_slope * slope.square() / dim_product(values.shape, ctx.dims) * values
            d_view = through if d_view is None else d_view + through
        return None, d_view, None, None


def _under_a_transform() -> bool:
    """Whether a compiler, functorch or forward-mode differentiation traces the operations themselves."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )
