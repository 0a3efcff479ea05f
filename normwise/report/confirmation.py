"""Confirmation: the scores of every seed, and the differences of every pair."""

from __future__ import annotations

from itertools import zip_longest
from typing import Literal

from normwise.report import words
from normwise.report.figures import INK, MUTED, PAPER, Figure, Json, Mark, axis, hover, marks, padded, rows, short
from normwise.report.tables import Table, table
from normwise.tuning.records import Comparison, NormSummary, Outcome, Record, Settings, Summary

_PITCH = 56  # pixels between rows
_PAIR_PITCH = 44
_BELOW, _JITTER = 0.24, 0.16  # of a row: how far the seeds lie below their mean, and apart from one another
_MOST_PAIRS = 15  # drawn; more than that of 6 normalizations would hide the ones that matter
_FAILED: dict[Outcome, str] = {"trains": "", "stuck": "stuck", "diverged": "diverged; counted as this score"}
_STARS: dict[Outcome, str] = {"trains": "", "stuck": "*", "diverged": "**"}
_VERDICTS: dict[str, tuple[str, str]] = {
    "better": ("circle", "var(--series-0)"),
    "equivalent": ("square", "var(--series-2)"),
    "undecided": ("circle-open", MUTED),
}


def scores(summary: Summary) -> Figure | None:
    """Every confirmation seed by normalization, best mean first, or None if nothing was confirmed."""
    settings = summary.settings
    order = ranked(summary)
    if not order:
        return None
    looks = marks(summary.norms)
    reach = score_range(order)
    traces = [
        trace
        for row, norm in enumerate(order)
        for trace in (_points(norm, row, looks[norm.label], settings, reach), _mean(norm, row, settings))
    ]
    heading = words.metric_name(settings)
    title = f"{heading} ({settings.unit})" if settings.unit else heading
    return Figure(
        name="confirmation",
        title=f"{heading} on confirmation seeds",
        finding=_scores_finding(order, settings),
        reading="Every point is one fresh seed at the normalization's own best learning rate; a cross is a seed that "
        "did not train, drawn at the edge where its score lies beyond it. A stuck seed counts with the score that it "
        "reached, a diverged one with an imputed score. The diamond is the mean, the bar its 95 % interval. Intervals "
        "are conditional on the split of the data.",
        table=_scores_table(order, settings),
        traces=traces,
        layout=rows([short(norm.label) for norm in order], _PITCH, xaxis=axis(title, range=reach), showlegend=False),
    )


def pairs(summary: Summary) -> Figure | None:
    """The differences with their simultaneous intervals, or None if there is no pair."""
    if not summary.verdict.comparisons:
        return None
    drawn = _drawn(summary)
    settings = summary.settings
    unit = words.difference_unit(settings)
    reach = padded([end for pair in drawn for end in (pair.low, pair.high)] + [2 * settings.margin, -settings.margin])
    title = f"Difference in {settings.metric.replace('_', ' ')}" + (f" ({unit})" if unit else "")
    labels = [f"{short(pair.better, 16)} over {short(pair.other, 16)}: <b>{pair.verdict}</b>" for pair in drawn]
    return Figure(
        name="pairs",
        title="Pairwise differences",
        finding=_pairs_finding(summary),
        reading=_pairs_reading(summary, len(drawn)),
        table=_pairs_table(summary.verdict.comparisons, settings),
        traces=[_difference(pair, row, settings) for row, pair in enumerate(drawn)],
        layout=rows(
            labels, _PAIR_PITCH, xaxis=axis(title, range=reach), showlegend=False, shapes=_bands(settings.margin)
        ),
    )


def ranked(summary: Summary) -> list[NormSummary]:
    """The normalizations that have scores, best mean first."""
    sign = -1 if summary.settings.direction == "max" else 1
    scored = [norm for norm in summary.norms if norm.mean is not None and norm.scores]
    return sorted(scored, key=lambda norm: sign * (norm.mean or 0.0))


