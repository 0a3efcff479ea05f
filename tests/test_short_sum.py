"""The short way of a call with a residual gives what the long way gives, in values and derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import Norm
from tests.short_calls import LAYERS, MEMORY_LAYERS, counted, made, needs_kernels, the_long_way
from tests.tolerances import VALUES, check

pytestmark = needs_kernels
without_memory = pytest.mark.parametrize("name", [name for name in LAYERS if name not in (*MEMORY_LAYERS, "Frozen")])


def outcome(
    layer: Norm, x: Tensor, residual: Tensor, *, of: Sequence[int] = (0, 1), wanted: Sequence[int] = (0, 1)
) -> list[Tensor | None]:
    """Output and sum; the gradients of the inputs that want one and of the parameters, of some of the outputs."""
    torch.manual_seed(1)
    leaves = [tensor.detach().requires_grad_(place in wanted) for place, tensor in enumerate((x, residual))]
    outputs = layer(leaves[0], residual=leaves[1])
    cotangents = [torch.randn_like(output) for output in outputs]
    inputs = [leaves[place] for place in wanted] + list(layer.parameters())
    gradients = torch.autograd.grad(
        [outputs[place] for place in of], inputs, [cotangents[place] for place in of], allow_unused=True
    )
    return [*(output.detach() for output in outputs), *gradients]


def assert_same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or (torch.equal(a, b) and a.stride() == b.stride())


def assert_as_the_long_way(layer: Norm, x: Tensor, residual: Tensor, **options: Sequence[int]) -> None:
    found = outcome(layer, x, residual, **options)
    with the_long_way():
        assert_same(found, outcome(copy.deepcopy(layer), x, residual, **options))


@without_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_taken_and_gives_the_same_bits(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made(name)
    layer, x, residual = layer.to(dtype), x.to(dtype), torch.randn_like(x).to(dtype)
    with counted(monkeypatch) as count:
        assert_as_the_long_way(layer, x, residual)
        assert_as_the_long_way(layer, x + 1, residual)
    assert count == [2]


@pytest.mark.parametrize("of", [(0,), (1,)], ids=["output", "sum"])
@pytest.mark.parametrize("wanted", [(), (0,), (1,), (0, 1)], ids=["neither", "input", "residual", "both"])
def test_some_of_the_gradients(of: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    layer, x = made("LayerNorm")
    if of == (1,) and not wanted:
        return
    assert_as_the_long_way(layer, x, torch.randn_like(x), of=of, wanted=wanted)


@without_memory
def test_no_gradients(name: str) -> None:
    layer, x = made(name)
    residual = torch.randn_like(x)
    with torch.no_grad():
        found = layer(x, residual=residual)
        with the_long_way():
            assert_same(found, copy.deepcopy(layer)(x, residual=residual))
    assert torch.equal(found[1], x + residual)
    assert not found[0].requires_grad
    assert not found[1].requires_grad


def _other_order(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


TAKES_THE_LONG_WAY: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "residual in another order": lambda x: (x, _other_order(torch.randn_like(x))),
    "residual of another dtype": lambda x: (x, torch.randn_like(x).double()),
    "residual with gaps": lambda x: (x, torch.randn(*x.shape, 2)[..., 0]),
    "residual of a subclass": lambda x: (x, torch.randn_like(x).as_subclass(Marked)),
    "a negative view": lambda x: (x, torch.complex(x, x).conj().imag),
}


class Marked(Tensor):
    """A class of the user's."""


@pytest.mark.parametrize("case", TAKES_THE_LONG_WAY)
def test_what_takes_the_long_way(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made("GroupNorm")
    x, residual = TAKES_THE_LONG_WAY[case](x)
    with counted(monkeypatch) as count:
        output, total = layer(x, residual=residual)
    assert count == [0]
    check(total, x + residual, VALUES)
    check(output, layer(x + residual), VALUES)


def test_inputs_in_another_order() -> None:
    layer, x = made("GroupNorm")
    assert_as_the_long_way(layer, _other_order(x), _other_order(torch.randn_like(x)))
    rows = nw.LayerNorm(16)
    x = torch.randn(2, 16, 5).transpose(1, 2)
    assert_as_the_long_way(rows, x, torch.randn(2, 16, 5).transpose(1, 2))


def test_a_memory_takes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made("BatchNorm")
    with counted(monkeypatch) as count:
        assert_as_the_long_way(layer, x, torch.randn_like(x))
    assert count == [0]


def test_another_shape_is_refused() -> None:
    layer, x = made("LayerNorm")
    with pytest.raises(nw.ShapeError, match=r"^the residual has shape \(1, 16\), the input \(8, 16\)$"):
        layer(x, residual=x[:1])


def test_second_derivatives() -> None:
    layer, x = made("LayerNorm")
    x, residual = x.double(), torch.randn_like(x).double()
    found = []
    for run in (layer, lambda x, residual: (layer(x + residual), x + residual)):
        torch.manual_seed(1)
        leaves = [tensor.float().requires_grad_() for tensor in (x, residual)]
        outputs = run(*leaves) if run is not layer else layer(leaves[0], residual=leaves[1])
        cotangents = [torch.randn_like(output) for output in outputs]
        first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
        found.append(torch.autograd.grad(first, leaves, [torch.randn_like(x) for x in first]))
    assert found[1][0].abs().max() > 1e-3
    for a, b in zip(*found, strict=True):
        check(a, b, VALUES)


def test_changed_in_place_afterwards() -> None:
    """The output is free to be changed; the sum, which the backward needs, refuses."""
    layer, x = made("LayerNorm")
    x.requires_grad_()
    output, total = layer(x, residual=torch.randn_like(x))
    nn.functional.relu_(output)
    output.sum().backward(retain_graph=True)
    total += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
