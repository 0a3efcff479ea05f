"""What the compiled kernels are given: any layout, any parameter, and what they must leave to torch's operators."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise import Affine, Norm, Standardize
from normwise.kernels import backends
from tests.compiled import needs_kernels, only_compiled
from tests.tolerances import GRADIENTS, KERNELS_GRADIENTS, VALUES, check

pytestmark = needs_kernels
Relay = Callable[[Tensor], Tensor]
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "KR": lambda: nw.LayerNorm((4, 10)),
    "RKR": lambda: nw.BatchNorm(6),
    "KRK": lambda: nw.LayerNorm2d(6),
    "RMS": lambda: nw.RMSNorm(10),
    "GroupNorm": lambda: nw.GroupNorm(2, 6),
}
SHAPE = (8, 6, 4, 10)
LAYOUTS: dict[str, Relay] = {  # with gaps, or repeated; as the dense copy of each lies
    "every second": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2],
    "second half": lambda x: torch.cat((torch.full_like(x, torch.nan), x))[x.shape[0] :],
    "halves": lambda x: torch.cat((torch.full_like(x, torch.nan), x), 1).chunk(2, 1)[1],
    "expanded": lambda x: x[:1].expand(x.shape),
    "gaps in the middle": lambda x: torch.cat((x, x * torch.nan), 2)[:, :, : x.shape[2]],
    "channels last with gaps": lambda x: _channels_last(torch.cat((x, x * torch.nan), 1))[:, : x.shape[1]],
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], dy)]


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@every_layer
def test_what_has_gaps_gives_the_bits_of_its_dense_copy(make: Relay, layout: str, dtype: torch.dtype) -> None:
    x, dy = (LAYOUTS[layout](torch.randn(SHAPE, dtype=dtype)) for _ in range(2))
    dense = torch.empty_like(x).copy_(x)
    before = [x.clone(), dy.clone()]
    with only_compiled():
        found = gradients(make(), x, dy)
        assert same(found, gradients(make(), dense, dy.contiguous()))
    assert same([x, dy], before)
    assert found[0].stride() == dense.stride()


@every_layer
def test_a_negated_view_counts_with_its_sign(make: Callable[[], nn.Module]) -> None:
    x, dy = torch.randn(2, *SHAPE)
    z = torch.complex(x, dy).conj().imag
    assert z.is_neg()
    expected = gradients(make(), -x, -dy)
    for negated, cotangent in ((torch._neg_view(x), torch._neg_view(dy)), (-x, torch._neg_view(dy))):
        for found, wants in zip(gradients(make(), negated, cotangent), expected, strict=True):
            check(found, wants, GRADIENTS)
    check(make()(z), make()(-dy), VALUES)


def test_negated_parameters_and_residuals() -> None:
    x, residual, weight, bias = torch.randn(4, 5, 64)
    weight, bias = weight[0], bias[0]
    layer = nw.LayerNorm(64)
    expected = torch.func.functional_call(layer, {"weight": -weight, "bias": -bias}, x, {"residual": -residual})
    negated = {"weight": torch._neg_view(weight), "bias": torch._neg_view(bias)}
    found = torch.func.functional_call(layer, negated, x, {"residual": torch._neg_view(residual)})
    for one, other in zip(found, expected, strict=True):
        check(one, other, VALUES)


@every_layer
def test_a_sums_gradient_is_an_expanded_one(make: Callable[[], nn.Module]) -> None:
    layer, x = make(), torch.randn(SHAPE, requires_grad=True)
    y = layer(x)
    wanted = [x, *layer.parameters()]
    found = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    assert same(list(found), list(torch.autograd.grad(y, wanted, torch.ones(SHAPE))))


@every_layer
def test_a_cotangent_in_another_layout(make: Callable[[], nn.Module]) -> None:
    x, dy = torch.randn(2, *SHAPE)
    for memory_x in (Tensor.contiguous, _channels_last):
        expected = gradients(make(), memory_x(x), torch.empty_like(memory_x(x)).copy_(dy))
        for memory_dy in (Tensor.contiguous, _channels_last, lambda t: t.mT.contiguous().mT):
            assert same(gradients(make(), memory_x(x), memory_dy(dy)), expected)


@every_layer
def test_second_derivatives_and_a_graph_of_the_first(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x, dy, ddx = torch.randn(3, *SHAPE)

    def twice(layer: nn.Module, x: Tensor, dy: Tensor, ddx: Tensor) -> list[Tensor]:
        x, dy = x.requires_grad_(), dy.requires_grad_()
        (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
        assert dx.requires_grad
        return [dx.detach(), *torch.autograd.grad(dx, [x, dy, *layer.parameters()], ddx, materialize_grads=True)]

    found = twice(layer, x, dy, ddx)
    expected = twice(make().double(), x.detach().double(), dy.detach().double(), ddx.double())
    for one, other in zip(found, expected, strict=True):
        check(one.double(), other, GRADIENTS)
    with only_compiled():
        check(found[0], gradients(make(), x.detach(), dy.detach())[1], KERNELS_GRADIENTS)


@pytest.mark.parametrize("size", [1, 9, 11, 1000])
def test_a_parameter_of_another_size_is_an_error(size: int) -> None:
    for layer in (nw.RMSNorm(10), nw.LayerNorm(10), Norm("[n] c", recovery=Affine("c"), c=10)):
        layer(torch.randn(4, 10))
        for name, _ in layer.named_parameters():
            with pytest.raises(RuntimeError, match=f"invalid for input of size {size}"):
                torch.func.functional_call(layer, {name: torch.randn(size)}, torch.randn(4, 10))


def test_parameters_without_numbers_are_an_error() -> None:
    layer = nw.LayerNorm(10)
    for name in ("weight", "bias"):
        with pytest.raises(RuntimeError, match="meta"):
            torch.func.functional_call(layer, {name: torch.empty(10, device="meta")}, torch.randn(4, 10))


def python(code: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, because what it does may end it."""
    setting = "import torch, normwise as nw; x = torch.randn(4, 10)\n"
    return subprocess.run(
        [sys.executable, "-c", setting + code], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_memory_without_numbers_is_an_error_and_no_crash() -> None:
    done = python("""
norm = nw.BatchNorm(10).eval()
norm.running_mean, norm.running_var = torch.empty(2, 10, device="meta")
norm(x)
""")
    assert done.returncode == 1
    assert "Tensor on device" in done.stderr
    assert "meta" in done.stderr


def test_a_mask_without_numbers_is_an_error() -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        Norm("n [c]")(torch.randn(4, 10), valid=torch.ones(4, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("shape", [(0, 10), (3, 0, 10)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    layer = nw.LayerNorm(10)
    y, *grads = gradients(layer, torch.randn(shape), torch.randn(shape))
    assert y.shape == shape
    assert not any(grad.any() for grad in grads)
    batch = nw.BatchNorm(4)
    assert batch(torch.randn(0, 4, 5)).shape == (0, 4, 5)
    assert batch.num_batches_tracked == 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@every_layer
def test_what_is_saved_may_come_back_in_another_layout(
    make: Callable[[], nn.Module], memory_format: torch.memory_format
) -> None:
    x = torch.randn(SHAPE).contiguous(memory_format=memory_format)
    dy = torch.randn(SHAPE)
    expected = gradients(make(), x, dy)

    def unpacked(saved: Tensor) -> Tensor:
        other = saved.detach().clone(memory_format=torch.contiguous_format)
        return (
            other.contiguous(memory_format=torch.channels_last) if saved.is_contiguous() and saved.dim() == 4 else other
        )

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpacked):
        leaf, layer = x.requires_grad_(), make()
        y = layer(leaf)
    for found, wants in zip(torch.autograd.grad(y, [leaf, *layer.parameters()], dy), expected[1:], strict=True):
        check(found, wants, KERNELS_GRADIENTS)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@every_layer
def test_checkpointing(make: Callable[[], nn.Module], reentrant: bool) -> None:
    layer, again = make(), make()
    x, dy = torch.randn(2, *SHAPE)
    expected = gradients(layer, x, dy)
    leaf = x.requires_grad_()
    with only_compiled():
        y = checkpoint(again, leaf, use_reentrant=reentrant)
        found = [y.detach(), *torch.autograd.grad(y, [leaf, *again.parameters()], dy)] if not reentrant else None
        if reentrant:
            y.backward(dy)
    found = [y.detach(), leaf.grad, *(p.grad for p in again.parameters())] if found is None else found
    assert same(found, expected)


def _traced(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.jit.trace(layer, x, check_trace=False)(x)


def _mapped(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(lambda example: layer(example[None])[0])(x)


def _in_forward_mode(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(layer, (x,), (x,))[0]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("follow", [_traced, _mapped, _in_forward_mode])
@every_layer
def test_whoever_follows_the_operators_finds_some(
    make: Callable[[], nn.Module], follow: Callable[[nn.Module, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = make().eval(), torch.randn(SHAPE)
    expected = layer(x)
    calls: list[str] = []

    def forward(*_: object) -> None:
        calls.append("forward")

    monkeypatch.setattr(backends.extension, "forward", forward)
    check(follow(layer, x), expected, VALUES)
    assert not calls
    layer(x)
    assert calls


@dataclass(frozen=True)
class Listed:
    """A recovery that cannot be a key of a dictionary."""

    parameters: ClassVar[dict[str, float]] = {"weight": 1.0}

    over: str
    notes: list[str]

    def recover(self, normalized: Tensor, *parameters: Tensor | float) -> Tensor:
        return normalized * parameters[0]

    def formula(self) -> str:
        return "weight * x"


def test_a_part_of_ones_own_need_not_be_hashable() -> None:
    x = torch.randn(4, 10)
    found = Norm("n [c]", recovery=Listed("c", ["mine"]))(x)
    check(found, Norm("n [c]")(x), VALUES)


class Doubled(Standardize):
    """A subclass is not what it was made of."""

    def normalize(self, view: Tensor, dims: tuple[int, ...], dtype: torch.dtype, valid: Tensor | None = None) -> Any:
        normalized = super().normalize(view, dims, dtype, valid)
        return normalized._replace(values=normalized.values * 2)


def test_a_subclass_of_a_known_part_is_not_taken_for_it() -> None:
    x = torch.randn(4, 10)
    check(Norm("n [c]", Doubled())(x), 2 * Norm("n [c]")(x), VALUES)
