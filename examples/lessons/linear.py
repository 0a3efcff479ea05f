"""Gradient descent on least squares is stable up to the learning rate 2 / beta, and no further.

A linear model's squared error is a bowl with the same curvature everywhere. Along an eigenvector of the Hessian with
eigenvalue h, a step of rate lr multiplies the distance to the bottom by 1 - lr h. It shrinks as long as lr < 2 / h, so
that the largest eigenvalue, beta, decides. Standardizing the inputs changes beta and with it the largest rate, never
the law.

Look at the last column: rate times beta / 2 is 1 in every row, while beta itself differs by a factor of 100,000.
"""

from __future__ import annotations

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise.lessons import Chart, Check, Lesson, Size, tell

RATES = torch.linspace(0.98, 1.02, 161, dtype=torch.float64)  # in units of 2 / beta


def problems() -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and the labels as numbers to predict: images of digits and measurements of wines, raw and standardized."""
    found = {}
    for name in ("digits", "wine"):
        inputs, labels = map(torch.from_numpy, getattr(datasets, f"load_{name}")(return_X_y=True))
        spread = inputs.std(0, correction=0)
        found[f"{name}, raw"] = inputs, labels.double()[:, None]
        found[f"{name}, standardized"] = (
            (inputs - inputs.mean(0)) / spread.where(spread > 0, 1),
            found[f"{name}, raw"][1],
        )
    return found


def descend(inputs: Tensor, targets: Tensor, rates: Tensor, steps: int) -> Tensor:
    """The loss after every step (steps + 1, rates), all rates at once: one column of weights each."""
    design = torch.cat([inputs, torch.ones_like(targets)], dim=1)
    weights = torch.zeros(design.shape[1], len(rates), dtype=torch.float64)
    hessian, pull = 2 * design.T @ design / len(design), 2 * design.T @ targets / len(design)
    constant, losses = targets.square().mean(), []
    for _ in range(steps + 1):
        product = hessian @ weights
        losses.append(constant + (weights * (product / 2 - pull)).sum(0))
        weights = weights - rates * (product - pull)
    return torch.stack(losses)


def measure(size: Size) -> Lesson:
    """The largest stable rate of gradient descent on least squares, times beta / 2."""
    steps = {"small": 1000, "full": 5000}[size]
    table, curves = [], {}
    for name, (inputs, targets) in problems().items():
        model = nn.Linear(inputs.shape[1], 1).double()
        beta = nw.sharpness(model, (inputs, targets), F.mse_loss, tolerance=1e-6).largest.value
        losses = descend(inputs, targets, RATES * 2 / beta, steps)
        stable = RATES[losses[-1] <= losses[0]].max().item()
        table.append({"data": name, "beta": beta, "largest rate": stable * 2 / beta, "rate x beta / 2": stable})
        curves[name] = RATES.tolist(), (losses[-1] / losses[0]).clamp(1e-6, 1e6).tolist()
    found = [float(row["rate x beta / 2"]) for row in table]
    why = f"first measured: 1.0004 to 1.002; {steps} steps see a divergence only once it has grown"
    return Lesson(
        name="linear",
        claim="Gradient descent on least squares is stable up to the learning rate 2 / beta, and no further.",
        setting=f"linear model, squared error, full batch, {steps} steps in float64; stable: ends below its start",
        table=tuple(table),
        checks=(
            Check("largest stable rate x beta / 2, least of all data", min(found), 0.999, 1.01, why),
            Check("the same, most of all data", max(found), 0.999, 1.01, why),
        ),
        chart=Chart("Loss at the end over loss at the start", "learning rate x beta / 2", "ratio", curves, log="y"),
        size=size,
    )


if __name__ == "__main__":
    tell(measure)
