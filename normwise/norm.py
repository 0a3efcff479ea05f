"""The one module: a declared normalization as a `torch.nn.Module`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from normwise.errors import NormwiseError, PatternError, ShapeError
from normwise.explain import Explanation, explain
from normwise.kernels.closed_form import closed_form
from normwise.kernels.reference import four_steps, wide_dtype
from normwise.memory import Memory, commit
from normwise.moments import Moments
from normwise.normalizers import Normalizer, Standardize
from normwise.plan import Plan, gather, over_shape, plan_for
from normwise.recoveries import Recovery
from normwise.spec import NormSpec, check_samples

_OPTIONS = ("self", "pattern", "normalizer", "recovery", "memory", "sizes", "device", "dtype")
_START = {"mean": 0.0, "var": 1.0, "mean_square": 1.0}


class Norm(nn.Module):
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
        sizes: Axis sizes by name. Those of parameters and memories that are not given are found at the first call, as
            torch's lazy modules do it, or taken from a checkpoint.
        device: Of parameters and memory.
        dtype: Of parameters and memory; memory is kept in float32 at least.
        **named_sizes: Axis sizes, as `g=8`.

    Shapes:
        input: as the pattern says. output: the same shape, dtype and memory format.

    Statistics are computed in float32 at least, and so are the parameters applied.

    Raises:
        PatternError: at construction, with a caret under the culprit.
        ShapeError: at the call, when the input does not fit the pattern.
        TooFewSamplesError: at the call, when a column to be standardized has one sample.

    >>> norm = Norm("[n] c [h w]", recovery=Affine("c"), memory=Moving("c", decay=0.9))
    >>> norm(torch.randn(8, 3, 4, 4)).shape
    torch.Size([8, 3, 4, 4])
    >>> norm.weight.shape, norm.running_mean.shape
    (torch.Size([3]), torch.Size([3]))
    """

    spec: NormSpec

    def __init__(
        self,
        pattern: str,
        normalizer: Normalizer | None = None,
        recovery: Recovery | None = None,
        memory: Memory | None = None,
        *,
        sizes: Mapping[str, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **named_sizes: int,
    ) -> None:
        nn.Module.__init__(self)  # by name: in a named layer the next class in line is torch's, with another signature
        normalizer = Standardize() if normalizer is None else normalizer
        _check_parts(pattern, normalizer, recovery, memory, named_sizes)
        spec = NormSpec(pattern, normalizer, recovery, memory, _joined(sizes, named_sizes))
        for name in spec.pattern.names:
            if name in _OPTIONS:
                raise spec.pattern.error(f"an axis cannot be called '{name}': that is an option of Norm", name)
        self.spec = spec
        self._register(device, dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's layers name it so, and callers may too
        """Normalize `input`."""
        wide_dtype(input)
        plan = plan_for(self.spec.pattern, input.shape, self.spec.sizes)
        if not self._uses_memory() and input.numel() > 0 and self.spec.normalizer.needs_two:
            check_samples(self.spec.pattern, plan, remembers=self.spec.memory is not None)
        if self.spec.unknown:  # only now, so that an input that is refused leaves no sizes behind
            self._materialize_for(plan)
        spec = self.spec
        remembered = self._remembered() if self._uses_memory() else None
        output, moments = four_steps(
            input,
            plan,
            spec.normalizer,
            spec.recovery,
            self._parameters_of_recovery(),
            spec.parameter_over,
            remembered,
            spec.memory_over,
            closed_form,
        )
        if moments is not None and self._commits():
            self._commit(plan, moments)
        return output

    def explain(self, shape: Sequence[int] | Tensor) -> Explanation:
        """The four steps for a real shape (or a tensor, whose dtype and memory order then count).

        >>> print(Norm("... [d]", d=768).explain((32, 768)))  # doctest: +ELLIPSIS
        '... [d]' on (32, 768), float32
        ...
        """
        return explain(self.spec, shape)

    def reset_running_stats(self) -> None:
        """Forget all batches: mean 0, variance 1, none counted."""
        for name in self.spec.normalizer.remembers:
            buffer = self._buffers.get(f"running_{name}")
            if buffer is not None and not is_lazy(buffer):
                buffer.fill_(_START.get(name, 0.0))
        counter = self._buffers["num_batches_tracked"]
        if counter is not None:
            counter.zero_()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: parameters at their first values, memory empty."""
        self.reset_running_stats()
        for name, start in self._starts().items():
            parameter = self._parameters[name]
            if parameter is not None and not is_lazy(parameter):
                parameter.fill_(start)

    def extra_repr(self) -> str:
        """The declaration, sizes as found, and the memory's formula."""
        spec = self.spec
        parts = [repr(part) for part in (spec.text, spec.normalizer, spec.recovery, spec.memory) if part is not None]
        parts += [f"{name}={size}" for name, size in spec.sizes]
        return ", ".join(parts) + self._memory_note()

    def _memory_note(self) -> str:
        return "" if self.spec.memory is None else f"; {self.spec.memory.formula()}"

    def _uses_memory(self) -> bool:
        memory = self.spec.memory
        return memory is not None and not (self.training and memory.updates) and self._has_buffers()

    def _commits(self) -> bool:
        memory = self.spec.memory
        return memory is not None and memory.updates and self.training and self._has_buffers()

    def _has_buffers(self) -> bool:
        """Whether the memory is there: torch's habit is to set the buffers to None to switch it off."""
        return all(self._buffers[f"running_{name}"] is not None for name in self.spec.normalizer.remembers)

    def _commit(self, plan: Plan, moments: Moments) -> None:
        memory = self.spec.memory
        if memory is None:
            return
        statistics = self.spec.normalizer.statistics(moments, unbiased=memory.unbiased)
        batch = [gather(statistic, self.spec.memory_over, plan) for statistic in statistics]
        commit(memory, self._remembered(), batch, self._counter())

    def _counter(self) -> Tensor | None:
        return self._buffers["num_batches_tracked"]

    def _remembered(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"running_{name}") for name in self.spec.normalizer.remembers)

    def _starts(self) -> Mapping[str, float]:
        return {} if self.spec.recovery is None else self.spec.recovery.parameters

    def _parameters_of_recovery(self) -> list[Tensor | None]:
        return [getattr(self, name) for name in self._starts()]

    def _register(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Names for everything; what is not declared is there as None, as in torch's layers."""
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in dict.fromkeys(("weight", "bias", *self._starts())):
            self.register_parameter(name, self._new_parameter(options) if name in self._starts() else None)
        remembers = self.spec.memory is not None
        options["dtype"] = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        for name in self.spec.normalizer.remembers:
            self.register_buffer(f"running_{name}", self._new_buffer(options) if remembers else None)
        counter = torch.zeros((), dtype=torch.long, device=device) if remembers else None
        self.register_buffer("num_batches_tracked", counter)
        self.reset_parameters()

    def _new_parameter(self, options: dict[str, Any]) -> Any:
        if self.spec.unknown:
            return UninitializedParameter(**options)
        return nn.Parameter(torch.empty(over_shape(self.spec.parameter_over, dict(self.spec.sizes)), **options))

    def _new_buffer(self, options: dict[str, Any]) -> Tensor:
        if self.spec.unknown:
            return _UnsizedBuffer(**options)
        return torch.empty(over_shape(self.spec.memory_over, dict(self.spec.sizes)), **options)

    def _materialize_for(self, plan: Plan) -> None:
        sizes = {name: plan.size(name) for name in self.spec.unknown}
        if 0 in sizes.values():
            empty = next(name for name, size in sizes.items() if size == 0)
            raise ShapeError(f"the size of axis '{empty}' cannot be found from an empty input of shape {plan.shape}")
        self._materialize(sizes)

    def _materialize(self, sizes: Mapping[str, int]) -> None:
        self.spec = self.spec.with_sizes(sizes)
        known = dict(self.spec.sizes)
        for name in self._starts():
            getattr(self, name).materialize(over_shape(self.spec.parameter_over, known))
        if self.spec.memory is not None:
            for buffer in self._remembered():
                cast("UninitializedBuffer", buffer).materialize(over_shape(self.spec.memory_over, known))
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Norm:
        """Move and convert as any module, but keep memory in float32 at least: 1e-8 does not fit in float16."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.is_floating_point() and after.dtype.itemsize < buffer.dtype.itemsize:
                wide = torch.promote_types(after.dtype, torch.float32)
                self._buffers[name] = buffer.to(device=after.device, dtype=wide)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As `Module` does it, but what has no size yet is saved as it is, because it cannot be detached."""
        super()._save_to_state_dict(destination, prefix, keep_vars=True)
        for name in (*self._parameters, *self._buffers):
            tensor = destination.get(prefix + name)
            if tensor is not None and not keep_vars and not is_lazy(tensor):
                destination[prefix + name] = tensor.detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load, after taking sizes that are not known yet from the checkpoint."""
        if self.spec.unknown:
            overs = dict.fromkeys(self._starts(), self.spec.parameter_over)
            overs |= {f"running_{name}": self.spec.memory_over for name in self.spec.normalizer.remembers}
            found = [(overs[name], state_dict.get(prefix + name)) for name in overs]
            shapes = [(over, tensor.shape) for over, tensor in found if tensor is not None and not is_lazy(tensor)]
            errors: list[str] = args[-1]
            name = prefix.rstrip(".") or type(self).__name__
            try:
                sizes = self.spec.sizes_from(shapes)
            except NormwiseError as error:
                errors.append(f"{name}: {error}")
                return
            missing = set(self.spec.unknown) - set(sizes)
            if shapes and missing:
                errors.append(f"{name}: the checkpoint does not give the size of axis '{min(missing)}'")
                return
            if not missing:
                self._materialize(sizes)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _UnsizedBuffer(UninitializedBuffer):
    """torch's uninitialized buffer, with the deepcopy that torch gives its uninitialized parameter."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _UnsizedBuffer:
        options: dict[str, Any] = {"device": self.data.device, "dtype": self.data.dtype}
        copied = memo[id(self)] = type(self)(**options)
        return copied


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
