"""Activations: how large they are and how they vary, layer by layer and call by call, dead and saturated units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from normwise.batches import Forward, Loss, feed, loss_of
from normwise.diagnose.channels import Channels
from normwise.diagnose.objective import Batches, Mode, measuring, read
from normwise.diagnose.recorder import Key, Recorder, Tally
from normwise.diagnose.results import Result, number
from normwise.errors import DiagnosisError
from normwise.moments import Moments
from normwise.places import all_modules

_STUCK = 0.95  # the share of a unit's values near a bound from which on it counts as saturated


@dataclass(frozen=True)
class Activation:
    """One output of one call of a layer or function, over all batches; statistics leave out what is not finite.

    A unit is a channel: a neuron of a linear layer, a map of a convolution.

    Attributes:
        path: The layer's path; of a function, that of the module whose code calls it.
        layer: The layer's class, or the function, as "relu()".
        call: Which call of the layer in a forward it is, from 0; of a function, which one in that call of the module.
        output: Which of the tensors that the call returns, from 0.
        weighted: Whether the layer has a weight, a parameter of two or more dimensions.
        shape: The output's shape in the first batch that has it.
        input_rms: Root mean square of the first tensor that is given; None: none is.
        mean: Of all values.
        rms: Root mean square of all values.
        growth: `rms` over that of the first row; None where that is 0.
        channels: How many units; None where batches differ in it, and they cannot be told apart.
        variance_low: The smallest variance of a unit over examples and positions, biased.
        variance_median: The median unit's.
        variance_high: The largest.
        constant: How many units have one value only, as far as the dtype can tell values apart.
        dead: The share of units that are 0 for every example and position; only of ReLUs and their like, and of
            normalizations that apply one.
        saturated: The share of units of which 95 % of the values are near a bound; of bounded functions only.
        at_bounds: The share of all values that are near a bound: within 1 % of the range between the bounds.
        nonfinite: How many values are NaN or infinite.
        gradient_rms: Root mean square of the gradient of the batch's mean loss by this activation.
    """

    path: str
    layer: str
    call: int
    output: int
    weighted: bool
    shape: tuple[int, ...]
    input_rms: float | None
    mean: float
    rms: float
    growth: float | None
    channels: int | None
    variance_low: float
    variance_median: float
    variance_high: float
    constant: int
    dead: float | None
    saturated: float | None
    at_bounds: float | None
    nonfinite: int
    gradient_rms: float | None

    @property
    def name(self) -> str:
        """Path, function, call and output, as far as they tell rows apart."""
        function = f".{self.layer}" if self.layer.endswith("()") else ""
        return f"{self.path}{function}" + f"#{self.call}" * (self.call > 0) + f"[{self.output}]" * (self.output > 0)


@dataclass(frozen=True, repr=False)
class Activations(Result):
    """The activations of a model; see `activations`.

    Attributes:
        mode: "train", "eval" or "current".
        batches: How many batches they are from.
        calls: What was seen, in the order of the calls.
    """

    mode: Mode
    batches: int
    calls: tuple[Activation, ...]

    @property
    def factor(self) -> float | None:
        """The factor by which the rms grows from one layer with a weight to the next: exp of the slope of log rms.

        A least-squares line through the outputs of those layers, in the order of calls. None for fewer than three.
        """
        logs = [math.log(row.rms) for row in self.calls if row.weighted and row.output == 0 and row.rms > 0]
        if len(logs) < 3:
            return None
        middle = (len(logs) - 1) / 2
        slope = sum((at - middle) * value for at, value in enumerate(logs))
        return math.exp(slope / sum((at - middle) ** 2 for at in range(len(logs))))

    @property
    def dead(self) -> float | None:
        """The share of dead units among those of all ReLUs and their like."""
        return _share((row.dead, row.channels) for row in self.calls)

    @property
    def saturated(self) -> float | None:
        """The share of saturated units among those of all bounded functions."""
        return _share((row.saturated, row.channels) for row in self.calls)

    @property
    def meaning(self) -> str:
        """What was found, in one line."""
        smallest, largest = (end(self.calls, key=lambda row: row.rms) for end in (min, max))
        text = (
            f"{len(self.calls)} activations in {self.mode} mode: rms {number(smallest.rms)} ({smallest.name}) to "
            f"{number(largest.rms)} ({largest.name})"
        )
        if self.factor is not None:
            text += f", {number(self.factor)} times as large from weight to weight"
        for word, share in (("dead", self.dead), ("saturated", self.saturated)):
            text += "" if share is None else f", {100 * share:.2g} % of units {word}"
        broken = next((row for row in self.calls if row.nonfinite), None)
        return text + ("" if broken is None else f"; {broken.nonfinite} values in {broken.name} are not finite")

    def rows(self) -> list[dict[str, Any]]:
        """One row an activation, in the order of calls."""
        return [dict(vars(row)) for row in self.calls]

    def headline(self) -> dict[str, float | None]:
        """The largest rms, its growth, and the shares of dead and saturated units."""
        largest = max(row.rms for row in self.calls)
        return {"largest_rms": largest, "growth": self.factor, "dead": self.dead, "saturated": self.saturated}

    def traces(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rms by depth, and that of the gradients where there are any."""
        names = [row.name for row in self.calls]
        lines = [{"type": "scatter", "name": "activation", "x": names, "y": [row.rms for row in self.calls]}]
        gradients = [row.gradient_rms for row in self.calls]
        if any(value is not None for value in gradients):
            lines.append({"type": "scatter", "name": "gradient", "x": names, "y": gradients})
        return lines, {"yaxis": {"type": "log", "title": {"text": f"root mean square, {self.mode} mode"}}}


