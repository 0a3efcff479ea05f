"""The learning-rate ramp: how the loss falls while the rate grows, and the band where it falls best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, pairwise
from statistics import fmean
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from normwise.batches import Forward, Loss
from normwise.diagnose.objective import Batches, measuring, read
from normwise.diagnose.results import Result, number
from normwise.diagnose.stepping import MakeOptimizer, descend, finite, stepper
from normwise.errors import DiagnosisError

Verdict = Literal["band", "flat", "still falling", "too noisy", "rises at once"]
_SURE = 4.0  # standard errors of the smoothed loss that a fall has to exceed
_FLAT = 0.02  # a fall of less than this share of the first loss is none
_NOISY = 0.1  # a fall of this share of the first loss has to stand out from the noise
_REACH = 3  # steps to either side that a slope is taken over
_FEWEST = 20  # steps of a ramp


@dataclass(frozen=True, repr=False)
class LrRange(Result):
    """What a learning-rate ramp showed; see `lr_range`.

    Attributes:
        lrs: The rate of each step, up to the last with a finite loss.
        losses: The loss before it.
        smoothed: The losses as an exponential moving average, with its bias taken out.
        slopes: d smoothed / d ln(rate).
        broke_at: The rate whose step made the loss or a parameter non-finite; None where none did.
        verdict: "band", or why there is none.
        low: The lower end of the band.
        high: The upper end.
        reason: Why, and what to do.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    slopes: tuple[float, ...]
    broke_at: float | None
    verdict: Verdict
    low: float | None
    high: float | None
    reason: str

    @property
    def meaning(self) -> str:
        """What was found, in one line."""
        found = f"{number(self.low)} to {number(self.high)}" if self.verdict == "band" else self.verdict
        return f"{found}: {self.reason}"

    def rows(self) -> list[dict[str, Any]]:
        """One row a step."""
        columns = zip(self.lrs, self.losses, self.smoothed, self.slopes, strict=True)
        return [dict(zip(("lr", "loss", "smoothed", "slope"), row, strict=True)) for row in columns]

    def headline(self) -> dict[str, float | None]:
        """The band."""
        return {"lr_low": self.low, "lr_high": self.high}

    def traces(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The loss and its average against the rate, with the band behind."""
        points: dict[str, Any] = {"type": "scatter", "x": self.lrs}
        lines = [
            {**points, "name": "loss", "mode": "markers", "y": self.losses, "opacity": 0.4},
            {**points, "name": "smoothed", "mode": "lines", "y": self.smoothed},
        ]
        behind = {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "opacity": 0.2, "line": {"width": 0}}
        band = [{**behind, "x0": self.low, "x1": self.high, "fillcolor": "green"}] if self.verdict == "band" else []
        return lines, {
            "xaxis": {"title": {"text": "learning rate"}, "type": "log"},
            "yaxis": {"title": {"text": "loss"}},
            "shapes": band,
        }


def lr_range(
    model: nn.Module,
    batches: Batches,
    loss: Loss | None = None,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    optimizer: Optimizer | MakeOptimizer | None = None,
    smoothing: float = 0.8,
    forward: Forward | None = None,
) -> LrRange:
    """Train in training mode while the rate grows from `low` to `high`; the model is left as it was, bit for bit.

    The rate of step k of n is low (high / low)^(k / (n - 1)) (Smith 2015, arXiv:1506.01186). The loss is smoothed by an
    exponential moving average whose bias is taken out, and differentiated by the *logarithm* of the rate; by the rate
    itself the slope would be steepest where the ramp begins. The answer is a band: the rates around the steepest fall
    at which the loss falls at least half as fast. Losses count up to the first that is not finite, and until they have
    risen above the first by more than they had fallen.

    A short ramp from the weights as they are is a hint and no measurement: `max_stable_lr` is one. Other verdicts are
    "flat" (no rate changes the loss), "still falling" (at the highest rate), "too noisy" (no fall can be told from the
    batches' differences) and "rises at once" (without a fall before); `reason` says what to do.

    Args:
        model: A model, in any mode.
        batches: A batch, a list of batches or a loader; the first `steps` of them are read once and used in turn.
        loss: `loss(output, target)`, with the second element of a tuple or list as the target. None: the model's own.
        low: The rate of the first step.
        high: The rate of the last.
        steps: How many, at least 20.
        optimizer: Takes the steps: one over the model's parameters, which is put back afterwards, or a function that
            makes one of parameters, as `lambda p: torch.optim.AdamW(p)`. The ramp is the rate of the group with the
            largest; the other groups keep their shares of it. None: SGD.
        smoothing: The weight of the past in the average, from 0 to below 1.
        forward: `forward(model, batch)`, for models that are called otherwise.

    Raises:
        DiagnosisError: there is no batch or no gradient; a number out of its range; a loss that is not finite at the
            start.

    >>> model, x = nn.Linear(1, 1, bias=False), torch.tensor([[3.0], [-3.0]])  # loss 9 (w - 1)²: steps bear up to 1/9
    >>> found = lr_range(model, (x, x), nn.functional.mse_loss, low=1e-5)
    >>> found.verdict, 0.001 < found.low < found.high < 1 / 9
    ('band', True)
    """
    _check(low, high, steps, smoothing)
    live = optimizer if isinstance(optimizer, Optimizer) else None
    ramp = [low * (high / low) ** (k / (steps - 1)) for k in range(steps)]
    with measuring(model, "train", optimizer=live, batches=batches):
        given = read(batches, steps)
        taking = stepper(optimizer, model, low)
        losses = _ramped(ramp, given, model, loss, forward, taking)
    if not losses:
        raise DiagnosisError("the loss is not finite before the first step: nw.first_nonfinite tells where it begins")
    lrs, smoothed = ramp[: len(losses)], _smoothed(losses, smoothing)
    slopes = _slopes([math.log(lr) for lr in lrs], smoothed)
    broke_at = None if len(losses) == steps else lrs[-1]
    verdict, band, reason = _judged(lrs, losses, smoothed, slopes, smoothing, broke_at)
    bottom, top = band or (None, None)
    return LrRange(tuple(lrs), tuple(losses), tuple(smoothed), tuple(slopes), broke_at, verdict, bottom, top, reason)


def _check(low: float, high: float, steps: int, smoothing: float) -> None:
    if not 0 < low < high < math.inf:
        raise DiagnosisError(f"low={low}, high={high}: a ramp goes from a positive rate to a larger one")
    if steps < _FEWEST:
        raise DiagnosisError(f"steps={steps}: a ramp takes {_FEWEST} or more")
    if not 0 <= smoothing < 1:
        raise DiagnosisError(f"smoothing={smoothing}: it lies between 0 and 1")


def _ramped(
    ramp: Sequence[float],
    batches: Sequence[Any],
    model: nn.Module,
    loss: Loss | None,
    forward: Forward | None,
    optimizer: Optimizer,
) -> list[float]:
    """The loss before each step, up to the last that is finite."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    shares = [rate / max(rates) if max(rates) else 1.0 for rate in rates]
    losses: list[float] = []
    for lr, batch in zip(ramp, cycle(batches), strict=False):
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = lr * share
        value = descend(model, batch, loss, forward, optimizer)
        if not math.isfinite(value):
            break
        losses.append(value)
        if not finite(model):
            break
    return losses


def _smoothed(losses: Sequence[float], smoothing: float) -> list[float]:
    """The exponential moving average from 0, divided by the sum of its weights."""
    averages = accumulate(losses, lambda past, loss: smoothing * past + (1 - smoothing) * loss, initial=0.0)
    return [average / (1 - smoothing**k) for k, average in enumerate(averages) if k]


def _slopes(positions: Sequence[float], values: Sequence[float]) -> list[float]:
    """Differences between points a few steps before and after, as far as there are; 0 for a single point."""
    last = len(values) - 1
    near = [(max(at - _REACH, 0), min(at + _REACH, last)) for at in range(len(values))]
    return [(values[b] - values[a]) / (positions[b] - positions[a]) if b > a else 0.0 for a, b in near]


# ------------------------------------------------------------------------------------------------------------- verdict


def _judged(
    lrs: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    slopes: Sequence[float],
    smoothing: float,
    broke_at: float | None,
) -> tuple[Verdict, tuple[float, float] | None, str]:
    """The verdict, the band if there is one, and the reason."""
    first, noise = _beginning(losses)
    nothing = _FLAT * abs(first)
    end = _risen(smoothed, first, max(_SURE * noise, nothing))
    lowest = min(range(end), key=smoothed.__getitem__)
    doubt = _SURE * noise * math.sqrt((1 - smoothing) / (1 + smoothing))  # of an average over independent losses
    if first - smoothed[lowest] <= max(doubt, nothing):
        verdict, reason = _no_fall(lrs, end, doubt > _NOISY * abs(first), broke_at)
        return verdict, None, reason
    low, high = _around(slopes, min(_early(losses), lowest), lowest)
    if high == len(lrs) - 1 and broke_at is None:
        return "still falling", None, f"the loss falls steepest towards {number(lrs[-1])}: raise high"
    risen = f", and it rises beyond {number(lrs[lowest])}" if lowest < len(lrs) - 1 else ""
    reason = f"here the loss falls at least half as fast as it does at most{risen}"
    if broke_at is not None:
        reason += f"; it is not finite after {number(broke_at)}"
    return "band", (lrs[low], lrs[high]), reason


def _beginning(losses: Sequence[float]) -> tuple[float, float]:
    """The mean loss where the rates are still too small to matter, and the standard deviation of one loss there.

    That is taken from the differences of neighbours, so that a slope does not count as noise.
    """
    early = losses[: _early(losses)]
    squares = [(b - a) ** 2 / 2 for a, b in pairwise(early)]
    return fmean(early), math.sqrt(fmean(squares)) if squares else 0.0


def _risen(smoothed: Sequence[float], first: float, slack: float) -> int:
    """How many losses there are until one has risen above the first by more than they had fallen, and some slack."""
    lowest = accumulate(smoothed, min)
    risen = (
        at for at, (value, low) in enumerate(zip(smoothed, lowest, strict=True)) if value - first > first - low + slack
    )
    return max(next(risen, len(smoothed)), 1)


def _no_fall(lrs: Sequence[float], end: int, noisy: bool, broke_at: float | None) -> tuple[Verdict, str]:
    if end < len(lrs) or broke_at is not None:
        at = number(lrs[min(end, len(lrs) - 1)])
        return "rises at once", f"the loss breaks at {at} without a fall before: lower low, or take more steps"
    if noisy:
        return "too noisy", "no fall stands out from the batches' differences: take larger batches or more steps"
    rates = f"{number(lrs[0])} to {number(lrs[-1])}"
    return "flat", f"no rate from {rates} changes the loss: raise high, or look for what is frozen or dead"


def _early(losses: Sequence[float]) -> int:
    """How many steps begin a ramp; so many the average needs to be one."""
    return max(_FEWEST // 2, len(losses) // 10)


def _around(slopes: Sequence[float], first: int, last: int) -> tuple[int, int]:
    """The steps around the steepest fall that fall at least half as fast, between two steps."""
    low = high = min(range(first, last + 1), key=slopes.__getitem__)
    enough = slopes[low] / 2
    while low > first and slopes[low - 1] <= enough:
        low -= 1
    while high < last and slopes[high + 1] <= enough:
        high += 1
    return low, high
