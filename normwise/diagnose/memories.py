"""How far a layer's memory is from what training normalizes by, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, cast

import torch
from torch import Tensor

from normwise.commit import is_unbiased
from normwise.holder import POOL, START
from normwise.moments import STATISTICS, Moments, merge
from normwise.surgery.pooled import Pooled

CAUSES = ("updates", "bessel", "noise", "drift", "nonfinite")
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class MemoryGap:
    """How far one memory is from the batches, and why.

    Where training computes z, evaluation computes (z - d) / r: d is the distance of the means and r the ratio of the
    standard deviations, the remembered one above. Both are 0 and 1 if nothing is wrong; `difference` is the root mean
    square over the channels of (d, ln r). Its causes, each with a d and an ln r of its own, which add up:

    ========= ==========================================================================================================
    bessel    n / (n - 1) times the variance enters, for n samples: ln r = ln(n / (n - 1)) / 2, where it is unbiased
    updates   after U updates at rate a, mean 0 and variance 1 of the start still weigh w = (1 - a)^U:
              d = -w mean / std, ln r = ln(w / variance + 1 - w) / 2
    noise     of what is left, as much as batches that differ by chance explain: s V, where V is the variance between
              the batches of (mean / std, ln std), and s = (a / (2 - a)) (1 - (1 - a)^(2U)) + 1 / B for B batches; for
              a single batch V is that of independent Gaussian samples, 1 / n and 1 / (2 (n - 1))
    drift     the rest of what is left: the weights have moved since, the data are others, or what stands before it
              computes otherwise in training, as dropout does
    nonfinite all of it, where something that is remembered is not finite
    ========= ==========================================================================================================

    Attributes:
        path: The layer's path.
        layer: Its class.
        samples: Effective samples a statistic, a call: N H W, or as many as a mask lets count; the mean.
        updates: How many batches have entered (U); None: nobody counts.
        rate: The weight of a new batch (a); None: one over the number of batches.
        channels: How many statistics are compared.
        mean_drift: Distance of the remembered mean from that of all batches joined, in their standard deviations; root
            mean square over the channels. None where no mean is remembered.
        worst_mean_drift: The largest.
        variance_ratio: Remembered variance over that of all batches joined, each with eps; geometric mean over the
            channels. Of a layer that remembers mean squares, their ratio.
        worst_variance_ratio: The one that is farthest from 1.
        difference: As above; infinite where a remembered statistic is not finite.
        bessel: sqrt((n - 1) / n) where the unbiased variance enters, else 1: the factor on the outputs of evaluation.
        parts: The squared part of each cause in `difference`, a mean over the channels.
        shares: The parts over their sum; all 0 where there is no difference.
    """

    path: str
    layer: str
    samples: float
    updates: int | None
    rate: float | None
    channels: int
    mean_drift: float | None
    worst_mean_drift: float | None
    variance_ratio: float
    worst_variance_ratio: float
    difference: float
    bessel: float
    parts: Mapping[str, float]
    shares: Mapping[str, float]


def shares_of(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The share of each cause in the sum of all parts; all 0 where there are none.

    >>> shares_of([{"noise": 1.0, "drift": 2.0}, {"drift": 1.0}])["drift"]
    0.75
    """
    sums = {cause: sum(part.get(cause, 0.0) for part in parts) for cause in CAUSES}
    if math.isinf(sums["nonfinite"]):
        return {cause: float(cause == "nonfinite") for cause in CAUSES}
    whole = sum(sums.values())
    return {cause: value / whole if whole else 0.0 for cause, value in sums.items()}


class Brought(NamedTuple):
    """What batches have brought, one a row, with a column for each statistic; a count of 0 is nothing."""

    calls: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody counts with
    mean: Tensor
    m2: Tensor
    columns: Tensor


class Reference(NamedTuple):
    """What a memory is compared with, for each statistic."""

    samples: Tensor  # a call, n
    mean: Tensor  # of all batches
    trained: Tensor  # the variance that training divides by, on average
    entering: Tensor  # the variance that enters the memory, on average
    joined: Tensor  # the variance of all batches joined, as recalibration would remember it
    noise_of_mean: Tensor  # its variance from batch to batch
    noise: Tensor  # that of the variance that enters
    batches: int

    def only(self, chosen: Tensor) -> Reference:
        """Some of the statistics."""
        return self._replace(**{name: value[chosen] for name, value in self._asdict().items() if name != "batches"})


