"""The learning-rate ramp: the band, the other verdicts, and that it is fitted on the logarithm of the rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from normwise.diagnose.lr_range import lr_range
from normwise.diagnose.stable_lr import max_stable_lr
from normwise.errors import DiagnosisError


def data(rows: int = 64, count: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Three classes that a linear map tells apart nearly."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows * count, 8, generator=generator)
    y = (x @ torch.randn(8, 3, generator=generator) + 0.3 * torch.randn(len(x), 3, generator=generator)).argmax(1)
    return list(zip(x.split(rows), y.split(rows), strict=True))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


class Ramped(nn.Module):
    """A loss that is a given function of how far a parameter with a gradient of -1 has come."""

    def __init__(self, heights: list[float]) -> None:
        super().__init__()
        self.at, self.heights, self.calls = nn.Parameter(torch.zeros(())), heights, 0

    def forward(self, x: Tensor) -> Tensor:
        height = self.heights[self.calls]
        self.calls += 1
        return height + (self.at - self.at.detach())


def shaped(heights: list[float], **given: Any) -> Any:
    return lr_range(Ramped(heights), torch.ones(1), steps=len(heights), low=1e-4, high=1.0, **given)


def falling(start: int, stop: int, steps: int = 100) -> list[float]:
    """2 up to a step, then down to 1 evenly, and up again beyond the next."""
    down = [2 - (k - start) / (stop - start) for k in range(start, stop)]
    return [2.0] * start + down + [1 + 0.3 * k for k in range(steps - stop)]


def test_the_rates_of_a_ramp() -> None:
    found = shaped(falling(40, 70))
    assert found.lrs[0] == 1e-4
    assert found.lrs[-1] == pytest.approx(1.0)
    ratios = torch.tensor(found.lrs[1:]) / torch.tensor(found.lrs[:-1])
    assert float((ratios - 10 ** (4 / 99)).abs().max()) < 1e-5


def test_the_average_has_no_bias_and_the_slope_is_by_the_logarithm() -> None:
    heights = [2.0 - 0.01 * k for k in range(100)]
    found = shaped(heights, smoothing=0.6)
    weights = [0.6**k for k in range(100)]
    for at in (0, 1, 7, 99):
        own = sum(w * h for w, h in zip(weights, heights[at::-1], strict=False)) / sum(weights[: at + 1])
        assert found.smoothed[at] == pytest.approx(own)
    assert found.slopes[60] == pytest.approx(-0.01 / math.log(10 ** (4 / 99)), rel=1e-4)
    assert shaped(heights, smoothing=0.0).smoothed == pytest.approx(heights)


def test_the_band_is_where_the_loss_falls() -> None:
    found = shaped(falling(40, 70))
    assert found.verdict == "band"
    assert found.lrs[40] <= found.low < found.lrs[48]
    assert found.lrs[62] < found.high <= found.lrs[72]
    assert found.meaning.startswith("0.00")
    assert found.reason.startswith("here the loss falls at least half as fast as it does at most, and it rises beyond ")


def test_within_an_autocast_the_weights_of_each_step_count() -> None:
    model, given = nn.Linear(1, 1, bias=False), [(torch.ones(4, 1), 3 * torch.ones(4, 1))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lr_range(model, given, lambda output, target: mse_loss(output.float(), target))
    assert found.verdict == "band"


def test_a_fall_after_a_blow_up_is_not_mistaken_for_learning() -> None:
    heights = falling(40, 60)[:70] + [200.0, 100.0, 3.0] + [0.5] * 27
    found = shaped(heights)
    assert found.verdict == "band"
    assert found.lrs[40] <= found.low < found.high <= found.lrs[65]


def test_nothing_counts_after_the_first_that_is_not_finite() -> None:
    heights = falling(40, 70)[:75] + [math.nan] + [0.0] * 24
    found = shaped(heights)
    assert (len(found.losses), found.broke_at) == (75, found.lrs[-1])
    assert found.verdict == "band"
    assert found.reason.endswith(f"; it is not finite after {found.broke_at:.3g}")


def noisy(heights: list[float], size: float) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return [h + size * float(torch.randn((), generator=generator)) for h in heights]


VERDICTS = {
    "flat": (
        [2.0] * 100,
        "flat",
        "no rate from 0.0001 to 1 changes the loss: raise high, or look for what is frozen or dead",
    ),
    "flat with a little noise": (noisy([2.0] * 100, 0.05), "flat", None),
    "still falling": (falling(60, 140)[:100], "still falling", "the loss falls steepest towards 1: raise high"),
    "too noisy": (
        noisy([2.0] * 100, 1.0),
        "too noisy",
        "no fall stands out from the batches' differences: take larger batches or more steps",
    ),
    "rises at once": ([2.0] * 20 + [2.0 * 1.1**k for k in range(80)], "rises at once", None),
    "breaks at once": (
        [2.0] * 20 + [math.inf] + [0.0] * 79,
        "rises at once",
        "the loss breaks at 0.000586 without a fall before: lower low, or take more steps",
    ),
    "noise and a fall": (noisy(falling(40, 70), 0.1), "band", None),
}


@pytest.mark.parametrize(("heights", "verdict", "reason"), VERDICTS.values(), ids=VERDICTS)
def test_verdicts(heights: list[float], verdict: str, reason: str | None) -> None:
    found = shaped(heights)
    assert found.verdict == verdict
    assert reason in (None, found.reason)
    assert (found.low is None) == (found.high is None) == (verdict != "band")
    assert found.headline() == {"lr_low": found.low, "lr_high": found.high}
    if verdict != "band":
        assert found.meaning == f"{verdict}: {found.reason}"
        assert found.traces()[1]["shapes"] == []


MAKERS = {
    "SGD": (None, "sgd"),
    "momentum": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "momentum"),
    "AdamW": (torch.optim.AdamW, "adamw"),
}


@pytest.mark.parametrize(("make", "name"), MAKERS.values(), ids=MAKERS)
def test_the_band_lies_by_the_best_constant_rate(make: Any, name: str) -> None:
    """Differentiating by the rate itself would suggest the beginning of the ramp."""
    model = net()
    found = lr_range(model, data(), cross_entropy, optimizer=make)
    best = max_stable_lr(model, data(), cross_entropy, optimizer=name, seeds=1, steps=30).lr_best.value
    assert found.verdict == "band"
    assert found.low / 4 < best < found.high * 4
    linear = [
        (b - a) / (q - p)
        for a, b, p, q in zip(found.smoothed, found.smoothed[1:], found.lrs, found.lrs[1:], strict=False)
    ]
    assert found.lrs[min(range(len(linear)), key=linear.__getitem__)] < best / 1000


def test_groups_of_an_optimizer_keep_their_shares() -> None:
    first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    model = nn.Sequential(first, second)
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in ((first, 0.02), (second, 0.2))]
    optimizer = torch.optim.SGD(groups)
    seen: list[tuple[float, float]] = []

    def watching(output: Tensor, target: Tensor) -> Tensor:
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))
        return mse_loss(output, target)

    lr_range(model, (torch.ones(4, 1), torch.ones(4, 1)), watching, optimizer=optimizer, steps=20, low=1e-3, high=0.1)
    assert [high for _, high in seen] == pytest.approx([1e-3 * 100 ** (k / 19) for k in range(20)])
    assert [low / high for low, high in seen] == pytest.approx([0.1] * 20)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.2]


REFUSED = {
    "frozen": (
        {"model": nn.Linear(8, 3).requires_grad_(False)},
        "no parameter requires a gradient, so there is nothing to train",
    ),
    "order": ({"low": 1.0, "high": 0.1}, "low=1.0, high=0.1: a ramp goes from a positive rate to a larger one"),
    "zero": ({"low": 0.0}, "low=0.0, high=10.0: a ramp goes from a positive rate to a larger one"),
    "steps": ({"steps": 19}, "steps=19: a ramp takes 20 or more"),
    "smoothing": ({"smoothing": 1.0}, "smoothing=1.0: it lies between 0 and 1"),
    "optimizer": ({"optimizer": lambda p: "sgd"}, "optimizer made a str, not a torch.optim.Optimizer"),
    "loss": (
        {"loss": lambda output, target: output.sum() * math.nan},
        "the loss is not finite before the first step: nw.first_nonfinite tells where it begins",
    ),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DiagnosisError) as caught:
        lr_range(**{"model": net(), "batches": data(), "loss": cross_entropy, **given})
    assert str(caught.value) == message
