"""What happens to the data in a forward: which layer or operation reads what which other one has written.

The model is run, and every operation on a tensor is seen where torch dispatches it, so that any Python code is
understood: branches, loops, functions, tensors that are changed in place, parameters that are used outside of their
layer. Normalizations, convolutions, linear layers and embeddings are seen as wholes. What is found holds for forwards
that take the same way through the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normwise.batches import tensors_in
from normwise.places import OWN_ATTRIBUTES, all_modules

HOOKS = tuple(name for name, value in nn.Module().__dict__.items() if "hook" in name and isinstance(value, dict))
WHOLES = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)


@dataclass(eq=False)
class Value:
    """A tensor at one moment of its life: what is written into it in place makes another value."""

    tensor: Tensor
    writer: Step | None  # None: it came from outside, as an input, a parameter or a constant
    readers: list[Step] = field(default_factory=list)


@dataclass(eq=False)
class Step:
    """A call of a layer that is seen as a whole, or an operation outside of any; the last one is the output."""

    name: str
    layer: nn.Module | None = None
    operation: Any = None
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)  # the arguments given by name
    reads: list[Value] = field(default_factory=list)
    writes: list[Value] = field(default_factory=list)  # of a layer: what it returns
    takes: list[Value] = field(default_factory=list)  # of a layer: what it is called with

    @property
    def takes_only_its_input(self) -> bool:
        """Of a layer: whether it is called with one tensor and nothing else."""
        given = [*self.arguments, *(value for value in self.options.values() if value is not None)]
        return len(given) == len(self.takes) == 1

    def __str__(self) -> str:
        return self.name


class Flow:
    """The steps of one forward.

    Attributes:
        steps: In order.
        output: A last step, which reads what the forward returned.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.output = Step("the model's output")
        self.holders: dict[int, list[tuple[nn.Module, str]]] = {}  # who has a parameter or buffer, by its id
        self._changes: list[tuple[Step, int]] = []  # in place, and of which memory
        self._values: dict[int, Value] = {}
        self._kept: list[Tensor] = []  # so that no other tensor gets the same id

    def calls(self, layer: nn.Module) -> list[Step]:
        """The calls of a layer."""
        return [step for step in self.steps if step.layer is layer]

    def value(self, tensor: Tensor) -> Value:
        """The value that a tensor has now."""
        known = self._values.get(id(tensor))
        return self.written(tensor, None) if known is None else known

    def written(self, tensor: Tensor, writer: Step | None) -> Value:
        """A new value of a tensor."""
        value = self._values[id(tensor)] = Value(tensor, writer)
        self._kept.append(tensor)
        if writer is not None and writer.layer is None:
            writer.writes.append(value)
        return value

    def read(self, tensor: Tensor, reader: Step) -> Value:
        """A step reads a tensor."""
        value = self.value(tensor)
        if value.writer is not reader and reader not in value.readers:
            value.readers.append(reader)
            reader.reads.append(value)
        return value

    def changed(self, tensor: Tensor, step: Step) -> None:
        """A step writes into a tensor that was there."""
        self._changes.append((step, _memory(tensor)))
        self.written(tensor, step)

    def is_changed_after(self, call: Step, tensor: Tensor) -> bool:
        """Whether anything is written into a tensor's memory after a call."""
        later = {id(step) for step in self.steps[self.steps.index(call) + 1 :]}
        return any(id(step) in later and memory == _memory(tensor) for step, memory in self._changes)

    def keep(self, value: Any, name: str) -> None:
        """What a module holds on to afterwards may be read by anybody."""
        for tensor in tensors_in(value):
            known = self._values.get(id(tensor))
            if known is not None and known.writer is not None:
                self.read(tensor, Step(f"the attribute {name}"))

    def hold(self, module: nn.Module, path: str) -> None:
        """A module has parameters and buffers."""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                self.holders.setdefault(id(tensor), []).append((module, f"{path}.{name}" if path else name))

    def elsewhere(self, layer: nn.Module) -> str | None:
        """What else reads or has a parameter or buffer of a layer, in words; None: nothing does."""
        for tensor in (*layer._parameters.values(), *layer._buffers.values()):
            known = self._values.get(id(tensor))
            readers = [] if known is None else known.readers
            reader = next((step for step in readers if step.layer is not layer), None)
            if reader is not None:
                return f"is also read by {reader}"
            holder = next((path for module, path in self.holders.get(id(tensor), ()) if module is not layer), None)
            if holder is not None:
                return f"is also {holder}"
        return None


