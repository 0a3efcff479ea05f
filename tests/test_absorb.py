"""The weights after a fold: their numbers, their precision and memory, and how the model trains on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.surgery.absorb import (
    ChannelMap,
    Weights,
    can_centre,
    centred_outputs,
    channel_dim_of,
    channel_map,
    is_linear,
    misfit,
    with_inputs,
    with_outputs,
)
from tests.test_fold import changes, check_same, folded, hugging_face, line, linear, lived, truth
from tests.tolerances import DOUBLE, GRADIENTS, check

IMAGES = (2, 8, 6, 5)
Make = Callable[..., nn.Module]
LINEAR: dict[str, tuple[Make, tuple[int, ...]]] = {
    "Linear": (lambda **o: nn.Linear(4, 8, **o), (3, 5, 4)),
    "Conv1D": (lambda **_: _wide(), (3, 5, 4)),
    "Conv1d": (lambda **o: nn.Conv1d(4, 8, 3, stride=2, **o), (3, 4, 7)),
    "Conv2d in groups": (lambda **o: nn.Conv2d(4, 8, (3, 2), groups=2, dilation=2, **o), (3, 4, 7, 6)),
    "Conv2d by channel": (lambda **o: nn.Conv2d(4, 8, 3, groups=4, **o), (3, 4, 7, 6)),
    "Conv3d around": (lambda **o: nn.Conv3d(4, 8, 2, padding=1, padding_mode="circular", **o), (3, 4, 4, 3, 3)),
    "ConvTranspose1d": (lambda **o: nn.ConvTranspose1d(4, 8, 1, groups=2, **o), (3, 4, 7)),
    "ConvTranspose2d": (lambda **o: nn.ConvTranspose2d(4, 8, 1, groups=4, **o), (3, 4, 5, 6)),
    "ConvTranspose3d": (lambda **o: nn.ConvTranspose3d(4, 8, 1, **o), (3, 4, 5, 3, 2)),
}


def _wide() -> nn.Module:
    layer = hugging_face()
    layer.weight, layer.bias = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(8))
    layer.nf, layer.nx = 8, 4
    return layer


def applied(layer: nn.Module, weights: Weights, x: Tensor) -> Tensor:
    """The layer with other weights, in float64."""
    other = copy.deepcopy(layer).double()
    other.weight = nn.Parameter(weights.weight)
    other.bias = None if weights.bias is None else nn.Parameter(weights.bias)
    return other(x)


def over(values: Tensor, dim: int, rank: int) -> Tensor:
    return values.reshape([-1 if at == dim else 1 for at in range(rank)])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("make", "shape"), LINEAR.values(), ids=LINEAR)
def test_a_map_of_the_outputs_and_one_of_the_inputs(make: Make, shape: tuple[int, ...], bias: bool) -> None:
    layer, x = make(bias=bias), torch.randn(shape, dtype=torch.float64)
    before = [parameter.clone() for parameter in layer.parameters()]
    dim, outputs = channel_dim_of(layer, x.dim()), 8
    inputs = shape[dim]
    outer = ChannelMap(*torch.randn(2, outputs, dtype=torch.float64))
    inner = ChannelMap(*torch.randn(2, inputs, dtype=torch.float64))
    assert misfit(layer, inner) is None
    exact = copy.deepcopy(layer).double()
    scale, shift = (over(values, dim, x.dim()) for values in outer[:2])
    check(applied(layer, with_outputs(layer, outer), x), exact(x) * scale + shift, DOUBLE)
    scale, shift = (over(values, dim, x.dim()) for values in inner[:2])
    check(applied(layer, with_inputs(layer, inner), x), exact(x * scale + shift), DOUBLE)
    assert all(torch.equal(one, other) for one, other in zip(layer.parameters(), before, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [name for name in LINEAR if "groups" not in name])
def test_centred_outputs_have_mean_zero(name: str, bias: bool) -> None:
    make, shape = LINEAR[name]
    layer, x = make(bias=bias), torch.randn(shape, dtype=torch.float64)
    if getattr(layer, "groups", 1) > 1:
        assert not can_centre(layer)
        return
    exact, dim = copy.deepcopy(layer).double()(x), channel_dim_of(layer, len(shape))
    check(applied(layer, centred_outputs(layer), x), exact - exact.mean(dim, keepdim=True), DOUBLE)


def test_an_embedding_is_centred_row_by_row() -> None:
    layer = nn.Embedding(5, 8, padding_idx=0)
    weight = layer.weight.detach().double()
    centred = centred_outputs(layer)
    check(centred.weight, weight - weight.mean(1, keepdim=True), DOUBLE)
    assert centred.bias is None
    assert (centred.weight[0] == 0).all()
    assert can_centre(layer)
    assert not can_centre(nn.Embedding(5, 8, max_norm=1.0))
    assert not can_centre(nn.EmbeddingBag(5, 8))
    assert not can_centre(nn.LayerNorm(8))
    assert not can_centre(None)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": 2}, {"output_padding": 1, "stride": 2}])
def test_a_misfit_is_one_and_the_others_are_none(transposed: bool, shifted: bool, options: dict[str, Any]) -> None:
    """Whatever is said to fit is exact; what does not fit differs with the same weights."""
    if not transposed:
        options = {name: value for name, value in options.items() if name != "output_padding"}
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 4, 3, **options)
    inner = ChannelMap(torch.randn(4).double(), torch.randn(4).double() * shifted, shifts=shifted)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = copy.deepcopy(layer).double()(x * over(inner.scale, 1, 4) + over(inner.shift, 1, 4))
    exact = bool((applied(layer, with_inputs(layer, inner), x) - expected).abs().max() < DOUBLE.absolute)
    assert (misfit(layer, inner) is None) == exact
    assert exact == (not shifted or (not transposed and "padding" not in options))


def test_which_layers_are_linear() -> None:
    assert all(is_linear(make()) for make, _ in LINEAR.values())
    assert is_linear(type("Named", (nn.Linear,), {})(2, 2))
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    others = [None, replaced, nn.Bilinear(2, 2, 2), nn.Embedding(2, 2), nn.Identity(), nn.LSTM(2, 2)]
    others += [nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))]
    others += [type("Twice", (nn.Linear,), {"forward": lambda self, x: 2 * x})(2, 2)]
    others += [type("Conv1D", (nn.Module,), {})()]
    others += [type("Twice", (nn.Conv2d,), {"_conv_forward": lambda self, x, w, b: 2 * x})(2, 2, 1)]
    assert not any(is_linear(layer) for layer in others)


def test_a_channel_map_is_in_float64() -> None:
    scale, shift, shifts = channel_map(None, torch.ones(3, 1).half(), 3)
    assert (scale.dtype, shift.dtype, shift.shape, shifts) == (torch.float64, torch.float64, (3,), True)
    assert torch.equal(scale, torch.ones(3).double())
    unshifted = channel_map(torch.ones(3), None, 3)
    assert torch.equal(unshifted.shift, torch.zeros(3).double())
    assert not unshifted.shifts


# ------------------------------------------------------------------------------------- objects, memory and precision


@pytest.mark.parametrize("dims", [2, 3])
def test_the_memory_format_is_kept_and_the_weight_is_the_same_object(dims: int) -> None:
    layer, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]
    layout = (torch.channels_last, torch.channels_last_3d)[dims - 2]
    model, x = line(layer(4, 8, 3), norm(8)).to(memory_format=layout), torch.randn(2, 4, *[5] * dims)
    weight, bias, strides = model[0].weight, model[0].bias, model[0].weight.stride()
    record = folded(model, x)
    assert model[0].weight is weight
    assert model[0].bias is bias
    assert weight.stride() == strides
    assert weight.is_contiguous(memory_format=layout)
    assert record.notes[0] == "an optimizer that was made before still holds parameters that are gone: 1.weight, 1.bias"


@pytest.mark.parametrize(("of_layer", "of_norm"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_new_bias_takes_a_gradient_if_any_of_the_two_did(of_layer: bool, of_norm: bool) -> None:
    model = line(linear(bias=False), nn.BatchNorm1d(8))
    model[0].requires_grad_(of_layer)
    model[1].requires_grad_(of_norm)
    record = folded(model, torch.randn(6, 8))
    assert model[0].bias.requires_grad == (of_layer or of_norm)
    assert model[0].weight.requires_grad == of_layer
    assert record.notes[1] == "an optimizer that was made before lacks new parameters: 0.bias"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """As near to the original in float64 as its own output is, twice over; and the dtype stays."""
    model, x = (
        lived_mildly(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))).to(dtype),
        torch.randn(IMAGES).to(dtype),
    )
    expected, before = truth(model, x), model(x).double()
    nw.fold(model, x)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    scale = expected.abs().max()
    rounding = torch.finfo(dtype).eps
    assert (model(x).double() - expected).abs().max() <= 2 * (before - expected).abs().max() + rounding * scale


def lived_mildly(model: nn.Module) -> nn.Module:
    model = lived(model)
    model[1].running_var.clamp_(0.5, 2)
    return model


# --------------------------------------------------------------------------------------------------- in training mode


def trained(model: nn.Module, steps: int, seed: int = 5) -> tuple[Tensor, list[Tensor]]:
    """Some steps of SGD; the output in evaluation, and the gradients of the convolution's bias."""
    generator = torch.Generator().manual_seed(seed)
    optimizer, biases = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), []
    for _ in range(steps):
        x = torch.randn(6, 8, 6, 5, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        y = model(x)
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).mean().backward()
        if model[0].bias is not None:
            biases.append(model[0].bias.grad.clone())
        optimizer.step()
    return copy.deepcopy(model).eval()(x).detach(), biases


