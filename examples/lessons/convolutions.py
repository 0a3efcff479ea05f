"""In a convolutional network batch normalization tolerates the largest learning rates, group and layer norm follow.

The statistics of a channel come from every example and every position, so that a batch normalization of images has
thousands of samples. Group and layer normalization take theirs from one example each, and need no batch.

*Trains* is defined, and to be read, as in the lesson `depth`.
"""

from __future__ import annotations

from functools import partial
from itertools import islice

from torch import nn
from torch.nn import functional as F

import normwise as nw
from normwise.lessons import Chart, Check, Lesson, Size, about, tell
from normwise.tuning.data import load
from normwise.tuning.models import cnn
from normwise.tuning.training import batches

NORMS = {  # torch's, because of the many trainings; layer norm of a whole image is group norm with one group
    "none": nn.Identity,
    "batch": nn.BatchNorm2d,
    "group": partial(nn.GroupNorm, 8),
    "layer": partial(nn.GroupNorm, 1),
}
FIRST = {"batch": 4, "group": 2, "layer": 2}
SEEDS, STEPS, BATCH = {"small": 2, "full": 4}, {"small": 30, "full": 60}, {"small": 32, "full": 64}


def measure(size: Size) -> Lesson:
    """The largest rates that train, as multiples of the one without normalization."""
    data, steps = load("digits", "cross_entropy"), STEPS[size]
    order = list(islice(batches(data.train, BATCH[size], 0), steps))
    judged = data.validation.inputs, data.validation.targets
    found = {
        name: nw.max_stable_lr(
            partial(cnn, norm),
            order,
            F.cross_entropy,
            steps=steps,
            seeds=SEEDS[size],
            validation=judged,
            shares=(0.9, 0.5),
        )
        for name, norm in NORMS.items()
    }
    ratios = {name: rates.ratios(found["none"]) for name, rates in found.items()}
    table = [
        {
            "norm": name,
            **{f"largest rate at {share}": edge.value for share, edge in rates.lr_train.items()},
            **{f"over none at {share}": ratios[name][share] for share in rates.lr_train},
        }
        for name, rates in found.items()
    ]
    grid = "two edges in half-octaves, each one off (2), times the seeds' range (1.5)"
    checks = [about(f"{name} / none at 0.9", ratios[name]["0.9"], first, 3, grid) for name, first in FIRST.items()]
    others = max(ratios["group"]["0.9"], ratios["layer"]["0.9"])
    return Lesson(
        name="convolutions",
        claim="In a conv net batch norm tolerates the largest learning rates; group and layer norm follow.",
        setting=f"4 convolutions, He's start, digits, {steps} steps of SGD, batches of {BATCH[size]}, "
        f"{SEEDS[size]} seeds",
        table=tuple(table),
        checks=(
            *checks,
            Check("batch / the better of group and layer", ratios["batch"]["0.9"] / others, 1.2, why="first: 2"),
        ),
        chart=Chart(
            "Largest rate that trains, over that without normalization",
            "normalization",
            "ratio",
            {
                f"to {share} of chance": (list(NORMS), [ratios[name][share] for name in NORMS])
                for share in ("0.9", "0.5")
            },
            bars=True,
        ),
        size=size,
    )


if __name__ == "__main__":
    tell(measure)
