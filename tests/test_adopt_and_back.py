"""Undo, release, exceptions, roots and wrappers: the way back from adopt is always open, or adopt says no."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import SurgeryError
from normwise.surgery import exchange as exchanging
from normwise.surgery.proof import Proof
from tests import timm_like
from tests.test_adopt import everything, images, linear_bn, net, state

# ------------------------------------------------------------------------------------------------- back, and not half


@pytest.mark.parametrize("training", [True, False])
def test_undo_gives_back_the_very_same_objects(training: bool) -> None:
    model = net().train(training)
    before = everything(model)
    record = nw.adopt(model)
    assert everything(model) != before
    assert record.undo() is model
    assert everything(model) == before
    assert record.undo() is model
    assert everything(model) == before


def test_a_record_holds_for_a_while() -> None:
    model = net()
    before = everything(model)
    with nw.adopt(model):
        assert isinstance(model.bn, nw.BatchNorm)
    assert everything(model) == before


def test_a_copy_leaves_the_original_as_it_is() -> None:
    model = net()
    before = everything(model)
    record = nw.adopt(model, copy=True)
    assert everything(model) == before
    assert isinstance(record.model.bn, nw.BatchNorm)
    assert state(record.model) == state(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in record.model.parameters()}


def test_adopting_twice_changes_nothing_the_second_time() -> None:
    model = net()
    nw.adopt(model)
    before = everything(model)
    record = nw.adopt(model)
    assert (record.changed, record.left) == ((), ())
    assert everything(model) == before


def test_release_gives_the_same_classes_and_settings_back() -> None:
    model = net()
    shown, before = repr(model), state(model)
    nw.adopt(model)
    assert repr(model) != shown
    record = nw.release(model)
    assert not record.left
    assert repr(model) == shown
    assert state(model) == before
    assert model.again is model.blocks[0][1]
    assert not [m for m in model.modules() if "adopted_from" in m.__dict__]


def test_release_takes_the_class_that_the_inputs_ask_for() -> None:
    model = nn.Sequential(nw.BatchNorm(3), nn.Flatten(2), nw.InstanceNorm(3), nn.Flatten(), nw.BatchNorm(60))
    nw.release(model, torch.randn(4, 3, 4, 5))
    assert [type(m) for m in model][::2] == [nn.BatchNorm2d, nn.InstanceNorm1d, nn.BatchNorm1d]


def test_release_of_a_layer_that_is_called_by_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 6), nw.BatchNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=self.linear(x))

    model = Keyword()
    nw.release(model)
    assert type(model.norm) is nn.BatchNorm1d


NOT_TORCHS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "by a pattern": (lambda: nw.Norm("[n] c", c=6), "torch has no equal of Norm"),
    "frozen": (
        lambda: nw.freeze(nw.BatchNorm(6)).model,
        "it is frozen, which torch's layers cannot be: nw.unfreeze first",
    ),
    "channels first": (lambda: nw.LayerNorm2d(6), "torch has no equal of LayerNorm2d"),
    "policy": (
        lambda: nw.BatchNorm(6, nonfinite="raise"),
        f"torch's has no policies: {nw.BatchNorm(6, nonfinite='raise').spec.memory!r}",
    ),
}


@pytest.mark.parametrize(("make", "why"), NOT_TORCHS.values(), ids=NOT_TORCHS)
def test_release_leaves_what_torch_cannot_do(make: Callable[[], nn.Module], why: str) -> None:
    model = nn.Sequential(make())
    record = nw.release(model, torch.randn(5, 6))
    assert [line.why for line in record.left] == [why]
    assert isinstance(model[0], nw.Norm)


def test_release_without_an_input_does_not_guess_the_rank() -> None:
    record = nw.release(nn.ModuleList([nw.BatchNorm(6)]))
    assert [line.why for line in record.left] == [
        "whether torch's is the 1d, 2d or 3d one is not known: give a batch that reaches it"
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_exception_in_the_middle_of_the_exchange_leaves_the_model_as_it_was(
    error: type[BaseException], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, put = net(), [], exchanging.Edits.exchange
    before = everything(model)

    def failing(self: object, *args: object) -> None:
        calls.append(args)
        if len(calls) > at:
            raise error
        put(self, *args)

    monkeypatch.setattr(exchanging.Edits, "exchange", failing)
    with pytest.raises(error):
        nw.adopt(model)
    assert len(calls) == at + 1
    assert everything(model) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_the_proof_leaves_the_model_as_it_was(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    before = everything(model)

    def failing(self: object, *args: object) -> None:
        assert isinstance(model.bn, nw.BatchNorm)  # everything is exchanged by now
        raise error

    monkeypatch.setattr(Proof, "check", failing)
    with pytest.raises(error):
        nw.adopt(model)
    assert everything(model) == before


def test_an_interrupt_inside_of_a_forward_of_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = everything(model)

    def interrupted(self: object, *args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nw.GroupNorm, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nw.adopt(model, images())
    assert everything(model) == before


def test_a_model_that_asks_for_torchs_class_is_found_out_and_put_back() -> None:
    class Particular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x)) * (2 if type(self.norm) is nn.BatchNorm1d else 1)

    model = Particular()
    before = everything(model)
    message = r"adopt: the model then computes something else, by \d\.\de-0\d on given \(allowed: 1e-05\); "
    with pytest.raises(SurgeryError, match="^" + message + "everything is as it was$"):
        nw.adopt(model, torch.randn(5, 4))
    assert everything(model) == before


def test_training_works_where_the_model_writes_into_the_output() -> None:
    for act in (nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True), nn.Hardswish(inplace=True)):
        layers = nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.LayerNorm([7, 7])
        for norm in layers:
            model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, act)
            nw.adopt(model)
            y = model(torch.randn(4, 3, 9, 9))
            y.backward(torch.randn(y.shape))
            assert model[0].weight.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------- roots and wrappers


def test_a_root_that_is_a_normalization_is_given_back_in_the_record() -> None:
    layer = nn.BatchNorm1d(6)
    record = nw.adopt(layer)
    assert record.paths == ("BatchNorm1d",)
    assert type(record.model) is nw.BatchNorm
    assert record.model.weight is layer.weight
    assert record.undo() is layer
    assert record.model is layer


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_wrappers_are_refused_with_the_way_out(tmp_path: Path) -> None:
    class Parallel(nn.DataParallel):
        pass

    compiled = torch.compile(linear_bn())
    refused = {
        nn.DataParallel(linear_bn()): "the model is a DataParallel: operate on its .module",
        Parallel(linear_bn()): "the model is a Parallel: operate on its .module",
        nn.Sequential(nn.DataParallel(linear_bn())): "0 is a DataParallel: operate on its .module",
        compiled: "the model is a OptimizedModule: operate on its ._orig_mod, and compile that again",
    }
    for model, message in refused.items():
        before = everything(model)
        with pytest.raises(SurgeryError, match=f"^{re.escape(message)}$"):
            nw.adopt(model)
        assert everything(model) == before
    with _one_process(tmp_path):
        model = nn.parallel.DistributedDataParallel(linear_bn())
        message = (
            "the model is a DistributedDataParallel: operate on its .module before it is wrapped; its buckets "
            "know the old parameters"
        )
        with pytest.raises(SurgeryError, match=f"^{re.escape(message)}$"):
            nw.adopt(model)
        assert [found.path for found in nw.find(model, torch.randn(5, 4))] == ["module.1"]


class _one_process:  # noqa: N801 - a context manager, used as a function
    def __init__(self, folder: Path) -> None:
        self.file = folder / "store"

    def __enter__(self) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{self.file}", rank=0, world_size=1)

    def __exit__(self, *_: object) -> None:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_models_are_refused() -> None:
    for model in (torch.jit.script(linear_bn()), torch.jit.trace(linear_bn().eval(), torch.randn(5, 4))):
        message = "^a scripted model cannot be looked into: operate on the module it was scripted from$"
        with pytest.raises(SurgeryError, match=message):
            nw.adopt(model)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(SurgeryError, match=r"^a model is a torch\.nn\.Module, not dict$"):
        nw.adopt({"weight": torch.ones(3)})


def test_lazy_layers_still_wait_for_their_sizes_afterwards() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(5))
    assert nw.adopt(model).paths == ("1",)
    assert type(model[3]) is nn.LazyLinear
    assert model(torch.randn(2, 3, 11, 10)).shape == (2, 5)
    first = nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8))
    nw.adopt(first)
    assert type(first[0]) is nn.LazyConv2d
    assert first(torch.randn(2, 5, 9, 9)).shape == (2, 8, 7, 7)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.filterwarnings("default:input's size at dim=0 does not match num_features:UserWarning")
def test_an_instance_norm_without_any_other_layer(dims: int, affine: bool) -> None:
    """torch takes a tensor without a batch axis for one example; the input that is looked for has one."""
    layer = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1](6, affine=affine)
    record = nw.adopt(layer)
    assert type(record.model) is nw.InstanceNorm
    assert record.proof


def test_a_record_prints_and_serializes() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), timm_like.SimpleNorm(6))
    record = nw.adopt(model, torch.randn(5, 4))
    text = str(record).splitlines()
    assert text[0] == "adopt: 1 changed, 1 left as they were"
    assert "1        BatchNorm1d(6)  BatchNorm(6)  the same declaration, parameters and memory" in text
    assert any(line.startswith("  given: ") for line in text)
    assert record.largest_difference <= 1e-5
    plain = record.to_dict()
    assert plain["changed"][0]["path"] == "1"
    assert plain["left"][0]["after"] is None
    assert [check["probe"] for check in plain["proof"]][:3] == ["given", "a mean of 30", "a constant channel"]
