"""Every normalization of a model by path: what it is, what it holds, who reads it; and nothing of the model changes."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from tests import timm_like
from tests.test_adopt import everything, images, net


def test_kinds_calls_and_names() -> None:
    found = {norm.path: norm for norm in nw.find(net(), images())}
    assert {path: norm.kind for path, norm in found.items()} == {
        "bn": "batch",
        "blocks.0.1": "group",
        "blocks.1.1": "group",
        "norms.in": "instance",
        "ln": "layer",
        "rms": "rms",
        "twice": "batch",
        "plain": "batch",
        "bare": "layer",
    }
    assert {path: norm.calls for path, norm in found.items() if norm.calls != 1} == {"blocks.0.1": 2, "twice": 2}
    assert found["blocks.0.1"].also == ("again",)
    assert found["ln"].users == ("rms",)
    assert found["twice"].users == ("twice", "sigmoid")
    assert found["bare"].users == ("head",)
    assert found["bn"].pattern == "[n] c [...]"
    assert found["blocks.0.1"].sizes == {"g": 2, "k": 4}
    assert (found["ln"].parameters, found["bare"].parameters) == ({"weight": (8,)}, {})
    assert set(found["bn"].memory) == {"mean", "var"}
    assert (found["bn"].batches, found["ln"].batches) == (0, None)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(training: bool) -> None:
    model = net().train(training)
    model.conv.weight.grad = torch.randn_like(model.conv.weight)
    x, before, gradient = images(), everything(model), model.conv.weight.grad.clone()
    generator = torch.get_rng_state()
    nw.find(model, x)
    assert everything(model) == before
    assert torch.equal(model.conv.weight.grad, gradient)
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_model_that_fails_changes_nothing_either() -> None:
    model = net()
    before = everything(model)
    with pytest.raises(RuntimeError, match="expected input"):
        nw.find(model, torch.randn(2, 5, 9, 9))
    assert everything(model) == before


def test_what_is_not_known_says_why() -> None:
    model = nn.Sequential(nn.Linear(4, 6), timm_like.SimpleNorm(6), nn.SyncBatchNorm(6).eval())
    simple, synchronized = nw.find(model, torch.randn(3, 4))
    assert (simple.kind, simple.pattern, simple.calls) == ("unknown", None, 1)
    assert simple.reason == "nothing is known of SimpleNorm; say what it means with nw.register_converter"
    assert (synchronized.kind, synchronized.reason) == ("unknown", "its statistics are those of several processes")


def test_hidden_layers_are_seen_and_said_to_be_unregistered() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norms = nn.Linear(4, 6), [nn.BatchNorm1d(6)]

        def forward(self, x: Tensor) -> Tensor:
            return self.norms[0](self.linear(x)).tanh()

    model = Hidden()
    (found,) = nw.find(model)
    assert (found.path, found.registered) == ("norms[0]", False)
    assert (found.calls, found.users) == (1, ("tanh",))
    assert model.norms[0].num_batches_tracked == 0


def test_normwises_own_lazy_layer_still_waits_for_its_sizes() -> None:
    norm = nw.Norm("[n] c [h w]", recovery=nw.Affine("c"), memory=nw.Moving("c", decay=0.9))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    before = repr(model)
    (found,) = nw.find(model)
    assert found.calls == 1
    assert repr(model) == before


def test_without_an_input_calls_are_not_known() -> None:
    model = nn.ModuleList([nn.BatchNorm1d(6)])
    (found,) = nw.find(model)
    assert (found.calls, found.users) == (None, ())
    assert "  ?" in str(nw.find(model))


def test_it_prints_and_serializes() -> None:
    found = nw.find(net(), images())
    lines = str(found).splitlines()
    assert lines[0].split() == ["path", "layer", "pattern", "parameters", "memory", "calls", "read", "by"]
    assert len(lines) == 10
    assert lines[2].startswith("blocks.0.1, again")
    assert json.loads(json.dumps(found.to_dict()))[0]["path"] == "bn"
    assert str(nw.find(nn.Linear(2, 2))) == "no normalization"


def test_a_per_step_memory_that_is_still_empty() -> None:
    (found,) = nw.find(nw.Norm("[n] t c", memory=nw.Moving("t c", decay=0.9, beyond={"t": "last"}), c=6))
    assert found.batches == 0


def test_a_scripted_part_is_named_and_the_rest_is_seen() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting itself is deprecated
        part = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    found = nw.find(nn.Sequential(part, nn.BatchNorm1d(4)))
    assert [(one.path, one.reason) for one in found] == [("0.1", "it is scripted"), ("1", "")]
    assert found[1].calls == 1


def test_a_batch_of_packed_sequences() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.norm = nn.GRU(3, 4), nn.LayerNorm(4)

        def forward(self, packed: Any) -> Tensor:
            return self.norm(self.rnn(packed)[1])

    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 3]))
    assert nw.find(Net(), packed)[0].calls == 1
    assert nw.adopt(Net(), packed).paths == ("norm",)