def activations(
    model: nn.Module,
    batches: Batches,
    loss: Loss | None = None,
    *,
    mode: Mode = "train",
    forward: Forward | None = None,
    layers: str | Sequence[str] | None = None,
    gradients: bool | None = None,
) -> Activations:
    """Measure every activation of a model, in the order of calls; the model is left as it was, bit for bit.

    Seen are the modules that call no other module, each call by itself (a ReLU that a residual block uses twice has two
    rows), and activation functions that a module's own code calls, as `torch.relu(x)`. Other operations, as the sum of
    a residual connection, show in `input_rms` of the layer that reads them, or where `layers` names the block.

    Batches are joined by their counts (Chan's formula, two passes, sums in float64), so a mean of 1e6 costs no digit of
    a variance. No activation is kept.

    Args:
        model: A model, in any mode.
        batches: A batch, a list of batches or a loader; all of them are read once and kept.
        loss: `loss(output, target)`, with the second element of a tuple or list as the target; for the gradients.
            None: the model's own, its output or the `loss` in it.
        mode: "train", "eval", or "current": every module in the mode that it is in.
        forward: `forward(model, batch)`, for models that are called otherwise.
        layers: Only modules whose path matches a pattern or one of several, as `"blocks.*"`, whatever they call.
        gradients: Whether to measure the gradients of the activations as well. None: if there is a `loss`.

    Returns:
        A record with a row a call; `repr` says what it means in one line.

    Raises:
        DiagnosisError: there is no batch; nothing was called; a pattern matches nothing; no gradient where it is asked.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    >>> with torch.no_grad():
    ...     _ = model[0].bias[:2].fill_(-100.0)
    >>> found = activations(model, torch.randn(256, 4))
    >>> [(row.path, row.layer, row.call, row.dead) for row in found.calls]
    [('0', 'Linear', 0, None), ('1', 'ReLU', 0, 0.25)]
    """
    wants = loss is not None if gradients is None else gradients
    with measuring(model, mode, batches=batches):
        given = read(batches)
        recorder = Recorder(model, _chosen(model, layers), wants)
        with recorder.hooked():
            for batch in given:
                if wants:
                    _differentiate(model, recorder.follow(partial(loss_of, model, batch, loss, forward)))
                else:
                    with torch.no_grad():
                        recorder.follow(partial(feed, model, batch, forward))
        return Activations(mode, len(given), _rows(recorder.tallies))


def _chosen(model: nn.Module, layers: str | Sequence[str] | None) -> set[nn.Module] | None:
    """The modules whose path matches; None: no pattern was given."""
    if layers is None:
        return None
    chosen: set[nn.Module] = set()
    for pattern in [layers] if isinstance(layers, str) else layers:
        fitting = {module for module, path in all_modules(model).items() if fnmatchcase(path, pattern)}
        if not fitting:
            raise DiagnosisError(f"layers: no module has a path like {pattern!r}")
        chosen |= fitting
    return chosen


def _differentiate(model: nn.Module, loss: Tensor) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not (loss.requires_grad and trained):
        raise DiagnosisError("the loss has no gradient: it does not depend on the parameters, or was detached")
    torch.autograd.grad(loss, trained, allow_unused=True)


def _rows(tallies: Mapping[Key, Tally]) -> tuple[Activation, ...]:
    """The rows, in the order of the calls.

    Raises:
        DiagnosisError: there are none.
    """
    held = sorted(tallies.items(), key=lambda item: item[1].at)
    if not held:
        raise DiagnosisError("no module that is watched was called, or none returned a tensor of real numbers")
    first = _rms(cast("Channels", held[0][1].values).total())
    return tuple(_activation(key, tally, first) for key, tally in held)


def _activation(key: Key, tally: Tally, first: float) -> Activation:
    path, layer, call, output = key
    values = cast("Channels", tally.values)
    limits, total, variance = tally.limits, values.total(), values.variance()
    entered = None if tally.inputs is None else _rms(tally.inputs)
    rms, bounded = _rms(total), limits is not None and limits.bounded
    return Activation(
        path=path,
        layer=layer,
        call=call,
        output=output,
        weighted=tally.weighted,
        shape=tally.shape,
        input_rms=entered,
        mean=total.mean.item(),
        rms=rms,
        growth=rms / first if first > 0 else None,
        channels=len(variance) if values.apart else None,
        variance_low=variance.amin().item(),
        variance_median=variance.quantile(0.5).item(),
        variance_high=variance.amax().item(),
        constant=int(values.constant().sum()),
        dead=values.dead().double().mean().item() if limits is not None and limits.cut else None,
        saturated=(values.share_near() >= _STUCK).double().mean().item() if bounded else None,
        at_bounds=values.near.sum().item() / max(float(total.count), 1.0) if bounded else None,
        nonfinite=values.nonfinite,
        gradient_rms=_gradient_rms(tally.gradients),
    )


def _rms(moments: Moments) -> float:
    """Root mean square; 0 where nothing was finite."""
    return float((moments.m2 / torch.as_tensor(moments.count).clamp_min(1) + moments.mean.square()).sqrt())


def _gradient_rms(sums: list[tuple[Tensor, int]]) -> float | None:
    if not sums:
        return None
    return math.sqrt(sum(float(square) for square, _ in sums) / sum(size for _, size in sums))


def _share(parts: Iterable[tuple[float | None, int | None]]) -> float | None:
    """The mean of shares, weighted by the number of units; None where there is none."""
    known = [(share, units) for share, units in parts if share is not None and units is not None]
    return sum(share * units for share, units in known) / sum(units for _, units in known) if known else None
