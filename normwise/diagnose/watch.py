"""See the calls of a model's modules and functions as they happen, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normwise.batches import Loss, loss_of, tensors_in
from normwise.errors import DiagnosisError
from normwise.places import all_modules

T = TypeVar("T")


@dataclass(eq=False)
class Frame:
    """One call of a module, or what is outside of all modules.

    Attributes:
        path: The module's path, the class of a root; "" outside.
        layer: The module; None outside.
        number: Which call of the module in this forward it is, from 0.
        calls: How many modules were called within it so far.
        functions: How often each function was called within it, but not within those modules.
    """

    path: str
    layer: nn.Module | None
    number: int = 0
    calls: int = 0
    functions: Counter[str] = field(default_factory=Counter)

    @property
    def kind(self) -> str:
        """The module's class."""
        return "" if self.layer is None else type(self.layer).__name__


class Watch(TorchFunctionMode):
    """Follows forwards; a subclass says what is to be done when a module is entered or left, or a function computed.

    Functions are those that Python code calls, and not those that they call themselves. A forward that is computed
    again in the backward pass, as checkpointing does it, is not followed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.stack = [Frame("", None)]
        self._numbers: Counter[nn.Module] = Counter()
        self._is_watching = False

    def entered(self, frame: Frame, given: Any) -> None:
        """A module is about to compute; the last of `stack` is still the one that calls it."""

    def left(self, frame: Frame, output: Any) -> None:
        """A module has computed; the last of `stack` is again the one that called it."""

    def computed(self, function: Callable[..., Any], given: Any, output: Any) -> None:
        """A function has computed within the last of `stack`; `given` has its arguments and those by name."""

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within this context `follow` sees the modules; hooks of others come before, compiled code runs uncompiled."""
        modules = all_modules(self.model)
        with ExitStack() as hooks:
            if any(map(_is_compiled, modules)):
                hooks.enter_context(torch.compiler.set_stance("force_eager"))
            for module, path in modules.items():
                if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                    continue
                before = partial(self._before, path or type(module).__name__)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(self._after, always_call=True).remove)
            yield

    def follow(self, run: Callable[[], T]) -> T:
        """Run a forward; calls are counted from 0 again."""
        self.stack = [Frame("", None)]
        self._numbers.clear()
        self._is_watching = True
        try:
            with self:
                return run()
        finally:
            self._is_watching = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        with self._looking_away() as was_watching:
            if was_watching:
                self.computed(func, (args, kwargs or {}), output)
        return output

    def _before(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._looking_away() as was_watching:
            if was_watching:
                frame = Frame(path, module, self._numbers[module])
                self._numbers[module] += 1
                self.stack[-1].calls += 1
                self.entered(frame, (args, kwargs))
                self.stack.append(frame)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        with self._looking_away() as was_watching:
            if was_watching and self.stack[-1].layer is module:  # otherwise a hook before this one has failed
                self.left(self.stack.pop(), output)

    @contextmanager
    def _looking_away(self) -> Iterator[bool]:
        """What the watch computes is neither watched nor recorded: a checkpoint would miss it when it recomputes."""
        before, self._is_watching = self._is_watching, False
        try:
            with torch.no_grad():
                yield before
        finally:
            self._is_watching = before


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch._dynamo") or module._compiled_call_impl is not None


def loss_if_any(model: nn.Module, batch: Any, output: Any, loss: Loss | None) -> Tensor | None:
    """The loss of an output; None where no loss is given and the model has none of its own.

    Raises:
        DiagnosisError: the loss that was given is not one number.
    """
    try:
        return loss_of(model, batch, loss, lambda _model, _batch: output)
    except DiagnosisError:
        if loss is not None:
            raise
        return None


def floats_in(value: Any) -> list[Tensor]:
    """The dense tensors of real numbers in a value that have at least one element; no float8, which is for storage."""
    found = (tensor for tensor in tensors_in(value) if tensor.is_floating_point() and tensor.layout == torch.strided)
    return [tensor for tensor in found if not tensor.is_nested and tensor.element_size() > 1 and tensor.numel() > 0]
