"""What a layer remembers of past batches, and the one place where memory changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Memory(Protocol):
    """What `Norm` asks of a memory."""

    updates: ClassVar[bool]  # whether training batches enter it; if not, it is used in training as well

    @property
    def over(self) -> str:
        """The kept axes it remembers, as in a recovery; kept axes that are not named are averaged."""
        ...

    @property
    def unbiased(self) -> bool:
        """Whether the variance that enters is the unbiased one."""
        ...

    @property
    def update_rate(self) -> float | None:
        """The weight of the new batch; None: one over the number of batches."""
        ...

    def formula(self) -> str:
        """One line for a reader."""
        ...


@dataclass(frozen=True, init=False)
class Moving:
    """A moving average: moving = decay * moving + update_rate * batch, decay + update_rate = 1.

    Args:
        over: The kept axes it remembers, for example "c" or "t c".
        decay: The weight of the old value (Keras' and the textbooks' momentum).
        update_rate: The weight of the new value (torch's momentum). Give one of the two.
        unbiased: Whether the variance that enters is divided by the number of samples less one, as torch does.

    Raises:
        ValueError: both weights are given, or none, or one outside of [0, 1].

    >>> Moving("c", decay=0.9) == Moving("c", update_rate=0.1)
    True
    >>> Moving("c", decay=0.99).formula()
    'moving = 0.99 * moving + 0.01 * batch, unbiased variance'
    """

    updates: ClassVar[bool] = True

    over: str
    update_rate: float
    unbiased: bool

    def __init__(
        self, over: str, *, decay: float | None = None, update_rate: float | None = None, unbiased: bool = True
    ) -> None:
        if (decay is None) == (update_rate is None):
            raise ValueError(
                "give decay= (the weight of the old value) or update_rate= (of the new one), and not both: "
                f"decay={decay}, update_rate={update_rate}"
            )
        name, value = ("decay", decay) if update_rate is None else ("update_rate", update_rate)
        if value is None or not 0 <= value <= 1:
            raise ValueError(f"{name} is a weight between 0 and 1, not {value}")
        object.__setattr__(self, "over", over)
        object.__setattr__(self, "update_rate", _complement(value) if update_rate is None else float(value))
        object.__setattr__(self, "unbiased", unbiased)

    @property
    def decay(self) -> float:
        """The weight of the old value."""
        return _complement(self.update_rate)

    def formula(self) -> str:
        """The formula with its numbers."""
        return f"moving = {self.decay} * moving + {self.update_rate} * batch, {_named(self.unbiased)} variance"


@dataclass(frozen=True)
class Average:
    """The average over all batches since the last reset, each with equal weight (torch's `momentum=None`).

    Means and variances are averaged separately, as torch does; this is not the variance of the batches joined.

    Args:
        over: The kept axes it remembers, for example "c".
        unbiased: Whether the variance that enters is divided by the number of samples less one, as torch does.
    """

    updates: ClassVar[bool] = True

    over: str
    unbiased: bool = True

    @property
    def update_rate(self) -> None:
        """One over the number of batches."""
        return

    def formula(self) -> str:
        """The formula."""
        return f"average of all batches, {_named(self.unbiased)} variance"


@dataclass(frozen=True)
class Frozen:
    """Statistics that never change: from a checkpoint, or mean 0 and variance 1. Used in training as in evaluation.

    Args:
        over: The kept axes it remembers, for example "c".
    """

    updates: ClassVar[bool] = False

    over: str

    @property
    def unbiased(self) -> bool:
        """Nothing enters; what is there was decided by whoever measured it."""
        return True

    @property
    def update_rate(self) -> float:
        """Nothing enters."""
        return 0.0

    def formula(self) -> str:
        """The formula."""
        return "frozen: never updated, used in training too"


@torch.no_grad()
def commit(memory: Memory, kept: Sequence[Tensor], batch: Sequence[Tensor], batches: Tensor | None) -> None:
    """Let one batch's statistics enter the buffers `kept`, in place; `batches` counts them, if anybody does.

    A batch with a statistic that is not finite does not enter: the buffers stay as they were, bit for bit.

    Raises:
        ValueError: an average of all batches that nobody counts.
    """
    finite = torch.cat([statistic.reshape(-1) for statistic in batch]).isfinite().all()
    for old, new in zip(kept, batch, strict=True):
        entering = torch.where(finite, new.to(old.dtype), old)
        old.lerp_(entering, _rate(memory, batches, old.dtype))
    if batches is not None:
        batches.add_(finite)


def _rate(memory: Memory, batches: Tensor | None, dtype: torch.dtype) -> Tensor | float:
    if memory.update_rate is not None:
        return memory.update_rate
    if batches is None:
        raise ValueError(f"{memory} needs to know the number of batches, and nobody counts them")
    return (batches + 1).to(dtype).reciprocal()


def _complement(weight: float) -> float:
    """1 - weight as a person writes it: 0.9 gives 0.1, not 0.09999999999999998."""
    return float(1 - Decimal(repr(float(weight))))


def _named(unbiased: bool) -> str:
    return "unbiased" if unbiased else "biased"
