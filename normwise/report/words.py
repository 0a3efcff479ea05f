"""Numbers as a reader sees them: three digits, a unit, and a dash where there is none."""

from __future__ import annotations

import math

from normwise.tuning.records import Edge, NormSummary, Settings

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
_NBSP = "\N{NO-BREAK SPACE}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 3) -> str:
    """A number to `digits` significant digits, or all before the point; powers of ten outside 0.0001 to 99999.

    >>> number(0.03125), number(4.0), number(1.5e-7), number(-2.5), number(None)
    ('0.0312', '4', '1.5 × 10⁻⁷', '−2.5', '–')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if -4 <= power <= 4:
        return _signed(_trim(f"{value:.{max(digits - 1 - power, 0)}f}"))
    return f"{_signed(_trim(mantissa))} {TIMES} 10{str(power).translate(_SUPERSCRIPTS)}"


def score(value: float | None, unit: str) -> str:
    """A score without its unit: percent to two decimals, everything else to four digits.

    >>> score(92.3, "%"), score(0.123456, ""), score(None, "%")
    ('92.30', '0.1235', '–')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    return _signed(f"{value:.2f}") if unit == "%" else number(value, 4)


def interval(low: float | None, high: float | None, unit: str) -> str:
    r"""The two ends in brackets; nothing where an end is missing.

    >>> interval(91.8, 92.75, "%"), interval(None, None, "%")
    ('[91.80,\xa092.75]', '')
    """
    return "" if low is None or high is None else f"[{score(low, unit)},{_NBSP}{score(high, unit)}]"


def with_unit(text: str, unit: str) -> str:
    r"""The text and its unit, if there is one, never parted at the end of a line.

    >>> with_unit("92.30", "%"), with_unit("4", "")
    ('92.30\xa0%', '4')
    """
    return f"{text}{_NBSP}{unit}" if unit and text != MISSING else text


def measured(norm: NormSummary, unit: str) -> str:
    """A normalization's mean score with its unit and its own interval."""
    return " ".join(filter(None, (with_unit(score(norm.mean, unit), unit), interval(norm.low, norm.high, unit))))


def edge(value: Edge | None, beyond: str, absent: str = MISSING) -> str:
    """A learning rate read from several seeds: geometric mean and range, or how far it was looked for.

    >>> edge(Edge(4.0, 2.8, 5.7, seeds=3), "none up to"), edge(Edge(8.0, 8.0, 8.0, seeds=3, censored=3), "none up to")
    ('4 (2.8 to 5.7)', 'none up to 8')
    >>> edge(Edge(6.3, 4.0, 8.0, seeds=3, censored=1), "none up to")
    'at least 6.3 (4 to 8; 1 of 3 seeds beyond)'
    """
    if value is None or value.mean is None:
        return absent
    if value.censored == value.seeds:
        return f"{beyond} {number(value.high)}"
    low, high = number(value.low), number(value.high)
    spread = [f"{low} to {high}"] if low != high else []
    if value.censored:
        return f"at least {number(value.mean)} ({'; '.join([*spread, _beyond(value)])})"
    return f"{number(value.mean)} ({spread[0]})" if spread else number(value.mean)


def plural(count: int, noun: str) -> str:
    """A count and its noun.

    >>> plural(1, "seed"), plural(10, "seed")
    ('1 seed', '10 seeds')
    """
    return f"{count} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(items: list[str]) -> str:
    """Words joined as in a sentence.

    >>> listed(["batch"]), listed(["batch", "layer", "none"])
    ('batch', 'batch, layer and none')
    """
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def duration(seconds: float) -> str:
    r"""Seconds as a person says them.

    >>> duration(8.24), duration(192.0), duration(7320.0)
    ('8.2\xa0s', '3\xa0min 12\xa0s', '2\xa0h 2\xa0min')
    """
    if seconds < 60:
        return with_unit(f"{seconds:.1f}", "s")
    minutes, rest = divmod(round(seconds), 60)
    parts = ((minutes, "min"), (rest, "s")) if minutes < 60 else ((minutes // 60, "h"), (minutes % 60, "min"))
    return " ".join(with_unit(str(count), unit) for count, unit in parts)


def difference_unit(settings: Settings) -> str:
    """The unit of a difference of two scores: percent differ by points."""
    return "points" if settings.unit == "%" else settings.unit


def loss_unit(settings: Settings) -> str:
    """The unit of the loss, as far as it is known."""
    return "nats" if settings.loss == "cross_entropy" and not settings.own_loop else ""


def metric_name(settings: Settings) -> str:
    """The metric with a capital, as an axis carries it."""
    name = settings.metric.replace("_", " ")
    return name[:1].upper() + name[1:]


def _beyond(value: Edge) -> str:
    return f"{value.censored} of {plural(value.seeds, 'seed')} beyond"


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def _signed(text: str) -> str:
    return text.replace("-", MINUS)
