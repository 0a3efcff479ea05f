"""Memories: never updated, not finite, lagging, of other data, of several domains, too large by Bessel's factor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from normwise.batches import rows_of
from normwise.diagnose.checks.case import Case, Layer, Unchecked, paths_code
from normwise.diagnose.findings import Finding, Harm
from normwise.surgery.flow import Flow, Step, Value

_EXAMPLES = 16  # to tell a drift from the noise of few examples
_DRIFT = 0.5  # of a mean, in standard deviations, root mean square over the channels
_FACTOR = 2.0  # of a variance, the same
_SETTLED = 0.05  # the weight that the start may have left in a moving average
_YOUNG = 20  # updates, after which torch's own rate leaves an eighth of the start
_USUAL_RATE = 0.1  # torch's momentum
_SHARE = 0.25  # of the variance that may lie between batches
_BESSEL = 0.95  # the share of an activation that evaluation may leave


def never_updated(case: Case) -> Iterator[Finding]:
    """A memory as a new layer has it, in a model that has been trained."""
    new = [layer for layer in case.remembering if layer.starts and not layer.updates]
    trained = [layer for layer in new if _is_trained(case, layer)]
    if trained:
        yield Finding(
            "memory-never-updated",
            "The model has been trained, but no batch has entered this memory: evaluation takes mean 0 and variance 1.",
            tuple(layer.path for layer in trained),
            "batches in the memory",
            0,
            (1, math.inf),
            _recalibrated(case),
            "certain",
            "fatal",
        )


def _is_trained(case: Case, layer: Layer) -> bool:
    """Whether there are signs of training: other memories, this layer's parameters, the optimizer's state, domains.

    What is not finite is no sign: it has its own finding, and NaN is unequal to everything.
    """
    if any(other.updates or not (other.starts or _spoilt(other)) for other in case.remembering):
        return True
    own = layer.module.parameters(recurse=False)
    moved = (p for p in own if p.numel() > 1 and bool(p.isfinite().all()))
    if any(bool((p != p.flatten()[0]).any()) for p in moved) or bool(getattr(layer.module, "domains", ())):
        return True
    return case.optimizer is not None and bool(case.optimizer.state)


def not_finite(case: Case) -> Iterator[Finding]:
    """A memory with NaN or infinity, or a negative variance."""
    counts = {layer.path: _spoilt(layer) for layer in case.remembering}
    broken = {path: count for path, count in counts.items() if count}
    if broken:
        yield Finding(
            "memory-non-finite",
            "The memory holds NaN, infinity or a negative variance, and so does what evaluation makes of it.",
            tuple(broken),
            "remembered numbers that cannot be used",
            sum(broken.values()),
            (0, 0),
            _recalibrated(case),
            "certain",
            "fatal",
        )


def _spoilt(layer: Layer) -> int:
    mean, var = layer.mean, layer.var
    if mean is None or var is None:
        return 0
    return int((~mean.isfinite()).sum() + (~(var >= 0) | var.isinf()).sum())


def drifted(case: Case) -> Iterator[Finding]:
    """Memories that are not the statistics of these batches: not settled yet, or of other data or weights."""
    used = [layer for layer in case.remembering if not layer.starts and not _spoilt(layer)]
    if not used:
        return
    case.need_rows(_EXAMPLES)
    far = {layer: _drift(case, layer) for layer in used if layer.path in case.columns}
    allowed = _allowed(case)
    far = {layer: drift for layer, drift in far.items() if drift > allowed}
    lagging = {layer: drift for layer, drift in far.items() if _lags(case, layer, drift)}
    other = {layer: drift for layer, drift in far.items() if layer not in lagging}
    if lagging:
        yield _lagging(case, lagging)
    if other:
        what = "The memory is far from the statistics of these batches: it is of other data, or of other weights."
        yield _drifted(case, "memory-differs", what, other, _recalibrated(case), "severe")


def _lags(case: Case, layer: Layer, drift: float) -> bool:
    """Whether the memory is off because of its start: it is what its updates leave of mean 0 and variance 1.

    One that was set, as by recalibration, counts updates too, and is not.
    """
    weight = _weight_of_start(layer)
    return weight > _SETTLED and _drift(case, layer, weight) < drift / 2


def _lagging(case: Case, layers: dict[Layer, float]) -> Finding:
    """A young model's memory settles by itself; if many updates did not suffice, the rate is too small."""
    first = max(layers, key=_weight_of_start)
    updates, rate = first.updates or 0, first.rate or 0.0
    what = f"After {updates} updates at a momentum of {rate:g}, {100 * _weight_of_start(first):.0f} % of the memory is "
    what += "still its start, mean 0 and variance 1, far from these batches. "
    young = updates < _YOUNG
    slow = [layer for layer in layers if _is_slow(layer)]
    what += "It has seen few batches yet." if young else "It is too slow for so few updates."
    faster = _faster(slow) if slow and not young else ""
    return _drifted(case, "memory-lags", what, layers, faster + _recalibrated(case), "moderate" if young else "severe")


