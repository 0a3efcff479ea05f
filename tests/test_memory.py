from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import normwise as nw
from normwise import RMS, Average, BatchNorm, Frozen, Moving, Norm, NormwiseError
from normwise.commit import Entry, Store, commit
from tests.tolerances import DOUBLE, MEMORY, POOLED, VALUES, check

THREE_ROWS = torch.tensor([[2.0, 15, 2, 1], [2, 17, 2, 1], [-4, -2, -2, -1]])


def bits(layer: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in layer.state_dict().items()}


@pytest.mark.parametrize(
    ("unbiased", "variance"), [(True, [12.0, 109, 16 / 3, 4 / 3]), (False, [8.0, 218 / 3, 32 / 9, 8 / 9])]
)
def test_the_statistics_of_three_rows(unbiased: bool, variance: list[float]) -> None:
    norm = Norm("[n] c", memory=Moving("c", update_rate=1.0, unbiased=unbiased))
    norm(THREE_ROWS)
    check(norm.running_mean, torch.tensor([0, 10, 2 / 3, 1 / 3]), VALUES)
    check(norm.running_var, torch.tensor(variance), VALUES)
    assert norm.num_batches_tracked.item() == 1


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999, 0.5, 0.75, 0.0, 1.0])
def test_decay_and_update_rate_are_one_memory_bit_for_bit(decay: float) -> None:
    by_decay = Norm("[n] c", memory=Moving("c", decay=decay))
    by_rate = Norm("[n] c", memory=Moving("c", update_rate=float(f"{1 - decay:.6g}")))
    assert by_decay.spec == by_rate.spec
    for _ in range(20):
        x = torch.randn(8, 5) * 3 + 1
        by_decay(x), by_rate(x)
    assert bits(by_decay) == bits(by_rate)


@given(st.integers(0, 10_000).map(lambda n: n / 10_000))
def test_the_two_weights_are_written_as_a_person_writes_them(decay: float) -> None:
    memory = Moving("c", decay=decay)
    assert memory.decay == decay
    assert repr(memory.update_rate) == repr(round(1 - decay, 10) + 0.0)
    assert eval(repr(memory)) == memory


@pytest.mark.parametrize(
    ("memory", "formula"),
    [
        (Moving("c", decay=0.9), "moving = 0.9 * moving + 0.1 * batch, unbiased variance"),
        (Moving("c", update_rate=0.01, unbiased=False), "moving = 0.99 * moving + 0.01 * batch, biased variance"),
        (Average("c"), "average of all batches, unbiased variance"),
        (Average("c", unbiased=False), "average of all batches, biased variance"),
        (Frozen("c"), "frozen: never updated, used in training too"),
    ],
)
def test_formula_and_repr(memory: Moving | Average | Frozen, formula: str) -> None:
    assert memory.formula() == formula
    assert eval(repr(memory)) == memory
    norm = Norm("[n] c", memory=memory)
    assert formula in repr(norm)


@given(st.lists(st.integers(2, 6), min_size=1, max_size=6))
def test_moving_follows_its_formula(counts: list[int]) -> None:
    norm = Norm("[n] c", memory=Moving("c", decay=0.8, unbiased=False), dtype=torch.float64)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for count in counts:
        x = torch.randn(count, 3, dtype=torch.float64)
        norm(x)
        mean, var = 0.8 * mean + 0.2 * x.mean(0), 0.8 * var + 0.2 * x.var(0, unbiased=False)
    check(norm.running_mean, mean, DOUBLE)
    check(norm.running_var, var, DOUBLE)


@pytest.mark.parametrize("unbiased", [True, False])
def test_average_weighs_every_batch_alike(unbiased: bool) -> None:
    norm = Norm("[n] c", memory=Average("c", unbiased))
    xs = [torch.randn(n, 3) * n + n for n in (2, 3, 5, 8, 13)]
    for x in xs:
        norm(x)
    check(norm.running_mean, torch.stack([x.mean(0) for x in xs]).mean(0), MEMORY)
    check(norm.running_var, torch.stack([x.var(0, unbiased=unbiased) for x in xs]).mean(0), MEMORY)
    norm.reset_running_stats()
    norm(xs[0])
    check(norm.running_mean, xs[0].mean(0), VALUES)


