"""Points drawn by Optuna's samplers: a learning rate, and a value for each axis.

A study asks for its points in batches. What a batch holds depends on the settings and on what came of the batches
before, never on who asks or when: a study is built anew in Optuna's memory for every batch, told all the earlier
points in the order they were drawn, and given a seed of its own. So a resumed study, and every machine that works on
one, finds the same points.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, QMCSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from normwise.tuning.rates import declared_rates
from normwise.tuning.records import Settings, Value, Variant

SAMPLERS = ("grid", "qmc", "tpe")
BATCH = 9  # points that are drawn together: a whole number of halvings by three
_HEIGHT = "lr"  # in Optuna: where a rate lies in its range, by logarithm, from 0 to 1

Axes = tuple[tuple[str, tuple[Value, ...]], ...]


@dataclass(frozen=True)
class Point:
    """A place in the box: the height of the learning rate in its range, from 0 to 1, and a value for each axis."""

    height: float
    variant: Variant = ()

    def lr(self, settings: Settings) -> float:
        """The learning rate, evenly by logarithm over the declared range of the point's own optimizer.

        Six digits, so that machines whose logarithms differ in the last bit agree.

        >>> settings = Settings("mlp", "digits", (), lrs=(0.01, 1.0))
        >>> Point(0.0).lr(settings), Point(0.5).lr(settings), Point(1.0).lr(settings)
        (0.01, 0.1, 1.0)
        """
        rates = declared_rates(settings.at(self.variant))
        low, high = math.log(rates[0]), math.log(rates[-1])
        return float(f"{math.exp(low + self.height * (high - low)):.6g}")


@dataclass(frozen=True)
class Told:
    """What came of a point.

    `score` is None for one that was pruned or that failed; `rungs` are the mean scores on the way, none where a seed
    diverged.
    """

    point: Point
    score: float | None
    rungs: tuple[float, ...] = ()


def draw(settings: Settings, index: int, batch: int, told: Iterable[Told], count: int) -> tuple[Point, ...]:
    """The points of one batch of a normalization, by its index in the study.

    >>> settings = Settings("mlp", "digits", (), sampler="qmc", axes=(("batch_size", (8, 32)),))
    >>> points = draw(settings, 0, 0, (), 4)
    >>> points == draw(settings, 0, 0, (), 4), points == draw(settings, 1, 0, (), 4)
    (True, False)
    """
    seed = int(np.random.SeedSequence((settings.base_seed, index, batch)).generate_state(1)[0])
    return _draw(settings.sampler, settings.axes, settings.direction == "max", seed, tuple(told), count)


@lru_cache(maxsize=1024)
def _draw(sampler: str, axes: Axes, larger: bool, seed: int, told: tuple[Told, ...], count: int) -> tuple[Point, ...]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    direction = StudyDirection.MAXIMIZE if larger else StudyDirection.MINIMIZE
    study = optuna.create_study(sampler=_sampler(sampler, seed), direction=direction)
    box = _box(axes)
    for one in told:
        study.add_trial(_trial(one, box))
    return tuple(_point(study.ask(box).params, axes) for _ in range(count))


def _sampler(name: str, seed: int) -> BaseSampler:
    """Sobol's sequence, scrambled; or Parzen estimators that take a point which still runs for a bad one."""
    if name == "qmc":
        with warnings.catch_warnings():  # Optuna calls it experimental
            warnings.simplefilter("ignore", ExperimentalWarning)
            return QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False)
    return TPESampler(n_startup_trials=BATCH, constant_liar=True, seed=seed)


def _box(axes: Axes) -> dict[str, BaseDistribution]:
    return {_HEIGHT: FloatDistribution(0.0, 1.0), **{name: CategoricalDistribution(own) for name, own in axes}}


def _trial(told: Told, box: dict[str, BaseDistribution]) -> optuna.trial.FrozenTrial:
    """A finished trial; one that was pruned ranks by how far it got, one that failed is infeasible and ranks last."""
    return create_trial(
        state=TrialState.PRUNED if told.score is None else TrialState.COMPLETE,
        value=told.score,
        params={_HEIGHT: told.point.height, **dict(told.point.variant)},
        distributions=box,
        intermediate_values=dict(enumerate(told.rungs)) if told.score is None else {},
    )


def _point(params: dict[str, Value], axes: Axes) -> Point:
    return Point(float(params[_HEIGHT]), tuple((name, params[name]) for name, _ in axes))
