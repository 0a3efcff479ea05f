"""Batch normalization smooths the loss along the gradient; layer normalization leaves it about as it was.

A gradient is a linear picture of the loss. How far can it be trusted? At a training step, look along the gradient at
several step sizes: how much does the loss vary, how much does the gradient change, and how much per distance walked
(effective beta)? Santurkar et al. (2018, arXiv:1805.11604) found all three smaller with batch normalization, and took
that, rather than "internal covariate shift", for the reason why it helps.

The numbers hold for this network at this start and rate. They shrink with ‖W‖ too, and the lesson `placement` shows a
network that batch normalization makes sharper.
"""

from __future__ import annotations

from itertools import islice
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

import normwise as nw
from normwise.lessons import Chart, Check, Lesson, Size, about, tell
from normwise.tuning.data import load
from normwise.tuning.models import mlp
from normwise.tuning.training import batches

NORMS = {"none": nn.Identity, "batch": nw.BatchNorm, "layer": nw.LayerNorm}
SEEDS, STEPS = {"small": 2, "full": 5}, 60


def measure(size: Size) -> Lesson:
    """The loss's range, the gradient's change and the effective beta along the gradient, with each normalization."""
    data, table, series = load("digits", "cross_entropy"), [], {}
    for name, norm in NORMS.items():
        found = []
        for seed in range(SEEDS[size]):
            torch.manual_seed(seed)
            model = mlp(norm, width=128, depth=7)
            order = list(islice(batches(data.train, 64, seed), STEPS))
            found.append(nw.smoothness(model, order, F.cross_entropy, lr=0.1, every=5))
        table.append(
            {
                "norm": name,
                "loss range": median(one.loss_range for one in found),
                "change of gradient": median(one.predictiveness for one in found),
                "beta": median(one.beta for one in found),
                "weight norm": median(one.weight_norm for one in found),
            }
        )
        ranges = zip(*([step.by_step.loss_range for step in one.steps] for one in found), strict=True)
        series[name] = [step.step for step in found[0].steps], [median(values) for values in ranges]
    none, batch, layer = table
    few = "medians over 12 steps of few seeds"
    return Lesson(
        name="smoothness",
        claim="Batch normalization smooths the loss along the gradient; layer normalization does so much less.",
        setting=f"MLP of 6 hidden layers of 128, He's start, digits, batches of 64, SGD at 0.1, every 5th of {STEPS} "
        f"steps, step sizes 0.05 to 0.4, training mode, {SEEDS[size]} seeds",
        table=tuple(table),
        checks=(
            about("loss range, none / batch", none["loss range"] / batch["loss range"], 2.08 / 0.17, 4, few),
            about(
                "change of gradient, none / batch",
                none["change of gradient"] / batch["change of gradient"],
                5.6,
                2,
                few,
            ),
            about("beta, none / batch", none["beta"] / batch["beta"], 18.5 / 10.7, 1.5, few),
            about("beta, none / layer", none["beta"] / layer["beta"], 1, 1.5, few),
            Check(
                "loss range, layer / batch", layer["loss range"] / batch["loss range"], 1.5, why="layer was about none"
            ),
        ),
        chart=Chart("Range of the loss along the gradient", "step", "loss range", series, log="y"),
        size=size,
    )


if __name__ == "__main__":
    tell(measure)
