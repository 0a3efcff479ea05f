"""What the doctor refuses to examine, and fixes that are run one after another: what they leave can be trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sick_models import Patient, batch_mlp, cross_entropy, deep, labelled, mlp, mse, remembering, rows, run
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw
from normwise.diagnose.findings import Diagnosis, Finding


def named(found: Diagnosis, kind: str) -> Finding:
    (one,) = [one for one in found.findings if one.kind == kind]
    return one


def kinds(found: Diagnosis) -> list[str]:
    return [one.kind for one in found.findings]


def treated(patient: Patient) -> Patient:
    """The patient after all fixes, as docs/doctor.md applies them."""
    for one in patient.diagnosis().findings:
        patient = patient.treated(one.fix)
    return patient


def held_by(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# ------------------------------------------------------------------------------------------------- what does not run


@dataclass
class Output:
    """What a model with a loss of its own returns."""

    loss: Tensor


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Output:
        return Output(self.linear(x).square().mean())


def unreduced(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target, reduction="none")


CALLED = "it is called as loss(output, target), here with a tensor of shape (32, 3) and a tensor of shape (32,)"


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (
            nn.Linear(7, 3),
            cross_entropy,
            "the forward fails on the first batch: RuntimeError: mat1 and mat2 shapes cannot be multiplied (32x8 and "
            "7x3); `forward=` says how the model is called with a batch",
        ),
        (
            nn.Linear(8, 3),
            unreduced,
            "the loss fails on the first batch: the loss is a tensor of shape (32,), and has to be one number; "
            + CALLED,
        ),
        (nn.Linear(8, 3), "mse", "loss is a str: give a function, called as loss(output, target)"),
        (
            Own(),
            cross_entropy,
            "the loss fails on the first batch: TypeError: cross_entropy_loss(): argument 'input' (position 1) must be "
            "Tensor, not Output; it is called as loss(output, target), here with a Output and a tensor of shape (32,); "
            "without loss= the model's own is taken",
        ),
        (
            nn.Sequential(nn.Linear(8, 4), nn.GroupNorm(4, 4)),
            None,
            "the forward fails on the first batch: ValueError: ",
        ),
    ],
    ids=["shape", "unreduced", "string", "own loss", "a norm that no mode lets run"],
)
def test_what_cannot_run_is_refused(model: nn.Module, loss: Any, message: str) -> None:
    count = 1 if isinstance(model, nn.Sequential) else 32
    with pytest.raises(nw.DiagnosisError) as error:
        nw.doctor(model, labelled(count), loss)
    assert str(error.value).startswith(message)
    assert loss is None or str(error.value) == message


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).log()


class Strict(nn.Module):
    """Raises for what is not finite, as distributions do."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Root()

    def forward(self, x: Tensor) -> Tensor:
        y = self.root(x)
        if not bool(y.isfinite().all()):
            raise ValueError("found invalid values")
        return y


def test_what_a_check_explains_is_not_refused() -> None:
    torch.manual_seed(0)
    assert kinds(nw.doctor(Strict(), rows(32))) == ["non-finite"]
    assert kinds(nw.doctor(batch_mlp(), torch.randn(1, 8))) == ["few-samples"]
    assert kinds(nw.doctor(nw.adopt(batch_mlp()).model, torch.randn(1, 8))) == ["few-samples"]
    loader = DataLoader(TensorDataset(torch.randn(33, 8)), 16)
    assert kinds(nw.doctor(batch_mlp(), loader)) == ["last-batch-of-one"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": 0.1}, "optimizer is a float: give a torch.optim.Optimizer; a learning rate alone is lr="),
        ({"lr": SGD([nn.Parameter(torch.ones(1))], 0.1)}, "lr is a SGD: give a number; an optimizer is optimizer="),
    ],
)
def test_a_rate_is_no_optimizer(options: dict[str, Any], message: str) -> None:
    with pytest.raises(nw.DiagnosisError) as error:
        nw.doctor(batch_mlp(), rows(32), **options)
    assert str(error.value) == message


# ------------------------------------------------------------------------------------------------ fixes in their order


