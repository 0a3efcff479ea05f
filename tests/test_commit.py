"""What enters a memory and what does not: policies for batches that are not finite or too small, and transforms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import RMS, Affine, Average, BatchNorm, InstanceNorm, Moving, NonFiniteError, Norm, TooFewSamplesError
from tests.test_memory import bits
from tests.tolerances import COMPILED, MEMORY, VALUES, check

Make = Callable[..., Norm]

MEMORIES: dict[str, Make] = {
    "moving": lambda **policy: Norm("[n] c [h]", memory=Moving("c", decay=0.9, **policy), c=4),
    "average": lambda **policy: Norm("[n] c [h]", memory=Average("c", **policy), c=4),
    "biased": lambda **policy: Norm("[n] c [h]", memory=Moving("c", decay=0.9, unbiased=False, **policy), c=4),
    "kept axes averaged": lambda **policy: Norm("n c [h]", memory=Moving("c", decay=0.9, **policy), c=4),
    "kept axes averaged, average": lambda **policy: Norm("n c [h]", memory=Average("c", **policy), c=4),
    "two axes": lambda **policy: Norm("[n] c h", memory=Moving("h c", decay=0.9, **policy), c=4, h=5),
    "rms": lambda **policy: Norm("[n] c [h]", RMS(), memory=Moving("c", decay=0.9, **policy), c=4),
    "rms, average": lambda **policy: Norm("[n] c [h]", RMS(), memory=Average("c", **policy), c=4),
}
every_memory = pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
NOT_FINITE = "the batch's statistics are not finite"
WARNED = f"{NOT_FINITE}: it does not enter the memory; skipped_batches counts such batches"
RAISED = f"{NOT_FINITE}, and nothing of it has entered the memory"


def clean() -> Tensor:
    return torch.randn(8, 4, 5) * 2 + 1


def spoilt(value: float) -> Tensor:
    x = clean()
    x[2, 1, 3] = value
    return x


def everything(layer: nn.Module) -> dict[str, bytes]:
    """Buffers that are not saved, and the count of what was skipped, as well."""
    held = dict(layer.named_buffers())
    for path, module in layer.named_modules():
        if getattr(module, "skipped_batches", None) is not None:
            held[f"{path}.skipped_batches"] = module.skipped_batches
    return {**bits(layer), **{name: value.numpy().tobytes() for name, value in held.items()}}


@every_memory
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_skipped_batch_never_came_is_counted_and_warned_of_once(make: Make, value: float) -> None:
    layer, spared = make(), make()
    layer(x := clean()), spared(x)
    with pytest.warns(UserWarning, match=NOT_FINITE) as caught:
        layer(spoilt(value))
    assert [str(warning.message) for warning in caught] == [f"Norm: {WARNED}"]
    layer(spoilt(value))  # a second warning would be an error
    layer(x := clean()), spared(x)
    assert bits(layer) == bits(spared)
    assert (layer.skipped_batches.item(), spared.skipped_batches.item()) == (2, 0)


@pytest.mark.parametrize("make", [MEMORIES["moving"], MEMORIES["kept axes averaged, average"]], ids=["moving", "mean"])
@pytest.mark.filterwarnings(f"ignore:.*{NOT_FINITE}")
def test_one_inf_then_a_thousand_clean_batches(make: Make) -> None:
    layer, spared = make(), make()
    layer(spoilt(torch.inf))
    for x in torch.randn(1000, 8, 4, 5):
        layer(x), spared(x)
    assert bits(layer) == bits(spared)
    assert layer.running_var.isfinite().all()


@pytest.mark.parametrize("name", [name for name in MEMORIES if "rms" not in name])
def test_a_variance_that_float32_cannot_hold_is_skipped_without_a_warning(name: str) -> None:
    layer, spared = MEMORIES[name](), MEMORIES[name]()
    layer(x := clean()), spared(x)
    assert layer(clean() * 1e25).isfinite().all()
    assert bits(layer) == bits(spared)
    assert layer.skipped_batches.item() == 1


def test_a_batch_that_is_not_finite_is_warned_of_although_a_large_one_was_skipped_before() -> None:
    layer = MEMORIES["moving"]()
    layer(clean() * 1e25)
    with pytest.warns(UserWarning, match=WARNED):
        layer(spoilt(torch.nan))
    assert layer.skipped_batches.item() == 2


def test_a_reset_forgets_what_was_skipped() -> None:
    layer = MEMORIES["moving"]()
    for _ in range(2):
        with pytest.warns(UserWarning, match=WARNED):
            layer(spoilt(torch.nan))
        layer.reset_running_stats()
        assert layer.skipped_batches.item() == 0


@every_memory
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_raise_leaves_every_buffer_bit_for_bit(make: Make, value: float) -> None:
    layer = make(nonfinite="raise")
    with nw.domain(layer, "night"):
        layer(clean())
    layer(clean())
    before = everything(layer)
    bad = spoilt(value)
    bad[2, 1, 2] = -value
    with pytest.raises(NonFiniteError) as caught:
        layer(bad)
    with pytest.raises(NonFiniteError), nw.domain(layer, "night"):
        layer(bad)
    with pytest.raises(NonFiniteError), nw.accumulate(layer, 2):
        layer(clean()), layer(bad)
    assert str(caught.value) == f"Norm: {RAISED}"
    assert everything(layer) == before


@every_memory
def test_keep_lets_it_enter_where_it_is_not_finite_and_nowhere_else(make: Make) -> None:
    layer, spared = make(nonfinite="keep"), make()
    bad = spoilt(torch.nan)
    layer(bad), spared(bad.nan_to_num(7.0))
    for name in layer.spec.normalizer.remembers:
        kept, whole = getattr(layer, f"running_{name}"), getattr(spared, f"running_{name}")
        hit = torch.zeros_like(kept, dtype=torch.bool)
        hit[..., 1] = ~kept[..., 1].isfinite()
        assert torch.equal(kept.isnan(), hit)
        assert hit.sum() == 1
        check(kept[~hit], whole[~hit], MEMORY)
    assert layer.num_batches_tracked.item() == 1
    assert layer.skipped_batches.item() == 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0, None])
def test_finite_batches_at_both_ends_of_float32_leave_memory_finite(rate: float | None) -> None:
    memory = Average("c") if rate is None else Moving("c", update_rate=rate)
    layer = Norm("[n] c", memory=memory, c=2)
    expected = torch.zeros(2, dtype=torch.float64)
    for step, value in enumerate((3e38, -3e38, 3e38)):
        weight = 1 / (step + 1) if rate is None else rate
        expected = (1 - weight) * expected + weight * value
        layer(torch.full((4, 2), value))
    torch.testing.assert_close(layer.running_mean.double(), expected, rtol=MEMORY.relative, atol=1e32)
    assert layer.running_var.isfinite().all()


def test_batches_whose_joined_variance_float32_cannot_hold_do_not_enter() -> None:
    layer = BatchNorm(3)
    before = bits(layer)
    with nw.accumulate(layer, 2):
        layer(torch.randn(8, 3) + 3e19), layer(torch.randn(8, 3) - 3e19)
    assert bits(layer) == before
    assert layer.skipped_batches.item() > 0


@pytest.mark.filterwarnings(f"ignore:.*{NOT_FINITE}")
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_longer_batch_that_does_not_enter_does_not_lengthen_the_memory(nonfinite: str) -> None:
    memory = Moving("t c", decay=0.9, beyond={"t": "last"}, nonfinite=nonfinite)
    layer = Norm("[n] t c", memory=memory, c=2)
    layer(torch.randn(8, 3, 2))
    before = bits(layer)
    try:
        layer(torch.full((8, 5, 2), torch.nan))
    except NonFiniteError:
        assert nonfinite == "raise"
    assert bits(layer) == before


LONELY: dict[str, tuple[Callable[[str], Norm], tuple[int, ...]]] = {
    "batch of one row": (lambda d: Norm("[n] c", memory=Moving("c", decay=0.9, degenerate=d), c=3), (1, 3)),
    "batch of one pixel": (
        lambda d: Norm("[n] c [h w]", memory=Average("c", degenerate=d), recovery=Affine("c"), c=3),
        (1, 3, 1, 1),
    ),
    "instances of one pixel": (
        lambda d: Norm("n c [h w]", memory=Moving("c", decay=0.9, degenerate=d), c=3),
        (4, 3, 1, 1),
    ),
    "steps of one row": (lambda d: Norm("[n] t c", memory=Moving("t c", decay=0.9, degenerate=d), t=5, c=3), (1, 5, 3)),
}


@pytest.mark.parametrize(("make", "shape"), LONELY.values(), ids=LONELY)
def test_one_sample_a_column_is_what_evaluation_makes_of_it(
    make: Callable[[str], Norm], shape: tuple[int, ...]
) -> None:
    layer = make("memory")
    for _ in range(3):
        layer(torch.randn(6, *shape[1:2], *(size + 2 * (size == 1) for size in shape[2:])) * 3 + 1)
    before = everything(layer)
    x = torch.randn(shape, requires_grad=True)
    cotangent = torch.randn(shape)
    y = layer(x)
    (grad,) = torch.autograd.grad(y, x, cotangent)
    saved = bits(layer)
    expected = layer.eval()(x)
    assert torch.equal(y, expected)
    assert torch.equal(grad, torch.autograd.grad(expected, x, cotangent)[0])
    assert not torch.equal(y, x)  # the memory is not where it started
    assert saved.items() <= before.items()
    assert layer.skipped_batches.item() == 0


@pytest.mark.parametrize(("make", "shape"), LONELY.values(), ids=LONELY)
def test_one_sample_a_column_is_refused_naming_path_shape_and_ways_out(
    make: Callable[[str], Norm], shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(nn.Identity(), make("raise"))
    before = everything(model)
    way_out = "use larger maps" if "h" in model[1].spec.text and shape[0] > 1 else "use a larger batch"
    with pytest.raises(TooFewSamplesError) as caught:
        model(torch.randn(shape))
    text = str(caught.value)
    assert text.startswith(f"1: shape {shape} leaves 1 sample a column of '{model[1].spec.text}' (over ")
    assert f"and one sample has no variance: {way_out}, " in text
    assert "evaluation mode" in text
    assert everything(model) == before
    model.eval()(torch.randn(shape))


def test_vmap_enters_example_by_example_bit_for_bit() -> None:
    xs = torch.randint(-8, 8, (5, 8, 4)).float()  # sums and means of such numbers are exact in any order
    for make in (lambda: BatchNorm(4), lambda: BatchNorm(4, momentum=None), lambda: Norm("n [c]", memory=_rows())):
        mapped, looped = make(), make()
        ys = torch.func.vmap(mapped)(xs)
        check(ys, torch.stack([looped(x) for x in xs]), VALUES)
        assert bits(mapped) == bits(looped)


def _rows() -> Moving:
    return Moving("n", decay=0.5)


@pytest.mark.filterwarnings(f"ignore:.*{NOT_FINITE}")
def test_vmap_skips_the_example_that_is_not_finite() -> None:
    xs = torch.randn(4, 8, 3)
    xs[1, 2, 0] = torch.inf
    mapped, looped = BatchNorm(3), BatchNorm(3)
    torch.func.vmap(mapped)(xs), [looped(x) for x in xs]
    check(mapped.running_var, looped.running_var, MEMORY)
    assert (mapped.num_batches_tracked.item(), mapped.skipped_batches.item()) == (3, 1)


def test_an_ensemble_of_memories_equals_a_loop_over_its_members() -> None:
    members = [BatchNorm(3, momentum=rate) for rate in (0.1, 0.1)]
    members[1](torch.randn(8, 3) + 4)
    parameters, buffers = torch.func.stack_module_state(members)
    base, xs = copy.deepcopy(members[0]), torch.randn(2, 8, 3)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    ys = torch.func.vmap(call)(parameters, buffers, xs)
    check(ys, torch.stack([member(x) for member, x in zip(members, xs, strict=True)]), VALUES)
    for name, stacked in buffers.items():
        check(stacked, torch.stack([member.get_buffer(name) for member in members]), MEMORY)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd], ids=["jacrev", "jacfwd"])
@every_memory
def test_a_jacobian_moves_the_memory_once(make: Make, transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    layer, called = make(), make()
    x = torch.randn(3, 4, 5)
    transform(layer)(x), called(x)
    for name, value in called.state_dict().items():
        check(layer.state_dict()[name], value, MEMORY)
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", f"ignore:.*{NOT_FINITE}")
def test_policies_under_compile() -> None:
    """Skip, keep and the cumulative average in one graph; and the counts."""
    eager = nn.ModuleList(
        [
            MEMORIES["average"](),
            MEMORIES["moving"](nonfinite="keep"),
            MEMORIES["kept axes averaged, average"](),
            MEMORIES["rms"](),
            Norm("[n] c [h]", memory=Moving("c", decay=0.9, degenerate="memory"), c=4),
        ]
    )
    traced = copy.deepcopy(eager)

    def run(layers: nn.ModuleList, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in layers])

    compiled = torch.compile(run, fullgraph=True)
    batches = [clean(), clean(), spoilt(torch.inf), clean() + 3]
    for x in batches:
        y, y_compiled = run(eager, x), compiled(traced, x)
        check(y_compiled.nan_to_num(9.0), y.nan_to_num(9.0), COMPILED)
    for name, value in eager.state_dict().items():
        found = traced.state_dict()[name]
        torch.testing.assert_close(found, value, atol=COMPILED.absolute, rtol=COMPILED.relative, equal_nan=True)
    assert [layer.skipped_batches.item() for layer in traced] == [1, 0, 1, 1, 1]
    assert [layer.num_batches_tracked.item() for layer in traced] == [3, 4, 3, 3, 3]
    assert traced[1].running_mean.isnan().sum() == traced[1].running_var.isnan().sum() == 1
    one = torch.randn(1, 4, 1)
    before = bits(traced[4])
    lonely = torch.compile(traced[4], fullgraph=True, backend="aot_eager")(one)
    check(lonely, traced[4].eval()(one), COMPILED)
    assert bits(traced[4]) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_raise_and_warning_under_compile() -> None:
    layer = BatchNorm(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(layer, fullgraph=True, backend="aot_eager")(spoilt(torch.nan))
    assert f"BatchNorm: {WARNED}" in [str(warning.message) for warning in caught]
    strict = MEMORIES["moving"](nonfinite="raise")
    before = everything(strict)
    with pytest.raises(Exception, match=RAISED):
        torch.compile(strict, fullgraph=True, backend="aot_eager")(spoilt(torch.nan))
    assert everything(strict) == before


def test_instance_norm_counts_what_it_skips() -> None:
    layer = InstanceNorm(4, track_running_stats=True)
    with pytest.warns(UserWarning, match=f"InstanceNorm: {WARNED}"):
        layer(spoilt(torch.inf))
    assert layer.skipped_batches.item() == 1
