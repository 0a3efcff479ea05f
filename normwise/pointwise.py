"""What a layer may do after its recovery: apply an activation, multiply by a function of a gate.

=========  ===================  ==========================================
name       f(x)                 f'(x)
=========  ===================  ==========================================
"relu"     max(x, 0)            1 where x > 0, 0 elsewhere
"silu"     x sigmoid(x)         sigmoid(x) (1 + x (1 - sigmoid(x)))
"gelu"     x Phi(x)             Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)
"sigmoid"  sigmoid(x)           sigmoid(x) (1 - sigmoid(x)); of a gate only
=========  ===================  ==========================================

with Phi(x) = (1 + erf(x / sqrt(2))) / 2: torch's exact GELU, not the one with tanh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation: TypeAlias = Literal["relu", "silu", "gelu"]
Gate: TypeAlias = Literal["relu", "silu", "gelu", "sigmoid"]


class Function(NamedTuple):
    """A function of numbers: as torch has it, its derivative times a gradient, and as a layer of torch's."""

    apply: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # from the output's gradient and x to f'(x) * gradient
    layer: type[nn.Module]


def _relu_backward(d_output: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(d_output, x, 0)  # type: ignore[no-any-return]


def _silu_backward(d_output: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(d_output, x)  # type: ignore[no-any-return]


def _gelu_backward(d_output: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(d_output, x)  # type: ignore[no-any-return]


def _sigmoid_backward(d_output: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward(d_output, torch.sigmoid(x))  # type: ignore[no-any-return]


FUNCTIONS: dict[str, Function] = {
    "relu": Function(torch.relu, _relu_backward, nn.ReLU),
    "silu": Function(F.silu, _silu_backward, nn.SiLU),
    "gelu": Function(F.gelu, _gelu_backward, nn.GELU),
}
OF_GATES: dict[str, Function] = {**FUNCTIONS, "sigmoid": Function(torch.sigmoid, _sigmoid_backward, nn.Sigmoid)}


def check_functions(activation: object, gate: object) -> None:
    """Refuse what names no activation, or no function of a gate.

    Raises:
        ValueError: with the names that there are.

    >>> check_functions("swish", None)
    Traceback (most recent call last):
    ValueError: activation is None or one of 'relu', 'silu', 'gelu', not 'swish'
    """
    for option, name, known in (("activation", activation, FUNCTIONS), ("gate", gate, OF_GATES)):
        if name is not None and not (isinstance(name, str) and name in known):
            raise ValueError(f"{option} is None or one of {', '.join(map(repr, known))}, not {name!r}")