def _is_slow(layer: Layer) -> bool:
    """Whether the rate is below torch's, and is a setting of the module."""
    return isinstance(layer.module, nn.modules.batchnorm._BatchNorm) and (layer.rate or 1.0) < _USUAL_RATE


def _faster(layers: list[Layer]) -> str:
    """Python for a momentum with which the updates that were made would have sufficed."""
    fewest = min(layer.updates or 1 for layer in layers)
    needed = max(_USUAL_RATE, math.ceil(100 * (1 - _SETTLED ** (1 / fewest))) / 100)
    paths = paths_code([layer.path for layer in layers])
    return f"for path in {paths}:\n    model.get_submodule(path).momentum = {needed:g}\n"


def _allowed(case: Case) -> float:
    """1, and two standard errors of a mean, were all positions of an example alike."""
    return 1 + 2 / (_DRIFT * math.sqrt(case.rows))


def _drift(case: Case, layer: Layer, start: float = 0.0) -> float:
    """How far a memory is off, in units of what is allowed: 0.5 standard deviations, or a factor 2 of the variance.

    Off from what it would be, if its start, mean 0 and variance 1, still had a weight.
    """
    mean, var = case.columns[layer.path].joined()
    mean, var = (1 - start) * mean, (1 - start) * var + start
    old_mean, old_var = layer.mean, layer.var
    if old_mean is None or old_var is None or old_mean.shape != mean.shape:
        return 0.0
    eps = layer.spec.normalizer.eps  # type: ignore[attr-defined]  # what remembers mean and variance standardizes
    shift = ((old_mean - mean).square() / (var + eps)).mean().sqrt()
    factor = ((old_var + eps) / (var + eps)).log().square().mean().sqrt()
    return max(float(shift) / _DRIFT, float(factor) / math.log(_FACTOR))


def _drifted(case: Case, kind: str, what: str, layers: dict[Layer, float], fix: str, harm: Harm) -> Finding:
    return Finding(
        kind,
        what,
        tuple(layer.path for layer in layers),
        f"drift, in units of {_DRIFT} standard deviations or a factor {_FACTOR:g} of the variance",
        max(layers.values()),
        (0, _allowed(case)),
        fix,
        "likely",
        harm,
    )


def _weight_of_start(layer: Layer) -> float:
    """The weight that a moving average still gives to its start: (1 - rate) to the power of the updates."""
    if layer.rate is None or not layer.updates:  # none are counted in memories that were converted from elsewhere
        return 0.0
    return float((1 - layer.rate) ** layer.updates)


def mixed_domains(case: Case) -> Iterator[Finding]:
    """Batches so different from each other that a memory of them all fits none."""
    layers = [layer for layer in case.remembering if layer.measures]
    if not layers:
        return
    least = min(rows_of(batch) for batch in case.batches)
    if len(case.batches) < 4 or least < 8:
        raise Unchecked("that takes 4 batches of 8 examples or more")
    shares = {layer.path: _between(case, layer) for layer in layers if layer.path in case.columns}
    allowed = _SHARE + 2 / least  # of equal examples, the means of batches differ by 1 / rows of the variance
    mixed = {path: share for path, share in shares.items() if share > allowed}
    if mixed:
        yield Finding(
            "memory-mixes-domains",
            "The batches are of different kinds: each is normalized by its own statistics in training, but all by the "
            "same mixture in evaluation. Shuffle them, use nw.domain, or a normalization without memory.",
            tuple(mixed),
            "share of the variance that lies between batches",
            max(mixed.values()),
            (0, allowed),
            case.swapped("batch", "layer", list(mixed)),
            "likely",
            "severe",
        )