def test_frozen_statistics_are_used_in_training_and_never_move() -> None:
    norm = Norm("[n] c", memory=Frozen("c"), c=3)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    norm.running_var.fill_(4.0)
    before = bits(norm)
    x = torch.randn(8, 3)
    for training in (True, False):
        y = norm.train(training)(x)
        check(y, (x - norm.running_mean) / math.sqrt(4 + 1e-5), VALUES)
    norm(torch.randn(1, 3))  # one row needs no statistics of its own
    assert bits(norm) == before


def test_rms_remembers_mean_squares() -> None:
    norm = Norm("[n] c", RMS(1e-5), memory=Moving("c", update_rate=0.25))
    x = torch.randn(6, 3) + 2
    norm(x)
    assert set(norm.state_dict()) == {"running_mean_square", "num_batches_tracked"}
    check(norm.running_mean_square, 0.75 + 0.25 * x.square().mean(0), VALUES)
    check(norm.eval()(x), x / (norm.running_mean_square + 1e-5).sqrt(), VALUES)


def test_rms_of_one_value_is_remembered_where_kept_axes_are_averaged() -> None:
    norm = Norm("n c [h]", RMS(), memory=Moving("c", update_rate=1.0))
    x = torch.randn(6, 3, 1)
    norm(x)
    check(norm.running_mean_square, x.square().mean((0, 2)), VALUES)


def test_kept_axes_that_are_not_named_are_averaged() -> None:
    norm = Norm("n t c [h]", memory=Moving("c t", update_rate=1.0))
    x = torch.randn(2, 3, 4, 5)
    norm(x)
    check(norm.running_mean, x.mean(3).mean(0).T, VALUES)
    check(norm.running_var, x.var(3, unbiased=True).mean(0).T, VALUES)
    y = norm.eval()(x)
    expected = (x - norm.running_mean.T[..., None]) / (norm.running_var.T[..., None] + 1e-5).sqrt()
    check(y, expected, VALUES)


def test_commit_takes_all_statistics_or_none() -> None:
    memory, kept = Moving("c", decay=0.5, unbiased=False), (torch.zeros(2), torch.ones(2))
    batches, skips, two = torch.tensor(0), torch.zeros(2, dtype=torch.long), torch.full((2,), 2.0)
    store = Store(kept, batches, skips)
    for m2 in (torch.tensor([2.0, torch.inf]), torch.tensor([2.0, 6.0])):
        commit(memory, ("mean", "var"), store, Entry(two, torch.ones(2), m2, torch.ones(2)), least=2, owner="nobody")
        if m2.isinf().any():
            assert (kept[0].tolist(), kept[1].tolist(), batches.item(), skips[0].item()) == ([0, 0], [1, 1], 0, 1)
    assert (kept[0].tolist(), kept[1].tolist(), batches.item(), skips[0].item()) == ([0.5, 0.5], [1, 2], 1, 1)


def test_a_finite_batch_repairs_nothing_silently_but_moves_everything() -> None:
    layer = BatchNorm(3)
    layer(torch.randn(4, 3) * 1e18)  # the largest variance that float32 holds is finite, and so is committed
    assert layer.running_var.isfinite().all()
    assert (layer.running_var > 1e30).all()
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize(
    "convert", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)], ids=["half", "bfloat16", "to"]
)
def test_memory_stays_float32_where_the_parameters_go_lower(convert: type) -> None:
    layer = BatchNorm(3)
    layer.running_var.fill_(1e-8)
    convert(layer)
    assert layer.weight.dtype.itemsize == 2
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    check(layer.running_var, torch.full((3,), 1e-8), DOUBLE)
    assert layer.num_batches_tracked.dtype == torch.int64
    model = nn.Sequential(nn.Linear(2, 3), layer)
    convert(model)
    assert model[1].running_var.dtype == torch.float32
    layer(torch.randn(4, 3, dtype=layer.weight.dtype))
    assert layer.running_var.dtype == torch.float32


def test_memory_follows_to_float64_and_comes_back_to_float32() -> None:
    layer = BatchNorm(3).double()
    assert layer.running_var.dtype == torch.float64
    assert layer.half().running_var.dtype == torch.float32
    assert layer.to(torch.float32).running_var.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_memory_is_made_in_float32_at_least(dtype: torch.dtype) -> None:
    layer = BatchNorm(3, dtype=dtype)
    assert layer.weight.dtype == dtype
    assert layer.running_var.dtype == torch.promote_types(dtype, torch.float32)


