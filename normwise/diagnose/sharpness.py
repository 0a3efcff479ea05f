"""Sharpness: how curved the loss is, at both ends of the Hessian's spectrum and along the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from statistics import fmean, stdev
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from normwise.batches import Forward, Loss
from normwise.diagnose.lanczos import NOT_FINITE, Eigenvalue, ends
from normwise.diagnose.objective import Batches, Mode, Objective, measuring, read, weight_norm
from normwise.diagnose.results import Result, number
from normwise.errors import DiagnosisError

Method = Literal["auto", "exact", "differences"]
Product = Callable[[Tensor], Tensor]
# Of a difference quotient, as a share of the weights' length. On small networks with batch norm in float32 the product
# along the top eigenvector was off by 20 % at 1e-2, 3e-3 at 1e-3, 5e-5 at 1e-4, where others begin to lose digits.
_DISTANCE = {torch.float32: 1e-3, torch.float64: 1e-5}


@dataclass(frozen=True, repr=False)
class Sharpness(Result):
    """The curvature of the loss at one point; see `sharpness`.

    Attributes:
        mode: "train", "eval" or "current".
        largest: The algebraically largest eigenvalue of the Hessian, with its error bound.
        smallest: The smallest one.
        along_gradient: gᵀHg / gᵀg for the gradient g of all batches; None where g is 0.
        batch: The mean over the batches of that quotient, each batch with its own gradient and Hessian.
        batch_error: Its standard error; None for one batch.
        batches: How many batches.
        gradient_norm: ‖g‖.
        weight_norm: ‖W‖, the L2 norm of all weights. Behind a normalization curvature falls as 1/‖W‖².
        converged: Whether both bounds are within the tolerance.
        products: Hessian-vector products that the two ends took.
        method: "exact" (second derivatives) or "differences" (of gradients).
        why: Why differences, where exact was not to be had; otherwise "".
        modules: The two ends of each module's own block of the Hessian, by path, where they were asked for.
    """

    mode: Mode
    largest: Eigenvalue
    smallest: Eigenvalue
    along_gradient: float | None
    batch: float | None
    batch_error: float | None
    batches: int
    gradient_norm: float
    weight_norm: float
    converged: bool
    products: int
    method: str
    why: str = ""
    modules: Mapping[str, tuple[Eigenvalue, Eigenvalue]] = field(default_factory=dict)

    @property
    def stable_lr(self) -> float | None:
        """2 / largest: the rate up to which plain gradient descent is stable on the quadratic that fits here.

        At the start of training a network may bear ten times that rate. None where nothing curves upwards.
        """
        return 2 / self.largest.value if self.largest.value > 0 else None

    @property
    def meaning(self) -> str:
        """What was found, in one line."""
        text = (
            f"largest eigenvalue {_with_bound(self.largest)}, smallest {_with_bound(self.smallest)} in {self.mode} mode"
        )
        text += f", gᵀHg/gᵀg {number(self.along_gradient)}, ‖W‖ {number(self.weight_norm)}"
        if self.stable_lr is not None:
            text += f"; a quadratic of that curvature bears learning rates up to {number(self.stable_lr)}"
        return text + ("" if self.converged else "; the bounds are wider than asked for: allow more products")

    def rows(self) -> list[dict[str, Any]]:
        """One row for the whole model, and one for each module that was asked for."""
        pairs = [("", (self.largest, self.smallest)), *self.modules.items()]
        return [
            {
                "path": path,
                "largest": top.value,
                "largest_bound": top.bound,
                "smallest": bottom.value,
                "smallest_bound": bottom.bound,
            }
            for path, (top, bottom) in pairs
        ]

    def headline(self) -> dict[str, float | None]:
        """The two ends, and the curvature along the gradient."""
        return {
            "largest": self.largest.value,
            "smallest": self.smallest.value,
            "along_gradient": self.along_gradient,
            "weight_norm": self.weight_norm,
        }

    def traces(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Bars from the smallest to the largest eigenvalue, the whole model first."""
        rows = self.rows()
        names = [row["path"] or "model" for row in rows]
        bars = [
            {"type": "bar", "name": end, "x": names, "y": [row[end] for row in rows]} for end in ("largest", "smallest")
        ]
        return bars, {
            "barmode": "relative",
            "yaxis": {"title": {"text": f"eigenvalue of the Hessian, {self.mode} mode"}},
        }


