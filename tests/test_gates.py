"""A gate: the layer's output times a function of another tensor, in value, in derivatives, and in every other way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

import normwise as nw
from normwise import Norm
from normwise.errors import NormwiseError
from normwise.pointwise import Gate
from tests.activated import KINDS, SHAPE
from tests.compiled import GATES
from tests.tolerances import COMPILED, GRADIENTS, LOW_PRECISION_FACTOR, VALUES, check

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "relu": torch.relu,
}
every_gate = pytest.mark.parametrize("name", GATES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def twins(kind: str, name: str, **options: Any) -> tuple[Norm, Norm]:
    """A layer with a gate, and one without; both with the same parameters and memory."""
    gated, plain = KINDS[kind](gate=name, **options), KINDS[kind](**options)
    x = torch.randn(SHAPE)
    gated(x, gate=x), plain(x)  # sizes are found
    with torch.no_grad():
        for parameter in gated.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    plain.load_state_dict(gated.state_dict())
    return gated, plain


@every_kind
@every_gate
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_value_and_gradients_are_those_of_the_layer_times_the_function(kind: str, name: str, training: bool) -> None:
    gated, plain = (layer.train(training) for layer in twins(kind, name))
    x, g, dy = torch.randn(3, *SHAPE)
    found, wants = [], []
    for into, layer in ((found, gated), (wants, plain)):
        leaves = [x.clone().requires_grad_(), g.clone().requires_grad_()]
        y = layer(leaves[0], gate=leaves[1]) if layer is gated else layer(leaves[0]) * FUNCTIONS[name](leaves[1])
        into += [y.detach(), *torch.autograd.grad(y, [*leaves, *layer.parameters()], dy)]
    check(found[0], wants[0], VALUES)
    for one, other in zip(found[1:], wants[1:], strict=True):
        check(one, other, GRADIENTS)
    assert all(torch.equal(a, b) for a, b in zip(gated.buffers(), plain.buffers(), strict=True))


@every_gate
@pytest.mark.parametrize("options", [{}, {"activation": "silu"}], ids=["alone", "behind an activation"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_derivatives_of_the_first_and_second_order(name: str, options: dict[str, Any], masked: bool) -> None:
    norm = Norm("n [c] t", recovery=nw.Affine("c"), gate=cast("Gate", name), c=4, **options).double()
    valid = torch.tensor([[True, True, False], [True, False, True]]) if masked else None
    x, g = (torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(x: Tensor, g: Tensor) -> Tensor:
        return cast("Tensor", norm(x, gate=g, valid=valid, valid_axes="n t" if masked else None))

    assert torch.autograd.gradcheck(run, (x, g), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, (x, g))


@every_gate
def test_in_low_precision_the_error_is_that_of_torch(name: str) -> None:
    layer = nw.LayerNorm(64, gate=cast("Gate", name))
    x, g, dy = torch.randn(3, 32, 64).bfloat16()

    def run(*given: Tensor, make: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in given[:2]]
        y = make(*leaves)
        return [y.detach().double(), *(d.double() for d in torch.autograd.grad(y, leaves, given[2]))]

    def by_torch(x: Tensor, g: Tensor) -> Tensor:
        return F.layer_norm(x, (64,), eps=1e-5) * FUNCTIONS[name](g)

    true = run(*(tensor.double() for tensor in (x, g, dy)), make=by_torch)
    ours = run(x, g, dy, make=lambda x, g: layer(x, gate=g))
    for found, torchs, wants in zip(ours, run(x, g, dy, make=by_torch), true, strict=True):
        assert (found - wants).abs().max() <= LOW_PRECISION_FACTOR * (torchs - wants).abs().max()


def test_of_the_output_and_the_gate_nothing_else_is_kept() -> None:
    layer = nw.RMSNorm(256, gate="silu", elementwise_affine=False)
    x, g = (torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(x, gate=g)
    sizes = sorted(tensor.numel() * tensor.element_size() for tensor in {t.data_ptr(): t for t in kept}.values())
    assert sizes[-3:] == [x.numel() * 2] * 3  # input, output before the gate, gate
    assert sum(sizes[:-3]) <= 64 * 32  # and a few numbers for each row


@every_gate
def test_padding_never_counts_and_its_gradients_are_0(name: str) -> None:
    norm = Norm("[n t] c", recovery=nw.Affine("c"), memory=nw.Moving("c", decay=0.9), gate=cast("Gate", name), c=5)
    valid = torch.rand(4, 6) < 0.6
    found = []
    for padding in (0.0, torch.nan, torch.inf):
        torch.manual_seed(1)
        x, g, dy = (torch.where(valid[..., None], torch.randn(4, 6, 5), padding).requires_grad_() for _ in range(3))
        layer = copy.deepcopy(norm)
        y = layer(x, gate=g, valid=valid)
        found.append([y, *torch.autograd.grad(y, [x, g, *layer.parameters()], dy), *layer.buffers()])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
    assert all(not tensor[~valid].any() for tensor in found[0][:3])


def test_with_a_residual_the_sum_has_no_gate() -> None:
    layer, plain = nw.RMSNorm(8, gate="sigmoid"), nw.RMSNorm(8)
    x, r, g = torch.randn(3, 5, 8)
    (y, s), (y_plain, s_plain) = layer(x, residual=r, gate=g), plain(x, residual=r)
    assert torch.equal(s, s_plain)
    check(y, y_plain * torch.sigmoid(g), VALUES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_the_gate_has_a_dtype_and_a_layout_of_its_own(dtype: torch.dtype) -> None:
    layer, plain = nw.BatchNorm(6, gate="silu"), nw.BatchNorm(6)
    x = torch.randn(4, 6, 5, 3).contiguous(memory_format=torch.channels_last)
    g = torch.randn(4, 6, 5, 3, dtype=dtype, requires_grad=True)
    y = layer(x, gate=g)
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    check(y, plain(x) * F.silu(g.detach().float()), VALUES)
    (d_gate,) = torch.autograd.grad(y.sum(), g)
    assert d_gate.dtype is dtype


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("kind", ["BatchNorm", "LayerNorm", "corrected", "pieces"])
def test_under_torch_compile_and_function_transforms(kind: str) -> None:
    layer, plain = twins(kind, "silu")
    x, g = torch.randn(2, *SHAPE)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    check(compiled(x, gate=g), copy.deepcopy(plain)(x) * F.silu(g), COMPILED)
    layer.eval(), plain.eval()
    tangents = torch.randn(2, *SHAPE)
    found = jvp(lambda x, g: layer(x, gate=g), (x, g), tuple(tangents))
    for one, wants in zip(found, jvp(lambda x, g: plain(x) * F.silu(g), (x, g), tuple(tangents)), strict=True):
        check(one, wants, GRADIENTS)
    mapped = vmap(lambda g: layer(x, gate=g))(torch.stack([g, -g]))
    check(mapped[1], plain(x) * F.silu(-g), VALUES)
    check(grad(lambda g: layer(x, gate=g).sum())(g), grad(lambda g: (plain(x) * F.silu(g)).sum())(g), GRADIENTS)
    with forward_ad.dual_level():
        dual = layer(x, gate=forward_ad.make_dual(g, tangents[1]))
        assert forward_ad.unpack_dual(dual).tangent is not None


@every_kind
def test_the_state_is_that_of_the_layer_without_it(kind: str) -> None:
    gated, plain = twins(kind, "gelu")
    assert list(gated.state_dict()) == list(plain.state_dict())
    x, g = torch.randn(2, *SHAPE)
    expected = copy.deepcopy(gated)(x, gate=g)
    again = pickle.loads(pickle.dumps(gated))
    assert torch.equal(again(x, gate=g), expected)
    assert eval(repr(gated.spec), {**vars(nw), "NormSpec": type(gated.spec)}) == gated.spec


def test_an_empty_batch() -> None:
    x = torch.empty(0, 6, 5, requires_grad=True)
    assert nw.LayerNorm(5, gate="silu")(x, gate=x).shape == x.shape


def test_where_it_is_seen() -> None:
    assert repr(nw.RMSNorm(8, gate="silu")) == ("RMSNorm((8,), eps=None, elementwise_affine=True, gate='silu')")
    assert repr(Norm("n [d]", activation="relu", gate="sigmoid")) == (
        "Norm('n [d]', Standardize(eps=1e-05), activation='relu', gate='sigmoid')"
    )
    explained = nw.RMSNorm(8, activation="gelu", gate="silu").explain((4, 8))
    lines = str(explained).splitlines()
    assert lines[4] == "3 recover    weight * x, then gelu, times silu of a gate; weight (8,)"
    assert (
        lines[-1]
        == "traffic      at least 384 bytes: the input and a gate of its dtype read once, the output written once"
    )
    assert (explained.gate, explained.bytes_moved) == ("silu", 3 * 4 * 8 * 4)
    if explained.kernel == "cpu":
        assert explained.reason.endswith("; times the gate by torch's operations")


MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "unknown": (
        lambda: nw.RMSNorm(8, gate=cast("Gate", "tanh")),
        ValueError,
        "gate is None or one of 'relu', 'silu', 'gelu', 'sigmoid', not 'tanh'",
    ),
    "not declared": (
        lambda: nw.RMSNorm(8)(torch.ones(2, 8), gate=torch.ones(2, 8)),
        nw.GateError,
        "this call brings a gate, and the layer declares none: make it with gate='silu'",
    ),
    "missing": (
        lambda: nw.RMSNorm(8, gate="silu")(torch.ones(2, 8)),
        nw.GateError,
        "the layer declares gate='silu', and this call brings none: norm(x, gate=g)",
    ),
    "no tensor": (
        lambda: nw.RMSNorm(8, gate="silu")(torch.ones(2, 8), gate=cast("Tensor", 1.0)),
        nw.GateError,
        "the gate is float, not a tensor of floating point",
    ),
    "integers": (
        lambda: nw.RMSNorm(8, gate="silu")(torch.ones(2, 8), gate=torch.ones(2, 8, dtype=torch.int64)),
        nw.GateError,
        "the gate is torch.int64, not a tensor of floating point",
    ),
    "layout": (
        lambda: nw.RMSNorm(8, gate="silu")(torch.ones(2, 8), gate=torch.ones(2, 8).to_sparse()),
        nw.GateError,
        "the gate has layout torch.sparse_coo, not torch.strided",
    ),
    "shape": (
        lambda: nw.RMSNorm(8, gate="silu")(torch.ones(2, 8), gate=torch.ones(8)),
        nw.ShapeError,
        "the gate has shape (8,), the input (2, 8)",
    ),
    "device": (
        lambda: nw.RMSNorm(8, gate="silu")(torch.ones(2, 8), gate=torch.ones(2, 8, device="meta")),
        nw.ShapeError,
        "the gate is on meta, the input on cpu",
    ),
    "recurrent": (
        lambda: nw.LSTM(3, 4, norm=Norm("... [c]", gate="silu")),
        NormwiseError,
        "a cell applies functions of its own to what norm gives: leave out gate='silu'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_refused(mistake: str) -> None:
    make, error, message = MISTAKES[mistake]
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == message


def test_an_error_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nw.RMSNorm(8, gate="silu"))
    with pytest.raises(nw.GateError, match=r"^1: the layer declares gate='silu', and this call brings none"):
        model(torch.ones(2, 8))
