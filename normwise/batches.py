"""How a batch is given to a model, and the tensors in whatever comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normwise.errors import DiagnosisError

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Any]


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


def loss_of(model: nn.Module, batch: Any, loss: Loss | None = None, forward: Forward | None = None) -> Tensor:
    """The loss of a batch, a tensor of one element.

    `loss(output, target)`, with the second element of a tuple or list as the target; of other batches the target is the
    batch. Without a loss it is the model's own: its output, if that is one number, or the `loss` in it.

    Raises:
        DiagnosisError: what is given is no function; what came is not one number.

    >>> loss_of(nn.Linear(2, 1), (torch.zeros(3, 2), torch.ones(3, 1)), nn.functional.mse_loss).shape
    torch.Size([])
    """
    if isinstance(loss, type) or not (loss is None or callable(loss)):
        kind = f"the class {loss.__name__}: give an instance of it," if isinstance(loss, type) else f"{loss!r}: give"
        raise DiagnosisError(f"loss is {kind} a function called as loss(output, target)")
    batch = moved(batch, device_of(model))
    output = feed(model, batch, forward)
    value = _own_loss(output) if loss is None else loss(output, target_of(batch))
    if not isinstance(value, Tensor):
        raise DiagnosisError(f"the loss is a {type(value).__name__}, and has to be a tensor with a gradient")
    if value.numel() != 1:
        raise DiagnosisError(f"the loss is a tensor of shape {tuple(value.shape)}, and has to be one number")
    return value.reshape(())


def target_of(batch: Any) -> Any:
    """What a loss compares the output with: the second element of a tuple or list; otherwise the batch."""
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else batch


def _own_loss(output: Any) -> Any:
    """The loss that a model computes itself."""
    if isinstance(output, Tensor) and output.numel() == 1:
        return output
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None:
        kind = f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise DiagnosisError(
            f"the model's output, {kind}, has no loss in it: give loss=, called as loss(output, target)"
        )
    return found


def rows_of(batch: Any) -> int:
    """The rows of a batch: the first dimension of its first tensor that has one."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.dim() > 0), 1)


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
        order = {name: mapped(getattr(batch, name), change) for name in ("sorted_indices", "unsorted_indices")}
        return batch._replace(data=change(batch.data), **order)
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
