"""How much curvature a step size bears, by optimizer."""

from __future__ import annotations

from normwise.errors import DiagnosisError


def stability_threshold(lr: float, momentum: float = 0.0, *, nesterov: bool = False, dampening: float = 0.0) -> float:
    """The curvature above which gradient descent on a quadratic diverges; lambda for torch's SGD.

    ======================================  =============================
    plain                                   2 / lr
    heavy ball, momentum b                  2 (1 + b) / lr
    Nesterov, momentum b                    2 (1 + b) / ((1 + 2b) lr)
    heavy ball, momentum b, dampening d     2 (1 + b) / ((1 - d) lr)
    ======================================  =============================

    A statement on quadratics with the full gradient: networks train at rates above the threshold of their first steps,
    because curvature adapts to the rate (Cohen et al. 2021, arXiv:2103.00065).

    Args:
        lr: The learning rate.
        momentum: torch's `momentum`, from 0 to below 1.
        nesterov: torch's `nesterov`.
        dampening: torch's `dampening`, from 0 to below 1.

    Raises:
        DiagnosisError: a number out of its range; Nesterov with dampening, which torch refuses too.

    >>> stability_threshold(0.1), round(stability_threshold(0.1, 0.9), 6)
    (20.0, 38.0)
    >>> round(stability_threshold(0.1, 0.9, nesterov=True), 6)
    13.571429
    """
    if not lr > 0:
        raise DiagnosisError(f"lr={lr}: a learning rate is positive")
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        if not 0 <= value < 1:
            raise DiagnosisError(f"{name}={value}: it lies between 0 and 1")
    if nesterov and (dampening or not momentum):
        raise DiagnosisError("Nesterov's step needs a momentum and no dampening")
    if nesterov:
        return 2 * (1 + momentum) / ((1 + 2 * momentum) * lr)
    return 2 * (1 + momentum) / ((1 - dampening) * lr)
