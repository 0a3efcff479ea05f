"""The built-in networks of tables and images: where their norms are, and which data they take."""

import math

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.errors import StudyError
from normwise.tuning.models import cnn, find, mlp, resnet
from normwise.tuning.networks import BasicBlock
from normwise.tuning.norms import NormChoice

BATCH, LAYER, NONE = NormChoice("batch", "batch"), NormChoice("layer", "layer"), NormChoice("none", "none")


def kinds(model: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in model]  # type: ignore[attr-defined]


def test_a_norm_before_or_after_the_activation() -> None:
    assert kinds(mlp(BATCH, depth=3)) == ["Flatten", *["Linear", "BatchNorm", "ReLU"] * 2, "Linear"]
    assert kinds(mlp(BATCH, depth=3, placement="after")) == ["Flatten", *["Linear", "ReLU", "BatchNorm"] * 2, "Linear"]
    assert kinds(cnn(BATCH))[2:8] == ["Conv2d", "BatchNorm", "ReLU"] * 2
    assert kinds(cnn(BATCH, placement="after"))[2:8] == ["Conv2d", "ReLU", "BatchNorm"] * 2


@pytest.mark.parametrize("build", [mlp, cnn])
def test_the_placement_changes_no_weight(build: object) -> None:
    def weights(placement: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [p for p in build(BATCH, placement=placement).parameters() if p.ndim > 1]  # type: ignore[operator]

    assert all(a.equal(b) for a, b in zip(weights("before"), weights("after"), strict=True))


@pytest.mark.parametrize("build", [mlp, cnn])
def test_the_mlp_and_the_cnn_start_layer_by_layer(build: object) -> None:
    """The draws of the first release, so that old studies can be repeated bit for bit."""
    torch.manual_seed(0)
    model = build(NONE)  # type: ignore[operator]
    torch.manual_seed(0)
    layers = [layer for layer in model if isinstance(layer, nn.Linear | nn.Conv2d)]
    fresh = [
        nn.Linear(layer.in_features, layer.out_features)
        if isinstance(layer, nn.Linear)
        else nn.Conv2d(layer.in_channels, layer.out_channels, 3)
        for layer in layers
    ]
    for layer, other in zip(layers, fresh, strict=True):
        nn.init.kaiming_normal_(other.weight, nonlinearity="relu")
        assert layer.weight.equal(other.weight)
        assert (layer.bias == 0).all()


def block(placement: str, fan_in: int, fan_out: int, choice: NormChoice = BATCH) -> nn.Module:
    made = BasicBlock(choice, fan_in, fan_out, placement)  # type: ignore[arg-type]
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.3, 0.2)
    return made


@pytest.mark.parametrize(("fan_in", "fan_out"), [(6, 6), (6, 12)])
def test_a_basic_block_is_its_formula(fan_in: int, fan_out: int) -> None:
    x = torch.randn(4, fan_in, 8, 8) + 1

    def around(made: nn.Module) -> torch.Tensor:
        shortcut = made.around
        return x if fan_in == fan_out else nn.functional.conv2d(x, shortcut.weight, shortcut.bias, stride=2)  # type: ignore[union-attr,arg-type]

    inside = block("inside", fan_in, fan_out)
    first, norm1, _, second, norm2 = inside.branch  # type: ignore[misc]
    expected = around(inside) + norm2(second(norm1(first(x)).relu()))
    torch.testing.assert_close(inside(x), expected.relu())

    pre = block("pre", fan_in, fan_out)
    norm1, _, first, norm2, _, second = pre.branch  # type: ignore[misc]
    torch.testing.assert_close(pre(x), around(pre) + second(norm2(first(norm1(x).relu())).relu()))

    post = block("post", fan_in, fan_out)
    first, norm1, _, second = post.branch  # type: ignore[misc]
    norm2 = post.after[0]  # type: ignore[index]
    torch.testing.assert_close(post(x), norm2(around(post) + second(norm1(first(x)).relu())).relu())


@pytest.mark.parametrize("placement", ["pre", "post", "inside"])
@pytest.mark.parametrize("shape", [(64,), (1, 28, 28), (3, 16, 12)])
def test_every_parameter_of_the_resnet_learns(shape: tuple[int, ...], placement: str) -> None:
    model = resnet(BATCH, shape, 5, placement=placement)  # type: ignore[arg-type]
    output = model(torch.randn(6, *shape))
    assert output.shape == (6, 5)
    output.backward(torch.randn(output.shape))
    no_gradient = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert no_gradient == []
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.ndim > 1 and p.grad is not None)
    assert sum(isinstance(m, nw.BatchNorm) for m in model.modules()) == 13


def test_the_resnet_halves_large_images_once_more() -> None:
    def maps(shape: tuple[int, ...]) -> list[int]:
        sizes: list[int] = []
        model = resnet(NONE, shape)
        for layer in model:  # type: ignore[attr-defined]
            layer.register_forward_hook(lambda _, __, out: sizes.append(out.shape[-1]))
        model(torch.zeros(1, *shape))
        return sizes[2:-3]

    assert maps((1, 8, 8)) == [8, 8, 8, 8, 8, 4, 4, 2, 2]
    assert maps((1, 28, 28)) == [14, 14, 14, 14, 14, 7, 7, 4, 4]


def test_the_resnet_starts_as_he_did() -> None:
    for layer in resnet(NONE).modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.numel() > 2000:
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.weight[0].numel()), rel=0.1)
            assert (layer.bias == 0).all()  # type: ignore[union-attr]


def test_data_that_a_network_cannot_read_are_refused() -> None:
    def message(model: str, inputs: torch.Tensor) -> str:
        with pytest.raises(StudyError) as caught:
            find(model, inputs, 3)
        return str(caught.value)

    tokens = torch.zeros(5, 64, dtype=torch.long)
    for model in ("mlp", "cnn", "resnet"):
        assert message(model, tokens) == (
            f"model {model!r} needs numbers, and these inputs are tokens, which transformer and lstm take"
        )
    for model in ("cnn", "resnet"):
        assert message(model, torch.zeros(5, 32, 4)) == (
            f"model {model!r} needs images, (channels, height, width) or a square number of pixels, not (32, 4)"
        )


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_unknown_placements_are_refused(model: str) -> None:
    with pytest.raises(StudyError, match=rf"^placement 'pre': model {model!r} offers before, after$"):
        find(model, None, 10).build(LAYER, placement="pre")
    with pytest.raises(StudyError, match=r"^no placement named 'befor'; .* did you mean 'before'\?$"):
        mlp(LAYER, placement="befor")  # type: ignore[arg-type]
    with pytest.raises(StudyError, match=r"^no placement named 'before'; there are pre, post, inside$"):
        resnet(LAYER, placement="before")  # type: ignore[arg-type]
