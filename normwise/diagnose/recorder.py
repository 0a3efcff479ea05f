"""Gathers the statistics of a model's activations while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from normwise.diagnose.channels import FUNCTIONS, Channels, Range, layout_of, range_of
from normwise.diagnose.watch import Frame, Watch, floats_in
from normwise.moments import Moments, merge
from normwise.norm import Norm


class Tally:
    """What is known of one activation so far."""

    def __init__(self, at: int, weighted: bool, shape: tuple[int, ...], limits: Range | None) -> None:
        self.at, self.weighted, self.shape, self.limits = at, weighted, shape, limits
        self.values: Channels | None = None
        self.inputs: Moments | None = None
        self.gradients: list[tuple[Tensor, int]] = []  # sums of squares, and of how many

    def add(self, values: Channels, inputs: Moments | None) -> None:
        """Join what a batch has brought."""
        if self.values is None:
            self.values = values
        else:
            self.values.join(values)
        if inputs is not None:
            self.inputs = inputs if self.inputs is None else merge(self.inputs, inputs)

    def add_gradient(self, gradient: Tensor) -> None:
        """A hook of a tensor."""
        wide = torch.float32 if gradient.device.type == "mps" else torch.float64
        self.gradients.append((gradient.detach().to(wide).square().sum(), gradient.numel()))


Key = tuple[str, str, int, int]  # path, layer, call, output


class Recorder(Watch):
    """Gathers the statistics of what modules and functions return, at once: what comes after may change it in place."""

    def __init__(self, model: nn.Module, chosen: set[nn.Module] | None, gradients: bool) -> None:
        super().__init__(model)
        self._chosen, self._gradients = chosen, gradients
        self.tallies: dict[Key, Tally] = {}
        self._layouts: dict[tuple[nn.Module, int], int | None] = {}
        self._last: dict[int, int] = {}  # the dimension of the channels, by rank, of the last layer that said it
        self._inputs: dict[Frame, Moments] = {}
        self._within: dict[Frame, list[Callable[[], None]]] = {}  # what functions gave, not yet counted
        self._positions = count()

    def follow(self, run: Callable[[], Any]) -> Any:
        """One batch."""
        self._inputs.clear()
        self._within.clear()
        return super().follow(run)

    def entered(self, frame: Frame, given: Any) -> None:
        """Measure what a module is given, before it changes it."""
        if _is_parametrization(frame):
            self.stack[-1].calls -= 1  # it computes a weight of the module, and is no part of what that does
        found = floats_in(given)
        if found and self._may_show(frame):
            self._inputs[frame] = Channels(found[0].detach().reshape(-1, 1), 1, None).total()

    def left(self, frame: Frame, output: Any) -> None:
        """Measure what a module returns."""
        inputs, functions = self._inputs.pop(frame, None), self._within.pop(frame, [])
        if frame.calls > 0 or _parameters(frame.layer):  # otherwise it is itself an activation function
            for take in functions:
                take()
        if not self._may_show(frame) or (self._chosen is None and frame.calls > 0):
            return
        for output_at, x in enumerate(floats_in(output)):
            key = (frame.path, frame.kind, frame.number, output_at)
            tally = self._tally(key, frame.layer, x, _limits(frame, output_at))
            self.tallies[key] = tally
            tally.add(self._values(frame.layer, x, tally), inputs)

    def computed(self, function: Callable[..., Any], given: Any, output: Any) -> None:
        """Measure what an activation function returns."""
        name, frame = getattr(function, "__name__", "").rstrip("_"), self.stack[-1]
        if name not in FUNCTIONS or not (isinstance(output, Tensor) and floats_in(output) and self._may_show(frame)):
            return
        if name == _own_activation(frame.layer):  # no value between the two is ever seen where a kernel fuses them
            return
        key = (frame.path, f"{name}()", frame.functions[name], 0)
        frame.functions[name] += 1
        tally = self._tally(key, None, output, range_of(name, _given_bounds(*given)))
        values = self._values(None, output, tally)

        def take() -> None:
            self.tallies[key] = tally
            tally.add(values, None)

        self._within.setdefault(frame, []).append(take)

    def _tally(self, key: Key, layer: nn.Module | None, x: Tensor, limits: Range | None) -> Tally:
        """The tally of a key, which is told of this output's gradient."""
        at, weighted = next(self._positions), any(p.dim() > 1 for p in _parameters(layer))
        tally = self.tallies.get(key) or Tally(at, weighted, tuple(x.shape), limits)
        if self._gradients and x.grad_fn is not None:  # on a parameter that is returned a hook would stay
            x.register_hook(tally.add_gradient)  # type: ignore[no-untyped-call]
        return tally

    def _values(self, layer: nn.Module | None, x: Tensor, tally: Tally) -> Channels:
        return Channels(x.detach(), self._dim(layer, x), tally.limits)

    def _dim(self, layer: nn.Module | None, x: Tensor) -> int:
        """The dimension of the channels: as the layer says, else as the last one said whose output had that rank."""
        rank = x.dim()
        if layer is not None and (layer, rank) not in self._layouts:
            self._layouts[layer, rank] = layout_of(layer, rank)
        said = None if layer is None else self._layouts[layer, rank]
        if said is not None:
            self._last[rank] = said
        return self._last.get(rank, 1 if rank > 3 else -1)

    def _may_show(self, frame: Frame) -> bool:
        return not _is_parametrization(frame) and (self._chosen is None or frame.layer in self._chosen)


def _parameters(layer: nn.Module | None) -> list[nn.Parameter]:
    """A module's own parameters; those behind a parametrization are its own."""
    if layer is None:
        return []
    return [p for name, p in layer.named_parameters() if "." not in name or name.startswith("parametrizations.")]


def _is_parametrization(frame: Frame) -> bool:
    return ".parametrizations." in f".{frame.path}."


def _limits(frame: Frame, output_at: int) -> Range | None:
    """Where the values of a module's output end: by its class, or by the activation that a normalization declares."""
    activation = _own_activation(frame.layer)
    if activation is None:
        return range_of(frame.kind, _bounds(frame.layer))
    return range_of(activation) if output_at == 0 else None  # what follows is its sum with a residual


def _own_activation(layer: nn.Module | None) -> str | None:
    return layer.spec.activation if isinstance(layer, Norm) and layer.spec.gate is None else None


def _bounds(layer: nn.Module | None) -> tuple[float, float] | None:
    """The bounds of a hard tanh."""
    return (layer.min_val, layer.max_val) if isinstance(layer, nn.Hardtanh) else None


def _given_bounds(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[float, float]:
    """The bounds that a hard tanh is called with."""
    low, high = (args[at] if len(args) > at else kwargs.get(name, default) for at, name, default in _HARDTANH)
    return float(low), float(high)


_HARDTANH = ((1, "min_val", -1.0), (2, "max_val", 1.0))
