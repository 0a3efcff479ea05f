"""Which normalization to use, judged from the scores of the confirmation seeds.

Two statements are made, each with its own 95 % guarantee, conditional on the data's split and on the rates chosen:

- **Every pair** has an interval, and all intervals hold at once: Games-Howell, the studentized range over Welch's
  standard error, which allows for unequal variances (Games and Howell 1976).
- **The headline**, "the winner beats every other by more than the margin", is one claim, true only if all its parts
  are: an intersection-union test (Berger 1982). It needs no correction for the number of pairs, only for the winner
  having been picked by its scores (Gutmann and Maymin 1987; Hung and Fithian 2019).

A pair is *better* when its lower bound lies beyond the margin, *equivalent* when its interval lies inside twice the
margin, *undecided* otherwise. Undecided is never a tie: it says about how many more seeds would decide.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations as pairs_of
from statistics import fmean, variance
from typing import Any, Protocol

from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit
from scipy.stats import studentized_range

from normwise.errors import StudyError
from normwise.tuning.records import Comparison, Direction, Verdict
from normwise.tuning.sentence import MOST_MORE_SEEDS, Kind, Wording

# The degrees of freedom of the classical tables. Between them the quantile's logarithm is nearly linear in 1/df.
TABLE = (*range(1, 21), 24, 30, 40, 60, 120, 1_000_000)

NOTHING = "No normalization can be recommended: every trial of the learning-rate search diverged."

Simplicity = Callable[[str], Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """The scores of one normalization, condensed and oriented: a higher mean is better."""

    mean: float
    variance: float  # unbiased; infinite for a single score, which shows no spread
    count: int


@dataclass(frozen=True)
class Entry:
    """A normalization in the contest: all its seeds, and those that did not fail."""

    label: str
    whole: Sample
    trained: Sample


@dataclass(frozen=True)
class Rules:
    """What a pair is judged by."""

    margin: float
    confidence: float
    groups: int


def judge(
    scores: Mapping[str, Sequence[float]],
    *,
    direction: Direction,
    margin: float,
    unit: str = "%",
    confidence: float = 0.95,
    simplicity: Simplicity | None = None,
    rates: Mapping[str, float] | None = None,
    combinations: Mapping[str, str] | None = None,
    trained: Mapping[str, Sequence[float]] | None = None,
) -> Verdict:
    """Compare every pair of normalizations and say which to use.

    `scores` are independent scores by label, one a seed. `margin` is the smallest difference that matters, in the
    scores' unit. `simplicity` gives each label a key: of the winner's equivalents the one with the smallest is
    recommended (default: the order given). `rates`, the learning rates, and `combinations`, the other axes' values in
    words, are only quoted in the sentence. Without any scores the winner is the empty string.

    `trained` are the scores of the seeds that did not fail, where some did. What is better than the others of a rival's
    seeds is better than all of them, so a pair's lower bound may leave out the failures of the one behind: a single
    one among ten would widen the interval until nothing could be said.

    Raises StudyError for a label without scores, a score that is not finite, and a negative margin.

    >>> verdict = judge({"batch": [97.1, 97.3, 96.9], "none": [90.2, 91.0, 90.4]}, direction="max", margin=0.5)
    >>> verdict.winner, verdict.kind
    ('batch', 'better')
    """
    _check(scores, margin)
    if not scores:
        return Verdict("", None, "", "undecided", NOTHING, ())
    order = ranked(scores, direction)
    entries = [_entry(label, scores[label], (trained or {}).get(label), direction) for label in order]
    rules = Rules(margin, confidence, len(order))
    means = {label: fmean(scores[label]) for label in order}
    wording = Wording(unit, margin, means, rates or {}, confidence, combinations or {})
    return _verdict(_comparisons(entries, rules), entries, simplicity, wording)


def ranked(scores: Mapping[str, Sequence[float]], direction: Direction) -> tuple[str, ...]:
    """The labels, best mean first; equal means keep their order.

    >>> ranked({"a": [1.0, 2.0], "b": [3.0]}, "max"), ranked({"a": [1.0, 2.0], "b": [3.0]}, "min")
    (('b', 'a'), ('a', 'b'))
    """
    sign = 1.0 if direction == "min" else -1.0
    return tuple(sorted(scores, key=lambda label: sign * fmean(scores[label])))


def quantile(confidence: float, groups: int, df: float) -> float:
    """The studentized range's quantile, interpolated in 1/df between the rows of the classical table.

    Right to 0.12 % from three degrees of freedom; below, too wide by at most 0.5 %, and by 3 % below two.

    SciPy takes a twentieth of a second a value, and a study needs hundreds; the rows are few and kept.

    >>> round(quantile(0.95, 5, 18), 3), round(quantile(0.95, 2, 18) / 2**0.5, 3)  # the latter is Student's t
    (4.276, 2.101)
    """
    at = bisect_left(TABLE, min(max(df, TABLE[0]), TABLE[-1]))
    high = TABLE[at]
    if df >= high or at == 0:
        return _table_quantile(confidence, groups, high)
    low = TABLE[at - 1]
    weight = (1 / df - 1 / high) / (1 / low - 1 / high)
    below, above = _table_quantile(confidence, groups, low), _table_quantile(confidence, groups, high)
    return float(above * (below / above) ** weight)


@lru_cache(maxsize=4096)
def _table_quantile(confidence: float, groups: int, df: int) -> float:
    return float(studentized_range.ppf(confidence, groups, df))


# Intervals


class Width(Protocol):
    """How far a bound lies from the difference of two samples, with `more` seeds each."""

    def __call__(self, a: Sample, b: Sample, rules: Rules, more: int = 0) -> float:
        """The distance, in the scores' unit."""


