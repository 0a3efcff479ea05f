"""What is right: outputs, gradients and memory by the formula, in float64, on contiguous tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import silu

from normwise.bench.cases import Case
from normwise.bench.layers import EPS, groups

Found: TypeAlias = dict[str, Tensor]

# The largest error, as a part of the tensor's largest value. Float32 sums a hundred thousand products in an order of
# its own; an output in low precision is rounded once, and the layer's parameters before it.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_UPDATE = 0.1  # torch's momentum
_PIECE = 2**24  # elements that are compared at a time: float64 needs room


def truth(case: Case, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...], state: Mapping[str, Tensor]) -> Found:
    """What a case's operation must give: outputs, gradients if there is a backward, and the memory after a step.

    Args:
        case: The case.
        inputs: Its inputs, in any layout and dtype.
        gradients: Those of its outputs.
        state: The layer's parameters and memory, by name: `weight`, `bias`, `running_mean`, `running_var`.
    """
    wide = _all_wide(state)
    leaves = [_wide(x).requires_grad_(case.what.backward) for x in inputs]
    parameters = {name: wide[name].requires_grad_(case.what.backward) for name in ("weight", "bias") if name in wide}
    with torch.set_grad_enabled(case.what.backward):
        total = leaves[0] + leaves[1] if case.adds else leaves[0]
        output, memory = _recovered(case, total, wide)
        if case.operation == "batch_norm_relu":
            output = output.relu()
        elif case.gated:
            output = output * silu(leaves[1])
    outputs = (output, total) if case.adds else (output,)
    found = named_outputs(outputs) | memory
    if case.what.backward:
        wanted = [*leaves, *parameters.values()]
        found |= named_gradients(
            torch.autograd.grad(outputs, wanted, [_wide(g) for g in gradients]), tuple(parameters), case
        )
    return found


def settled(
    case: Case, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...], state: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """The outputs' gradients, but zero where a rounding decides on which side of ReLU's corner an element lies."""
    if case.operation != "batch_norm_relu":
        return gradients
    (x,), (gradient,) = inputs, gradients
    output, _ = _recovered(case, _wide(x), _all_wide(state))
    sure = output.abs() > TOLERANCES[x.dtype] * output.abs().max()
    return (torch.where(sure, gradient, 0),)


def named_outputs(outputs: tuple[Tensor, ...]) -> Found:
    """Outputs by name."""
    return {name: output.detach() for name, output in zip(("output", "sum"), outputs, strict=False)}


def named_gradients(found: tuple[Tensor, ...], parameters: tuple[str, ...], case: Case) -> Found:
    """Gradients by name, the inputs' first."""
    of = ("input", "residual" if case.adds else "gate")[: case.inputs]
    return {f"gradient of the {name}": gradient for name, gradient in zip((*of, *parameters), found, strict=True)}


def fault(found: Found, true: Found) -> str | None:
    """What is wrong, and by how much; None: nothing.

    >>> fault({"output": torch.tensor([1.0, 2.0])}, {"output": torch.tensor([1.0, 2.5]).double()})
    'the output is off by 0.2 of its largest value'
    """
    for name, expected in true.items():
        if name not in found:
            return f"there is no {name}"
        actual = found[name]
        if actual.shape != expected.shape:
            return f"the {name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        error = _error(actual, expected)
        if not error <= TOLERANCES[actual.dtype]:
            return f"the {name} is off by {error:.2g} of its largest value"
    return None


def _error(actual: Tensor, expected: Tensor) -> float:
    """The largest error as a part of the largest value; NaN if there is one."""
    both = (torch.split(tensor.reshape(-1), _PIECE) for tensor in (_dense(actual), expected))
    largest = torch.stack([(found.double() - true).abs().max() for found, true in zip(*both, strict=True)]).max()
    return float(largest / expected.abs().max().clamp_min(1e-30))


def _wide(tensor: Tensor) -> Tensor:
    return _dense(tensor).contiguous().double()


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach().to_dense() if tensor.is_mkldnn else tensor.detach()


def _all_wide(state: Mapping[str, Tensor]) -> Found:
    return {name: _wide(tensor) for name, tensor in state.items()}


def _recovered(case: Case, x: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Found]:
    """The input normalized, times gain, plus bias, and what is remembered of a training step."""
    normalized, memory = _normalized(case, x, state)
    output = normalized * _placed(state["weight"], case)
    return (output + _placed(state["bias"], case) if "bias" in state else output), memory


def _normalized(case: Case, x: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Found]:
    """The standardized input, and what is remembered of a training step."""
    if case.operation.endswith("rms_norm"):
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt(), {}
    if case.operation == "group_norm":
        parts = x.reshape(len(x), groups(case.shape[1]), -1)
        return _standardized(parts, (2,)).reshape(x.shape), {}
    if not case.operation.startswith("batch_norm"):
        return _standardized(x, _OVER[case.operation]), {}
    over = (0, *range(2, x.dim()))
    if case.what.mode == "evaluation":
        mean, variance = (_placed(state[name], case) for name in ("running_mean", "running_var"))
        return (x - mean) * (variance + EPS).rsqrt(), {}
    var, mean = torch.var_mean(x.detach(), over)
    blended = {"running_mean": mean, "running_var": var}
    return _standardized(x, over), {n: (1 - _UPDATE) * state[n] + _UPDATE * new for n, new in blended.items()}


_OVER = {"layer_norm": (-1,), "add_layer_norm": (-1,), "instance_norm": (2, 3), "layer_norm_2d": (1,)}


def _standardized(x: Tensor, over: tuple[int, ...]) -> Tensor:
    centered = x - x.mean(over, keepdim=True)
    return centered * (centered.square().mean(over, keepdim=True) + EPS).rsqrt()


def _placed(parameter: Tensor, case: Case) -> Tensor:
    """A parameter where it broadcasts: over the last dimension, or over channels, the second."""
    is_last = case.operation.endswith(("rms_norm", "layer_norm"))
    return parameter if is_last else parameter.reshape(-1, *[1] * (len(case.shape) - 2))
