"""The doctor finds what a model has, not what it almost has, and its fixes mend it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sick_models import Block, Patient, domains, parabola, rows, run
from sicknesses import SICKNESSES, Sickness
from torch import Tensor, nn

from normwise.diagnose.doctor import doctor
from normwise.diagnose.findings import Diagnosis, Finding


def found(patient: Patient, kind: str) -> list[Finding]:
    return findings(patient.diagnosis(), kind)


def findings(diagnosis: Diagnosis, kind: str) -> list[Finding]:
    return [finding for finding in diagnosis.findings if finding.kind == kind]


@pytest.mark.filterwarnings("ignore:swap. :UserWarning")
@pytest.mark.parametrize("sickness", SICKNESSES, ids=str)
def test_what_a_model_has_is_found_and_the_fix_mends_it(sickness: Sickness) -> None:
    torch.manual_seed(0)
    patient = sickness.sick()
    before = patient.diagnosis()
    (finding,) = findings(before, sickness.kind)
    low, high = finding.expected
    assert not low <= finding.measured <= high
    after = patient.treated(finding.fix).diagnosis()
    assert findings(after, sickness.kind) == []
    assert set(after.unchecked) <= set(before.unchecked)


@pytest.mark.parametrize("sickness", SICKNESSES, ids=str)
def test_what_a_model_almost_has_is_not_found(sickness: Sickness) -> None:
    torch.manual_seed(0)
    almost = sickness.almost().diagnosis()
    assert findings(almost, sickness.kind) == []
    assert set(almost.unchecked) <= set(sickness.sick().diagnosis().unchecked)


@pytest.mark.parametrize(("frozen", "kinds"), [(True, set()), (False, {"few-samples", "bias-before-norm"})])
def test_a_frozen_normalization_takes_nothing_from_the_batch(frozen: bool, kinds: set[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model[1].train(not frozen).requires_grad_(not frozen)
    assert {finding.kind for finding in doctor(model, torch.randn(2, 4)).findings} == kinds
    assert {finding.kind for finding in doctor(model.eval(), torch.randn(2, 4)).findings} >= kinds


def test_every_kind_is_documented() -> None:
    lines = (Path(__file__).parent.parent / "docs" / "doctor.md").read_text().splitlines()
    documented = {line.split("`")[1] for line in lines if line.startswith("| `") and line.count("|") == 4}
    assert documented == {sickness.kind for sickness in SICKNESSES} | {"unsynchronized"}


@pytest.mark.parametrize(("lr", "confidence"), [(0.5, "possible"), (2.0, "possible"), (2.5, "likely")])
def test_a_rate_far_above_the_threshold_is_likely_too_large(lr: float, confidence: str) -> None:
    (finding,) = found(parabola(lr), "rate-above-stability")
    assert finding.measured == pytest.approx(9 * lr / 2, rel=1e-4)
    assert finding.confidence == confidence


MEASURED = {
    "few-samples": (15, ("1",)),
    "few-samples of a group": (2, ("1",)),
    "last-batch-of-one": (1, ("1",)),
    "micro-batches-apart": (4, ("1",)),
    "updated-twice": (2, ("inner.1",)),
    "memory-never-updated": (0, ("4",)),
    "memory-non-finite": (1, ("1",)),
    "bias-before-norm": (32, ("0",)),
    "mixed-norm-order": (2, ("2.norm", "5.norm")),
    "post-norm-without-warmup": (12, tuple(f"{at}.norm" for at in range(1, 13))),
    "decay-on-norms": (0.01, ("1",)),
    "gain-near-zero": (9 / 32, ("1",)),
    "constant-inputs": (3, ("input",)),
    "dead-units": (17 / 32, ("1",)),
    "dead units of a normalization": (17 / 32, ("1",)),
    "non-finite": (1, ("0.weight",)),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_number_and_the_place(name: str) -> None:
    torch.manual_seed(0)
    sickness = next(one for one in SICKNESSES if str(one) == name)
    (finding,) = found(sickness.sick(), sickness.kind)
    assert (finding.measured, finding.where) == MEASURED[name]


def test_how_far_a_memory_lags() -> None:
    """Of a start at mean 0 and variance 1, five updates at 0.1 leave 0.9^5."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
    x = rows(4096, batches=1, mean=3.0)
    (finding,) = found(Patient(run(model, x, 5), x), "memory-lags")
    assert finding.what.startswith("After 5 updates at a momentum of 0.1, 59 % of the memory is still its start, ")
    assert finding.measured == pytest.approx(3 * 0.9**5 / 0.5, rel=0.02)


def test_how_much_of_the_variance_lies_between_domains() -> None:
    torch.manual_seed(0)
    (finding,) = found(domains(2.0), "memory-mixes-domains")
    between = 2.0**2 * 8 / 7  # of four means at 2 and four at -2
    assert finding.measured == pytest.approx(between / (between + 31 / 32), rel=0.02)


class Gate(nn.Module):
    """x + c x^3, as in an approximate GELU: a sum of a value and what is computed from it, but no residual block."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(x + 0.04 * x**3)


class Gated(Block):
    """A residual block with that activation."""

    def __init__(self) -> None:
        super().__init__("pre")
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.gate(self.norm(x))))


def test_a_sum_within_an_activation_is_no_residual_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block("pre"), Gated(), Block("pre"), Gated())
    assert found(Patient(model, rows(32, 16)), "mixed-norm-order") == []