def sharpness(
    model: nn.Module,
    batches: Batches,
    loss: Loss | None = None,
    *,
    mode: Mode = "train",
    forward: Forward | None = None,
    modules: bool | Sequence[str] = False,
    method: Method = "auto",
    tolerance: float = 0.01,
    most: int = 100,
    seed: int = 0,
) -> Sharpness:
    """Measure the Hessian's two ends and the curvature along the gradient; the model is left as it was, bit for bit.

    H is the Hessian of the mean loss over the batches, weighted by their rows, with respect to all parameters that
    require a gradient. Its largest and smallest eigenvalues come from Lanczos' method, each with a bound from the
    residual: an exact eigenvalue lies within it. (Power iteration would give the one of largest magnitude, which at the
    start of a network with batch normalization may be the negative one.) *Batch sharpness* is the mean over the batches
    of gᵀHg / gᵀg with g and H of the batch alone (Andreyev and Beneventano 2024, arXiv:2412.20553).

    The curvature of training mode, where a batch normalization differentiates through its statistics, is not that of
    evaluation mode. Memories and random numbers are the same in every product. Where weights stand before a
    normalization, the function does not depend on their scale while H goes as 1/‖W‖²: compare nothing without ‖W‖.

    Args:
        model: A model, in any mode.
        batches: A batch, a list of batches or a loader; all of them are read once and kept.
        loss: `loss(output, target)`, with the second element of a tuple or list as the target. None: the model's own,
            its output or the `loss` in it.
        mode: "train", "eval", or "current": every module in the mode that it is in.
        forward: `forward(model, batch)`, for models that are called otherwise.
        modules: Also the blocks of single modules, those with parameters of their own: all of them, or the paths that
            match one of the patterns, as in `["layers.*.attn*"]`.
        method: "exact" differentiates twice, "differences" takes the central difference of two gradients (off by some
            1e-3 in float32; across the kinks of a ReLU it sees curvature that the Hessian at the point has not), "auto"
            is exact where every operation has a second derivative.
        tolerance: Stop when the bounds are below this share of the eigenvalues.
        most: Stop after so many products; as many vectors of the size of the model are kept.
        seed: Of Lanczos' first vector.

    Returns:
        A record; `repr` says what it means in one line.

    Raises:
        DiagnosisError: there is no batch, no gradient, no second derivative (with "exact"), or a product is not finite.

    >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> found = sharpness(model, (x, torch.zeros(2, 1)), nn.functional.mse_loss)
    >>> round(found.largest.value, 4), round(found.smallest.value, 4), found.method
    (9.0, 1.0, 'exact')
    """
    if method not in get_args(Method):
        raise DiagnosisError(f"method={method!r}: it is one of {', '.join(get_args(Method))}")
    with measuring(model, mode, batches=batches):
        given = read(batches)
        whole = Objective(model, given, loss, forward)
        gradient = whole.gradient()
        used, why = _method(whole, gradient, method)
        found = ends(_product(whole, used), whole.zeros(), tolerance=tolerance, most=most, seed=seed)
        each = [_along(Objective(model, [batch], loss, forward), used) for batch in given]
        blocks = {
            path: Objective(model, given, loss, forward, module.parameters(recurse=False))
            for path, module in _chosen(model, modules)
        }
        by_module = {
            path: ends(_product(block, used), block.zeros(), tolerance=tolerance, most=most, seed=seed)
            for path, block in blocks.items()
        }
        along = [value for value in each if value is not None]
        return Sharpness(
            mode=mode,
            largest=found.largest,
            smallest=found.smallest,
            along_gradient=_quotient(whole, gradient, used),
            batch=fmean(along) if along else None,
            batch_error=stdev(along) / math.sqrt(len(along)) if len(along) > 1 else None,
            batches=len(given),
            gradient_norm=float(gradient.double().norm()),
            weight_norm=weight_norm(model.parameters()),
            converged=found.converged,
            products=found.products,
            method=used,
            why=why,
            modules={path: (block.largest, block.smallest) for path, block in by_module.items()},
        )


def _method(objective: Objective, direction: Tensor, wanted: Method) -> tuple[str, str]:
    """How to multiply by the Hessian, and why not exactly where that is not to be had."""
    if wanted == "differences":
        return wanted, ""
    try:
        objective.require_second_derivatives()
        objective.hessian_times(direction)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        if wanted == "exact":
            raise DiagnosisError(f"there is no second derivative: {reason}") from error
        return "differences", reason
    return "exact", ""


def _product(objective: Objective, method: str) -> Product:
    """Multiplication by the Hessian."""
    if method == "exact":
        return objective.hessian_times
    coarsest = max((p.dtype for p in objective.parameters), key=lambda dtype: torch.finfo(dtype).eps)
    if coarsest not in _DISTANCE:
        kind = str(coarsest).removeprefix("torch.")
        raise DiagnosisError(f"differences of gradients drown in the rounding of {kind} parameters: take model.float()")
    length = objective.distance() or 1.0
    return partial(objective.gradient_change, distance=_DISTANCE[coarsest] * length)


def _along(objective: Objective, method: str) -> float | None:
    return _quotient(objective, objective.gradient(), method)


def _quotient(objective: Objective, gradient: Tensor, method: str) -> float | None:
    """gᵀHg / gᵀg; None for a gradient of 0."""
    length = float(gradient.double().norm())
    if length == 0:
        return None
    direction = gradient / length  # a product with a huge gradient would overflow
    product = _product(objective, method)(direction)
    if not bool(product.isfinite().all()):
        raise DiagnosisError(NOT_FINITE)
    return float(torch.dot(direction.double(), product.double()))


def _chosen(model: nn.Module, wanted: bool | Sequence[str]) -> Iterable[tuple[str, nn.Module]]:
    """The modules with parameters of their own, all or those whose path matches."""
    own = [
        (path, module)
        for path, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    if isinstance(wanted, bool):
        return own if wanted else []
    for pattern in wanted:
        if not any(fnmatchcase(path, pattern) for path, _ in own):
            raise DiagnosisError(f"modules: {pattern!r} matches no module with parameters of its own that are trained")
    return [(path, module) for path, module in own if any(fnmatchcase(path, pattern) for pattern in wanted)]


def _with_bound(end: Eigenvalue) -> str:
    return f"{number(end.value)} ± {number(end.bound, 1)}"
