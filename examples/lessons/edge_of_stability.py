"""Full-batch gradient descent drives the curvature up to what its learning rate bears, and hovers there.

On a quadratic a rate lr is stable where the largest eigenvalue lambda is below 2 / lr. A network is no quadratic: as it
trains lambda rises, until lambda lr / 2 reaches 1. Then it neither diverges nor goes on rising. It stays at the edge of
stability, while the loss goes on falling, though not at every step (Cohen et al. 2021, arXiv:2103.00065). So the
curvature at the end says which rate was used, not which rate could have been.
"""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise.lessons import Chart, Check, Lesson, Size, tell
from normwise.tuning.data import load

RATES, SEEDS, ROWS = {"small": (0.4,), "full": (0.4, 0.8)}, {"small": 2, "full": 3}, {"small": 100, "full": 400}
STEPS, EVERY = 1000, 200


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Half the sum over the classes, the mean over the examples."""
    return (output - target).square().sum(1).mean() / 2


def course(rate: float, seed: int, rows: int) -> tuple[list[float], list[float]]:
    """lambda lr / 2 and the loss, at every 200th step of full-batch gradient descent."""
    data = load("digits", "cross_entropy").train
    batch = data.inputs[:rows], F.one_hot(data.targets[:rows], 10).float()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), rate)
    edge, losses = [], []
    for step in range(STEPS + 1):
        loss = squared_error(model(batch[0]), batch[1])
        if step % EVERY == 0:
            lambda_max = nw.sharpness(model, batch, squared_error).largest.value
            edge.append(lambda_max / nw.stability_threshold(rate))
            losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return edge, losses


def measure(size: Size) -> Lesson:
    """lambda lr / 2 over the training, at each learning rate."""
    table, series, ends = [], {}, []
    steps = list(range(0, STEPS + 1, EVERY))
    for rate in RATES[size]:
        courses = [course(rate, seed, ROWS[size]) for seed in range(SEEDS[size])]
        for seed, (edge, losses) in enumerate(courses):
            ends += edge[-2:]
            last = {
                "lambda lr / 2, start": edge[0],
                "last two": fmean(edge[-2:]),
                "loss, start": losses[0],
                "loss, end": losses[-1],
            }
            table.append({"rate": rate, "seed": seed, **last})
            series[f"rate {rate}, seed {seed}"] = steps, edge
    why = "first measured: 0.95 to 1.2; the edge is not exact, lambda hovers just above it"
    fall = max(row["loss, end"] / row["loss, start"] for row in table)
    return Lesson(
        name="edge_of_stability",
        claim="Full-batch gradient descent drives the curvature up to 2 / lr, and trains on at that edge.",
        setting=f"tanh MLP, 2 hidden layers of 64, torch's start, half the squared error, {ROWS[size]} digits in one "
        f"batch, {STEPS} steps, {SEEDS[size]} seeds",
        table=tuple(table),
        checks=(
            Check("lambda lr / 2 at steps 800 to 1000, least", min(ends), 0.95, 1.2, why),
            Check("the same, most", max(ends), 0.95, 1.2, why),
            Check("loss at the end over loss at the start, most", fall, high=0.1, why="it trains"),
        ),
        chart=Chart("The curvature over what the rate bears", "step", "lambda lr / 2", series),
        size=size,
    )


if __name__ == "__main__":
    tell(measure)
