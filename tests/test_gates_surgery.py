"""Operations on models keep the gate that the calls of a normalization bring, or leave such a layer as it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise.diagnose.checks.case import Case
from normwise.diagnose.checks.samples import _synchronized
from tests.test_swap import quietly, refusal
from tests.tolerances import VALUES, check

SHAPE = (5, 3)


class Mixer(nn.Module):
    """Two maps, of which one is normalized and multiplied by a function of the other."""

    def __init__(self, norm: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, width), nn.Linear(3, width)
        self.norm, self.last = norm, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x) + x.sum(-1, True), gate=self.second(x)))


@pytest.mark.parametrize("word", ["layer", "rms", "group:2", nw.LayerNorm])
def test_swapping_hands_it_on(word: Any) -> None:
    model, x = Mixer(nw.BatchNorm(8, gate="sigmoid")).eval(), torch.randn(SHAPE)
    quietly(model, "batch", word)
    assert not isinstance(model.norm, nw.BatchNorm)
    assert model.norm.spec.gate == "sigmoid"
    seen = model.first(x) + x.sum(-1, True)
    expected = model.norm(seen, gate=torch.full_like(seen, torch.inf)) * torch.sigmoid(model.second(x))
    check(model(x), model.last(expected), VALUES)


def test_a_function_may_choose_another() -> None:
    model = Mixer(nw.BatchNorm(8, gate="sigmoid"))
    quietly(model, "batch", lambda old: nw.LayerNorm(8, gate="gelu"))
    assert model.norm.spec.gate == "gelu"


@pytest.mark.parametrize(
    ("to", "made"), [(lambda old: nn.LayerNorm(8), "LayerNorm"), ("none", "Identity")], ids=["torch's", "none"]
)
def test_swapping_for_what_takes_no_gate_is_refused(to: Any, made: str) -> None:
    model = Mixer(nw.BatchNorm(8, activation="relu", gate="silu"))
    old = model.norm
    assert refusal(model, "batch", to) == (
        f"norm: the calls of the layer bring a gate, and {made} is no layer of normwise's"
    )
    assert model.norm is old


@pytest.mark.parametrize("make", [nw.BatchNorm, nw.LayerNorm], ids=["statistics", "gain"])
def test_nothing_is_folded_through_it(make: Any) -> None:
    model, x = Mixer(make(8, gate="silu")).eval(), torch.randn(SHAPE)
    before = model(x)
    record = nw.fold(model, x)
    assert record.changed == ()
    assert [line.why for line in record.left] == ["it is called with a mask, lengths, a gate or a residual"]
    assert torch.equal(model(x), before)


def test_releasing_leaves_it() -> None:
    model = Mixer(nw.LayerNorm(8, gate="silu"))
    record = nw.release(model)
    assert [(line.path, line.why) for line in record.left] == [("norm", "torch has no normalization that takes a gate")]
    assert isinstance(model.norm, nw.LayerNorm)


def test_it_is_found() -> None:
    (found,) = nw.find(Mixer(nw.RMSNorm(8, activation="relu", gate="silu")))
    assert (found.activation, found.gate) == ("relu", "silu")
    assert "... [d], then relu, times silu of a gate" in str(
        nw.find(Mixer(nw.RMSNorm(8, activation="relu", gate="silu")))
    )


def test_dead_units_are_those_of_the_activation_alone() -> None:
    """Behind a gate the output has no end where the activation's has one."""
    model = Mixer(nw.BatchNorm(8, activation="relu", gate="silu"))
    assert {call.path: call.dead for call in nw.activations(model, torch.randn(16, 3)).calls}["norm"] is None


def test_a_recalibrated_memory_is_that_of_what_was_normalized() -> None:
    model, x = Mixer(nw.BatchNorm(8, gate="silu")), torch.randn(64, 3)
    nw.recalibrate(model, [x[:20], x[20:]])
    seen = model.first(x) + x.sum(-1, True)
    check(model.norm.running_mean, seen.detach().mean(0), VALUES)
    model.eval()
    expected = F.batch_norm(seen, model.norm.running_mean, model.norm.running_var) * F.silu(model.second(x))
    check(model(x), model.last(expected), VALUES)


def test_the_doctor_puts_no_activation_behind_a_gate_and_says_that_torchs_layer_takes_none() -> None:
    """A fix that did so would give a model whose calls fail."""
    model = Mixer(nw.BatchNorm(8, activation="relu", gate="silu"))
    case = cast("Case", SimpleNamespace(model=model))
    assert cast("property", Case.activated).fget(case) == {}  # type: ignore[misc]
    case.activated = {}  # type: ignore[misc]
    first, second = _synchronized(case).splitlines()
    assert first == "# first multiply by the gates of ['norm'] yourself, since torch's layer takes none"
    assert second.startswith("model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)")
