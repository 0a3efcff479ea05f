"""What holds after adopt, swap and release: in other modes and dtypes, out of order, for models of unusual habits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import SurgeryError
from normwise.surgery import converters
from tests.tolerances import DOUBLE, VALUES, check


@pytest.mark.parametrize("make", [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d])
@pytest.mark.parametrize("tracks", [False, True])
def test_an_instance_norm_takes_a_single_example_as_torchs_does(make: Any, tracks: bool) -> None:
    model = nn.Sequential(make(6, track_running_stats=tracks))
    x = torch.randn(6, *(7, 5, 4)[: int(make.__name__[-2])])
    for training in (True, False):
        expected = copy.deepcopy(model).train(training)(x)
        with nw.adopt(model.train(training)) as record:
            check(record.model(x), expected, VALUES)


def test_undo_follows_mode_dtype_and_checkpoint() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    record = nw.adopt(model)
    model.eval().double()
    given = {name: torch.rand_like(value.double()) for name, value in model.state_dict().items()}
    model.load_state_dict(given, assign=True)
    expected = model(torch.ones(2, 4).double())
    record.undo()
    assert type(model[1]) is nn.BatchNorm1d
    assert not model[1].training
    check(model(torch.ones(2, 4).double()), expected, DOUBLE)


def test_undo_out_of_order_is_refused_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    first, second = nw.adopt(model), nw.swap(model, "batch", "group")
    with pytest.raises(SurgeryError, match=r"^1: another layer stands there since: undo first what was done later$"):
        first.undo()
    assert isinstance(model[1], nw.GroupNorm)
    second.undo()
    assert type(first.undo()[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(("word", "shape"), [("rms", (2, 5, 8)), ("group", (2, 8, 8))])
def test_torchs_encoder_calls_the_norms_that_stand_in_it(word: str, shape: tuple[int, ...]) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(shape)
    padding = torch.arange(shape[1]).expand(2, -1) >= shape[1] - 2
    nw.swap(model, "layer", word)
    called: list[nn.Module] = []
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower() and module is not model]
    before = [type(norm).forward for norm in norms]
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
    for norm in norms:
        norm.register_forward_hook(lambda m, *_: called.append(m))
    with torch.no_grad():
        check(model(x, src_key_padding_mask=padding), fast, VALUES)
    assert len(before) == len(called) == 4


@pytest.mark.parametrize(
    "make",
    [lambda: nw.BatchNorm(4), lambda: nw.InstanceNorm(4), lambda: nw.GroupNorm(2, 4)],
    ids=["batch", "instance", "group"],
)
def test_release_is_not_held_to_a_rounding_that_torch_has_not(make: Any) -> None:
    record = nw.release(nn.Sequential(make()), torch.randn(3, 4, 5))
    assert len(record.changed) == 1


def test_a_converter_whose_gradient_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Detached(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            mean, variance = x.mean(-1, keepdim=True).detach(), x.var(-1, correction=0, keepdim=True).detach()
            return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias

    monkeypatch.setitem(converters._registered, Detached, lambda old: nw.LayerNorm(old.normalized_shape, old.eps))
    (left,) = nw.adopt(nn.Sequential(Detached(8))).left
    assert left.why == "it computes something else than '... [d]' with its settings, in training"


def test_a_model_that_gives_arrays_runs_without_gradients_only() -> None:
    class Arrays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(self.norm(x).numpy())

    assert nw.adopt(Arrays().eval(), torch.randn(6, 4)).paths == ("norm",)
