"""In which order an output lies in memory: in the input's, but rows that a permuted view scatters come out as rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise import Affine, Norm, Scale, functional
from normwise.kernels import run as running
from tests.memory_order import output_strides
from tests.short_calls import counted, needs_kernels
from tests.tolerances import COMPILED, DOUBLE, GRADIENTS, VALUES, check

WIDTH = 12
SCATTERED: dict[str, Callable[[], Tensor]] = {
    "images": lambda: torch.randn(3, WIDTH, 5, 4).permute(0, 2, 3, 1),
    "volumes": lambda: torch.randn(2, WIDTH, 3, 4, 2).movedim(1, -1),
    "sequences": lambda: torch.randn(3, WIDTH, 7).mT,
    "a matrix": lambda: torch.randn(WIDTH, 9).T,
    "with gaps": lambda: torch.randn(3, WIDTH, 7, 2)[..., 0].mT,
    "part of the channels": lambda: torch.randn(3, 2 * WIDTH, 7)[:, WIDTH:].mT,
    "more columns than a short call takes": lambda: torch.randn(2, WIDTH, 40, 30).permute(0, 2, 3, 1),
}
ROWS: dict[str, Callable[[], Tensor]] = {
    "transposed batch": lambda: torch.randn(7, 3, WIDTH).transpose(0, 1),
    "heads": lambda: torch.randn(3, 7, 2, WIDTH).transpose(1, 2),
    "channels_last images": lambda: (
        torch.randn(3, WIDTH, 5, 4).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    ),
    "transposed, with gaps": lambda: torch.randn(7, 3, WIDTH + 1)[..., 1:].transpose(0, 1),
    "one row, repeated": lambda: torch.randn(WIDTH).expand(3, 7, WIDTH),
}
LAYERS: dict[str, Callable[[], Norm]] = {
    "LayerNorm": lambda: nw.LayerNorm(WIDTH),
    "RMSNorm": lambda: nw.RMSNorm(WIDTH),
    "L2": lambda: Norm("... [d]", nw.L2(), Scale("d"), d=WIDTH),
    "gelu": lambda: nw.LayerNorm(WIDTH, activation="gelu"),
    "heads in a row": lambda: Norm("... (h [d])", recovery=Affine("(h d)"), h=3, d=4),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
with_kernels = pytest.mark.parametrize("_backend", ["kernels"], indirect=True)  # where the other would show no more
scattered = pytest.mark.parametrize("given", SCATTERED.values(), ids=SCATTERED)


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever computes, the order is the same."""
    if request.param == "reference":
        monkeypatch.setattr(running, "kernel_for", lambda *_: None)


def drawn(make: Callable[[], Norm]) -> Norm:
    """A layer whose parameters are no ones and zeros."""
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0)
    return layer


