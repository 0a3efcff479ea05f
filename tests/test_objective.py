"""The loss as a function of the parameters alone, and how batches are read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import normwise as nw
from normwise.batches import moved
from normwise.diagnose.objective import Objective, measuring, read, weight_norm
from normwise.errors import DiagnosisError


def net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 2))


def data(*rows: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 3), torch.arange(n) % 2) for n in rows]


def test_batches_weigh_by_their_rows() -> None:
    model, given = net().eval(), data(4, 12)
    with measuring(model, "eval"):
        found = Objective(model, given, cross_entropy).value()
    joined = tuple(torch.cat(parts) for parts in zip(*given, strict=True))
    assert found == pytest.approx(cross_entropy(model(joined[0]), joined[1]).item(), rel=1e-6)


def test_every_evaluation_begins_with_the_same_memory_and_random_numbers() -> None:
    model, given = net(), data(8, 8)
    with measuring(model, "train"):
        objective = Objective(model, given, cross_entropy)
        first, seen = objective.value(), objective.gradient()
        torch.rand(5)
        assert objective.value() == first
        assert torch.equal(objective.gradient(), seen)
        twice = Objective(model, [given[0], given[0]], cross_entropy)
        assert len({loss.item() for loss, _ in twice.losses()}) == 1


def test_an_evaluation_leaves_memory_and_random_numbers_as_they_were() -> None:
    model, given = net(), data(8, 8)
    with measuring(model, "train"):
        objective = Objective(model, given, cross_entropy)
        state, mean = torch.get_rng_state(), model[1].running_mean.clone()
        objective.gradient()
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(model[1].running_mean, mean)


def test_an_embedding_that_a_forward_scales_moves_with_the_others() -> None:
    torch.manual_seed(0)
    model, ids = nn.Embedding(5, 2, max_norm=100.0), torch.arange(5)
    objective = Objective(model, [ids], lambda output, _: output.square().sum())
    vector = torch.randn(objective.size)
    with objective.moved(vector):
        assert objective.value() == pytest.approx(model.weight.square().sum().item(), rel=1e-6)
    torch.testing.assert_close(objective.gradient_change(vector, 0.1), 2 * vector, atol=1e-5, rtol=1e-4)


def test_an_autocast_around_it_does_not_keep_weights_from_before_a_move() -> None:
    model, batch = nn.Linear(3, 1, bias=False), (torch.ones(1, 3), torch.zeros(1, 1))
    objective = Objective(model, [batch], lambda output, _: output.sum())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            here = objective.value_and_gradient()[0]
            with objective.moved(torch.ones(3)):
                assert objective.value_and_gradient()[0] == pytest.approx(here + 3, abs=0.05)


def test_complex_parameters_are_refused() -> None:
    model = nn.Linear(3, 1, dtype=torch.complex64)
    with pytest.raises(DiagnosisError) as caught:
        Objective(model, data(4))
    assert str(caught.value) == "a parameter is complex: hold its real and imaginary parts (torch.view_as_real)"


def test_vectors_and_parameters() -> None:
    model = nn.ModuleList([nn.Linear(2, 3, dtype=torch.float64), nn.Linear(3, 1)])
    objective = Objective(model, data(2), cross_entropy)
    assert (objective.size, objective.dtype) == (13, torch.float64)
    vector = torch.arange(13, dtype=torch.float64)
    parts = objective.parts(vector)
    assert [part.shape for part in parts] == [p.shape for p in model.parameters()]
    assert [part.dtype for part in parts] == [torch.float64] * 2 + [torch.float32] * 2
    assert torch.equal(objective.flat(parts), vector)
    assert torch.equal(objective.flat([None, *parts[1:]])[:6], torch.zeros(6, dtype=torch.float64))
    squares = [float(p.detach().square().sum()) for p in model.parameters()]
    assert objective.distance() == pytest.approx(math.sqrt(sum(squares)))


def test_moved_parameters_come_back_bit_for_bit() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    objective = Objective(model, data(4), cross_entropy)

    def interrupted() -> None:
        with objective.moved(1e10 * torch.ones(objective.size)):
            assert not torch.equal(model[0].weight, before[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))


def test_a_product_by_differences_is_the_exact_one_on_a_quadratic() -> None:
    model, given = nn.Linear(3, 1), (torch.randn(9, 3), torch.randn(9, 1))
    objective = Objective(model, [given], mse_loss)
    vector = torch.randn(objective.size)
    exact = objective.hessian_times(vector)
    torch.testing.assert_close(objective.gradient_change(vector, 0.1), exact, atol=1e-5, rtol=1e-4)
    x = torch.cat([given[0], torch.ones(9, 1)], dim=1)
    torch.testing.assert_close(exact, 2 * x.T @ x @ vector / 9, atol=1e-5, rtol=1e-5)


def test_a_parameter_that_is_not_reached_has_a_gradient_of_zero() -> None:
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(7, 7)])
    objective = Objective(model, data(4), cross_entropy, forward=lambda m, batch: m[0](batch[0]))
    assert not objective.gradient()[8:].any()
    assert objective.gradient()[:8].any()
    assert not objective.hessian_times(torch.ones(objective.size))[8:].any()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * cotangent


def test_what_is_marked_as_differentiable_once_is_found() -> None:
    """Autograd itself leaves it out of the product without a word."""
    model = nn.Linear(3, 2)
    objective = Objective(model, data(4), lambda output, _: Once.apply(output).square().mean())
    assert objective.hessian_times(torch.ones(8)).isfinite().all()
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        objective.require_second_derivatives()
    Objective(model, data(4), cross_entropy).require_second_derivatives()


def test_weights_are_what_has_two_dimensions() -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 3, bias=False), nn.BatchNorm1d(1))
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    assert weight_norm(model.parameters()) == pytest.approx(math.sqrt(12))


# ------------------------------------------------------------------------------------------------------------ reading


def test_one_batch_or_several() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    assert read((x, y)) == [(x, y)]
    assert read(x)[0] is x
    assert read({"x": x}) == [{"x": x}]
    assert read([(x, y), (y, x)]) == [(x, y), (y, x)]
    assert read([(x, y), (y, x)], 1) == [(x, y)]


def test_a_loader_is_read_once_and_its_own_iterator_goes_on() -> None:
    loader = DataLoader(TensorDataset(torch.arange(12.0)), 4, num_workers=1, persistent_workers=True)
    coming = iter(loader)
    next(coming)
    with measuring(nn.Identity(), "train", batches=loader):
        assert [batch[0].tolist() for batch in read(loader, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [batch[0].tolist() for batch in coming] == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_workers_that_stay_are_not_begun() -> None:
    loader = DataLoader(TensorDataset(torch.arange(12.0)), 4, num_workers=1, persistent_workers=True)
    assert len(read(loader)) == 3
    assert loader._iterator is None


def test_a_packed_sequence_moves_with_its_order() -> None:
    packed = pack_sequence([torch.ones(2), torch.ones(5)], enforce_sorted=False)
    given = moved(packed, torch.device("meta"))
    assert {part.device.type for part in (given.data, given.sorted_indices, given.unsorted_indices)} == {"meta"}
    assert given.batch_sizes.device.type == "cpu"  # where torch wants it
    ordered = pack_sequence([torch.ones(2)])
    assert moved(ordered, torch.device("cpu")).sorted_indices is None


def test_an_iterable_dataset() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.arange(6.0))

    assert [batch.tolist() for batch in read(DataLoader(Stream(), 4), 1)] == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no batches to measure with"),
        (
            (b for b in []),
            "batches is a generator, whose batches would be lost: give a list, or the loader itself",
        ),
        (None, "batches is a NoneType: give a batch, a list of batches or a loader"),
    ],
)
def test_what_cannot_be_read(batches: Any, message: str) -> None:
    with pytest.raises(DiagnosisError) as caught:
        read(batches)
    assert str(caught.value) == message


# ------------------------------------------------------------------------------------------- what is given to a measure


def test_what_a_loader_yields_is_one_batch_and_a_stream_is_many() -> None:
    x, labels = torch.randn(8, 3), torch.zeros(8, dtype=torch.long)
    assert len(read([x, labels])) == 1
    assert len(read([x, torch.randn(8)])) == 1
    assert len(read([x, torch.randn(5, 3)])) == 2
    assert len(read([x, torch.randn(8, 4)])) == 2  # sequences of other lengths are a stream, too
    assert len(read([(x, labels), (x, labels)])) == 2
    loader = DataLoader(TensorDataset(x, labels), 4)
    model = nn.Linear(3, 2)
    one = nw.sharpness(model, next(iter(loader)), nn.functional.cross_entropy)
    assert one.largest == nw.sharpness(model, [tuple(next(iter(loader)))], nn.functional.cross_entropy).largest


def test_the_current_mode_leaves_a_frozen_norm_frozen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].eval()
    batch = torch.randn(8, 3) * 3, torch.zeros(8, dtype=torch.long)
    found = {mode: nw.sharpness(model, batch, nn.functional.cross_entropy, mode=mode) for mode in ("current", "train")}
    model.eval()
    frozen = nw.sharpness(model, batch, nn.functional.cross_entropy, mode="eval").largest.value
    assert found["current"].largest.value == pytest.approx(frozen)
    assert found["train"].largest.value != pytest.approx(frozen, rel=0.05)


def test_inference_mode_is_left_for_a_while() -> None:
    model, batch = nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
    outside = nw.sharpness(model, batch, nn.functional.mse_loss)
    with torch.inference_mode():
        assert nw.sharpness(model, batch, nn.functional.mse_loss).largest == outside.largest
        assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("model", "loss", "text"),
    [
        ([1], None, "model is a list, not a torch.nn.Module"),
        (None, "mse", "loss is 'mse': give a function called as loss(output, target)"),
        (
            None,
            nn.MSELoss,
            "loss is the class MSELoss: give an instance of it, a function called as loss(output, target)",
        ),
    ],
)
def test_arguments_that_are_something_else(model: object, loss: object, text: str) -> None:
    with pytest.raises(DiagnosisError) as caught:
        nw.smoothness(model or nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1)), loss)  # type: ignore[arg-type]
    assert str(caught.value) == text
