"""Recalibration: the statistics of all batches joined, in float64, whatever the layer, the batch and the model."""

from __future__ import annotations

import copy
import json
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, update_bn

import normwise as nw
from normwise import Affine, Average, BatchNorm, InstanceNorm, Moving, Norm, Renorm, SurgeryError
from normwise.surgery.recalibrate import recalibrate
from tests.recalibrated import SIZES, both_ways, check_memory, data, deep, every_layer, memory, state, truth
from tests.timm_like import BatchNormAct2d
from tests.tolerances import EXACT, MEMORY, VALUES, check


@both_ways
@every_layer
def test_batches_of_3_5_and_8_rows_give_the_statistics_of_the_16(
    make: Callable[[], nn.Module], layerwise: bool
) -> None:
    layer, x = make(), data(16, 4)
    layer(torch.randn(8, 4) - 20)
    kept = list(layer._buffers.values())
    model = nn.Sequential(nn.Identity(), layer)
    record = recalibrate(model, x.split(SIZES), layerwise=layerwise)
    check_memory(layer, x)
    assert model[1] is layer
    assert [buffer is before for buffer, before in zip(layer._buffers.values(), kept, strict=True)] == [True] * len(
        kept
    )
    assert layer.num_batches_tracked.item() == 3
    assert (record.operation, record.model is model, record.paths, record.left) == ("recalibrate", True, ("1",), ())
    assert record.changed[0].why.startswith("16 samples a statistic in 3 batches; mean moved by at most ")


def test_biased_variance_and_mean_square() -> None:
    biased = Norm("[n] c", memory=Moving("c", decay=0.9, unbiased=False), c=4)
    square = Norm("[n] c", nw.RMS(), memory=Moving("c", decay=0.9), c=4)
    x = data(16, 4)
    for layer in (biased, square):
        recalibrate(layer, x.split(SIZES))
    check_memory(biased, x, unbiased=False)
    check(square.running_mean_square.double(), x.double().square().mean(0), MEMORY)


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_a_large_mean_does_not_blur_the_variance(mean: float) -> None:
    x = torch.randn(64, 4) + mean
    layer = nn.BatchNorm1d(4)
    recalibrate(layer, x.split([30, 2, 32]))
    check(layer.running_var.double(), x.double().var(0), EXACT)