def score_range(order: list[NormSummary]) -> list[float]:
    """The axis holds the seeds that trained and every mean; a seed that failed must not flatten the rest.

    It would through its normalization's interval as well: that counts only where all seeds trained.
    """
    trained = [score for norm in order for score, record in _seeds(norm) if _trained(record)]
    ends = [end for norm in order if not norm.failures for end in (norm.low, norm.high)]
    return padded(trained + [end for end in (*ends, *(norm.mean for norm in order)) if end is not None])


def _seeds(norm: NormSummary) -> list[tuple[float, Record | None]]:
    """The scores that the judge saw, each with its record."""
    return [(score, record) for score, record in zip_longest(norm.scores, norm.confirmation) if score is not None]


def _trained(record: Record | None) -> bool:
    return record is None or record.outcome == "trains"


def _points(norm: NormSummary, row: int, mark: Mark, settings: Settings, reach: list[float]) -> Json:
    seeds = _seeds(norm)
    count = len(seeds)
    low, high = reach
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [min(max(score, low), high) for score, _ in seeds],
        # Spread in an order that depends on the position alone, so that a report is the same twice.
        "y": [-row - _BELOW + _JITTER * ((7 * index % count) / count - 0.5) for index in range(count)],
        "marker": {
            "color": mark.colour,
            "symbol": [mark.symbol if _trained(record) else "x" for _, record in seeds],
            "size": 8,
            "opacity": 0.75,
        },
        "cliponaxis": False,
        "hoverinfo": "text",
        "hovertext": [_describe(norm, score, record, settings) for score, record in seeds],
    }


def _describe(norm: NormSummary, score: float, record: Record | None, settings: Settings) -> str:
    shown = words.with_unit(words.score(score, settings.unit), settings.unit)
    if record is None:
        return hover(norm.label, shown)
    loss = words.with_unit(words.number(record.test_loss, 4), words.loss_unit(settings))
    seed = f"seed {record.request.seed}, learning rate {words.number(record.request.lr)}"
    return hover(
        norm.label, f"{shown}", seed, _FAILED[record.outcome], "" if record.test_loss is None else f"test loss {loss}"
    )


def _mean(norm: NormSummary, row: int, settings: Settings) -> Json:
    mean = norm.mean or 0.0
    bar = _bar(mean, norm.low, norm.high, INK)
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [mean],
        "y": [-row],
        "marker": {"color": INK, "symbol": "diamond", "size": 11, "line": {"color": PAPER, "width": 1.5}},
        "error_x": bar,
        "hoverinfo": "text",
        "hovertext": [hover(norm.label, f"mean {words.measured(norm, settings.unit)}")],
    }


def _bar(middle: float, low: float | None, high: float | None, colour: str) -> Json:
    if low is None or high is None:
        return {"visible": False}
    ends = {"array": [high - middle], "arrayminus": [middle - low]}
    return {"type": "data", "symmetric": False, **ends, "color": colour, "thickness": 2, "width": 5}


def _scores_finding(order: list[NormSummary], settings: Settings) -> str:
    best, worst = order[0], order[-1]
    text = f"{best.label} has the best mean: {words.measured(best, settings.unit)}"
    if best is worst:
        return f"{text} over {words.plural(len(best.scores), 'seed')}."
    return f"{text}. The last is {worst.label} with {words.measured(worst, settings.unit)}."


def _scores_table(order: list[NormSummary], settings: Settings) -> Table:
    rows = [
        (
            norm.label,
            words.measured(norm, settings.unit),
            words.with_unit(words.score(norm.median, settings.unit), settings.unit),
            ", ".join(
                f"{words.score(score, settings.unit)}{_STARS[seed.outcome if seed else 'trains']}"
                for score, seed in _seeds(norm)
            ),
        )
        for norm in order
    ]
    every = "Every seed (* stuck, ** diverged and imputed)"
    return table("Normalization", "Mean [95 % interval]", "Median", every, rows=rows)


