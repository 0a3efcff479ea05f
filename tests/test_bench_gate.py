"""Every layer that is timed passes the gate, and a wrong one, planted, does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.bench import layers, models, operations
from normwise.bench.cases import OPERATIONS, Case, ModelCase, Pass
from normwise.bench.operations import COPY, ONEDNN, OURS, OURS_COMPILED, TORCH, TORCH_COMPILED
from normwise.bench.run import run
from normwise.errors import SurgeryError

EVERY = [(name, what) for name, operation in OPERATIONS.items() for what in operation.passes]


def case_of(name: str, what: Pass, dtype: str = "float32", layout: str = "contiguous") -> Case:
    shape = (32, 24) if name.endswith(("rms_norm", "layer_norm")) else (4, 8, 5, 6)
    return Case(name, shape, dtype, layout, what)  # type: ignore[arg-type]


def prepared(case: Case) -> operations.Prepared:
    with torch.set_grad_enabled(case.what.mode == "training"):
        return operations.prepare(case)


@pytest.mark.parametrize(("name", "what"), EVERY, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_layers_pass(name: str, what: Pass, dtype: str) -> None:
    found = prepared(case_of(name, what, dtype))
    assert found.excluded == {}
    assert dtype == "bfloat16" or found.inexact == {}  # torch sums some gradients in bfloat16
    assert {OURS, TORCH, COPY} <= set(found.calls)


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if 4 in operation.ranks])
def test_channels_last_passes(name: str) -> None:
    case = Case(name, (4, 8, 5, 6), "float32", "channels_last", OPERATIONS[name].passes[-1])
    inputs, _ = layers.tensors(case)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)
    found = prepared(case)
    assert (found.excluded, found.inexact) == ({}, {})


class Scaled(nn.Module):
    """A layer whose output is a little too large."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.norm(x) * 1.0001,)


class WrongGradient(Scaled):
    """A layer whose output is right, and whose gradient is that of the gain alone."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        slope = x * self.norm.weight + self.norm.bias
        return (slope + (y - slope).detach(),)


def wrong_eps(case: Case) -> nn.Module:
    return layers.Plain(nw.LayerNorm(case.shape[-1], 1e-3))


def too_large(case: Case) -> nn.Module:
    return Scaled(nw.LayerNorm(case.shape[-1], layers.EPS))


def wrong_gradient(case: Case) -> nn.Module:
    return WrongGradient(nw.LayerNorm(case.shape[-1], layers.EPS))


def wrong_memory(case: Case) -> nn.Module:
    return layers.Plain(nw.BatchNorm(case.shape[1], layers.EPS, momentum=0.11))


@pytest.mark.parametrize(
    ("name", "make", "what", "reason"),
    [
        ("layer_norm", wrong_eps, Pass("evaluation"), "the output is off by 0.00"),
        ("layer_norm", too_large, Pass("evaluation"), "the output is off by 0.0001 of its largest value"),
        ("layer_norm", wrong_gradient, Pass("training", backward=True), "the gradient of the input is off by "),
        ("batch_norm", wrong_memory, Pass("training"), "the running_mean is off by "),
    ],
)
def test_a_planted_wrong_layer_is_reported_and_never_timed(
    name: str, make: Callable[[Case], nn.Module], what: Pass, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(layers._OURS, name, make)
    (outcome,) = run([case_of(name, what)], budget=0.0)
    assert (outcome.timed, outcome.rounds, list(outcome.excluded)) == ({}, 0, [OURS])
    assert outcome.excluded[OURS].startswith(reason)


def test_anothers_wrong_layer_is_timed_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers._TORCHS, "layer_norm", too_large)
    (outcome,) = run([case_of("layer_norm", Pass("training"))], budget=0.0)
    assert outcome.inexact == {TORCH: "the output is off by 0.0001 of its largest value"}
    assert set(outcome.timed) == {OURS, TORCH, COPY}


def test_a_contender_that_raises_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case) -> nn.Module:
        raise RuntimeError("no kernel\nat all")

    monkeypatch.setitem(layers._TORCHS, "rms_norm", broken)
    found = prepared(case_of("rms_norm", Pass("evaluation")))
    assert found.excluded == {TORCH: "RuntimeError: no kernel"}
    assert set(found.calls) == {OURS, COPY}


def test_compiled_layers_take_part_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that changes nothing, and one that spoils normwise's layer."""
    case = replace(case_of("rms_norm", Pass("evaluation")), compiled=True)
    monkeypatch.setattr(torch, "compile", lambda layer, dynamic: layer)
    assert list(prepared(case).calls) == [OURS, TORCH, OURS_COMPILED, TORCH_COMPILED, COPY]
    assert list(prepared(replace(case, compiled=False)).calls) == [OURS, TORCH, COPY]
    monkeypatch.setattr(torch, "compile", lambda layer, dynamic: lambda x: (1.01 * layer(x)[0],))
    found = prepared(case)
    reason = "the output is off by 0.01 of its largest value"
    assert (found.excluded, found.inexact) == ({OURS_COMPILED: reason}, {TORCH_COMPILED: reason})
    assert list(found.calls) == [OURS, TORCH, TORCH_COMPILED, COPY]


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="torch was built without oneDNN")
@pytest.mark.parametrize(("name", "what"), EVERY, ids=str)
def test_onednn_takes_part_where_torch_exposes_it(name: str, what: Pass) -> None:
    takes_part = name == "batch_norm" or (name == "layer_norm" and what.mode == "evaluation")
    assert (ONEDNN in prepared(case_of(name, what)).calls) is takes_part
    assert ONEDNN not in prepared(case_of(name, what, "bfloat16")).calls