class Seen:
    """What a layer with a memory sees of the batches, one after another; its memory stays as it is."""

    def __init__(self, pooled: Pooled) -> None:
        layer = pooled.layer
        buffers, self.remembers = layer._holder()._buffers, layer.spec.normalizer.remembers
        self.path, self.kind, self.memory = pooled.path, type(pooled.original).__name__, pooled._declared
        self.joins, self.eps = layer.spec.joins_batches, getattr(layer.spec.normalizer, "eps", None) or 0.0
        self.kept = {name: _plain(buffers[f"running_{name}"]) for name in self.remembers}
        counter = buffers.get("num_batches_tracked")
        self.updates = None if counter is None or counter.numel() == 0 else int(counter.max())
        self._layer = layer
        self._rows: list[list[Tensor]] = []

    @property
    def unbiased(self) -> bool:
        """Whether what enters is the unbiased variance."""
        return is_unbiased(self.memory, self.remembers)

    def take(self) -> None:
        """See what the last batch has brought, and empty the pool."""
        pool = [cast("Tensor", self._layer._holder()._buffers[name]) for name in POOL]
        shape = self.kept[self.remembers[0]].shape
        calls, *held = (_plain(buffer) for buffer in pool)
        if calls > 0:
            self._rows.append([calls.reshape(1), *(_fitted(part, shape).flatten() for part in held)])
        for buffer in pool:
            buffer.zero_()

    def gap(self) -> MemoryGap | None:
        """What the batches say of the memory; None: nothing has reached it."""
        if not self._rows:
            return None
        brought = Brought(*(torch.stack(parts) for parts in zip(*self._rows, strict=True)))
        there = (brought.count > 0).any(0)
        if not there.any():
            return None
        brought = Brought(brought.calls, *(part[:, there] for part in brought[1:]))
        kept = {name: value.flatten()[there] for name, value in self.kept.items()}
        return _compared(self, kept, _reference(self, brought))


def _reference(seen: Seen, brought: Brought) -> Reference:
    """The batches' own statistics, averaged and joined."""
    there = brought.count > 0
    samples = torch.where(there, brought.count / (brought.calls if seen.joins else 1), torch.ones(()))
    weight = brought.count * brought.columns
    weight = weight / weight.sum(0)
    square = 0.0 if "var" in seen.remembers else brought.mean.square()
    trained = brought.m2 / brought.count.clamp_min(1) + square
    entering = trained * samples / (samples - 1).clamp_min(1) if seen.unbiased else trained
    mean = (weight * brought.mean).sum(0)
    return Reference(
        samples=(samples * there).sum(0) / there.sum(0),
        mean=mean,
        trained=(weight * trained).sum(0),
        entering=(weight * entering).sum(0),
        joined=_joined(brought, seen) if seen.joins else (weight * entering).sum(0),
        noise_of_mean=_between(brought.mean, there),
        noise=_between(entering, there),
        batches=len(there),
    )


def _joined(brought: Brought, seen: Seen) -> Tensor:
    """The statistic of all samples, by Chan's formula."""
    whole = reduce(merge, (Moments(count, mean, m2) for _, count, mean, m2, _ in zip(*brought, strict=True)))
    return STATISTICS[seen.remembers[-1]](whole, unbiased=seen.unbiased)


def _between(statistic: Tensor, there: Tensor) -> Tensor:
    """The unbiased variance from batch to batch; NaN for a single one."""
    count = there.sum(0)
    centered = (statistic - (statistic * there).sum(0) / count) * there
    return torch.where(count > 1, centered.square().sum(0) / (count - 1), torch.nan)


