"""What a study sees from inside its best trainings, and that the study itself does not notice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.study import Study, gather
from normwise.tuning.data import load
from normwise.tuning.measures import saved_bytes
from normwise.tuning.models import find
from normwise.tuning.norms import NormChoice
from normwise.tuning.prepare import make_plan
from normwise.tuning.records import Measures
from normwise.tuning.search import seeds
from normwise.tuning.seeding import seeded
from normwise.tuning.training import batches

OPTIONS = {"norms": "batch,none", "lrs": [0.1, 0.5], "seeds": 1, "confirm": 2, "steps": 8, "workers": 0}


def study(**options: object) -> Study:
    return nw.tune(progress=False, **{**OPTIONS, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def measured() -> Study:
    return study()


def measures(study: Study, label: str) -> Measures:
    found = next(norm.measures for norm in study.summary.norms if norm.label == label)
    assert found is not None
    return found


def test_the_study_is_the_same_without(measured: Study) -> None:
    plain = study(measures=False)
    assert plain.verdict == measured.verdict
    assert [norm.measures for norm in plain.summary.norms] == [None, None]
    bare = [replace(norm, measures=None, ms_per_step=None).scores for norm in measured.summary.norms]
    assert [norm.scores for norm in plain.summary.norms] == bare


def test_it_is_the_training_of_the_first_confirmation_seed(measured: Study) -> None:
    found = measures(measured, "batch")
    seed = seeds(measured.settings, "batch", "confirm")[0]
    data = load("digits", "cross_entropy")
    with seeded(seed):
        model = find("mlp", data.train.inputs, 10).build(NormChoice("batch", "batch"))
    batch = next(batches(data.train, 128, seed))
    direct = nw.sharpness(model, [batch], nn.functional.cross_entropy)
    assert found.seed == seed
    assert found.sharpness[0].largest == pytest.approx(direct.largest.value, rel=1e-3)
    assert found.sharpness[0].threshold == pytest.approx(2 / next(n.lr_best for n in measured.summary.norms))
    assert found.activations[0].rms_start == pytest.approx(batch[0].square().mean().sqrt().item(), rel=1e-4)


def test_the_looks_are_spread_over_the_training(measured: Study) -> None:
    for label in ("batch", "none"):
        found = measures(measured, label)
        assert [point.step for point in found.smoothness] == [point.step for point in found.sharpness] == [0, 2, 4, 6]
        assert all(point.loss_low < point.loss_high for point in found.smoothness)
        weights = [point.weight_norm for point in found.smoothness]
        assert weights[0] != weights[-1]
        assert any(point.rms_start != point.rms_end for point in found.activations)


def test_only_what_remembers_has_a_gap_and_only_the_winner_is_examined(measured: Study) -> None:
    batch, none = measures(measured, "batch"), measures(measured, "none")
    assert none.gap is None
    assert batch.gap is not None
    assert batch.gap.moving > batch.gap.recalibrated  # eight steps are too few for moving statistics
    assert measured.verdict.winner == "batch"
    assert none.findings is None
    assert {"memory-lags", "bias-before-norm"} & {finding.kind for finding in batch.findings}


def test_the_storage_has_them_and_a_study_that_goes_on_does_not_measure_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    first = study(storage=url, study="mine")
    assert gather(url, "mine").summary.norms == first.summary.norms
    monkeypatch.setattr("normwise.study.measure", None)  # would fail if it were called
    again = study(storage=url, study="mine", resume=True)
    assert [norm.measures for norm in again.summary.norms] == [norm.measures for norm in first.summary.norms]


def test_a_loop_of_ones_own_is_not_looked_into() -> None:
    def train(model: nn.Module, *, lr: float, seed: int, trial: object) -> float:
        return 50 + lr + seed % 7

    own = nw.tune(norms="batch,none", lrs=[0.1, 0.5], seeds=1, confirm=2, train=train, workers=0, progress=False)
    assert [norm.measures for norm in own.summary.norms] == [None, None]


def test_saved_bytes_counts_each_piece_of_memory_once_and_no_parameter() -> None:
    problem = make_plan("mlp", "digits", None, nw.tuning.options.Options(norms="none", lrs="0.1:1:2")).problem
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 10, bias=False))
    batch = torch.randn(16, 64), torch.randint(10, (16,))
    before = [p.clone() for p in model.parameters()]
    inputs, hidden, logs, labels = 16 * 64 * 4, 16 * 32 * 4, 16 * 10 * 4, 16 * 8
    weight = 4  # of the mean over the batch, which the loss keeps
    assert saved_bytes(problem, model, batch) == inputs + hidden + logs + labels + weight
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
