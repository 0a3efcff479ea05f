"""How memory changes: what a batch brings, and the one operator that lets it enter.

The operator is registered with torch, because an update in place from Python enters twice when a checkpointed block is
run again, and cannot be mapped or transformed. Inside of the operator both are seen: a recomputation changes nothing,
and a mapped call enters example by example, as a loop would. Eager calls run the same function without the operator's
dispatch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normwise.errors import NonFiniteError, NormwiseError, RecomputeError
from normwise.memory import Memory
from normwise.moments import STATISTICS, Moments, merge
from normwise.plan import Over, Plan, averaged, gather
from normwise.sums import column_sum
from normwise.transforms import being_traced, recomputing

_SLACK = 1e-4  # how far a compiler's recomputation of a batch's sums may be from the first, which it summed otherwise


class Store(NamedTuple):
    """The buffers of one memory, over its axes where nothing else is said."""

    statistics: tuple[Tensor, ...]  # in the order of the normalizer's `remembers`
    batches: Tensor | None = None  # how many batches entered: one number, or one for each place of the elastic axis
    skips: Tensor | None = None  # how many did not, because they were not finite; of how many there was a warning
    samples: Tensor | None = None  # how many samples the last batch had
    pool: tuple[Tensor, ...] = ()  # calls, columns, count, mean, m2 of what is accumulated
    seen: tuple[Tensor, ...] = ()  # what a layer that reads its memory in training read last, and of which batch


class Entry(NamedTuple):
    """What a batch brings to a memory: its moments over the memory's axes, and how many columns they average."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody counts with
    mean: Tensor
    m2: Tensor
    columns: Tensor

    @property
    def moments(self) -> Moments:
        """Without the number of columns."""
        return Moments(self.count, self.mean, self.m2)


def is_unbiased(memory: Memory, remembers: tuple[str, ...]) -> bool:
    """Whether what enters is divided by the number of samples less one: a variance may be, a mean square never."""
    return memory.unbiased and "var" in remembers


def entry(moments: Moments, over: Over, plan: Plan, *, unbiased: bool, least: int) -> Entry:
    """The moments over the named axes. Kept axes that are not named are averaged over the columns that have samples.

    Averaged are means and variances, as torch's InstanceNorm does it, and not the samples joined.
    """
    mean, m2 = moments.mean, moments.m2
    count = torch.zeros_like(mean) + moments.count  # no copy from the host, and no size that a compiler must fix
    columns = torch.ones_like(mean)
    dims = averaged(mean.shape, over, plan)
    if dims:
        enough = count >= least
        columns = column_sum(enough.to(mean.dtype), dims)

        def average(x: Tensor) -> Tensor:
            return column_sum(torch.where(enough, x, torch.zeros_like(x)), dims) / columns.clamp_min(1)

        variance = average(m2 / (count - int(unbiased)))
        mean, count = average(mean), average(count)
        m2 = variance * (count - int(unbiased))
    return Entry(*(gather(x, over, plan) for x in (count, mean, m2, columns)))


def commit(
    memory: Memory,
    remembers: tuple[str, ...],
    store: Store,
    batch: Entry,
    *,
    least: int,
    owner: object,
    window: int = 1,
    joins: bool = True,
) -> None:
    """Let one batch enter the buffers, in place, once.

    A batch that is not finite enters as the memory's `nonfinite` says; a column with fewer than `least` samples does
    not. With a pool, batches are joined there until there are `window`, and then enter as one.

    Args:
        memory: Its rate and policies.
        remembers: The names of the statistics.
        store: The buffers.
        batch: What enters. Along an elastic axis it may be shorter than the buffers.
        least: Samples that a column must have.
        owner: Whose memory it is, for warnings and errors; `str()` is asked when there is one.
        window: How many batches the pool takes; 0: this is a part of a batch, of which more is to come.
        joins: Whether pooled batches are joined sample by sample; otherwise their columns are averaged.

    Raises:
        NonFiniteError: the policy is "raise" and a statistic is not finite.
        ValueError: an average of all batches that nobody counts.
    """
    if memory.update_rate is None and store.batches is None:
        raise ValueError(f"{memory} needs to know the number of batches, and nobody counts them")
    if _becomes_onnx():
        return
    run = _operator if being_traced() else _commit
    run(
        store.statistics,
        store.batches,
        None if torch.compiler.is_exporting() else store.skips,  # an exported program changes buffers only
        store.samples,
        store.pool,
        list(batch),
        ",".join(remembers),
        memory.update_rate,
        is_unbiased(memory, remembers),
        memory.nonfinite,
        window,
        joins,
        least,
        str(owner) if being_traced() else owner,
    )