@pytest.mark.filterwarnings("ignore:swap. :UserWarning")
def test_all_fixes_leave_what_can_be_trained() -> None:
    """Few samples, decay, and a bias: new layers are trained with the settings of the old ones, in their own group."""
    torch.manual_seed(0)
    model = mlp(nn.BatchNorm1d(32), nn.ReLU(), bias=True)
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": [*model[1:].parameters()], "lr": 0.001}]
    optimizer = AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    patient = treated(Patient(model, labelled(8), cross_entropy, {"optimizer": optimizer}))
    assert patient.options["optimizer"] is optimizer
    assert set(held_by(optimizer)) >= set(model.parameters())
    norm = [group for group in optimizer.param_groups if any(p is model[1].weight for p in group["params"])]
    assert [(group["lr"], group["weight_decay"]) for group in norm] == [(0.001, 0.0)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for x, y in patient.batches:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    schedule.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert kinds(patient.diagnosis()) == []


@pytest.mark.filterwarnings("ignore:swap. :UserWarning")
def test_fixes_can_be_run_within_a_function() -> None:
    """Where a comprehension would not see the names that the fix makes."""
    torch.manual_seed(0)
    model, batches, loss = batch_mlp(), labelled(8), cross_entropy
    optimizer = SGD(model.parameters(), 1e-3, weight_decay=0.1)
    found = nw.doctor(model, batches, loss, optimizer=optimizer)
    assert kinds(found) == ["few-samples", "decay-on-norms"]
    for one in found.findings:
        exec(one.fix)
    assert kinds(nw.doctor(model, batches, loss, optimizer=optimizer)) == []


def test_norms_lose_their_decay_and_nothing_else() -> None:
    torch.manual_seed(0)
    model, batches = mlp(nn.LayerNorm(32), nn.ReLU()), labelled(32)
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": [*model[1:].parameters()], "lr": 0.02}]
    optimizer = SGD(groups, momentum=0.9, weight_decay=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    momentum = {p: optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()}
    fix = named(nw.doctor(model, batches, cross_entropy, optimizer=optimizer), "decay-on-norms").fix
    assert fix.splitlines()[-1].startswith("# and for the schedule: schedule.base_lrs = ")
    Patient(model, batches, None, {"optimizer": optimizer}).treated(fix)
    settings = {p: (g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected = dict.fromkeys(model[3].parameters(), (0.02, 0.9, 0.1)) | {model[0].weight: (0.3, 0.9, 0.1)}
    assert settings == expected | dict.fromkeys(model[1].parameters(), (0.02, 0.9, 0.0))
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], kept) for p, kept in momentum.items())


def test_parameters_that_the_optimizer_does_not_hold() -> None:
    torch.manual_seed(0)
    model = batch_mlp()
    optimizer = SGD(model[0].parameters(), 0.1)
    found = named(nw.doctor(model, rows(32), optimizer=optimizer), "untrained-parameters")
    assert found.where == ("1.weight", "1.bias", "3.weight", "3.bias")
    assert (found.measured, found.harm, found.confidence) == (4, "severe", "likely")
    model[1:].requires_grad_(False)
    assert "untrained-parameters" not in kinds(nw.doctor(model, rows(32), optimizer=optimizer))


def test_an_optimizer_of_another_model() -> None:
    torch.manual_seed(0)
    model, other = batch_mlp(), batch_mlp()
    patient = Patient(model, rows(32), options={"optimizer": SGD(other.parameters(), 0.1)})
    found = named(patient.diagnosis(), "untrained-parameters")
    assert found.what == "The optimizer holds none of the model's parameters: it is another model's."
    assert set(held_by(patient.treated(found.fix).options["optimizer"])) == set(model.parameters())


def test_the_rate_is_not_judged_where_activations_explode() -> None:
    torch.manual_seed(0)
    patient = deep(nn.Identity)
    patient.loss, patient.batches = mse, [(x, x) for x in patient.batches]
    patient.options["optimizer"] = SGD(patient.model.parameters(), 0.1)
    found = patient.diagnosis()
    assert kinds(found)[0] == "exploding-activations"
    assert "for path in [f'{at}{end}' for at in range(2, 20) for end in ['.up', '.down']]:\n" in found.findings[0].fix
    assert "rate-above-stability" not in kinds(found)
    reason = "activations explode, which decides what rate is borne: measure again when that is mended"
    assert found.unchecked["learning rate against sharpness"] == reason
    after = treated(patient)
    assert set(held_by(after.options["optimizer"])) >= set(after.model.parameters())
    assert after.options["optimizer"].param_groups[0]["lr"] == 0.1


@pytest.mark.filterwarnings("ignore:swap. :UserWarning")
def test_the_rate_comes_last_and_is_measured_when_the_rest_is_mended() -> None:
    torch.manual_seed(0)
    model = mlp(nn.BatchNorm1d(32), nn.ReLU())
    model[-1].weight.data.mul_(30)
    groups = [{"params": model[0].parameters(), "lr": 4.0}, {"params": [*model[1:].parameters()], "lr": 400.0}]
    batches = [(x, torch.randn(8, 3)) for x in rows(8)]
    patient = Patient(model, batches, mse, {"optimizer": SGD(groups)})
    found = patient.diagnosis()
    assert kinds(found) == ["few-samples", "rate-above-stability"]
    assert found.findings[-1].measured > 1000
    assert "rather the work of activations that grow, or of a normalization that is missing" in found.findings[-1].what
    after = treated(patient)
    slow, fast = (group["lr"] for group in patient.options["optimizer"].param_groups)
    assert fast == pytest.approx(100 * slow)  # both are as much smaller
    largest = nw.sharpness(model, batches[:2], mse, tolerance=0.1, most=20).largest.value
    assert fast == pytest.approx(2 / largest, rel=0.01)
    assert kinds(after.diagnosis()) == []


@pytest.mark.filterwarnings("ignore:swap. :UserWarning")
@pytest.mark.parametrize(("few", "others"), [(range(20), range(0)), (range(10), range(10, 20))])
def test_what_an_earlier_fix_exchanges_is_no_later_finding(few: range, others: range) -> None:
    """A chain of 20 norms, of which some have few samples, and Bessel's factor in all of them."""
    torch.manual_seed(0)
    batches = rows(12, 32, batches=200)
    patient = Patient(run(Chain(few), batches), batches[:8])
    found = patient.diagnosis()
    assert named(found, "few-samples").where == tuple(f"norms.{at}" for at in few)
    bessel = [one for one in found.findings if one.kind == "bessel-gap"]
    assert [one.where for one in bessel] == [tuple(f"norms.{at}" for at in others)] * bool(others)
    before = [norm.running_var.clone() for norm in patient.model.norms]
    after = treated(patient).model.norms
    assert all(after[at].running_var is None for at in few)
    assert all(torch.allclose(after[at].running_var, 23 / 24 * before[at]) for at in others)


class Chain(nn.Module):
    """A chain in which some norms have few samples: the others see every row at two places."""

    def __init__(self, few: range) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(20))
        self.norms, self.few = nn.ModuleList(nn.BatchNorm1d(32) for _ in range(20)), few

    def forward(self, x: Tensor) -> Tensor:
        for at, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            y = linear(x)
            x = norm(y) if at in self.few else norm(torch.stack([y, y.roll(1, 0)], 2)).select(2, 0)
        return x


