"""The one module: a declared normalization as a `torch.nn.Module`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normwise.commit import Entry, commit, entry, flush, is_unbiased, recall
from normwise.elastic import stretched
from normwise.errors import NonFiniteError, NormwiseError, PatternError, RecomputeError, ShapeError
from normwise.explain import Explanation, explain
from normwise.kernels.closed_form import run
from normwise.kernels.reference import Recalled, Steps, Use, placed, wide_dtype
from normwise.masks import Lengths, masked_axes, valid_view
from normwise.memory import Memory, falls_back, limits
from normwise.moments import Moments, only
from normwise.normalizers import Normalizer, Standardize
from normwise.plan import Plan, averaged, gather, place, plan_for
from normwise.recoveries import Recovery
from normwise.spec import NormSpec, check_samples
from normwise.state import Stateful
from normwise.sums import column_sum
from normwise.whereabouts import Whereabouts, path_of

_OPTIONS = ("self", "pattern", "normalizer", "recovery", "memory", "sizes", "device", "dtype")


class Norm(Stateful):
    """A normalization, declared by its four steps: reshape, normalize, recover, output.

    The pattern names the input's dimensions in order; `[ ]` marks the axes that are normalized over, `( )` splits a
    dimension into several axes, `...` is any number of dimensions. Every setting of the other axes is one column; each
    column is normalized by itself, then recovered, then put back where it came from.

    Args:
        pattern: For example `"[n] c [h w]"`, a batch normalization of images.
        normalizer: Step 2. Default: `Standardize()`.
        recovery: Step 3: `Affine("c")`, `Scale("c")`. Default: none.
        memory: What is remembered of training batches and used in evaluation: `Moving("c", decay=0.9)`,
            `Average("c")`, `Frozen("c")`. Default: nothing; evaluation then uses the batch's statistics too.
        sizes: Axis sizes by name. Those of parameters and memories that are not given are found at the first call, as
            torch's lazy modules do it, or taken from a checkpoint.
        device: Of parameters and memory.
        dtype: Of parameters and memory; memory is kept in float32 at least.
        **named_sizes: Axis sizes, as `g=8`.

    Shapes:
        input: as the pattern says. output: the same shape, dtype and memory format.

    Statistics are computed in float32 at least, and so are the parameters applied.

    Raises:
        PatternError: at construction, with a caret under the culprit.
        ShapeError: at the call, when the input does not fit the pattern.
        TooFewSamplesError: at the call, when a column to be standardized has one sample.

    >>> norm = Norm("[n] c [h w]", recovery=Affine("c"), memory=Moving("c", decay=0.9))
    >>> norm(torch.randn(8, 3, 4, 4)).shape
    torch.Size([8, 3, 4, 4])
    >>> norm.weight.shape, norm.running_mean.shape
    (torch.Size([3]), torch.Size([3]))
    """

    def __init__(
        self,
        pattern: str,
        normalizer: Normalizer | None = None,
        recovery: Recovery | None = None,
        memory: Memory | None = None,
        *,
        sizes: Mapping[str, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **named_sizes: int,
    ) -> None:
        nn.Module.__init__(self)  # by name: in a named layer the next class in line is torch's, with another signature
        normalizer = Standardize() if normalizer is None else normalizer
        _check_parts(pattern, normalizer, recovery, memory, named_sizes)
        spec = NormSpec(pattern, normalizer, recovery, memory, _joined(sizes, named_sizes))
        for name in spec.pattern.names:
            if name in _OPTIONS:
                raise spec.pattern.error(f"an axis cannot be called '{name}': that is an option of Norm", name)
        self.spec = spec
        self._register(device, dtype)

    def forward(
        self,
        input: Tensor,  # noqa: A002 - torch's layers name it so, and callers may too
        *,
        residual: Tensor | None = None,
        valid: Tensor | None = None,
        valid_axes: str | None = None,
        lengths: Lengths | None = None,
    ) -> Any:
        """Normalize `input`, or `input + residual`.

        Args:
            input: As the pattern says.
            residual: Added first, of the input's shape; the sum is returned as well: `y, s = norm(x, residual=r)`.
            valid: A bool mask, True where an element counts. Padding never counts, in the batch's statistics or in
                memory; its value, NaN included, never matters; outputs and gradients there are exactly 0.
            valid_axes: The axes that `valid` covers, as "n t"; if not said, the leading dimensions of the input.
            lengths: How many places of an axis count, for each example: `{"t": torch.tensor([5, 3])}`; also over
                several axes, and together with `valid`.

        Returns:
            The output; with a residual, the output and the sum, which is `input + residual` everywhere.

        Hugging Face's attention_mask is `valid=attention_mask.bool()`; torch's key_padding_mask is its inverse,
        `valid=~key_padding_mask`.

        A column without a valid element gives zeros and does not enter the memory. Nor does one with a single valid
        element where a variance is needed: its value is 0 before recovery, or what the memory makes of it if that is
        declared (`Moving(..., degenerate="memory")`).

        >>> norm = Norm("[n t] c", memory=Moving("c", update_rate=1.0))
        >>> x = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [torch.nan]]])
        >>> norm(x, lengths={"t": [3, 2]})[1, 2], norm.running_mean
        (tensor([0.]), tensor([3.]))
        """
        try:
            if residual is not None:
                input = _added(input, residual)  # noqa: A001 - see above
            output = self._normalize(input, valid, valid_axes, lengths)
        except NormwiseError as error:
            path = "" if torch.compiler.is_compiling() else path_of(self)
            if path and not isinstance(error, (NonFiniteError, RecomputeError)):  # those say it themselves
                error.args = (f"{path}: {error}",)
            raise
        return output if residual is None else (output, input)

    def explain(self, shape: Sequence[int] | Tensor) -> Explanation:
        """The four steps for a real shape (or a tensor, whose dtype and memory order then count).

        >>> print(Norm("... [d]", d=768).explain((32, 768)))  # doctest: +ELLIPSIS
        '... [d]' on (32, 768), float32
        ...
        """
        return explain(self.spec, shape)

    def extra_repr(self) -> str:
        """The declaration, sizes as found, and the memory's formula."""
        spec = self.spec
        parts = [repr(part) for part in (spec.text, spec.normalizer, spec.recovery, spec.memory) if part is not None]
        parts += [f"{name}={size}" for name, size in spec.sizes]
        return ", ".join(parts) + self._memory_note()

    def _memory_note(self) -> str:
        return "" if self.spec.memory is None else f"; {self.spec.memory.formula()}"

    def _normalize(self, x: Tensor, valid: Tensor | None, valid_axes: str | None, lengths: Lengths | None) -> Tensor:
        wide_dtype(x)
        spec = self.spec
        plan = plan_for(spec.pattern, x.shape, spec.call_sizes)
        mask = None
        if valid is not None or lengths or valid_axes is not None:
            mask = valid_view(spec.pattern, plan, valid, valid_axes, lengths, x.device)
            self._check_mask(mask, plan)
        ghost = None if spec.memory is None else spec.memory.ghost
        if ghost is None or x.shape[0] <= ghost or not self._measures():
            return self._normalize_one(x, plan, mask)
        pieces = -(-x.shape[0] // ghost)
        parts = x.tensor_split(pieces)
        masks = [mask] * pieces if mask is None or mask.shape[0] == 1 else mask.tensor_split(pieces)
        plans = [plan_for(spec.pattern, part.shape, spec.call_sizes) for part in parts]
        for part, part_mask in zip(plans, masks, strict=True):  # before any of them enters
            self._checked_use(part, part_mask)
        with self._all_or_nothing():
            return torch.cat([self._normalize_one(*piece) for piece in zip(parts, plans, masks, strict=True)])

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

    def _normalize_one(self, x: Tensor, plan: Plan, mask: Tensor | None) -> Tensor:
        use = self._checked_use(plan, mask)
        if self.spec.unknown:  # only now, so that an input that is refused leaves no sizes behind
            self._materialize_for(plan)
        spec, commits = self.spec, self._commits() and x.numel() > 0
        length = self._length()
        if commits:
            self._grow(plan)
        recalled = None
        if use is not None:
            recalled = self._recalled(use, plan, wide_dtype(x), lambda: self._fingerprint(x, plan, mask))
        parameters = placed(spec.recovery, self._parameters_of_recovery(), spec.parameter_over, plan, x)
        result = run(x, Steps(plan, spec.normalizer, spec.recovery, mask, recalled), parameters)
        if result.moments is not None and commits:
            self._enter(plan, result.moments, length)
        return result.output

    def _checked_use(self, plan: Plan, mask: Tensor | None) -> Use | None:
        """What remembered statistics are for, once there are samples enough."""
        use = self._use_of_memory(plan, mask)
        if use != "instead" and math.prod(plan.shape) > 0 and self.spec.normalizer.needs_two:
            check_samples(self.spec.pattern, plan, remembers=self.spec.memory is not None)
        return use

    def _measures(self) -> bool:
        """Whether batches are normalized by their own statistics although there is a memory: in training."""
        memory = self.spec.memory
        return self.training and not self.frozen and memory is not None and memory.updates and self._has_buffers()

    def _commits(self) -> bool:
        """Whether batches enter the memory."""
        return self._measures() and not self._held

    def _use_of_memory(self, plan: Plan, mask: Tensor | None) -> Use | None:
        """What remembered statistics are for in this call."""
        memory = self.spec.memory
        if memory is None or not self._has_buffers():
            return None
        if not self._measures() or (memory.degenerate == "memory" and plan.rows < self._least):
            return "instead"
        if self.spec.elastic is not None and self._length() == 0 and not self._commits():
            return None  # nothing is remembered yet, and nothing will be
        if mask is not None and falls_back(memory):
            return "fallback"
        return None if memory.renorm is None else "correct"

    @property
    def _least(self) -> int:
        """How many samples a column needs to enter the memory."""
        return 2 if self.spec.normalizer.needs_two else 1

    def _has_buffers(self) -> bool:
        """Whether the memory is there: torch's habit is to set the buffers to None to switch it off."""
        buffers = self._holder()._buffers
        return all(buffers[f"running_{name}"] is not None for name in self.spec.normalizer.remembers)

    def _owner(self) -> object:
        """Who this is, for warnings and errors."""
        return type(self).__name__ if torch.compiler.is_compiling() else Whereabouts(self)

    def _recalled(self, use: Use, plan: Plan, wide: torch.dtype, fingerprint: Callable[[], Tensor]) -> Recalled:
        """The memory as this call sees it, shaped to broadcast against the view."""
        spec, store = self.spec, self._store()
        memory = cast("Memory", spec.memory)
        if self._measures():  # it moves while it is read: a recomputed forward must see what the first one saw
            store = recall(store, fingerprint(), self._owner())
        statistics: tuple[Tensor, ...] = store.statistics
        if spec.elastic is not None and self._elastic_dim is not None:
            batches = store.batches if memory.updates else None
            length, names = plan.size(spec.elastic), spec.normalizer.remembers
            beyond = "last" if memory.past_end == "raise" and use != "instead" else memory.past_end
            statistics = stretched(statistics, names, batches, self._elastic_dim, spec.elastic, length, beyond)
        shaped = tuple(place(statistic.to(wide), spec.memory_over, plan) for statistic in statistics)
        opened = None
        if use != "instead" and memory.renorm is not None and store.batches is not None:
            opened = limits(memory.renorm, store.batches, wide)
        return Recalled(shaped, use, self._least, opened)

    def _fingerprint(self, x: Tensor, plan: Plan, mask: Tensor | None) -> Tensor:
        """Sums that tell this batch from others, over the memory's axes."""
        view = only(x.detach().to(wide_dtype(x)).reshape(plan.view), mask)
        summed = column_sum(view, plan.reduced)
        summed = column_sum(summed, averaged(summed.shape, self.spec.memory_over, plan))
        return self._within(gather(summed, self.spec.memory_over, plan))

    def _within(self, statistic: Tensor) -> Tensor:
        """As many places of the elastic axis as the memory has."""
        dim = self._elastic_dim
        return statistic if dim is None else statistic.narrow(dim, 0, min(statistic.shape[dim], self._length()))

    def _enter(self, plan: Plan, moments: Moments, length: int) -> None:
        """Let a batch enter the memory, which for its sake may have grown from `length` places of the elastic axis."""
        if self._length() == length:
            self._commit(plan, moments)
            return
        counts = self._counts()
        before = [count.clone() for count in counts]
        try:
            self._commit(plan, moments)
        finally:
            if all(map(torch.equal, counts, before)):  # it did not enter
                self._resize(length)

    def _counts(self) -> list[Tensor]:
        """What changes when a batch enters the memory, or what is accumulated for it."""
        buffers = self._holder()._buffers
        counts = (buffers["num_batches_tracked"], buffers.get("_pool_count"))
        return [count for count in counts if count is not None]

    def _commit(self, plan: Plan, moments: Moments) -> None:
        spec = self.spec
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
            window=self._window,
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


def _added(x: Tensor, residual: Tensor) -> Tensor:
    if x.shape != residual.shape:
        raise ShapeError(f"the residual has shape {tuple(residual.shape)}, the input {tuple(x.shape)}")
    return x + residual


def _joined(sizes: Mapping[str, int] | None, named: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    given = dict(sizes or {})
    for name, size in named.items():
        if given.setdefault(name, size) != size:
            raise ShapeError(f"axis '{name}' is given two sizes: {given[name]} and {size}")
    return tuple(given.items())


def _check_parts(
    pattern: str,
    normalizer: Normalizer,
    recovery: Recovery | None,
    memory: Memory | None,
    named_sizes: Mapping[str, Any],
) -> None:
    """Catch a part in the wrong place, or an option that is misspelt and so looks like an axis size."""
    if not isinstance(pattern, str):
        raise TypeError(f"pattern is {pattern!r}, which is not text")
    wanted = (("normalizer", normalizer, "normalize"), ("recovery", recovery, "recover"), ("memory", memory, "updates"))
    for name, part, method in wanted:
        if part is not None and (isinstance(part, type) or not hasattr(part, method)):
            raise TypeError(f"{name} is {part!r}, which is not a {name}")
    for name, size in named_sizes.items():
        if not hasattr(size, "__index__"):
            known = ", ".join(_OPTIONS[1:])
            raise PatternError(f"{name}={size!r} is neither an option of Norm ({known}) nor the size of an axis")