def _becomes_onnx() -> bool:
    """Whether the call is traced for an ONNX graph, which has no state that a batch could enter."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def flush(memory: Memory, remembers: tuple[str, ...], store: Store, *, least: int) -> None:
    """Let what the pool holds enter, full or not, and empty it."""
    calls, *held = store.pool
    if calls > 0:
        commit(memory, remembers, store._replace(pool=()), Entry(*held), least=least, owner="")
    for buffer in store.pool:
        buffer.zero_()


@torch.no_grad()
def _commit(
    statistics: Sequence[Tensor],
    batches: Tensor | None,
    skips: Tensor | None,
    samples: Tensor | None,
    pool: Sequence[Tensor],
    batch: Sequence[Tensor],
    remembers: str,
    update_rate: float | None,
    unbiased: bool,
    nonfinite: str,
    window: int,
    joins: bool,
    least: int,
    owner: object,
) -> None:
    if recomputing():
        return
    entered = Entry(*batch)
    enters = entered.count >= (1 if pool and joins else least)
    if samples is not None:
        samples.zero_()
        count = entered.count * entered.columns
        _corner(samples, count).copy_(count)
    if pool:
        enters = _admitted(entered, (entered.mean, entered.m2), enters, nonfinite, skips, owner)
        entered, full = _pool(pool, entered, enters, window, joins=joins, unbiased=unbiased)
        enters = full & (entered.count >= least)
    counter = None if batches is None else _corner(batches, enters)
    names = remembers.split(",")
    new = [STATISTICS[name](entered.moments, unbiased=unbiased).to(statistics[0].dtype) for name in names]
    enters = _admitted(entered, new, enters, nonfinite, skips, owner)
    for old, entering in zip(statistics, new, strict=True):
        old = _corner(old, enters)
        rate = update_rate if counter is None or update_rate is not None else (counter + 1).to(old.dtype).reciprocal()
        blended = old * (1 - rate) + entering * rate  # type: ignore[operator]  # commit() saw that there is a rate
        old.copy_(torch.where(enters, blended, old))
    if counter is not None:
        counter.add_(_any(enters, counter.shape))


_operator = torch.library.custom_op(
    "normwise::commit",
    _commit,
    mutates_args=("statistics", "batches", "skips", "samples", "pool"),
    schema="(Tensor(a!)[] statistics, Tensor(b!)? batches, Tensor(c!)? skips, Tensor(d!)? samples, "
    "Tensor(e!)[] pool, Tensor[] batch, str remembers, float? update_rate, bool unbiased, str nonfinite, "
    "int window, bool joins, int least, str owner) -> ()",
)


@_operator.register_fake
def _commit_fakely(*args: object) -> None:
    return None


@_operator.register_vmap
def _commit_one_by_one(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[None, None]:
    """A mapped commit: the examples enter in order, as they would in a loop."""
    for example in range(info.batch_size):
        _operator(*(_example(arg, dim, example) for arg, dim in zip(args, in_dims, strict=True)))
    return None, None


def _example(arg: Any, dim: Any, example: int) -> Any:
    """One example of a mapped argument; a buffer that is mapped as well is an ensemble's, and its part is a view."""
    if isinstance(arg, (list, tuple)):
        dims = [None] * len(arg) if dim is None else dim
        return [_example(x, d, example) for x, d in zip(arg, dims, strict=True)]
    return arg if dim is None else arg.select(dim, example)


def recall(store: Store, batch: Tensor, owner: object, *, enters: bool) -> Store:
    """The memory as a batch in training sees it, which is as it saw it the first time if it is computed again.

    Args:
        store: The buffers.
        batch: A number or more that tells this batch from another, over the memory's axes.
        owner: Whose memory it is, for the error.
        enters: Whether the batch then enters the memory, so that a mapped call cannot be a loop's.

    Raises:
        RecomputeError: a checkpointed forward is computed again after another batch has been seen.
        NormwiseError: the call is mapped, and would have to read between one example's entry and the next.
    """
    if _becomes_onnx():
        return store
    remembered = [*store.statistics, *(() if store.batches is None else (store.batches,))]
    seen = (*store.seen[: 1 + len(remembered)], store.seen[-1])
    run = _see_operator if being_traced() else _see
    slack = _SLACK if torch.compiler.is_compiling() else 0.0
    run(remembered, seen, batch, slack, enters, str(owner) if being_traced() else owner)
    first_seen = [kept.clone() for kept in seen[1:-1]]
    statistics = tuple(first_seen[: len(store.statistics)])
    return store._replace(statistics=statistics, batches=None if store.batches is None else first_seen[-1])


@torch.no_grad()
def _see(
    memory: Sequence[Tensor], seen: Sequence[Tensor], batch: Tensor, slack: float, enters: bool, owner: object
) -> None:
    """Take down the memory as a batch finds it; if the batch is computed again, leave what was taken down."""
    last, *snapshot, waiting = seen
    last = _corner(last, batch)
    same = _same(last, batch, slack)
    if not recomputing():
        moved = torch.stack([(kept != now).any() for kept, now in zip(snapshot, memory, strict=True)]).any()
        waiting.copy_(torch.where(same & moved & (waiting > 0), 2, 1))  # 2: which of two it is would not be known
        last.copy_(batch)
        for kept, now in zip(snapshot, memory, strict=True):
            kept.copy_(now)
    elif same and waiting < 2:
        waiting.zero_()
    else:
        raise RecomputeError(
            f"{owner}: a checkpointed forward is computed again, but its memory has seen another batch since: this "
            "layer reads its memory in training, so run each backward before the next forward, or do not checkpoint it"
        )


