"""What a layer remembers of past batches, as declared. `commit.py` does the remembering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

NonFinite: TypeAlias = Literal["skip", "raise", "keep"]
Degenerate: TypeAlias = Literal["raise", "memory"]
Beyond: TypeAlias = Literal["last", "pooled", "raise"]


@dataclass(frozen=True)
class Renorm:
    """Batch renormalization: in training, what this batch's statistics make is corrected towards the memory's.

    x^ = (x - mean) / sigma * r + d, r = sigma / sigma_memory in [1 / r_max, r_max], d = (mean - mean_memory) /
    sigma_memory in [-d_max, d_max]; r and d are constants to the gradient. Where neither limit is reached, training
    computes exactly what evaluation does. For `warmup` batches both limits stay shut (r = 1, d = 0: batch
    normalization); then they open linearly, r over `r_ramp` batches and d over `d_ramp`.

    Args:
        r_max: The largest correction of the scale, from 1 on.
        d_max: The largest correction of the mean, in standard deviations, from 0 on.
        warmup: Batches of plain batch normalization.
        r_ramp: Batches from then on until r's limit is open; 0: at once.
        d_ramp: Batches from then on until d's limit is open; 0: at once.

    Raises:
        ValueError: a limit or a number of batches out of range.

    Source: Ioffe, "Batch Renormalization", arXiv:1702.03275, whose limits and schedule are the defaults. The paper
    averages sigma, here the variance is averaged, as in `Moving`.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 5000
    r_ramp: int = 35000
    d_ramp: int = 20000

    def __post_init__(self) -> None:
        if not 1 <= self.r_max < float("inf"):
            raise ValueError(f"r_max is a finite number from 1 on, not {self.r_max}")
        if not 0 <= self.d_max < float("inf"):
            raise ValueError(f"d_max is a finite number from 0 on, not {self.d_max}")
        for name in ("warmup", "r_ramp", "d_ramp"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is a number of batches, from 0 on, not {getattr(self, name)}")


def limits(renorm: Renorm, batches: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """r_max and d_max after so many batches (a tensor of counts, of which the largest decides)."""
    since = batches.max().to(dtype) - renorm.warmup

    def opened(ramp: int) -> Tensor:
        return (since / ramp).clamp(0, 1) if ramp else (since >= 0).to(dtype)

    return 1 + (renorm.r_max - 1) * opened(renorm.r_ramp), renorm.d_max * opened(renorm.d_ramp)


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

    @property
    def nonfinite(self) -> NonFinite:
        """What becomes of a batch whose statistics are not finite."""
        ...

    @property
    def degenerate(self) -> Degenerate:
        """What becomes of a column with too few samples for a variance."""
        ...

    @property
    def elastic(self) -> str | None:
        """The remembered axis whose length may differ from call to call."""
        ...

    @property
    def past_end(self) -> Beyond:
        """What stands in for places of the elastic axis that were never remembered."""
        ...

    @property
    def ghost(self) -> int | None:
        """The size of the sub-batches that are normalized each by itself in training."""
        ...

    @property
    def renorm(self) -> Renorm | None:
        """The correction of a training batch towards the memory."""
        ...

    def formula(self) -> str:
        """One line for a reader."""
        ...


def falls_back(memory: Memory) -> bool:
    """Whether the memory stands in for columns that a mask leaves too few samples."""
    return memory.degenerate == "memory" or (memory.elastic is not None and memory.past_end != "raise")


class _Declared:
    """What the memories share: options that are checked, and a repr that leaves out what is as by default."""

    over: str
    beyond: tuple[tuple[str, Beyond], ...]

    @property
    def elastic(self) -> str | None:
        """The remembered axis whose length may differ from call to call."""
        return self.beyond[0][0] if self.beyond else None

    @property
    def past_end(self) -> Beyond:
        """What stands in for places of the elastic axis that were never remembered."""
        return self.beyond[0][1] if self.beyond else "raise"

    def __repr__(self) -> str:
        shown = [f"{self.over!r}"]
        for field in fields(self)[1:]:  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if field.name == "beyond" and value:
                shown.append(f"beyond={dict(value)!r}")
            elif value != field.default and field.name != "beyond":
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _notes(self) -> str:
        notes = [f"; beyond {name}: {word}" for name, word in self.beyond]
        policies = [name for name in ("nonfinite", "degenerate") if name in self.__dict__]
        changed = [name for name in policies if getattr(self, name) != getattr(type(self), name)]
        return "".join([*notes, *(f"; {name}: {getattr(self, name)}" for name in changed)])

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, init=False, repr=False)
class Moving(_Declared):
    """A moving average: moving = decay * moving + update_rate * batch, decay + update_rate = 1.

    Args:
        over: The kept axes it remembers, for example "c" or "t c".
        decay: The weight of the old value (Keras' and the textbooks' momentum).
        update_rate: The weight of the new value (torch's momentum). Give one of the two.
        unbiased: Whether the variance that enters is divided by the number of samples less one, as torch does.
        nonfinite: What becomes of a batch whose statistics are not finite: "skip" (it does not enter, is counted in
            `skipped_batches` and warned of once), "raise" (NonFiniteError; nothing enters) or "keep" (it enters).
        degenerate: What becomes of a training batch with one sample a column: "raise" (TooFewSamplesError) or
            "memory" (the layer computes what it would in evaluation, and nothing enters). Where only a mask leaves too
            few samples nothing is raised: the memory is used if that is declared, otherwise the values are 0.
        beyond: For one remembered axis, such as time, whose length may differ from call to call: what stands in for
            places that were never remembered: `{"t": "last"}` (the last one before that was), `{"t": "pooled"}` (all
            that were, joined) or `{"t": "raise"}`. The first two also declare the memory for places that a mask
            leaves too few samples. The memory grows with the longest batch in training; an axis size, `t=512`,
            declares its length instead, and later places are then never remembered.
        ghost: In training, normalize sub-batches of at most this many examples each by itself, and let each enter.
        renorm: Correct training batches towards the memory: batch renormalization.

    Raises:
        ValueError: both weights are given, or none, or one outside of [0, 1]; an option that is not one of its words.

    Source of ghost batches: Hoffer, Hubara, Soudry, "Train longer, generalize better", arXiv:1705.08741.

    >>> Moving("c", decay=0.9) == Moving("c", update_rate=0.1)
    True
    >>> Moving("c", decay=0.99).formula()
    'moving = 0.99 * moving + 0.01 * batch, unbiased variance'
    """

    updates: ClassVar[bool] = True

    over: str
    update_rate: float
    unbiased: bool = True
    nonfinite: NonFinite = "skip"
    degenerate: Degenerate = "raise"
    beyond: tuple[tuple[str, Beyond], ...] = ()
    ghost: int | None = None
    renorm: Renorm | None = None

    def __init__(
        self,
        over: str,
        *,
        decay: float | None = None,
        update_rate: float | None = None,
        unbiased: bool = True,
        nonfinite: NonFinite = "skip",
        degenerate: Degenerate = "raise",
        beyond: Mapping[str, Beyond] | None = None,
        ghost: int | None = None,
        renorm: Renorm | None = None,
    ) -> None:
        if (decay is None) == (update_rate is None):
            raise ValueError(
                "give decay= (the weight of the old value) or update_rate= (of the new one), and not both: "
                f"decay={decay}, update_rate={update_rate}"
            )
        name, value = ("decay", decay) if update_rate is None else ("update_rate", update_rate)
        if value is None or not 0 <= value <= 1:
            raise ValueError(f"{name} is a weight between 0 and 1, not {value}")
        rate = _complement(value) if update_rate is None else float(value)
        _check_policies(nonfinite, degenerate, ghost)
        if renorm is not None and not isinstance(renorm, Renorm):
            raise TypeError(f"renorm is a Renorm(...), not {renorm!r}")
        self._set(over=over, update_rate=rate, unbiased=unbiased, nonfinite=nonfinite, degenerate=degenerate)
        self._set(beyond=_checked_beyond(beyond), ghost=ghost, renorm=renorm)

    @property
    def decay(self) -> float:
        """The weight of the old value."""
        return _complement(self.update_rate)

    def formula(self) -> str:
        """The formula with its numbers."""
        moving = f"moving = {self.decay} * moving + {self.update_rate} * batch, {_named(self.unbiased)} variance"
        corrected = f"; corrected, r <= {self.renorm.r_max}, d <= {self.renorm.d_max}" if self.renorm else ""
        return moving + self._notes() + _divided(self.ghost) + corrected


@dataclass(frozen=True, init=False, repr=False)
class Average(_Declared):
    """The average over all batches since the last reset, each with equal weight (torch's `momentum=None`).

    Means and variances are averaged separately, as torch does; this is not the variance of the batches joined.

    Args:
        over: The kept axes it remembers, for example "c".
        unbiased: Whether the variance that enters is divided by the number of samples less one, as torch does.
        nonfinite: As in `Moving`.
        degenerate: As in `Moving`.
        beyond: As in `Moving`.
        ghost: As in `Moving`.

    Raises:
        ValueError: an option that is not one of its words.
    """

    updates: ClassVar[bool] = True
    renorm: ClassVar[None] = None

    over: str
    unbiased: bool = True
    nonfinite: NonFinite = "skip"
    degenerate: Degenerate = "raise"
    beyond: tuple[tuple[str, Beyond], ...] = ()
    ghost: int | None = None

    def __init__(
        self,
        over: str,
        unbiased: bool = True,
        *,
        nonfinite: NonFinite = "skip",
        degenerate: Degenerate = "raise",
        beyond: Mapping[str, Beyond] | None = None,
        ghost: int | None = None,
    ) -> None:
        _check_policies(nonfinite, degenerate, ghost)
        self._set(over=over, unbiased=unbiased, nonfinite=nonfinite, degenerate=degenerate)
        self._set(beyond=_checked_beyond(beyond), ghost=ghost)

    @property
    def update_rate(self) -> None:
        """One over the number of batches."""
        return

    def formula(self) -> str:
        """The formula."""
        return f"average of all batches, {_named(self.unbiased)} variance{self._notes()}{_divided(self.ghost)}"


@dataclass(frozen=True, init=False, repr=False)
class Frozen(_Declared):
    """Statistics that never change: from a checkpoint, or mean 0 and variance 1. Used in training as in evaluation.

    Args:
        over: The kept axes it remembers, for example "c".
        beyond: As in `Moving`.
    """

    updates: ClassVar[bool] = False
    unbiased: ClassVar[bool] = True  # nothing enters; what is there was decided by whoever measured it
    update_rate: ClassVar[float] = 0.0
    nonfinite: ClassVar[NonFinite] = "skip"
    degenerate: ClassVar[Degenerate] = "memory"
    ghost: ClassVar[None] = None
    renorm: ClassVar[None] = None

    over: str
    beyond: tuple[tuple[str, Beyond], ...] = ()

    def __init__(self, over: str, *, beyond: Mapping[str, Beyond] | None = None) -> None:
        self._set(over=over, beyond=_checked_beyond(beyond))

    def formula(self) -> str:
        """The formula."""
        return f"frozen: never updated, used in training too{self._notes()}"


def _check_policies(nonfinite: str, degenerate: str, ghost: int | None) -> None:
    _check_word("nonfinite", nonfinite, get_args(NonFinite))
    _check_word("degenerate", degenerate, get_args(Degenerate))
    if ghost is not None and (isinstance(ghost, bool) or not isinstance(ghost, int) or ghost < 2):
        raise ValueError(f"ghost is a number of examples, from 2 on, not {ghost!r}")


def _checked_beyond(beyond: Mapping[str, Beyond] | None) -> tuple[tuple[str, Beyond], ...]:
    pairs = tuple(dict(beyond or {}).items())
    if len(pairs) > 1:
        raise ValueError(f"beyond names one axis, not {len(pairs)}: {', '.join(name for name, _ in pairs)}")
    for name, word in pairs:
        _check_word(f"beyond of axis '{name}'", word, get_args(Beyond))
    return pairs


def _check_word(what: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise ValueError(f"{what} is one of {', '.join(repr(known) for known in words)}, not {word!r}")


def _divided(ghost: int | None) -> str:
    return f"; sub-batches of {ghost}" if ghost else ""


def _complement(weight: float) -> float:
    """1 - weight as a person writes it: 0.9 gives 0.1, not 0.09999999999999998."""
    return float(1 - Decimal(repr(float(weight))))


def _named(unbiased: bool) -> str:
    return "unbiased" if unbiased else "biased"
