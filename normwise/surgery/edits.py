"""Changes to a model, each with its inverse, so that an exception anywhere leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import setitem
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from normwise.places import Place


class Edits:
    """A list of changes that are undone together: at an exception within the `with`, or by `undo`.

    >>> layer = nn.Linear(2, 2)
    >>> before = layer.weight.clone()
    >>> with Edits() as edits:
    ...     edits.set_values(layer.weight, torch.zeros(2, 2))
    >>> edits.undo()
    >>> torch.equal(layer.weight, before)
    True
    """

    def __init__(self) -> None:
        self._made: list[tuple[Callable[[], None], Callable[[], None]]] = []  # each change, and its inverse
        self._undone: list[tuple[Callable[[], None], Callable[[], None]]] = []

    def __enter__(self) -> Edits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.undo()

    def undo(self) -> None:
        """Take everything back, the last change first; a second time it does nothing."""
        while self._made:
            change, inverse = self._made.pop()
            inverse()
            self._undone.append((change, inverse))

    def redo(self) -> None:
        """Make again what was undone."""
        while self._undone:
            change, inverse = self._undone.pop()
            change()
            self._made.append((change, inverse))

    def make(self, change: Callable[[], None], inverse: Callable[[], None]) -> None:
        """Make a change of any kind."""
        self._made.append((change, inverse))
        change()

    def exchange(self, place: Place, new: nn.Module) -> None:
        """Let another module stand in a place."""
        self.make(partial(place.put, new), partial(place.put, place.module))

    def set_values(self, tensor: Tensor, values: Tensor) -> None:
        """Give a parameter or buffer other values; it stays the same object, and its old memory is kept for undo."""
        old = tensor.data
        self.set_attribute(tensor, "data", torch.empty_like(old).copy_(values.detach()))

    def set_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Register another parameter, or none, under a name that is registered already."""
        slots = module._parameters
        self.make(partial(setitem, slots, name, parameter), partial(setitem, slots, name, slots[name]))

    def set_attribute(self, owner: object, name: str, value: Any) -> None:
        """Set an attribute that is there already."""
        self.make(partial(setattr, owner, name, value), partial(setattr, owner, name, getattr(owner, name)))