def _same(a: Tensor, b: Tensor, slack: float) -> Tensor:
    """Whether two batches have the same sums; `slack` is relative to the largest, and 0 asks for the same bits."""
    close = (a == b) | (a.isnan() & b.isnan())
    if slack and b.numel():
        close = close | ((a - b).abs() <= slack * b.abs().amax())
    return close.all()


_see_operator = torch.library.custom_op(
    "normwise::see",
    _see,
    mutates_args=("seen",),
    schema="(Tensor[] memory, Tensor(a!)[] seen, Tensor batch, float slack, bool enters, str owner) -> ()",
)


@_see_operator.register_fake
def _see_fakely(*args: object) -> None:
    return None


@_see_operator.register_vmap
def _see_one_by_one(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[None, None]:
    *_, enters, owner = args
    if enters:
        raise NormwiseError(
            f"{owner}: in a loop each example would read the memory after the one before has entered it, which a "
            "mapped call cannot: use a loop, or evaluation mode"
        )
    for example in range(info.batch_size):
        _see_operator(*(_example(arg, dim, example) for arg, dim in zip(args, in_dims, strict=True)))
    return None, None


def _pool(
    pool: Sequence[Tensor], batch: Entry, enters: Tensor, window: int, *, joins: bool, unbiased: bool
) -> tuple[Entry, Tensor]:
    """Join a batch to the pool; what is there, and whether it enters the memory now, in which case it is emptied."""
    calls, *held = pool
    parts = Entry(*(_corner(buffer, enters) for buffer in held))
    present = Entry(*(torch.where(enters, x, torch.zeros_like(x)) for x in batch))
    for part, joined in zip(parts, _joined(parts, present, joins=joins, unbiased=unbiased), strict=True):
        part.copy_(joined)
    calls.add_(min(window, 1))
    full = (calls >= window) & (window > 0)
    total = Entry(*(buffer.clone() for buffer in held))
    for buffer in pool:
        buffer.copy_(torch.where(full, torch.zeros_like(buffer), buffer))
    return total, (total.columns > 0) & full


def _joined(a: Entry, b: Entry, *, joins: bool, unbiased: bool) -> Entry:
    """Two entries joined sample by sample, or averaged column by column."""
    if joins:
        return Entry(*merge(a.moments, b.moments), torch.maximum(a.columns, b.columns))  # type: ignore[arg-type]
    columns = a.columns + b.columns
    share = b.columns / columns.clamp_min(1)
    count, mean = torch.lerp(a.count, b.count, share), torch.lerp(a.mean, b.mean, share)
    variance = torch.lerp(_variance(a, unbiased=unbiased), _variance(b, unbiased=unbiased), share)
    return Entry(count, mean, variance * (count - int(unbiased)), columns)


def _variance(batch: Entry, *, unbiased: bool) -> Tensor:
    """0 where there are no samples."""
    return batch.m2 / (batch.count - int(unbiased)).clamp_min(1)


def _admitted(
    batch: Entry,
    statistics: Sequence[Tensor],
    enters: Tensor,
    nonfinite: str,
    skips: Tensor | None,
    owner: object,
) -> Tensor:
    """Where a batch enters: nowhere, and counted, if one of its statistics is not finite."""
    if nonfinite == "keep":
        return enters
    finite = torch.stack([(statistic.isfinite() | ~enters).all() for statistic in statistics]).all()
    _report(batch, finite, nonfinite, skips, owner)
    if skips is not None:
        skips[0].add_(~finite)
    return enters & finite


def _report(batch: Entry, finite: Tensor, nonfinite: str, skips: Tensor | None, owner: object) -> None:
    """Raise, or warn the first time, where the host sees it for nothing; elsewhere the count waits for it.

    There is no warning of values so large that only their variance is not finite.
    """
    if (nonfinite == "skip" and finite.device.type != "cpu") or finite.all():
        return
    message = f"{owner}: the batch's statistics are not finite"
    if nonfinite == "raise":
        raise NonFiniteError(f"{message}, and nothing of it has entered the memory")
    first = skips is None or skips[1] == 0
    if first and not (batch.mean.isfinite().all() and not batch.m2.isnan().any()):
        if skips is not None:
            skips[1].add_(1)
        counted = "" if skips is None else "; skipped_batches counts such batches"
        warnings.warn(f"{message}: it does not enter the memory{counted}", stacklevel=2)


def _corner(buffer: Tensor, like: Tensor) -> Tensor:
    """The part of a buffer that a shorter batch covers."""
    for dim, size in enumerate(buffer.shape):
        if size > like.shape[dim]:
            buffer = buffer.narrow(dim, 0, like.shape[dim])
    return buffer


def _any(flags: Tensor, shape: Sequence[int]) -> Tensor:
    """Whether any flag is set, for one number or for each place along the dimensions that `shape` keeps."""
    if len(shape) == 0:
        return flags.any()
    for dim, size in enumerate(shape):
        if size == 1:
            flags = flags.any(dim, keepdim=True)
    return flags
