"""Step by step is what one call is: outputs, gradients and memory, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from normwise import RMS, Affine, Moving, Norm, Scale
from normwise.scan import Scan

DECLARED = {
    "per step": Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9, beyond={"t": "last"})),
    "fixed": Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9), t=6, c=5),
    "shared": Norm("[n] t c", recovery=Affine("c"), memory=Moving("c", decay=0.9)),
    "root mean square": Norm("[n] t c", RMS(), Scale("c"), memory=Moving("c", decay=0.9)),
    "nothing remembered": Norm("[n] t c", recovery=Affine("c")),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("alive", [None, torch.arange(6) < torch.tensor([[6], [2], [5], [3]])], ids=["full", "alive"])
@pytest.mark.parametrize("norm", DECLARED.values(), ids=DECLARED)
def test_step_by_step_is_one_call(norm: Norm, alive: Tensor | None, training: bool) -> None:
    whole = copy.deepcopy(norm)
    whole(torch.randn(4, 6, 5))
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.uniform_(0.5, 2.0)
    stepwise = copy.deepcopy(whole.train(training))
    leaves = [x.requires_grad_() for x in torch.randn(1, 4, 6, 5).repeat(2, 1, 1, 1)]
    scan = Scan(stepwise, "t", (4, 6, 5), leaves[1], alive)
    outputs = [whole(leaves[0], valid=alive), torch.stack([scan(t, leaves[1][:, t]) for t in range(6)], 1)]
    scan.close()
    assert torch.equal(*outputs)
    cotangent = torch.randn(4, 6, 5)
    grads = [torch.autograd.grad(y, x, cotangent)[0] for y, x in zip(outputs, leaves, strict=True)]
    assert torch.equal(*grads)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, stepwise.state_dict()[name])


def test_a_batch_of_one_sequence_does_not_lengthen_the_memory() -> None:
    """It has no variance, so the memory stands in for it, as in one call."""
    norm = Norm("[n] t c", memory=Moving("t c", decay=0.5, beyond={"t": "last"}))
    norm(torch.randn(8, 3, 4) * 3 + 2)
    x, whole = torch.randn(1, 5, 4), copy.deepcopy(norm)
    scan = Scan(norm, "t", (1, 5, 4), x)
    y = torch.stack([scan(place, x[:, place]) for place in range(5)], 1)
    scan.close()
    assert torch.equal(y, whole(x))
    assert norm.num_batches_tracked.tolist() == whole.num_batches_tracked.tolist() == [1, 1, 1]


def test_padding_past_the_remembered_steps_is_not_refused() -> None:
    norm = Norm("[n] t c", memory=Moving("t c", decay=0.5, beyond={"t": "raise"}))
    norm(torch.randn(8, 3, 4))
    norm.eval()
    x, alive = torch.randn(2, 5, 4), torch.arange(5) < torch.tensor([[3], [2]])
    scan = Scan(norm, "t", (2, 5, 4), x, alive)
    y = torch.stack([scan(place, x[:, place]) for place in range(5)], 1)
    assert torch.equal(y, norm(x, lengths={"t": [3, 2]}))
