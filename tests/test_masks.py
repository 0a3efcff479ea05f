"""Masks and lengths: what is valid counts, what is padded changes no bit of anything."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import normwise as nw
from normwise import RMS, Affine, Average, Moving, Norm, Renorm
from normwise.recoveries import Recovery
from tests.catalogue import CASES, FAMILIES, Case, Family
from tests.hard_inputs import CONSTANTS, LEVELS, MAGNITUDES
from tests.masked_columns import GRID, KINDS, MEMORIES, RECOVERIES, Kind, Loop
from tests.tolerances import COMPILED, DOUBLE, EXACT, GRADIENTS, LOW_PRECISION_FACTOR, MEMORY, VALUES, Tolerance, check

PADDINGS = (0.0, -1e9, torch.inf, -torch.inf, torch.nan)


def _assert_agrees(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    """As float32 and float64 are held to; below, to twice the error of rounding what is expected."""
    if actual.dtype.itemsize >= 4:
        check(actual.double(), expected, DOUBLE if actual.dtype is torch.float64 else tolerance)
        return
    rounding = (expected.to(actual.dtype).double() - expected).abs()
    allowed = LOW_PRECISION_FACTOR * rounding + tolerance.absolute + tolerance.relative * expected.abs()
    assert bool(((actual.double() - expected).abs() <= allowed).all())


def _input(kind: Kind, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(kind.shape) * 2 + 1).to(dtype)


def _few(kind: Kind) -> list[Tensor]:
    """Masks without a valid element, and with one."""
    one = torch.zeros(kind.sizes_of(kind.valid_axes), dtype=torch.bool)
    one[(0,) * one.dim()] = True
    return [torch.zeros_like(one), one]


def _step(kind: Kind, layer: Norm, loop: Loop, mask: Tensor, dtype: torch.dtype, *, training: bool) -> None:
    """One batch through the layer and the loop: outputs and gradients agree."""
    x = _input(kind, dtype).requires_grad_()
    leaves = [leaf.detach().double().requires_grad_() for leaf in (x, *layer.parameters())]
    valid = kind.whole(mask)
    values = loop(leaves[0].reshape(valid.shape), valid, training=training)
    if len(leaves) > 1:
        values = values * kind.spread(leaves[1], kind.over)
    if len(leaves) > 2:
        values = values + kind.spread(leaves[2], kind.over)
    expected = torch.where(valid, values, 0.0).reshape(kind.shape)
    y = layer(x, **kind.options(mask))
    assert y.dtype is dtype
    _assert_agrees(y.detach(), expected.detach(), VALUES)
    cotangent = torch.randn(kind.shape).to(dtype)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent.double(), materialize_grads=True)
    for grad, wants in zip(grads, wanted, strict=True):
        _assert_agrees(grad, wants, GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["f32", "bf16", "f64"])
@pytest.mark.parametrize(("kind", "memory"), GRID, ids=[f"{kind}, {name}" for kind, name in GRID])
def test_valid_elements_count_and_no_others(kind: Kind, memory: str, dtype: torch.dtype) -> None:
    for recovery, training in itertools.product(RECOVERIES, (True, False)):
        wide = torch.promote_types(dtype, torch.float32)
        layer = kind.layer(recovery, MEMORIES[memory](kind.remembers), wide).train(training)
        loop = Loop(kind, layer)
        for mask in [kind.mask()] if memory == "beyond" else [kind.mask(), kind.mask(), *_few(kind)]:
            _step(kind, layer, loop, mask, dtype, training=training)
        if memory not in ("none", "frozen", "beyond"):
            assert int(layer.num_batches_tracked) == loop.batches
        if memory != "none":
            for name, wants in zip(reversed(kind.normalizer.remembers), (loop.power, loop.mean), strict=False):
                _assert_agrees(getattr(layer, f"running_{name}"), wants, MEMORY)


def _everything(layer: Norm, x: Tensor, cotangent: Tensor, **options: object) -> list[Tensor]:
    """Output, gradients and buffers of a copy of a layer."""
    layer = copy.deepcopy(layer)
    x = x.detach().requires_grad_()
    y = layer(x, **options)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], cotangent)
    return [y.detach(), *grads, *layer.buffers()]


def _assert_same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("kind", "memory"), GRID, ids=[f"{kind}, {name}" for kind, name in GRID])
def test_padding_changes_no_bit_of_anything(kind: Kind, memory: str, dtype: torch.dtype) -> None:
    recovery: type[Recovery] | None
    for recovery, training in ((None, True), (Affine, True), (Affine, False)):
        layer = kind.layer(recovery, MEMORIES[memory](kind.remembers), torch.float32).train(training)
        mask, x, cotangent = kind.mask(), _input(kind, dtype), torch.randn(kind.shape).to(dtype)
        valid = kind.whole(mask).reshape(kind.shape)
        y, d_x, *rest = _everything(layer, x, cotangent, **kind.options(mask))
        assert not y[~valid].any()
        assert not d_x[~valid].any()
        assert y[valid].any()
        assert d_x[valid].any()
        for padding in PADDINGS:  # in the input, and in the gradient that comes in
            padded, padded_cotangent = (torch.where(valid, tensor, padding) for tensor in (x, cotangent))
            _assert_same_bits(_everything(layer, padded, padded_cotangent, **kind.options(mask)), [y, d_x, *rest])


COUNTED_ALIKE = [case for case in CASES if "average" not in case.name]  # an average takes no mask along c


@pytest.mark.parametrize("case", COUNTED_ALIKE, ids=str)
def test_named_layers_do_not_see_padding(case: Case) -> None:
    layer, _ = case.pair()
    x, cotangent, valid = torch.randn(case.shape), torch.randn(case.shape), torch.rand(case.shape) < 0.7
    clean = _everything(layer, x, cotangent, valid=valid)
    assert clean[0][valid].any()
    assert not clean[0][~valid].any()
    nan, huge = (torch.where(valid, x, padding) for padding in (torch.nan, 3e38))
    _assert_same_bits(_everything(layer, nan, torch.where(valid, cotangent, torch.nan), valid=valid), clean)
    _assert_same_bits(_everything(layer, huge, cotangent, valid=valid), clean)
    check(layer(x, valid=torch.ones_like(valid)), layer(x), VALUES)


@pytest.mark.parametrize("padding", [0.0, 1e9, torch.nan])
def test_five_numbers_and_five_paddings(padding: float) -> None:
    x = torch.tensor([[1.0, 2, 3, 4, 5, *[padding] * 5], [padding] * 10])
    valid = torch.tensor([[True] * 5 + [False] * 5, [False] * 10])
    norm = Norm("c [n]", memory=Moving("c", update_rate=1.0, unbiased=False))
    expected = torch.zeros(2, 10)
    expected[0, :5] = torch.tensor([-2.0, -1, 0, 1, 2]) / (2 + 1e-5) ** 0.5
    check(norm(x, valid=valid), expected, EXACT)
    assert norm.running_mean.tolist() == [3.0, 0.0]  # the second has entered nothing: it is as it started
    assert norm.running_var.tolist() == [2.0, 1.0]
    assert nw.LayerNorm(10)(x, valid=valid)[1].eq(0).all()


@pytest.mark.parametrize(
    "memory", [None, Moving("c", decay=0.5), Average("c"), Moving("c", decay=0.5, ghost=2)], ids=repr
)
def test_one_valid_element_gives_the_bias_and_does_not_enter(memory: object) -> None:
    norm = Norm("[n] c", recovery=Affine("c"), memory=memory, c=3)  # type: ignore[arg-type]
    torch.nn.init.uniform_(norm.bias)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x, valid = torch.randn(4, 3, requires_grad=True), torch.arange(4).eq(2)
    y = norm(x, valid=valid)
    assert torch.equal(y[2], norm.bias)
    d_x, d_bias = torch.autograd.grad(y, [x, norm.bias], torch.full((4, 3), 7.0))
    assert not d_x.any()
    assert d_bias.tolist() == [7.0] * 3
    _assert_same_bits(list(norm.state_dict().values()), list(before.values()))


def test_one_valid_element_of_a_corrected_memory_that_stands_in() -> None:
    x, valid = torch.randn(4, 3), torch.arange(4).eq(2)
    memory = Moving("c", decay=0.5, degenerate="memory", renorm=Renorm(warmup=100))
    norm = Norm("[n] c", memory=memory, c=3)
    norm(torch.randn(8, 3) * 2 + 1)
    y = norm(x, valid=valid)
    check(y[2], norm.eval()(x)[2], EXACT)


HARD = {**LEVELS, **MAGNITUDES}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_hard_columns_under_a_mask(family: Family, name: str) -> None:
    matrix = HARD[name]()
    valid = torch.rand(matrix.shape) < 0.6
    valid[0], valid[1:3] = False, True  # what a column is shifted by cannot be its first element
    layer = family.layer(*matrix.shape)
    y = family.matrix(layer(family.fill(torch.where(valid, matrix, torch.nan)), valid=family.fill(valid)))
    for column in range(matrix.shape[1]):
        chosen = valid[:, column]
        check(y[chosen, column].double(), family.formula(matrix[chosen, column : column + 1])[:, 0], EXACT)
    assert not y[~valid].any()


@pytest.mark.parametrize("constant", CONSTANTS)
def test_constant_columns_under_a_mask_give_zero(constant: float) -> None:
    valid = torch.rand(64, 6) < 0.5
    for family in FAMILIES:
        x = torch.where(valid, torch.full((64, 6), constant), torch.inf)
        y = family.matrix(family.layer(64, 6)(family.fill(x), valid=family.fill(valid)))
        if family.centers:
            assert torch.equal(y, torch.zeros(64, 6))
        else:
            assert y.isfinite().all()


SHAPES = st.tuples(st.integers(2, 9), st.integers(1, 5), st.integers(1, 6))


@given(kind=st.sampled_from(["[n] t c", "[n t] c", "n [t] c", "n t [c]", "n [t c]"]), shape=SHAPES, data=st.data())
def test_any_mask_at_all(kind: str, shape: tuple[int, int, int], data: st.DataObject) -> None:
    axes = dict(zip("ntc", shape, strict=True))
    covered = data.draw(st.sampled_from(["n", "n t", "t", "c", "t c", "n t c", "n c"]))
    numbers = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(numbers)
    chance, scale = data.draw(st.sampled_from([0.0, 0.2, 0.7, 1.0])), data.draw(st.sampled_from([1e-12, 1.0, 1e30]))
    reduced = " ".join(part for part in "ntc" if part in kind[kind.index("[") : kind.index("]")])
    declared = Kind(kind, axes, reduced, covered)
    mask = torch.rand(declared.sizes_of(covered), generator=generator) < chance
    x = torch.randn(shape, generator=generator) * scale
    valid = declared.whole(mask)
    norm = Norm(kind)
    if all(axes[name] == 1 for name in reduced.split()):
        return
    expected = Loop(declared, norm)(x.double(), valid, training=True)
    y = norm(torch.where(valid, x, torch.nan), **declared.options(mask))
    check(y.double(), torch.where(valid, expected, 0.0), EXACT)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_mask_that_is_all_true_is_no_mask(kind: Kind) -> None:
    x = torch.randn(kind.shape) + 1000
    mask = torch.ones(kind.sizes_of(kind.valid_axes), dtype=torch.bool)
    layer = Norm(kind.text, kind.normalizer, sizes=dict(kind.sizes))
    valid = kind.whole(mask)
    expected = Loop(kind, layer)(x.double().reshape(valid.shape), valid, training=True).reshape(kind.shape)
    for y in (layer(x), layer(x, **kind.options(mask))):
        check(y.double(), expected, EXACT)


def test_an_empty_batch_under_a_mask() -> None:
    norm = Norm("[n] t c", memory=Moving("c", decay=0.5), c=3)
    assert norm(torch.randn(0, 4, 3), valid=torch.ones(0, 4, dtype=torch.bool)).shape == (0, 4, 3)
    assert norm(torch.randn(0, 4, 3), lengths={"t": torch.zeros(0, dtype=torch.long)}).shape == (0, 4, 3)
    assert norm.num_batches_tracked == 0


MASKED: dict[str, Callable[[], Norm]] = {
    "batch": lambda: Norm("[n t] c", recovery=Affine("c"), memory=Moving("c", decay=0.9), c=3),
    "steps": lambda: Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9), t=4, c=3),
    "layer": lambda: Norm("n t [c]", RMS(1e-3), recovery=Affine("c"), c=3),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
def test_compiled_in_one_graph() -> None:
    layers = torch.nn.ModuleList(make() for make in MASKED.values())
    layers.append(Norm("[n] t c", memory=Moving("t c", decay=0.9, degenerate="memory")))
    x, lengths = torch.randn(6, 4, 3) * 2 + 1, torch.tensor([4, 2, 3, 0, 1, 1])
    with nw.no_update(layers):
        for layer in layers:
            layer(x)
    traced = copy.deepcopy(layers)

    def all_of(model: torch.nn.ModuleList, x: Tensor, lengths: Tensor) -> Tensor:
        return torch.stack([layer(x, lengths={"t": lengths}) for layer in model])

    compiled = torch.compile(all_of, fullgraph=True)
    padded = torch.where((torch.arange(4) < lengths.unsqueeze(1)).unsqueeze(2), x, torch.nan)
    leaves, cotangent = [padded.clone().requires_grad_() for _ in range(2)], torch.randn(4, 6, 4, 3)
    y, y_compiled = all_of(layers, leaves[0], lengths), compiled(traced, leaves[1], lengths)
    check(y_compiled.detach(), y.detach(), COMPILED)
    grads = torch.autograd.grad(y, [leaves[0], *layers.parameters()], cotangent)
    for grad, wants in zip(
        torch.autograd.grad(y_compiled, [leaves[1], *traced.parameters()], cotangent), grads, strict=True
    ):
        check(grad, wants, COMPILED)
    for name, value in layers.state_dict().items():
        check(traced.state_dict()[name], value, COMPILED)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, at its first forward-mode derivative
@pytest.mark.parametrize("make", MASKED.values(), ids=MASKED)
def test_function_transforms_under_a_mask(make: Callable[[], Norm]) -> None:
    norm, looped = make(), make()
    x, valid = torch.randn(5, 6, 4, 3), torch.rand(5, 6, 4) < 0.7
    y = torch.vmap(lambda x, valid: norm(x, valid=valid))(x, valid)
    check(y, torch.stack([looped(*pair[:1], valid=pair[1]) for pair in zip(x, valid, strict=True)]), VALUES)
    for name, value in looped.state_dict().items():
        check(norm.state_dict()[name], value, MEMORY)
    double, tangent = make().double(), torch.randn(6, 4, 3, dtype=torch.double)

    def call(x: Tensor) -> Tensor:
        return double(torch.where(valid[0].unsqueeze(2), x, torch.nan), valid=valid[0])

    x64 = x[0].double()
    _, moved = torch.func.jvp(call, (x64,), (tangent,))
    jacobian = torch.func.jacrev(call)(x64)
    check(moved, (jacobian * tangent).sum((3, 4, 5)), DOUBLE)
    reverse = torch.autograd.functional.jacobian(call, x64)
    check(jacobian, reverse, DOUBLE)
    assert not moved[~valid[0]].any()
    assert moved[valid[0]].any()
