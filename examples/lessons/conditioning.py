"""Standardizing the inputs improves the conditioning of a linear model; its largest curvature may rise or fall.

The condition number, the largest eigenvalue of the Hessian over the smallest, says how many steps gradient descent
takes: a rate that the steepest direction bears is too small for the flattest by that factor. Features in different
units, or far from zero, make it huge; standardizing mends both, and leaves what comes from correlations.

The largest curvature itself is in the units of the inputs squared: the same images as grey levels from 0 to 255, from 0
to 1, or as shares of an image's ink give any value. So "standardizing makes the loss flatter" is not a law.
"""

from __future__ import annotations

import torch
from sklearn import datasets
from torch import Tensor

from normwise.lessons import Chart, Check, Lesson, Size, about, tell


def inputs() -> dict[str, Tensor]:
    """The data in raw units."""
    images, wine = (torch.from_numpy(getattr(datasets, f"load_{name}")().data) for name in ("digits", "wine"))
    return {
        "digits, grey 0 to 255": images * 255 / 16,
        "digits, grey 0 to 1": images / 16,
        "digits, shares of the ink": images / images.sum(1, keepdim=True),
        "wine": wine,
    }


def standardized(raw: Tensor) -> Tensor:
    """Every feature with mean 0 and variance 1; a constant one is 0."""
    spread = raw.std(0, correction=0)
    return (raw - raw.mean(0)) / spread.where(spread > 0, 1)


def spectrum(features: Tensor) -> Tensor:
    """The eigenvalues of the Hessian of half the mean squared error, bias included, without those that are zero."""
    design = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    values = torch.linalg.eigvalsh(design.T @ design / len(design))
    return values[values > 1e-12 * values.max()]


def measure(size: Size) -> Lesson:
    """The condition number and the largest curvature, before and after standardization."""
    table = []
    for name, raw in inputs().items():
        before, after = spectrum(raw), spectrum(standardized(raw))
        table.append(
            {
                "data": name,
                "condition, raw": (before.max() / before.min()).item(),
                "condition, standardized": (after.max() / after.min()).item(),
                "beta, raw": before.max().item(),
                "beta, standardized": after.max().item(),
            }
        )
    falls = [row["condition, raw"] / row["condition, standardized"] for row in table]
    rises = [row["beta, standardized"] / row["beta, raw"] for row in table]
    names, wine = [row["data"] for row in table], table[-1]
    columns = ("condition, raw", "condition, standardized", "beta, raw", "beta, standardized")
    exact = "the same data, so only the eigenvalues' rounding is left"
    return Lesson(
        name="conditioning",
        claim="Standardizing the inputs improves the condition number; the largest curvature may rise or fall.",
        setting="linear model with a bias, half the squared error, 1797 digits and 178 wines; no training, no seeds",
        table=tuple(table),
        checks=(
            Check("condition number, raw / standardized, least", min(falls), 10, why="first measured on images: 54"),
            about("condition number of wine, raw", wine["condition, raw"], 4.6e8, 1.05, exact),
            about("condition number of wine, standardized", wine["condition, standardized"], 45, 1.05, exact),
            Check("beta, standardized / raw, most", max(rises), 1.5, why="first, on other images: 7.4 to 15.7"),
            Check("beta, standardized / raw, least", min(rises), high=0.5, why="in large units it falls"),
        ),
        chart=Chart(
            "Before and after", "data", "value", {c: (names, [row[c] for row in table]) for c in columns}, True, "y"
        ),
        size=size,
    )


if __name__ == "__main__":
    tell(measure)