def trace(model: nn.Module, run: Callable[[], Any], wholes: Iterable[nn.Module] = ()) -> Flow:
    """Run a forward and see what happens in it.

    Args:
        model: The model.
        run: Runs it and gives the output.
        wholes: Layers to be seen as wholes, beside convolutions, linear layers and embeddings.
    """
    flow = Flow()
    modules = all_modules(model)
    for module, path in modules.items():
        flow.hold(module, path)
    seen_as_wholes = {id(module) for module in wholes}
    with ExitStack() as hooks, torch.no_grad(), _Recorder(flow) as recorder:
        for module, path in modules.items():
            if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                continue
            if id(module) in seen_as_wholes or isinstance(module, WHOLES):
                recorder.watch(path, module, hooks)
            else:
                recorder.enter(path, module, hooks)
        output = run()
    for tensor in tensors_in(output):
        flow.read(tensor, flow.output)
    for module, path in modules.items():
        for name, value in vars(module).items():
            if name not in OWN_ATTRIBUTES:
                flow.keep(value, f"{path}.{name}" if path else name)
    return flow


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Sees each operation, and says which layer it belongs to."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._flow = flow
        self._inside: list[Step] = []
        self._paths: list[str] = []

    def watch(self, path: str, layer: nn.Module, hooks: ExitStack) -> None:
        """See the calls of a layer as wholes."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            step = Step(path or type(layer).__name__, layer, None, args, kwargs)
            if not self._inside:
                self._flow.steps.append(step)
            self._inside.append(step)
            step.takes = [self._flow.read(tensor, step) for tensor in tensors_in((args, kwargs))]

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self._inside or self._inside[-1].layer is not layer:  # one before it in line has failed
                return
            step = self._inside.pop()
            step.writes = [self._flow.value(tensor) for tensor in tensors_in(output)]

        for handle in (
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after, prepend=True, always_call=True),
        ):
            hooks.callback(handle.remove)

    def enter(self, path: str, module: nn.Module, hooks: ExitStack) -> None:
        """Know that operations happen within a module."""
        hooked = Step(f"hooks of {path}") if any(getattr(module, name) for name in HOOKS) else None

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._paths.append(path)
            self._seen_by(hooked, (args, kwargs))

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._leave(path)
            self._seen_by(hooked, output)

        for handle in (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, prepend=True, always_call=True),
        ):
            hooks.callback(handle.remove)

    def _seen_by(self, hooked: Step | None, value: Any) -> None:
        """Hooks of a module read what it takes and gives."""
        if hooked is not None and not self._inside:
            for tensor in tensors_in(value):
                self._flow.read(tensor, hooked)

    def _leave(self, path: str) -> None:
        if self._paths and self._paths[-1] == path:
            self._paths.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        step = self._inside[0] if self._inside else self._operation(func, args, kwargs or {})
        for tensor in tensors_in((args, kwargs or {})):
            self._flow.read(tensor, step)
        for tensor in _changed(func, args, kwargs or {}):
            self._flow.changed(tensor, step)
        given = {id(tensor) for tensor in tensors_in((args, kwargs or {}))}
        for tensor in tensors_in(output):
            if id(tensor) not in given:
                self._flow.written(tensor, step)
        return output

    def _operation(self, func: Any, args: Any, kwargs: Any) -> Step:
        where = f" in {self._paths[-1]}" if self._paths and self._paths[-1] else ""
        step = Step(f"{func.overloadpacket.__name__}{where}", None, func, tuple(args), dict(kwargs))
        self._flow.steps.append(step)
        return step


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes in place."""
    changed = []
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[at] if at < len(args) else kwargs.get(argument.name)
            changed += list(tensors_in(given))
    return changed
