"""A memory along time for the tests: the layer, sequences, and what each step remembers by the definition."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from normwise import Moving, Norm
from normwise.memory import Beyond
from tests.tolerances import MEMORY, check

EPS = 1e-5
LAST: Mapping[str, Beyond] = {"t": "last"}
POOLED: Mapping[str, Beyond] = {"t": "pooled"}
RAISE: Mapping[str, Beyond] = {"t": "raise"}


def elastic(beyond: Mapping[str, Beyond] = LAST, text: str = "[n] t c", over: str = "t c", **sizes: int) -> Norm:
    return Norm(text, memory=Moving(over, decay=0.75, beyond=beyond), **sizes)


def sequences(n: int, t: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Another mean and spread at every step."""
    steps = torch.arange(1.0, t + 1).unsqueeze(1)
    return (torch.randn(n, t, 3) * steps + steps.square()).to(dtype)


class ByStep:
    """What is remembered of each step, in float64, by the definition: a moving average that starts from 0 and 1."""

    def __init__(self, steps: int, rate: float | None = 0.25) -> None:
        self.rate = rate
        self.mean = torch.zeros(steps, 3, dtype=torch.double)
        self.var = torch.ones(steps, 3, dtype=torch.double)
        self.batches = [0] * steps

    def see(self, x: Tensor, lengths: list[int] | None = None) -> None:
        for t in range(min(x.shape[1], len(self.batches))):
            alive = x[:, t].double() if lengths is None else x[torch.tensor(lengths) > t, t].double()
            if len(alive) >= 2:
                self.batches[t] += 1
                rate = 1 / self.batches[t] if self.rate is None else self.rate
                self.mean[t] += rate * (alive.mean(0) - self.mean[t])
                self.var[t] += rate * (alive.var(0) - self.var[t])

    def check(self, norm: nn.Module) -> None:
        check(norm.running_mean.double(), self.mean, MEMORY)
        check(norm.running_var.double(), self.var, MEMORY)
        assert norm.num_batches_tracked.tolist() == self.batches

    def apply(self, x: Tensor, step: int, at: int) -> Tensor:
        """The values of one step of an input with the statistics of another."""
        return (x[:, step].double() - self.mean[at]) / (self.var[at] + EPS).sqrt()


def standardized(x: Tensor) -> Tensor:
    x = x.double()
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + EPS).sqrt()


def grown() -> tuple[Norm, ByStep]:
    """Trained on sequences of 3, 5 and 4 steps."""
    norm, steps = elastic(), ByStep(5)
    for t in (3, 5, 4):
        x = sequences(8, t)
        norm(x)
        steps.see(x)
    return norm, steps
