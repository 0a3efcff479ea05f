"""The compiled kernels under `torch.compile`, as operators of torch's, where they win.

A compiler that is shown the definition can fuse it with its neighbours; an operator it cannot look into. But what is
fused reads the input twice, and sums over axes that do not lie innermost slowly. Measured with pointwise neighbours on
both sides, on two threads, time of the definition over that of the operator: rows of 768 1.1 forward and 1.2 with the
backward, batch norm of images 1.4 and 1.2, of a table 1.6 and 2.9, layer norm over the channels of images 1.5 and 3.7;
alone up to 4.6. A call of the operator costs some 60 microseconds, of which a hot loop shows 20: at 2^17 elements the
two are equal, so small tensors stay with the definition, and so do masks and remembered statistics.

An operator is told everything in numbers and words, which mean the same in another process: compiled programs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting

from normwise.kernels import closed_form
from normwise.kernels.backends import extension, requested
from normwise.kernels.choose import DTYPES, LEAST_COMPILED, NORMALIZERS, RECOVERIES
from normwise.kernels.prepare import as_read, kernel_for
from normwise.kernels.prepared import Given, Kernel, fits, in_order, shaped
from normwise.kernels.reference import Result, Steps, four_steps, placed, wide_dtype
from normwise.moments import Moments
from normwise.normalizers import Normalizer
from normwise.pattern import parse_names
from normwise.plan import Over, Plan, gather
from normwise.pointwise import Activation
from normwise.recoveries import OffsetScale, Recovery, Scale
from normwise.transforms import being_transformed, derivatives

Inputs: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]  # and weight and bias

_WIDE = torch.float64
_REMEMBERS = Given(remembers=True)
_NORMALIZERS: dict[str, Callable[[float | None], Normalizer]] = {kind.__name__: kind for kind in NORMALIZERS}
_RECOVERIES: dict[str, Callable[[str], Recovery]] = {
    kind.__name__: cast("Callable[[str], Recovery]", kind) for kind in RECOVERIES
}


def pays(x: Tensor, steps: Steps) -> bool:
    """Whether a traced call becomes an operator: under `torch.compile`, and where that has been measured to win."""
    if not is_compiling() or is_exporting() or being_transformed():
        return False
    if extension is None or requested() not in ("auto", "cpu"):
        return False
    if steps.valid is not None or steps.recalled is not None or x.device.type != "cpu" or x.dtype not in DTYPES:
        return False
    if type(steps.normalizer) not in NORMALIZERS or type(steps.recovery) not in RECOVERIES:
        return False
    return x.numel() >= LEAST_COMPILED and _is_word(steps.plan)


def _is_word(plan: Plan) -> bool:
    """Whether kernels know the word of a contiguous input; of other orders the operator finds out."""
    reduced = [dim in plan.reduced for dim, size in enumerate(plan.view) if size != 1]
    changes = sum(reduced[place] != reduced[place - 1] for place in range(1, len(reduced)))
    return changes <= 2 or (changes == 3 and not reduced[0])


def normalize(x: Tensor, steps: Steps, weight: Tensor | None, bias: Tensor | None, *, remembers: bool) -> Result:
    """The four steps, without a mask or remembered statistics."""
    plan, normalizer, recovery = steps.plan, steps.normalizer, steps.recovery
    output, statistics = torch.ops.normwise.normalize(
        x,
        weight,
        bias,
        plan.view,
        plan.reduced,
        plan.parts,
        " ".join(plan.names),
        type(normalizer).__name__,
        normalizer.eps,  # type: ignore[attr-defined]  # `pays` knows the normalizer
        "" if recovery is None else type(recovery).__name__,
        "" if recovery is None else recovery.over,
        steps.activation or "",
    )
    _, mean, m2 = statistics.detach().unbind()
    return Result(output, Moments(plan.rows, mean, m2) if remembers else None, None)


# --- the operators ----------------------------------------------------------------------------------------------------

_DECLARED = (
    "SymInt[] view, int[] reduced, int[] parts, str names, str normalizer, float? eps, str recovery, str over, "
    "str activation"
)


@lru_cache(maxsize=4096)
def _steps_of(
    shape: tuple[int, ...],
    view: tuple[int, ...],
    reduced: tuple[int, ...],
    parts: tuple[int, ...],
    names: str,
    normalizer: str,
    eps: float | None,
    recovery: str,
    over: str,
    activation: str,
) -> tuple[Steps, Over]:
    """What an operator was told, and the axes of its parameters."""
    plan = Plan(shape, view, tuple(names.split(" ")), reduced, parts)
    recovered = _RECOVERIES[recovery](over) if recovery else None
    steps = Steps(plan, _NORMALIZERS[normalizer](eps), recovered, activation=cast("Activation", activation) or None)
    return steps, parse_names(over) if over else ()


def _told(x: Tensor, declared: Sequence[Any]) -> tuple[Steps, Over]:
    return _steps_of(tuple(x.shape), *(tuple(part) if isinstance(part, list) else part for part in declared))


def _chosen(x: Tensor, steps: Steps, over: Over, weight: Tensor | None, bias: Tensor | None) -> Kernel | None:
    kernel = kernel_for(x, steps, over, None)
    return kernel if kernel is not None and fits(x, weight, bias, kernel) else None


def _run(x: Tensor, weight: Tensor | None, bias: Tensor | None, *declared: Any) -> tuple[Tensor, Tensor]:
    """Output; inverse, mean and m2, (3, ...), each shaped to broadcast against the view."""
    steps, over = _told(x, declared)
    x = as_read(x, x)
    kernel = _chosen(x, steps, over, weight, bias)
    if kernel is None:
        result = four_steps(x, steps, placed(steps.recovery, _given(steps, weight, bias), over, steps.plan, x))
        _, mean, m2 = cast("Moments", result.moments)
        return result.output.clone(), torch.stack([torch.zeros_like(mean), mean, m2]).to(_WIDE)
    found = kernel.forward(_REMEMBERS, (x, None, weight, bias))
    if not kernel.centers:
        found.statistics[1] = 0
    return found.output, shaped(kernel, found.statistics).contiguous()


def _differentiate(
    d_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    wanted: Sequence[bool],
    *declared: Any,
) -> list[Tensor]:
    """Those gradients of input, weight and bias that are wanted."""
    steps, over = _told(x, declared)
    x = as_read(x, x)
    kernel = _chosen(x, steps, over, weight, bias)
    if kernel is None:
        found = tuple(_plain_gradients(d_output, (x, weight, bias), steps, over, wanted))
    else:
        saved = (x, weight, bias, in_order(kernel, statistics))
        found = kernel.backward(Given(), saved, d_output, None, tuple(wanted))
    return [gradient for gradient in found if gradient is not None]


def _plain_gradients(
    d_output: Tensor, inputs: Inputs, steps: Steps, over: Over, wanted: Sequence[bool]
) -> Iterator[Tensor | None]:
    """Without a kernel: the closed form, in torch's operators."""
    x, *parameters = inputs
    if isinstance(steps.recovery, OffsetScale):
        parameters = [None if weight is None else weight.to(wide_dtype(x)) + 1 for weight in parameters]
        steps = steps._replace(recovery=Scale(steps.recovery.over))
    placed_parameters = placed(steps.recovery, _given(steps, *parameters), over, steps.plan, x)
    found = closed_form.gradients(d_output, x, steps, placed_parameters, wanted)
    yield found[0]
    for parameter, gradient in zip(parameters, found[1:], strict=True):
        yield None if parameter is None or gradient is None else gather(gradient, over, steps.plan).to(parameter.dtype)


