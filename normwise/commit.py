"""How memory changes: what a batch brings, and the one operator that lets it enter.

The operator is registered with torch, because an update in place from Python enters twice when a checkpointed block is
run again, and cannot be mapped or transformed. Inside of the operator both are seen: a recomputation changes nothing,
and a mapped call enters example by example, as a loop would. Eager calls run the same function without the operator's
dispatch.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from normwise.errors import NonFiniteError
from normwise.kernels.backends import extension
from normwise.memory import Memory
from normwise.moments import STATISTICS, Moments, merge
from normwise.plan import Over, Plan, averaged, gather
from normwise.sums import column_sum
from normwise.transforms import being_traced, recomputing


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
    if becomes_onnx():
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


def commit_columns(
    memory: Memory, remembers: tuple[str, ...], store: Store, statistics: array[float], samples: int, *, least: int
) -> bool:
    """`commit` for the commonest batch, compiled: what it brings is finite, and has a place for each column in order.

    The values are those of `commit`, bit for bit.

    Args:
        memory: As in `commit`.
        remembers: As in `commit`.
        store: As in `commit`.
        statistics: Three rows of numbers, one for each column: anything; the mean; m2.
        samples: How many a column has.
        least: As in `commit`.

    Returns:
        Whether the batch is done with; if not, nothing was touched, and the rest is up to `commit`.
    """
    if recomputing():
        return True
    if samples < least or store.pool or store.samples is not None:
        return False
    columns, batches, rate = len(statistics) // 3, store.batches, memory.update_rate
    is_counted = rate is not None if batches is None else _counts_plainly(batches)
    if not is_counted or not _lie_plainly(store.statistics, columns):
        return False
    *mean, spread = store.statistics
    first, row = statistics.buffer_info()[0], columns * statistics.itemsize
    enters: bool = extension.commit(  # type: ignore[union-attr]  # whoever has measured with it has seen it there
        first + row,
        first + 2 * row,
        mean[0].data_ptr() if mean else 0,
        spread.data_ptr(),
        0 if batches is None else batches.data_ptr(),
        columns,
        samples - is_unbiased(memory, remembers),
        -1.0 if rate is None else rate,
    )
    if enters:
        increment_version(store.statistics if batches is None else (*store.statistics, batches))
    return enters


def _counts_plainly(batches: Tensor) -> bool:
    """Whether compiled code may count batches here."""
    return (
        type(batches) is Tensor
        and batches.is_cpu
        and batches.dtype is torch.long
        and batches.numel() == 1
        and not batches.is_inference()
    )


def recall_columns(remembered: tuple[Tensor, ...], statistics: array[float], eps: float) -> bool:
    """Remembered statistics as a kernel takes them: three rows of inverse, mean and variance or mean square.

    Returns:
        Whether they could be read; if not, nothing was written.
    """
    if not _lie_plainly(remembered, len(statistics) // 3):
        return False
    *mean, spread = remembered
    if spread.requires_grad or (mean and mean[0].requires_grad):
        return False
    extension.recall(  # type: ignore[union-attr]  # whoever has made room has seen it there
        mean[0].data_ptr() if mean else 0,
        spread.data_ptr(),
        statistics.buffer_info()[0],
        len(statistics) // 3,
        eps,
    )
    return True


def _lie_plainly(statistics: Sequence[Tensor], columns: int) -> bool:
    """Whether compiled code may read and write remembered statistics: a float32 for each column, side by side."""
    for statistic in statistics:
        if not (
            type(statistic) is Tensor
            and statistic.is_cpu
            and statistic.dtype is torch.float32
            and statistic.numel() == columns
            and statistic.is_contiguous()
            and not statistic.is_inference()
            and not statistic.is_neg()
        ):
            return False
    return True


def becomes_onnx() -> bool:
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
        corner(samples, count).copy_(count)
    if pool:
        enters = _admitted(entered, (entered.mean, entered.m2), enters, nonfinite, skips, owner)
        entered, full = _pool(pool, entered, enters, window, joins=joins, unbiased=unbiased)
        enters = full & (entered.count >= least)
    counter = None if batches is None else corner(batches, enters)
    names = remembers.split(",")
    new = [STATISTICS[name](entered.moments, unbiased=unbiased).to(statistics[0].dtype) for name in names]
    enters = _admitted(entered, new, enters, nonfinite, skips, owner)
    for old, entering in zip(statistics, new, strict=True):
        old = corner(old, enters)
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
        _operator(*(example_of(arg, dim, example) for arg, dim in zip(args, in_dims, strict=True)))
    return None, None


def example_of(arg: Any, dim: Any, example: int) -> Any:
    """One example of a mapped argument; a buffer that is mapped as well is an ensemble's, and its part is a view."""
    if isinstance(arg, (list, tuple)):
        dims = [None] * len(arg) if dim is None else dim
        return [example_of(x, d, example) for x, d in zip(arg, dims, strict=True)]
    return arg if dim is None else arg.select(dim, example)


def _pool(
    pool: Sequence[Tensor], batch: Entry, enters: Tensor, window: int, *, joins: bool, unbiased: bool
) -> tuple[Entry, Tensor]:
    """Join a batch to the pool; what is there, and whether it enters the memory now, in which case it is emptied."""
    calls, *held = pool
    parts = Entry(*(corner(buffer, enters) for buffer in held))
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


def corner(buffer: Tensor, like: Tensor) -> Tensor:
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
