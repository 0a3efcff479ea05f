"""What the doctor says as a whole: clean bills, what was not checked, text and data; and that it leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from sick_models import Patient, batch_mlp, chain, cross_entropy, images, labelled, mlp, rows
from sklearn.datasets import load_digits
from test_untouched import everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw
from normwise.diagnose.findings import Diagnosis, Finding


def finding(kind: str = "some-kind", harm: str = "severe", confidence: str = "certain") -> Finding:
    return Finding(kind, "It is so.", ("a", "b"), "number", 3.0, (0, 1), "x = 1\ny = 2", confidence, harm)


def kinds(found: Diagnosis) -> list[str]:
    return [one.kind for one in found.findings]


# -------------------------------------------------------------------------------------------------------- clean bills


class Residual(nn.Module):
    """relu(x + f(x)), as ResNet has it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if stride == 1 else shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    blocks = [Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 16, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def digits() -> DataLoader[tuple[Tensor, ...]]:
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(x, torch.tensor(data.target)), 64, shuffle=True, drop_last=True, generator=generator
    )


def test_a_trained_resnet_gets_a_clean_bill() -> None:
    torch.manual_seed(0)
    model, loader = resnet(), digits()
    optimizer = torch.optim.SGD(nw.param_groups(model, weight_decay=5e-4), lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8 * len(loader))
    for _ in range(8):
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    found = nw.doctor(model, loader, cross_entropy, optimizer=optimizer, lr=0.1)  # not the end of the schedule, 0
    assert found.findings == ()
    assert found.unchecked == {}


def sentences(count: int, length: int = 16) -> list[dict[str, Tensor]]:
    """Sequences in which each token follows from the one before."""
    starts = torch.randint(0, 50, (count, 32, 1))
    ids = (starts + 7 * torch.arange(length)) % 50
    return [{"input_ids": one, "labels": one} for one in ids]


def test_a_trained_llama_gets_a_clean_bill() -> None:
    torch.manual_seed(0)
    model = next(one for one in ARCHITECTURES if one.name == "Llama").build().train()
    optimizer = torch.optim.AdamW(nw.param_groups(model, weight_decay=0.01), lr=3e-3)
    for batch in sentences(200):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    batches = sentences(4)
    assert model(**batches[0]).loss < 0.5  # chance is 3.9
    found = nw.doctor(model, batches, optimizer=optimizer)
    assert found.findings == ()
    reason = "AdamW steps by its own scale of each parameter, not by the curvature"
    assert found.unchecked == {"learning rate against sharpness": reason}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_real_architectures_with_random_weights(architecture: Architecture) -> None:
    """What is said of them is so: 2 images of 64 x 64 leave 2 x 2 places, and a small start leaves eps the larger."""
    model = architecture.model()
    torch.manual_seed(1)
    expected = {"ResNet": ["few-samples"], "RegNet": ["few-samples"], "EfficientNet": ["eps-rivals-variance"]}
    assert kinds(nw.doctor(model, [architecture.batch()])) == expected.get(architecture.name, [])


# ----------------------------------------------------------------------------------------------------------- no trace


@pytest.mark.parametrize("training", [True, False])
def test_the_doctor_leaves_no_trace(training: bool) -> None:
    torch.manual_seed(0)
    model = mlp(nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 32), nw.BatchNorm(32), nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    batches = labelled(32)
    cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    model.train(training)
    before, state = everything(model), torch.get_rng_state()
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    found = nw.doctor(model, batches, cross_entropy, optimizer=optimizer, accumulation=2)
    assert len(found.checked) == 25 - len(found.unchecked)
    assert everything(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(optimizer.state[p]["momentum_buffer"], kept)
        for p, kept in zip(model.parameters(), momentum, strict=True)
    )


@pytest.mark.parametrize("name", ["ResNet", "Llama", "Whisper"])
def test_the_doctor_leaves_no_trace_in_real_architectures(name: str) -> None:
    architecture = next(one for one in ARCHITECTURES if one.name == name)
    model = architecture.model().train()
    before = everything(model)
    found = nw.doctor(model, [architecture.batch()], lr=0.1)
    assert everything(model) == before
    assert len(found.checked) > 12


