"""`activation=`: the layer, then torch's function, in one pass, in every mode, dtype, mask and derivative."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jacfwd, jacrev, vmap

import normwise as nw
from normwise import RMS, Affine, Moving, Norm, NormwiseError, PatternError
from normwise.spec import NormSpec
from tests.activated import FUNCTIONS, KINDS, SHAPE, activations
from tests.catalogue import CASES, Case, randomize
from tests.tolerances import COMPILED, DOUBLE, GRADIENTS, VALUES, check


def twins(make: Callable[..., nn.Module], name: str, dtype: torch.dtype = torch.float64) -> tuple[Norm, Norm]:
    """A layer with an activation and one without, of the same numbers."""
    fused, plain = make(activation=name, dtype=dtype), make(dtype=dtype)
    assert isinstance(fused, Norm)
    assert isinstance(plain, Norm)
    randomize(fused)
    plain.load_state_dict(fused.state_dict(), strict=True)
    return fused, plain


def results(run: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of the input and the parameters for a random cotangent."""
    leaf = x.detach().requires_grad_()
    output = run(leaf)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x.dtype)
    return [output.detach(), *torch.autograd.grad(output, [leaf, *layer.parameters()], cotangent)]


def check_same(fused: Norm, plain: Norm, name: str, x: Tensor, **options: Any) -> list[Tensor]:
    """A fused layer is the plain one, then torch's function: output, gradients and memory."""
    ours = results(lambda x: fused(x, **options), fused, x)
    theirs = results(lambda x: FUNCTIONS[name](plain(x, **options)), plain, x)
    wide = x.dtype == torch.float64
    for at, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        check(a, b, DOUBLE if wide else GRADIENTS if at else VALUES)
    state, expected = fused.state_dict(), plain.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert float(ours[0].abs().max()) > 0.1
    assert all(float(gradient.abs().max()) > 1e-3 for gradient in ours[1:])
    return ours


# -------------------------------------------------------------------------------------------- the layer, then torch's


def modes(layer: Norm) -> tuple[bool, ...]:
    """In training and, where that is something else, in evaluation."""
    return (True,) if layer.spec.memory is None else (True, False)


@activations
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layer_then_torchs_function(case: Case, name: str) -> None:
    for dtype in (torch.float64, torch.float32):
        fused, plain = twins(case.ours, name, dtype)
        for training in modes(fused):
            check_same(fused.train(training), plain.train(training), name, torch.randn(case.shape, dtype=dtype) * 2 + 1)


@activations
@pytest.mark.parametrize("kind", KINDS)
def test_every_declaration_then_torchs_function(kind: str, name: str) -> None:
    fused, plain = twins(KINDS[kind], name)
    for training in modes(fused):
        check_same(fused.train(training), plain.train(training), name, torch.randn(SHAPE, dtype=torch.float64) + 1)


@activations
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_0_and_never_seen(kind: str, name: str) -> None:
    fused, plain = twins(KINDS[kind], name)
    valid = torch.rand(SHAPE) < 0.7
    x = torch.where(valid, torch.randn(SHAPE, dtype=torch.float64), torch.nan)
    for training in modes(fused):
        output, d_x, *_ = check_same(fused.train(training), plain.train(training), name, x, valid=valid)
        assert output[~valid].eq(0).all()
        assert d_x[~valid].eq(0).all()


@activations
def test_columns_too_short_take_the_memory_first(name: str) -> None:
    def make(**options: Any) -> Norm:
        memory = Moving("c", decay=0.5, degenerate="memory")
        return Norm("[n] c", recovery=Affine("c"), memory=memory, c=3, **options)

    fused, plain = twins(make, name)
    valid = torch.tensor([[True, True, False], [True, False, False], [True, False, False], [True, False, False]])
    output, *_ = check_same(fused, plain, name, torch.randn(4, 3, dtype=torch.float64), valid=valid)
    assert output[0, 1] != 0


@activations
def test_the_sum_with_a_residual_is_not_activated(name: str) -> None:
    fused, plain = twins(KINDS["LayerNorm"], name)
    x, r, d_y, d_s = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(4))
    leaves = [x.requires_grad_(), r.requires_grad_()]
    y, s = fused(x, residual=r)
    expected = FUNCTIONS[name](plain(x + r))
    assert torch.equal(s, x + r)
    check(y, expected, DOUBLE)
    ours = torch.autograd.grad([y, s], [*leaves, *fused.parameters()], [d_y, d_s])
    theirs = torch.autograd.grad([expected, x + r], [*leaves, *plain.parameters()], [d_y, d_s])
    for a, b in zip(ours, theirs, strict=True):
        check(a, b, DOUBLE)


