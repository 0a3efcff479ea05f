"""The proof: a change of function is found and undone, rounding is not taken for one, and chance repeats."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normwise import SurgeryError
from normwise.surgery.edits import Edits
from normwise.surgery.probes import Probe, probes_for
from normwise.surgery.proof import Proof, distance, in_double, outputs_of
from tests.test_adopt import everything, linear_bn

Change = Callable[[nn.Module, Edits], None]


def proved(model: nn.Module, probes: list[Probe], change: Change, tolerance: float = 1e-5) -> list[float]:
    """The differences that a change makes."""
    proof = Proof("test", model, probes, None)
    with Edits() as edits:
        change(model, edits)
        checks = proof.check(model, edits, tolerance)
    return [check.difference for check in checks]


def scaled(factor: float) -> Change:
    return lambda model, edits: edits.set_values(model[0].weight, model[0].weight * factor)


def changing_only(name: str) -> nn.Module:
    """A model that computes something else afterwards, on one kind of probe only."""

    class Sensitive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.changed = nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            hit = {
                "given": x.shape[0] == 6 and bool(x.abs().max() < 20) and not bool((x[:, 0] == 3).all()),
                "a mean of 30": bool(x.mean() > 20),
                "a constant channel": bool((x[:, 0] == 3).all()),
                "odd sizes": x.shape[0] == 5,
                "the first example only": x.shape[0] == 1,
            }
            return self.linear(x) + 0.01 * float(self.changed and hit[name])

    return Sensitive()


KINDS = ("given", "a mean of 30", "a constant channel", "odd sizes", "the first example only")


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_that_shows_on_one_probe_only_is_found_and_undone(kind: str) -> None:
    model = changing_only(kind)
    before, probes = everything(model), probes_for(model, torch.randn(6, 4))
    assert [probe.name for probe in probes] == list(KINDS)
    message = rf"^test: the model then computes something else, by .* on {kind} \(allowed: 1e-05\); everything is as it"
    with pytest.raises(SurgeryError, match=message):
        proved(model, probes, lambda m, edits: edits.set_attribute(m, "changed", True))
    assert everything(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_small_changes_pass_and_are_measured(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).train(training)
    probes = probes_for(model, torch.randn(6, 4))
    assert max(proved(model, probes, scaled(1.0))) == 0
    differences = proved(model, probes, scaled(1 + 1e-6), tolerance=1e-5)
    assert 1e-8 < max(differences) < 1e-5
    with pytest.raises(SurgeryError):
        proved(model, probes, scaled(1 + 1e-3))


def chaotic() -> nn.Module:
    """In training mode each layer amplifies what the one before has rounded: the batch's spread is tiny."""
    torch.manual_seed(0)
    layers = [part for _ in range(12) for part in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())]
    return nn.Sequential(nn.Linear(4, 16), *layers).train()