class Refusing(nn.Module):
    """Takes the first batch alone, which is one of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.any()):
            raise TypeError("not today\nnor tomorrow")
        return self.norm(x)


def test_a_check_that_fails_says_so_and_the_others_go_on() -> None:
    model = Refusing().train()
    model.norm.running_var[0] = torch.nan
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    found = nw.doctor(model, [torch.zeros(32, 8), *rows(32)], optimizer=optimizer)
    assert kinds(found) == ["memory-non-finite", "decay-on-norms"]
    assert found.unchecked["samples a statistic"] == "TypeError: not today"
    assert model.norm.running_var[0].isnan()


def test_what_is_not_given_is_not_checked() -> None:
    found = nw.doctor(batch_mlp(), torch.randn(8, 8))
    assert found.unchecked == {
        "the last batch": "only a list, or a DataLoader that knows its size, tells what the last batch will be",
        "batches of different kinds": "that takes 4 batches of 8 examples or more",
        "checkpointed forwards": "the model's output, of shape (8, 3), has no loss in it: give loss=, called as "
        "loss(output, target)",
        "parameters that are not trained": "no optimizer was given",
        "weight decay on normalizations": "no optimizer was given",
        "constant inputs": "8 examples are too few: give batches with 32 or more",
        "dead units": "8 examples are too few: give batches with 128 or more",
        "saturated units": "8 examples are too few: give batches with 32 or more",
        "learning rate against sharpness": "no optimizer and no learning rate were given",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation": 0}, "accumulation=0: it is 1 or more"),
        ({"most": 0}, "most=0: it is 1 or more"),
        ({"lr": -0.1}, "lr=-0.1: a learning rate is positive"),
        ({"lr": math.nan}, "lr=nan: a learning rate is positive"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, float], message: str) -> None:
    with pytest.raises(nw.DiagnosisError) as error:
        nw.doctor(batch_mlp(), rows(32), **options)
    assert str(error.value) == message


def test_progress_is_told() -> None:
    told: list[str] = []
    found = nw.doctor(batch_mlp(), rows(32), progress=told.append)
    assert set(told) == {*found.checked, *found.unchecked}
    assert len(told) == 25


def test_the_gap_by_bessels_factor_is_predicted() -> None:
    """The chain of 20: evaluation gives (63/64)^10 of what training gives."""
    torch.manual_seed(0)
    patient = chain(64)
    (found,) = [one for one in patient.diagnosis().findings if one.kind == "bessel-gap"]
    assert found.measured == pytest.approx((63 / 64) ** 10, rel=1e-12)
    x = torch.randn(4096, 32)
    with torch.no_grad():
        ratio = float(patient.model.eval()(x).std() / patient.model.train()(x).std())
    assert ratio == pytest.approx((63 / 64) ** 10, rel=0.05)


def test_a_skip_that_bypasses_the_norms_has_no_gap_by_bessels_factor() -> None:
    torch.manual_seed(0)

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = chain(64).model

        def forward(self, x: Tensor) -> Tensor:
            for linear, norm in zip(self.inner[::2], self.inner[1::2], strict=True):
                x = x + norm(linear(x))
            return x

    assert "bessel-gap" not in kinds(nw.doctor(Skipping(), rows(64, 32, batches=8)))


# ------------------------------------------------------------------------------------------------------ text and data


def test_findings_are_ranked_by_harm_and_then_by_confidence() -> None:
    given = [
        finding("rate-above-stability"),
        finding("d", "minor"),
        finding("c", "severe", "possible"),
        finding("a", "fatal", "likely"),
        finding("b", "severe", "certain"),
    ]
    assert [one.kind for one in sorted(given, key=lambda one: one.rank)] == ["a", "b", "c", "d", "rate-above-stability"]


def test_the_text_of_a_diagnosis() -> None:
    found = Diagnosis((finding(),), ("gains", "inputs"), {"the last batch": "nobody knows"})
    assert str(found) == (
        "1 finding\n"
        "\n"
        "1. some-kind (severe, certain) in a, b\n"
        "  It is so.\n"
        "  number: 3, expected at most 1\n"
        "  fix:\n"
        "    x = 1\n"
        "    y = 2\n"
        "\n"
        "checked: gains, inputs\n"
        "not checked:\n"
        "  the last batch: nobody knows"
    )
    assert repr(found) == "Diagnosis: 1 finding: some-kind (severe); 2 things checked, 1 not"


def test_a_clean_bill_lists_what_was_checked() -> None:
    found = Diagnosis((), ("gains", "inputs"), {})
    assert str(found) == "no finding\n\nchecked: gains, inputs"
    assert repr(found) == "Diagnosis: no finding; 2 things checked, 0 not"


@pytest.mark.parametrize(
    ("expected", "text"),
    [((0, 0), "0"), ((16, math.inf), "at least 16"), ((0, 0.5), "at most 0.5"), ((0.95, 1.05), "0.95 to 1.05")],
)
def test_a_range_in_words(expected: tuple[float, float], text: str) -> None:
    one = Finding("kind", "It is so.", (), "number", 20.0, expected, "", "certain", "minor")
    assert one.numbers == f"number: 20, expected {text}"


def test_a_diagnosis_as_data() -> None:
    found = Diagnosis((finding(),), ("gains",), {"inputs": "none"})
    assert found.to_dict() == {
        "findings": [
            {
                "kind": "some-kind",
                "what": "It is so.",
                "where": ["a", "b"],
                "quantity": "number",
                "measured": 3.0,
                "expected": [0, 1],
                "fix": "x = 1\ny = 2",
                "confidence": "certain",
                "harm": "severe",
            }
        ],
        "checked": ["gains"],
        "unchecked": {"inputs": "none"},
    }
    frame = found.to_frame()
    assert frame.loc[0, ["kind", "where", "high"]].tolist() == ["some-kind", "a, b", 1]
    assert found.plot().data[0].cells["values"][0] == ["some-kind"]


def test_at_least() -> None:
    given = (finding("a", "fatal"), finding("b", "severe", "possible"), finding("c", "moderate"))
    found = Diagnosis(given, (), {})
    assert [one.kind for one in found.at_least("severe")] == ["a"]
    assert [one.kind for one in found.at_least("minor")] == ["a", "c"]


def test_one_image_a_batch_is_not_refused() -> None:
    assert kinds(images().diagnosis()) == []
    assert Patient(batch_mlp(), torch.randn(1, 8)).diagnosis().findings[0].kind == "few-samples"
