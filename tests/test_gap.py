"""The gap between training and evaluation: losses by hand, and each cause found where it was put."""

from __future__ import annotations

import json
import math
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw
from normwise import Affine, BatchNorm, Moving, Norm
from normwise.diagnose.memories import CAUSES
from normwise.errors import DiagnosisError, TooFewSamplesError
from tests.architectures import ARCHITECTURES, llama
from tests.measured import ResNet, everything_of, labelled


def network(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(16, momentum=momentum) for _ in range(2)]
    return nn.Sequential(nn.Linear(8, 16), norms[0], nn.ReLU(), nn.Linear(16, 16), norms[1], nn.Linear(16, 3))


def batches(count: int, rows: int = 32, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 8, generator=generator) * 2 + 1, torch.randint(0, 3, (rows,), generator=generator))
        for _ in range(count)
    ]


def fed(model: nn.Module, count: int, rows: int = 32) -> nn.Module:
    """The model after so many forwards in training mode."""
    for x, _ in batches(count, rows, seed=2):
        model(x)
    return model


def scale(output: Tensor, target: object) -> Tensor:
    return output.square().mean()


def test_bessel_s_factor_along_a_chain_of_twenty() -> None:
    model = nn.Sequential(*[nn.BatchNorm1d(8, momentum=1.0) for _ in range(20)]).double()  # float32 rounds 20 times
    x = torch.randn(64, 8, dtype=torch.float64)
    trained = model(x)
    ratio = (model.eval()(x).norm() / trained.norm()).item()
    found = nw.gap(model, x, scale)
    assert found.bessel == pytest.approx((63 / 64) ** 10) == pytest.approx(0.8543, abs=5e-5)
    assert ratio == pytest.approx(found.bessel, rel=1e-3)  # eps is small against 1, twenty times
    assert math.sqrt(found.moving / found.batch) == pytest.approx(ratio, rel=1e-5)
    assert found.recalibrated == pytest.approx(found.moving)  # it remembers the unbiased variance as well
    assert found.shares["bessel"] > 0.999
    assert all(layer.bessel == pytest.approx(math.sqrt(63 / 64)) for layer in found.layers)
    assert found.layers[0].difference == pytest.approx(math.log(64 / 63) / 2, rel=1e-3)


def test_a_biased_memory_has_no_bessel_factor() -> None:
    model = nn.Sequential(*[Norm("[n] c", memory=Moving("c", update_rate=1.0, unbiased=False), c=8) for _ in range(5)])
    x = torch.randn(16, 8)
    model(x)
    found = nw.gap(model, x, scale)
    assert (found.bessel, found.shares["bessel"]) == (1.0, 0.0)
    assert found.moving == pytest.approx(found.batch, rel=1e-5)


def test_losses_are_those_by_hand() -> None:
    model = fed(network(), 3)
    model.append(nn.Dropout(0.5))
    data = [*batches(2), *batches(1, rows=8)]
    found = nw.gap(model, data, F.cross_entropy)

    def mean(net: nn.Module) -> float:
        with torch.no_grad():
            return sum(F.cross_entropy(net(x), y).item() * len(x) for x, y in data) / 72

    assert found.moving == pytest.approx(mean(model.eval()))
    model.train()[6].eval()
    assert found.batch == pytest.approx(mean(model))
    assert found.gap == pytest.approx(found.moving - found.batch)
    nw.recalibrate(model, data)
    assert found.recalibrated == pytest.approx(mean(model.eval()))
    assert found.training > found.batch


def test_drift_is_in_standard_deviations_of_the_batches_joined() -> None:
    model = nn.Sequential(BatchNorm(3))
    with torch.no_grad():
        model[0].running_mean.copy_(torch.tensor([0.0, 6.0, 1.0]))
        model[0].running_var.copy_(torch.tensor([1.0, 4.0, 16.0]))
    x = torch.randn(48, 3) * 2 + torch.tensor([0.0, 2.0, 1.0])
    layer = nw.gap(model, list(x.split([3, 5, 40]))).layers[0]
    wide = x.double()
    away = (model[0].running_mean.double() - wide.mean(0)) / wide.std(0)
    ratio = model[0].running_var.double() / wide.var(0)
    assert layer.mean_drift == pytest.approx(away.square().mean().sqrt().item(), rel=1e-4)
    assert layer.worst_mean_drift == pytest.approx(away.abs().max().item(), rel=1e-4)
    assert layer.variance_ratio == pytest.approx(ratio.log().mean().exp().item(), rel=1e-4)
    assert layer.worst_variance_ratio == pytest.approx(max(ratio.tolist(), key=lambda r: abs(math.log(r))), rel=1e-4)
    assert (layer.channels, layer.samples, layer.rate) == (3, 16.0, 0.1)