# ------------------------------------------------------------------------------------------------------------- memory


def slow(updates: int, momentum: float) -> Patient:
    model = nn.Sequential(nn.BatchNorm1d(8, momentum=momentum), nn.Linear(8, 3))
    given = rows(256, mean=3.0)
    return Patient(run(model, given[:1], updates), given)


@pytest.mark.parametrize(
    ("updates", "momentum", "harm", "text", "new"),
    [
        (24, 0.001, "severe", "After 24 updates at a momentum of 0.001, 98 % of the memory is still its start", 0.12),
        (100, 0.01, "severe", "After 100 updates at a momentum of 0.01, 37 % of the memory is still its start", 0.1),
        (19, 0.01, "moderate", "After 19 updates at a momentum of 0.01, 83 % of the memory is still its start", 0.01),
    ],
)
def test_a_momentum_that_is_too_small(updates: int, momentum: float, harm: str, text: str, new: float) -> None:
    torch.manual_seed(0)
    patient = slow(updates, momentum)
    found = named(patient.diagnosis(), "memory-lags")
    assert found.what.startswith(text)
    assert found.harm == harm
    after = patient.treated(found.fix)
    assert after.model[0].momentum == new
    assert kinds(after.diagnosis()) == []


def test_a_memory_that_was_set_does_not_lag() -> None:
    """Recalibration counts its batches as updates, and leaves nothing of the start."""
    torch.manual_seed(0)
    patient = slow(0, 0.001)
    nw.recalibrate(patient.model, patient.batches)
    patient.batches = [x + 1 for x in patient.batches]
    assert kinds(patient.diagnosis()) == ["memory-differs"]


def test_a_number_outside_its_range_reads_as_outside() -> None:
    expected = (0.0, 1.2500001)
    one = Finding("kind", "It is so.", (), "drift", 1.2500311, expected, "", "certain", "minor")
    assert one.numbers == "drift: 1.25003, expected at most 1.25"


def test_nan_in_another_memory_is_no_sign_of_training() -> None:
    torch.manual_seed(0)
    patient = remembering(math.nan)
    model = mlp(nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU())
    model[1].running_var[3] = math.nan
    assert kinds(nw.doctor(model, patient.batches)) == ["memory-non-finite"]


# --------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("rate", [{}, {"lr": 0.1}])
def test_an_operation_outside_its_domain_is_no_matter_of_the_rate(rate: dict[str, float]) -> None:
    torch.manual_seed(0)
    patient = Patient(nn.Sequential(Root()), labelled(32), cross_entropy, rate)
    found = named(patient.diagnosis(), "non-finite")
    assert found.fix == (
        "# in module 0: keep what log reads where it is finite, as x.clamp_min(1e-6) for log, sqrt, division"
    )
    assert "ends at" not in found.what
    assert patient.treated(found.fix).options == rate


@pytest.mark.parametrize("rate", [{}, {"lr": 0.1}])
def test_values_that_grow_out_of_their_range_are(rate: dict[str, float]) -> None:
    torch.manual_seed(0)
    patient = Patient(mlp(nn.Identity()), rows(32), None, rate)
    for linear in (patient.model[0], patient.model[2]):
        linear.weight.data.fill_(1e25)
    found = named(patient.diagnosis(), "non-finite")
    assert found.what.endswith("; float32 ends at 3.4e+38.")
    assert patient.treated(found.fix).options == {name: 0.1 * value for name, value in rate.items()}


def test_a_list_as_a_loader_yields_it_is_one_batch() -> None:
    torch.manual_seed(0)
    model = mlp(nn.BatchNorm1d(32), nn.ReLU(), bias=True)
    patient = Patient(model, [torch.randn(32, 8), torch.randint(3, (32,))], cross_entropy)
    found = patient.diagnosis()
    assert kinds(found) == ["bias-before-norm"]
    assert "the last batch" in found.unchecked
    assert kinds(patient.treated(found.findings[0].fix).diagnosis()) == []
