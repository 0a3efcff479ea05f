"""Where a layer stands in the model that is running, for messages: found only when there is something to say."""

from __future__ import annotations

import sys

from torch import nn

# How modules are called. No other frame is looked into: the look would keep a training loop's tensors alive with it.
_CALLS = ("forward", "_call_impl", "_wrapped_call_impl")


class Whereabouts:
    """A layer, whose `str` is its path in the outermost module that is running; its class where it runs alone."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __str__(self) -> str:
        return path_of(self._layer) or type(self._layer).__name__


def path_of(layer: nn.Module) -> str:
    """The layer's path in the outermost module whose forward is running; empty where the layer runs alone.

    A module does not know who holds it, but whoever called it stands on the stack.
    """
    callers: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _CALLS:
            caller = frame.f_locals.get("self")
            if isinstance(caller, nn.Module) and caller not in callers:
                callers.append(caller)
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    for caller in reversed(callers):
        for path, module in caller.named_modules():
            if module is layer and path:
                return path
    return ""
