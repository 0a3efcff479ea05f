"""The control: the same network with gamma, beta and the output layer frozen at their start.

After a normalization the function does not change with the size of the weights before it, while the gradient shrinks
with it: part of what a normalization tolerates is that invariance. What gives the outputs their scale, the learnable
scale and shift of each normalization and the output layer, is held still here, so that the learning rates which a
normalization tolerates by its scale alone can be told from the others.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.utils.hooks import RemovableHandle

from normwise.errors import StudyError
from normwise.surgery.words import Axis
from normwise.tuning.norms import NormChoice


class Kept:
    """A normalization that keeps the layers it has made.

    >>> kept = Kept(NormChoice("batch", "batch"))
    >>> layer = kept(3)
    >>> kept.made == [layer]
    True
    """

    def __init__(self, choice: NormChoice) -> None:
        self._choice = choice
        self.made: list[nn.Module] = []

    def __call__(self, features: int, axis: Axis = 1) -> nn.Module:
        """The layer, as the choice makes it."""
        self.made.append(self._choice(features, axis))
        return self.made[-1]


class Freezer:
    """Finds the output layer in the first forward, and freezes it and the normalizations afterwards.

    The output layer is the module with parameters of its own that is called last, normalizations aside. A module that
    calls others counts from when it is entered, so that a network with a parameter of its own is not taken for its
    last layer. It is found on the way, and not by an extra forward, which would draw random numbers.
    """

    def __init__(self, model: nn.Module, norms: Iterable[nn.Module]) -> None:
        self._model, self._norms = model, tuple(norms)
        self._last: nn.Module | None = None
        inside = {id(part) for norm in self._norms for part in norm.modules()}
        owners = [m for m in model.modules() if id(m) not in inside and [*m.parameters(recurse=False)]]
        self._handles: list[RemovableHandle] = [owner.register_forward_pre_hook(self._entered) for owner in owners]

    def freeze(self) -> None:
        """Freeze what was found.

        Raises StudyError for a network of which nothing is left to train.
        """
        for handle in self._handles:
            handle.remove()
        own = [] if self._last is None else [self._last]
        for module in (*self._norms, *own):
            module.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self._model.parameters()):
            raise StudyError(
                "the control has nothing to train: the network has no parameters besides its normalizations and its "
                "output layer; leave --control out"
            )

    def _entered(self, module: nn.Module, _: object) -> None:
        self._last = module