def test_calls_do_the_whole_pass() -> None:
    """What is timed gives what the gate saw: every output and every gradient."""
    found = prepared(case_of("add_layer_norm", Pass("training", backward=True)))
    assert [gradient.shape for gradient in found.calls[OURS]()] == [(32, 24), (32, 24), (24,), (24,)]  # type: ignore[attr-defined]
    with torch.no_grad():
        forward = prepared(case_of("add_layer_norm", Pass("evaluation")))
        output, total = forward.calls[OURS]()  # type: ignore[misc]
    assert output.shape == total.shape == (32, 24)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one block."""

    def tokens() -> tuple[Tensor, Tensor]:
        return torch.randint(512, (2, 8)), torch.randint(512, (16,))

    monkeypatch.setitem(models.MODELS, "llama", models.Model(lambda: models.llama(16, 1), tokens))


def test_a_model_is_timed_with_both_layers(small: None) -> None:
    outcomes = list(run([ModelCase("llama", "training"), ModelCase("llama", "evaluation")], budget=0.0))
    assert [set(outcome.timed) for outcome in outcomes] == [{OURS, TORCH}] * 2
    assert all(outcome.timed[TORCH].share.median == 1 for outcome in outcomes)


def test_a_wrong_model_is_not_timed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    adopt = nw.adopt

    def spoiled(model: nn.Module, *, copy: bool) -> object:
        record = adopt(model, copy=copy)
        norm = next(layer for layer in record.model.modules() if isinstance(layer, nw.RMSNorm))
        norm.weight.data.mul_(1.5)
        return record

    monkeypatch.setattr(models, "adopt", spoiled)
    (outcome,) = run([ModelCase("llama", "evaluation")], budget=0.0)
    assert outcome.timed == {}
    assert outcome.excluded[OURS].startswith("the output is off by ")


def test_a_model_that_cannot_be_adopted_is_not_timed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(model: nn.Module, *, copy: bool) -> object:
        raise SurgeryError("adopt: the model then fails")

    monkeypatch.setattr(models, "adopt", refusing)
    (outcome,) = run([ModelCase("llama", "training")], budget=0.0)
    assert (outcome.timed, outcome.excluded) == ({}, {OURS: "adopt: the model then fails"})


@pytest.mark.parametrize("name", ["resnet", "convnext", "llama"])
def test_the_models_are_what_they_are_called(name: str) -> None:
    with torch.device("meta"):
        model = models.MODELS[name].make()
    kinds = {"resnet": nn.BatchNorm2d, "convnext": nn.LayerNorm, "llama": nn.RMSNorm}
    counts = {"resnet": 20, "convnext": 11, "llama": 9}
    assert sum(isinstance(layer, kinds[name]) for layer in model.modules()) == counts[name]
