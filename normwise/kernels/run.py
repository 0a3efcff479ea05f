"""The four steps of a call, by the kernel that is chosen for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normwise.kernels import closed_form, operator
from normwise.kernels.backends import BackendError, requested
from normwise.kernels.cpu import CpuKernel
from normwise.kernels.gated import multiply
from normwise.kernels.geometry import is_dense
from normwise.kernels.prepare import as_read, kernel_for
from normwise.kernels.prepared import PLAIN, Given, Kernel, fits, lying, normalize_with
from normwise.kernels.reference import Result, Steps, Use, placed
from normwise.kernels.short import Ready
from normwise.kernels.short_cpu import MOST_COLUMNS, CpuReady
from normwise.plan import Over, Plan, becomes_contiguous
from normwise.transforms import being_traced, is_wrapped


def run(
    x: Tensor,
    steps: Steps,
    parameters: Sequence[Tensor | None],
    over: Over,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    remembers: bool = False,
) -> tuple[Result, Tensor | None]:
    """Normalize the input, or its sum with a residual, and multiply by the function of a gate, if there is one.

    Args:
        x: The input, of the plan's shape.
        steps: What is done to it.
        parameters: The recovery's, over the named axes; None: the values they start from.
        over: The axes.
        residual: Added first.
        gate: Of the plan's shape, where the input is, in any dtype.
        remembers: Whether the batch's moments are wanted.

    Returns:
        The result, and the sum, if there is a residual.

    Raises:
        BackendError: the compiled kernels were asked for by name, and do not take this call.
    """
    x = _in_rows(x, steps.plan)
    if residual is not None and not _resembles(residual, x):
        x = total = x + residual
        return run(x, steps, parameters, over, gate=gate, remembers=remembers)[0], total
    weight, bias = [*parameters, None, None][:2]
    use = None if steps.recalled is None else steps.recalled.use
    kernel = None if being_traced() or x.numel() == 0 else kernel_for(x, steps, over, use)
    if kernel is None or not fits(x, weight, bias, kernel) or _is_watched(steps) or _lies_elsewhere(steps, x):
        _check_request(x)
        total = x if residual is None else x + residual
        if operator.pays(total, steps):
            result = operator.normalize(total, steps, weight, bias, remembers=remembers)
        else:
            result = closed_form.run(total, steps, placed(steps.recovery, parameters, over, steps.plan, x))
        return _multiplied(result, gate, steps), None if residual is None else total
    x = as_read(x, x)
    residual = None if residual is None else as_read(residual, x)
    given = Given(residual is not None, steps.valid, steps.recalled, remembers)
    if gate is not None and kernel.multiplies and type(gate) in PLAIN and not is_wrapped(gate):
        given, gate = given._replace(gate=lying(gate, x.stride(), gate.dtype)), None
    output, total, moments = normalize_with(kernel, given, x, residual, weight, bias)  # type: ignore[assignment]
    return _multiplied(Result(output, moments, None), gate, steps), total


def _multiplied(result: Result, gate: Tensor | None, steps: Steps) -> Result:
    """The output times the function of a gate, if there is one."""
    return result if gate is None else result._replace(output=multiply(result.output, gate, steps))


def _in_rows(x: Tensor, plan: Plan) -> Tensor:
    """The input, or its contiguous copy: whatever is computed lies as what it is computed from."""
    if x.layout is torch.strided and not x.is_contiguous() and becomes_contiguous(plan, x.stride()):
        return x.contiguous()
    return x


def _resembles(residual: Tensor, x: Tensor) -> bool:
    """Whether a kernel may add a residual itself."""
    return residual.dtype == x.dtype and residual.device == x.device and type(residual) is type(x)


def _check_request(x: Tensor) -> None:
    """Refuse to fall back where a backend was asked for by name; whoever traces a call gets plain operations anyway."""
    if requested() in ("cpu", "triton") and not being_traced() and x.numel() > 0:
        raise BackendError(
            f"NORMWISE_BACKEND={requested()!r}: none of its kernels takes this call; norm.explain(x) says why"
        )


def ready_for(x: Tensor, steps: Steps, over: Over, use: Use | None, remembered: Over | None) -> Ready | None:
    """What the short way needs to know of a call that went well so far, if it can be taken.

    Args:
        x: The input.
        steps: What is done to it, without a mask.
        over: The axes of the recovery's parameters.
        use: What remembered statistics are for.
        remembered: The axes of the memory, which must number the columns as the kernel does; None: there is none.
    """
    given, x = x, _in_rows(x, steps.plan)
    if x.numel() == 0 or not is_dense(x.shape, x.stride()):
        return None
    kernel = kernel_for(x, steps, over, use)
    if kernel is None or not (remembered is None or _in_order(kernel, remembered)):
        return None
    if not isinstance(kernel, CpuKernel):
        from normwise.kernels.gpu.short import MOST_COLUMNS as MOST_ON_GPU
        from normwise.kernels.gpu.short import GpuReady

        if kernel.columns > MOST_ON_GPU:
            return None
        return GpuReady(kernel, x.stride(), use, has_memory=remembered is not None, is_copied=x is not given)
    if kernel.columns > MOST_COLUMNS:
        return None
    return CpuReady(kernel, x.stride(), use, has_memory=remembered is not None, is_copied=x is not given)


def _in_order(kernel: Kernel, over: Over) -> bool:
    """Whether a memory over the named axes has one place for each column, in the kernel's order."""
    plan = kernel.steps.plan
    remembered = [plan.names.index(name) for dim in over for name in dim]
    return [dim for dim in remembered if plan.view[dim] != 1] == [
        dim for dim in kernel.geometry.kept if plan.view[dim] != 1
    ]


def _is_watched(steps: Steps) -> bool:
    """Whether remembered statistics want a gradient, which no kernel gives."""
    return steps.recalled is not None and any(statistic.requires_grad for statistic in steps.recalled.statistics)


def _lies_elsewhere(steps: Steps, x: Tensor) -> bool:
    """Whether a mask or remembered statistics have no address that a kernel may read."""
    tensors = [*(steps.recalled.statistics if steps.recalled else ()), *(() if steps.valid is None else (steps.valid,))]
    return not all(type(tensor) in PLAIN and tensor.device == x.device for tensor in tensors)
