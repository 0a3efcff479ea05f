"""Built-in networks, the user's factories, and layers exchanged in finished models."""

import math
from functools import partial
from typing import Literal

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.batches import feed, tensors_in
from normwise.errors import StudyError
from normwise.surgery.kinds import kind_of
from normwise.surgery.words import WORDS
from normwise.tuning.models import Architecture, cnn, exchange_norms, find, mlp
from normwise.tuning.norms import NormChoice
from tests import timm_like
from tests.architectures import ARCHITECTURES

BATCH, NONE = NormChoice("batch", "batch"), NormChoice("none", "none")


def message(model: object) -> str:
    with pytest.raises(StudyError) as caught:
        find(model, None, 10).build(BATCH)  # type: ignore[arg-type]
    return str(caught.value)


def test_the_mlp_has_a_norm_before_each_relu() -> None:
    kinds = [type(layer).__name__ for layer in mlp(BATCH)]  # type: ignore[attr-defined]
    assert kinds == ["Flatten", *["Linear", "BatchNorm", "ReLU"] * 5, "Linear"]
    assert [p.shape for p in mlp(NONE).parameters() if p.ndim == 2] == [(64, 64)] * 5 + [(10, 64)]


@pytest.mark.parametrize("build", [mlp, cnn])
def test_the_start_is_hes_and_the_same_for_every_normalization(build: object) -> None:
    def weights(choice: NormChoice) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = build(choice)  # type: ignore[operator]
        return [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    with torch.random.fork_rng():
        plain, normalized = weights(NONE), weights(BATCH)
    for mine, other in zip(plain, normalized, strict=True):
        assert mine.equal(other)
        if mine.numel() > 2000:
            assert mine.std().item() == pytest.approx(math.sqrt(2 / mine[0].numel()), rel=0.1)


def test_built_in_models_take_their_sizes_from_the_data() -> None:
    images = torch.zeros(5, 3, 16, 16)
    assert find("mlp", images, 4).build(NONE)(images).shape == (5, 4)
    assert find("cnn", images, 4).build(NONE)(images).shape == (5, 4)
    with pytest.raises(StudyError, match=r"^model 'cnn' needs images, .* not \(13,\)$"):
        find("cnn", torch.zeros(5, 13), 3)


def test_a_factory_with_a_norm_argument_is_given_it() -> None:
    def factory(norm: NormChoice, width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Linear(2, width), norm(width))

    model = find(factory, None, 10).build(BATCH)
    assert isinstance(model[1], nw.BatchNorm)  # type: ignore[index]


def test_a_factory_without_it_has_its_layers_exchanged() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))

    assert isinstance(find(factory, None, 10).build(NormChoice("layer", "layer"))[1], nw.LayerNorm2d)  # type: ignore[index]
    assert not find(factory, None, 10).takes_norm


def test_models_that_are_none() -> None:
    def failing() -> nn.Module:
        raise ValueError("no such width")

    def number(norm: object) -> int:
        return 3

    def plain() -> nn.Module:
        return nn.Linear(2, 2)

    where = "test_tune_models:test_models_that_are_none.<locals>"
    assert message("mpl") == (
        "no model named 'mpl'; there are mlp, cnn, resnet, transformer, lstm, or module:factory for yours; did you "
        "mean 'mlp'?"
    )
    assert message(failing).startswith(
        f"model '{where}.failing' raised ValueError: no such width (test_tune_models.py:"
    )
    assert message(number) == f"model '{where}.number' returned a int, not a torch.nn.Module"
    assert message(plain) == (
        f"model '{where}.plain': there is no normalization to exchange: give the factory a `norm` argument and let it "
        "make its layers as norm(features)"
    )
    assert message(nn.Linear(2, 2)) == (
        "model 'torch.nn.modules.linear:Linear' is a Linear; give a factory, a function that returns a new model each "
        "time"
    )