def test_maps_and_instances() -> None:
    x = data(16, 4, 5, 3)
    images, instances, ours = (
        nn.BatchNorm2d(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        InstanceNorm(4, track_running_stats=True),
    )
    for layer in (images, instances, ours):
        recalibrate(layer, x.split(SIZES))
    check_memory(images, x.transpose(0, 1).flatten(1).T)
    wide = x.double().flatten(2)
    for layer in (instances, ours):  # averages of the examples' own statistics, and nobody counts, as in torch
        check(layer.running_mean.double(), wide.mean(2).mean(0), MEMORY)
        check(layer.running_var.double(), wide.var(2).mean(0), MEMORY)
        assert layer.num_batches_tracked.item() == 0


@both_ways
@pytest.mark.parametrize("ours", [False, True], ids=["torch", "ours"])
def test_a_deep_net_layer_by_layer_in_float64(ours: bool, layerwise: bool) -> None:
    model, batches = deep(ours).train(), list(data(16, 4).split(SIZES))
    recalibrate(model, batches, layerwise=layerwise)
    seen = 0
    with torch.no_grad():
        for layer, mean, var in truth(model, batches, layerwise=layerwise):
            check(layer.running_mean.double(), mean, MEMORY)
            check(layer.running_var.double(), var, MEMORY)
            seen += 1
    assert seen == 3


def test_the_two_ways_differ_from_the_second_layer_on() -> None:
    batches = list(data(16, 4).split(SIZES))
    one, other = deep(), deep()
    other.load_state_dict(one.state_dict())
    recalibrate(one, batches), recalibrate(other, batches, layerwise=True)
    differences = [float((one[at].running_var - other[at].running_var).abs().max()) for at in (1, 5, 9)]
    assert differences[0] < 1e-6
    assert min(differences[1:]) > 1e-3


def test_in_one_pass_as_update_bn_where_batches_are_equal_in_size() -> None:
    """The means and the counts; torch averages the variances, which leaves out how the means of batches differ."""
    model, batches = deep().eval(), list(data(24, 4).split(8))
    theirs = copy.deepcopy(model)
    recalibrate(model, batches)
    theirs.train()
    for layer in theirs:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    update_bn(batches, theirs)
    for at in (1, 5, 9):
        check(model[at].running_mean, theirs[at].running_mean, MEMORY)
        assert torch.equal(model[at].num_batches_tracked, theirs[at].num_batches_tracked)


class Recorded(nn.Module):
    """Takes down what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        self.rows = [*getattr(self, "rows", []), x.detach()]
        return x


def test_layer_by_layer_every_memory_is_what_the_layer_sees_in_evaluation() -> None:
    """Through a recurrent net, which computes with its norms itself and never calls some of them."""
    memory = Moving("t c", decay=0.9, beyond={"t": "last"})
    lstm = nw.LSTM(3, 4, num_layers=2, norm=Norm("[n] t c", recovery=Affine("c"), memory=memory))
    recorded = Recorded()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.recorded = nn.BatchNorm1d(4), recorded  # registered before what it comes after
            self.lstm = lstm

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recorded(self.lstm(x)[0][-1]))

    model, x = Net(), data(16, 5, 3)
    batches = [part.transpose(0, 1) for part in x.split(SIZES)]
    model(batches[2])  # sizes, and lengths of memories
    record = recalibrate(model, batches, layerwise=True)
    assert len(record.changed) == 7
    assert record.left == ()
    model.eval()
    recorded.rows = []
    with torch.no_grad():
        for batch in batches:
            model(batch)
    check_memory(model.head, torch.cat(recorded.rows))
    inner = lstm.norms["ih_l0"]
    gates = x.double() @ lstm.weight_ih_l0.detach().double().T
    check_memory(inner, gates)
    assert set(inner.num_batches_tracked.reshape(-1).tolist()) == {3}


Pair = namedtuple("Pair", ["input", "target"])


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.norm(x if scale is None else x * scale)


BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, torch.zeros(len(x))),
    "list": lambda x: [x, torch.zeros(len(x))],
    "named tuple": lambda x: Pair(x, torch.zeros(len(x))),
    "mapping": lambda x: {"x": x / 2, "scale": torch.tensor(2.0)},
    "mapping and target": lambda x: ({"x": x / 2, "scale": torch.tensor(2.0)}, torch.zeros(len(x))),
    "object": lambda x: {"rows": [x]},
}


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_any_kind_of_batch(make: Callable[[Tensor], Any]) -> None:
    model, x = Keywords(), data(16, 4)
    forward = (lambda m, batch: m(batch["rows"][0])) if make is BATCHES["object"] else None
    recalibrate(model, [make(part) for part in x.split(SIZES)], forward=forward)
    check_memory(model.norm, x)


def test_the_loss_before_and_after() -> None:
    """Of 16 rows, not of three batches, in evaluation mode, with the second element as the target."""
    model, x, targets = deep(), data(16, 4), torch.randn(16, 2)
    batches = list(zip(x.split(SIZES), targets.split(SIZES), strict=True))

    def expected() -> float:
        with torch.no_grad():
            twin = copy.deepcopy(model).eval()
            return float(nn.functional.mse_loss(twin(x).double(), targets.double()))

    before = expected()
    record = recalibrate(model.train(), batches, loss=nn.functional.mse_loss)
    after = expected()
    assert record.measured == pytest.approx({"loss_before": before, "loss_after": after}, rel=1e-5)
    assert abs(before - after) > 1e-3
    assert record.notes == (
        f"mean loss in evaluation: {record.measured['loss_before']:.6g} before, "
        f"{record.measured['loss_after']:.6g} after",
    )
    assert json.loads(record.to_json())["measured"] == record.measured
    assert recalibrate(model, batches).measured == {}


def test_the_loss_of_other_batches_is_given_the_batch() -> None:
    model, given = Keywords(), []
    batches = [{"x": part} for part in data(16, 4).split(SIZES)]

    def loss(output: Tensor, batch: Any) -> float:
        given.append(batch)
        return float(len(output))

    record = recalibrate(model, batches, loss=loss)
    assert [list(batch) for batch in given] == [["x"]] * 6
    assert record.measured["loss_before"] == (9 + 25 + 64) / 16


class Masked(nn.Module):
    """A model that knows what is padding."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.norm(x, lengths={"t": lengths})


@both_ways
def test_padding_does_not_count(layerwise: bool) -> None:
    x, lengths = data(16, 6, 4), torch.randint(2, 7, (16,))
    valid = torch.arange(6) < lengths[:, None]
    x[~valid] = torch.nan
    model = Masked(Norm("[n t] c", memory=Moving("c", decay=0.9), c=4))
    batches = [{"x": part, "lengths": n} for part, n in zip(x.split(SIZES), lengths.split(SIZES), strict=True)]
    record = recalibrate(model, batches, layerwise=layerwise)
    check_memory(model.norm, x[valid])
    assert record.changed[0].why.startswith(f"{int(valid.sum())} samples a statistic in 3 batches; ")


def per_step(length: int) -> Norm:
    norm = Norm("[n] t c", memory=Average("t c", beyond={"t": "last"}), c=4)
    norm(torch.randn(8, length, 4))
    norm(torch.randn(8, length, 4))
    return norm


def test_every_step_has_the_statistics_of_what_reached_it() -> None:
    """Grown where the batches are longer, left where they are shorter, counted step by step; undone, it is as short."""
    norm, short, long = per_step(6), data(8, 3, 4), data(8, 5, 4)
    old = memory(norm)
    before = state(norm)
    record = recalibrate(norm, [short, long, short])
    for step in range(5):
        rows = torch.cat([long[:, step], *([short[:, step]] * 2 if step < 3 else [])]).double()
        check(norm.running_mean[step].double(), rows.mean(0), MEMORY)
        check(norm.running_var[step].double(), rows.var(0), MEMORY)
    assert torch.equal(norm.running_mean[5], old[0][5])
    assert norm.num_batches_tracked.tolist() == [3, 3, 3, 1, 1, 2]
    assert record.changed[0].why.startswith("8 to 24 samples a statistic in 3 batches; ")
    record.undo()
    assert state(norm) == before
    record = recalibrate(norm, [data(8, 9, 4), short])
    assert norm.num_batches_tracked.tolist() == [2] * 3 + [1] * 6
    record.undo()
    assert state(norm) == before


def test_a_domain_has_its_memory_replaced_and_no_other() -> None:
    model, day, night = nn.Sequential(BatchNorm(4)), data(16, 4), data(16, 4) - 7
    model(day)
    before = memory(model[0])
    with nw.domain(model, "night"):
        record = recalibrate(model, night.split(SIZES), layerwise=True)
    check_memory(model[0]._held_by("night"), night)
    assert all(map(torch.equal, memory(model[0]), before))
    assert record.changed[0].why.startswith("domain 'night': 16 samples a statistic in 3 batches; ")

    def forward(m: nn.Module, batch: tuple[Tensor, str]) -> Tensor:
        with nw.domain(m, batch[1]):
            return m(batch[0])

    recalibrate(model, [(day, "night")], forward=forward)
    check_memory(model[0]._held_by("night"), day)
    before = state(model)
    with pytest.raises(SurgeryError) as caught:
        recalibrate(model, [(day, "noon")], forward=forward)
    assert str(caught.value) == (
        "0: domain 'noon' was never trained, and would come into being within recalibrate: call it within "
        "nw.domain(model, 'noon'), in training mode"
    )
    assert state(model) == before


def test_an_average_goes_on_from_the_batches_that_it_has() -> None:
    layer, batches = nn.BatchNorm1d(4, momentum=None), list(data(16, 4).split(SIZES))
    recalibrate(layer, batches)
    mean, x = layer.running_mean.clone(), torch.randn(8, 4)
    layer.train()(x)
    check(layer.running_mean, (3 * mean + x.mean(0)) / 4, VALUES)


def test_renormalization_corrects_nothing_and_its_schedule_goes_on() -> None:
    norm = Norm("[n] c", memory=Moving("c", decay=0.9, renorm=Renorm(warmup=2)), c=4)
    for _ in range(5):
        norm(torch.randn(8, 4) * 100)
    model, x = nn.Sequential(norm, nn.BatchNorm1d(4)), data(16, 4)
    recalibrate(model, x.split([8, 8]))
    check_memory(norm, x)
    assert norm.num_batches_tracked == 5
    halves = [(h.double() - h.double().mean(0)) / (h.double().var(0, unbiased=False) + 1e-5).sqrt() for h in x.split(8)]
    check_memory(model[1], torch.cat(halves))


def test_after_weight_averaging() -> None:
    model, batches = deep(), list(data(16, 4).split(SIZES))
    averaged = AveragedModel(model)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        averaged.update_parameters(model)
    recalibrate(averaged, batches, layerwise=True)
    for layer, mean, var in truth(averaged.module, batches, layerwise=True):
        check(layer.running_mean.double(), mean.detach(), MEMORY)
        check(layer.running_var.double(), var.detach(), MEMORY)
    assert averaged.n_averaged == 3


def test_after_pruning() -> None:
    model, batches = deep(), list(data(16, 4).split(SIZES))
    prune.random_unstructured(model[0], "weight", 0.5)
    recalibrate(model, batches)
    with torch.no_grad():
        check_memory(model[1], model[0](torch.cat(batches)))
    assert prune.is_pruned(model)
    assert (model[0].weight == 0).sum() == 8


def test_a_shared_layer_stays_one_and_sees_what_all_calls_give_it() -> None:
    shared, x = nn.BatchNorm1d(4), data(16, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    record = recalibrate(model, x.split(SIZES), forward=lambda m, part: (m["a"](part), m["b"](part + 5)))
    check_memory(shared, torch.cat([x, x + 5]))
    assert model["b"][0] is model["a"] is shared
    assert shared.num_batches_tracked == 6  # as many as it would count in training
    assert record.paths == ("a",)


@pytest.mark.parametrize("make", [nn.BatchNorm1d, BatchNorm])
def test_a_layer_in_a_plain_list(make: Callable[[int], nn.Module]) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = (make(4).eval(),)

        def forward(self, x: Tensor) -> Tensor:
            return self.norms[0](x)

    model, x = Listed(), data(16, 4)
    layer = model.norms[0]
    before = state(layer)
    record = recalibrate(model, x.split(SIZES))
    check_memory(layer, x)
    assert (record.paths, model.norms[0] is layer, layer.training) == (("norms[0]",), True, False)
    record.undo()
    assert state(layer) == before


def test_an_activation_and_a_dropout_within_a_layer() -> None:
    """The dropout is off although its layer is measured, and the layer stays what it was."""
    model, x = nn.Sequential(BatchNormAct2d(4, drop=nn.Dropout(0.5)), nn.BatchNorm2d(4)), data(16, 4, 3, 2)
    layer = model[0]
    recalibrate(model, [x])
    assert model[0] is layer
    assert all(module.training for module in model.modules())
    rows = x.transpose(0, 1).flatten(1).T
    check_memory(layer, rows)
    normalized = (rows.double() - rows.double().mean(0)) / (rows.double().var(0, unbiased=False) + 1e-5).sqrt()
    check_memory(model[1], normalized.clamp_min(0))
