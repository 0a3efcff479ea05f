"""What the kernels in Triton are given: masks, residuals, remembered statistics, any layout, and who wants a gradient.

Every access is watched, and fresh memory is full of NaN: see interpreted.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import L2, RMS, Affine, Norm, OffsetScale, Scale, Standardize
from normwise.kernels.launch import LIMITS, Limits
from normwise.pattern import parse
from normwise.pointwise import Activation
from tests.catalogue import REMEMBERING, Case, randomize
from tests.compiled import DTYPES, GATES, Call, check_call, compiled, numbers, plain
from tests.interpreted import DIVIDED, WAYS, every_way, interpreted, needs_interpreter
from tests.test_cpu_inputs import LAYERS, LAYOUTS, SHAPE, gradients, same
from tests.tolerances import GRADIENTS, MEMORY, SUMMED, VALUES, check

pytestmark = [needs_interpreter, pytest.mark.no_cover]  # the interpreter takes twice as long when it is watched
PATTERNS = (
    ("n [d]", {"n": 4, "d": 35}, "d"),
    ("[n] c [l]", {"n": 4, "c": 3, "l": 11}, "c"),
    ("n [c] l", {"n": 2, "c": 34, "l": 3}, "c"),
    ("n [h] g [k]", {"n": 2, "h": 9, "g": 2, "k": 4}, "g k"),
)
CALLS = tuple(plain(text, sizes, over, torch.float32) for text, sizes, over in PATTERNS)
every_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.word.text)
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
Make = Callable[[], nn.Module]


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Every set of them."""
    return [chosen for size in range(len(names) + 1) for chosen in itertools.combinations(names, size)]