LAYERS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (5, 6), 1),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (5, 6, 3, 3), 1),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(6), (5, 6, 3, 3), 1),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), (5, 6, 2, 2, 2), 1),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6), (5, 6, 3, 3), 1),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (5, 6, 3, 3), 1),
    "LayerNorm": (lambda: nn.LayerNorm(6), (5, 4, 6), -1),
    "RMSNorm": (lambda: nn.RMSNorm(6), (5, 4, 6), -1),
    "normwise's BatchNorm": (lambda: nw.BatchNorm(6), (5, 6), 1),
    "normwise's LayerNorm2d": (lambda: nw.LayerNorm2d(6), (5, 6, 3, 3), 1),
    "a pattern": (lambda: nw.Norm("n t [c]", recovery=nw.Affine("c"), c=6), (5, 4, 6), -1),
    "timm's LayerNorm2d": (lambda: timm_like.LayerNorm2d(6), (5, 6, 3, 3), 1),
    "timm's RmsNorm": (lambda: timm_like.RmsNorm(6), (5, 4, 6), -1),
    "torchvision's FrozenBatchNorm2d": (lambda: timm_like.FrozenBatchNorm2d(6), (5, 6, 3, 3), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_is_exchanged_on_its_own_axis(name: str) -> None:
    make, shape, axis = LAYERS[name]
    asked: list[tuple[int, int]] = []

    def norm(features: int, axis: int = 1) -> nn.Module:
        asked.append((features, axis))
        return BATCH(features, axis)  # type: ignore[arg-type]

    model = exchange_norms(nn.Sequential(make()), norm, "given")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 4
    others = [d for d in range(x.ndim) if d != axis % x.ndim]
    assert asked == [(6, axis)]
    assert model(x).mean(dim=others).abs().max() < 1e-5


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", ["ResNet", "ViT", "Llama"])
def test_hugging_faces_layers_are_exchanged(name: str, word: str) -> None:
    (architecture,) = [entry for entry in ARCHITECTURES if entry.name == name]
    model = architecture.model()
    before = [path for path, layer in model.named_modules() if kind_of(layer) is not None]
    model = exchange_norms(model, NormChoice("x", word), "given").train()
    kinds = [kind_of(model.get_submodule(path)) for path in before]
    assert {kind and kind.name for kind in kinds} == {None if word == "none" else word}
    output = next(iter(tensors_in(feed(model, architecture.batch()))))
    output.backward(torch.randn(output.shape))
    assert all(p.grad is not None for path in before[:1] for p in model.get_submodule(path).parameters())


def test_device_dtype_mode_and_sharing_are_kept() -> None:
    shared = nn.BatchNorm1d(4)
    block = nn.Sequential(nn.Linear(4, 4), shared)
    model = nn.ModuleDict({"a": block, "b": shared, "c": nn.BatchNorm1d(4, affine=False, track_running_stats=False)})
    model = exchange_norms(model.double().eval(), BATCH, "given")  # type: ignore[assignment]
    assert model["a"][1] is model["b"]  # type: ignore[index]
    assert model["b"].weight.dtype == torch.float64
    assert model["c"].weight.dtype == torch.float64
    assert not model["b"].training
    assert exchange_norms(nn.BatchNorm1d(4).to("meta"), BATCH, "given").weight.device.type == "meta"


def test_the_new_layers_start_anew() -> None:
    old = nn.BatchNorm1d(4, eps=0.5)
    nn.init.constant_(old.weight, 3.0), nn.init.constant_(old.bias, -1.0)
    old(torch.randn(8, 4)), old.requires_grad_(False)
    new = exchange_norms(nn.Sequential(old), BATCH, "given")[0]  # type: ignore[index]
    fresh = nw.BatchNorm(4)
    assert new.eps == 1e-5
    assert all(parameter.requires_grad for parameter in new.parameters())
    assert new.state_dict().keys() == fresh.state_dict().keys()
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in new.state_dict().items())


def test_an_activation_within_a_layer_stays() -> None:
    model = exchange_norms(nn.Sequential(timm_like.BatchNormAct2d(4, act=nn.Tanh())), NormChoice("x", "layer"), "given")
    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), nw.LayerNorm2d(4)(x).tanh())


def test_a_norm_of_a_users_that_is_only_called_so_stays() -> None:
    class Normalize(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - 0.5) / 0.2

    first = Normalize()
    model = exchange_norms(nn.Sequential(first, nn.BatchNorm1d(4)), BATCH, "given")
    assert model[0] is first  # type: ignore[index]
    assert isinstance(model[1], nw.BatchNorm)  # type: ignore[index]


def test_what_cannot_be_exchanged_faithfully_is_refused() -> None:
    class Mine(nn.LayerNorm):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
            return super().forward(input).relu()

    def refusal(layer: nn.Module) -> str:
        first = nn.BatchNorm1d(4)
        model = nn.Sequential(first, layer)
        with pytest.raises(StudyError) as caught:
            exchange_norms(model, BATCH, "given")
        assert model[0] is first
        assert model[1] is layer
        return str(caught.value)

    way_out = ": give the factory a `norm` argument and let it make its layers as norm(features)"
    assert refusal(nn.LayerNorm((4, 5))) == (
        "model 'given': 1: '... [d0 d1]' has no single dimension that is known to be its channels" + way_out
    )
    assert refusal(Mine(4)) == (
        "model 'given': 1: Mine is a subclass that may do more; say what it means with nw.register_converter" + way_out
    )
    assert refusal(nw.Norm("[n] c")) == "model 'given': 1: '[n] c' has no known number of channels" + (
        " on its second or last axis" + way_out
    )
    assert refusal(nn.LazyBatchNorm1d()) == (
        "model 'given': 1: its sizes are not known yet: run a batch through the model first" + way_out
    )


