"""What a declaration does to a real shape, for a reader and as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from normwise.kernels.backends import compiled, requested
from normwise.kernels.choose import Choice, choose, is_operator, plainly, readable
from normwise.kernels.reference import Use, wide_dtype
from normwise.memory import falls_back
from normwise.plan import Over, Plan, becomes_contiguous, make_plan, memory_word, over_shape
from normwise.spec import NormSpec


@dataclass(frozen=True)
class Explanation:
    """The four steps for one shape. `str()` is for a terminal, `to_dict()` for programs; sizes are in elements.

    `kernel` and `reason` are those of training, the other two those of evaluation, or of a frozen layer; without a
    memory they are the same. All are of plain calls; `compiled` and `evaluation_compiled` say whether the kernel is the
    same under `torch.compile`, as one operator. Otherwise, and under function transforms, a layer dissolves into
    torch's operations.
    """

    pattern: str
    shape: tuple[int, ...]
    dtype: str
    rows: int
    columns: int
    row_axes: tuple[tuple[str, int], ...]
    column_axes: tuple[tuple[str, int], ...]
    normalizer: str
    memory: str | None
    remembered: dict[str, tuple[int, ...]]
    recovery: str | None
    activation: str | None
    gate: str | None
    parameters: dict[str, tuple[int, ...]]
    word: str
    becomes_contiguous: bool
    kernel: str
    reason: str
    evaluation_kernel: str
    evaluation_reason: str
    compiled: bool
    evaluation_compiled: bool
    bytes_moved: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        where = f"each of {self.rows} samples" if self.rows != 1 else "of one sample"
        lines = [
            f"'{self.pattern}' on {self.shape}, {self.dtype}",
            f"1 reshape    X' is {self.rows} x {self.columns}:"
            f" rows {_axes(self.row_axes)}, columns {_axes(self.column_axes)}",
            f"2 normalize  {self.normalizer}; {self.columns} columns, {where}",
            *self._memory_lines(),
            f"3 recover    {self._recover_line()}",
            f"4 output     {self.shape}, {self.dtype}, {self._lies()}",
            f"memory word  {self.word or 'a single element'} (K kept, R normalized over, outermost in memory first)",
            f"kernel       {self.kernel}: {self.reason}",
            *self._evaluation_lines(),
            *self._compiled_lines(),
            f"traffic      at least {readable(self.bytes_moved)}: {self._read()} read once, the output written once",
        ]
        return "\n".join(lines)

    def _lies(self) -> str:
        if self.becomes_contiguous:
            return "contiguous, because the last axes lie apart in the input's memory"
        return "in the input's memory format"

    def _read(self) -> str:
        """What is read."""
        return "the input" if self.gate is None else "the input and a gate of its dtype"

    def _recover_line(self) -> str:
        then = "" if self.activation is None else f", then {self.activation}"
        then += "" if self.gate is None else f", times {self.gate} of a gate"
        return f"{self.recovery or 'nothing'}{then}{_shapes(self.parameters, ';')}"

    def _memory_lines(self) -> list[str]:
        if self.memory is None:
            return ["             remembers nothing: evaluation uses the batch's statistics, as training does"]
        return [f"             remembers{_shapes(self.remembered, '')}: {self.memory}"]

    def _compiled_lines(self) -> list[str]:
        both = self.compiled, self.evaluation_compiled
        training, evaluation = (_OPERATOR if is_one else _DISSOLVED for is_one in both)
        lines = [f"             under torch.compile {training}"]
        return (
            lines
            if training == evaluation
            else [*lines, f"             under torch.compile, in evaluation {evaluation}"]
        )

    def _evaluation_lines(self) -> list[str]:
        if (self.evaluation_kernel, self.evaluation_reason) == (self.kernel, self.reason):
            return []
        return [f"             in evaluation {self.evaluation_kernel}: {self.evaluation_reason}"]


_OPERATOR = "the same, as one operator"
_DISSOLVED = "plain torch operations, fused with those before and after"


def explain(spec: NormSpec, shape: Sequence[int] | Tensor) -> Explanation:
    """Explain a declaration on a shape, or on a tensor with its own dtype, strides and device.

    A shape is that of a contiguous float32 tensor on the CPU; so is a tensor on "meta", which has no data, on the CPU.

    Raises:
        TypeError: the tensor is not of floating point.
    """
    tensor = shape if isinstance(shape, Tensor) else torch.empty(tuple(shape), device="meta", dtype=torch.float32)
    wide_dtype(tensor)
    plan = make_plan(spec.pattern, tuple(tensor.shape), spec.call_sizes)
    uses = _uses(spec, plan)
    training, evaluation = choices = [_choice(spec, plan, tensor, use) for use in uses]
    elements = tensor.numel() // _pieces(spec, plan), tensor.numel()
    compiled = [is_operator(*asked) for asked in zip(choices, elements, uses, strict=True)]
    return Explanation(
        pattern=spec.text,
        shape=plan.shape,
        dtype=str(tensor.dtype).removeprefix("torch."),
        rows=plan.rows,
        columns=plan.columns,
        row_axes=_named_sizes(plan, reduced=True),
        column_axes=_named_sizes(plan, reduced=False),
        normalizer=spec.normalizer.formula(),
        memory=None if spec.memory is None else spec.memory.formula(),
        remembered={} if spec.memory is None else _over(spec.normalizer.remembers, spec.memory_over, plan),
        recovery=None if spec.recovery is None else spec.recovery.formula(),
        activation=spec.activation,
        gate=spec.gate,
        parameters={} if spec.recovery is None else _over(tuple(spec.recovery.parameters), spec.parameter_over, plan),
        word=memory_word(plan, tensor.stride()),
        becomes_contiguous=becomes_contiguous(plan, tensor.stride()),
        kernel=training.kernel,
        reason=training.reason,
        evaluation_kernel=evaluation.kernel,
        evaluation_reason=evaluation.reason,
        compiled=compiled[0],
        evaluation_compiled=compiled[1],
        bytes_moved=(2 if spec.gate is None else 3) * math.prod(plan.shape) * tensor.element_size(),
    )


def _pieces(spec: NormSpec, plan: Plan) -> int:
    """How many sub-batches a batch of training is divided into."""
    ghost = None if spec.memory is None else spec.memory.ghost
    return 1 if ghost is None or not plan.shape[0] else -(-plan.shape[0] // ghost)


def _uses(spec: NormSpec, plan: Plan) -> tuple[Use | None, Use | None]:
    """What remembered statistics are for in training and in evaluation."""
    memory = spec.memory
    if memory is None:
        return None, None
    least = 2 if spec.normalizer.needs_two else 1
    if not memory.updates or (falls_back(memory) and plan.rows < least):
        return "instead", "instead"
    return None if memory.renorm is None else "correct", "instead"


def _choice(spec: NormSpec, plan: Plan, x: Tensor, use: Use | None) -> Choice:
    """What computes a plain call with this input."""
    if x.numel() == 0:
        return plainly("there is nothing to compute")
    if type(x) in (Tensor, Parameter):
        device = next(iter(compiled()), "cpu") if x.is_meta else x.device.type
        declared = spec.normalizer, spec.recovery, spec.parameter_over
        choice = choose(plan, x.stride(), x.dtype, device, *declared, use, request=requested(), compiled=compiled())
    else:
        choice = plainly(f"no kernel knows the tensor class {type(x).__name__}")
    if requested() in ("cpu", "triton") and choice.geometry is None:
        reason = f"NORMWISE_BACKEND={requested()} asks for its kernels, and none takes this call"
        return Choice("none", f"{reason}, because {choice.refusal}")
    if spec.gate is not None and choice.kernel == "cpu":
        return choice._replace(reason=f"{choice.reason}; times the gate by torch's operations")
    return choice


def _over(names: tuple[str, ...], over: Over, plan: Plan) -> dict[str, tuple[int, ...]]:
    sizes = {name: plan.size(name) for dim in over for name in dim}
    return {name: over_shape(over, sizes) for name in names}


def _named_sizes(plan: Plan, *, reduced: bool) -> tuple[tuple[str, int], ...]:
    dims = range(len(plan.view))
    return tuple((plan.names[dim], plan.view[dim]) for dim in dims if (dim in plan.reduced) == reduced)


def _axes(axes: tuple[tuple[str, int], ...]) -> str:
    return " ".join(f"{name}={size}" for name, size in axes) or "(one)"


def _shapes(shapes: dict[str, tuple[int, ...]], before: str) -> str:
    return f"{before} {', '.join(f'{name} {shape}' for name, shape in shapes.items())}" if shapes else ""
