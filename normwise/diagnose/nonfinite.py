"""The first module and call that makes a value that is not finite, forward or backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from normwise.batches import Forward, Loss, device_of, feed, moved, tensors_in
from normwise.diagnose.objective import Batches, Mode, measuring, read
from normwise.diagnose.results import Result, number
from normwise.diagnose.watch import Frame, Watch, floats_in, loss_if_any
from normwise.norm import Norm

Phase = Literal["", "parameter", "buffer", "batch", "forward", "loss", "backward"]


@dataclass(frozen=True, repr=False)
class NonFinite(Result):
    """Where the first NaN or infinity is from; see `first_nonfinite`.

    Attributes:
        found: Whether there is one; otherwise all that follows is empty.
        mode: "train", "eval" or "current".
        phase: "parameter", "buffer" or "batch" (it was there before anything was computed), "forward", "loss" or
            "backward".
        path: The path of the module, the class of a root; the name of a parameter or buffer; the place in a batch, as
            "[0]" or "['labels']".
        layer: The module's class.
        call: Which call of the module in the forward, from 0; None where no module is meant.
        operation: The last function that made such values of finite ones in the module's own code, or the backward
            function of autograd; "" where it is not known.
        what: Which value: "output", "output 1", "the gradient of weight", ...
        batch: Which batch, from 0; None before the first.
        values: How many values are not finite.
        nans: How many of them are NaN.
        size: Of how many values.
        dtype: Their dtype.
        largest_input: The largest finite magnitude that came in; None where nothing did.
        inputs_finite: Whether all that came in was finite: forward, an infinity on purpose may come in, as in a mask.
        backward: Whether the backward pass was looked at; it needs a loss.
        batches: How many batches were looked at, all of them or up to the culprit.
    """

    found: bool
    mode: Mode
    phase: Phase = ""
    path: str = ""
    layer: str = ""
    call: int | None = None
    operation: str = ""
    what: str = ""
    batch: int | None = None
    values: int = 0
    nans: int = 0
    size: int = 0
    dtype: str = ""
    largest_input: float | None = None
    inputs_finite: bool = True
    backward: bool = False
    batches: int = 0

    @property
    def meaning(self) -> str:
        """What was found, in one line."""
        if not self.found:
            passes = "forward and backward" if self.backward else "forward only"
            return f"every value is finite: {self.batches} batch{'es' * (self.batches != 1)}, {passes}"
        kinds = [f"{count} {word}" for count, word in ((self.nans, "NaN"), (self.values - self.nans, "inf")) if count]
        amount = f"{' and '.join(kinds)} of {self.size} values"
        if self.phase in ("parameter", "buffer", "batch"):
            name = f"batch {self.batch}{self.path}" if self.phase == "batch" else f"{self.phase} {self.path}"
            return f"{name} is not finite before anything is computed: {amount}"
        where = "the loss" if self.phase == "loss" else f"{self.path}{self._described()}"
        of_batch = f"in the {'backward' if self.phase == 'backward' else 'forward'} of batch {self.batch}"
        whose = "its " if self.what.startswith(("output", "value")) else ""
        return f"{where} is the first to make {amount}, in {whose}{self.what}, {of_batch}" + self._causes()

    def rows(self) -> list[dict[str, Any]]:
        """One row."""
        return [dict(vars(self))]

    def headline(self) -> dict[str, float | None]:
        """How many values are not finite."""
        return {"nonfinite": float(self.values)}

    def traces(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """How many of the values are finite, NaN and infinite."""
        counts = {"finite": self.size - self.values, "NaN": self.nans, "inf": self.values - self.nans}
        bar = {"type": "bar", "x": list(counts), "y": list(counts.values())}
        return [bar], {"title": {"text": self.meaning}, "yaxis": {"title": {"text": "values"}}}

    def _described(self) -> str:
        call = f", call {self.call}" if self.call else ""
        return f" ({self.layer}{call})" if self.layer and self.layer != self.path else call

    def _causes(self) -> str:
        """What came in, by which operation it became what it is, and where the dtype ends."""
        text = f", by {self.operation}" if self.operation else ""
        if self.largest_input is not None:
            came = "what came in is finite" if self.inputs_finite else "what came in has infinities, as a mask may"
            text += f"; {came}, at most {number(self.largest_input)}"
        ends = _ENDS.get(self.dtype)
        return text + (f"; {self.dtype} ends at {ends}" if ends and self._is_near(float(ends)) else "")

    def _is_near(self, end: float) -> bool:
        """Whether the values have run over the end of their dtype: what came in, squared, would."""
        came = math.inf if self.largest_input is None else self.largest_input
        return self.values > self.nans and (came * came >= end or "exp" in self.operation)


_ENDS = {"float16": "65504", "bfloat16": "3.39e+38", "float32": "3.4e+38"}


def first_nonfinite(
    model: nn.Module,
    batches: Batches,
    loss: Loss | None = None,
    *,
    forward: Forward | None = None,
    backward: bool = True,
    mode: Mode = "train",
) -> NonFinite:
    """Find the first module and call that makes NaN or inf; the model is left as it was, bit for bit.

    Looked at are, in this order: parameters and buffers; then for one batch after another the batch itself, what every
    module returns, the loss, and the backward pass, operation by operation. A module whose inputs are finite and whose
    output is not is the culprit; values that become so between two modules are the work of the module that calls them.
    In the backward pass it is the module in whose call the operation was recorded. Weights do not move.

    An infinity that the model's code writes on purpose (as a number, in `masked_fill` or `full`), and one of -inf in a
    batch or a buffer, as in masks, is no finding, and no more is what passes it on.

    Args:
        model: A model, in any mode.
        batches: A batch, a list of batches or a loader; all of them are read once and kept.
        loss: `loss(output, target)`, with the second element of a tuple or list as the target. None: the model's own,
            its output or the `loss` in it, and if it has none, no backward pass.
        forward: `forward(model, batch)`, for models that are called otherwise.
        backward: Whether to look at the backward pass.
        mode: "train", "eval", or "current": every module in the mode that it is in.

    Returns:
        A record; `found` is False where every value is finite. `repr` says what it means in one line.

    Raises:
        DiagnosisError: there is no batch; the loss that is given is not one number.

    >>> class Root(nn.Module):
    ...     def forward(self, x):
    ...         return x.sqrt()
    >>> model = nn.Sequential(nn.Identity(), Root())
    >>> found = first_nonfinite(model, torch.tensor([[4.0, -1.0]]))
    >>> found.path, found.operation, found.nans
    ('1', 'sqrt', 1)
    """
    with measuring(model, mode, batches=batches):
        given = read(batches)
        seeker = _Seeker(model, mode)
        looked_back = False
        try:
            seeker.check_state()
            for at, batch in enumerate(given):
                looked_back |= seeker.look(at, moved(batch, device_of(model)), loss, forward, backward=backward)
        except _FoundError as found:
            return replace(found.record, backward=looked_back or found.record.phase == "backward")
        return NonFinite(False, mode, backward=looked_back, batches=len(given))


class _FoundError(Exception):
    """The search is over; what the model would do with such values is not awaited."""

    def __init__(self, record: NonFinite) -> None:
        super().__init__(record.meaning)
        self.record = record


@dataclass
class _Given:
    """What a module is given, and what its own code has made of finite values since."""

    largest: float | None = None
    finite: bool = True
    sources: list[str] = field(default_factory=list)  # functions, in order


class _Seeker(Watch):
    """Stops at the first value that is not finite and not meant to be."""

    def __init__(self, model: nn.Module, mode: Mode) -> None:
        super().__init__(model)
        self._mode, self._batch = mode, 0
        self._meant: set[float] = set()  # infinities that are written on purpose
        self._given: dict[Frame, _Given] = {}
        self._nodes: dict[Node, Frame] = {}  # the calls that recorded them
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._first: NonFinite | None = None  # of the backward pass, which is not interrupted

    def check_state(self) -> None:
        """Look at parameters and buffers."""
        for name, parameter in self.model.named_parameters():
            self._check_held("parameter", name, parameter, None)
        for name, buffer in self.model.named_buffers():
            self._allow_masks(buffer)
            self._check_held("buffer", name, buffer, None)

    def look(self, at: int, batch: Any, loss: Loss | None, forward: Forward | None, *, backward: bool) -> bool:
        """Look at a batch, forward and, where it is wanted and there is a loss, backward; whether there is one."""
        self._batch = at
        for name, tensor in _named("", batch):
            self._allow_masks(tensor)
            self._check_held("batch", name, tensor, at)
        self._given.clear()
        self._nodes.clear()
        with self.hooked():
            value = self.follow(partial(self._forward, batch, loss, forward))
        if value is None or not backward or not value.requires_grad:
            return False
        self._go_back(value)
        return True

    def entered(self, frame: Frame, given: Any) -> None:
        """What becomes of values between two modules is the work of the one that calls them."""
        tensors, caller = floats_in(given), self.stack[-1]
        self._check("forward", caller, f"what it gives to {frame.path}", tensors)
        self._belong(tensors, caller)
        self._given[frame] = _Given(_largest(tensors), _all_finite(tensors))

    def left(self, frame: Frame, output: Any) -> None:
        """What a module returns is its own work, because what it was given is finite."""
        tensors = floats_in(output)
        self._check("forward", frame, "output", tensors)
        self._belong(tensors, frame)

    def computed(self, function: Callable[..., Any], given: Any, output: Any) -> None:
        """Remember which functions make such values, and which infinities are written on purpose."""
        frame = self.stack[-1]
        if isinstance(frame.layer, Norm):  # what it does with masks and extremes is its own business
            return
        written = {value for value in _numbers_in(given) if math.isinf(value)}
        self._meant |= written
        if not written and self._any_bad(floats_in(output)) and not self._any_bad(floats_in(given)):
            name = getattr(function, "__name__", "").strip("_")
            self._given.setdefault(frame, _Given()).sources.append(name)

    def _forward(self, batch: Any, loss: Loss | None, forward: Forward | None) -> Tensor | None:
        output = feed(self.model, batch, forward)
        value = loss_if_any(self.model, batch, output, loss)
        if value is not None:
            outside, tensors = self.stack[-1], floats_in(output)
            known = self._given.setdefault(outside, _Given())
            known.largest, known.finite = _largest(tensors), _all_finite(tensors)
            self._check("loss", outside, "value", [value])
            self._belong([value], outside)
        return value

    def _check_held(self, phase: Phase, name: str, tensor: Tensor, batch: int | None) -> None:
        """Refuse a tensor that nothing was computed of yet."""
        if self._any_bad(floats_in(tensor)):
            record = NonFinite(True, self._mode, phase, path=name, what="value", batch=batch)
            raise _FoundError(self._counted(record, tensor))

    def _check(self, phase: Phase, frame: Frame, what: str, tensors: list[Tensor]) -> None:
        for at, tensor in enumerate(tensors):
            if self._any_bad([tensor]):
                known = self._given.get(frame, _Given())
                record = NonFinite(
                    True,
                    self._mode,
                    phase,
                    frame.path,
                    frame.kind,
                    None if frame.layer is None else frame.number,
                    known.sources[-1] if known.sources else "",
                    f"{what} {at}" if len(tensors) > 1 else what,
                    self._batch,
                    largest_input=known.largest,
                    inputs_finite=known.finite,
                )
                raise _FoundError(self._counted(record, tensor))

    def _counted(self, record: NonFinite, tensor: Tensor) -> NonFinite:
        return replace(
            record,
            values=int(self._bad(tensor).sum()),
            nans=int(tensor.isnan().sum()),
            size=tensor.numel(),
            dtype=str(tensor.dtype).removeprefix("torch."),
            batches=self._batch + 1,
        )

    def _any_bad(self, tensors: list[Tensor]) -> bool:
        return not _all_finite(tensors) and any(bool(self._bad(tensor).any()) for tensor in tensors)

    def _bad(self, tensor: Tensor) -> Tensor:
        """Where values are neither finite nor meant."""
        bad = ~tensor.isfinite()
        for value in self._meant:
            bad &= tensor != value
        return bad

    def _allow_masks(self, tensor: Tensor) -> None:
        """Minus infinity in a batch or buffer is for a softmax."""
        if any(bool((x == -math.inf).any()) for x in floats_in(tensor)):
            self._meant.add(-math.inf)

    def _belong(self, tensors: list[Tensor], frame: Frame) -> None:
        """What autograd has recorded and belongs to no call yet belongs to this one."""
        waiting = [tensor.grad_fn for tensor in tensors]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in self._nodes:
                self._nodes[node] = frame
                waiting += [before for before, _ in node.next_functions]

    def _go_back(self, value: Tensor) -> None:
        """Run the backward pass.

        Raises:
            _FoundError: a gradient is not finite.
        """
        for node, frame in self._nodes.items():
            if not hasattr(node, "variable"):  # a parameter's own, which stays when the graph is gone
                targets = [self._target(before, at) for at, (before, _) in enumerate(node.next_functions)]
                node.register_hook(partial(self._flowed, node.name(), frame, targets))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if trained:
            torch.autograd.grad(value, trained, allow_unused=True)
        if self._first is not None:
            raise _FoundError(self._first)

    def _target(self, node: Node | None, at: int) -> str:
        """What an operation's gradient is the gradient of."""
        name = self._names.get(id(getattr(node, "variable", None)))
        return f"the gradient of {name or f'its input {at}'}"

    def _flowed(self, operation: str, frame: Frame, targets: list[str], made: Any, given: Any) -> None:
        """A hook of autograd's: gradients have gone back through an operation."""
        gradients, came = [(t, g) for t, g in zip(targets, made, strict=False) if g is not None], floats_in(given)
        if self._first is not None or _all_finite([gradient for _, gradient in gradients]):
            return
        what, gradient = next(pair for pair in gradients if not _all_finite([pair[1]]))
        self._meant.clear()  # no gradient is infinite on purpose
        record = NonFinite(
            True,
            self._mode,
            "backward",
            frame.path or "the loss",
            frame.kind,
            None if frame.layer is None else frame.number,
            "" if isinstance(frame.layer, Norm) else operation,
            what,
            self._batch,
            largest_input=_largest(came),
            inputs_finite=_all_finite(came),
        )
        self._first = self._counted(record, gradient)


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a batch and their places in it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(f"{name}[{key!r}]", item)
    elif isinstance(value, (tuple, list)):
        for at, item in enumerate(value):
            yield from _named(f"{name}[{at}]", item)
    else:
        yield from ((name, tensor) for tensor in tensors_in(value))


def _numbers_in(value: Any) -> Iterator[float]:
    """The numbers that a function is called with."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping):
        yield from _numbers_in(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _numbers_in(item)


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _largest(tensors: Iterable[Tensor]) -> float | None:
    """The largest finite magnitude; None without a tensor."""
    found = [torch.where(x.isfinite(), x, torch.zeros_like(x)).abs().amax().item() for x in tensors]
    return max(found) if found else None
