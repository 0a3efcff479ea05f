"""How much curvature a step bears, against what the optimizers do on a quadratic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from normwise.diagnose.thresholds import stability_threshold
from normwise.errors import DiagnosisError

SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.5},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.3, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.9},
    {"momentum": 0.8, "dampening": 0.3},
]


def end(curvature: float, lr: float, settings: dict[str, Any]) -> float:
    """Where torch's SGD is after 4000 steps on curvature / 2 · w², from 1."""
    w = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr, **settings)
    for _ in range(4000):
        w.grad = curvature * w.detach()
        optimizer.step()
        if w.detach().abs() > 1e6:
            break
    return w.detach().abs().item()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("lr", [0.01, 3.0])
def test_descent_turns_into_divergence_at_the_threshold(settings: dict[str, Any], lr: float) -> None:
    threshold = stability_threshold(lr, **settings)
    assert end(0.99 * threshold, lr, settings) < 1e-6
    assert end(1.01 * threshold, lr, settings) > 1e6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.0}, "lr=0.0: a learning rate is positive"),
        ({"lr": float("nan")}, "lr=nan: a learning rate is positive"),
        ({"lr": 1, "momentum": 1.0}, "momentum=1.0: it lies between 0 and 1"),
        ({"lr": 1, "momentum": 0.5, "dampening": -0.1}, "dampening=-0.1: it lies between 0 and 1"),
        ({"lr": 1, "nesterov": True}, "Nesterov's step needs a momentum and no dampening"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DiagnosisError) as caught:
        stability_threshold(**given)
    assert str(caught.value) == message