def test_evaluation_and_no_grad_do_not_decide_for_each_other() -> None:
    layer = BatchNorm(3)
    with torch.no_grad():
        layer(torch.randn(4, 3))
    assert layer.num_batches_tracked.item() == 1
    layer.eval()(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert layer.num_batches_tracked.item() == 1


def test_functional_call_updates_the_memory_it_was_given() -> None:
    layer = BatchNorm(3)
    before = bits(layer)
    given = {name: value.clone() for name, value in layer.named_buffers()}
    x = torch.randn(4, 3)
    torch.func.functional_call(layer, given, (x,))
    assert bits(layer) == before
    check(given["running_mean"], 0.1 * x.mean(0), VALUES)
    assert given["num_batches_tracked"].item() == 1


def test_statistics_do_not_carry_gradients() -> None:
    layer = BatchNorm(3)
    layer(torch.randn(4, 3, requires_grad=True))
    assert not layer.running_mean.requires_grad
    assert layer.running_mean.grad_fn is None
    leaf: Tensor = torch.randn(4, 3, requires_grad=True)
    layer.eval()(leaf).sum().backward()
    check(leaf.grad, (layer.running_var + 1e-5).rsqrt().expand(4, 3), VALUES)


JOINABLE: dict[str, Callable[[], Norm]] = {
    "moving": lambda: Norm("[n] c [h]", memory=Moving("c", decay=0.9), dtype=torch.float64),
    "moving, biased": lambda: Norm("[n] c [h]", memory=Moving("c", decay=0.9, unbiased=False), dtype=torch.float64),
    "average": lambda: Norm("[n] c [h]", memory=Average("c"), dtype=torch.float64),
    "two axes": lambda: Norm("[n] c h", memory=Moving("h c", decay=0.9), dtype=torch.float64),
    "rms": lambda: Norm("[n] c [h]", RMS(), memory=Moving("c", decay=0.9), dtype=torch.float64),
    "instances": lambda: Norm("n c [h]", memory=Moving("c", decay=0.9), dtype=torch.float64),
    "instances, biased": lambda: Norm("n c [h]", memory=Moving("c", decay=0.9, unbiased=False), dtype=torch.float64),
    "instances, average": lambda: Norm("n c [h]", memory=Average("c"), dtype=torch.float64),
}
every_joinable = pytest.mark.parametrize("make", JOINABLE.values(), ids=JOINABLE)


def micro_batches(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, 3, 5, dtype=torch.float64) * (k + 1) + 3 * k for k, size in enumerate(sizes)]


def check_memory(layer: Norm, expected: Norm) -> None:
    for name, value in expected.state_dict().items():
        check(layer.state_dict()[name], value, POOLED)


@every_joinable
@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (3, 5, 8), (2, 31)], ids=str)
def test_accumulated_micro_batches_are_remembered_as_the_batch_joined(
    make: Callable[[], Norm], sizes: tuple[int, ...]
) -> None:
    layer, joined = make(), make()
    parts = micro_batches(*sizes)
    layer(x := micro_batches(4)[0]), joined(x)
    with nw.accumulate(layer, len(sizes)):
        for part in parts:
            before = bits(layer)
            y = layer(part)
        assert bits(layer) != before  # entered with the last one, not at the end of the context
    check(y, make()(parts[-1]), DOUBLE)  # outputs are those of micro-batches
    joined(torch.cat(parts))
    check_memory(layer, joined)
    assert layer.num_batches_tracked.item() == 2


@every_joinable
@pytest.mark.parametrize("mean", [0.0, 1e6, 1e160])
def test_a_window_of_one_is_no_window_bit_for_bit(make: Callable[[], Norm], mean: float) -> None:
    layer, plain = make(), make()
    with nw.accumulate(layer, 1):
        for x in micro_batches(8, 3, 5):
            layer(x + mean), plain(x + mean)
    assert bits(layer) == bits(plain)


@every_joinable
def test_what_is_left_over_enters_at_the_end(make: Callable[[], Norm]) -> None:
    layer, joined = make(), make()
    parts = micro_batches(8, 3, 5, 8, 4)
    with nw.accumulate(layer, 2):
        [layer(part) for part in parts]
    joined(torch.cat(parts[:2])), joined(torch.cat(parts[2:4])), joined(parts[4])
    check_memory(layer, joined)


