from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise import RMS, Average, BatchNorm, Frozen, InstanceNorm, Moving, Norm
from normwise.commit import Entry, Store, commit
from tests.tolerances import DOUBLE, MEMORY, VALUES, check

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


def test_kept_axes_that_are_not_named_are_averaged() -> None:
    norm = Norm("n t c [h]", memory=Moving("c t", update_rate=1.0))
    x = torch.randn(2, 3, 4, 5)
    norm(x)
    check(norm.running_mean, x.mean(3).mean(0).T, VALUES)
    check(norm.running_var, x.var(3, unbiased=True).mean(0).T, VALUES)
    y = norm.eval()(x)
    expected = (x - norm.running_mean.T[..., None]) / (norm.running_var.T[..., None] + 1e-5).sqrt()
    check(y, expected, VALUES)


BAD = [torch.nan, torch.inf, -torch.inf, 3e38]


@pytest.mark.parametrize(
    "make",
    [lambda: BatchNorm(4), lambda: BatchNorm(4, momentum=None), lambda: InstanceNorm(4, track_running_stats=True)],
)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.filterwarnings("ignore:.*statistics are not finite:UserWarning")
def test_a_non_finite_batch_leaves_memory_bit_for_bit(make: type, value: float) -> None:
    layer, spared = make(), make()
    for step in range(6):
        x = torch.randn(8, 4, 5)
        layer(x), spared(x)
        if step in (0, 3):
            bad = x.clone()
            bad[2, 1, 3], bad[2, 1, 2] = value, -abs(value)
            layer(bad)
        assert bits(layer) == bits(spared)


def test_commit_takes_all_statistics_or_none() -> None:
    memory, kept = Moving("c", decay=0.5, unbiased=False), (torch.zeros(2), torch.ones(2))
    batches, skipped, two = torch.tensor(0), torch.tensor(0), torch.full((2,), 2.0)
    store = Store(kept, batches, skipped)
    for m2 in (torch.tensor([2.0, torch.inf]), torch.tensor([2.0, 6.0])):
        commit(memory, ("mean", "var"), store, Entry(two, torch.ones(2), m2, torch.ones(2)), least=2, owner="nobody")
        if m2.isinf().any():
            assert (kept[0].tolist(), kept[1].tolist(), batches.item(), skipped.item()) == ([0, 0], [1, 1], 0, 1)
    assert (kept[0].tolist(), kept[1].tolist(), batches.item(), skipped.item()) == ([0.5, 0.5], [1, 2], 1, 1)


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


def _block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nw.BatchNorm(4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_commits_once(reentrant: bool) -> None:
    plain = _block()
    recomputed = copy.deepcopy(plain)
    x = torch.randn(8, 3, requires_grad=True)
    plain(x).square().sum().backward()
    checkpoint(recomputed, x, use_reentrant=reentrant).square().sum().backward()
    assert plain[1].num_batches_tracked.item() == 1
    assert bits(plain) == bits(recomputed)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobians_of_a_training_layer(transform: type) -> None:
    x = torch.randn(4, 3)
    expected = transform(BatchNorm(3, track_running_stats=False))(x)
    layer = BatchNorm(3)
    check(transform(layer)(x).detach(), expected.detach(), VALUES)


def test_vmap_over_a_training_layer_equals_a_loop() -> None:
    xs = torch.randn(5, 8, 3)
    mapped, looped = BatchNorm(3), BatchNorm(3)
    ys = torch.func.vmap(mapped)(xs)
    check(ys, torch.stack([looped(x) for x in xs]), VALUES)


def test_statistics_do_not_carry_gradients() -> None:
    layer = BatchNorm(3)
    layer(torch.randn(4, 3, requires_grad=True))
    assert not layer.running_mean.requires_grad
    assert layer.running_mean.grad_fn is None
    leaf: Tensor = torch.randn(4, 3, requires_grad=True)
    layer.eval()(leaf).sum().backward()
    check(leaf.grad, (layer.running_var + 1e-5).rsqrt().expand(4, 3), VALUES)