def test_an_error_of_the_choice_passes_and_changes_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(4))
    before = list(model)
    with pytest.raises(StudyError, match=r"^group:3 cannot split 4 features into 3 equal groups$"):
        exchange_norms(model, NormChoice("x", "group:3"), "given")
    assert list(model) == before


def test_an_architecture_says_what_was_fixed() -> None:
    facts = find("mlp", None, 10).facts
    assert facts["model"] == "mlp: depth 6, width 64, ReLU, 64 inputs, 10 outputs"
    assert facts["placement"] == "linear, normalization, ReLU"
    assert isinstance(find("cnn", None, 10), Architecture)


def test_a_placement_is_given_to_the_factory() -> None:
    given: list[object] = []

    def mine(norm: NormChoice, placement: Literal["early", "late"] = "early") -> nn.Module:
        given.append(placement)
        return nn.Sequential(nn.Linear(2, 4), norm(4))

    def own(placement: str | None = None) -> nn.Module:
        given.append(placement)
        return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))

    found, strings = find(mine, None, 10), find(own, None, 10)
    assert (found.placements, strings.placements) == (("early", "late"), ())
    found.build(BATCH), found.build(BATCH, placement="late"), strings.build(BATCH, placement="anywhere")
    assert given == ["early", "late", "anywhere"]
    assert find(partial(mine, placement="late"), None, 10).placements == ("early", "late")
    assert [find(name, None, 10).placements for name in ("mlp", "cnn", "resnet", "transformer", "lstm")] == [
        ("before", "after"),
        ("before", "after"),
        ("pre", "post", "inside"),
        ("pre", "post", "inside"),
        (),
    ]


def test_a_placement_that_cannot_be_had_is_refused() -> None:
    def mine(norm: NormChoice, placement: Literal["early", "late"] | None = None) -> nn.Module:
        return norm(4)

    def choosy(norm: NormChoice, placement: str) -> nn.Module:
        raise ValueError(f"no place {placement}")

    def refusal(model: object, placement: str) -> str:
        with pytest.raises(StudyError) as caught:
            find(model, None, 10).build(BATCH, placement=placement)  # type: ignore[arg-type]
        return str(caught.value)

    where = "test_tune_models:test_a_placement_that_cannot_be_had_is_refused.<locals>"
    assert refusal("lstm", "pre") == (
        "placement 'pre': model 'lstm' does not offer any; leave placement out, or give its factory an argument "
        "`placement` and let it put its norms there"
    )
    assert refusal("resnet", "before") == "placement 'before': model 'resnet' offers pre, post, inside"
    assert refusal(mine, "never") == f"placement 'never': model '{where}.mine' offers early, late"
    assert refusal(choosy, "x").startswith(
        f"model '{where}.choosy' raised ValueError: no place x (test_tune_models.py:"
    )


def test_a_start_is_drawn_anew_and_no_start_is_the_factorys() -> None:
    def own() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        nn.init.constant_(model[0].weight, 0.5)  # type: ignore[arg-type]
        return model

    found = find(own, None, 10)
    assert (found.build(BATCH)[0].weight == 0.5).all()  # type: ignore[index]
    weight = found.build(BATCH, start="orthogonal")[0].weight  # type: ignore[index]
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(6), atol=1e-5, rtol=0)
    with pytest.raises(StudyError, match=r"^no start named 'xavier'; there are default, he, orthogonal$"):
        found.build(BATCH, start="xavier")


@pytest.mark.parametrize("start", ["default", "he", "orthogonal"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet", "transformer", "lstm"])
def test_every_network_takes_every_start(name: str, start: str) -> None:
    torch.manual_seed(0)
    before = [*find(name, None, 10).build(BATCH).parameters()]
    torch.manual_seed(1)
    model = find(name, None, 10).build(BATCH, start=start)
    output = model(torch.randn(8, 64))
    output.backward(torch.randn(output.shape))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    changed = [not a.equal(b) for a, b in zip(before, model.parameters(), strict=True) if a.ndim > 1]
    assert all(changed)
