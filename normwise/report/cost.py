"""What a normalization costs, against the score that was confirmed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from normwise.report import words
from normwise.report.confirmation import ranked, score_range
from normwise.report.figures import MUTED, Figure, Json, Mark, axis, hover, layout, legend_entry, margin, marks, padded
from normwise.report.tables import table
from normwise.tuning.records import NormSummary, Settings, Summary

_ALIKE = 1.05  # costs within this factor of one another are told, not drawn
_GAP = 0.05  # of the width, between two plots
_SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


@dataclass(frozen=True)
class Cost:
    """Something that a normalization takes."""

    name: str
    unit: str
    of: Callable[[NormSummary], float | None]

    @property
    def title(self) -> str:
        """The axis title."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def text(self, norm: NormSummary) -> str:
        """The number with its unit."""
        return words.with_unit(words.number(self.of(norm), 5 if not self.unit else 3), self.unit)


def figure(summary: Summary) -> Figure | None:
    """The confirmed score over every cost in which the normalizations differ, or None if there is none."""
    norms = ranked(summary)
    costs = _costs(norms)
    drawn = [cost for cost in costs if _differs([cost.of(norm) for norm in norms])]
    if not drawn:
        return None
    metric = words.metric_name(summary.settings)
    looks = marks(summary.norms)
    return Figure(
        name="cost",
        title=f"{metric} against cost",
        finding=_finding(norms, drawn, summary.settings),
        reading=_reading(costs, drawn),
        table=table(
            "Normalization",
            "Mean [95 % interval]",
            *(cost.title for cost in costs),
            rows=[
                (norm.label, words.measured(norm, summary.settings.unit), *(words.number(c.of(norm), 5) for c in costs))
                for norm in norms
            ],
        ),
        traces=[
            *(legend_entry(norm.label, looks[norm.label]) for norm in norms),
            *_points(norms, drawn, looks, summary.settings),
        ],
        layout=_layout(norms, drawn, summary.settings),
    )


def _costs(norms: Sequence[NormSummary]) -> list[Cost]:
    """The costs that are known of any normalization."""
    size, scale = _size([_kept(norm) or 0 for norm in norms])
    every = [
        Cost("Time a step", "ms", lambda norm: norm.ms_per_step),
        Cost("Kept a step", size, lambda norm: None if (kept := _kept(norm)) is None else kept / scale),
        Cost("Parameters", "", lambda norm: norm.parameters),
    ]
    return [cost for cost in every if any(cost.of(norm) is not None for norm in norms)]


def _kept(norm: NormSummary) -> int | None:
    """Bytes that one step keeps for its backward pass."""
    return norm.measures.saved_bytes if norm.measures else None


def _size(kept: list[int]) -> tuple[str, int]:
    """The unit that suits the largest number of bytes.

    >>> _size([5 * 2**20, 2**10]), _size([12]), _size([])
    (('MiB', 1048576), ('KiB', 1024), ('KiB', 1024))
    """
    return next(((name, size) for name, size in _SIZES if max(kept, default=0) >= size), _SIZES[-1])


def _differs(values: list[float | None]) -> bool:
    known = [value for value in values if value is not None]
    return len(known) > 1 and max(known) > _ALIKE * min(known)


def _points(norms: list[NormSummary], costs: list[Cost], looks: dict[str, Mark], settings: Settings) -> Iterator[Json]:
    for index, cost in enumerate(costs):
        for norm in norms:
            if (value := cost.of(norm)) is not None:
                yield _point(norm, value, looks[norm.label]) | {
                    "xaxis": f"x{index + 1 if index else ''}",
                    "hovertext": [hover(norm.label, f"{cost.name.lower()} {cost.text(norm)}", _score(norm, settings))],
                }


def _score(norm: NormSummary, settings: Settings) -> str:
    return f"mean {words.measured(norm, settings.unit)}"


def _point(norm: NormSummary, value: float, mark: Mark) -> Json:
    """A mark with its interval."""
    mean = norm.mean or 0.0
    low, high = (mean if end is None else end for end in (norm.low, norm.high))
    bar = {"array": [high - mean], "arrayminus": [mean - low], "symmetric": False, "type": "data"}
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [value],
        "y": [mean],
        "marker": {"color": mark.colour, "symbol": mark.symbol, "size": 11},
        "error_y": {**bar, "color": mark.colour, "thickness": 1.6, "width": 4},
        "hoverinfo": "text",
        "legendgroup": norm.label,
        "showlegend": False,
    }


def _layout(norms: list[NormSummary], costs: list[Cost], settings: Settings) -> Json:
    width = (1 - _GAP * (len(costs) - 1)) / len(costs)
    horizontal = {}
    for index, cost in enumerate(costs):
        left = index * (width + _GAP)
        known = [value for norm in norms if (value := cost.of(norm)) is not None]
        parts = {"domain": [left, min(left + width, 1)], "anchor": "y", "nticks": 4, "tickangle": 0}
        horizontal[f"xaxis{index + 1 if index else ''}"] = axis(cost.title, range=padded(known, 0.12), **parts)
    metric = words.metric_name(settings)
    title = f"{metric} ({settings.unit})" if settings.unit else metric
    rules = [_rule(index, width) for index in range(1, len(costs))]
    return layout(360, **horizontal, yaxis=axis(title, range=score_range(norms)), shapes=rules, margin=margin(top=14))


def _rule(index: int, width: float) -> Json:
    """The left edge of a plot that has no vertical axis of its own."""
    at = index * (width + _GAP)
    ends = {"x0": at, "x1": at, "y0": 0, "y1": 1, "xref": "paper", "yref": "paper"}
    return {"type": "line", **ends, "line": {"color": MUTED, "width": 1}}


def _finding(norms: list[NormSummary], costs: list[Cost], settings: Settings) -> str:
    """The best against the cheapest in each cost."""
    best = norms[0]
    text = f"{best.label} has the best mean, {words.measured(best, settings.unit)}"
    parts = []
    for cost in costs:
        known = [norm for norm in norms if cost.of(norm) is not None]
        least = min(known, key=lambda norm: cost.of(norm) or 0.0)
        against = "the least of all" if least is best else f"the least is {least.label} with {cost.text(least)}"
        parts.append(f"{cost.name.lower()} {cost.text(best)}, {against}")
    return f"{text}: {'; '.join(parts)}."


def _reading(costs: list[Cost], drawn: list[Cost]) -> str:
    text = "Up and to the left is better. Bars are 95 % intervals of the mean over confirmation seeds."
    meaning = {
        "Time a step": "Time is that of one training step alone on the machine, after the study.",
        "Kept a step": "Kept is what the forward pass of one step saves for the backward pass.",
    }
    alike = [cost.name.lower() for cost in costs if cost not in drawn]
    same = [f"In {words.listed(alike)} they differ by less than 5 %: the table has it."] if alike else []
    return " ".join([text, *(meaning[cost.name] for cost in drawn if cost.name in meaning), *same])
