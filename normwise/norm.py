"""The one module: a declared normalization as a `torch.nn.Module`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normwise.errors import GateError, NonFiniteError, NormwiseError, PatternError, RecomputeError, ShapeError
from normwise.explain import Explanation, explain
from normwise.kernels.prepared import PLAIN, fits
from normwise.kernels.reference import Steps, Use, wide_dtype
from normwise.kernels.run import run
from normwise.kernels.short import Ready, normalize, normalize_sum
from normwise.masks import Lengths, valid_view
from normwise.memory import Memory
from normwise.normalizers import Normalizer, Standardize
from normwise.plan import Plan, plan_for
from normwise.pointwise import Activation, Gate
from normwise.recoveries import Recovery
from normwise.remembering import Remembering
from normwise.spec import NormSpec
from normwise.transforms import being_traced
from normwise.whereabouts import path_of

_STRIDED = torch.strided
_ELSEWHERE: Any = object()  # a parameter that is computed where it is asked for, which must be once a call
_MOST_READY = 256  # kinds of calls that a declaration keeps what it has found out for
_OPTIONS = ("self", "pattern", "normalizer", "recovery", "memory", "activation", "gate", "sizes", "device", "dtype")


class Norm(Remembering):
    """A normalization, declared by its four steps: reshape, normalize, recover, output.

    The pattern names the input's dimensions in order; `[ ]` marks the axes that are normalized over, `( )` splits a
    dimension into several axes, `...` is any number of dimensions. Every setting of the other axes is one column; each
    column is normalized by itself, then recovered, then put back where it came from.

    Args:
        pattern: For example `"[n] c [h w]"`, a batch normalization of images.
        normalizer: Step 2. Default: `Standardize()`.
        recovery: Step 3: `Affine("c")`, `Scale("c")`. Default: none.
        memory: What is remembered of training batches and used in evaluation: `Moving("c", decay=0.9)`,
            `Average("c")`, `Frozen("c")`. Default: nothing; evaluation then uses the batch's statistics too.
        activation: Applied to what step 3 gives, in the same pass: "relu", max(x, 0); "silu", x sigmoid(x); "gelu",
            x (1 + erf(x / sqrt(2))) / 2. Default: none.
        gate: The function of a gate, a tensor that every call then brings (`norm(x, gate=g)`) and by whose function
            the output is multiplied: an activation's name, or "sigmoid". Default: there is no gate.
        sizes: Axis sizes by name. Those of parameters and memories that are not given are found at the first call, as
            torch's lazy modules do it, or taken from a checkpoint.
        device: Of parameters and memory.
        dtype: Of parameters and memory; memory is kept in float32 at least.
        **named_sizes: Axis sizes, as `g=8`.

    Shapes:
        input: as the pattern says. output: the same shape and dtype, and the same memory format, or order of axes in
            memory; but contiguous where the last axes are normalized over, by name, and lie apart in memory, as those
            of `x.permute(0, 2, 3, 1)` do.

    Statistics are computed in float32 at least, and so are the parameters, the activation and the gate applied.

    Raises:
        PatternError: at construction, with a caret under the culprit.
        ShapeError: at the call, when the input does not fit the pattern.
        TooFewSamplesError: at the call, when a column to be standardized has one sample.
        ValueError: at construction, when there is no such activation, or function of a gate.
        GateError: at the call, when it brings a gate and none is declared, or the other way about.

    >>> norm = Norm("[n] c [h w]", recovery=Affine("c"), memory=Moving("c", decay=0.9))
    >>> norm(torch.randn(8, 3, 4, 4)).shape
    torch.Size([8, 3, 4, 4])
    >>> norm.weight.shape, norm.running_mean.shape
    (torch.Size([3]), torch.Size([3]))
    """

    def __init__(
        self,
        pattern: str,
        normalizer: Normalizer | None = None,
        recovery: Recovery | None = None,
        memory: Memory | None = None,
        *,
        activation: Activation | None = None,
        gate: Gate | None = None,
        sizes: Mapping[str, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **named_sizes: int,
    ) -> None:
        nn.Module.__init__(self)  # by name: in a named layer the next class in line is torch's, with another signature
        normalizer = Standardize() if normalizer is None else normalizer
        _check_parts(pattern, normalizer, recovery, memory, named_sizes)
        spec = NormSpec(pattern, normalizer, recovery, memory, _joined(sizes, named_sizes), activation, gate)
        for name in spec.pattern.names:
            if name in _OPTIONS:
                raise spec.pattern.error(f"an axis cannot be called '{name}': that is an option of Norm", name)
        self.spec = spec
        self._register(device, dtype)

    def forward(
        self,
        input: Tensor,  # noqa: A002 - torch's layers name it so, and callers may too
        *,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
        valid: Tensor | None = None,
        valid_axes: str | None = None,
        lengths: Lengths | None = None,
    ) -> Any:
        """Normalize `input`, or `input + residual`.

        Args:
            input: As the pattern says.
            residual: Added first, of the input's shape; the sum is returned as well: `y, s = norm(x, residual=r)`.
            gate: Of the input's shape; the output is multiplied by the function of it that the layer declares.
            valid: A bool mask, True where an element counts. Padding never counts, in the batch's statistics or in
                memory; its value, NaN included, never matters; outputs and gradients there are exactly 0.
            valid_axes: The axes that `valid` covers, as "n t", or "n ..."; if not said, the leading dimensions of the
                input.
            lengths: How many places of an axis count, for each example: `{"t": torch.tensor([5, 3])}`; also over
                several axes, and together with `valid`. In compiled code lengths past the end are not refused.

        Returns:
            The output; with a residual, the output and the sum, which is `input + residual` everywhere.

        Hugging Face's attention_mask is `valid=attention_mask.bool()`; torch's key_padding_mask is its inverse,
        `valid=~key_padding_mask`.

        A column without a valid element gives zeros and does not enter the memory. Nor does one with a single valid
        element where a variance is needed: its value is 0 before recovery, or what the memory makes of it if that is
        declared (`Moving(..., degenerate="memory")`).

        >>> norm = Norm("[n t] c", memory=Moving("c", update_rate=1.0))
        >>> x = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [torch.nan]]])
        >>> norm(x, lengths={"t": [3, 2]})[1, 2], norm.running_mean
        (tensor([0.]), tensor([3.]))
        """
        if valid is None and valid_axes is None and lengths is None and gate is None:
            found = self._shortly(input) if residual is None else self._sum_shortly(input, residual)
            if found is not None:
                return found
        if not isinstance(input, Tensor):
            raise TypeError(f"input is {type(input).__name__}, not a tensor; a packed sequence is padded first")
        try:
            if residual is not None:
                _check_residual(input, residual)
            if gate is not None or self.spec.gate is not None:
                self._check_gate(input, gate)
            output, total = self._normalize(input, residual, gate, valid, valid_axes, lengths)
        except NormwiseError as error:
            path = "" if torch.compiler.is_compiling() else path_of(self)
            if path and not isinstance(error, (NonFiniteError, RecomputeError)):  # those say it themselves
                error.args = (f"{path}: {error}",)
            raise
        return output if residual is None else (output, total)

    def explain(self, shape: Sequence[int] | Tensor) -> Explanation:
        """The four steps for a real shape (or a tensor, whose dtype and memory order then count).

        >>> print(Norm("... [d]", d=768).explain((32, 768)))  # doctest: +ELLIPSIS
        '... [d]' on (32, 768), float32
        ...
        """
        return explain(self.spec, shape)

    def extra_repr(self) -> str:
        """The declaration, sizes as found, and the memory's formula."""
        spec = self.spec
        parts = [repr(part) for part in (spec.text, spec.normalizer, spec.recovery, spec.memory) if part is not None]
        parts += self._notes()
        parts += [f"{name}={size}" for name, size in spec.sizes]
        return ", ".join(parts) + self._memory_note()

    def _notes(self) -> list[str]:
        """What is done after the recovery, as the options that declare it."""
        options = {"activation": self.spec.activation, "gate": self.spec.gate}
        return [f"{name}={value!r}" for name, value in options.items() if value is not None]

    def _memory_note(self) -> str:
        note = "" if self.spec.memory is None else f"; {self.spec.memory.formula()}"
        return note + ("; frozen now" if self.frozen else "")

    def _shortly(self, x: Tensor) -> Tensor | None:
        """The output of a call like one that every check has let pass before; None: this one takes the long way."""
        known = self._known(x)
        if known is None:
            return None
        ready, weight, bias = known
        if ready.has_memory:
            return self._remember_shortly(ready, x, weight, bias)
        return normalize(ready, ready.room(x), x, weight, bias)

    def _sum_shortly(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor] | None:
        """The same for the sum with a residual that lies as the input does, and that sum; not with a memory."""
        known = self._known(x)
        if known is None or known[0].has_memory or type(residual) not in PLAIN or residual.layout is not _STRIDED:
            return None
        if residual.shape != x.shape or residual.stride() != x.stride() or residual.dtype is not x.dtype:
            return None
        if residual.get_device() != x.get_device():  # a number, -1 on the CPU
            return None
        ready, weight, bias = known
        if not fits(residual, None, None, ready.kernel):
            return None
        return normalize_sum(ready, ready.room(x), x, residual, weight, bias)

    def _known(self, x: Tensor) -> tuple[Ready, Tensor | None, Tensor | None] | None:
        """What the short way needs, and the recovery's parameters, if it can be taken.

        Calls that can are known by what the checks look at: shape, strides, dtype, whether it is on the CPU, and mode.
        What may change without them, parameters, memory and whoever looks on, is looked at here.
        """
        if being_traced() or type(x) not in PLAIN or x.layout is not _STRIDED:
            return None
        ready: Ready | None = self.spec.ready.get((x.shape, x.stride(), x.dtype, x.is_cpu, self.training))
        if ready is None:
            return None
        kernel, own = ready.kernel, self._parameters
        weight = own.get("weight", _ELSEWHERE) if kernel.has_weight else None
        bias = own.get("bias", _ELSEWHERE) if kernel.has_bias else None
        return (ready, weight, bias) if fits(x, weight, bias, kernel) else None

    def _prepare(self, x: Tensor, plan: Plan, use: Use | None) -> None:
        """Let calls like this one take the short way from now on."""
        ready, key = self.spec.ready, (x.shape, x.stride(), x.dtype, x.is_cpu, self.training)
        known = ready.get(key)
        if key not in ready or (known is not None and known.use != use):
            if len(ready) >= _MOST_READY:
                ready.clear()
            ready[key] = self._ready_for(x, plan, use)

    def _check_gate(self, x: Tensor, gate: Tensor | None) -> None:
        """Refuse a gate that is not declared, and one that is missing, or does not fit."""
        declared = self.spec.gate
        if declared is None:
            raise GateError("this call brings a gate, and the layer declares none: make it with gate='silu'")
        if gate is None:
            raise GateError(f"the layer declares gate={declared!r}, and this call brings none: norm(x, gate=g)")
        if not isinstance(gate, Tensor) or not gate.is_floating_point():
            found = gate.dtype if isinstance(gate, Tensor) else type(gate).__name__
            raise GateError(f"the gate is {found}, not a tensor of floating point")
        if gate.layout is not _STRIDED:
            raise GateError(f"the gate has layout {gate.layout}, not torch.strided")
        if gate.shape != x.shape:
            raise ShapeError(f"the gate has shape {tuple(gate.shape)}, the input {tuple(x.shape)}")
        if gate.device != x.device:
            raise ShapeError(f"the gate is on {gate.device}, the input on {x.device}")

    def _normalize(
        self,
        x: Tensor,
        residual: Tensor | None,
        gate: Tensor | None,
        valid: Tensor | None,
        valid_axes: str | None,
        lengths: Lengths | None,
    ) -> tuple[Tensor, Tensor | None]:
        wide_dtype(x)
        spec = self.spec
        plan = plan_for(spec.pattern, x.shape, spec.call_sizes)
        mask = None
        if valid is not None or lengths is not None or valid_axes is not None:
            mask = valid_view(spec.pattern, plan, valid, valid_axes, lengths, x.device)
            self._check_mask(mask, plan)
        ghost = None if spec.memory is None else spec.memory.ghost
        if ghost is None or x.shape[0] <= ghost or not self._measures():
            return self._normalize_one(x, plan, mask, gate, residual=residual)
        total = None if residual is None else x + residual
        return self._normalize_pieces(x if total is None else total, mask, gate, -(-x.shape[0] // ghost)), total

    def _normalize_pieces(self, x: Tensor, mask: Tensor | None, gate: Tensor | None, pieces: int) -> Tensor:
        """Sub-batches one after another, as equal in size as can be."""
        parts = x.tensor_split(pieces)
        gates = [None] * pieces if gate is None else gate.tensor_split(pieces)
        masks = [mask] * pieces if mask is None or mask.shape[0] == 1 else mask.tensor_split(pieces)
        plans = [plan_for(self.spec.pattern, part.shape, self.spec.call_sizes) for part in parts]
        for part, part_mask in zip(plans, masks, strict=True):  # before any of them enters
            self._checked_use(part, part_mask)
        last = [False] * (pieces - 1) + [True]
        with self._all_or_nothing():
            given = zip(parts, plans, masks, gates, last, strict=True)
            return torch.cat([self._normalize_one(*piece)[0] for piece in given])

    def _normalize_one(
        self,
        x: Tensor,
        plan: Plan,
        mask: Tensor | None,
        gate: Tensor | None,
        is_last: bool = True,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        use = self._checked_use(plan, mask)
        if self.spec.unknown:  # only now, so that an input that is refused leaves no sizes behind
            self._materialize_for(plan)
        if mask is None and gate is None and _is_plain(x):
            self._prepare(x, plan, use)
            found = (self._shortly(x), None) if residual is None else self._sum_shortly(x, residual)
            if found is not None and found[0] is not None:
                return found  # type: ignore[return-value]  # mypy keeps the None that was ruled out
        spec, commits = self.spec, self._commits() and use != "instead" and x.numel() > 0
        length = self._length()
        if commits:
            self._grow(plan)
        recalled = None
        if use is not None:
            recalled = self._recalled(
                use, plan, wide_dtype(x), lambda: self._fingerprint(x, residual, plan, mask), mask
            )
        steps = Steps(plan, spec.normalizer, spec.recovery, mask, recalled, spec.activation, spec.gate)
        parameters = self._parameters_of_recovery()
        result, total = run(x, steps, parameters, spec.parameter_over, residual, gate, remembers=commits)
        if result.moments is not None and commits:
            self._enter(plan, result.moments, length, is_last=is_last)
        return result.output, total


def _is_plain(x: Tensor) -> bool:
    return (x.is_cpu or x.is_cuda) and type(x) in PLAIN and x.layout is _STRIDED and not being_traced()


def _check_residual(x: Tensor, residual: Tensor) -> None:
    if x.shape != residual.shape:
        raise ShapeError(f"the residual has shape {tuple(residual.shape)}, the input {tuple(x.shape)}")


def _joined(sizes: Mapping[str, int] | None, named: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    given = dict(sizes or {})
    for name, size in named.items():
        if given.setdefault(name, size) != size:
            raise ShapeError(f"axis '{name}' is given two sizes: {given[name]} and {size}")
    return tuple(given.items())


def _check_parts(
    pattern: str,
    normalizer: Normalizer,
    recovery: Recovery | None,
    memory: Memory | None,
    named_sizes: Mapping[str, Any],
) -> None:
    """Catch a part in the wrong place, or an option that is misspelt and so looks like an axis size."""
    if not isinstance(pattern, str):
        raise TypeError(f"pattern is {pattern!r}, which is not text")
    wanted = (("normalizer", normalizer, "normalize"), ("recovery", recovery, "recover"), ("memory", memory, "updates"))
    for name, part, method in wanted:
        if part is not None and (isinstance(part, type) or not hasattr(part, method)):
            raise TypeError(f"{name} is {part!r}, which is not a {name}")
    for name, size in named_sizes.items():
        if not hasattr(size, "__index__"):
            known = ", ".join(_OPTIONS[1:])
            raise PatternError(f"{name}={size!r} is neither an option of Norm ({known}) nor the size of an axis")
