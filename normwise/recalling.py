"""How a layer reads a memory that moves while it is read: a batch computed again sees what it saw the first time.

As with `commit`, there is an operator of torch's for whatever is traced, and eager calls run the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.commit import Store, becomes_onnx, corner, example_of
from normwise.errors import NormwiseError, RecomputeError
from normwise.transforms import being_traced, recomputing

_SLACK = 1e-4  # how far a compiler's recomputation of a batch's sums may be from the first, which it summed otherwise


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
    if becomes_onnx():
        return store
    remembered = [*store.statistics, *(() if store.batches is None else (store.batches,))]
    seen = (*store.seen[: 1 + len(remembered)], store.seen[-1])
    run = _see_operator if being_traced() else _see
    slack = _SLACK if torch.compiler.is_compiling() else 0.0
    run(remembered, seen, batch, slack, enters, str(owner) if being_traced() else owner)
    first_seen = (_copies_operator if being_traced() else _copies)(list(seen[1:-1]))
    statistics = tuple(first_seen[: len(store.statistics)])
    return store._replace(statistics=statistics, batches=None if store.batches is None else first_seen[-1])


@torch.no_grad()
def _see(
    memory: Sequence[Tensor], seen: Sequence[Tensor], batch: Tensor, slack: float, enters: bool, owner: object
) -> None:
    """Take down the memory as a batch finds it; if the batch is computed again, leave what was taken down."""
    last, *snapshot, waiting = seen
    last = corner(last, batch)
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
        _see_operator(*(example_of(arg, dim, example) for arg, dim in zip(args, in_dims, strict=True)))
    return None, None


def _copies(kept: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in kept]


# Traced, the copies after `see` are an operator too: where torch's CPU compiler fuses loops of different shapes, it may
# forget that an operator has changed what a loop reads, and read before that (pytorch issue 185509). It never moves an
# operator across another that changes its inputs.
_copies_operator = torch.library.custom_op(
    "normwise::copies", _copies, mutates_args=(), schema="(Tensor[] kept) -> Tensor[]"
)


@_copies_operator.register_fake
def _copies_fakely(kept: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in kept]


@_copies_operator.register_vmap
def _copies_of_all(info: Any, in_dims: tuple[Any, ...], kept: Sequence[Tensor]) -> tuple[list[Tensor], list[Any]]:
    return _copies_operator(kept), list(in_dims[0] or [None] * len(kept))
