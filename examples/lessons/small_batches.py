"""Small batches hurt batch normalization over rows, and leave layer normalization as it was.

Batch normalization takes mean and variance from as many samples as a channel has. In a multilayer perceptron these are
the rows of the batch: with two of them every feature becomes +1 or -1, whatever it was, and evaluation, by moving
statistics, is another network than the one that was trained. (In a convolutional network each position is a sample: two
images of 14 x 14 are 392, and nothing is to be seen.) Layer normalization never looks at other rows.

So that batches differ in nothing else, each size sees the same examples, at a rate in proportion to the size.
"""

from __future__ import annotations

from itertools import islice, pairwise
from statistics import fmean

import torch
from torch import nn
from torch.nn import functional as F

from normwise.lessons import Chart, Check, Lesson, Size, about, tell
from normwise.tuning.data import load
from normwise.tuning.models import mlp
from normwise.tuning.training import accuracy, batches, predict

NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}  # torch's, which are faster at a few rows
SIZES, SEEDS = {"small": (32, 8, 2), "full": (32, 8, 4, 3, 2)}, {"small": 2, "full": 5}
EPOCHS, RATE = 3, 0.03  # the rate of batches of 32


def error(norm: str, rows: int, seed: int) -> float:
    """The error in evaluation mode, in percent, on examples that were not trained on."""
    data = load("digits", "cross_entropy")
    torch.manual_seed(seed)
    model = mlp(NORMS[norm], depth=3)
    optimizer = torch.optim.SGD(model.parameters(), RATE * rows / 32)
    for inputs, labels in islice(batches(data.train, rows, seed), EPOCHS * (len(data.train) // rows)):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return 100 - accuracy(predict(model, data.test.inputs), data.test.targets)


def measure(size: Size) -> Lesson:
    """The error by the size of the batches."""
    errors = {n: [fmean(error(n, rows, s) for s in range(SEEDS[size])) for rows in SIZES[size]] for n in NORMS}
    table = [
        {"rows of a batch": rows, **{n: found[at] for n, found in errors.items()}}
        for at, rows in enumerate(SIZES[size])
    ]
    batch, layer = errors.values()
    growth, first = batch[-1] / batch[0], 62.4 / 17.6
    steps = [later / earlier for earlier, later in pairwise(batch)]
    return Lesson(
        name="small_batches",
        claim="Small batches hurt batch normalization over rows, and leave layer normalization as it was.",
        setting=f"MLP of 2 hidden layers of 64, He's start, digits, {EPOCHS} epochs of SGD at {RATE} x rows / 32, "
        f"test error in percent, {SEEDS[size]} seeds",
        table=tuple(table),
        checks=(
            about("error with batch norm, 2 rows / 32 rows", growth, first, 2, "other data, other training"),
            Check("the same, from each size to the next smaller, least", min(steps), 1, why="it only rises"),
            Check(
                "error with layer norm, most / least", max(layer) / min(layer), high=1.15, why="first: 18.4 to 19.1 %"
            ),
        ),
        chart=Chart(
            "Test error by batch size",
            "rows of a batch",
            "error in percent",
            {n: (SIZES[size], e) for n, e in errors.items()},
            log="x",
        ),
        size=size,
    )


if __name__ == "__main__":
    tell(measure)