def _sample(scores: Sequence[float], direction: Direction) -> Sample:
    mean = fmean(scores)
    spread = variance(scores) if len(scores) > 1 else math.inf
    return Sample(mean if direction == "max" else -mean, spread, len(scores))


def _entry(label: str, scores: Sequence[float], trained: Sequence[float] | None, direction: Direction) -> Entry:
    return Entry(label, _sample(scores, direction), _sample(trained or scores, direction))


def _welch(a: Sample, b: Sample, more: int = 0) -> tuple[float, float]:
    """Standard error and Welch-Satterthwaite degrees of freedom of a difference, with `more` seeds each."""
    u, v = a.variance / (a.count + more), b.variance / (b.count + more)
    if u + v == 0 or math.isinf(u + v):
        return math.sqrt(u + v), 1.0
    return math.sqrt(u + v), (u + v) ** 2 / (u**2 / (a.count + more - 1) + v**2 / (b.count + more - 1))


def _pair_width(a: Sample, b: Sample, rules: Rules, more: int = 0) -> float:
    """Half the Games-Howell interval of a difference."""
    error, df = _welch(a, b, more)
    return quantile(rules.confidence, rules.groups, df) / math.sqrt(2) * error


def _headline_width(a: Sample, b: Sample, rules: Rules, more: int = 0) -> float:
    """How far below the difference the headline's bound lies: c standard errors.

    The claim is false when the two truly differ by the margin or less, either way. At the worst, a difference of
    just the margin, it is made wrongly for one side with probability P(t > c), and for the other, twice the margin
    away, with P(t > c + 2 margin / error). c makes the two sum to 1 - confidence: two-sided Student's t at margin 0.
    """
    error, df = _welch(a, b, more)
    if error == 0 or math.isinf(error):
        return error
    apart, level = 2 * rules.margin / error, 1 - rules.confidence
    one_sided, two_sided = stdtrit(df, 1 - level), stdtrit(df, 1 - level / 2)

    def excess(c: float) -> float:
        return float(stdtr(df, -c) + stdtr(df, -c - apart)) - level

    return error * float(brentq(excess, one_sided - 1e-6, two_sided + 1e-6))