@every_way
@every_call
def test_masks_over_any_axes(call: Call, limits: Limits) -> None:
    every = subsets(parse(call.word.text).names)
    with interpreted(limits):
        for place, names in enumerate(every if limits is LIMITS else every[1 :: len(every) // 2]):
            check_call(replace(call, masked=names, residual=place % 2 == 1, dtype=DTYPES[place % 3], seed=place))


@every_way
@every_call
def test_columns_without_anything_that_counts(call: Call, limits: Limits) -> None:
    plan = call.plan
    given = numbers(replace(call, residual=True))
    valid = torch.ones(plan.view, dtype=torch.bool)
    kept = next(dim for dim in range(len(plan.view)) if dim not in plan.reduced)
    valid.select(kept, 0).fill_(False)
    masked = given._replace(valid=valid, x=given.x.reshape(plan.view).where(valid, torch.nan).reshape(plan.shape))
    with interpreted(limits):
        y, total, moments, found = compiled(replace(call, residual=True), masked)
    out = ~valid.reshape(plan.shape)
    assert not y[out].any()
    assert y[~out].any()
    assert total is not None
    assert total[out].isnan().all()
    for gradient in found[:2]:
        assert torch.equal(gradient[out], given.d_sum[out])
    assert all(gradient.isfinite().all() for gradient in found)
    assert moments is not None
    assert not torch.as_tensor(moments.count).select(kept, 0).any()
    assert all(part.isfinite().all() for part in (moments.mean, moments.m2))


@every_way
@every_call
def test_padding_changes_no_bit(call: Call, limits: Limits) -> None:
    call = replace(call, masked=parse(call.word.text).names, wanted=(True, False, True, True))
    given = numbers(call)
    assert given.valid is not None
    out = ~given.valid.reshape(call.plan.shape)
    assert out.any()
    with interpreted(limits):
        y, _, _, found = compiled(call, given)
        x, dy = (tensor.masked_fill(out, -3e38) for tensor in (given.x, given.d_output))
        others = compiled(call, given._replace(x=x, d_output=dy))
    assert same([y, *found], [others.output, *others.gradients])


@every_way
@pytest.mark.parametrize("unused", ["", "output", "sum"])
@every_call
def test_a_residual(call: Call, unused: str, limits: Limits) -> None:
    with interpreted(limits):
        check_call(replace(call, residual=True, unused=unused, activation="silu", dtype=torch.float16))


@every_way
@pytest.mark.parametrize("normalizer", [Standardize(0.01), RMS(0.01)], ids=str)
@every_call
def test_remembered_statistics(call: Call, normalizer: Standardize | RMS, limits: Limits) -> None:
    call = replace(call, normalizer=normalizer, recalls=True)
    with interpreted(limits) as watch:
        check_call(call)
        check_call(replace(call, masked=parse(call.word.text).names, residual=True, activation="gelu"))
    assert [launch.is_given for launch in watch.launches] == [True] * 4


@every_way
@every_call
def test_only_some_gradients(call: Call, limits: Limits) -> None:
    wishes = [wanted for wanted in itertools.product((True, False), repeat=4) if sum(wanted) in (1, 3)]
    with interpreted(limits):
        for wanted in wishes if limits is LIMITS else wishes[2::2]:
            check_call(replace(call, residual=True, wanted=wanted))


RECOVERIES = (None, Scale, Affine, OffsetScale)
FUNCTIONS: tuple[Activation | None, ...] = (None, "relu", "silu", "gelu")


@pytest.mark.parametrize(
    ("place", "activation", "limits"),
    [
        *((place, activation, LIMITS) for place in range(4) for activation in FUNCTIONS),
        *((place, FUNCTIONS[-place], DIVIDED) for place in range(4)),
    ],
)
def test_recoveries_and_activations(place: int, activation: Activation | None, limits: Limits) -> None:
    call = replace(CALLS[place], recovery=RECOVERIES[place], activation=activation, normalizer=L2(0.01))
    with interpreted(limits):
        check_call(call if place else replace(call, over=""))


@every_way
@every_call
def test_gates(call: Call, limits: Limits) -> None:
    """With a mask, a residual, an activation and remembered statistics, and where only its gradient is wanted."""
    nothing = (False,) * 4
    changes = (
        {"masked": parse(call.word.text).names, "parameters": torch.bfloat16},
        {"residual": True, "activation": "silu", "dtype": torch.float16},
        {"recalls": True, "wants_gate": False},
        {"wanted": nothing},
    )
    with interpreted(limits):
        for gate, change in zip(GATES, changes, strict=True):
            check_call(replace(call, gate=gate, **change))


@every_way
def test_second_derivatives_with_a_gate(limits: Limits) -> None:
    x, gate, dy, ddx, ddg = torch.randn(5, 3, 35)

    def twice(norm: Norm, *given: Tensor) -> list[Tensor]:
        x, gate, dy, ddx, ddg = (tensor.clone().requires_grad_() for tensor in given)
        found = torch.autograd.grad(norm(x, gate=gate), [x, gate], dy, create_graph=True)
        return [*found, *torch.autograd.grad(found, [x, gate, dy, *norm.parameters()], [ddx, ddg])]

    with interpreted(limits):
        found = twice(nw.LayerNorm(35, gate="silu"), x, gate, dy, ddx, ddg)
    wide = (tensor.double() for tensor in (x, gate, dy, ddx, ddg))
    for one, wants in zip(found, twice(nw.LayerNorm(35, gate="silu").double(), *wide), strict=True):
        check(one.double(), wants, GRADIENTS)


@every_way
@pytest.mark.parametrize(("dtype", "parameters"), [*itertools.permutations(DTYPES, 2)], ids=str)
def test_parameters_in_another_dtype_and_with_gaps(dtype: torch.dtype, parameters: torch.dtype, limits: Limits) -> None:
    with interpreted(limits):
        check_call(replace(CALLS[0], dtype=dtype, parameters=parameters))
        check_call(replace(CALLS[1], dtype=dtype, parameters=parameters, strided=True, recovery=OffsetScale))


@pytest.mark.parametrize("layout", LAYOUTS)
@every_layer
def test_what_has_gaps_gives_the_bits_of_its_dense_copy(make: Make, layout: str) -> None:
    x, dy = (LAYOUTS[layout](torch.randn(SHAPE)) for _ in range(2))
    before = [x.clone(), dy.clone()]
    with interpreted():
        found = gradients(make(), x, dy)
        dense = torch.empty_like(x).copy_(x)
        assert same(found, gradients(make(), dense, dy.contiguous()))
    assert same([x, dy], before)
    assert found[0].stride() == dense.stride()


SMALL = (2, 6, 4, 10)
MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand(x.shape),
    "every second": LAYOUTS["every second"],
}


@pytest.mark.parametrize(
    ("first", "limits"), [*((first, LIMITS) for first in MIXED), ("channels last", DIVIDED)], ids=lambda v: str(v)[:20]
)
@every_layer
def test_input_residual_and_gradients_each_in_a_layout(make: Make, first: str, limits: Limits) -> None:
    layer = make()
    order = [*MIXED, *MIXED][list(MIXED).index(first) :][:4]
    x, residual, dy, ds = (MIXED[layout](torch.randn(SMALL)) for layout in order)
    before = [tensor.clone() for tensor in (x, residual, dy, ds)]

    def run(layer: nn.Module, dtype: torch.dtype, given: list[Tensor]) -> list[Tensor]:
        x, residual, dy, ds = (tensor.to(dtype) for tensor in given)
        leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_()]
        y, s = layer(leaves[0], residual=leaves[1])
        return [y.detach(), s.detach(), *torch.autograd.grad([y, s], [*leaves, *layer.parameters()], [dy, ds])]

    with interpreted(limits):
        found = run(layer, torch.float32, [x, residual, dy, ds])
    assert same([x, residual, dy, ds], before)
    expected = run(make().double(), torch.float64, [tensor.contiguous() for tensor in before])
    for one, wants in zip(found, expected, strict=True):
        check(one.double(), wants, GRADIENTS)


