"""How a batch is given to a model, and the tensors in whatever comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Forward = Callable[[nn.Module, Any], Any]


def feed(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """The model's output for a batch, whose tensors are first moved to the model's device.

    A mapping is given as keywords; of a tuple or list, as a loader of inputs and targets yields it, the first element
    is the input; anything else is the input. `forward(model, batch)` is for all other cases.

    >>> feed(nn.Linear(2, 3), (torch.randn(5, 2), torch.zeros(5))).shape
    torch.Size([5, 3])
    """
    batch = moved(batch, device_of(model))
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        batch = batch[0]
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def moved(batch: Any, device: torch.device | None) -> Any:
    """The batch with its tensors on a device, however deep in mappings, tuples and lists."""
    if device is None:
        return batch
    return mapped(batch, lambda tensor: tensor.to(device))


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with its tensors changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, PackedSequence):
        return batch._replace(data=change(batch.data))
    if isinstance(batch, Mapping):
        items = {key: mapped(value, change) for key, value in batch.items()}
        return items if type(batch) is dict else _again(batch, items)
    if isinstance(batch, (tuple, list)):
        values = [mapped(value, change) for value in batch]
        return batch._make(values) if hasattr(batch, "_make") else type(batch)(values)
    return batch


def _again(batch: Any, items: dict[Any, Any]) -> Any:
    """A mapping of the same class where that can be made from a dictionary, as tokenizers' can."""
    try:
        return type(batch)(items)
    except TypeError:
        return items


def device_of(model: nn.Module) -> torch.device | None:
    """The device of the model's first parameter or buffer; None: it has neither."""
    first = next((tensor for tensor in (*model.parameters(), *model.buffers())), None)
    return None if first is None else first.device


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an output, in order, however deep in mappings, tuples, lists and the attributes of plain objects.

    >>> len(list(tensors_in({"loss": torch.zeros(()), "states": (torch.zeros(2), None)})))
    2
    """
    yield from _tensors_in(value, ())


def _tensors_in(value: Any, within: tuple[int, ...]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in within:
        for part in _parts(value):
            yield from _tensors_in(part, (*within, id(value)))


def _parts(value: Any) -> Iterable[Any]:
    """What a container or an object holds; nothing of what is no output: modules, classes, functions, text."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (tuple, list)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, (nn.Module, type)) or callable(value) or type(value).__module__ == "builtins":
        return ()
    return vars(value).values() if hasattr(value, "__dict__") else ()
