"""Numbers go from torch to normwise and back, strictly; and what selects layers by torch's classes finds ours."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import normwise as nw
from normwise import Affine, Average, Moving, Norm
from tests.catalogue import CASES, Case, randomize
from tests.tolerances import VALUES, check

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_both_ways_strictly(case: Case) -> None:
    ours, twin = case.ours(), case.twin()
    assert list(ours.state_dict()) == list(twin.state_dict())
    shapes = {name: (value.shape, value.dtype) for name, value in twin.state_dict().items()}
    assert {name: (value.shape, value.dtype) for name, value in ours.state_dict().items()} == shapes
    x = torch.randn(case.shape)
    randomize(twin)
    ours.load_state_dict(twin.state_dict(), strict=True)
    check(ours.eval()(x), twin.eval()(x), VALUES)
    randomize(ours)
    twin.load_state_dict(ours.state_dict(), strict=True)
    check(ours(x), twin(x), VALUES)


@every_case
def test_through_a_file_with_weights_only(case: Case) -> None:
    twin = case.twin()
    randomize(twin)
    buffer = io.BytesIO()
    torch.save(twin.state_dict(), buffer)
    buffer.seek(0)
    ours = case.ours()
    ours.load_state_dict(torch.load(buffer), strict=True)
    x = torch.randn(case.shape)
    check(ours.eval()(x), twin.eval()(x), VALUES)


def test_a_whole_model_strictly() -> None:
    def model(batch: type, group: type, layer: type) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), batch(8), nn.ReLU(), group(2, 8), nn.Flatten(), nn.LazyLinear(4), layer(4)
        )

    theirs = model(nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    ours = model(nw.BatchNorm, nw.GroupNorm, nw.LayerNorm)
    x = torch.randn(4, 3, 6, 6)
    theirs(x), ours(x)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    check(ours.eval()(x), theirs.eval()(x), VALUES)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"])
def test_a_missing_or_unknown_key_is_an_error(name: str) -> None:
    state = nw.BatchNorm(3).state_dict()
    value = state.pop(name)
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        nw.BatchNorm(3).load_state_dict(state)
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{name}"'):
        nw.BatchNorm(3, affine=False, track_running_stats=False).load_state_dict({name: value})


def test_another_size_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nw.BatchNorm(3).load_state_dict(nn.BatchNorm1d(4).state_dict())


def test_a_checkpoint_from_before_batches_were_counted() -> None:
    old = nn.BatchNorm1d(3).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    layer = nw.BatchNorm(3)
    layer(torch.randn(4, 3))
    layer.load_state_dict(old, strict=True)
    assert layer.running_mean.abs().max() == 0


def test_a_half_precision_checkpoint_loads_into_float32_memory() -> None:
    theirs = nn.BatchNorm1d(3).half()
    theirs.running_var.fill_(0.5)
    layer = nw.BatchNorm(3)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    assert layer.running_var.dtype == torch.float32
    assert (layer.running_var == 0.5).all()
    theirs.load_state_dict(layer.half().state_dict(), strict=True)


LAZY = {
    "batch": (
        lambda: Norm("[n] c [...]", recovery=Affine("c"), memory=Moving("c", decay=0.9)),
        lambda: nn.BatchNorm1d(6),
        (4, 6, 5),
        {"c": 6},
    ),
    "memory only": (
        lambda: Norm("[n] c", memory=Average("c")),
        lambda: nn.BatchNorm1d(6, affine=False, momentum=None),
        (4, 6),
        {"c": 6},
    ),
    "two axes": (
        lambda: Norm("n [h w]", recovery=Affine("h w")),
        lambda: nn.LayerNorm((4, 6)),
        (3, 4, 6),
        {"h": 4, "w": 6},
    ),
    "groups": (
        lambda: Norm("n (g [k]) [...]", recovery=Affine("(g k)"), g=2),
        lambda: nn.GroupNorm(2, 6),
        (4, 6, 5),
        {"g": 2, "k": 3},
    ),
}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize(("declare", "make", "shape", "sizes"), LAZY.values(), ids=LAZY)
def test_a_lazy_layer_takes_its_sizes_from_a_checkpoint(
    declare: type, make: type, shape: tuple[int, ...], sizes: dict[str, int], assign: bool
) -> None:
    layer, twin = declare(), make()
    randomize(twin)
    layer.load_state_dict(twin.state_dict(), strict=True, assign=assign)
    assert dict(layer.spec.sizes) == sizes
    x = torch.randn(shape)
    check(layer.eval()(x), twin.eval()(x), VALUES)
    twin.load_state_dict(layer.state_dict(), strict=True)


def test_a_lazy_layer_in_a_model_takes_its_sizes_from_a_checkpoint() -> None:
    theirs = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6))
    ours = nn.Sequential(nn.Linear(2, 6), LAZY["batch"][0]())
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(4, 2)
    check(ours.eval()(x), theirs.eval()(x), VALUES)


def test_a_lazy_layers_state_saves_and_loads() -> None:
    make = LAZY["batch"][0]
    buffer = io.BytesIO()
    torch.save(make().state_dict(), buffer)
    buffer.seek(0)
    layer = make()
    layer.load_state_dict(torch.load(buffer, weights_only=False), strict=True)
    y = layer(torch.randn(4, 6))
    assert y.isfinite().all()
    assert layer.weight.shape == (6,)
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight
    assert not layer.state_dict()["weight"].requires_grad


def test_a_checkpoint_that_gives_some_sizes_only_is_refused_and_changes_nothing() -> None:
    layer = Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9))
    with pytest.raises(RuntimeError, match="Norm: the checkpoint does not give the size of axis 't'"):
        layer.load_state_dict({"weight": torch.full((4,), 2.0), "bias": torch.zeros(4)}, strict=False)
    assert layer.spec.unknown == ("c", "t")


TORCH_CLASSES = [
    (nw.BatchNorm(4), nn.modules.batchnorm._BatchNorm),
    (nw.InstanceNorm(4), nn.modules.instancenorm._InstanceNorm),
    (nw.LayerNorm(4), nn.LayerNorm),
    (nw.LayerNorm2d(4), nn.LayerNorm),
    (nw.GroupNorm(2, 4), nn.GroupNorm),
    (nw.RMSNorm(4), nn.RMSNorm),
    (nw.RMSNorm2d(4), nn.RMSNorm),
]


@pytest.mark.parametrize(("layer", "kind"), TORCH_CLASSES, ids=lambda value: getattr(value, "__name__", ""))
def test_named_layers_are_instances_of_torchs_classes_and_of_norm(layer: nn.Module, kind: type) -> None:
    assert isinstance(layer, kind)
    assert isinstance(layer, Norm)


def test_update_bn_measures_the_population_and_restores_momentum() -> None:
    def model(batch: type) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), batch(5, momentum=0.3), nn.ReLU())

    ours, theirs = model(nw.BatchNorm), model(nn.BatchNorm1d)
    theirs.load_state_dict(ours.state_dict())
    batches = [torch.randn(8, 3) * n for n in range(1, 6)]
    for network in (ours, theirs):
        network(torch.randn(8, 3) * 100)  # what update_bn must forget
        network.eval()
        update_bn(batches, network)
    assert ours[1].momentum == theirs[1].momentum == 0.3
    assert ours[1].spec.memory == Moving("c", update_rate=0.3)
    assert not ours.training
    for name, value in theirs.state_dict().items():
        check(ours.state_dict()[name], value, VALUES)


def test_an_averaged_model_holds_our_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nw.BatchNorm(5))
    averaged = AveragedModel(model, use_buffers=True)
    for _ in range(2):
        model(torch.randn(8, 3))
        averaged.update_parameters(model)
    update_bn([torch.randn(8, 3)], averaged)
    assert averaged.module[1].num_batches_tracked.item() == 1


def test_fsdp_keeps_batch_norm_out_of_mixed_precision() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    ignored = tuple(fsdp.MixedPrecision()._module_classes_to_ignore)
    assert isinstance(nw.BatchNorm(4), ignored)
    assert not isinstance(nw.LayerNorm(4), ignored)


def test_a_weight_decay_filter_by_class_finds_every_norm() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nw.BatchNorm(4), nw.GroupNorm(2, 4), nw.LayerNorm2d(4), nw.InstanceNorm(4, affine=True)
    )
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
    plain = {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters(recurse=False)}
    decayed = [name for name, parameter in model.named_parameters() if id(parameter) not in plain]
    assert decayed == ["0.weight", "0.bias"]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"eps": 0.25, "momentum": 0.5}])
def test_convert_sync_batchnorm_carries_the_numbers_over(options: dict[str, object]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nw.BatchNorm(4, **options), nn.ReLU())
    randomize(model[1])
    x = torch.randn(2, 3, 5, 5)
    expected = model.eval()(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[1]) is nn.SyncBatchNorm
    assert (converted[1].eps, converted[1].momentum) == (options.get("eps", 1e-5), options.get("momentum", 0.1))
    assert list(converted.state_dict()) == list(state)
    for name, value in converted.state_dict().items():
        assert torch.equal(value, state[name])
    check(converted.eval()(x), expected, VALUES)


def test_a_model_that_lists_children_by_torchs_names_freezes_ours() -> None:
    """The usual recipe for a frozen backbone: batch norms to evaluation, by class."""
    model = nn.Sequential(nn.Linear(3, 4), nw.BatchNorm(4))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    before: Tensor = model[1].running_mean.clone()
    model(torch.randn(8, 3))
    assert torch.equal(model[1].running_mean, before)
