"""Standardizing the inputs helps a deep network little beyond their units; batch normalization makes it needless.

Grey levels of 0 to 255, or standardized, each pixel by its own mean and deviation: without normalization the largest
learning rate differs by a factor of hundreds. Most of that is a matter of units. One offset and one scale for all
pixels, as from Fahrenheit to Celsius, bring most of it, and most of what is gained in the loss at the best rate of
each. Behind a batch normalization even the units do not matter: one rate serves all.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from math import log, nan
from statistics import fmean

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise.lessons import Chart, Check, Lesson, Size, about, tell
from normwise.tuning.data import Split
from normwise.tuning.models import mlp
from normwise.tuning.training import batches

NORMS = {"none": nn.Identity, "batch": nn.BatchNorm1d}  # torch's: many hundred short trainings
RAW, UNITS, EACH = "0 to 255", "one offset, one scale", "standardized"
SMALL = [("none", depth, scaling) for depth in (2, 12) for scaling in (RAW, UNITS, EACH)]
FULL = [(norm, depth, scaling) for norm in NORMS for depth in (2, 6, 12) for scaling in (RAW, UNITS, EACH)]
CASES = {"small": [*SMALL, ("batch", 12, RAW), ("batch", 12, EACH)], "full": FULL}
SEEDS, STEPS = {"small": 2, "full": 4}, 60


def scalings() -> tuple[dict[str, Tensor], Tensor]:
    """The digits in three scalings, and their labels, in one random order."""
    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order].float(), labels[order]
    spread = pixels.std(0)
    each = (pixels - pixels.mean(0)) / spread.where(spread > 0, 1)
    return {RAW: pixels * 255 / 16, UNITS: (pixels - pixels.mean()) / pixels.std(), EACH: each}, labels


def rate_and_loss(norm: str, depth: int, x: Tensor, labels: Tensor, seeds: int) -> tuple[float, float]:
    """The largest rate that trains to 0.9 of chance, and the lowest mean validation loss at any rate."""
    order = list(islice(batches(Split(x[:900], labels[:900]), 128, 0), STEPS))
    model, judged = partial(mlp, NORMS[norm], depth=depth), (x[900:], labels[900:])
    found = nw.max_stable_lr(model, order, F.cross_entropy, steps=STEPS, seeds=seeds, validation=judged, shares=(0.9,))
    losses: dict[float, list[float]] = {}
    for trial in found.trials:  # what diverged counts at its first loss
        losses.setdefault(trial.lr, []).append(trial.first_loss if trial.val_loss is None else trial.val_loss)
    return found.lr_train["0.9"].value or nan, min(map(fmean, losses.values()))


def checks(rate: dict[tuple[str, int, str], float], loss: dict[tuple[str, int, str], float]) -> tuple[Check, ...]:
    """The ranges at 12 layers."""
    raw, units, each = (("none", 12, scaling) for scaling in (RAW, UNITS, EACH))
    factor, behind = rate[each] / rate[raw], (("batch", 12, EACH), ("batch", 12, RAW))
    by_units = log(rate[units] / rate[raw]) / log(factor)
    gained = (loss[raw] - loss[units]) / (loss[raw] - loss[each])
    tolerated, needless = rate[behind[0]] / rate[behind[1]], loss[behind[1]] / loss[behind[0]]
    return (
        about(
            "largest rate, standardized / 0 to 255",
            factor,
            0.25 / 0.002,
            4,
            "each edge an octave off",
        ),
        Check("share of the units in that factor, in octaves", by_units, 0.5, why="mostly the units"),
        Check("share of the units in the loss gained", gained, 0.5, why="mostly the units"),
        about("largest rate, batch norm, standardized / 0 to 255", tolerated, 1, 2, "half-octaves, each edge one off"),
        Check("lowest loss, batch norm, 0 to 255 / standardized", needless, high=1.25, why="needless"),
    )


def measure(size: Size) -> Lesson:
    """The largest rate that trains, and the loss at the best one, by scaling, depth and normalization."""
    (scaled, labels), cases = scalings(), CASES[size]
    found = {case: rate_and_loss(*case[:2], scaled[case[2]], labels, SEEDS[size]) for case in cases}
    rate, loss = {case: pair[0] for case, pair in found.items()}, {case: pair[1] for case, pair in found.items()}
    names = {scaling: [f"{n}, depth {d}" for n, d, s in cases if s == scaling] for scaling in scaled}
    return Lesson(
        name="inputs",
        claim="Standardizing the inputs helps a deep network little beyond their units; batch norm makes it needless.",
        setting=f"MLP, width 64, He's start, digits, batches of 128, {STEPS} steps of SGD, each at its own best "
        f"rate, {SEEDS[size]} seeds; largest rate: to 0.9 of chance; the ranges are for 12 layers",
        table=tuple(
            {"norm": n, "depth": d, "pixels": s, "largest rate": rate[n, d, s], "lowest loss": loss[n, d, s]}
            for n, d, s in cases
        ),
        checks=checks(rate, loss),
        chart=Chart(
            f"Lowest loss after {STEPS} steps, each at its own best rate",
            "network",
            "validation loss",
            {scaling: (names[scaling], [loss[case] for case in cases if case[2] == scaling]) for scaling in scaled},
            bars=True,
        ),
        size=size,
    )


if __name__ == "__main__":
    tell(measure)