@every_joinable
@pytest.mark.filterwarnings("ignore:.*statistics are not finite")
def test_a_micro_batch_that_is_not_finite_is_left_out_of_its_window(make: Callable[[], Norm]) -> None:
    layer, joined = make(), make()
    parts = micro_batches(8, 3, 5, 8)
    layer(x := micro_batches(4)[0]), joined(x)
    with nw.accumulate(layer, 5):
        for part in (*parts[:2], torch.full_like(parts[0], torch.nan), *parts[2:]):
            layer(part)
        assert layer.num_batches_tracked.item() == 2  # it counts as one of the window
    joined(torch.cat(parts))
    check_memory(layer, joined)
    with nw.accumulate(layer, 2):
        [layer(torch.full_like(parts[0], torch.nan)) for _ in range(3)]
    check_memory(layer, joined)
    assert layer.skipped_batches.item() == 4


def test_a_mask_counts_in_a_window_as_it_does_in_a_batch() -> None:
    layer, joined = JOINABLE["moving"](), JOINABLE["moving"]()
    parts = micro_batches(8, 3, 5)
    valid = [torch.rand(part.shape[0]) > 0.4 for part in parts]
    with nw.accumulate(layer, 3):
        [layer(part, valid=mask) for part, mask in zip(parts, valid, strict=True)]
    joined(torch.cat(parts), valid=torch.cat(valid))
    check_memory(layer, joined)


def test_a_window_that_an_exception_ends_is_dropped() -> None:
    layer = JOINABLE["moving"]()
    layer(micro_batches(8)[0])
    before = bits(layer)

    def interrupted() -> None:
        with nw.accumulate(layer, 4):
            [layer(part) for part in micro_batches(8, 8)]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert bits(layer) == before
    assert not any("pool" in name for name, _ in layer.named_buffers())


@pytest.mark.parametrize("known", [True, False], ids=["known domain", "new domain"])
def test_each_domain_accumulates_by_itself(known: bool) -> None:
    layer, day, night = (JOINABLE["moving"]() for _ in range(3))
    first, *parts = micro_batches(4, 8, 3, 5, 8)
    layer(first), day(first)
    if known:
        with nw.domain(layer, "night"):
            layer(first), night(first)
    with nw.accumulate(layer, 2):
        for k, part in enumerate(parts):
            layer(part)
            with nw.domain(layer, "night"):
                layer(part - k)
    for stop in (2, 4):
        day(torch.cat(parts[stop - 2 : stop]))
        night(torch.cat([parts[k] - k for k in range(stop - 2, stop)]))
    for name, value in day.state_dict().items():
        check(layer.state_dict()[name], value, POOLED)
        check(layer.state_dict()[f"_domains.night.{name}"], night.state_dict()[name], POOLED)


def test_what_is_held_or_frozen_does_not_count_in_a_window() -> None:
    layer, joined = JOINABLE["moving"](), JOINABLE["moving"]()
    one, other, probe = micro_batches(8, 5, 3)
    with nw.accumulate(layer, 2):
        layer(one)
        with nw.no_update(layer):
            layer(probe)
        with nw.freeze(layer):
            layer(probe)
        layer(other)
    joined(torch.cat((one, other)))
    check_memory(layer, joined)


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_a_window_that_is_no_number_of_batches(window: int) -> None:
    with (
        pytest.raises(ValueError, match=f"^window is a number of batches, from 1 on, not {window!r}$"),
        nw.accumulate(BatchNorm(3), window),
    ):
        pass


def test_averages_that_cannot_be_joined_and_nested_windows_are_refused() -> None:
    layer = Norm("[n] c w [h]", memory=Moving("c", decay=0.9), c=3)
    model = nn.Sequential(BatchNorm(3), nn.Sequential(layer))
    with pytest.raises(NormwiseError) as caught, nw.accumulate(model, 2):
        pass
    assert str(caught.value) == (
        "1.0: '[n] c w [h]' averages over w in its memory, and averages of batches cannot be joined exactly; "
        "normalize over it, or remember it"
    )
    assert model[0]._window == 0
    with nw.accumulate(model[0], 2):
        with pytest.raises(NormwiseError) as caught, nw.accumulate(model[:1], 3):
            pass
        model[0](torch.randn(4, 3)), model[0](torch.randn(4, 3))
    assert str(caught.value) == "0: accumulation within accumulation"
    assert model[0].num_batches_tracked.item() == 1
