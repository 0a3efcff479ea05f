"""The two ends of a symmetric operator's spectrum by Lanczos' method, with an error bound for each.

Power iteration would give the eigenvalue of the largest magnitude, which need not be the largest: a network's Hessian
often has a large negative one at its start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normwise.errors import DiagnosisError

NOT_FINITE = "a Hessian-vector product is not finite: nw.first_nonfinite tells where it begins"
Multiply = Callable[[Tensor], Tensor]
_SURE = 0.1  # of the tolerance: that an eigenvalue is near does not say that it is the last, as in a cluster at an end
_ROUNDING = 1e-6  # of the largest magnitude: what float32 products cannot tell from zero


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue: some exact one lies within `bound` of `value`."""

    value: float
    bound: float


@dataclass(frozen=True)
class Ends:
    """Both ends of a spectrum.

    Attributes:
        largest: The algebraically largest eigenvalue.
        smallest: The algebraically smallest.
        products: How many products with the operator it took.
        converged: Whether both bounds are within the tolerance that was asked for.
    """

    largest: Eigenvalue
    smallest: Eigenvalue
    products: int
    converged: bool


def ends(multiply: Multiply, like: Tensor, *, tolerance: float = 0.01, most: int = 100, seed: int = 0) -> Ends:
    """Both ends of the spectrum of a symmetric operator.

    With an orthonormal basis Q of the Krylov space of a random vector, T = QᵀAQ is tridiagonal. For an eigenpair
    (theta, s) of T, ‖A Qs − theta Qs‖ = beta |s_k|, with beta the next off-diagonal element, and A has an eigenvalue
    that near to theta (Parlett, The Symmetric Eigenvalue Problem, 1998, section 13.2). The basis is kept orthogonal by
    projecting every new vector twice on all of it, which costs the memory of as many vectors.

    Args:
        multiply: The product of the operator with a vector.
        like: A vector of the right size, dtype and device.
        tolerance: Stop when each bound is below a tenth of this share of its eigenvalue, or below rounding. A bound
            within the share itself was found to stop at the eigenvalue beside the last in 1 of 90 spectra.
        most: Stop after so many products.
        seed: Of the first vector.

    Raises:
        DiagnosisError: a product is not finite.

    >>> found = ends(lambda v: torch.tensor([3.0, 1.0, -5.0]) * v, torch.zeros(3))
    >>> round(found.largest.value, 4), round(found.smallest.value, 4), found.converged
    (3.0, -5.0, True)
    """
    basis = [_first(like, seed)]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        product = multiply(basis[-1])
        if not bool(product.isfinite().all()):
            raise DiagnosisError(NOT_FINITE)
        diagonal.append(_dot(product, basis[-1]))
        rest, beta = _next(product, basis)
        found = _ends(diagonal, beside, beta, tolerance)
        if _within(_SURE * tolerance, found.largest, found.smallest) or len(basis) >= min(most, like.numel()):
            return found
        beside.append(beta)
        basis.append(rest / beta)


def _first(like: Tensor, seed: int) -> Tensor:
    """A random direction, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(like.numel(), generator=generator, dtype=torch.float64).to(like.device, like.dtype)
    return vector.div_(vector.norm())


def _next(product: Tensor, basis: list[Tensor]) -> tuple[Tensor, float]:
    """What is left of a product beside the basis, and its length.

    The second pass takes out what rounding left in the first, so that the vectors' own dtype is precise enough.
    """
    rest = product
    for _ in range(2):
        for vector in basis:
            rest = torch.addcmul(rest, torch.dot(rest, vector), vector, value=-1)
    return rest, float(rest.double().norm())


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()))


def _ends(diagonal: list[float], beside: list[float], beta: float, tolerance: float) -> Ends:
    """What the tridiagonal matrix so far tells of both ends."""
    off = torch.tensor(beside, dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    bounds = beta * vectors[-1].abs()
    smallest, largest = (Eigenvalue(float(values[at]), float(bounds[at])) for at in (0, -1))
    return Ends(largest, smallest, products=len(diagonal), converged=_within(tolerance, largest, smallest))


def _within(tolerance: float, *both: Eigenvalue) -> bool:
    """Whether each bound is below a share of its eigenvalue, or below rounding."""
    scale = max(abs(end.value) for end in both)
    return all(end.bound <= max(tolerance * abs(end.value), _ROUNDING * scale) for end in both)
