"""The networks of a study: the built-in ones, and the user's factories."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normwise.errors import StudyError, SurgeryError
from normwise.surgery.swap import renew
from normwise.tuning.norms import NormFactory
from normwise.tuning.user import blame, name_of, resolve

Factory = Callable[..., Any]

_WAY_OUT = "give the factory a `norm` argument and let it make its layers as norm(features)"


@dataclass(frozen=True)
class Architecture:
    """A model's label and factory; `takes_norm` says whether the factory wants the normalization as `norm`."""

    label: str
    factory: Factory
    takes_norm: bool
    facts: dict[str, str]

    def build(self, norm: NormFactory) -> nn.Module:
        """A new model with the normalization given, or put in place of those it has.

        Raises StudyError when the factory raises or returns no module, naming its file and line.
        """
        with blame(f"model {self.label!r} raised"):
            model = self.factory(norm=norm) if self.takes_norm else self.factory()
        if not isinstance(model, nn.Module):
            raise StudyError(f"model {self.label!r} returned a {type(model).__name__}, not a torch.nn.Module")
        return model if self.takes_norm else exchange_norms(model, norm, self.label)


def exchange_norms(model: nn.Module, norm: NormFactory, label: str) -> nn.Module:
    """The model with each of its normalization layers exchanged, in place, for `norm(channels, axis)`.

    Raises StudyError for a model without one, or with one that cannot be exchanged faithfully; it is then as it was.
    """
    try:
        return renew(model, norm)
    except SurgeryError as error:
        raise StudyError(f"model {label!r}: {error}: {_WAY_OUT}") from error


def find(model: str | Factory, inputs: Tensor | None, outputs: int) -> Architecture:
    """The architecture that a name, `module:factory` or a callable stands for.

    `inputs` are examples and `outputs` the numbers to predict; the built-in models take their sizes from them, and
    those of the digits where there are no data.

    >>> from normwise.tuning import models
    >>> model = models.find("mlp", torch.zeros(1, 13), 3).build(lambda features, axis=1: nn.Identity())
    >>> model(torch.zeros(5, 13)).shape
    torch.Size([5, 3])
    """
    if isinstance(model, str) and model in BUILT_IN:
        shape = (64,) if inputs is None else tuple(inputs.shape[1:])
        sized, facts = BUILT_IN[model](shape, outputs)
        return Architecture(model, sized, takes_norm=True, facts=facts)
    if isinstance(model, str) and ":" not in model:
        close = difflib.get_close_matches(model, BUILT_IN, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise StudyError(
            f"no model named {model!r}; there are {', '.join(BUILT_IN)}, or module:factory for yours{hint}"
        )
    factory = resolve(model, "model") if isinstance(model, str) else model
    label = model if isinstance(model, str) else name_of(factory)
    if isinstance(factory, nn.Module) or not callable(factory):
        kind = type(factory).__name__
        raise StudyError(f"model {label!r} is a {kind}; give a factory, a function that returns a new model each time")
    takes_norm = _takes_norm(factory)
    placement = "by the factory" if takes_norm else "in place of the model's own normalization layers"
    facts = {"model": label, "start": "by the factory", "placement": placement}
    return Architecture(label, factory, takes_norm, facts)


def mlp(norm: NormFactory, inputs: int = 64, outputs: int = 10, width: int = 64, depth: int = 6) -> nn.Module:
    """A deep multilayer perceptron: depth - 1 hidden blocks of Linear -> norm -> ReLU, and an output layer.

    Weights from He's normal distribution (std sqrt(2 / fan in), arXiv:1502.01852), zero biases.

    >>> sum(p.numel() for p in mlp(lambda features: nn.Identity()).parameters())
    21450
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in in (inputs, *[width] * (depth - 2)):
        layers += [nn.Linear(fan_in, width), norm(width), nn.ReLU()]
    return _he(nn.Sequential(*layers, nn.Linear(width, outputs)))


def cnn(norm: NormFactory, shape: tuple[int, ...] = (64,), outputs: int = 10) -> nn.Module:
    """A small convolutional network: four blocks of 3x3 convolution -> norm -> ReLU, global average, output layer.

    The second and the fourth convolution halve the image. `shape` is that of one example, (channels, height, width), or
    the number of pixels of a square image of one channel. He's start, as for `mlp`.

    >>> cnn(lambda features: nn.Identity())(torch.zeros(2, 64)).shape
    torch.Size([2, 10])
    """
    channels, height, width = _image(shape)
    layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (channels, height, width))]
    for fan_in, fan_out, stride in ((channels, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, stride, padding=1), norm(fan_out), nn.ReLU()]
    return _he(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, outputs)))


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) == 3:
        return shape
    side = math.isqrt(math.prod(shape))
    if len(shape) != 1 or side * side != shape[0]:
        raise StudyError(
            f"model 'cnn' needs images, (channels, height, width) or a square number of pixels, not {shape}"
        )
    return 1, side, side


@torch.no_grad()
def _he(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                layer.bias.zero_()
    return model


_START = "He's normal, biases 0; every trial from its own seed"


def _sized_mlp(shape: tuple[int, ...], outputs: int) -> tuple[Factory, dict[str, str]]:
    sized = partial(mlp, inputs=math.prod(shape), outputs=outputs)
    model = f"mlp: depth 6, width 64, ReLU, {math.prod(shape)} inputs, {outputs} outputs"
    return sized, {"model": model, "start": _START, "placement": "linear, normalization, ReLU"}


def _sized_cnn(shape: tuple[int, ...], outputs: int) -> tuple[Factory, dict[str, str]]:
    image = "x".join(map(str, _image(shape)))
    model = f"cnn: 4 convolutions (16, 32, 32, 64 channels), ReLU, {image} images, {outputs} outputs"
    facts = {"model": model, "start": _START, "placement": "convolution, normalization, ReLU"}
    return partial(cnn, shape=shape, outputs=outputs), facts


BUILT_IN: dict[str, Callable[[tuple[int, ...], int], tuple[Factory, dict[str, str]]]] = {
    "mlp": _sized_mlp,
    "cnn": _sized_cnn,
}


def _takes_norm(factory: Factory) -> bool:
    try:
        return "norm" in inspect.signature(factory).parameters
    except ValueError:  # a builtin without a signature
        return False
