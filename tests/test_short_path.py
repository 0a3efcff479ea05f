"""The short way of a call like one before gives what the long way gives, in value, derivatives and memory."""

from __future__ import annotations

import copy
import pickle
from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import normwise as nw
from normwise import Average, Moving, Norm
from normwise.commit import Entry, Store, commit, commit_columns
from normwise.kernels import short_cpu
from tests.short_calls import assert_same, counted, every_layer, made, needs_kernels, outcome, the_long_way
from tests.test_memory import bits
from tests.tolerances import VALUES, check

pytestmark = needs_kernels


@every_layer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_taken_and_gives_the_same_bits(
    name: str, training: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = made(name)
    layer.to(dtype).train(training)
    twin = copy.deepcopy(layer)
    with counted(monkeypatch) as count:
        for step in range(3):
            batch = (x + step).to(dtype)
            found = outcome(layer, batch)
            with the_long_way():
                assert_same(found, outcome(twin, batch))
    assert count == [3]


@every_layer
def test_channels_last_is_another_call(name: str) -> None:
    layer, x = made(name)
    twin = copy.deepcopy(layer)
    lies = (
        x,
        x.transpose(0, -1).contiguous().transpose(0, -1),
        x[..., ::2].repeat_interleave(2, -1)[..., : x.shape[-1]],
    )
    for batch in (*lies, *lies):
        found = outcome(layer, batch)
        with the_long_way():
            assert_same(found, outcome(twin, batch))


# --- derivatives ----------------------------------------------------------------------------------------------------


def _of_gradient(layer: Norm, x: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    inputs = [leaf, *layer.parameters()]
    first = torch.autograd.grad(layer(leaf), inputs, torch.randn_like(x), create_graph=True)
    return list(torch.autograd.grad(sum((g * torch.randn_like(g)).sum() for g in first), [leaf, inputs[1]]))


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "BatchNorm of images", "time steps", "rms"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_second_derivatives(name: str, training: bool) -> None:
    layer, x = made(name)
    layer.train(training)(x)
    twin = copy.deepcopy(layer)
    found = _of_gradient(layer, x)
    with the_long_way():
        for a, b in zip(found, _of_gradient(twin, x), strict=True):
            assert torch.equal(a, b)


@every_layer
def test_many_cotangents_at_once(name: str) -> None:
    layer, x = made(name)
    leaf = x.requires_grad_()
    y = layer(leaf)
    cotangents = torch.randn(3, *x.shape)
    (mapped,) = torch.autograd.grad(y, leaf, cotangents, retain_graph=True, is_grads_batched=True)
    for one, cotangent in zip(mapped, cotangents, strict=True):
        check(one, torch.autograd.grad(y, leaf, cotangent, retain_graph=True)[0], VALUES)


@pytest.mark.parametrize("name", ["GroupNorm", "BatchNorm of images", "LayerNorm2d, gelu"])
def test_saved_inputs_that_come_back_in_another_order(name: str) -> None:
    layer, x = made(name)
    leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    cotangent = torch.randn_like(leaf)
    (plain,) = torch.autograd.grad(layer(leaf), leaf, cotangent)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(order="C"), torch.from_numpy):
        y = layer(leaf)
    assert torch.equal(torch.autograd.grad(y, leaf, cotangent)[0], plain)


def test_a_memory_that_moves_does_not_move_a_backward_before_it() -> None:
    layer, x = made("BatchNorm")
    leaf = x.requires_grad_()
    layer.eval()
    (expected,) = torch.autograd.grad(layer(leaf), leaf, torch.ones_like(x))
    y = layer(leaf)
    layer.running_var.mul_(9.0)
    assert torch.equal(torch.autograd.grad(y, leaf, torch.ones_like(x))[0], expected)
    assert not torch.equal(torch.autograd.grad(layer(leaf), leaf, torch.ones_like(x))[0], expected)


def test_a_memory_that_wants_a_gradient_gets_one() -> None:
    layer, x = made("BatchNorm")
    layer.eval()(x)
    var = layer.running_var.clone().requires_grad_()
    torch.func.functional_call(layer, {"running_var": var}, (x,))[0, 0].backward()
    assert var.grad[0] != 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of a script in its forward mode
def test_transforms_take_the_definition() -> None:
    layer, x = made("LayerNorm")
    expected = layer(x)
    check(torch.func.vmap(layer)(x), expected, VALUES)
    value, _ = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    check(value, expected, VALUES)


# --- memory ---------------------------------------------------------------------------------------------------------


def _memory(remembers: tuple[str, ...], scale: float) -> Store:
    buffers = tuple(torch.rand(33) * scale for _ in remembers)
    return Store(buffers, torch.tensor(3), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("remembers", [("mean", "var"), ("mean_square",)], ids=str)
@pytest.mark.parametrize("memory", [Moving("c", update_rate=0.1), Moving("c", decay=0.3, unbiased=False), Average("c")])
@pytest.mark.parametrize("scale", [1.0, 1e-40, 1e-30, 1e30])
def test_the_compiled_commit_is_the_other_bit_for_bit(
    remembers: tuple[str, ...], memory: Moving | Average, scale: float
) -> None:
    mean = torch.randn(33, dtype=torch.float64) * scale if "mean" in remembers else torch.zeros(33, dtype=torch.float64)
    m2 = torch.rand(33, dtype=torch.float64) * scale * 7
    compiled, other = (copy.deepcopy(store) for store in [_memory(remembers, scale)] * 2)
    for samples in (2, 7, 1000):
        rows = array("d", torch.cat([torch.full((33,), torch.nan), mean, m2]).tolist())
        assert commit_columns(memory, remembers, compiled, rows, samples, least=2)
        batch = Entry(torch.full_like(mean, samples), mean, m2, torch.ones_like(mean))
        commit(memory, remembers, other, batch, least=2, owner="")
        for a, b in zip(compiled.statistics, other.statistics, strict=True):
            assert a.numpy().tobytes() == b.numpy().tobytes()
        assert compiled.batches == other.batches


@pytest.mark.parametrize("row", [1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e39])
def test_the_compiled_commit_touches_nothing_if_a_number_is_not_finite(row: int, value: float) -> None:
    store = _memory(("mean", "var"), 1.0)
    before = [buffer.clone() for buffer in (*store.statistics, store.batches)]
    rows = torch.ones(3, 33, dtype=torch.float64)
    rows[row, 32] = value
    memory = Moving("c", update_rate=0.1)
    assert not commit_columns(memory, ("mean", "var"), store, array("d", rows.flatten().tolist()), 2, least=2)
    assert all(map(torch.equal, (*store.statistics, store.batches), before))
    assert [buffer._version for buffer in store.statistics] == [0, 0]


def test_autograd_sees_that_the_memory_has_changed() -> None:
    layer, x = made("BatchNorm")
    factor = torch.ones(6, requires_grad=True)
    product = (factor * layer.running_var).sum()
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_call_enters_once(reentrant: bool) -> None:
    layer, x = made("BatchNorm")
    plain = copy.deepcopy(layer)
    leaf = x.requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, leaf, use_reentrant=reentrant).square().sum().backward()
    plain(x)
    assert bits(layer) == bits(plain)


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_what_is_kept_is_bounded_and_no_part_of_the_declaration() -> None:
    layer, x = made("LayerNorm")
    declared, text = copy.deepcopy(layer.spec), repr(layer.spec)
    for rows in range(1, 300):
        check(layer(torch.ones(rows, 16)), layer.bias.detach().expand(rows, 16), VALUES)
    assert 0 < len(layer.spec.ready) <= 256
    assert layer.spec == declared
    assert hash(layer.spec) == hash(declared)
    assert repr(layer.spec) == text
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.spec.ready == {}
        assert torch.equal(copied(x), layer(x))


def test_many_columns_take_the_long_way() -> None:
    layer = nw.LayerNorm(4)
    layer(torch.randn(short_cpu.MOST_COLUMNS, 4)), layer(torch.randn(short_cpu.MOST_COLUMNS + 1, 4))
    columns = [None if ready is None else ready.kernel.columns for ready in layer.spec.ready.values()]
    assert columns == [short_cpu.MOST_COLUMNS, None]


def test_threads_share_a_layer() -> None:
    layer, _ = made("LayerNorm")
    batches = [torch.randn(1 + index % 40, 16) for index in range(400)]
    with the_long_way():
        expected = [layer(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, known in zip(pool.map(layer, batches), expected, strict=True):
            assert torch.equal(found, known)