def _given(steps: Steps, weight: Tensor | None, bias: Tensor | None) -> Sequence[Tensor | None]:
    """As many parameters as the recovery has."""
    return (weight, bias)[: 0 if steps.recovery is None else len(steps.recovery.parameters)]


# Defined so and not as `custom_op`, whose checks cost as much as a kernel of 2^16 elements.
torch.library.define(
    "normwise::normalize", f"(Tensor x, Tensor? weight, Tensor? bias, {_DECLARED}) -> (Tensor, Tensor)"
)
torch.library.define(
    "normwise::normalize_gradients",
    "(Tensor d_output, Tensor x, Tensor? weight, Tensor? bias, Tensor statistics, bool[] wanted, "
    f"{_DECLARED}) -> Tensor[]",
)
torch.library.impl("normwise::normalize", "CPU", _run)
torch.library.impl("normwise::normalize_gradients", "CPU", _differentiate)


def _run_fakely(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, view: Sequence[int], reduced: Sequence[int], *_: Any
) -> tuple[Tensor, ...]:
    columns = [1 if dim in reduced else size for dim, size in enumerate(view)]
    return torch.empty_like(x), x.new_empty((3, *columns), dtype=_WIDE)


def _differentiate_fakely(
    d_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    wanted: Sequence[bool],
    *_: Any,
) -> list[Tensor]:
    inputs = zip((x, weight, bias), wanted, strict=True)
    return [torch.empty_like(tensor) for tensor, is_wanted in inputs if is_wanted and tensor is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, *declared = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.declared = declared


def _backward(ctx: Any, d_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, statistics = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        found = _by_definition(d_output, (x, weight, bias), wanted, ctx.declared)
    else:
        given = iter(
            torch.ops.normwise.normalize_gradients(d_output, x, weight, bias, statistics, list(wanted), *ctx.declared)
        )
        found = tuple(next(given) if is_wanted else None for is_wanted in wanted)
    return *found, *(None for _ in ctx.declared)


def _by_definition(
    d_output: Tensor, inputs: Inputs, wanted: tuple[bool, ...], declared: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients: those that autograd makes of the definition."""
    steps, over = _told(inputs[0], declared)

    def defined(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return four_steps(x, steps, placed(steps.recovery, _given(steps, weight, bias), over, steps.plan, x)).output

    return derivatives(defined, inputs, (d_output,), wanted)


torch.library.register_fake("normwise::normalize", _run_fakely)
torch.library.register_fake("normwise::normalize_gradients", _differentiate_fakely)
torch.library.register_autograd("normwise::normalize", _backward, setup_context=_keep)
