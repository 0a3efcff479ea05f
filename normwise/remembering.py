"""How a layer uses its memory: what it reads of it in a call, and how a batch enters it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from normwise.commit import Entry, commit, entry, flush, is_unbiased
from normwise.elastic import stretched
from normwise.errors import NonFiniteError, NormwiseError, PatternError, ShapeError
from normwise.kernels.reference import Recalled, Steps, Use, wide_dtype
from normwise.kernels.run import ready_for
from normwise.kernels.short import Ready, normalize
from normwise.masks import masked_axes, used
from normwise.memory import Memory, falls_back, limits
from normwise.moments import Moments, only
from normwise.plan import Plan, averaged, gather, place
from normwise.recalling import recall
from normwise.spec import check_samples
from normwise.state import Stateful
from normwise.sums import column_sum
from normwise.transforms import being_traced
from normwise.whereabouts import Whereabouts


class Remembering(Stateful):
    """A layer that remembers past batches, if that is declared; `Norm` adds what is done with a tensor."""

    def _checked_use(self, plan: Plan, mask: Tensor | None) -> Use | None:
        """What remembered statistics are for, once there are samples enough."""
        use = self._use_of_memory(plan, mask)
        if use != "instead" and math.prod(plan.shape) > 0 and self.spec.normalizer.needs_two:
            check_samples(self.spec.pattern, plan, remembers=self.spec.memory is not None)
        return use

    def _measures(self) -> bool:
        """Whether batches are normalized by their own statistics although there is a memory: in training."""
        memory = self.spec.memory
        return self.training and self._freezes == 0 and memory is not None and memory.updates and self._has_buffers()

    def _commits(self) -> bool:
        """Whether batches enter the memory."""
        return self._measures() and not self._held

    def _use_of_memory(self, plan: Plan, mask: Tensor | None) -> Use | None:
        """What remembered statistics are for in this call."""
        memory = self.spec.memory
        if memory is None or not self._has_buffers():
            return None
        self._check_domain()
        if not self._measures() or (falls_back(memory) and plan.rows < self._least):
            return "instead"
        if self.spec.elastic is not None and self._length() == 0 and not self._commits():
            return None  # nothing is remembered yet, and nothing will be
        if mask is not None and falls_back(memory):
            return "fallback"
        return None if memory.renorm is None else "correct"

    def _check_domain(self) -> None:
        """Refuse to evaluate with a memory that nothing has entered, where there are others.

        Raises:
            NormwiseError: the domain in use, or without one the layer's own memory, is empty.
        """
        if not self.domains or self._measures() or being_traced() or self._holder()._is_fed():
            return
        if self._domain is not None:
            raise NormwiseError(never_trained(self._domain, self.domains))
        raise NormwiseError(
            "every batch was of a domain, and none is in use: evaluate within nw.domain(model, ...), one of "
            f"{', '.join(self.domains)}"
        )

    @property
    def _least(self) -> int:
        """How many samples a column needs to enter the memory."""
        return 2 if self.spec.normalizer.needs_two else 1

    def _has_buffers(self) -> bool:
        """Whether the memory is there: torch's habit is to set the buffers to None to switch it off."""
        buffers = self._holder()._buffers
        for name in self.spec.memory_buffers:  # noqa: SIM110 - a generator takes as long as the kernel of a small call
            if buffers[name] is None:
                return False
        return True

    def _owner(self) -> object:
        """Who this is, for warnings and errors."""
        return type(self).__name__ if torch.compiler.is_compiling() else Whereabouts(self)

    def _recalled(
        self,
        use: Use,
        plan: Plan,
        wide: torch.dtype,
        fingerprint: Callable[[], Tensor],
        mask: Tensor | None = None,
    ) -> Recalled:
        """The memory as this call sees it, shaped to broadcast against the view."""
        spec, store = self.spec, self._store()
        memory = cast("Memory", spec.memory)
        if self._measures():  # it moves while it is read: a recomputed forward must see what the first one saw
            store = recall(store, fingerprint(), self._owner(), enters=use != "instead" and self._commits())
            statistics: tuple[Tensor, ...] = store.statistics
        else:  # a batch may move them before the backward pass
            statistics = tuple(statistic.clone() for statistic in store.statistics)
        if spec.elastic is not None and self._elastic_dim is not None:
            beyond = "last" if memory.past_end == "raise" and use != "instead" else memory.past_end
            statistics = stretched(
                statistics,
                spec.normalizer.remembers,
                store.batches if memory.updates else None,
                self._elastic_dim,
                spec.elastic,
                plan.size(spec.elastic),
                beyond,
                None if mask is None else used(mask, spec.elastic, plan),
            )
        shaped = tuple(place(statistic.to(wide), spec.memory_over, plan) for statistic in statistics)
        opened = None
        if use != "instead" and memory.renorm is not None and store.batches is not None:
            opened = limits(memory.renorm, store.batches, wide)
        return Recalled(shaped, use, self._least, opened)

    def _fingerprint(self, x: Tensor, residual: Tensor | None, plan: Plan, mask: Tensor | None) -> Tensor:
        """Sums of magnitudes that tell this batch from others, over the memory's axes; plain sums are often all 0."""
        x = x if residual is None else x + residual
        view = only(x.detach().to(wide_dtype(x)).reshape(plan.view), mask)
        summed = column_sum(view.abs(), plan.reduced)
        summed = column_sum(summed, averaged(summed.shape, self.spec.memory_over, plan))
        return self._within(gather(summed, self.spec.memory_over, plan))

    def _within(self, statistic: Tensor) -> Tensor:
        """As many places of the elastic axis as the memory has."""
        dim = self._elastic_dim
        return statistic if dim is None else statistic.narrow(dim, 0, min(statistic.shape[dim], self._length()))

    def _ready_for(self, x: Tensor, plan: Plan, use: Use | None) -> Ready | None:
        """What the short way needs, for a call that every check has let pass; None: it has to take the long one.

        A memory that is read while it moves, or of which a call may see a part, asks for more.
        """
        spec, memory = self.spec, self.spec.memory
        if memory is not None:
            reads_what_moves = memory.renorm is not None or (memory.updates and falls_back(memory))
            if reads_what_moves or memory.elastic is not None or memory.ghost is not None:
                return None
        steps = Steps(plan, spec.normalizer, spec.recovery, activation=spec.activation)
        return ready_for(x, steps, spec.parameter_over, use, None if memory is None else spec.memory_over)

    def _remember_shortly(self, ready: Ready, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """The output of a layer with a memory, by the short way; None: it cannot be taken now."""
        if self._use_of_memory(ready.plan, None) != ready.use:
            return None
        statistics = ready.room(x)
        if ready.use is None:
            output = normalize(ready, statistics, x, weight, bias)
            if self._commits():
                self._enter_shortly(ready, statistics)
            return output
        buffers = self._holder()._buffers
        remembered = tuple([buffers[name] for name in self.spec.memory_buffers])
        if not ready.recall(cast("tuple[Tensor, ...]", remembered), statistics):
            return None
        return normalize(ready, statistics, x, weight, bias)

    def _enter_shortly(self, ready: Ready, statistics: Any) -> None:
        """Let a batch enter the memory."""
        spec, holder = self.spec, self._holder()
        if not holder._fed:
            holder._fed = True
        memory, remembers = cast("Memory", spec.memory), spec.normalizer.remembers
        if not ready.commit(memory, remembers, self._store(), statistics, least=self._least):
            self._commit(ready.plan, ready.moments(statistics), self._window)

    def _enter(self, plan: Plan, moments: Moments, length: int, *, is_last: bool = True) -> None:
        """Let a batch enter the memory, which for its sake may have grown from `length` places of the elastic axis.

        A part of a batch that is not the last does not count where batches are accumulated.
        """
        window = self._window if is_last else 0
        if self._length() == length:
            self._commit(plan, moments, window)
            return
        counts = self._counts()
        before = [count.clone() for count in counts]
        try:
            self._commit(plan, moments, window)
        finally:
            if all(map(torch.equal, counts, before)):  # it did not enter
                self._resize(length)

    def _counts(self) -> list[Tensor]:
        """What changes when a batch enters the memory, or what is accumulated for it."""
        buffers = self._holder()._buffers
        counts = (buffers["num_batches_tracked"], buffers.get("_pool_count"))
        return [count for count in counts if count is not None]

    def _commit(self, plan: Plan, moments: Moments, window: int) -> None:
        spec, holder = self.spec, self._holder()
        if not (holder._fed or torch.compiler.is_compiling()):
            holder._fed = True
        memory = cast("Memory", spec.memory)
        unbiased = is_unbiased(memory, spec.normalizer.remembers)
        batch = entry(moments, spec.memory_over, plan, unbiased=unbiased, least=self._least)
        commit(
            memory,
            spec.normalizer.remembers,
            self._store(),
            Entry(*map(self._within, batch)),
            least=self._least,
            owner=self._owner(),
            window=window,
            joins=spec.joins_batches,
        )

    def _flush(self) -> None:
        """Let what is accumulated enter, in every domain."""
        memory, current = self.spec.memory, self._domain
        if memory is None:
            return
        try:
            for name in (None, *self.domains):
                self._domain = name
                flush(memory, self.spec.normalizer.remembers, self._store(), least=self._least)
        finally:
            self._domain = current

    def _grow(self, plan: Plan) -> None:
        """Remember more places of the elastic axis, unless its length is declared."""
        elastic = self.spec.elastic
        if elastic is None or elastic in dict(self.spec.sizes) or plan.size(elastic) <= self._length():
            return
        if torch.compiler.is_compiling():
            raise ShapeError(
                f"the memory of axis '{elastic}' cannot grow in compiled code: declare how long it is, for example "
                f"{elastic}={plan.size(elastic)}, or run the longest batch once in eager mode"
            )
        self._resize(plan.size(elastic))

    def _check_mask(self, mask: Tensor | None, plan: Plan) -> None:
        """Refuse what one counter cannot count: batches that reach some of the remembered columns only."""
        memory = self.spec.memory
        if memory is None or mask is None or memory.update_rate is not None:
            return
        remembered = {name for dim in self.spec.memory_over for name in dim} - {self.spec.elastic}
        apart = masked_axes(mask, plan) & remembered
        if apart:
            raise PatternError(
                f"a mask along '{min(apart)}' lets a batch enter some of its places only, and {memory!r} counts "
                "batches for all of them together: use Moving",
                self.spec.text,
            )

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Undo what sub-batches have entered if a later one is refused."""
        memory = self.spec.memory
        if memory is None or memory.nonfinite != "raise" or torch.compiler.is_compiling():
            yield
            return
        buffers = [buffer for buffer in self._holder()._buffers.values() if buffer is not None and not is_lazy(buffer)]
        before = [buffer.clone() for buffer in buffers]
        try:
            yield
        except NonFiniteError:
            for buffer, kept in zip(buffers, before, strict=True):
                buffer.copy_(kept)
            raise


def never_trained(name: str, domains: tuple[str, ...]) -> str:
    """What is wrong with evaluating in a domain that no batch was of."""
    known = ", ".join(domain for domain in domains if domain != name)
    return f"domain '{name}' was never trained; there are: {known or 'none'}"