def unsettled(norm: nn.Module) -> nn.Module:
    """A network as in training, with the variances of an ordinary one."""
    model = lived(nn.Sequential(nn.Conv2d(8, 6, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))).double()
    if getattr(norm, "running_var", None) is not None:
        norm.running_var.clamp_(0.5, 2)
    return model.train()


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(6),
        lambda: nn.BatchNorm2d(6, momentum=None),
        lambda: nn.BatchNorm2d(6, track_running_stats=False),
        lambda: nw.BatchNorm(6),
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm2d(6),
    ],
)
def test_without_the_useless_bias_a_model_trains_the_same(norm: Callable[[], nn.Module]) -> None:
    model = unsettled(norm())
    original = copy.deepcopy(model)
    record = nw.fold(model, torch.randn(6, 8, 6, 5, dtype=torch.float64))
    assert changes(record) == [("1", "the bias of 0, which it takes out again")]
    assert record.notes[0] == "an optimizer that was made before still holds parameters that are gone: 0.bias"
    assert model[0].bias is None
    assert model.training
    assert len(record.proof) >= 4
    expected, biases = trained(original, 5)
    actual, _ = trained(model, 5)
    check_same(actual, expected, DOUBLE)
    for gradient in biases:
        check(gradient, torch.zeros_like(gradient), DOUBLE)
    for name, parameter in model.named_parameters():
        check(parameter.detach(), original.get_parameter(name).detach(), DOUBLE)


def test_a_folded_model_can_go_to_training() -> None:
    model = line(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    x = torch.randn(IMAGES)
    expected = truth(model, x)
    nw.fold(model, x)
    check_same(model.train()(x), expected, GRADIENTS)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    model(x).mul(torch.randn(2, 6, 4, 3)).sum().backward()
    assert model[0].bias.grad.abs().max() > 0
