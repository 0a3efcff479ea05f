"""The control: what is frozen, what is left to learn, and when it runs."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from studies import summary
from torch import nn

from normwise.errors import StudyError
from normwise.tuning.control import Freezer, Kept
from normwise.tuning.data import Data, Split
from normwise.tuning.models import Architecture
from normwise.tuning.norms import NormChoice
from normwise.tuning.records import Record, Request, Settings
from normwise.tuning.search import expected_trials, next_requests, selection
from normwise.tuning.training import Training, find_loss
from normwise.tuning.trial import Problem, run

CHANCE = math.log(10)
SETTINGS = Settings("mlp", "digits", (("batch", "batch"), ("none", "none")), seeds=2, confirm=3, steps=100)


class Net(nn.Module):
    """A network with a parameter of its own, whose output layer is made before the others."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.shift = nn.Parameter(torch.zeros(3))
        self.body = nn.Linear(3, 4)
        self.norm = norm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x + self.shift)).relu())


def split(seed: int) -> Split:
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(seed))
    return Split(inputs, (inputs[:, 0] > 0).long())


def trained(make: Any, *, control: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A network after five steps, and its parameters before."""
    torch.manual_seed(0)
    kept = Kept(NormChoice("batch", "batch"))
    model = make(kept)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    freezer = Freezer(model, kept.made) if control else None
    training = Training(model, split(0), SETTINGS, find_loss("cross_entropy"), lr=0.5, seed=0, steps=5, freezer=freezer)
    for _ in range(5):
        training.step()
    return model, before


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.equal(before[name])}


# ------------------------------------------------------------------------------------------------------ what is frozen


def test_gamma_beta_and_the_output_layer_stay_at_their_start() -> None:
    everything = {"head.weight", "head.bias", "shift", "body.weight", "body.bias", "norm.weight", "norm.bias"}
    free = moved(*trained(Net, control=False))
    assert everything - free <= {"shift", "body.bias"}  # what a batch norm takes out again moves by rounding alone
    still = everything - moved(*trained(Net, control=True))
    assert {"head.weight", "head.bias", "norm.weight", "norm.bias"} <= still
    assert "body.weight" not in still


def test_nothing_is_left_behind() -> None:
    model, _ = trained(Net, control=True)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_frozen_parts_take_no_weight_decay() -> None:
    torch.manual_seed(0)
    kept = Kept(NormChoice("batch", "batch"))
    model = Net(kept)
    settings = replace(SETTINGS, optimizer="adamw", weight_decay=0.5)
    head = model.head.weight.detach().clone()
    freezer = Freezer(model, kept.made)
    Training(model, split(0), settings, find_loss("cross_entropy"), lr=0.1, seed=0, steps=1, freezer=freezer).step()
    assert model.head.weight.equal(head)


def test_a_network_without_anything_else_to_train_is_refused() -> None:
    with pytest.raises(StudyError) as caught:
        trained(lambda norm: nn.Sequential(norm(3), nn.Linear(3, 2)), control=True)
    assert str(caught.value) == (
        "the control has nothing to train: the network has no parameters besides its normalizations and its output "
        "layer; leave --control out"
    )


def test_a_network_that_ends_in_a_normalization_keeps_the_layer_before_it_still() -> None:
    def ends(norm: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), norm(2))

    assert moved(*trained(ends, control=True)) <= {"0.weight", "0.bias"}
    assert "0.weight" in moved(*trained(ends, control=True))


def test_lazy_layers_are_frozen_too() -> None:
    def lazy(norm: Any) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(4), norm(4), nn.ReLU(), nn.LazyLinear(2))

    torch.manual_seed(0)
    kept = Kept(NormChoice("batch", "batch"))
    model = lazy(kept)
    freezer = Freezer(model, kept.made)
    training = Training(model, split(0), SETTINGS, find_loss("cross_entropy"), lr=0.5, seed=0, steps=5, freezer=freezer)
    training.step()
    first = [p.detach().clone() for p in model.parameters()]
    training.step()
    still = [p.equal(before) for p, before in zip(model.parameters(), first, strict=True)]
    assert still[2:] == [True] * 4
    assert not still[0]


def test_a_control_trial_starts_as_its_selection_trial_and_sees_no_test_data() -> None:
    data = Data("made up", split(0), split(1), split(2), {})
    settings = replace(SETTINGS, batch_size=16, steps=20)
    choices = {"batch": NormChoice("batch", "batch")}
    problem = Problem(settings, Architecture("net", Net, True, {}), choices, find_loss("cross_entropy"), data, 0.69)
    request = Request("select", "batch", 0.5, 3, 20)
    free, frozen = run(problem, request), run(problem, replace(request, phase="control"))
    assert free.first_loss == frozen.first_loss
    assert free.tail_loss != frozen.tail_loss
    assert frozen.test_loss is None


# ------------------------------------------------------------------------------------------------------- when it runs


def network(request: Request) -> Record:
    """With everything free it trains up to 2**2 and diverges from 2**4; with the scale frozen 8 octaves further."""
    octave = math.log2(request.lr) - 8 * (request.phase == "control" and request.norm == "batch")
    if octave >= 4:
        return Record(request, "diverged", first_loss=2.4)
    if octave > 2:
        return Record(request, "stuck", 10.0, 2.4, tail_loss=2.3, val_loss=2.3)
    return Record(request, "trains", 95 - (octave + 1) ** 2 / 10 - request.seed % 3, 2.4, 0.1, 0.1)


def study(settings: Settings) -> list[Record]:
    records: list[Record] = []
    while requests := next_requests(settings, records, chance=CHANCE):
        records += [network(request) for request in requests]
    return records


def test_the_control_encloses_edges_of_its_own_and_decides_nothing() -> None:
    free, controlled = study(SETTINGS), study(replace(SETTINGS, control=True))
    rest = [r for r in controlled if r.request.phase != "control"]
    assert {r.request for r in rest} == {r.request for r in free}
    settings = replace(SETTINGS, control=True)
    whole = summary(settings, controlled, CHANCE)
    batch, none = whole.norms
    assert batch.control is not None
    assert none.control is not None
    assert math.log2(batch.control["0.5"].mean or 1) == pytest.approx(10.0)
    assert batch.control_diverge is not None
    assert batch.control_diverge.mean == 2.0**12
    assert (none.control["0.5"], none.control_diverge) == (none.lr_train["0.5"], none.lr_diverge)
    plain = summary(SETTINGS, free, CHANCE)
    assert whole.verdict == plain.verdict
    assert plain.norms[0].control is None


def test_the_control_runs_at_the_best_combination_on_the_selection_seeds() -> None:
    settings = replace(SETTINGS, control=True, axes=(("batch_size", (8, 32)),))
    records = study(settings)
    control = [r.request for r in records if r.request.phase == "control"]
    assert {(r.norm, r.variant) for r in control} == {(label, (("batch_size", 8),)) for label in ("batch", "none")}
    assert {r.seed for r in control} == {0, 1, 10_000, 10_001}
    assert selection(settings, records, "batch", (("batch_size", 8),), phase="control")


def test_about_as_many_trials_as_expected() -> None:
    settings = replace(SETTINGS, control=True)
    assert len(study(settings)) == pytest.approx(expected_trials(settings), rel=0.2)
