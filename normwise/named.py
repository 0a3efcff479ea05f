"""What the named layers share with torch's: attributes that are writable, and the repr."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, cast

import torch

from normwise.memory import Average, Degenerate, Memory, Moving, NonFinite
from normwise.norm import Norm
from normwise.normalizers import RMS, Standardize
from normwise.pointwise import Activation, Gate
from normwise.recoveries import Affine

Device = torch.device | str | None


class Named(Norm):
    """What the named layers share: torch's writable `eps`, and torch's one-line repr with the memory's formula."""

    _shown: ClassVar[tuple[str, ...]]  # the attributes in the repr; those before "eps" stand without their names

    @property
    def eps(self) -> float | None:
        """What is added under the root; writable, as in torch's layers."""
        return cast("Standardize | RMS", self.spec.normalizer).eps

    @eps.setter
    def eps(self, value: float | None) -> None:
        normalizer = cast("Standardize", self.spec.normalizer)
        self.spec = replace(self.spec, normalizer=replace(normalizer, eps=cast("float", value)))

    def extra_repr(self) -> str:
        """torch's, the activation and the gate, and the memory's formula."""
        first = self._shown.index("eps")
        values = [repr(getattr(self, name)) for name in self._shown[:first]]
        values += [f"{name}={getattr(self, name)!r}" for name in self._shown[first:]]
        return ", ".join(values + self._notes()) + self._memory_note()


class Tracking(Named):
    """What `BatchNorm` and `InstanceNorm` share: torch's `momentum` and `track_running_stats`, and two policies."""

    _shown = ("num_features", "eps", "momentum", "affine", "track_running_stats")

    num_features: int
    affine: bool
    track_running_stats: bool

    @property
    def momentum(self) -> float | None:
        """torch's momentum, the weight of the new batch; None: the average of all batches. Writable."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        memory = torch_memory(value, self.nonfinite, self.degenerate)
        self._momentum = value
        self._exchange_memory(memory)

    @property
    def nonfinite(self) -> NonFinite:
        """What becomes of a batch that is not finite: "skip", "raise" or "keep". Writable."""
        return "skip" if self.spec.memory is None else self.spec.memory.nonfinite

    @nonfinite.setter
    def nonfinite(self, value: NonFinite) -> None:
        self._exchange_memory(torch_memory(self._momentum, value, self.degenerate))

    @property
    def degenerate(self) -> Degenerate:
        """What becomes of a batch with one value a channel: "raise" or "memory". Writable."""
        return "raise" if self.spec.memory is None else self.spec.memory.degenerate

    @degenerate.setter
    def degenerate(self, value: Degenerate) -> None:
        self._exchange_memory(torch_memory(self._momentum, self.nonfinite, value))

    def _declare(
        self,
        pattern: str,
        num_features: int,
        eps: float,
        affine: bool,
        track_running_stats: bool,
        memory: Memory,
        device: Device,
        dtype: torch.dtype | None,
        activation: Activation | None,
        gate: Gate | None,
    ) -> None:
        parts = Standardize(eps), Affine("c") if affine else None, memory if track_running_stats else None
        options = norm_options({"c": num_features}, activation, gate, device, dtype)
        Norm.__init__(self, pattern, *parts, **options)
        self.num_features, self.affine, self.track_running_stats = num_features, affine, track_running_stats
        self._momentum = memory.update_rate

    def _commits(self) -> bool:
        return self.track_running_stats and super()._commits()


def norm_options(
    sizes: dict[str, int], activation: Activation | None, gate: Gate | None, device: Device, dtype: torch.dtype | None
) -> dict[str, Any]:
    """`Norm`'s options by name."""
    return {"activation": activation, "gate": gate, "sizes": sizes, "device": device, "dtype": dtype}


def torch_memory(momentum: float | None, nonfinite: NonFinite, degenerate: Degenerate) -> Memory:
    """The memory of torch's layers. Raises ValueError for a momentum that is no weight."""
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum is the weight of the new batch, between 0 and 1, or None, not {momentum}")
    if momentum is None:
        return Average("c", nonfinite=nonfinite, degenerate=degenerate)
    return Moving("c", update_rate=momentum, nonfinite=nonfinite, degenerate=degenerate)