def outcome(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The output and the gradients of input and parameters."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], dy)]


@scattered
@every_layer
def test_scattered_rows_come_out_as_rows(make: Callable[[], Norm], given: Callable[[], Tensor]) -> None:
    layer, x = drawn(make), given()
    before, dy = x.clone(), torch.randn(x.shape)
    for _ in range(2):  # the second call may take the short way
        y, dx, *_ = outcome(layer, x, dy)
        assert y.is_contiguous()
        assert dx.is_contiguous()
        with torch.no_grad():
            assert layer(x).is_contiguous()
    assert torch.equal(x, before)


@scattered
@every_layer
def test_they_have_the_numbers_of_their_contiguous_copy(make: Callable[[], Norm], given: Callable[[], Tensor]) -> None:
    layer, x = drawn(make), given()
    dy = torch.randn(x.shape)
    found = outcome(layer, x, dy)
    for one, other in zip(found, outcome(layer, x.contiguous(), dy), strict=True):
        assert torch.equal(one, other)
    double = drawn(make).double()
    double.load_state_dict(layer.state_dict())
    if isinstance(layer, nn.RMSNorm):
        double.eps = torch.finfo(torch.float32).eps  # the default is that of the input's dtype
    for one, true in zip(found, outcome(double, x.double(), dy.double()), strict=True):
        check(one, true.float(), GRADIENTS)


@scattered
def test_torch_says_the_same(given: Callable[[], Tensor]) -> None:
    layer, twin, x = drawn(LAYERS["LayerNorm"]), nn.LayerNorm(WIDTH), given()
    twin.load_state_dict(layer.state_dict())
    dy = torch.randn(x.shape)
    for one, other in zip(outcome(layer, x, dy), outcome(twin, x, dy), strict=True):
        check(one, other, GRADIENTS)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("given", ROWS.values(), ids=ROWS)
@every_layer
def test_rows_that_lie_together_keep_their_order(make: Callable[[], Norm], given: Callable[[], Tensor]) -> None:
    x = given()
    expected = torch.empty_like(x).stride()
    assert drawn(make)(x).stride() == expected


def _channels_last(*shape: int) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return torch.randn(shape).contiguous(memory_format=formats[len(shape)])


@pytest.mark.parametrize(
    ("norm", "x"),
    [
        (nw.InstanceNorm(6), _channels_last(2, 6, 4, 5)),
        (nw.InstanceNorm(6), _channels_last(2, 6, 4, 5, 3)),
        (nw.InstanceNorm(6), torch.randn(2, 7, 6).mT),
        (nw.GroupNorm(2, 6), _channels_last(2, 6, 4, 5)),
        (nw.GroupNorm(2, 6), torch.randn(2, 7, 6).mT),
        (nw.LayerNorm2d(6), _channels_last(2, 6, 4, 5)),
        (nw.LayerNorm((6, 4, 5)), _channels_last(2, 6, 4, 5)),
        (nw.LayerNorm((4, 5)), _channels_last(2, 6, 4, 5)),
        (Norm("n c [h w]", recovery=Affine("c"), c=6), _channels_last(2, 6, 4, 5)),
        (Norm("n c [h w]", recovery=Affine("c"), c=6), _channels_last(2, 12, 4, 5)[:, :6]),
        (Norm("n (g [k]) [h w]", g=2), _channels_last(2, 6, 4, 5)),
        (nw.BatchNorm(6), torch.randn(6, 8).T),
        (nw.LayerNorm(1), torch.randn(7, 3, 1).transpose(0, 1)),
    ],
)
def test_positions_and_channels_last_keep_their_order(norm: Norm, x: Tensor) -> None:
    y = norm(x)
    assert not y.is_contiguous()  # or it would show nothing
    assert y.stride() == torch.empty_like(x).stride() == output_strides(norm, x)


def test_images_of_a_norm_over_channels_first_are_contiguous_again() -> None:
    x = torch.randn(2, 6, 4, 5)
    assert nw.LayerNorm2d(6)(x).is_contiguous()
    assert nw.LayerNorm(6)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)


@scattered
@every_layer
def test_the_sum_lies_as_the_output(make: Callable[[], Norm], given: Callable[[], Tensor]) -> None:
    layer, x = drawn(make), given()
    for residual in (torch.randn(x.shape), torch.empty_like(x).normal_(), torch.randn(x.shape).bfloat16()):
        leaf, other = x.detach().requires_grad_(), residual.detach().requires_grad_()
        y, total = layer(leaf, residual=other)
        assert y.is_contiguous()
        assert total.is_contiguous()
        check(total.detach(), x + residual, VALUES)
        check(y.detach(), layer(x.contiguous() + residual).detach(), VALUES)
        cotangents = torch.randn(x.shape), torch.randn(x.shape)
        dx, d_other = torch.autograd.grad((y, total), (leaf, other), cotangents)
        assert dx.is_contiguous()
        (expected,) = torch.autograd.grad(layer(total), total, cotangents[0])
        check(dx, expected + cotangents[1], GRADIENTS)
        assert torch.equal(d_other, dx.to(residual.dtype))


