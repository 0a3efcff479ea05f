"""Batch normalization tolerates larger learning rates, and the more so the deeper the network.

Without normalization the largest rate that trains falls with depth: the gradients of the layers multiply. Behind a
batch normalization they do not. Layer normalization, in this network, helps much less.

*Trains* means: the end of the training loss and the validation loss are below a share of chance. The share matters: at
0.9 a network with a fifth of its answers right counts, so the ratios are stated at 0.5 too. "Tolerates" says nothing
about smoothness: behind a normalization a network does not change with the scale of its weights, and a large rate only
makes them larger.
"""

from __future__ import annotations

from functools import partial
from itertools import islice

from torch import nn
from torch.nn import functional as F

import normwise as nw
from normwise.lessons import Chart, Check, Lesson, Size, about, tell
from normwise.tuning.data import load
from normwise.tuning.models import mlp
from normwise.tuning.training import batches

NORMS = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}  # torch's: some thousand short trainings
DEPTHS, SEEDS, STEPS = {"small": (3, 12), "full": (3, 6, 12)}, {"small": 2, "full": 4}, 60
FIRST = {
    ("batch", 3): 9.5,
    ("batch", 6): 13.5,
    ("batch", 12): 27,
    ("layer", 3): 1.8,
    ("layer", 6): 1.8,
    ("layer", 12): 1.3,
}


def measure(size: Size) -> Lesson:
    """The largest rates that train by depth, as multiples of the one without normalization."""
    data, table, ratios = load("digits", "cross_entropy"), [], {}
    order, judged = list(islice(batches(data.train, 128, 0), STEPS)), (data.validation.inputs, data.validation.targets)
    for depth in DEPTHS[size]:
        found = {
            name: nw.max_stable_lr(
                partial(mlp, norm, depth=depth),
                order,
                F.cross_entropy,
                steps=STEPS,
                seeds=SEEDS[size],
                validation=judged,
                shares=(0.9, 0.5),
            )
            for name, norm in NORMS.items()
        }
        for name, rates in found.items():
            ratios[name, depth] = rates.ratios(found["none"])
            largest = {f"largest rate at {share}": edge.value for share, edge in rates.lr_train.items()}
            multiples = {f"over none at {share}": ratios[name, depth][share] for share in rates.lr_train}
            table.append({"depth": depth, "norm": name, **largest, **multiples})
    shallow, deep = DEPTHS[size][0], DEPTHS[size][-1]
    grid = "two edges in half-octaves, each one off (2), times the seeds' range (1.5)"
    checks = [
        about(f"{n} / none, depth {d}, at 0.9", ratios[n, d]["0.9"], f, 3, grid)
        for (n, d), f in FIRST.items()
        if (n, d) in ratios
    ]
    over_layer = ratios["batch", deep]["0.9"] / ratios["layer", deep]["0.9"]
    checks += [Check(f"batch / layer, depth {deep}, at 0.9", over_layer, 2, why="first: 21; layer norm hardly helps")]
    growth = {share: ratios["batch", deep][share] / ratios["batch", shallow][share] for share in ("0.9", "0.5")}
    checks += [
        Check(f"growth of batch / none with depth, at {s}", g, 1.5, why="first at 0.9: 2.8") for s, g in growth.items()
    ]
    return Lesson(
        name="depth",
        claim="Batch normalization tolerates larger learning rates, the more so the deeper the network.",
        setting=f"MLP, width 64, He's start, digits, batches of 128, {STEPS} steps of SGD, {SEEDS[size]} seeds",
        table=tuple(table),
        checks=tuple(checks),
        chart=Chart(
            "Largest rate that trains to 0.9 of chance",
            "depth",
            "largest learning rate",
            {
                n: (
                    [r["depth"] for r in table if r["norm"] == n],
                    [r["largest rate at 0.9"] for r in table if r["norm"] == n],
                )
                for n in NORMS
            },
            log="y",
        ),
        size=size,
    )


if __name__ == "__main__":
    tell(measure)