def _between(case: Case, layer: Layer) -> float:
    columns = case.columns[layer.path]
    if len(columns.alike) < len(case.batches):
        return 0.0
    total = columns.between + columns.within
    return float((columns.between / total.clamp_min(torch.finfo(torch.float64).tiny)).mean())


# --------------------------------------------------------------------------------------------------- Bessel's factor


def bessel(case: Case) -> Iterator[Finding]:
    """A chain of unbiased memories: each divides by a variance n / (n - 1) times that of training."""
    chain = {
        layer: case.columns[layer.path].rows
        for layer in case.remembering
        if _is_unbiased(layer) and layer.updates and _weight_of_start(layer) < _SETTLED and layer.path in case.columns
    }
    predicted = _left(case.flow, case, {layer: math.sqrt(1 - 1 / rows) for layer, rows in chain.items() if rows > 1})
    measured = _left(case.flow, case, {layer: _ratio(case, layer) for layer in chain})
    if predicted >= _BESSEL or not 0.5 < math.log(measured) / math.log(predicted) < 2:
        return
    rows_by_path = {layer.path: rows for layer, rows in chain.items()}
    yield Finding(
        "bessel-gap",
        f"Training divides by the biased variance of a batch, evaluation by the unbiased one, {_in_sequence(chain)}: "
        f"activations shrink to {predicted:.4g} times those of training.",
        tuple(rows_by_path),
        "predicted ratio of activations, evaluation to training",
        predicted,
        (_BESSEL, 1),
        f"for path, samples in {rows_by_path!r}.items():\n"
        "    model.get_submodule(path).running_var.mul_((samples - 1) / samples)  # when the training has ended",
        "likely",
        "moderate",
    )


def _is_unbiased(layer: Layer) -> bool:
    return bool(getattr(layer.spec.memory, "unbiased", False))


def _in_sequence(chain: dict[Layer, int]) -> str:
    return f"in {len(chain)} layers with {min(chain.values())} samples a statistic or more"


def _ratio(case: Case, layer: Layer) -> float:
    """What evaluation gives of what training gives, as the memory is."""
    var, within = layer.var, case.columns[layer.path].within
    if var is None or var.shape != within.shape:
        return 1.0
    return float((within / var.clamp_min(torch.finfo(torch.float64).tiny)).median().sqrt())


def _left(flow: Flow, case: Case, factors: dict[Layer, float]) -> float:
    """The smallest share of an activation that is left along the flow.

    A normalization with a factor multiplies what is left before it, one without memory starts anew, and a sum is as
    good as the best of what is added: what bypasses a normalization is not made smaller by it.
    """
    of_layer: dict[object, Callable[[float], float]] = {}
    for layer in case.layers:
        of_layer[layer.module] = _kept if layer.mean is not None else _renewed
    for layer, factor in factors.items():
        of_layer[layer.module] = factor.__mul__
    left: dict[int, float] = {}
    lowest = 1.0
    for step in flow.steps:
        before = [left.get(id(value), 1.0) for value in _data(flow, step)]
        after = of_layer.get(step.layer, _kept)(max(before, default=1.0))
        lowest = min(lowest, after)
        left.update((id(value), after) for value in step.writes)
    return lowest


def _kept(left: float) -> float:
    return left


def _renewed(left: float) -> float:
    return 1.0


def _data(flow: Flow, step: Step) -> list[Value]:
    """What a step reads of the data: no parameters, no constants."""
    values = step.takes if step.layer is not None else step.reads
    return [v for v in values if id(v.tensor) not in flow.holders and not _is_constant(v)]


def _is_constant(value: Value) -> bool:
    return value.writer is not None and value.writer.layer is None and not value.writer.reads


def _recalibrated(case: Case) -> str:
    return f"nw.recalibrate(model, {case.batches_code}{case.forward_code})"
