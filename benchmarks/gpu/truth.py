"""What is right at full size: the formula in float64, of as many whole columns at a time as there is room for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from normwise.bench import gate
from normwise.bench.cases import Case

_PIECE = 2**24  # elements

Tensors = tuple[Tensor, ...]


def truth(
    case: Case, inputs: Tensors, gradients: Tensors, state: Mapping[str, Tensor], piece: int = _PIECE
) -> gate.Found:
    """What `gate.truth` says of the whole, found piece by piece, and kept in float32.

    Args:
        case: The case.
        inputs: Its inputs.
        gradients: Those of its outputs.
        state: The layer's parameters and memory, by name.
        piece: Elements of a piece, at most, unless one column has more.
    """
    found: dict[str, list[Tensor]] = {}
    for tensors, own in _pieces(case, (*inputs, *gradients), state, piece):
        for name, value in gate.truth(case, tensors[: len(inputs)], tensors[len(inputs) :], own).items():
            found.setdefault(name, []).append(value)
    return {name: _joined(case, values).float() for name, values in found.items()}


def settled(
    case: Case, inputs: Tensors, gradients: Tensors, state: Mapping[str, Tensor], piece: int = _PIECE
) -> Tensors:
    """The outputs' gradients as `gate.settled` has them, in their own layout."""
    if case.operation != "batch_norm_relu":
        return gradients
    pieces = _pieces(case, (*inputs, *gradients), state, piece)
    parts = [gate.settled(case, tensors[:1], tensors[1:], own)[0] for tensors, own in pieces]
    return (torch.empty_like(gradients[0]).copy_(torch.cat(parts, _axis(case))),)


def _pieces(
    case: Case, tensors: Tensors, state: Mapping[str, Tensor], piece: int
) -> Iterator[tuple[Tensors, Mapping[str, Tensor]]]:
    """Whole columns of tensors, and what of the state belongs to them."""
    axis = _axis(case)
    size = case.shape[axis]
    step = max(piece * size // tensors[0].numel(), 1)
    for start in range(0, size, step):
        count = min(step, size - start)
        piece_of = [tensor.detach().narrow(axis, start, count) for tensor in tensors]
        yield tuple(piece_of), _of_channels(state, start, count) if axis == 1 else state


def _of_channels(state: Mapping[str, Tensor], start: int, count: int) -> dict[str, Tensor]:
    """What has a value for each channel, for some of them."""
    return {name: value.narrow(0, start, count) for name, value in state.items() if value.dim()}


def _axis(case: Case) -> int:
    """The axis along which columns are different ones: of batch norm the channels, otherwise the first."""
    return 1 if case.operation.startswith("batch_norm") else 0


def _joined(case: Case, values: list[Tensor]) -> Tensor:
    """One tensor of many: pieces of it, or the terms of a parameter's gradient."""
    if values[0].dim() == len(case.shape):
        return torch.cat(values, _axis(case))
    return torch.cat(values) if _axis(case) == 1 else torch.stack(values).sum(0)
