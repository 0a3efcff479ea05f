"""Step 3, recover: give expressiveness back with learnable values over named axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor


class Recovery(Protocol):
    """What `Norm` asks of a recovery; any frozen dataclass with these members can be declared."""

    parameters: ClassVar[dict[str, float]]  # name -> the value it starts from

    @property
    def over(self) -> str:
        """The named axes of its parameters: "c", "h w", or "(g k)" for one flat axis."""
        ...

    def recover(self, normalized: Tensor, *parameters: Tensor | float) -> Tensor:
        """Apply the parameters, in the order of `parameters`, shaped to broadcast."""
        ...

    def formula(self) -> str:
        """One line for a reader."""
        ...


@dataclass(frozen=True)
class Affine:
    """weight * x + bias, one weight (from 1) and one bias (from 0) for each element of the named axes.

    Args:
        over: The axes, in the order of the parameter's dimensions: "c", "h w", or "(g k)" for one flat axis.
    """

    parameters: ClassVar[dict[str, float]] = {"weight": 1.0, "bias": 0.0}

    over: str

    def recover(self, normalized: Tensor, *parameters: Tensor | float) -> Tensor:
        """Weight * x + bias."""
        weight, bias = parameters
        return normalized * weight + bias

    def formula(self) -> str:
        """The formula."""
        return "weight * x + bias"


@dataclass(frozen=True)
class Scale:
    """weight * x, one weight (from 1) for each element of the named axes; no bias.

    Args:
        over: The axes, as for `Affine`.
    """

    parameters: ClassVar[dict[str, float]] = {"weight": 1.0}

    over: str

    def recover(self, normalized: Tensor, *parameters: Tensor | float) -> Tensor:
        """Weight * x."""
        (weight,) = parameters
        return normalized * weight

    def formula(self) -> str:
        """The formula."""
        return "weight * x"


@dataclass(frozen=True)
class OffsetScale:
    """(1 + weight) * x, one weight (from 0) for each element of the named axes, so that weight decay draws it to 1.

    Also called a zero-centered gain, or a scale with unit offset.

    Args:
        over: The axes, as for `Affine`.
    """

    parameters: ClassVar[dict[str, float]] = {"weight": 0.0}

    over: str

    def recover(self, normalized: Tensor, *parameters: Tensor | float) -> Tensor:
        """(1 + weight) * x."""
        (weight,) = parameters
        return normalized * (1 + weight)

    def formula(self) -> str:
        """The formula."""
        return "(1 + weight) * x"
