"""The networks of a study: the built-in ones, and the user's factories."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args, get_origin

from torch import Tensor, nn

from normwise.errors import StudyError, SurgeryError
from normwise.surgery.swap import renew
from normwise.tuning.networks import cnn, image, mlp, resnet
from normwise.tuning.norms import NormFactory
from normwise.tuning.sequence_networks import as_sequence, lstm, transformer
from normwise.tuning.starts import restart
from normwise.tuning.user import blame, name_of, resolve

Factory = Callable[..., Any]

_DIGITS = (64,)  # the shape of an example where there are no data
_HE = "He's normal, biases 0; every trial from its own seed"
_TORCHS = "torch's default; every trial from its own seed"
_WAY_OUT = "give the factory a `norm` argument and let it make its layers as norm(features)"


@dataclass(frozen=True)
class Architecture:
    """A model's label and factory; `takes_norm` says whether the factory wants the normalization as `norm`."""

    label: str
    factory: Factory
    takes_norm: bool
    facts: dict[str, str]

    @property
    def placements(self) -> tuple[str, ...]:
        """Where the factory offers to put the norm: the words that its argument `placement` is annotated with.

        () for a factory without the argument, or with another annotation than `Literal[...]`.
        """
        annotation = _annotation(self.factory, "placement")
        return tuple(word for word in _words(annotation) if isinstance(word, str))

    def build(self, norm: NormFactory, start: str | None = None, placement: str | None = None) -> nn.Module:
        """A new model with the normalization given, or put in place of those it has.

        `start` draws its weights anew, by `starts.restart`; `placement` is given to the factory. None: as the factory
        does.

        Raises StudyError when the factory raises or returns no module, naming its file and line, and for a start or a
        placement that cannot be had.
        """
        asked = {} if placement is None else {"placement": self._checked(placement)}
        with blame(f"model {self.label!r} raised"):
            model = self.factory(norm=norm, **asked) if self.takes_norm else self.factory(**asked)
        if not isinstance(model, nn.Module):
            raise StudyError(f"model {self.label!r} returned a {type(model).__name__}, not a torch.nn.Module")
        if start is not None:
            restart(model, start)
        return model if self.takes_norm else exchange_norms(model, norm, self.label)

    def _checked(self, placement: str) -> str:
        if not _takes(self.factory, "placement"):
            raise StudyError(
                f"placement {placement!r}: model {self.label!r} does not offer any; leave placement out, or give its "
                "factory an argument `placement` and let it put its norms there"
            )
        if self.placements and placement not in self.placements:
            raise StudyError(f"placement {placement!r}: model {self.label!r} offers {', '.join(self.placements)}")
        return placement


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
        sized, facts = BUILT_IN[model](_example(inputs, outputs), outputs)
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
    takes_norm = _takes(factory, "norm")
    placement = "by the factory" if takes_norm else "in place of the model's own normalization layers"
    facts = {"model": label, "start": "by the factory", "placement": placement}
    return Architecture(label, factory, takes_norm, facts)


# ------------------------------------------------------------------------------------------------ the built-in ones

Sized = tuple[Factory, dict[str, str]]


@dataclass(frozen=True)
class Example:
    """What a built-in network has to know of one example: its shape and, where it is tokens, the vocabulary's size."""

    shape: tuple[int, ...]
    tokens: int | None


def _example(inputs: Tensor | None, outputs: int) -> Example:
    if inputs is None:
        return Example(_DIGITS, None)
    tokens = None if inputs.is_floating_point() else max(outputs, 1 + int(inputs.max()))
    return Example(tuple(inputs.shape[1:]), tokens)


def _numbers(model: str, example: Example) -> tuple[int, ...]:
    """The shape of an example that is numbers."""
    if example.tokens is not None:
        raise StudyError(f"model {model!r} needs numbers, and these inputs are tokens, which transformer and lstm take")
    return example.shape


def _sized_mlp(example: Example, outputs: int) -> Sized:
    inputs = math.prod(_numbers("mlp", example))
    model = f"mlp: depth 6, width 64, ReLU, {inputs} inputs, {outputs} outputs"
    facts = {"model": model, "start": _HE, "placement": "linear, normalization, ReLU"}
    return partial(mlp, inputs=inputs, outputs=outputs), facts


def _sized_cnn(example: Example, outputs: int) -> Sized:
    shape = _numbers("cnn", example)
    size = "x".join(map(str, image("cnn", shape)))
    model = f"cnn: 4 convolutions (16, 32, 32, 64 channels), ReLU, {size} images, {outputs} outputs"
    facts = {"model": model, "start": _HE, "placement": "convolution, normalization, ReLU"}
    return partial(cnn, shape=shape, outputs=outputs), facts


def _sized_resnet(example: Example, outputs: int) -> Sized:
    shape = _numbers("resnet", example)
    size = "x".join(map(str, image("resnet", shape)))
    model = f"resnet: 6 basic blocks (8, 16, 32 channels), ReLU, {size} images, {outputs} outputs"
    facts = {"model": model, "start": _HE, "placement": "inside the residual, ReLU(x + norm(f(x)))"}
    return partial(resnet, shape=shape, outputs=outputs), facts


def _sized_transformer(example: Example, outputs: int) -> Sized:
    model = f"transformer: 2 blocks, width 32, 4 heads, GELU, {_read_as(example)}, {outputs} outputs"
    facts = {"model": model, "start": _TORCHS, "placement": "before the residual, x + f(norm(x))"}
    return partial(transformer, shape=example.shape, outputs=outputs, tokens=example.tokens), facts


def _sized_lstm(example: Example, outputs: int) -> Sized:
    model = f"lstm: 1 layer, width 64, {_read_as(example)}, {outputs} outputs"
    placement = "input's gates, hidden state's gates and cell state, at each time step"
    facts = {"model": model, "start": _TORCHS, "placement": placement}
    return partial(lstm, shape=example.shape, outputs=outputs, tokens=example.tokens), facts


def _read_as(example: Example) -> str:
    steps, features = as_sequence(example.shape, example.tokens)
    return f"{steps} steps of {features} features" if example.tokens is None else f"{steps} of {example.tokens} tokens"


BUILT_IN: dict[str, Callable[[Example, int], Sized]] = {
    "mlp": _sized_mlp,
    "cnn": _sized_cnn,
    "resnet": _sized_resnet,
    "transformer": _sized_transformer,
    "lstm": _sized_lstm,
}


# ------------------------------------------------------------------------------------------------ the user's factories


def _takes(factory: Factory, argument: str) -> bool:
    try:
        return argument in inspect.signature(factory).parameters
    except ValueError:  # a builtin without a signature
        return False


def _annotation(factory: Factory, argument: str) -> Any:
    """What an argument is annotated with; None for nothing, or for what cannot be read."""
    if not _takes(factory, argument):
        return None
    try:
        return inspect.signature(factory, eval_str=True).parameters[argument].annotation
    except NameError:  # imported for type checking only
        return None


def _words(annotation: Any) -> tuple[Any, ...]:
    """The values of Literal[...], also of one that is optional."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for part in get_args(annotation) for word in _words(part))
