"""Gradients of the recurrent nets' fast path, float32 on the CPU, against those of float64, however it is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise import recurrent
from tests.tolerances import GRADIENTS

LAYER = nw.Norm("... [c]", recovery=nw.Affine("c"))
KINDS = pytest.mark.parametrize("kind", [nw.RNN, nw.LSTM, nw.GRU], ids=lambda kind: kind.__name__)


def gradients(
    net: nn.Module, x: Tensor, lengths: Tensor | None, run: Callable[..., Tensor] | None = None
) -> list[Tensor]:
    """Of the input and every parameter, with the same random cotangents for outputs and last states."""
    torch.manual_seed(3)
    leaf = x.detach().requires_grad_()
    output, state = net(leaf, lengths=lengths) if run is None else run(net, leaf)
    wanted = [output, *(state if isinstance(state, tuple) else (state,))]
    cotangents = [torch.randn(part.shape, dtype=torch.float64).to(part.dtype) for part in wanted]
    net.zero_grad()
    torch.autograd.backward(wanted, cotangents)
    return [tensor.grad for tensor in (leaf, *net.parameters())]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest, relative to the largest element of each gradient."""
    pairs = zip(found, exact, strict=True)
    return max(((ours.double() - wanted).abs().max() / wanted.abs().max()).item() for ours, wanted in pairs)


def assert_gradients_right(
    net: nn.Module, x: Tensor, lengths: Tensor | None = None, run: Callable[..., Tensor] | None = None
) -> None:
    """Right to rounding, or, where steps amplify rounding, at most twice as far off as autograd over the same scan."""
    exact = gradients(copy.deepcopy(net).double(), x.double(), lengths)
    with patch.object(recurrent, "can_scan_rows", lambda *_: False):
        by_autograd = error(gradients(net, x, lengths), exact)
    assert error(gradients(net, x, lengths, run), exact) <= max(GRADIENTS.relative, 2 * by_autograd)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@KINDS
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_every_layout(kind: type, layout: Callable[[Tensor], Tensor], batch_first: bool) -> None:
    assert_gradients_right(kind(5, 7, batch_first=batch_first, norm=LAYER), layout(torch.randn(9, 4, 5)))


@KINDS
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_directions_and_layers(kind: type, batch_first: bool) -> None:
    net = kind(5, 7, num_layers=2, bidirectional=True, batch_first=batch_first, norm=LAYER)
    x = torch.randn(4, 9, 5) if batch_first else torch.randn(9, 4, 5)
    assert_gradients_right(net, x, torch.tensor([9, 1, 4, 6]))


@KINDS
def test_more_steps_than_a_block_holds(kind: type) -> None:
    assert_gradients_right(kind(3, 4, batch_first=True, norm=LAYER), torch.randn(150, 5, 3))


@KINDS
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(kind: type, reentrant: bool) -> None:
    def flat(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        output, state = net(x)
        return output, *(state if isinstance(state, tuple) else (state,))

    def again(net: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        output, *state = checkpoint(flat, net, x, use_reentrant=reentrant)  # nested outputs are lost to reentrant ones
        return output, tuple(state)

    assert_gradients_right(kind(5, 7, batch_first=True, norm=LAYER), torch.randn(4, 9, 5), run=again)


@KINDS
def test_uninitialized_memory_never_shows(kind: type) -> None:
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for batch_first in (False, True):
            assert_gradients_right(kind(5, 7, batch_first=batch_first, norm=LAYER), torch.randn(6, 4, 5))
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)


@KINDS
def test_a_gradient_that_is_wanted_of_the_weights_alone(kind: type) -> None:
    net = kind(5, 7, norm=LAYER)
    x, wide = torch.randn(6, 4, 5), copy.deepcopy(net).double()
    cotangent = torch.randn(6, 4, 7)
    exact = torch.autograd.grad(wide(x.double())[0], list(wide.parameters()), cotangent.double())
    found = torch.autograd.grad(net(x)[0], list(net.parameters()), cotangent)
    assert error(list(found), list(exact)) <= GRADIENTS.relative
