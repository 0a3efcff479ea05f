"""Layers whose batches are pooled for a while instead of entering their memory, and the statistics that come of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from normwise.commit import Entry, is_unbiased
from normwise.errors import NonFiniteError, SurgeryError
from normwise.holder import POOL, Holder
from normwise.memory import Memory, Moving, falls_back
from normwise.moments import STATISTICS
from normwise.norm import Norm

_ENDLESS = 2**62  # batches in a pool that is never full


@dataclass
class Tally:
    """How much has entered the pool of one memory, as seen after every batch."""

    batches: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))  # in which something entered
    counts: Tensor = field(default_factory=lambda: torch.zeros(()))  # calls that entered, along the elastic axis
    _known: Tensor = field(default_factory=lambda: torch.zeros(()))
    _calls: Tensor = field(default_factory=lambda: torch.zeros(()))

    def take_stock(self, holder: Holder, dim: int | None) -> None:
        """See what the last batch has brought; `dim` is that of the elastic axis in the memory."""
        now = torch.stack([_buffer(holder, name) for name in ("_pool_count", "_pool_columns")])
        calls = _buffer(holder, "_pool_calls") - _skips(holder)[0]
        changed = (now != _padded(self._known, now)).any(0)
        places = changed.any() if dim is None else changed.movedim(dim, 0).unsqueeze(-1).flatten(1).any(1)
        self.batches = self.batches.to(now.device) + changed.any()
        self.counts = _padded(self.counts, places) + places * (calls - self._calls.to(now.device))
        self._known, self._calls = now, calls


@dataclass(frozen=True)
class Remembered:
    """What one memory of a layer holds: its own, or that of a domain."""

    domain: str | None
    buffers: dict[str, Tensor]
    skips: Tensor | None
    fed: bool = True

    def put(self, layer: nn.Module) -> None:
        """Let a layer remember this, in the buffers that it has."""
        holder = layer
        if isinstance(layer, Norm):
            dim = layer._elastic_dim
            if dim is not None:
                layer._resize(next(iter(self.buffers.values())).shape[dim])
            holder = layer if self.domain is None else layer._held_by(self.domain)
            holder._fed = self.fed
            cast("Tensor", holder._skips).copy_(cast("Tensor", self.skips))
        for name, value in self.buffers.items():
            cast("Tensor", holder._buffers[name]).copy_(value)


@dataclass(frozen=True)
class Measured:
    """What the batches say of one memory: what to remember (None: leave it as it is), and why."""

    new: Remembered | None
    why: str


class Pooled:
    """A layer with a memory that is measured.

    Args:
        path: Its path.
        original: The layer that the model has.
        layer: What stands for it while it is measured: itself, or one of normwise's with the same tensors.
    """

    def __init__(self, path: str, original: nn.Module, layer: Norm) -> None:
        self.path, self.original, self.layer = path, original, layer
        self._declared = cast("Memory", layer.spec.memory)
        self._tallies = {name: Tally() for name in (None, *layer.domains)}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within this context batches in training mode enter a pool, and not the memory.

        Ghost batches and renormalization are put aside: the one is noise that evaluation does not have, the other
        corrects towards the memory that is to be replaced. Buffers and counts are for `untouched` to put back.
        """
        layer, spec = self.layer, self.layer.spec
        try:
            layer.spec = replace(spec, memory=_plain(self._declared))
            layer._add_pool(_ENDLESS)
            for holder in layer._holders():
                holder._fed = True  # a memory that is to be measured may be empty
                _skips(holder).copy_(torch.tensor([0, 1]))  # the record tells of what is skipped, and no warning
            yield
        finally:
            layer._drop_pool()
            layer.spec = spec
            for name in self._new_domains():
                del cast("nn.Module", layer._modules["_domains"])._modules[name]

    def take_stock(self) -> None:
        """See what the last batch has brought.

        Raises:
            SurgeryError: the batch was of a domain that did not exist before.
        """
        for name in self._new_domains():
            raise SurgeryError(
                f"{self.path}: domain '{name}' was never trained, and would come into being within recalibrate: call "
                f"it within nw.domain(model, '{name}'), in training mode"
            )
        for domain, tally in self._tallies.items():
            tally.take_stock(self._holder(domain), self.layer._elastic_dim)

    def found(self, batches: int) -> list[Measured]:
        """What so many batches have brought, for each memory that one of them reached."""
        reached = [name for name in self._tallies if _buffer(self._holder(name), "_pool_calls") > 0]
        if reached:
            return [self._found(name, batches) for name in reached]
        enough = " with samples enough" if falls_back(self._declared) else ""
        return [Measured(None, f"no batch{enough} reached it")]

    def remembered(self, domain: str | None) -> Remembered:
        """What the model's layer holds now."""
        layer = self.original
        holder = layer if domain is None or not isinstance(layer, Norm) else layer._held_by(domain)
        names = [name for name in holder._buffers if name.startswith("running_") or name == "num_batches_tracked"]
        buffers = {name: buffer.clone() for name in names if (buffer := holder._buffers[name]) is not None}
        if not isinstance(holder, Holder):
            return Remembered(domain, buffers, None)
        return Remembered(domain, buffers, _skips(holder).clone(), holder._fed)

    def _new_domains(self) -> list[str]:
        return [name for name in self.layer.domains if name not in self._tallies]

    def _holder(self, domain: str | None) -> Holder:
        return self.layer if domain is None else self.layer._held_by(domain)

    def _found(self, domain: str | None, batches: int) -> Measured:
        layer, holder, tally = self.layer, self._holder(domain), self._tallies[domain]
        within = "" if domain is None else f"domain '{domain}': "
        skipped, remembers = int(_skips(holder)[0]), layer.spec.normalizer.remembers
        pool = Entry(*(_buffer(holder, name) for name in POOL[1:]))
        enters = (pool.count >= layer._least) & (pool.columns > 0)
        if not enters.any():
            what = "finite" if skipped else "with samples enough"
            return Measured(None, f"{within}no batch that reached it was {what}")
        unbiased = is_unbiased(self._declared, remembers)
        old = {name: _buffer(holder, f"running_{name}") for name in remembers}
        new = {name: STATISTICS[name](pool.moments, unbiased=unbiased) for name in remembers}
        new = {name: torch.where(enters, new[name].to(old[name].dtype), old[name]) for name in remembers}
        unfit = self._unfit(new, enters)
        if unfit:
            return Measured(None, within + unfit)
        values = {f"running_{name}": statistic for name, statistic in new.items()} | self._counter(holder, tally.counts)
        skips = torch.tensor([skipped, min(skipped, 1)])
        amount = _amount((pool.count * pool.columns)[enters], int(tally.batches), batches, skipped)
        moved = _moved(old, new, enters, getattr(layer.spec.normalizer, "eps", None) or 0.0)
        return Measured(Remembered(domain, values, skips), f"{within}{amount}; {moved}")

    def _counter(self, holder: Holder, counts: Tensor) -> dict[str, Tensor]:
        """How many batches are remembered then; nothing, where nobody counts them.

        Renormalization opens its limits by this number, and recalibration does not shut them again.
        """
        if holder._buffers.get("num_batches_tracked") is None or self.layer._store().batches is None:
            return {}
        before = _buffer(holder, "num_batches_tracked")
        after = torch.where(counts > 0, counts, before)
        return {"num_batches_tracked": after if self._declared.renorm is None else torch.maximum(before, after)}

    def _unfit(self, statistics: dict[str, Tensor], enters: Tensor) -> str:
        """Why statistics cannot be remembered, or nothing.

        Raises:
            NonFiniteError: the memory's policy is to raise.
        """
        if self._declared.nonfinite == "keep":
            return ""
        for name, statistic in statistics.items():
            kept = _buffer(self.original, f"running_{name}")
            if not statistic[enters].to(kept.dtype).isfinite().all():
                message = f"the {_WORDS[name]} of the batches joined is not finite in {kept.dtype}"
                if self._declared.nonfinite == "raise":
                    raise NonFiniteError(f"{self.path}: {message}")
                return message
        return ""