@every_layer
def test_padding_does_not_count(make: Callable[[], Norm]) -> None:
    layer, x = drawn(make), SCATTERED["sequences"]()
    valid = torch.rand(3, 7) < 0.6
    padded = torch.where(valid[..., None].mT, x.mT, torch.nan).mT
    y = layer(padded, valid=valid)
    assert y.is_contiguous()
    assert (y[~valid] == 0).all()
    check(y[valid], layer(x)[valid], VALUES)


@every_layer
def test_derivatives_of_the_second_order(make: Callable[[], Norm]) -> None:
    layer, x = drawn(make).double(), torch.randn(1, WIDTH, 2, dtype=torch.float64).mT
    assert torch.autograd.gradgradcheck(layer, x.requires_grad_())
    single = drawn(make)
    single.load_state_dict(layer.state_dict())
    if isinstance(layer, nn.RMSNorm):
        layer.eps = torch.finfo(torch.float32).eps
    found, true = (_second(each, x.detach().to(next(each.parameters()).dtype)) for each in (single, layer))
    check(found, true.float(), GRADIENTS)


def _second(layer: Norm, x: Tensor) -> Tensor:
    """A gradient of a gradient."""
    leaf, (dy, other) = x.requires_grad_(), torch.linspace(-1, 1, 2 * x.numel()).to(x).view(2, *x.shape).cos()
    (dx,) = torch.autograd.grad(layer(leaf), leaf, dy, create_graph=True)
    return torch.autograd.grad((dx * other).sum(), leaf)[0]


@scattered
def test_functions(given: Callable[[], Tensor]) -> None:
    x, weight = given(), torch.randn(WIDTH)
    for found, expected in (
        (functional.layer_norm(x, (WIDTH,), weight), F.layer_norm(x, (WIDTH,), weight)),
        (functional.rms_norm(x, (WIDTH,), weight), F.rms_norm(x, (WIDTH,), weight)),
    ):
        assert found.is_contiguous()
        check(found, expected, VALUES)


@with_kernels
@pytest.mark.parametrize(("name", "dynamic"), [("images", False), ("sequences", False), ("sequences", True)])
def test_compiled_layers(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    layer, x = drawn(LAYERS["LayerNorm"]), SCATTERED[name]()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    dy = torch.randn(x.shape)
    found = outcome(compiled, x, dy)
    assert found[0].is_contiguous()
    for one, other in zip(found, outcome(layer, x, dy), strict=True):
        check(one, other, COMPILED)
    for one in compiled(x, residual=torch.randn(x.shape)):
        assert one.is_contiguous()


@with_kernels
def test_compiled_layers_keep_the_order_of_rows() -> None:
    torch._dynamo.reset()
    layer = drawn(LAYERS["LayerNorm"])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = ROWS["transposed batch"]()
    assert compiled(x).stride() == x.stride()


def test_mapped_layers() -> None:
    layer, x = drawn(LAYERS["LayerNorm"]), SCATTERED["images"]()
    check(torch.vmap(layer)(x), layer(x), VALUES)
    check(torch.vmap(layer, in_dims=1, out_dims=1)(x), layer(x), VALUES)


def test_float64_is_as_exact_as_ever() -> None:
    x = SCATTERED["images"]().double()
    check(nw.LayerNorm(WIDTH)(x), F.layer_norm(x, (WIDTH,)), DOUBLE)


@needs_kernels
@with_kernels
def test_small_calls_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = drawn(LAYERS["LayerNorm"]), SCATTERED["images"]()
    with counted(monkeypatch) as count:
        for step in range(3):
            assert torch.equal(layer(x + step), layer((x + step).contiguous()))
    assert count == [6]


def test_the_order_of_the_declaration_decides_and_not_the_number_of_columns() -> None:
    for images in (1, 2, 300):
        assert nw.LayerNorm(WIDTH)(torch.randn(images, WIDTH, 5, 4).permute(0, 2, 3, 1)).is_contiguous()