def check_shares(found: object, cause: str, least: float) -> None:
    for shares in (found.shares, *(layer.shares for layer in found.layers)):
        assert sum(shares.values()) == pytest.approx(1)
        assert all(share >= 0 for share in shares.values())
    assert found.shares[cause] > least, found.shares


def test_too_few_updates() -> None:
    found = nw.gap(fed(network(), 5), batches(40), F.cross_entropy)
    check_shares(found, "updates", 0.9)
    assert [layer.updates for layer in found.layers] == [5, 5]
    assert abs(found.gap) > 10 * abs(found.recalibrated - found.batch)
    never = nw.gap(network(), batches(40))
    assert (never.shares["updates"] > 0.9, never.layers[0].updates) == (True, 0)


def test_statistics_that_were_loaded_without_their_counter_are_not_taken_for_a_start() -> None:
    model = fed(network(), 200)
    for norm in (model[1], model[4]):
        norm.num_batches_tracked.zero_()
    assert nw.gap(model, batches(40)).shares["updates"] == 0


def test_batch_noise() -> None:
    found = nw.gap(fed(network(momentum=0.9), 200, rows=8), batches(60, rows=8))
    check_shares(found, "noise", 0.7)
    settled = nw.gap(fed(network(momentum=0.01), 1000, rows=8), batches(60, rows=8))
    assert settled.layers[0].difference < found.layers[0].difference / 2
    single = nw.gap(fed(network(), 200), batches(1))
    assert single.shares["noise"] > 0.5


def test_the_average_of_all_batches_is_known_too() -> None:
    found = nw.gap(fed(network(momentum=None), 100), batches(40))
    assert found.layers[0].rate is None
    assert found.shares["updates"] == 0
    assert found.layers[0].difference < 0.1


def test_weights_that_have_moved() -> None:
    model = fed(network(momentum=0.01), 1000)
    quiet = nw.gap(model, batches(40), F.cross_entropy)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
        model[0].bias.add_(1.0)
    found = nw.gap(model, batches(40), F.cross_entropy)
    check_shares(found, "drift", 0.9)
    assert found.worst.path == "1"
    assert found.worst.difference > 10 * max(layer.difference for layer in quiet.layers)
    assert "memories differ most in 1 (by " in repr(found)
    assert " % by drift; Bessel's factor along a chain: 0.969" in repr(found)


def test_a_memory_that_is_not_finite() -> None:
    model = fed(network(), 100)
    model[1].running_var[2] = torch.nan
    found = nw.gap(model, batches(4), F.cross_entropy)
    check_shares(found, "nonfinite", 0.99)
    assert (found.worst.path, found.worst.difference) == ("1", math.inf)
    assert found.worst.mean_drift < 1  # of the others
    assert math.isnan(found.moving)
    assert math.isfinite(found.recalibrated)
    assert json.loads(found.to_json())["layers"][0]["difference"] == "inf"


def test_effective_samples_count_positions_and_masks() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Norm("[n t] c", memory=Moving("c", decay=0.9), c=3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, valid=mask)

    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 2:] = False
    found = nw.gap(Masked(), {"x": torch.randn(4, 5, 3), "mask": mask})
    assert found.layers[0].samples == 17
    images = nw.gap(nn.Sequential(nn.BatchNorm2d(3)), torch.randn(4, 3, 5, 5))
    assert images.layers[0].samples == 100
    twice = BatchNorm(3)
    assert nw.gap(nn.Sequential(twice, nn.ReLU(), twice), torch.randn(16, 3)).layers[0].samples == 16
    instances = Norm("n c [h w]", recovery=Affine("c"), memory=Moving("c", decay=0.9), c=3)
    assert nw.gap(instances, torch.randn(4, 3, 5, 5)).layers[0].samples == 25


