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
from itertools import combinations
from statistics import fmean, variance
from typing import Any, Literal, Protocol

from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit
from scipy.stats import studentized_range

from normwise.errors import StudyError
from normwise.tuning.records import Comparison, Direction, Verdict

MOST_MORE_SEEDS = 1000  # beyond this, "more seeds would decide" is no advice
# The degrees of freedom of the classical tables. Between them the quantile's logarithm is nearly linear in 1/df.
TABLE = (*range(1, 21), 24, 30, 40, 60, 120, 1_000_000)

NOTHING = "No normalization can be recommended: every trial of the learning-rate search diverged."

Kind = Literal["better", "equivalent", "undecided"]
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
    trained: Mapping[str, Sequence[float]] | None = None,
) -> Verdict:
    """Compare every pair of normalizations and say which to use.

    `scores` are independent scores by label, one a seed. `margin` is the smallest difference that matters, in the
    scores' unit. `simplicity` gives each label a key: of the winner's equivalents the one with the smallest is
    recommended (default: the order given). `rates`, the learning rates, are only quoted in the sentence. Without any
    scores the winner is the empty string.

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
    wording = Wording(unit, margin, {label: fmean(scores[label]) for label in order}, rates or {}, confidence)
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
    return tuple(_compare(a, b, rules, joint if a is winner else None) for a, b in combinations(entries, 2))


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


# The sentence


@dataclass(frozen=True)
class Wording:
    """Numbers and names as the sentence writes them."""

    unit: str
    margin: float
    means: Mapping[str, float]
    rates: Mapping[str, float]
    confidence: float = 0.95

    def sentence(self, kind: Kind, winner: str, recommended: str, own: Sequence[Comparison], count: int) -> str:
        """The whole answer: what to use at which learning rate, by how much and against which."""
        mean = f"{self.value(self.means[winner])} on average over {count} seed{'s' * (count != 1)}"
        if not own:
            return f"Only {self.name(winner)} was confirmed: {mean}, with nothing to compare it with."
        if kind == "better":
            return self._better(winner, own, mean)
        if kind == "undecided":
            return self._undecided(winner, recommended, own, mean)
        return self._equivalent(winner, recommended, own, mean)

    def name(self, label: str) -> str:
        """A label with its learning rate, where that is known."""
        lr = self.rates.get(label)
        return label if lr is None else f"{label} at learning rate {rate_text(lr)}"

    def value(self, score: float) -> str:
        """A score with its unit."""
        return f"{self.number(score)} {self.unit}".rstrip()

    def gap(self, difference: float) -> str:
        """A difference of scores; that of two percentages is in points."""
        return f"{self.number(difference)} {'points' if self.unit == '%' else self.unit}".rstrip()

    def number(self, value: float) -> str:
        """As many decimals as show a tenth of the margin; four digits where there is none."""
        if self.margin == 0:
            return f"{value:.4g}"
        return f"{value:.{max(0, 1 - math.floor(math.log10(self.margin)))}f}"

    def level(self) -> str:
        """The confidence, as in "95 %"."""
        return f"{100 * self.confidence:g} %"

    def interval(self, c: Comparison) -> str:
        """A comparison's interval."""
        return f"{self.level()} interval {self.number(c.low)} to {self.number(c.high)}"

    def _better(self, winner: str, own: Sequence[Comparison], mean: str) -> str:
        bound, closest = min(c.low for c in own), own[0]
        return (
            f"Use {self.name(winner)}: {mean}, better than every other normalization by at least {self.gap(bound)} "
            f"({self.level()} confidence, margin {self.gap(self.margin)}); the runner-up, {self.name(closest.other)}, "
            f"is {self.gap(closest.difference)} behind."
        )

    def _equivalent(self, winner: str, recommended: str, own: Sequence[Comparison], mean: str) -> str:
        alike = [c for c in own if c.verdict == "equivalent"]
        inside = f"inside ±{self.gap(2 * self.margin)}"
        if recommended == winner:
            names = listed([c.other for c in alike])
            return (
                f"Use {self.name(winner)}: {mean}, the best mean and the simplest of its equivalents; "
                f"{alike[0].other} is {self.gap(alike[0].difference)} behind ({self.interval(alike[0])}, {inside}). "
                f"Equivalent: {names}."
            )
        pair = next(c for c in alike if c.other == recommended)
        return (
            f"Use {self.name(recommended)}: {self.value(self.means[recommended])}, equivalent to the best mean and "
            f"simpler; {self.name(winner)} reached {mean}, {self.gap(pair.difference)} ahead "
            f"({self.interval(pair)}, {inside})."
        )

    def _undecided(self, winner: str, recommended: str, own: Sequence[Comparison], mean: str) -> str:
        open_ = [c for c in own if c.verdict == "undecided"]
        closest, rest = open_[0], [c.other for c in open_[1:]]
        also = f"; nor is its lead over {listed(rest)}" if rest else ""
        simpler = "" if recommended == winner else ", its equivalent and simpler"
        return (
            f"Undecided: {self.name(winner)} has the best mean, {mean}, but its lead of {self.gap(closest.difference)} "
            f"over {self.name(closest.other)} is not settled ({self.interval(closest)}, margin "
            f"{self.gap(self.margin)}){also}; {seeds_needed(open_)}. Until then use {self.name(recommended)}{simpler}."
        )


def seeds_needed(comparisons: Sequence[Comparison]) -> str:
    """How many more seeds would settle undecided comparisons.

    >>> seeds_needed([Comparison("a", "b", 1.0, 0.2, 1.8, "undecided", more_seeds=7)])
    'about 7 more seeds would decide'
    """
    if any(math.isinf(c.low) for c in comparisons):
        return "a single seed has no interval, so run at least 2, better 10"
    needed = [c.more_seeds for c in comparisons]
    known = [n for n in needed if n is not None]
    if len(known) < len(needed):
        return f"even {MOST_MORE_SEEDS} more seeds would not decide"
    return f"about {max(known)} more seed{'s' * (max(known) != 1)} would decide"


def rate_text(lr: float) -> str:
    """A learning rate in three digits.

    >>> rate_text(0.3535533905932738), rate_text(4096.0), rate_text(2**-12)
    ('0.354', '4096', '0.000244')
    """
    return f"{lr:.0f}" if lr >= 1000 else f"{lr:.3g}"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
