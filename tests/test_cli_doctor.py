"""`normwise doctor`: what it prints, and its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from test_cli import call
from torch import nn

CODE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def model():
    print("made")
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

def healthy():
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        yield torch.randn(32, 8, generator=generator), torch.randint(3, (32,), generator=generator)

def loader():
    return DataLoader(TensorDataset(torch.randn(33, 8), torch.randint(3, (33,))), 16)

def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.01, weight_decay=0.1)

def narrow():
    return nn.Linear(7, 3)

def hinge(output, target):
    return (output - target).abs()

def no_optimizer(model):
    return 3

def broken(model):
    raise KeyError("momentum")
"""
Captured = pytest.CaptureFixture[str]
MODEL = ("doctor", "ward:model", "--data", "ward:batches")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of models and batches."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "ward", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ward.py").write_text(CODE)
    return tmp_path


def test_findings_are_printed_and_the_exit_code_is_0(capsys: Captured) -> None:
    assert call(*MODEL, "--loss", "cross_entropy", "--optimizer", "ward:sgd") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(
        "2 findings, in the order to mend them\n"
        "\n"
        "1. decay-on-norms (minor, certain) in 1\n"
        "  Weight decay pulls gains and biases of normalizations towards 0, where it regularizes nothing.\n"
        "  weight decay on normalizations: 0.1, expected 0\n"
        "  fix:\n"
        "    norms = set()\n"
        "    for p in nw.param_groups(model, weight_decay=0.0).parameters:\n"
        '        if p.role == "normalization":\n'
        "            norms.add(model.get_parameter(p.name))\n"
        "    for group in list(optimizer.param_groups):\n"
        "        taken, left = [], []\n"
        '        for p in group["params"]:\n'
        "            (taken if p in norms else left).append(p)\n"
        '        if taken and group.get("weight_decay"):\n'
        '            group["params"] = left\n'
        '            optimizer.add_param_group({**group, "params": taken, "weight_decay": 0.0})\n'
        "\n"
        "2. bias-before-norm (minor, certain) in 0\n"
    )
    assert printed.out.partition("not checked:")[0].endswith("\n\nchecked: 24 things\n")
    assert printed.err == "made\nnote: without --weights the weights are those that ward:model gives\n"


def test_json_is_alone_on_standard_output(capsys: Captured) -> None:
    assert call(*MODEL, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["kind"], one["where"], one["measured"]) for one in found["findings"]] == [
        ("bias-before-norm", ["0"], 16)
    ]
    assert found["unchecked"]["weight decay on normalizations"] == "no optimizer was given"


def test_weights_are_loaded(folder: Path, capsys: Captured) -> None:
    state = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).state_dict()
    state["1.running_mean"][0] = torch.nan
    torch.save(state, folder / "in.pt")
    assert call(*MODEL, "--weights", "in.pt", "--json") == 0
    assert json.loads(capsys.readouterr().out)["findings"][0]["kind"] == "memory-non-finite"


@pytest.mark.parametrize(("level", "code"), [("fatal", 0), ("severe", 0), ("moderate", 0), ("minor", 1)])
def test_fail_on(level: str, code: int) -> None:
    assert call(*MODEL, "--fail-on", level) == code


def test_a_healthy_model_does_not_fail(capsys: Captured) -> None:
    assert call("doctor", "ward:healthy", "--data", "ward:batches", "--lr", "0.01", "--fail-on", "minor") == 0
    assert capsys.readouterr().out.startswith("no finding\n\nchecked: 20 things\nnot checked:\n")


def test_a_loader_tells_of_its_last_batch(capsys: Captured) -> None:
    assert call("doctor", "ward:healthy", "--data", "ward:loader", "--batches", "2", "--fail-on", "fatal") == 1
    assert "rows in the last batch: 1, expected 2 to 16" in capsys.readouterr().out


def test_accumulation(capsys: Captured) -> None:
    words = ("doctor", "ward:healthy", "--data", "ward:batches", "--accumulation", "4", "--json")
    assert call(*words) == 0
    assert [one["kind"] for one in json.loads(capsys.readouterr().out)["findings"]] == ["micro-batches-apart"]


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (
            "narrow",
            "cross_entropy",
            "error: the forward fails on the first batch: RuntimeError: mat1 and mat2 shapes cannot be "
            "multiplied (32x8 and 7x3); `forward=` says how the model is called with a batch",
        ),
        ("model", "ward:hinge", "the loss fails on the first batch: RuntimeError: The size of tensor a (3) must match"),
    ],
)
def test_what_cannot_run_is_no_clean_bill(model: str, loss: str, message: str, capsys: Captured) -> None:
    assert call("doctor", f"ward:{model}", "--data", "ward:batches", "--loss", loss) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fail-on", "certain"), "no level of harm named 'certain'; there are fatal, severe, moderate, minor"),
        (("--lr", "-1"), "lr=-1.0: a learning rate is positive"),
        (
            ("--loss", "hinge"),
            "no loss named 'hinge'; there are cross_entropy, mse, or module:function for your own",
        ),
        (
            ("--optimizer", "ward:no_optimizer"),
            "optimizer 'ward:no_optimizer' returned a int, not a torch.optim.Optimizer",
        ),
        (("--optimizer", "ward:broken"), "optimizer 'ward:broken' raised KeyError: 'momentum' (ward.py:35)"),
        (("--data", "ward:sgd"), "data 'ward:sgd' needs the arguments model"),
    ],
)
def test_what_is_asked_wrongly(words: tuple[str, ...], message: str, capsys: Captured) -> None:
    assert call(*MODEL, *words) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_progress_is_shown_where_somebody_looks(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert call(*MODEL) == 0
    assert "\nlooking at: samples a statistic\n" in capsys.readouterr().err