@every_layer
def test_second_derivatives(make: Make) -> None:
    x, dy, ddx = torch.randn(3, *SMALL)

    def twice(layer: nn.Module, x: Tensor, dy: Tensor, ddx: Tensor) -> list[Tensor]:
        x, dy = x.requires_grad_(), dy.requires_grad_()
        (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
        return [dx.detach(), *torch.autograd.grad(dx, [x, dy, *layer.parameters()], ddx, materialize_grads=True)]

    with interpreted() as watch:
        found = twice(make(), x.clone(), dy.clone(), ddx)
        first = gradients(make(), x, dy)[1]
    ran = [launch.kernel for launch in watch.launches if launch.kernel.startswith("resident")]
    assert ran == ["resident.forward", *["resident.forward", "resident.backward"]]  # none for second derivatives
    for one, wants in zip(found, twice(make().double(), x.double(), dy.double(), ddx.double()), strict=True):
        check(one.double(), wants, GRADIENTS)
    check(found[0], first, GRADIENTS)


def test_second_derivatives_with_a_mask_a_residual_and_a_memory() -> None:
    x, residual, dy, ds, ddx = torch.randn(5, 3, 2, 5)
    valid = torch.tensor([[True, False], [True, True], [False, False]])

    def twice(norm: Norm, *given: Tensor) -> list[Tensor]:
        x, residual, dy, ds, ddx = (tensor.clone().requires_grad_() for tensor in given)
        y, s = norm(x, residual=residual, valid=valid)
        dx, dr = torch.autograd.grad([y, s], [x, residual], [dy, ds], create_graph=True)
        inputs = [x, residual, dy, ds, *norm.parameters()]
        return list(torch.autograd.grad([dx, dr], inputs, [ddx, ddx * 2], materialize_grads=True))

    for training in (True, False):
        norm = Norm("[n t] c", recovery=Affine("c"), memory=nw.Moving("c", decay=0.9), c=5).train(training)
        randomize(norm)
        wide = Norm("[n t] c", recovery=Affine("c"), memory=nw.Moving("c", decay=0.9), c=5).double().train(training)
        wide.load_state_dict(norm.state_dict())
        with interpreted():
            found = twice(norm, x, residual, dy, ds, ddx)
        expected = twice(wide, *(tensor.double() for tensor in (x, residual, dy, ds, ddx)))
        assert any(wants.abs().max() > 0.1 for wants in expected)
        for one, wants in zip(found, expected, strict=True):
            check(one.double(), wants, GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("text", "rows"), [("n [d]", 5000), ("[n] d", 5000), ("d [n]", 5000)])
def test_gradients_of_weights_over_many_rows(text: str, rows: int, dtype: torch.dtype) -> None:
    shape, dim = ((3, rows), 1) if text.startswith("d") else ((rows, 3), 0)
    x = torch.where(torch.rand(shape) < 0.5, 2.0, 1.0).to(dtype)
    dy = (torch.rand(shape) + 0.5).to(dtype)
    layer = Norm(text, RMS(0.0), Affine("d"))
    with interpreted():
        d_weight, d_bias = torch.autograd.grad(layer(x), [layer.weight, layer.bias], dy)
    values = x.double() / x.double().square().mean(1 if text == "n [d]" else text.split().index("[n]"), True).sqrt()
    for found, expected in ((d_weight, (dy.double() * values).sum(dim)), (d_bias, dy.double().sum(dim))):
        assert ((found - expected).abs() <= SUMMED.relative * expected).all()


COMPANIES = (("n [d]", (33, 35)), ("n [d] l", (33, 5, 3)), ("[d] n", (40, 33)), ("d n [k l]", (1, 33, 3, 11)))


@pytest.mark.parametrize(("limits", "counts"), [(LIMITS, (2, 5, 33)), (DIVIDED, (2, 5))], ids=WAYS)
@pytest.mark.parametrize(("text", "sizes"), COMPANIES, ids=str)
def test_a_column_has_the_same_bits_in_any_company(
    text: str, sizes: tuple[int, ...], limits: Limits, counts: tuple[int, ...]
) -> None:
    x, dy = torch.randn(2, *sizes) + 3
    place = parse(text).names.index("n")
    layer = Norm(text, recovery=Affine("d"))

    def first(count: int) -> list[Tensor]:
        given = (tensor.narrow(place, 0, count).contiguous() for tensor in (x, dy))
        return [tensor.narrow(place, 0, 1) for tensor in gradients(layer, *given)[:2]]

    with interpreted(limits):
        alone = first(1)
        assert all(same(first(count), alone) for count in counts)


@every_way
@every_call
def test_two_runs_agree_bit_for_bit(call: Call, limits: Limits) -> None:
    given = numbers(replace(call, residual=True))
    with interpreted(limits):
        one, other = (compiled(replace(call, residual=True), given) for _ in range(2))
    assert one.total is not None
    assert other.total is not None
    assert same([one.output, one.total, *one.gradients], [other.output, other.total, *other.gradients])


@pytest.mark.parametrize("case", [case for case in REMEMBERING if len(case.shape) in (2, 4)], ids=str)
@every_way
def test_memory_and_evaluation_are_torchs(case: Case, limits: Limits) -> None:
    layer, twin = case.pair()
    twin = twin.double()
    with interpreted(limits):
        for step in range(3):
            x = torch.randn(case.shape) * (step + 1) + 2 * step
            check(layer(x).double(), twin(x.double()), VALUES)
        for name, buffer in layer.named_buffers():
            check(buffer.double(), twin.get_buffer(name).double(), MEMORY)
        layer.eval()
        twin.eval()
        dy = torch.randn(case.shape)
        found, wants = gradients(layer, x, dy), gradients(twin, x.double(), dy.double())
    for one, other in zip(found, wants, strict=True):
        check(one.double(), other, GRADIENTS)


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
@every_way
def test_a_batch_that_is_not_finite_leaves_no_trace(wrong: float, limits: Limits) -> None:
    layer = nw.BatchNorm(3)
    x = torch.randn(4, 3, 11)
    spoiled = x.index_fill(2, torch.tensor([7]), wrong)
    with interpreted(limits):
        layer(x)
        before = [buffer.clone() for buffer in layer.buffers()]
        for count in (1, 2):
            assert layer(spoiled).isnan().any()
            assert same(list(layer.buffers()), before)
            assert layer.skipped_batches.item() == count
        layer(x)
    assert layer.num_batches_tracked.item() == 2
    assert not torch.equal(layer.running_mean, before[0])


@every_way
def test_a_column_that_is_not_finite_does_not_touch_the_others(limits: Limits) -> None:
    x = torch.randn(40, 6) + 3
    spoiled = x.index_fill(1, torch.tensor([4, 5]), torch.inf)
    with interpreted(limits):
        for text in ("[n] c", "n [d]"):
            one, other = (tensor if text == "[n] c" else tensor.T.contiguous() for tensor in (x, spoiled))
            alone, beside = (Norm(text)(tensor) for tensor in (one, other))
            alone, beside = (alone, beside) if text == "[n] c" else (alone.T, beside.T)
            assert torch.equal(alone[:, :4], beside[:, :4])
            assert beside[:, 4:].isnan().any()