def _drawn(summary: Summary) -> list[Comparison]:
    """All pairs, or those of the winner where all would be too many to read."""
    every = list(summary.verdict.comparisons)
    if len(every) <= _MOST_PAIRS:
        return every
    return [pair for pair in every if summary.verdict.winner in (pair.better, pair.other)]


def _difference(pair: Comparison, row: int, settings: Settings) -> Json:
    symbol, colour = _VERDICTS[pair.verdict]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [pair.difference],
        "y": [-row],
        "marker": {"color": colour, "symbol": symbol, "size": 10, "line": {"width": 2, "color": colour}},
        "error_x": _bar(pair.difference, pair.low, pair.high, colour),
        "hoverinfo": "text",
        "hovertext": [hover(f"{pair.better} over {pair.other}", _amount(pair, settings), in_words(pair))],
    }


def _amount(pair: Comparison, settings: Settings) -> str:
    unit = words.difference_unit(settings)
    shown = words.with_unit(words.score(pair.difference, settings.unit), unit)
    return f"{shown} {words.interval(pair.low, pair.high, settings.unit)}"


def in_words(pair: Comparison) -> str:
    """The verdict on a pair as a phrase.

    >>> in_words(Comparison("batch", "layer", 0.6, 0.1, 1.1, "undecided", more_seeds=14))
    'undecided: about 14 more seeds would decide'
    """
    if pair.verdict != "undecided" or pair.more_seeds is None:
        return pair.verdict
    return f"undecided: about {words.plural(pair.more_seeds, 'more seed')} would decide"


def _bands(margin: float) -> list[Json]:
    """The band within which a difference does not matter, and the wider one within which two are equivalent."""
    frame = {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 0}, "layer": "below"}
    widths = ((2 * margin, "var(--band-wide)"), (margin, "var(--band)"))
    bands = [{**frame, "x0": -width, "x1": width, "fillcolor": colour} for width, colour in widths]
    zero = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": 0, "x1": 0, "layer": "below"}
    return [*bands, {**zero, "line": {"color": MUTED, "width": 1}}]


def _pairs_finding(summary: Summary) -> str:
    pairs = summary.verdict.comparisons
    kinds: tuple[Literal["better", "equivalent", "undecided"], ...] = ("better", "equivalent", "undecided")
    counts = [(sum(pair.verdict == kind for pair in pairs), kind) for kind in kinds]
    told = words.listed([f"{count} {kind}" for count, kind in counts if count])
    lead = pairs[0]
    text = f"{lead.better} over {lead.other}: {_amount(lead, summary.settings)}, {in_words(lead)}."
    return text if len(pairs) == 1 else f"{text} Of all {len(pairs)} pairs: {told}."


def _pairs_reading(summary: Summary, drawn: int) -> str:
    unit = words.difference_unit(summary.settings)
    margin = words.with_unit(words.number(summary.settings.margin), unit)
    twice = words.with_unit(words.number(2 * summary.settings.margin), unit)
    text = (
        f"Bars are simultaneous 95 % intervals of the difference; right of zero favours the first. Better: the whole "
        f"bar lies right of the dark band (±{margin}). Equivalent: it lies inside the light band (±{twice}). Undecided "
        f"is not a tie: it takes more seeds."
    )
    hidden = len(summary.verdict.comparisons) - drawn
    return f"{text} Drawn are the pairs of {summary.verdict.winner}; the table below has all." if hidden else text


def _pairs_table(pairs: tuple[Comparison, ...], settings: Settings) -> Table:
    rows = [(f"{pair.better} over {pair.other}", _amount(pair, settings), in_words(pair)) for pair in pairs]
    return table("Pair", "Difference [simultaneous 95 % interval]", "Verdict", rows=rows)


def sentence(pair: Comparison, settings: Settings) -> str:
    """A pair's difference as evidence: how large, how sure, against which margin."""
    margin = words.with_unit(words.number(settings.margin), words.difference_unit(settings))
    amount = _amount(pair, settings)
    return f"{pair.better} over {pair.other}: {amount}, simultaneous 95 %; margin {margin}; {in_words(pair)}."
