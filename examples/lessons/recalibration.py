"""Recalibrating the moving statistics helps a network that was trained with small batches, and no other.

The moving statistics of a batch normalization are averages over the last batches, while the weights moved on. With
small batches they are noisy as well, so that evaluation is off by more than the training was. `nw.recalibrate` runs the
training data through the finished network and merges their moments by count; no weight changes. With batches of 32
there is next to nothing to mend. With two rows it mends a part: that the network was trained on +1 and -1 it cannot
undo.
"""

from __future__ import annotations

from itertools import islice
from statistics import fmean

import torch
from torch import nn
from torch.nn import functional as F

import normwise as nw
from normwise.lessons import Chart, Check, Lesson, Size, about, tell
from normwise.tuning.data import load
from normwise.tuning.models import mlp
from normwise.tuning.training import batches

SIZES, SEEDS = {"small": (32, 4, 2), "full": (32, 8, 4, 3, 2)}, {"small": 3, "full": 8}
EPOCHS, RATE = 3, 0.05  # the rate of batches of 32


def losses(rows: int, seed: int) -> tuple[float, float]:
    """The test loss in evaluation mode, before and after recalibration with batches of the training's size."""
    data = load("digits", "cross_entropy")
    torch.manual_seed(seed)
    model, steps = mlp(nn.BatchNorm1d, depth=4), len(data.train) // rows
    optimizer = torch.optim.SGD(model.parameters(), RATE * rows / 32)
    for inputs, labels in islice(batches(data.train, rows, seed), EPOCHS * steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    before = test_loss(model)
    nw.recalibrate(model, data.train.inputs[: steps * rows].split(rows))
    return before, test_loss(model)


@torch.no_grad()
def test_loss(model: nn.Module) -> float:
    """The loss on the test data in evaluation mode."""
    test = load("digits", "cross_entropy").test
    return F.cross_entropy(model.eval()(test.inputs), test.targets).item()


def measure(size: Size) -> Lesson:
    """The test loss before and after recalibration, by the size of the training's batches."""
    table = []
    for rows in SIZES[size]:
        before, after = (fmean(found) for found in zip(*(losses(rows, s) for s in range(SEEDS[size])), strict=True))
        table.append({"rows of a batch": rows, "before": before, "after": after, "after / before": after / before})
    ratio = {row["rows of a batch"]: row["after / before"] for row in table}
    series = {when: (SIZES[size], [row[when] for row in table]) for when in ("before", "after")}
    return Lesson(
        name="recalibration",
        claim="Recalibrating the moving statistics helps after training with small batches, not at 32 rows.",
        setting=f"MLP of 3 hidden layers of 64, He's start, digits, {EPOCHS} epochs of SGD at {RATE} x rows / 32, "
        f"test loss, {SEEDS[size]} seeds",
        table=tuple(table),
        checks=(
            Check("loss after / before, 2 rows", ratio[2], 0.8, 0.98, "first: 0.88; a part of what was lost"),
            Check("loss after / before, 4 rows", ratio[4], 0.7, 0.95, "more is to be had where more was learned"),
            about(
                "loss after / before, 32 rows",
                ratio[32],
                1,
                1.05,
                "next to nothing: the average of 32 rows is a little noisy too",
            ),
        ),
        chart=Chart("Test loss by batch size", "rows of a batch", "test loss", series, log="x"),
        size=size,
    )


if __name__ == "__main__":
    tell(measure)
