"""Batches to run a model on: the user's, or found from the model, and harder ones made of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normwise.batches import Forward, feed, mapped
from normwise.errors import SurgeryError
from normwise.untouched import untouched

_SIDES = (32, 64, 224, 28, 16, 8, 96, 128, 256)  # of images, the usual ones first
_LENGTHS = (64, 400, 4000, 16, 3000)  # of signals


@dataclass(frozen=True)
class Probe:
    """A batch under a name that says what it is."""

    name: str
    batch: Any


def probes_for(model: nn.Module, batch: Any = None, forward: Forward | None = None) -> list[Probe]:
    """The user's batch, or one found from the model, and harder ones made of it that the model takes as well.

    Raises:
        SurgeryError: the model does not take the batch, or none is given and none is found.
    """
    if batch is None:
        first = found_batch(model)
        if first is None:
            raise SurgeryError(f"no input was found that {type(model).__name__} takes: give a batch of yours")
        plain = Probe("found from the model", first)
    else:
        plain = Probe("given", batch)
        with untouched(model), torch.no_grad():
            feed(model, batch, forward)  # what is wrong with it, its own error says
    harder = (_harder(name, change, plain.batch) for name, change in _HARDER)
    return [plain, *(probe for probe in harder if probe is not None and _takes(model, probe.batch, forward))]


def _harder(name: str, change: Callable[[Any], Any], batch: Any) -> Probe | None:
    try:
        return Probe(name, change(batch))
    except Exception:  # noqa: BLE001 - a batch may be of a kind that cannot be changed so
        return None


def found_batch(model: nn.Module) -> Any:
    """A batch that the model takes; None: none was found.

    Tried are what the model itself says of its inputs (Hugging Face's `main_input_name` and `config`), then shapes that
    fit its first layers.
    """
    return next((batch for batch in _candidates(model) if _takes(model, batch)), None)


def _takes(model: nn.Module, batch: Any, forward: Forward | None = None) -> bool:
    with untouched(model), torch.no_grad():
        try:
            feed(model, batch, forward)
        except Exception:  # noqa: BLE001 - a model may refuse a batch with any error
            return False
    return True


def _candidates(model: nn.Module) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(0)
    yield from _offered(model, generator)
    for layer in model.modules():
        first = isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.RNNBase))
        if first and not any(is_lazy(parameter) for parameter in layer.parameters()):
            yield from (x.to(_dtype(model)) if x.is_floating_point() else x for x in _for_layer(layer, generator))
            return
    for layer in model.modules():
        width = _width(layer)
        if width is not None:
            for shape in _shapes(layer, width):
                yield torch.randn(shape, generator=generator).to(_dtype(model))


def _offered(model: Any, generator: torch.Generator) -> Iterator[Any]:
    """What Hugging Face's models say of their inputs."""
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(name, str):
        return
    dtype = _dtype(model)
    if name == "pixel_values":
        channels = getattr(config, "num_channels", 3)
        for side in (getattr(config, "image_size", None), *_SIDES):
            if isinstance(side, int):
                yield {name: torch.randn(2, channels, side, side, generator=generator).to(dtype)}
    elif name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        features = torch.randn(2, getattr(config, "num_mel_bins", 80), frames, generator=generator).to(dtype)
        yield {name: features, "decoder_input_ids": torch.tensor([[1, 2, 3], [2, 1, 0]])}
        yield {name: features}
    elif name == "input_values":
        for length in (4000, 16000):
            yield {name: torch.randn(2, length, generator=generator).to(dtype)}
    ids = torch.randint(0, getattr(config, "vocab_size", 8), (2, 9), generator=generator)
    yield {"input_ids": ids}
    yield {"input_ids": ids, "decoder_input_ids": ids}


def _for_layer(layer: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
    """Inputs that fit a first layer."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        dims = len(layer.kernel_size)
        for side in _LENGTHS if dims == 1 else _SIDES[: 5 if dims == 3 else None]:
            yield torch.randn(4, layer.in_channels, *[side] * dims, generator=generator)
    elif isinstance(layer, nn.Embedding):
        yield torch.randint(0, layer.num_embeddings, (2, 9), generator=generator)
    elif isinstance(layer, nn.RNNBase):
        yield torch.randn(5, 4, layer.input_size, generator=generator)
    elif isinstance(layer, nn.Linear):
        yield torch.randn(6, layer.in_features, generator=generator)
        yield torch.randn(4, 5, layer.in_features, generator=generator)
        for side in (8, 16, 28, 32):
            for channels in (1, 3):
                if channels * side * side == layer.in_features:
                    yield torch.randn(4, channels, side, side, generator=generator)


def _shapes(layer: nn.Module, width: int) -> list[tuple[int, ...]]:
    """Shapes for a layer of a width; a layer whose class says how many dimensions it takes gets those."""
    shapes = [(6, width), (4, width, 7), (4, width, 5, 6), (4, 5, width), (3, width, 4, 3, 2)]
    dims = re.search(r"([123])d", layer.__dict__.get("adopted_from", type(layer)).__name__)
    if dims is None:
        return shapes
    return [shape for shape in shapes if len(shape) == int(dims[1]) + 2 and shape[1] == width] + shapes[:1]


def _width(layer: nn.Module) -> int | None:
    for name in ("num_features", "num_channels"):
        if isinstance(getattr(layer, name, None), int):
            return int(getattr(layer, name))
    shape = getattr(layer, "normalized_shape", None)
    return int(shape[-1]) if shape else None


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _changed(batch: Any, change: Any) -> Any:
    """The input of the batch changed, and nothing of its targets."""
    if isinstance(batch, (tuple, list)) and batch:
        rest = batch[1:]
        first = mapped(batch[0], lambda x: change(x) if x.is_floating_point() else x)
        return batch._make([first, *rest]) if hasattr(batch, "_make") else type(batch)([first, *rest])
    return mapped(batch, lambda x: change(x) if x.is_floating_point() else x)


def _with_constant(x: Tensor) -> Tensor:
    """Channel 0, along the second dimension, is 3 everywhere."""
    x = x.clone()
    if x.dim() > 1 and x.shape[1] > 0:
        x[:, 0] = 3
    return x


def _odd(x: Tensor) -> Tensor:
    """Every dimension after the second, and the batch, made odd by leaving out the last place."""
    for dim, size in enumerate(x.shape):
        if (dim == 0 or dim > 1) and size > 2 and size % 2 == 0:
            x = x.narrow(dim, 0, size - 1)
    return x


# Changed are the floating-point tensors of the input.
_HARDER: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("a mean of 30", lambda batch: _changed(batch, lambda x: x + 30)),
    ("a constant channel", lambda batch: _changed(batch, _with_constant)),
    ("odd sizes", lambda batch: _changed(batch, _odd)),
    ("the first example only", lambda batch: mapped(batch, lambda x: x[:1] if x.dim() > 0 else x)),
)
