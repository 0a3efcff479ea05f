"""The buffers of one memory: what they are, and a module that holds them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from normwise.memory import Memory, falls_back
from normwise.normalizers import Normalizer
from normwise.whereabouts import Whereabouts

START = {"running_mean": 0.0, "running_var": 1.0, "running_mean_square": 1.0}
POOL = ("_pool_calls", "_pool_count", "_pool_mean", "_pool_m2", "_pool_columns")  # Entry's, after the calls


class Slot(NamedTuple):
    """What a buffer of a memory is."""

    name: str
    shape: str  # "memory": over the memory's axes; "counter": along the elastic axis only; "single": one number
    whole: bool = False  # whether it holds whole numbers
    persistent: bool = True


def buffers_of(normalizer: Normalizer, memory: Memory) -> list[Slot]:
    """The buffers of a memory, in torch's order."""
    counter = "single" if memory.elastic is None else "counter"
    buffers = [Slot(f"running_{name}", "memory") for name in normalizer.remembers]
    buffers.append(Slot("num_batches_tracked", counter, whole=True))
    if memory.elastic is not None:
        buffers.append(Slot("batch_samples", "memory", persistent=False))
    if memory.updates and (memory.renorm is not None or falls_back(memory)):
        buffers.append(Slot("_seen_batch", "memory", persistent=False))
        buffers += [Slot(f"_seen_{name}", "memory", persistent=False) for name in normalizer.remembers]
        buffers.append(Slot("_seen_batches", counter, whole=True, persistent=False))
        buffers.append(Slot("_seen_waiting", "single", whole=True, persistent=False))
    return buffers


class Holder(nn.Module):
    """A module whose buffers stay float32 at least, and which is copied without what is being accumulated."""

    _skips: Tensor | None = None  # `Store.skips`; not a buffer, because torch's layers have none
    _refuses: bool = False  # whether the owner refuses what is being loaded
    _fed: bool = False  # whether a batch or a checkpoint is known to have entered

    @property
    def skipped_batches(self) -> Tensor | None:
        """How many batches did not enter the memory because their statistics were not finite."""
        return None if self._skips is None else self._skips[0]

    def _is_fed(self) -> bool:
        """Whether a batch or a checkpoint has entered; compiled code cannot say so, but has left its traces."""
        if not self._fed:
            kept = {name: buffer for name, buffer in self._buffers.items() if name.startswith("running_")}
            self._fed = any(b is not None and not is_lazy(b) and (b != START[name]).any() for name, b in kept.items())
        return self._fed

    def _tell(self) -> None:
        """Warn, once, of batches that were skipped on a device where nobody waited for them."""
        skips = self._skips
        if skips is not None and skips.device.type not in ("cpu", "meta") and skips[0] > 0 and skips[1] == 0:
            skips[1].add_(1)
            warnings.warn(
                f"{Whereabouts(self)}: {int(skips[0])} batches were not finite and did not enter the memory",
                stacklevel=3,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and convert as any module, but keep memory in float32 at least: 1e-8 does not fit in float16."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.is_floating_point() and after.dtype.itemsize < buffer.dtype.itemsize:
                wide = torch.promote_types(after.dtype, torch.float32)
                after = self._buffers[name] = buffer.to(device=after.device, dtype=wide)
            if after is not None and buffer.is_meta and not after.is_meta and not is_lazy(after):
                after.fill_(START.get(name, 0.0))
        if self._skips is not None:
            was_meta, self._skips = self._skips.is_meta, fn(self._skips)
            if was_meta and not self._skips.is_meta:
                self._skips.zero_()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_buffers"] = {name: buffer for name, buffer in self._buffers.items() if name not in POOL}
        return state

    def _widen(self) -> None:
        """Undo what `load_state_dict(assign=True)` does with a checkpoint in half precision."""
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dtype.itemsize < 4:
                self._buffers[name] = buffer.float()

    def _load_from_state_dict(self, *args: Any) -> None:
        if self._refuses:
            return
        super()._load_from_state_dict(*args)
        self._fed = True
        self._widen()
        self._leave_meta()

    def _leave_meta(self) -> None:
        """Follow what `load_state_dict(assign=True)` put on a device: what is not saved starts there, empty."""
        homes = [b.device for b in self._buffers.values() if b is not None and not b.is_meta]
        for name, buffer in self._buffers.items():
            if homes and buffer is not None and buffer.is_meta and not is_lazy(buffer):
                self._buffers[name] = torch.full_like(buffer, START.get(name, 0.0), device=homes[0])
        if homes and self._skips is not None and self._skips.is_meta:
            self._skips = torch.zeros_like(self._skips, device=homes[0])


class UnsizedBuffer(UninitializedBuffer):
    """torch's uninitialized buffer, with the deepcopy that torch gives its uninitialized parameter."""

    def __deepcopy__(self, memo: dict[int, Any]) -> UnsizedBuffer:
        options: dict[str, Any] = {"device": self.data.device, "dtype": self.data.dtype}
        copied = memo[id(self)] = type(self)(**options)
        return copied
