"""Changes to a model, each with its inverse, so that an exception anywhere leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import setitem
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from normwise.errors import SurgeryError
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
        self._places: list[tuple[Place, nn.Module]] = []  # where another module stands, and which
        self._places_undone: list[tuple[Place, nn.Module]] = []

    def __enter__(self) -> Edits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.undo()

    def undo(self) -> None:
        """Take everything back, the last change first; a second time it does nothing.

        Raises:
            SurgeryError: something else stands now where a layer was exchanged; nothing is taken back then.
        """
        standing = {place.path: (place, new) for place, new in self._places}  # the last that was put there
        for place, new in standing.values():
            if place.get() is not new:
                raise SurgeryError(f"{place.path}: another layer stands there since: undo first what was done later")
        self._places, places = [], self._places
        while self._made:
            _, inverse = self._made[-1]
            inverse()
            self._undone.append(self._made.pop())
        self._places_undone = places

    def redo(self) -> None:
        """Make again what was undone."""
        while self._undone:
            change, inverse = self._undone.pop()
            change()
            self._made.append((change, inverse))
        self._places = self._places_undone

    def make(self, change: Callable[[], None], inverse: Callable[[], None]) -> None:
        """Make a change of any kind."""
        self._made.append((change, inverse))
        change()

    def exchange(self, place: Place, new: nn.Module) -> None:
        """Let another module stand in a place.

        What the new one got while it stood there, the old one has afterwards: a mode, and tensors under the same names
        that `to` or a checkpoint has put in the place of those it began with.
        """
        began = [dict(slots) for slots in (new._parameters, new._buffers)]
        self.make(partial(place.put, new), partial(_put_back, place, place.module, new, began))
        self._places.append((place, new))

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


def _put_back(place: Place, old: nn.Module, new: nn.Module, began: list[dict[str, Any]]) -> None:
    old.training = new.training
    _follow(old._parameters, began[0], new._parameters)
    _follow(old._buffers, began[1], new._buffers)
    place.put(old)


def _follow(slots: dict[str, Any], was: dict[str, Any], now: dict[str, Any]) -> None:
    """Take over the tensors that have been put in the place of others."""
    for name in slots.keys() & was.keys() & now.keys():
        if slots[name] is not None and was[name] is not None and now[name] is not was[name]:
            slots[name] = now[name]