def _compared(seen: Seen, kept: Mapping[str, Tensor], at: Reference) -> MemoryGap:
    finite = torch.stack([value.isfinite() for value in kept.values()]).all(0)
    kept = {name: value[finite] for name, value in kept.items()}
    at = at.only(finite)
    mean, variance = kept.get("mean"), kept[seen.remembers[-1]]
    drift = None if mean is None else (mean - at.mean).abs() / (at.joined + seen.eps).clamp_min(_TINY).sqrt()
    logs = _log(variance, seen) - _log(at.joined, seen)
    factor = (1 - 1 / at.samples.mean().item()) ** 0.5 if seen.unbiased and finite.any() else 1.0
    parts, difference = _parts(seen, mean, variance, at)
    if not finite.all():
        parts, difference = {"nonfinite": math.inf}, math.inf
    return MemoryGap(
        path=seen.path,
        layer=seen.kind,
        samples=_mean(at.samples),
        updates=seen.updates,
        rate=seen.memory.update_rate,
        channels=len(finite),
        mean_drift=None if drift is None else math.sqrt(_mean(drift.square())),
        worst_mean_drift=None if drift is None else max(drift.tolist(), default=math.nan),
        variance_ratio=math.exp(_mean(logs)),
        worst_variance_ratio=math.exp(max(logs.tolist(), key=abs, default=math.nan)),
        difference=difference,
        bessel=factor,
        parts=parts,
        shares=shares_of([parts]),
    )


def _parts(seen: Seen, mean: Tensor | None, variance: Tensor, at: Reference) -> tuple[dict[str, float], float]:
    """The squared part of each cause, and the root mean square of all together."""
    start = _weight_of_start(seen)
    scale = (at.entering + seen.eps).clamp_min(_TINY).sqrt()
    away = torch.zeros_like(variance) if mean is None else (mean - at.mean) / scale
    away_by_start = torch.zeros_like(variance) if mean is None else -start * at.mean / scale
    expected = start + (1 - start) * at.entering
    bessel = (_log(at.entering, seen) - _log(at.trained, seen)) / 2
    updates = (_log(expected, seen) - _log(at.entering, seen)) / 2
    rest = (_log(variance, seen) - _log(expected, seen)) / 2
    left = _mean((away - away_by_start).square() + rest.square())
    noise = min(left, _noise(seen, at, has_mean=mean is not None))
    parts = {
        "updates": _mean(away_by_start.square() + updates.square()),
        "bessel": _mean(bessel.square()),
        "noise": noise,
        "drift": left - noise,
    }
    return parts, math.sqrt(_mean(away.square() + (bessel + updates + rest).square()))


def _weight_of_start(seen: Seen) -> float:
    """What mean 0 and variance 1 still weigh."""
    rate, updates = seen.memory.update_rate, seen.updates
    if updates is None or (updates == 0 and not _is_at_start(seen.kept)):
        return 0.0
    return float(updates == 0) if rate is None else (1 - rate) ** updates


def _is_at_start(kept: Mapping[str, Tensor]) -> bool:
    return all(bool((value == START[f"running_{name}"]).all()) for name, value in kept.items())


def _noise(seen: Seen, at: Reference, *, has_mean: bool) -> float:
    """How large the squares are that chance explains."""
    rate, updates = seen.memory.update_rate, seen.updates
    if rate is None:
        settled = 1 / updates if updates else 0.0
    else:
        settled = rate / (2 - rate) * (1.0 if updates is None else 1 - (1 - rate) ** (2 * updates))
    variance = (at.entering + seen.eps).clamp_min(_TINY)
    gaussian = 1 / at.samples, 1 / (2 * (at.samples - 1).clamp_min(1))
    of_mean = torch.where(at.noise_of_mean.isnan(), gaussian[0], at.noise_of_mean / variance)
    of_log = torch.where(at.noise.isnan(), gaussian[1], at.noise / (4 * variance.square()))
    return (settled + 1 / at.batches) * _mean(of_mean * has_mean + of_log)


def _log(variance: Tensor, seen: Seen) -> Tensor:
    return (variance + seen.eps).clamp_min(_TINY).log()


def _mean(values: Tensor) -> float:
    """The mean over channels; NaN where there are none."""
    return float(values.mean())


def _plain(buffer: Tensor | None) -> Tensor:
    """A copy in float64 on the host, which knows float64 on every machine."""
    return cast("Tensor", buffer).detach().cpu().double().clone()


def _fitted(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The part of a statistic that is within a shape, and 0 where it has nothing."""
    fitted = x.new_zeros(shape)
    corner = tuple(slice(min(sizes)) for sizes in zip(x.shape, shape, strict=True))
    fitted[corner] = x[corner]
    return fitted
