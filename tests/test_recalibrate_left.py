"""Recalibration: what stays as it is, what is left and why, what is skipped, refused and taken back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import BatchNorm, Frozen, Moving, Norm, SurgeryError
from normwise.surgery.recalibrate import recalibrate
from tests.recalibrated import SIZES, both_ways, check_memory, data, deep, every_layer, generators, memory, state


def test_torchs_layers_stay_torchs_with_the_same_tensors() -> None:
    model, batches = deep(), list(data(16, 4).split(SIZES))
    layers = list(model.modules())
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    recalibrate(model, batches)
    assert [after is before for after, before in zip(model.modules(), layers, strict=True)] == [True] * len(layers)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert {name: tensor is after[name] for name, tensor in tensors.items()} == dict.fromkeys(after, True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())
    assert [type(model[at]) for at in (1, 5, 9)] == [nn.BatchNorm1d] * 3


@both_ways
def test_nothing_but_the_statistics_moves(layerwise: bool) -> None:
    model, batches = deep(ours=True), list(data(16, 4).split(SIZES))
    model[5].eval(), model[0].weight.requires_grad_(False)
    y = model(batches[2])
    (y * torch.randn_like(y)).sum().backward()
    before, numbers = state(model), generators()
    recalibrate(model, batches, loss=lambda y, x: y.square().mean(), layerwise=layerwise)
    after = state(model)
    assert generators() == numbers
    for path in ("1", "5", "9"):
        kept, new = before.pop(path), after.pop(path)
        changed = [name for name, value in kept[2].items() if new[2][name] != value]
        assert changed == ["running_mean", "running_var", "num_batches_tracked"]
        assert (kept[5][1], new[5][1]) == (kept[1], True)  # whether the memory is known to be fed
        kept[5][1] = True
        assert (kept[:2], kept[3:]) == (new[:2], new[3:])
    assert after == before


@both_ways
@pytest.mark.parametrize("ours", [False, True], ids=["torch", "ours"])
def test_undo_puts_back_every_bit(ours: bool, layerwise: bool) -> None:
    model = deep(ours)
    before = state(model)
    record = recalibrate(model, data(16, 4).split(SIZES), layerwise=layerwise)
    assert state(model) != before
    assert record.undo() is model
    assert state(model) == before


class Interrupting:
    """Raises at the given call."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.left, self.error = at, error

    def __call__(self, *args: Any) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return torch.ones(())


class Broken(list[Tensor]):
    """Batches of which the second cannot be read."""

    def __init__(self, batches: list[Tensor], error: BaseException) -> None:
        super().__init__(batches)
        self.interrupt = Interrupting(2, error)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in super().__iter__():
            self.interrupt()
            yield batch


def _interrupted(layer: nn.Module, args: tuple[Any, ...]) -> None:
    layer.interrupt()


@pytest.mark.parametrize(
    ("layerwise", "error"),
    [(False, KeyboardInterrupt()), (True, KeyboardInterrupt()), (False, ZeroDivisionError())],
    ids=["one pass, Ctrl-C", "layerwise, Ctrl-C", "one pass, exception"],
)
@pytest.mark.parametrize("ours", [False, True], ids=["torch", "ours"])
@pytest.mark.parametrize("where", ["batches", "batch 2", "layer 3", "loss before", "loss after", "last pass"])
def test_an_exception_anywhere_leaves_every_bit_as_it_was(
    where: str, ours: bool, error: BaseException, layerwise: bool
) -> None:
    model, given = deep(ours), list(data(16, 4).split(SIZES))
    if ours:
        model[1]._skips[0] = 5
    model[5].eval()
    options: dict[str, Any] = {"layerwise": layerwise}
    batches: Any = given
    if where == "batches":
        batches = Broken(given, error)
    elif where in ("loss before", "loss after"):
        options["loss"] = Interrupting(2 if where == "loss before" else 5, error)
    else:
        at, calls = {"batch 2": (0, 2), "layer 3": (9, 1), "last pass": (9, 10 if layerwise else 3)}[where]
        model[at].interrupt = Interrupting(calls, error)
        model[at].register_forward_pre_hook(_interrupted)
    before, numbers = state(model), generators()
    with pytest.raises(type(error)):
        recalibrate(model, batches, **options)
    assert (state(model), generators()) == (before, numbers)
    assert not [name for name, _ in model.named_buffers() if "_pool" in name]
    recalibrate(model, given)  # and nothing is in the way of the next time
    with torch.no_grad():
        check_memory(model[1], model[0](torch.cat(given)))


def test_half_precision_statistics_are_written_back_in_half() -> None:
    layer, x = nn.BatchNorm1d(4).half(), data(16, 4).half()
    tensors = list(layer._buffers.values())
    recalibrate(layer, x.split(SIZES))
    assert all(after is before for after, before in zip(layer._buffers.values(), tensors, strict=True))
    assert torch.equal(layer.running_mean, x.double().mean(0).float().half())
    assert torch.equal(layer.running_var, x.double().var(0).float().half())
    before = memory(layer)
    record = recalibrate(layer, [x * 300])
    assert record.left[0].why == "the variance of the batches joined is not finite in torch.float16"
    assert all(map(torch.equal, memory(layer), before))


