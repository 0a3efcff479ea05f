"""Built-in networks, the user's factories, and layers exchanged in finished models."""

import math

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.errors import StudyError
from normwise.tuning.models import Architecture, cnn, find, mlp
from normwise.tuning.norms import NormChoice
from normwise.tuning.replace import replace_norms

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
        "no model named 'mpl'; there are mlp, cnn, or module:factory for yours; did you mean 'mlp'?"
    )
    assert message(failing).startswith(
        f"model '{where}.failing' raised ValueError: no such width (test_tune_models.py:"
    )
    assert message(number) == f"model '{where}.number' returned a int, not a torch.nn.Module"
    assert message(plain) == (
        f"model '{where}.plain' has no normalization layer to exchange: give the factory a `norm` argument and let it "
        "make its layers as norm(features), or use torch.nn's"
    )
    assert message(nn.Linear(2, 2)) == (
        "model 'torch.nn.modules.linear:Linear' is a Linear; give a factory, a function that returns a new model each "
        "time"
    )


LAYERS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (5, 6), 1),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (5, 6, 3, 3), 1),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), (5, 6, 2, 2, 2), 1),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6), (5, 6, 3, 3), 1),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (5, 6, 3, 3), 1),
    "LayerNorm": (lambda: nn.LayerNorm(6), (5, 4, 6), -1),
    "RMSNorm": (lambda: nn.RMSNorm(6), (5, 4, 6), -1),
    "normwise's BatchNorm": (lambda: nw.BatchNorm(6), (5, 6), 1),
    "normwise's LayerNorm2d": (lambda: nw.LayerNorm2d(6), (5, 6, 3, 3), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_is_exchanged_on_its_own_axis(name: str) -> None:
    make, shape, axis = LAYERS[name]
    asked: list[tuple[int, int]] = []

    def norm(features: int, axis: int = 1) -> nn.Module:
        asked.append((features, axis))
        return BATCH(features, axis)  # type: ignore[arg-type]

    model = replace_norms(nn.Sequential(make()), norm)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 4
    others = [d for d in range(x.ndim) if d != axis % x.ndim]
    assert asked == [(6, axis)]
    assert model(x).mean(dim=others).abs().max() < 1e-5


def test_device_dtype_mode_and_sharing_are_kept() -> None:
    shared = nn.BatchNorm1d(4)
    block = nn.Sequential(nn.Linear(4, 4), shared)
    model = nn.ModuleDict({"a": block, "b": shared, "c": nn.BatchNorm1d(4, affine=False, track_running_stats=False)})
    model = replace_norms(model.double().eval(), BATCH)  # type: ignore[assignment]
    assert model["a"][1] is model["b"]  # type: ignore[index]
    assert model["b"].weight.dtype == torch.float64
    assert model["c"].weight.dtype == torch.float64
    assert not model["b"].training
    assert replace_norms(nn.BatchNorm1d(4).to("meta"), BATCH).weight.device.type == "meta"


def test_what_cannot_be_exchanged_faithfully_is_refused() -> None:
    class Mine(nn.LayerNorm):
        pass

    def refusal(layer: nn.Module) -> str:
        with pytest.raises(StudyError) as caught:
            replace_norms(nn.Sequential(layer), BATCH)
        return str(caught.value).partition(": give the factory")[0]

    assert refusal(nn.LayerNorm((4, 5))) == "layer '0' normalizes over the dimensions (4, 5), not over channels"
    assert refusal(Mine(4)) == "layer '0' is a Mine, whose meaning is not known here"
    assert refusal(nw.Norm("[n] c")) == "layer '0' is a Norm, whose meaning is not known here"


def test_an_architecture_says_what_was_fixed() -> None:
    facts = find("mlp", None, 10).facts
    assert facts["model"] == "mlp: depth 6, width 64, ReLU, 64 inputs, 10 outputs"
    assert facts["placement"] == "linear, normalization, ReLU"
    assert isinstance(find("cnn", None, 10), Architecture)