@activations
def test_half_precision_is_rounded_once(name: str) -> None:
    fused, plain = twins(KINDS["LayerNorm"], name, torch.float32)
    x = torch.randn(64, 6, 5).bfloat16()
    exact = FUNCTIONS[name](copy.deepcopy(plain).double()(x.double())).detach()
    output = fused(x).detach()
    assert output.dtype == torch.bfloat16
    error = (output.double() - exact).abs()
    assert bool((error <= exact.abs() * 2**-8 + 2e-6).all())
    apart = (FUNCTIONS[name](plain(x)).detach().double() - exact).abs()
    if name != "relu":  # which loses nothing
        assert float((apart / exact.abs()).max()) > 1.2 * 2**-8


# ---------------------------------------------------------------------------------------------------------- derivatives


@activations
@pytest.mark.parametrize("kind", ["BatchNorm", "RMSNorm", "GroupNorm", "corrected"])
def test_first_and_second_derivatives_by_differences(kind: str, name: str) -> None:
    layer = twins(KINDS[kind], name)[0]
    if kind == "corrected":  # its limits depend on the memory, which stands still
        layer.train(False)
    names = [name for name, _ in layer.named_parameters()]
    inputs = [torch.randn(3, 6, 5, dtype=torch.float64), *(p.detach().clone() for p in layer.parameters())]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert gradcheck(run, leaves, fast_mode=True)
    assert gradgradcheck(run, leaves, fast_mode=True)


