"""The largest stable learning rate: which constant rates train a model, and which break it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW

from normwise.batches import Forward, Loss
from normwise.diagnose.chance import chance_of
from normwise.diagnose.constant_rate import MakeModel, MakeOptimizer, Task, first_loss, trial
from normwise.diagnose.objective import Batches, read
from normwise.diagnose.rate_grid import (
    Edge,
    Grid,
    Trial,
    best_edge,
    declared,
    diverge_edge,
    next_rates,
    sensitivity,
    train_edge,
)
from normwise.diagnose.results import Result, number
from normwise.errors import DiagnosisError
from normwise.untouched import untouched

SHARES = (0.5, 0.9, 0.25)  # of chance; the first is the one that counts

# The declared ranges. Heavy ball with 0.9 steps ten times as far as SGD; AdamW's step has the rate's own size.
RANGES: Mapping[str, tuple[float, float]] = {
    "sgd": (2.0**-8, 2.0**2),
    "momentum": (2.0**-11, 2.0**-1),
    "adamw": (2.0**-14, 2.0**-4),
}
_ANY_RANGE = (2.0**-14, 2.0**2)  # of an optimizer that is not in the table
_OPTIMIZERS: Mapping[str, MakeOptimizer] = {
    "sgd": SGD,
    "momentum": lambda parameters, lr: SGD(parameters, lr, momentum=0.9),
    "adamw": AdamW,
}


@dataclass(frozen=True, repr=False)
class StableRates(Result):
    """Which constant learning rates train; see `max_stable_lr`.

    Attributes:
        steps: How many steps a trial takes.
        chance: The loss that the thresholds are shares of.
        chance_from: Where it is from: "labels' entropy", "targets' variance", "first loss" or "given".
        declared: The rates that sensitivity is the mean over.
        trials: Every trial, by rate and seed.
        lr_diverge: The smallest rate that diverges.
        lr_train: The largest rate that trains, by the share of chance below which a loss has to end.
        lr_best: The rate with the lowest validation loss.
        margin: log2(lr_train / lr_best) at the first share: the octaves between the best rate and the edge.
        sensitivity: The mean over `declared` of min(loss, first loss), minus the best loss; None where all diverged.
    """

    steps: int
    chance: float
    chance_from: str
    declared: tuple[float, ...]
    trials: tuple[Trial, ...]
    lr_diverge: Edge
    lr_train: Mapping[str, Edge]
    lr_best: Edge
    margin: float | None
    sensitivity: float | None

    @property
    def meaning(self) -> str:
        """What was found, in one line."""
        share, train = next(iter(self.lr_train.items()))
        highest = number(max(trial.lr for trial in self.trials))
        trains = f"trains up to learning rate {_said(train)}" if train.seeds else f"trains at no rate up to {highest}"
        never = self.lr_diverge.open == self.lr_diverge.seeds
        diverges = f"diverges at none up to {highest}" if never else f"diverges from {_said(self.lr_diverge)}"
        return (
            f"{trains} ({share} of chance, {number(self.chance)}), {diverges}, best at {_said(self.lr_best)}; "
            f"learning-rate sensitivity {number(self.sensitivity)}"
        )

    def ratios(self, other: StableRates) -> dict[str, float | None]:
        """How many times larger the rates are that this one tolerates, at each share and for divergence.

        None where either has no such rate. That it tolerates larger rates does not say that it is smoother: behind a
        normalization they grow with the weights' scale.
        """
        pairs = {share: (edge, other.lr_train.get(share)) for share, edge in self.lr_train.items()}
        pairs["diverge"] = (self.lr_diverge, other.lr_diverge)
        return {name: _ratio(own, its) for name, (own, its) in pairs.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One row a trial."""
        return [vars(trial) for trial in self.trials]

    def headline(self) -> dict[str, float | None]:
        """The three rates and the sensitivity."""
        return {
            "lr_train": next(iter(self.lr_train.values())).value,
            "lr_diverge": self.lr_diverge.value,
            "lr_best": self.lr_best.value,
            "lr_sensitivity": self.sensitivity,
        }

    def traces(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The validation loss against the rate, one line a seed; what diverged is a cross at its first loss."""
        lines = [self._line(seed) for seed in sorted({trial.seed for trial in self.trials})]
        failed = [trial for trial in self.trials if trial.outcome == "diverged"]
        crosses = {
            "type": "scatter",
            "mode": "markers",
            "name": "diverged",
            "marker": {"symbol": "x"},
            "x": [trial.lr for trial in failed],
            "y": [trial.first_loss for trial in failed],
        }
        return [*lines, crosses], {
            "xaxis": {"title": {"text": "learning rate"}, "type": "log"},
            "yaxis": {"title": {"text": f"validation loss after {self.steps} steps"}},
            "shapes": [_level(float(share) * self.chance) for share in self.lr_train],
        }

    def _line(self, seed: int) -> dict[str, Any]:
        own = [trial for trial in self.trials if trial.seed == seed and trial.val_loss is not None]
        points = {"x": [trial.lr for trial in own], "y": [trial.val_loss for trial in own]}
        return {"type": "scatter", "mode": "lines+markers", "name": f"seed {seed}", **points}


def max_stable_lr(
    model: nn.Module | MakeModel,
    batches: Batches,
    loss: Loss | None = None,
    *,
    optimizer: str | MakeOptimizer = "sgd",
    steps: int = 60,
    seeds: int = 3,
    rates: tuple[float, float] | None = None,
    validation: Batches | None = None,
    chance: float | None = None,
    shares: Sequence[float] = SHARES,
    forward: Forward | None = None,
    progress: Callable[[Trial], object] | None = None,
) -> StableRates:
    """Train again and again at constant learning rates, and find those that work; the model is left as it was.

    Each trial starts anew, takes the same batches in the same order at every rate, and then has *diverged* (a parameter
    or a loss is not finite at the end; a spike that recovers is none), *trains* (the mean training loss of the last
    tenth of the steps and the validation loss in evaluation mode are both below the first of `shares` of chance), or is
    *stuck*: a dead network has a finite loss at any rate. Outcomes are not monotone in the rate, so the search looks
    past the first failure: a grid of rates, a factor 4 apart, widens by itself until every edge and optimum is
    enclosed, or says so, and is refined to half-octaves there. Rates are geometric means over the seeds, with their
    range. The headline is the *learning-rate sensitivity* of Wortsman et al. 2023 (arXiv:2309.14322).

    The largest rate depends on the parametrization as curvature does: behind a normalization the function does not
    change with the scale of the weights, and large rates only make them larger.

    Args:
        model: A model, whose weights as they are start every trial: then the seeds decide on the order of the batches
            and on dropout alone. Or a function that makes one: then they draw the weights as well.
        batches: A batch, a list of batches or a loader; the first `steps` of them are read once and kept.
        loss: `loss(output, target)`, with the second element of a tuple or list as the target. None: the model's own.
        optimizer: "sgd", "momentum" (0.9), "adamw", or a function of the parameters and a rate, as
            `lambda p, lr: torch.optim.Adam(p, lr)`.
        steps: Steps a trial.
        seeds: How many seeds.
        rates: The declared range, lowest and highest, that sensitivity is a mean over and that the search begins with;
            by default that of the optimizer in `RANGES`, and 2⁻¹⁴ to 4 for one that is not there. Rates are rounded to
            half-octaves.
        validation: Other batches to judge by; by default those of the training, in evaluation mode.
        chance: The loss of the best constant prediction. By default the labels' entropy for torch's cross-entropy, the
            variance of the targets for its mean squared error, and the loss before the first step for every other.
        shares: Shares of chance that are thresholds for training; outcomes and margin go by the first.
        forward: `forward(model, batch)`, for models that are called otherwise.
        progress: Called with every trial when it has ended.

    Raises:
        DiagnosisError: there is no batch or gradient; a number out of its range; a loss that is not finite at the
            start.

    >>> x = torch.tensor([[1.0], [-1.0]])  # the loss is (w - 1)², which descends up to a rate of 1
    >>> model = nn.Linear(1, 1, bias=False)
    >>> found = max_stable_lr(model, (x, x), nn.functional.mse_loss, steps=300, seeds=1)
    >>> found.lr_train["0.5"].value, found.lr_diverge.value
    (0.7071067811865476, 1.4142135623730951)
    """
    make, low, high = _optimizer(optimizer, rates)
    _check(steps=steps, seeds=seeds, chance=chance, shares=shares, low=low, high=high)
    if low > high:
        raise DiagnosisError(f"rates={rates}: the lowest comes first")
    if not shares:
        raise DiagnosisError("shares is empty: give one number or more")
    with _left_alone(model, batches, validation):
        given = read(batches, steps)
        judged = given if validation is None else read(validation)
        task = Task(model, given, judged, loss, forward, make, steps)
        first = [first_loss(task, seed) for seed in range(seeds)]
        reference, source = _reference(chance, given, loss, first)
        losses = {f"{share:g}": share * reference for share in shares}
        start = declared(low, high)
        grid: dict[float, list[Trial]] = {}
        while wanted := next_rates(grid, start, tuple(losses.values())):
            for lr in wanted:
                found = (trial(task, lr, seed, first[seed], shares[0] * reference) for seed in range(seeds))
                grid[lr] = [_told(one, progress) for one in found]
            grid = dict(sorted(grid.items()))
        return _summed(grid, steps, reference, source, start, losses)


def _told(found: Trial, progress: Callable[[Trial], object] | None) -> Trial:
    if progress is not None:
        progress(found)
    return found


def _summed(
    grid: Grid, steps: int, chance: float, source: str, start: tuple[float, ...], losses: Mapping[str, float]
) -> StableRates:
    lr_best, lr_train = best_edge(grid), {share: train_edge(grid, loss) for share, loss in losses.items()}
    ratio = _ratio(next(iter(lr_train.values())), lr_best)
    return StableRates(
        steps=steps,
        chance=chance,
        chance_from=source,
        declared=start,
        trials=tuple(trial for trials in grid.values() for trial in trials),
        lr_diverge=diverge_edge(grid),
        lr_train=lr_train,
        lr_best=lr_best,
        margin=None if ratio is None else math.log2(ratio),
        sensitivity=sensitivity(grid, start),
    )


@contextmanager
def _left_alone(model: nn.Module | MakeModel, batches: Batches, validation: Batches | None) -> Iterator[None]:
    """The model, the generators and those of both loaders are afterwards as they were."""
    if not callable(model):
        raise DiagnosisError(f"model is a {type(model).__name__}: give a torch.nn.Module, or a function that makes one")
    held = model if isinstance(model, nn.Module) else nn.Identity()
    devices = range(torch.cuda.device_count())  # of all of them, because seeding seeds all
    with torch.random.fork_rng(devices), untouched(held, batches=batches), untouched(held, batches=validation):
        yield


def _optimizer(wanted: str | MakeOptimizer, rates: tuple[float, float] | None) -> tuple[MakeOptimizer, float, float]:
    """How to make the optimizer, and the declared range."""
    if not isinstance(wanted, str):
        if not callable(wanted):
            kind = type(wanted).__name__
            raise DiagnosisError(
                f"optimizer is a {kind}: trials make their own, so give a function of parameters and rate"
            )
        return wanted, *(rates or _ANY_RANGE)
    if wanted not in _OPTIMIZERS:
        raise DiagnosisError(
            f"optimizer={wanted!r}: it is one of {', '.join(_OPTIMIZERS)}, or a function of the parameters and a rate"
        )
    return _OPTIMIZERS[wanted], *(rates or RANGES[wanted])


def _reference(given: float | None, batches: list[Any], loss: Loss | None, first: list[float]) -> tuple[float, str]:
    """What the thresholds are shares of, and where it is from."""
    if given is not None:
        return given, "given"
    chance, source = chance_of(batches, loss) or (median(first), "first loss")
    if not chance > 0:
        raise DiagnosisError(f"chance, the {source}, is {chance:.3g}, which has no share: give chance=")
    return chance, source


def _check(**values: float | Sequence[float] | None) -> None:
    for name, value in values.items():
        numbers = [] if value is None else value if isinstance(value, Sequence) else [value]
        for each in numbers:
            if not 0 < each < math.inf:
                raise DiagnosisError(f"{name}: {each} is not a positive number")


def _ratio(own: Edge, other: Edge | None) -> float | None:
    if own.value is None or other is None or other.value is None:
        return None
    return own.value / other.value


def _said(edge: Edge) -> str:
    """A rate with the seeds' range."""
    if edge.value is None or edge.low == edge.high:
        return number(edge.value)
    return f"{number(edge.value)} ({number(edge.low)} to {number(edge.high)})"


def _level(loss: float) -> dict[str, Any]:
    """A dotted line at a threshold."""
    line = {"dash": "dot", "width": 1}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": loss, "y1": loss, "line": line}