def test_a_memory_of_mean_squares_and_one_that_grows() -> None:
    rms = Norm("[n] c", nw.RMS(), memory=Moving("c", update_rate=1.0), c=3)
    x = torch.randn(16, 3) + 2
    rms(x)
    layer = nw.gap(rms, x).layers[0]
    assert (layer.mean_drift, layer.bessel) == (None, 1.0)
    assert (layer.variance_ratio, layer.difference) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    steps = Norm("[n] t c", memory=Moving("t c", update_rate=1.0, beyond={"t": "last"}))
    steps(torch.randn(16, 4, 3))
    found = nw.gap(steps, [torch.randn(16, 6, 3), torch.randn(16, 2, 3)])
    assert found.layers[0].channels == 12


def test_a_model_without_memories() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.LayerNorm(3), nn.Dropout(0.5))
    found = nw.gap(model, batches(3), F.cross_entropy)
    assert (found.layers, found.left, found.gap, found.bessel, found.worst) == ((), {}, 0.0, 1.0, None)
    assert found.recalibrated == found.moving != found.training
    assert repr(found).endswith(" in training mode: no layer has a memory; what differs is dropout's and its like")
    assert found.headline()["memory_difference"] is None


def test_layers_that_are_left() -> None:
    model = nn.Sequential(BatchNorm(8), nn.Linear(8, 3))
    nw.freeze(model)
    found = nw.gap(model, batches(2), F.cross_entropy)
    assert dict(found.left) == {"0": "it is frozen: nw.unfreeze first"}
    assert "not measured: 0" in repr(found)
    model = nn.Sequential(nn.Linear(8, 3))
    model.unused = BatchNorm(3)
    assert dict(nw.gap(model, batches(2), forward=lambda m, b: m[0](b[0])).left) == {"unused": "no batch reached it"}


@pytest.mark.parametrize("layerwise", [False, True])
def test_it_leaves_no_trace(layerwise: bool) -> None:
    model = ResNet()
    before = everything_of(model)
    found = nw.gap(model, labelled(), F.cross_entropy, layerwise=layerwise)
    assert everything_of(model) == before
    assert [layer.path for layer in found.layers] == ["norm", "block.norm1", "block.norm2"]
    for fine in (0, 3, 5, 7):  # in each of the passes over two batches
        stops = chain([False] * fine, [True])
        with pytest.raises(KeyboardInterrupt):
            nw.gap(model, labelled(), lambda y, _, stops=stops: interrupted() if next(stops) else y.sum())
        assert everything_of(model) == before


def interrupted() -> Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "memories"), [("RegNet", 20), ("SegFormer", 1), ("BERT", 0)])
def test_architectures_without_a_loss(name: str, memories: int) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model, batch = architecture.model(), architecture.batch()
    before = everything_of(model)
    found = nw.gap(model, batch)
    assert everything_of(model) == before
    assert (len(found.layers), found.moving, found.left) == (memories, None, {})
    assert repr(found).startswith("Gap: no loss to compare")


def test_a_model_s_own_loss() -> None:
    ids = torch.randint(1, 50, (2, 7))
    found = nw.gap(llama(), {"input_ids": ids, "labels": ids})
    assert found.moving == found.batch == found.recalibrated == found.training > 3


def test_what_it_refuses() -> None:
    with pytest.raises(TooFewSamplesError, match=r"^1: shape \(1, 16\) leaves 1 sample a column of '\[n\] c \[...\]'"):
        nw.gap(network(), batches(1, rows=1), F.cross_entropy)
    with pytest.raises(DiagnosisError, match=r"^the loss is a tensor of shape \(32, 3\), and has to be one number$"):
        nw.gap(network(), batches(1), lambda y, _: y)
    model = nn.Sequential(BatchNorm(8))
    with (
        nw.accumulate(model, 2),
        pytest.raises(
            DiagnosisError, match=r"^0: recalibrate within nw\.accumulate: what is accumulated would be lost$"
        ),
    ):
        nw.gap(model, batches(1))


def test_its_table_and_figure() -> None:
    found = nw.gap(fed(network(), 5), batches(4), F.cross_entropy)
    first = found.rows()[0]
    assert (first["path"], first["updates"]) == ("1", 5)
    assert sum(first[f"share_{cause}"] for cause in CAUSES) == pytest.approx(1)
    bars = found.plot().data
    assert len(bars) == len(CAUSES)
    assert sum(bar.y[0] for bar in bars) == pytest.approx(found.layers[0].difference)