def _comparisons(entries: Sequence[Entry], rules: Rules) -> tuple[Comparison, ...]:
    """Every pair, best means first. The headline's bound, where it holds, holds for all the winner's leads at once."""
    winner, *others = entries
    joint = min((_lower(winner, other, rules, _headline_width) for other in others), default=-math.inf)
    return tuple(_compare(a, b, rules, joint if a is winner else None) for a, b in pairs_of(entries, 2))


def _lower(ahead: Entry, behind: Entry, rules: Rules, width: Width, more: int = 0) -> float:
    """The lower bound of a difference: with all seeds, or without the failures of the one behind, whichever is higher.

    Failures only lower the mean of the one behind, so a bound that holds against its other seeds holds a fortiori.
    """
    a, rivals = ahead.whole, [behind.whole]
    if behind.trained.mean > behind.whole.mean:
        rivals.append(behind.trained)
    return max(a.mean - b.mean - width(a, b, rules, more) for b in rivals)


def _compare(ahead: Entry, behind: Entry, rules: Rules, joint: float | None) -> Comparison:
    """One pair; `joint` is the headline's bound where the one ahead is the winner."""
    better, other, margin = ahead.label, behind.label, rules.margin
    difference = ahead.whole.mean - behind.whole.mean
    low, high = _lower(ahead, behind, rules, _pair_width), difference + _pair_width(ahead.whole, behind.whole, rules)
    if joint is not None and joint > margin:
        low = max(low, joint)
    if low > margin:
        return Comparison(better, other, difference, low, high, "better")
    if -2 * margin <= low and high <= 2 * margin:
        return Comparison(better, other, difference, low, high, "equivalent")
    more = _more_seeds(ahead, behind, rules, _pair_width if joint is None else _headline_width)
    return Comparison(better, other, difference, low, high, "undecided", more)


def _more_seeds(ahead: Entry, behind: Entry, rules: Rules, width: Width) -> int | None:
    """How many seeds more would decide, if means and variances stayed as they are; None where too many would not."""
    a, b = ahead.whole, behind.whole

    def decided(more: int) -> bool:
        better = _lower(ahead, behind, rules, width, more) > rules.margin
        return better or a.mean - b.mean + _pair_width(a, b, rules, more) <= 2 * rules.margin

    if math.isinf(a.variance + b.variance) or not decided(MOST_MORE_SEEDS):
        return None
    return 1 + bisect_left(range(1, MOST_MORE_SEEDS), True, key=decided)


# The verdict


def _verdict(
    comparisons: tuple[Comparison, ...], entries: Sequence[Entry], simplicity: Simplicity | None, wording: Wording
) -> Verdict:
    winner, *others = (entry.label for entry in entries)
    own = [c for c in comparisons if c.better == winner]
    alike = [winner, *(c.other for c in own if c.verdict == "equivalent")]
    recommended = alike[0] if simplicity is None else min(alike, key=_key(simplicity))
    kind = _kind(own)
    sentence = wording.sentence(kind, winner, recommended, own, entries[0].whole.count)
    return Verdict(winner, others[0] if others else None, recommended, kind, sentence, comparisons)


def _kind(own: Sequence[Comparison]) -> Kind:
    """What the winner's comparisons amount to; a winner without rivals has decided nothing."""
    kinds = {c.verdict for c in own}
    if not kinds or "undecided" in kinds:
        return "undecided"
    return "equivalent" if "equivalent" in kinds else "better"


def _key(simplicity: Simplicity) -> Callable[[str], Any]:
    return simplicity if callable(simplicity) else simplicity.__getitem__


def _check(scores: Mapping[str, Sequence[float]], margin: float) -> None:
    if not margin >= 0:
        raise StudyError(f"margin={margin}: must be zero or more, in the unit of the scores")
    for label, values in scores.items():
        if len(values) == 0:
            raise StudyError(f"{label!r} has no scores: leave it out, or impute what its failures are worth")
        culprit = next((value for value in values if not math.isfinite(value)), None)
        if culprit is not None:
            raise StudyError(f"{label!r} has the score {culprit}: impute what a failure is worth before judging")