@activations
def test_third_derivatives(name: str) -> None:
    fused, plain = twins(KINDS["BatchNorm"], name)
    x = torch.randn(3, 6, 5, dtype=torch.float64)

    def third(run: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        found = run(leaf).square()
        for seed in range(3):
            weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            (found,) = torch.autograd.grad((found * weights).sum(), leaf, create_graph=True)
        return found.detach()

    expected = third(lambda x: FUNCTIONS[name](plain(x)))
    assert float(expected.abs().max()) > 0.1
    check(third(fused), expected, DOUBLE)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use
@activations
@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_transforms(transform: Callable[..., Any], name: str) -> None:
    fused, plain = twins(KINDS["GroupNorm"], name)
    x = torch.randn(1, 6, 3, dtype=torch.float64)
    expected = transform(transform(lambda x: FUNCTIONS[name](plain(x))))(x)
    assert float(expected.detach().abs().max()) > 0.1
    check(transform(transform(fused))(x), expected, DOUBLE)


@activations
def test_vmap(name: str) -> None:
    fused, plain = twins(KINDS["LayerNorm2d"], name)
    xs = torch.randn(3, *SHAPE, dtype=torch.float64)
    check(vmap(fused)(xs), torch.stack([FUNCTIONS[name](plain(x)) for x in xs]), DOUBLE)


def test_nothing_but_the_input_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    x = torch.randn(64, 6, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nw.BatchNorm(6, activation="gelu")(x)
    assert [t.data_ptr() for t in kept if t.numel() >= x.numel()] == [x.data_ptr()]


class Side(nn.Module):
    """Layers side by side on one input: one graph for all of them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
def test_compiled_in_one_graph() -> None:
    kinds = ("BatchNorm", "LayerNorm", "GroupNorm")
    made = [(name, *twins(KINDS[kind], name, torch.float32)) for name, kind in zip(FUNCTIONS, kinds, strict=True)]
    side = Side([fused for _, fused, _ in made])
    x = torch.randn(SHAPE)
    torch._dynamo.reset()
    ours = results(torch.compile(side, fullgraph=True, backend="aot_eager"), side, x)
    plains = nn.ModuleList([plain for _, _, plain in made])
    theirs = results(lambda x: torch.stack([FUNCTIONS[name](plain(x)) for name, _, plain in made]), plains, x)
    for a, b in zip(ours, theirs, strict=True):
        check(a, b, COMPILED)


@activations
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_traced(name: str) -> None:
    fused, plain = twins(KINDS["BatchNorm"], name)
    x, other = torch.randn(2, *SHAPE, dtype=torch.float64)
    expected = FUNCTIONS[name](plain.eval()(other))
    check(torch.jit.trace(fused.eval(), x)(other), expected, DOUBLE)
    check(torch.export.export(fused, (x,)).module()(other), expected, DOUBLE)


# ------------------------------------------------------------------------------------------------------ the declaration


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_state_is_the_same(case: Case) -> None:
    state, fused = case.twin().state_dict(), case.ours(activation="relu")
    fused.load_state_dict(state, strict=True)
    assert list(fused.state_dict()) == list(state)


@activations
def test_a_repr_makes_the_declaration_again(name: str) -> None:
    norm = Norm("[n] c", recovery=Affine("c"), memory=Moving("c", decay=0.9), activation=name, c=3)
    assert eval(repr(norm.spec), {**vars(nw), "NormSpec": NormSpec}) == norm.spec
    plain = Norm("[n] c", RMS(), Affine("c"), activation=name, c=3)
    assert eval(repr(plain), vars(nw)).spec == plain.spec
    assert norm.spec != Norm("[n] c", recovery=Affine("c"), memory=Moving("c", decay=0.9), c=3).spec


def test_reprs() -> None:
    assert repr(nw.LayerNorm(8)) == "LayerNorm((8,), eps=1e-05, elementwise_affine=True)"
    assert repr(nw.LayerNorm(8, activation="gelu")) == (
        "LayerNorm((8,), eps=1e-05, elementwise_affine=True, activation='gelu')"
    )
    assert repr(nw.BatchNorm(3, activation="relu")) == (
        "BatchNorm(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, activation='relu'; "
        "moving = 0.9 * moving + 0.1 * batch, unbiased variance)"
    )
    assert repr(NormSpec("[n] c", RMS())) == (
        "NormSpec(text='[n] c', normalizer=RMS(eps=None), recovery=None, memory=None, sizes=())"
    )
    assert repr(Norm("[n] c", RMS())) == "Norm('[n] c', RMS(eps=None))"


def test_writing_to_a_setting_keeps_it() -> None:
    layer = nw.BatchNorm(3, activation="silu")
    layer.eps, layer.momentum, layer.nonfinite = 0.5, None, "keep"
    assert layer.spec.activation == "silu"
    assert copy.deepcopy(layer).spec == layer.spec
    lazy = Norm("[n] c", recovery=Affine("c"), activation="relu")
    assert lazy(torch.randn(4, 3)).min() == 0
    assert (lazy.spec.sizes, lazy.spec.activation) == ((("c", 3),), "relu")


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nw.BatchNorm(3, activation="relu"), "3 recover    weight * x + bias, then relu; weight (3,), bias (3,)"),
        (Norm("... [d]", activation="gelu"), "3 recover    nothing, then gelu"),
    ],
    ids=["affine", "no recovery"],
)
def test_the_explanation(norm: Norm, expected: str) -> None:
    explained = norm.explain((4, 3))
    assert expected in str(explained).splitlines()
    assert explained.to_dict()["activation"] == norm.spec.activation


KNOWN = "activation is None or one of 'relu', 'silu', 'gelu', not "


@pytest.mark.parametrize("bad", ["tanh", "ReLU", "", nn.ReLU(), nn.ReLU, 1, False, ["relu"]], ids=repr)
def test_other_activations_are_refused(bad: Any) -> None:
    for make in (lambda: nw.RMSNorm(3, activation=bad), lambda: Norm("[n] c", activation=bad)):
        with pytest.raises(ValueError, match="activation is None or one of") as caught:
            make()
        assert str(caught.value) == f"{KNOWN}{bad!r}"


def test_no_axis_is_called_so() -> None:
    with pytest.raises(PatternError) as caught:
        Norm("[n] activation")
    assert str(caught.value) == (
        "an axis cannot be called 'activation': that is an option of Norm\n  [n] activation\n      ^"
    )


def test_it_stands_by_name_after_torchs_arguments() -> None:
    for make in (lambda: nw.LayerNorm(8, 1e-5, True, True, None, None, "relu"), lambda: nw.RMSNorm(*[8] * 6)):
        with pytest.raises(TypeError, match="positional arguments"):
            make()


@pytest.mark.parametrize("net", [nw.RNN, nw.LSTM, nw.GRU])
def test_recurrent_nets_have_activations_of_their_own(net: Callable[..., nn.Module]) -> None:
    with pytest.raises(NormwiseError) as caught:
        net(3, 5, norm=Norm("... [c]", recovery=Affine("c"), activation="relu"))
    assert str(caught.value) == "a cell applies functions of its own to what norm gives: leave out activation='relu'"