class Doubled(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return 2 * super().forward(input)


class Whitened(nn.Module):
    """Keeps statistics, and is nothing that anybody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean


def frozen() -> nn.Module:
    layer = BatchNorm(4)
    nw.freeze(layer)
    return layer


def untracked() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    layer.track_running_stats = False
    return layer


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (
        lambda: Doubled(4),
        "Doubled is a subclass that may do more; say what it means with nw.register_converter",
    ),
    "unknown": (Whitened, "it is no normalization that is known; say what it means with nw.register_converter"),
    "frozen": (frozen, "it is frozen: nw.unfreeze first"),
    "declared": (lambda: Norm("[n] c", memory=Frozen("c"), c=4), "its memory is declared to stay as it is"),
    "untracked": (untracked, "its track_running_stats is off"),
    "averaged": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 2)), Norm("[n] t c", memory=Moving("c", decay=0.9), c=2), nn.Flatten()
        ),
        "'[n] t c' averages over t in its memory, and averages of batches are not joined",
    ),
}


@both_ways
@pytest.mark.parametrize(("make", "why"), LEFT.values(), ids=LEFT)
def test_what_cannot_be_measured_is_left_with_the_reason(
    make: Callable[[], nn.Module], why: str, layerwise: bool
) -> None:
    model, x = nn.Sequential(make(), nn.BatchNorm1d(4)), data(16, 4)
    before = {name: value.clone() for name, value in model[0].state_dict().items()}
    record = recalibrate(model, x.split(SIZES), layerwise=layerwise)
    (line,) = record.left
    assert (line.path.split(".")[0], line.after, line.why) == ("0", None, why)
    assert all(torch.equal(value, before[name]) for name, value in model[0].state_dict().items())
    assert record.paths == ("1",)
    with torch.no_grad():
        check_memory(model[1], model[0].eval()(x))  # what is left computes as in evaluation


@both_ways
def test_a_layer_that_no_batch_reaches(layerwise: bool) -> None:
    model, x = nn.ModuleDict({"used": nn.BatchNorm1d(4), "unused": BatchNorm(4)}), data(16, 4)
    model["unused"](x)
    before = state(model["unused"])
    record = recalibrate(model, x.split(SIZES), forward=lambda m, batch: m["used"](batch), layerwise=layerwise)
    assert [(line.path, line.before, line.why) for line in record.left] == [
        ("unused", "BatchNorm(4)", "no batch reached it")
    ]
    assert state(model["unused"]) == before
    assert record.paths == ("used",)


def test_a_model_that_remembers_nothing() -> None:
    record = recalibrate(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), [torch.randn(3, 4)])
    assert (record.changed, record.left, record.notes) == ((), (), ("no layer remembers anything",))


def test_within_no_update_nothing_enters() -> None:
    model = nn.Sequential(BatchNorm(4))
    with nw.no_update(model):
        record = recalibrate(model, [data(16, 4)])
    assert [line.why for line in record.left] == ["nothing enters its memory within nw.no_update"]
    assert model[0].num_batches_tracked == 0


@both_ways
@every_layer
def test_batches_that_are_not_finite_are_skipped_and_counted(make: Callable[[], nn.Module], layerwise: bool) -> None:
    layer, x = make(), data(16, 4)
    broken = torch.full((6, 4), torch.inf)
    record = recalibrate(nn.Sequential(layer), [x[:3], broken, x[3:8], broken, x[8:]], layerwise=layerwise)
    check_memory(layer, x)
    assert layer.num_batches_tracked == 3
    assert record.changed[0].why.startswith("16 samples a statistic in 3 of 5 batches, 2 skipped as not finite; ")
    if isinstance(layer, Norm):
        assert layer.skipped_batches == 2
    before = state(layer)
    record = recalibrate(nn.Sequential(layer), [broken, broken], layerwise=layerwise)
    assert [line.why for line in record.left] == ["no batch that reached it was finite"]
    assert state(layer) == before


def test_a_layer_that_raises_at_what_is_not_finite() -> None:
    model = nn.Sequential(nn.Identity(), BatchNorm(4, nonfinite="raise"))
    before = state(model)
    with pytest.raises(nw.NonFiniteError) as caught:
        recalibrate(model, [torch.randn(5, 4), torch.full((5, 4), torch.nan)])
    assert str(caught.value) == ("1: the batch's statistics are not finite, and nothing of it has entered the memory")
    assert state(model) == before


def test_a_memory_that_was_ruined_is_mended() -> None:
    layer, x = nn.BatchNorm1d(4), data(16, 4)
    layer(torch.full((3, 4), torch.nan))
    assert layer.running_mean.isnan().all()
    record = recalibrate(layer, x.split(SIZES))
    check_memory(layer, x)
    assert record.changed[0].why == "16 samples a statistic in 3 batches; what was remembered was not finite"


def test_a_batch_of_one_row() -> None:
    """Refused with the path; where the memory stands in it does not enter, and the record says so."""
    model, x = nn.Sequential(nn.Identity(), nn.BatchNorm1d(4)), data(16, 4)
    before = state(model)
    with pytest.raises(nw.TooFewSamplesError, match=r"^1: shape \(1, 4\) leaves 1 sample a column"):
        recalibrate(model, [x, x[:1]])
    assert state(model) == before
    layer = BatchNorm(4, degenerate="memory")
    record = recalibrate(layer, [x[:1], x, x[:1]])
    check_memory(layer, x)
    assert record.changed[0].why.startswith("16 samples a statistic in 1 of 3 batches; ")
    record = recalibrate(layer, [x[:1]])
    assert record.left[0].why == "no batch with samples enough reached it"
    check_memory(layer, x)


REFUSED: dict[str, tuple[Callable[[], tuple[Any, Any, dict[str, Any]]], str]] = {
    "no module": (lambda: (3, [], {}), "a model is a torch.nn.Module, not int"),
    "no batches": (lambda: (nn.BatchNorm1d(4), [], {}), "there are no batches to recalibrate with"),
    "none layerwise": (
        lambda: (nn.BatchNorm1d(4), [], {"layerwise": True}),
        "there are no batches to recalibrate with",
    ),
    "none for a loss": (lambda: (nn.BatchNorm1d(4), [], {"loss": max}), "there are no batches to recalibrate with"),
    "a tensor": (
        lambda: (nn.BatchNorm1d(4), torch.randn(8, 4), {}),
        "batches is a list or a loader of batches, not one Tensor: [batch] is a list of one",
    ),
    "a mapping": (
        lambda: (nn.BatchNorm1d(4), {"x": torch.randn(8, 4)}, {}),
        "batches is a list or a loader of batches, not one dict: [batch] is a list of one",
    ),
    "a number": (
        lambda: (nn.BatchNorm1d(4), 3, {}),
        "batches is a list or a loader of batches, not one int: [batch] is a list of one",
    ),
    "read once, layerwise": (
        lambda: (nn.BatchNorm1d(4), iter([torch.randn(8, 4)]), {"layerwise": True}),
        "batches is a list_iterator, which can be read once, and loss= and layerwise=True read it several times: give "
        "a list or a loader",
    ),
    "read once, loss": (
        lambda: (nn.BatchNorm1d(4), (x for x in [torch.randn(8, 4)]), {"loss": max}),
        "batches is a generator, which can be read once, and loss= and layerwise=True read it several times: give a "
        "list or a loader",
    ),
    "many losses": (
        lambda: (nn.BatchNorm1d(4), [torch.randn(8, 4)], {"loss": lambda y, x: y.square()}),
        "loss gives a tensor of shape (8, 4), and has to give one number",
    ),
    "no sizes": (
        lambda: (nn.Sequential(nn.LazyBatchNorm1d()), [torch.randn(8, 4)], {}),
        "0.weight has no size yet: run a batch through the model first",
    ),
    "wrapped": (
        lambda: (nn.DataParallel(nn.BatchNorm1d(4)), [torch.randn(8, 4)], {}),
        "the model is a DataParallel: operate on its .module",
    ),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(make: Callable[[], tuple[Any, Any, dict[str, Any]]], message: str) -> None:
    model, batches, options = make()
    with pytest.raises(SurgeryError, match=f"^{re.escape(message)}$"):
        recalibrate(model, batches, **options)


def test_within_accumulate_it_is_refused() -> None:
    model = nn.Sequential(BatchNorm(4))
    with nw.accumulate(model, 2):
        model(torch.randn(8, 4))
        with pytest.raises(SurgeryError) as caught:
            recalibrate(model, [torch.randn(8, 4)])
    assert str(caught.value) == "0: recalibrate within nw.accumulate: what is accumulated would be lost"
    assert model[0].num_batches_tracked == 1


def test_an_iterator_is_read_once() -> None:
    layer, x = nn.BatchNorm1d(4), data(16, 4)
    recalibrate(layer, (part for part in x.split(SIZES)))
    check_memory(layer, x)


def test_a_copy_is_recalibrated_in_the_place_of_the_model() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(4)), data(16, 4)
    before = state(model)
    record = recalibrate(model, x.split(SIZES), copy=True)
    check_memory(record.model[0], x)
    assert state(model) == before


def test_the_record_reads() -> None:
    x = torch.tensor([[0.0], [2.0], [4.0]])
    assert (
        str(recalibrate(nn.Sequential(nn.BatchNorm1d(1, eps=0.0)), [x]))
        == """\
recalibrate: 1 changed, 0 left as they were

changed  before          after           why
0        BatchNorm1d(1)  BatchNorm1d(1)  3 samples a statistic in 1 batch; mean moved by at most 1 standard \
deviations, variance by a factor 4 to 4"""
    )
