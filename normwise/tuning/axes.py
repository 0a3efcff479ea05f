"""What may vary in a study besides normalization and learning rate: how its values are read, and their combinations.

Every axis is a nuisance, as the learning rate is: each normalization is judged at its own best combination.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from numbers import Integral
from typing import Any

from normwise.errors import StudyError
from normwise.tuning.records import Settings, Value, Variant

AXES = ("batch_size", "optimizer", "start", "placement", "weight_decay", "epochs")
OPTIMIZERS = ("sgd", "momentum", "adamw")
STARTS = ("default", "he", "orthogonal")
_LEAST = {"batch_size": 2, "epochs": 1}
_KNOWN = {"optimizer": OPTIMIZERS, "start": STARTS}


def values(name: str, given: Any) -> tuple[Value, ...]:
    """The values of an axis, each once: one value, a sequence, or text with commas; none of None.

    Raises StudyError that names the option and the value that cannot be one.

    >>> values("batch_size", "8,32"), values("weight_decay", (0, 1e-4)), values("start", None)
    ((8, 32), (0.0, 0.0001), ())
    """
    if given is None:
        return ()
    several = given.split(",") if isinstance(given, str) else given if isinstance(given, Iterable) else (given,)
    read = tuple(dict.fromkeys(_value(name, part) for part in several))
    if not read:
        raise StudyError(f"{option(name)} has no value: leave it out, or give one or more")
    return read


def plain(name: str, given: Any) -> Any:
    """What was given as Python has it: None, one value, or a tuple of several.

    >>> plain("epochs", "2"), plain("epochs", [2, 5])
    (2, (2, 5))
    """
    read = values(name, given)
    return (read[0] if len(read) == 1 else read) if read else None


def variants(settings: Settings) -> tuple[Variant, ...]:
    """Every combination of the axes' values, the last axis running fastest; () alone where nothing varies.

    >>> variants(Settings("mlp", "digits", (), axes=(("batch_size", (8, 32)), ("optimizer", ("sgd",)))))
    ((('batch_size', 8), ('optimizer', 'sgd')), (('batch_size', 32), ('optimizer', 'sgd')))
    """
    names = [name for name, _ in settings.axes]
    return tuple(tuple(zip(names, row, strict=True)) for row in product(*(own for _, own in settings.axes)))


def variant_text(variant: Variant) -> str:
    """A combination in words; empty where nothing varies.

    >>> variant_text((("batch_size", 8), ("weight_decay", 1e-4)))
    'batch size 8, weight decay 0.0001'
    """
    return ", ".join(f"{name.replace('_', ' ')} {value_text(value)}" for name, value in variant)


def value_text(value: Value) -> str:
    """One value of an axis.

    >>> value_text(1e-4), value_text(0.0), value_text("sgd")
    ('0.0001', '0', 'sgd')
    """
    return f"{value:g}" if isinstance(value, float) else str(value)


def option(name: str) -> str:
    """An axis as the command line writes it.

    >>> option("batch_size")
    'batch-size'
    """
    return name.replace("_", "-")


def whole(name: str, value: Any, least: int) -> int:
    """The value, if it is a whole number that is large enough. Raises StudyError that names it otherwise."""
    if not isinstance(value, int) or value < least:
        raise StudyError(f"{name}={value}: must be a whole number from {least}")
    return value


def known(what: str, name: str, names: Sequence[str]) -> str:
    """The name, if there is one such. Raises StudyError with all names and the closest otherwise."""
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise StudyError(f"no {what} named {name!r}; there are {', '.join(names)}{hint}")
    return name


def fixed(read: Mapping[str, tuple[Value, ...]]) -> dict[str, Any]:
    """The settings that the axes' values make: the first value of each, and `axes` where there are several.

    >>> fixed({"batch_size": (8, 32), "optimizer": ("sgd",), "start": ()})
    {'batch_size': 8, 'optimizer': 'sgd', 'axes': (('batch_size', (8, 32)),)}
    """
    several = tuple((name, own) for name, own in read.items() if len(own) > 1)
    return {**{name: own[0] for name, own in read.items() if own}, "axes": several}


def _value(name: str, part: Any) -> Value:
    part = part.strip() if isinstance(part, str) else part
    if name in _LEAST:
        number = int(part) if isinstance(part, Integral) or (isinstance(part, str) and part.isdecimal()) else part
        return whole(option(name), number, _LEAST[name])
    if name == "weight_decay":
        return _decay(part)
    return known(name, part, _KNOWN[name]) if name in _KNOWN else str(part)


def _decay(part: Any) -> float:
    try:
        decay = float(part)
    except ValueError:
        decay = math.nan
    if not (math.isfinite(decay) and decay >= 0):
        raise StudyError(f"weight-decay={part}: must be a number from 0")
    return decay
