"""A compiled layer that reads its memory while it moves reads what was taken down, in whatever order loops are made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normwise.commit import Store
from normwise.recalling import recall
from tests.tolerances import COMPILED, check

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),  # the compiler's own
]


def _store() -> Store:
    """A variance of 7, and nothing taken down yet."""
    taken = (torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros((), dtype=torch.long))
    return Store((torch.full((4, 3), 7.0),), seen=taken)


def _fallback(x: Tensor, count: Tensor, store: Store) -> tuple[Tensor, Tensor]:
    """Statistics of the batch, or of the memory for columns with one sample: loops of two shapes, which are fused."""
    remembered = recall(store, x.abs().sum(0), "a layer", enters=True).statistics[0]
    enough = torch.zeros_like(remembered) + count.unsqueeze(1) >= 2
    return enough, torch.where(enough, x.square().sum(0), remembered + 1)


def test_remembered_statistics_are_read_after_they_are_taken_down() -> None:
    x, count = torch.randn(6, 4, 3), torch.tensor([4, 3, 2, 1])
    _, found = torch.compile(_fallback, fullgraph=True)(x, count, _store())
    check(found[:3], x.square().sum(0)[:3], COMPILED)
    assert found[3].tolist() == [8.0, 8.0, 8.0]
