"""What `param_groups` refuses, word for word."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from normwise import Affine, Norm, SurgeryError
from normwise.surgery.groups import param_groups
from tests.test_groups import roles


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, None, "0.1", torch.tensor(0.1)], ids=repr)
def test_what_is_no_weight_decay(value: Any) -> None:
    with pytest.raises(ValueError, match=f"^weight_decay is a number from 0 on, not {re.escape(repr(value))}$"):
        param_groups(nn.Linear(2, 2), value)


FLAT = type("FullyShardedDataParallel", (nn.Sequential,), {})
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no parameters": (lambda: nn.Sequential(nn.ReLU()), "Sequential has no parameters"),
    "no module": (lambda: [nn.Linear(2, 2)], "a model is a torch.nn.Module, not list"),
    "no sizes": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3), Norm("[n] c", recovery=Affine("c"))),
        "parameters have no sizes yet: 1.weight, 1.bias, 2.weight, 2.bias; run a batch through the model first",
    ),
    "no sizes of many": (
        lambda: nn.Sequential(*[nn.LazyLinear(3) for _ in range(4)]),
        "parameters have no sizes yet: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight, 2.bias, ...; "
        "run a batch through the model first",
    ),
    "flat parameters": (
        lambda: nn.Sequential(FLAT(nn.Linear(2, 2))),
        "0 is a FullyShardedDataParallel, whose flat parameters no longer tell weights from biases: "
        "shard with torch.distributed.fsdp.fully_shard, which keeps their shapes",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        param_groups(make(), 0.1)
    assert str(caught.value) == message


def test_after_a_batch_the_sizes_are_there() -> None:
    model = nn.Sequential(nn.LazyLinear(3), Norm("[n] c", recovery=Affine("c")))
    model(torch.randn(4, 2))
    assert roles(model) == {
        "0.weight": "weight",
        "0.bias": "bias",
        "1.weight": "normalization",
        "1.bias": "normalization",
    }