def _plain(memory: Memory) -> Moving:
    """The same memory as far as measuring goes."""
    return Moving(
        memory.over,
        update_rate=1.0,
        unbiased=memory.unbiased,
        nonfinite=memory.nonfinite,
        degenerate=memory.degenerate,
        beyond=None if memory.elastic is None else {memory.elastic: memory.past_end},
    )


def _buffer(module: nn.Module, name: str) -> Tensor:
    return cast("Tensor", module._buffers[name])


def _skips(holder: Holder) -> Tensor:
    return cast("Tensor", holder._skips)


def _padded(x: Tensor, like: Tensor) -> Tensor:
    """With zeros where `like` has more places."""
    if x.dim() == 0:
        return x.to(like.device).expand(like.shape)
    padded = x.new_zeros(like.shape)
    padded[tuple(map(slice, x.shape))] = x
    return padded


_WORDS = {"mean": "mean", "var": "variance", "mean_square": "mean square"}


def _amount(samples: Tensor, entered: int, batches: int, skipped: int) -> str:
    """How many samples there were, in how many of the batches."""
    least, most = (int(bound) for bound in samples.aminmax())
    number = f"{least}" if least == most else f"{least} to {most}"
    of = "" if entered == batches else f" of {batches}"
    text = f"{number} samples a statistic in {entered}{of} batch{'es' * (batches > 1)}"
    return text + (f", {skipped} skipped as not finite" if skipped else "")


def _moved(old: dict[str, Tensor], new: dict[str, Tensor], enters: Tensor, eps: float) -> str:
    """How far statistics are from what was remembered, in units of what they divide by."""
    before, after = ({name: x[enters].double() for name, x in side.items()} for side in (old, new))
    if not all(x.isfinite().all() for x in before.values()):
        return "what was remembered was not finite"
    if not all(x.isfinite().all() for x in after.values()):
        return "they are not finite"
    parts = []
    tiny = torch.finfo(torch.float64).tiny
    for name, statistic in after.items():
        if name == "mean":
            scale = (after["var"] + eps).clamp_min(tiny).sqrt() if "var" in after else torch.ones_like(statistic)
            shift = float(((statistic - before[name]).abs() / scale).max())
            parts.append(f"mean moved by at most {shift:.3g} standard deviations")
        else:
            low, high = ((statistic + eps).clamp_min(tiny) / (before[name] + eps).clamp_min(tiny)).aminmax()
            parts.append(f"{_WORDS[name]} by a factor {float(low):.3g} to {float(high):.3g}")
    return ", ".join(parts)
