"""Normalization does not always make the loss smoother: after the activation it makes this network sharper.

The network of many smoothness results is tanh, squared error, and torch's default start, whose weights are small: the
signal shrinks from layer to layer, and with it the curvature. A normalization after the activation stretches each layer
to variance 1 again, and the largest eigenvalue of the Hessian at the start rises by a factor of ten or more. Whether a
normalization smooths depends on where it stands, and from which start: compare nothing that differs in both.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise.lessons import Chart, Check, Lesson, Size, about, tell
from normwise.tuning.data import load

NORMS = {"none": nn.Identity, "batch": nw.BatchNorm}
SEEDS, WIDTH, ROWS = {"small": 2, "full": 8}, 100, 128


def network(norm: Callable[[int], nn.Module], *, after: bool, he: bool) -> nn.Module:
    """Two hidden layers of tanh with a normalization on one side of it."""
    blocks: list[nn.Module] = []
    for inputs in (64, WIDTH):
        activated = [nn.Tanh(), norm(WIDTH)] if after else [norm(WIDTH), nn.Tanh()]
        blocks += [nn.Linear(inputs, WIDTH), *activated]
    model = nn.Sequential(*blocks, nn.Linear(WIDTH, 10))
    for layer in model if he else ():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """The sum over the classes, the mean over the examples."""
    return (output - target).square().sum(1).mean()


def measure(size: Size) -> Lesson:
    """The Hessian's largest eigenvalue at the start, by normalization, place and start."""
    data = load("digits", "cross_entropy").train
    batch = data.inputs[:ROWS], F.one_hot(data.targets[:ROWS], 10).float()
    table, over = [], {}
    for he, after in ((False, True), (False, False), (True, True), (True, False)):
        largest = {}
        for name, norm in NORMS.items():
            found = []
            for seed in range(SEEDS[size]):
                torch.manual_seed(seed)
                found.append(nw.sharpness(network(norm, after=after, he=he), batch, squared_error).largest.value)
            largest[name] = fmean(found)
        where = f"{'He' if he else 'default'} start, {'after' if after else 'before'} tanh"
        over[where] = largest["batch"] / largest["none"]
        table.append({"start and place": where, **largest, "batch / none": over[where]})
    after_default, before_he = over["default start, after tanh"], over["He start, before tanh"]
    other = "another width and number of layers; the first ones are not known to more than these two numbers"
    return Lesson(
        name="placement",
        claim="Normalization does not always make the loss smoother: its place and the start decide.",
        setting=f"tanh MLP, 2 hidden layers of {WIDTH}, squared error, {ROWS} digits, at the start, training mode, "
        f"{SEEDS[size]} seeds",
        table=tuple(table),
        checks=(
            about("largest eigenvalue, batch / none, default start, after tanh", after_default, 124 / 13.6, 2.5, other),
            Check(
                "that ratio over the one with He's start, before tanh",
                after_default / before_he,
                3,
                why="place and start matter",
            ),
        ),
        chart=Chart(
            "Largest eigenvalue of the Hessian at the start",
            "start and place",
            "largest eigenvalue",
            {name: (list(over), [row[name] for row in table]) for name in NORMS},
            bars=True,
            log="y",
        ),
        size=size,
    )


if __name__ == "__main__":
    tell(measure)