def swapped_units(model: nn.Module, edits: Edits) -> None:
    """The same function, summed in another order."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    edits.set_values(model[0].weight, model[0].weight[order])
    edits.set_values(model[0].bias, model[0].bias[order])
    edits.set_values(model[1].weight, model[1].weight[:, order])


def test_rounding_in_a_chaotic_model_is_told_from_a_change() -> None:
    model = chaotic()
    probes = [Probe("close together", torch.randn(8, 4) * 1e-4 + 3)]
    proof = Proof("test", model, probes, None)
    with Edits() as edits:
        swapped_units(model, edits)
        (check,) = proof.check(model, edits, 1e-5)
    assert check.difference > 1e-5
    assert check.in_double < 1e-7
    assert check.error_after < 8 * check.error_before
    weight = model[1].weight.detach().clone()
    edits.undo()
    assert not torch.equal(weight, model[1].weight)  # what was arbitrated stayed done until now
    with pytest.raises(SurgeryError):
        proved(model, probes, lambda m, edits: edits.set_values(m[1].weight, m[1].weight * (1 + 1e-3 * torch.rand(16))))


def test_nothing_is_left_in_float64() -> None:
    model = chaotic()
    model[0].weight.grad = torch.randn_like(model[0].weight)
    before = everything(model)
    proved(model, [Probe("close together", torch.randn(8, 4) * 1e-4 + 3)], lambda m, edits: None)
    with in_double(model):
        assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert everything(model) == before
    assert model[0].weight.grad.dtype == torch.float32


def test_rounding_is_arbitrated_although_there_are_gradients() -> None:
    model = chaotic()
    x = torch.randn(8, 4)
    y = model(x)
    y.backward(torch.randn(y.shape))
    gradient = model[1].weight.grad
    assert proved(model, [Probe("close together", x * 1e-4 + 3)], swapped_units)[0] > 1e-5
    assert model[1].weight.grad is gradient


def test_a_model_that_fails_afterwards_is_put_back() -> None:
    model = linear_bn()
    before = everything(model)
    message = r"^test: the model then fails on given: .*; everything is as it was$"
    with pytest.raises(SurgeryError, match=message) as caught:
        proved(
            model,
            probes_for(model, torch.randn(6, 4)),
            lambda m, edits: edits.set_parameter(m[0], "weight", nn.Parameter(torch.ones(6, 5))),
        )
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert everything(model) == before


def test_other_shapes_and_numbers_of_outputs_are_infinitely_far() -> None:
    x = torch.randn(3, 4)
    assert distance([x], [x.T]) == math.inf
    assert distance([x], [x, x]) == math.inf
    assert distance([x], []) == math.inf
    assert distance([], []) == 0
    assert distance([x[:0]], [x[:0]]) == 0


def test_nan_and_infinity() -> None:
    x = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    assert distance([x], [x.clone()]) == 0
    assert distance([x], [torch.tensor([1.0, 2.0, torch.inf, -torch.inf])]) == math.inf
    assert distance([x], [torch.tensor([1.0, torch.nan, 5.0, -torch.inf])]) == math.inf
    assert distance([torch.ones(2)], [torch.tensor([1.0, torch.nan])]) == math.inf
    assert distance([x], [torch.tensor([1.5, torch.nan, torch.inf, -torch.inf])]) == 0.5


def test_each_output_is_measured_by_its_own_size() -> None:
    small, large = torch.tensor([1e-3]), torch.tensor([1e4])
    assert distance([small, large], [small + 0.1, large]) == pytest.approx(0.1)
    assert distance([small, large], [small, large + 100]) == pytest.approx(0.01)


def test_numbers_that_are_not_real_are_compared_too() -> None:
    z = torch.tensor([1 + 2j])
    assert distance([z], [z]) == 0
    assert distance([z], [torch.tensor([1 + 3j])]) > 0.1
    assert distance([torch.tensor([True, False])], [torch.tensor([True, True])]) == 1
    assert distance([torch.tensor([3])], [torch.tensor([4])]) > 0.1


def test_a_new_nan_is_found() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(SurgeryError, match="by inf on given"):
        proved(model, probes_for(model, torch.randn(6, 4)), scaled(float("nan")))


def test_dropout_and_all_other_chance_repeat_and_go_on_where_they_were() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * random.random() + float(np.random.rand())

    model = Noisy(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    probes = probes_for(model, torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    assert max(proved(model, probes, scaled(1.0))) == 0
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))


def test_in_training_the_memory_that_is_left_is_compared() -> None:
    """Another momentum shows in no output of the training forward itself."""
    model = linear_bn().train()
    with pytest.raises(SurgeryError):
        proved(model, probes_for(model, torch.randn(6, 4)), lambda m, edits: edits.set_attribute(m[1], "momentum", 0.2))
    assert model[1].momentum == 0.1


def test_outputs_leave_no_trace() -> None:
    model = linear_bn().train()
    before = everything(model)
    outputs_of(model, Probe("given", torch.randn(6, 4)))
    assert everything(model) == before
    with pytest.raises(RuntimeError):
        outputs_of(model, Probe("given", torch.randn(6, 3)))
    assert everything(model) == before
