"""What the operations on memories, policies and masks do to each other, as found by use."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import normwise as nw
from normwise import Affine, BatchNorm, GroupNorm, InstanceNorm, LayerNorm, LayerNorm2d, Moving, Norm, NormwiseError
from tests.tolerances import EXACT, VALUES, check


def test_sub_batches_are_accumulated_as_their_batch() -> None:
    x = torch.randn(16, 3) * 3 + 1
    divided = Norm("[n] c", memory=Moving("c", update_rate=1.0, ghost=4))
    with nw.accumulate(divided, 2):
        divided(x[:8])
        assert divided.num_batches_tracked.item() == 0
        divided(x[8:])
        assert divided.num_batches_tracked.item() == 1
    check(divided.running_mean, x.mean(0), VALUES)
    check(divided.running_var, x.var(0), VALUES)
    assert divided.num_batches_tracked.item() == 1


def test_a_model_that_saw_batches_of_domains_only_is_not_evaluated_outside_of_them() -> None:
    model = nn.Sequential(nn.Identity(), BatchNorm(3))
    for name in ("day", "night"):
        with nw.domain(model, name):
            model(torch.randn(8, 3))
    model.eval()
    with pytest.raises(NormwiseError) as caught:
        model(torch.randn(8, 3))
    assert str(caught.value) == (
        "1: every batch was of a domain, and none is in use: evaluate within nw.domain(model, ...), one of day, night"
    )
    with nw.domain(model, "day"):
        assert model(torch.randn(8, 3)).shape == (8, 3)


def test_a_column_with_one_sample_in_a_micro_batch_counts_among_all() -> None:
    pooled, joined = (Norm("[n] t c", memory=Moving("t c", update_rate=1.0, beyond={"t": "last"})) for _ in range(2))
    x, lengths = torch.randn(4, 2, 3), torch.tensor([2, 1, 2, 1])
    joined(x, lengths={"t": lengths})
    with nw.accumulate(pooled, 2):
        for part, counts in zip(x.split(2), lengths.split(2), strict=True):
            pooled(part, lengths={"t": counts})
    check(pooled.running_mean, joined.running_mean, VALUES)
    check(pooled.running_var, joined.running_var, VALUES)
    assert pooled.num_batches_tracked.tolist() == joined.num_batches_tracked.tolist() == [1, 1]


@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
def test_a_large_mean_does_not_blur_what_is_accumulated(mean: float) -> None:
    x = torch.randn(64, 3) + mean
    norm = Norm("[n] c", memory=Moving("c", update_rate=1.0))
    with nw.accumulate(norm, 8):
        for part in x.split(8):
            norm(part)
    check(norm.running_var.double(), x.double().var(0), EXACT)


def test_what_float32_cannot_hold_does_not_enter_from_float64() -> None:
    layer = BatchNorm(2)
    layer(torch.randn(8, 2, dtype=torch.float64) * 1e30)
    assert layer.running_var.tolist() == [1.0, 1.0]
    assert layer.skipped_batches.item() == 1


def test_what_waits_in_a_gradient_waits_until_the_layer_is_unfrozen() -> None:
    model = nn.Sequential(nn.Linear(3, 4), BatchNorm(4))
    model(torch.randn(8, 3)).square().sum().backward()
    waiting = model[1].weight.grad.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nw.freeze(model):
        before = model[1].weight.detach().clone()
        optimizer.step()
        assert torch.equal(model[1].weight, before)
    assert torch.equal(model[1].weight.grad, waiting)


def test_freezings_undone_in_another_order() -> None:
    layer = BatchNorm(3)
    first, second = nw.freeze(layer), nw.freeze(layer)
    first.undo()
    assert layer.frozen
    second.undo()
    assert not layer.frozen
    assert layer.weight.requires_grad


def test_a_frozen_memory_is_not_wiped() -> None:
    layer = BatchNorm(3)
    layer(torch.randn(8, 3) + 5)
    kept = layer.running_mean.clone()
    with nw.freeze(layer):
        torch.optim.swa_utils.update_bn([torch.randn(8, 3)], layer)
        layer.reset_parameters()
        assert torch.equal(layer.running_mean, kept)


def test_parametrized_weights_are_frozen_and_start_anew() -> None:
    layer = nn.utils.parametrizations.weight_norm(BatchNorm(3), "weight", dim=0)
    layer.reset_parameters()
    change = nw.freeze(layer)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    change.undo()
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_a_domain_that_nothing_entered_is_no_domain() -> None:
    layer = BatchNorm(3)
    layer(torch.randn(8, 3))
    with nw.domain(layer, "nigth"):
        pass
    assert layer.domains == ()
    with nw.domain(layer, "night"):
        layer.eval()
        with pytest.raises(NormwiseError, match=r"^domain 'night' was never trained; there are: none$"):
            layer(torch.randn(8, 3))


@pytest.mark.parametrize(
    ("name", "value", "words"), [("running_mean", torch.nan, "nan"), ("running_var", torch.inf, "inf")]
)
def test_a_checkpoint_that_is_not_finite_is_refused(name: str, value: float, words: str) -> None:
    given = BatchNorm(3).state_dict()
    given[name][1] = value
    with pytest.raises(RuntimeError, match=f"{name} is not finite in channel 1: {words}"):
        BatchNorm(3).load_state_dict(given)


def test_a_batch_that_is_not_finite_is_not_kept_alive() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model = nn.Sequential(BatchNorm(3))

        def step(self) -> weakref.ref[torch.Tensor]:
            batch = torch.full((4, 3), torch.nan)
            with pytest.warns(UserWarning, match="^0: the batch's statistics are not finite"):
                self.model(batch)
            found = weakref.ref(batch)
            del batch
            gc.collect()
            assert found() is None
            return found

    Trainer().step()


@pytest.mark.parametrize("magnitude", [1e-15, 1e-20, 1e-30])
@pytest.mark.parametrize(
    "make", [lambda: LayerNorm(64, 0.0), lambda: nw.RMSNorm(64, 0.0)], ids=["LayerNorm", "RMSNorm"]
)
def test_without_an_eps_tiny_values_are_normalized_as_any(make: Callable[[], nn.Module], magnitude: float) -> None:
    x = torch.randn(4, 64)
    check(make()(x * magnitude), make()(x), VALUES)


def test_one_row_is_mapped_where_memory_stands_in_for_it() -> None:
    layer = BatchNorm(3, degenerate="memory")
    layer(torch.randn(8, 3) + 2)
    x = torch.randn(5, 1, 3)
    expected = torch.stack([layer(row) for row in x])
    check(torch.func.vmap(layer)(x).detach(), expected.detach(), VALUES)
    assert layer.num_batches_tracked.item() == 1


def test_a_batch_of_one_sequence_uses_the_declared_fallback() -> None:
    norm = Norm("[n] t c", memory=Moving("t c", decay=0.5, beyond={"t": "last"}))
    norm(torch.randn(8, 5, 3) * 3 + 2)
    x = torch.randn(1, 7, 3)
    assert torch.equal(norm(x), norm.eval()(x))
    assert norm.num_batches_tracked.tolist() == [1] * 5


def test_padding_past_the_remembered_steps_is_not_refused() -> None:
    norm = Norm("[n] t c", memory=Moving("t c", decay=0.5, beyond={"t": "raise"}))
    norm(torch.randn(8, 5, 3))
    norm.eval()
    x = torch.randn(2, 9, 3)
    check(norm(x, lengths={"t": [5, 4]})[0, :5], norm(x[:, :5])[0], VALUES)
    with pytest.raises(nw.ShapeError, match="places within the first 9 that no batch has entered"):
        norm(x, lengths={"t": [6, 4]})


POLICIES = [BatchNorm(3), InstanceNorm(3, track_running_stats=True), Norm("[n] c", memory=Moving("c", decay=0.9), c=3)]


@pytest.mark.parametrize("layer", POLICIES[:2], ids=["BatchNorm", "InstanceNorm"])
def test_policies_can_be_changed_and_are_shown(layer: BatchNorm) -> None:
    layer.degenerate, layer.nonfinite = "memory", "raise"
    assert repr(layer).endswith("unbiased variance; nonfinite: raise; degenerate: memory)")
    x = torch.randn(1, 3) if isinstance(layer, BatchNorm) else torch.randn(2, 3, 1)
    assert torch.equal(layer.train()(x), layer.eval()(x))
    layer.momentum = 0.5
    assert (layer.degenerate, layer.nonfinite) == ("memory", "raise")
    with pytest.raises(nw.NonFiniteError):
        layer.train()(torch.full((4, 3, 2), torch.nan))
    with pytest.raises(ValueError, match=r"^degenerate is one of 'raise', 'memory', not 'ignore'$"):
        layer.degenerate = "ignore"


def test_a_frozen_layer_says_so() -> None:
    layer = BatchNorm(3)
    nw.freeze(layer)
    assert "; frozen now)" in repr(layer)


CHANNELS_FIRST = [BatchNorm(6), InstanceNorm(6), GroupNorm(2, 6), LayerNorm2d(6)]


@pytest.mark.parametrize("layer", CHANNELS_FIRST, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6, 5, 3)], ids=str)
def test_named_layers_take_a_mask_over_positions(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    valid = torch.rand(shape[0], *shape[2:]) > 0.4
    valid[:, :2] = True
    y = layer(x, valid=valid, valid_axes="n ...")
    everywhere = valid.unsqueeze(1).expand(shape)
    check(layer(x, valid=everywhere), y, VALUES)
    assert not y[~everywhere].any()


def test_named_layers_take_lengths_of_their_only_position() -> None:
    x = torch.randn(4, 6, 5)
    for layer in CHANNELS_FIRST:
        valid = torch.arange(5) < torch.tensor([5, 4, 3, 2]).unsqueeze(1)
        expected = layer(x, valid=valid, valid_axes="n ...")
        assert torch.equal(layer(x, lengths={"...": [5, 4, 3, 2]}), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lengths": [5, 4]}, r"^lengths is \[5, 4\], and says for each axis how many places count: {'t': \[5, 3\]}$"),
        ({"valid": [True, False]}, "^valid is list, and a mask of what counts is a bool tensor: "),
        ({"valid": torch.ones(2, dtype=torch.bool), "valid_axes": ("n",)}, r"^valid_axes is \('n',\), and names axes"),
    ],
)
def test_masks_of_another_kind(given: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Norm("[n] c")(torch.randn(2, 3), **given)


def test_an_input_that_is_no_tensor() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 2, 4), torch.tensor([3, 2]))
    with pytest.raises(TypeError, match=r"^input is PackedSequence, not a tensor; a packed sequence is padded first$"):
        Norm("[n t] c", recovery=Affine("c"))(packed)
