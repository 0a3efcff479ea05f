"""Memory as state: loaded or refused, in float32, on no device yet, broadcast, saved with its domains."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import RMS, Affine, Average, BatchNorm, InstanceNorm, Moving, Norm, Renorm, textbook
from tests.test_memory import bits
from tests.tolerances import DOUBLE, MEMORY, VALUES, check

State = dict[str, Tensor]


def with_domain(layer: Norm, name: str = "night", shape: tuple[int, ...] = (8, 3, 2)) -> Norm:
    """A layer that has seen a batch, and another in a domain."""
    layer(torch.randn(shape) * 2 + 1)
    with nw.domain(layer, name):
        layer(torch.randn(shape) * 3 - 1)
    return layer


def cloned(layer: nn.Module) -> State:
    return {name: value.clone() for name, value in layer.state_dict().items()}


LAYERS: dict[str, tuple[Callable[[], Norm], str, tuple[int, ...], str]] = {
    "batch": (lambda: BatchNorm(3), "running_var", (2,), "channel 2: -1e-05"),
    "instance": (lambda: InstanceNorm(3, track_running_stats=True), "running_var", (0,), "channel 0: -1e-05"),
    "two axes": (
        lambda: Norm("[n] c h", recovery=Affine("c"), memory=Average("c h"), c=3, h=2),
        "running_var",
        (1, 0),
        "channel (1, 0): -1e-05",
    ),
    "rms": (
        lambda: Norm("[n] c [h]", RMS(), memory=Moving("c", decay=0.9), c=3),
        "running_mean_square",
        (1,),
        "channel 1: -1e-05",
    ),
}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("prefix", ["", "_domains.night."], ids=["own", "domain"])
@pytest.mark.parametrize(("make", "name", "place", "words"), LAYERS.values(), ids=LAYERS)
def test_a_negative_variance_is_refused_by_channel_and_nothing_is_loaded(
    make: Callable[[], Norm], name: str, place: tuple[int, ...], words: str, prefix: str, assign: bool
) -> None:
    layer, given = with_domain(make()), cloned(with_domain(make()))
    given[f"{prefix}{name}"][place] = -1e-5
    before = bits(layer)
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(given, assign=assign)
    kind = type(layer).__name__
    assert str(caught.value) == (
        f"Error(s) in loading state_dict for {kind}:\n\t{kind}: {prefix}{name} is negative in {words}"
    )
    assert bits(layer) == before


def test_a_refused_checkpoint_gives_a_new_layer_no_sizes_and_no_domains() -> None:
    given = cloned(with_domain(BatchNorm(3)))
    given["running_var"][1] = -1e-5
    lazy = Norm("[n] c [...]", recovery=Affine("c"), memory=Moving("c", decay=0.9))
    model = nn.Sequential(nn.Identity(), lazy)
    with pytest.raises(RuntimeError, match="\t1: running_var is negative in channel 1: -1e-05"):
        model.load_state_dict({f"1.{name}": value for name, value in given.items()})
    assert lazy.domains == ()
    lazy(torch.randn(8, 5))  # another number of channels


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_checkpoints_become_float32_memory(assign: bool, dtype: torch.dtype) -> None:
    given = {name: v.to(dtype) if v.is_floating_point() else v for name, v in cloned(with_domain(BatchNorm(3))).items()}
    layer = BatchNorm(3)
    layer.load_state_dict(given, strict=True, assign=assign)
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == (torch.long if "num_batches" in name else torch.float32)
        assert torch.equal(buffer.double(), given[name].double())
    layer(torch.randn(8, 3))
    assert layer.running_var.dtype == torch.float32


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)])
def test_domains_and_what_is_accumulated_stay_float32(convert: Callable[[nn.Module], nn.Module]) -> None:
    layer = with_domain(BatchNorm(3))
    layer._held_by("night").running_var.fill_(1e-8)
    with nw.accumulate(layer, 2):
        layer(torch.randn(8, 3) * 1e3)
        convert(layer)
        layer(torch.randn(8, 3, dtype=layer.weight.dtype))
    assert layer.weight.dtype.itemsize == 2
    assert {b.dtype for b in layer.buffers() if b.is_floating_point()} == {torch.float32}
    check(layer._held_by("night").running_var, torch.full((3,), 1e-8), DOUBLE)
    assert (layer.running_var > 1e4).all()


READING: dict[str, Callable[[], Norm]] = {
    "batch": lambda: BatchNorm(3),
    "average": lambda: Norm("[n] c [...]", recovery=Affine("c"), memory=Average("c"), c=3),
    "renormalized": lambda: Norm("[n] c [...]", memory=Moving("c", decay=0.9, renorm=Renorm(warmup=1)), c=3),
    "stretching": lambda: Norm("[n] c t", memory=Moving("c t", decay=0.9, beyond={"t": "last"}), c=3),
}
every_reading = pytest.mark.parametrize("make", READING.values(), ids=READING)


def _emptied(layer: nn.Module, state: State) -> None:
    layer.to_empty(device="cpu")
    layer.load_state_dict(state, strict=True)


def _assigned(layer: nn.Module, state: State) -> None:
    layer.load_state_dict(state, strict=True, assign=True)


@every_reading
@pytest.mark.parametrize("fill", [_emptied, _assigned], ids=["to_empty", "assign"])
@pytest.mark.filterwarnings("ignore:.*statistics are not finite")
def test_a_layer_made_on_no_device_lives_on_as_any_other(
    make: Callable[[], Norm], fill: Callable[[nn.Module, State], None]
) -> None:
    known = make()
    known(torch.randn(8, 3, 2))
    with torch.device("meta"):
        layer = make()
    fill(layer, cloned(known))
    assert all(tensor.device.type == "cpu" for tensor in (*layer.buffers(), *layer.parameters()))
    assert layer.skipped_batches.device.type == "cpu"
    assert layer.skipped_batches.item() == 0
    for x in (torch.randn(8, 3, 2), torch.full((8, 3, 2), torch.nan), torch.randn(8, 3, 2)):
        assert torch.equal(layer(x).nan_to_num(9.0), known(x).nan_to_num(9.0))
    assert bits(layer) == bits(known)
    assert layer.skipped_batches.item() == 1


def test_reset_parameters_is_enough_for_a_layer_made_on_no_device() -> None:
    """What FSDP calls."""
    with torch.device("meta"):
        layer = BatchNorm(3)
    layer.to_empty(device="cpu").reset_parameters()
    assert bits(layer) == bits(BatchNorm(3))
    assert layer.skipped_batches.item() == 0


def broadcast(source: nn.Module, target: nn.Module) -> None:
    """As DDP does it: all parameters and buffers, saved or not, in the order of their names."""
    for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        ours, theirs = dict(tensors(source)), dict(tensors(target))
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            tensor.detach().copy_(ours[name])


@every_reading
def test_a_replica_that_is_given_the_buffers_goes_on_as_the_original(make: Callable[[], Norm]) -> None:
    original, replica = with_domain(make()), with_domain(make())
    with nw.accumulate(original, 2), nw.accumulate(replica, 2):
        original(torch.randn(8, 3, 2)), replica(torch.randn(8, 3, 2))
        broadcast(original, replica)
        x = torch.randn(8, 3, 2)
        assert torch.equal(original(x), replica(x))
        assert bits(original) == bits(replica)
    with nw.domain(original, "night"), nw.domain(replica, "night"):
        broadcast(original, replica)
        assert torch.equal(original(x), replica(x))
    assert bits(original) == bits(replica)


def test_domains_are_created_on_load_and_missed_if_they_are_not_there() -> None:
    layer, other = with_domain(BatchNorm(3)), BatchNorm(3)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    given = torch.load(buffer)
    model = nn.ModuleDict({"norm": nn.Sequential(other)})
    model.load_state_dict({f"norm.0.{name}": value for name, value in given.items()}, strict=True)
    assert other.domains == ("night",)
    assert bits(other) == bits(layer)
    x = torch.randn(8, 3, 2)
    for copied in (other, copy.deepcopy(other)):
        with nw.domain(copied.eval(), "night"), nw.domain(layer.eval(), "night"):
            assert torch.equal(copied(x), layer(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*_domains\.night\.running_mean"):
        other.load_state_dict(BatchNorm(3).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_domains\.night\.running_mean"):
        BatchNorm(3, track_running_stats=False).load_state_dict(given)


def test_a_lazy_layer_takes_sizes_and_domains_from_one_checkpoint() -> None:
    layer = with_domain(BatchNorm(3))
    lazy = Norm("[n] c [...]", recovery=Affine("c"), memory=Moving("c", decay=0.9))
    lazy.load_state_dict(layer.state_dict(), strict=True)
    assert bits(lazy) == bits(layer)


def test_loading_clears_neither_freezing_nor_the_domain_in_use() -> None:
    layer = with_domain(BatchNorm(3))
    given = cloned(with_domain(BatchNorm(3)))
    nw.freeze(layer)
    with nw.domain(layer, "night"):
        layer.load_state_dict(given, strict=True)
        x = torch.randn(8, 3, 2)
        mean, var = given["_domains.night.running_mean"], given["_domains.night.running_var"]
        check(layer(x), (x - mean[:, None]) / (var[:, None] + 1e-5).sqrt(), VALUES)
    assert layer.frozen
    assert not layer.weight.requires_grad
    assert bits(layer) == {name: value.numpy().tobytes() for name, value in given.items()}


def test_a_whole_layer_is_saved_with_its_counts() -> None:
    layer = with_domain(BatchNorm(3))
    with pytest.warns(UserWarning, match="not finite"):
        layer(torch.full((8, 3), torch.nan))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    assert bits(restored) == bits(layer)
    assert restored.skipped_batches.item() == 1
    restored(torch.full((8, 3), torch.nan))  # it has been warned of
    assert (restored.skipped_batches.item(), layer.skipped_batches.item()) == (2, 1)


def test_functional_call_takes_the_buffers_of_a_domain() -> None:
    layer = with_domain(BatchNorm(3))
    before, x = bits(layer), torch.randn(8, 3)
    given = {name: value.clone() for name, value in layer.named_buffers()}
    with nw.domain(layer, "night"):
        torch.func.functional_call(layer, given, (x,))
        assert bits(layer) == before
        layer(x)
    assert {name: value for name, value in bits(layer).items() if name in given} == {
        name: value.numpy().tobytes() for name, value in given.items()
    }


@pytest.mark.parametrize(("decay", "momentum"), [(0.9, 0.1), (0.99, 0.01)])
def test_every_convention_of_momentum_gives_one_memory_bit_for_bit(decay: float, momentum: float) -> None:
    """torch's weighs the new value; the lecture's, Keras' and `decay` the old one. The lecture's variance is biased."""
    layer, theirs = BatchNorm(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    by_decay = Norm("[n] c", recovery=Affine("c"), memory=Moving("c", decay=decay))
    by_rate = Norm("[n] c", recovery=Affine("c"), memory=Moving("c", update_rate=momentum))
    biased = Norm("[n] c", memory=Moving("c", decay=decay, unbiased=False))
    mean, var = torch.zeros(3), torch.ones(3)
    for _ in range(5):
        x = torch.randn(8, 3) * 3 + 1
        layer(x), theirs(x), by_decay(x), by_rate(x), biased(x)
        _, mean, var = textbook.batch_norm(x, torch.ones(3), torch.zeros(3), mean, var, 1e-5, decay, training=True)
    assert bits(by_decay) == bits(by_rate) == bits(layer)
    check(layer.running_mean, theirs.running_mean, VALUES)
    check(layer.running_var, theirs.running_var, MEMORY)
    check(mean, biased.running_mean, VALUES)
    check(var, biased.running_var, MEMORY)
