"""What the report's figures draw: every seed, every interval, nothing flattened or hidden."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
import report_example
from drawn_traces import trial

from normwise.report import confirmation, curves, rates, stability, tables, words
from normwise.report.figures import Figure, marks
from normwise.tuning.records import Comparison, Edge, Record, Request, Summary


def drawn(summary: Summary) -> list[Figure | None]:
    confirmed = [confirmation.scores(summary), confirmation.pairs(summary)]
    return [
        rates.figure(summary),
        *confirmed,
        curves.losses(summary),
        curves.weights(summary),
        stability.sensitivity(summary),
    ]


def _per_point(trace: dict[str, Any]) -> list[str]:
    symbol = trace.get("marker", {}).get("symbol")
    return symbol if isinstance(symbol, list) else []


def test_axes_carry_units() -> None:
    found = {figure.name: figure.layout for figure in drawn(report_example.example()) if figure}
    assert found["rates"]["yaxis"]["title"]["text"] == "Validation loss (nats)"
    assert found["rates"]["xaxis"]["type"] == "log"
    assert found["confirmation"]["xaxis"]["title"]["text"] == "Accuracy (%)"
    assert found["pairs"]["xaxis"]["title"]["text"] == "Difference in accuracy (points)"
    assert found["curves"]["yaxis"]["title"]["text"] == "Training loss (nats)"
    assert found["sensitivity"]["xaxis"]["title"]["text"] == "Mean excess loss (nats)"


def test_no_two_normalizations_look_alike() -> None:
    looks = list(marks(report_example.twelve().norms).values())
    assert len({(look.colour, look.symbol) for look in looks}) == 12
    assert "x" not in {look.symbol for look in looks}


def test_every_selection_seed_is_a_point_or_a_cross() -> None:
    summary = report_example.example()
    figure = rates.figure(summary)
    assert figure
    symbols = [symbol for trace in figure.traces for symbol in _per_point(trace)]
    records = [record for norm in summary.norms for record in norm.selection]
    count = {kind: sum(record.outcome == kind for record in records) for kind in ("trains", "stuck", "diverged")}
    assert symbols.count("x") == count["diverged"] > 0
    assert sum(symbol.endswith("-open") or symbol == "arrow-up" for symbol in symbols) == count["stuck"] > 0
    assert len(symbols) == len(records)


def test_the_line_breaks_where_half_of_the_seeds_diverge() -> None:
    measure = rates.Measure("val_loss", "Validation loss", "nats")
    records = [trial(1.0, 0, "trains", 0.2), trial(1.0, 1, "trains", 0.4), trial(1.0, 2, "diverged", None)]
    assert rates.middle(records, measure) == 0.4
    assert rates.middle(records[1:], measure) is None


def test_a_loss_far_above_chance_is_an_arrow_on_the_edge() -> None:
    summary = report_example.one()
    wild = trial(32.0, 0, "stuck", 1e6)
    norm = replace(summary.norms[0], selection=(*summary.norms[0].selection, wild))
    figure = rates.figure(replace(summary, norms=(norm,)))
    assert figure
    seeds = next(trace for trace in figure.traces if "arrow-up" in _per_point(trace))
    top = 10 ** figure.layout["yaxis"]["range"][1]
    assert seeds["y"][-1] == pytest.approx(top)
    assert top < 3 * report_example.CHANCE
    assert "validation loss 1 × 10⁶" in seeds["hovertext"][-1].replace("\xa0", " ")  # noqa: RUF001
    assert "An arrow is a finite loss above the axis." in figure.reading


def test_confirmation_is_ordered_by_mean_in_the_metrics_direction() -> None:
    summary = report_example.example()
    assert [norm.label for norm in confirmation.ranked(summary)] == ["batch", "layer", "group", "rms", "none"]
    lower = replace(summary, settings=replace(summary.settings, direction="min"))
    assert [norm.label for norm in confirmation.ranked(lower)] == ["none", "rms", "group", "layer", "batch"]


def test_a_failed_seed_is_a_cross_at_the_edge_and_says_so() -> None:
    figure = confirmation.scores(report_example.example())
    assert figure
    points = figure.traces[-2]
    assert points["marker"]["symbol"].count("x") == 1
    at = points["marker"]["symbol"].index("x")
    assert points["x"][at] == figure.layout["xaxis"]["range"][0]
    assert "<br>stuck<br>" in points["hovertext"][at]
    assert "10.30*" in figure.table.rows[-1][3]
    assert "10.30**" not in figure.table.rows[-1][3]


def test_only_the_score_of_a_diverged_seed_is_said_to_be_imputed() -> None:
    summary = report_example.example()
    last = summary.norms[-1]
    gone = tuple(
        replace(record, outcome="diverged", score=None) if record.outcome == "stuck" else record
        for record in last.confirmation
    )
    figure = confirmation.scores(replace(summary, norms=(*summary.norms[:-1], replace(last, confirmation=gone))))
    assert figure
    points = figure.traces[-2]
    assert "<br>diverged; counted as this score" in points["hovertext"][points["marker"]["symbol"].index("x")]
    assert "10.30**" in figure.table.rows[-1][3]
    assert figure.table.columns[3].name == "Every seed (* stuck, ** diverged and imputed)"


def test_the_axis_holds_every_interval_where_all_seeds_trained() -> None:
    summary = report_example.one()
    wide = replace(summary, norms=(replace(summary.norms[0], low=80.0, high=109.0),))
    figure = confirmation.scores(wide)
    assert figure
    low, high = figure.layout["xaxis"]["range"]
    assert low < 80.0
    assert high > 109.0


def test_pairs_show_intervals_bands_and_verdicts() -> None:
    figure = confirmation.pairs(report_example.example())
    assert figure
    assert len(figure.traces) == 10
    bar = figure.traces[0]["error_x"]
    assert (bar["array"][0], bar["arrayminus"][0]) == pytest.approx((0.67, 0.67), abs=0.01)
    assert [(shape["x0"], shape["x1"]) for shape in figure.layout["shapes"]] == [(-1.0, 1.0), (-0.5, 0.5), (0, 0)]
    assert figure.layout["annotations"][0]["text"] == "batch over layer: <b>better</b>"
    assert figure.table.rows[3][2] == "undecided: about 14 more seeds would decide"


def test_of_too_many_pairs_only_the_winners_are_drawn() -> None:
    summary = report_example.twelve()
    figure = confirmation.pairs(summary)
    assert figure
    assert len(figure.traces) == 11
    assert len(figure.table.rows) == 66
    assert f"Drawn are the pairs of {summary.verdict.winner}; the table below has all." in figure.reading


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        (Comparison("a", "b", 2.0, 1.0, 3.0, "better"), "better"),
        (Comparison("a", "b", 0.1, -0.4, 0.6, "equivalent"), "equivalent"),
        (Comparison("a", "b", 0.6, -0.4, 1.6, "undecided", 1), "undecided: about 1 more seed would decide"),
        (Comparison("a", "b", 0.6, -0.4, 1.6, "undecided"), "undecided"),
    ],
)
def test_verdicts_in_words(pair: Comparison, text: str) -> None:
    assert confirmation.in_words(pair) == text


def test_the_median_curve_ends_where_half_of_the_seeds_have_diverged() -> None:
    request = Request("confirm", "batch", 1.0, 0, 3)
    whole = Record(request, "trains", curve=((0, 2.0), (1, 1.0), (2, 0.5)))
    other = Record(request, "trains", curve=((0, 2.2), (1, 1.4), (2, 0.7)))
    spiked = Record(request, "diverged", curve=((0, 2.4), (1, 9.0)))
    losses = attrgetter("curve")
    assert curves.median_curve((whole, other, spiked), losses) == {0: 2.2, 1: 1.4, 2: 0.7}
    assert curves.median_curve((whole, spiked), losses) == {0: 2.2, 1: 5.0}


def test_the_norm_of_the_weights_is_drawn_over_the_steps() -> None:
    figure = curves.weights(report_example.one())
    assert figure
    assert figure.finding == "Median ‖W‖ at the end: batch 43.4."
    assert figure.traces[-1]["x"][0] == 0
    assert figure.traces[-1]["y"][0] == 24.0
    assert figure.layout["yaxis"]["title"]["text"] == "‖W‖"


def test_curves_draw_each_seed_and_the_median_for_hovering() -> None:
    figure = curves.losses(report_example.one())
    assert figure
    thin = [trace for trace in figure.traces if trace["mode"] == "lines"]
    assert len(thin) == 10
    assert thin[0]["meta"] == ["batch, seed 1000", "training loss", "nats"]
    assert figure.traces[-1]["meta"] == ["batch, median", "training loss", "nats"]


def test_ratios_are_to_none_or_else_to_the_smallest() -> None:
    summary = report_example.example()
    assert tables.reference(summary.norms).label == "none"
    assert tables.reference(summary.norms[:4]).label == "rms"
    table = tables.tolerance(summary)
    assert [(column.name, column.unit) for column in table.columns[1:3]] == [
        ("Rate at 0.9", "of chance"),
        ("Ratio", "to none"),
    ]
    assert [row[4] for row in table.rows] == ["13.3×", "2.37×", "2.37×", "1.67×", "1×"]  # noqa: RUF001


def test_a_ratio_to_an_edge_that_was_not_reached_is_a_bound() -> None:
    reached, beyond = Edge(0.5, 0.5, 0.5, seeds=3), Edge(8.0, 8.0, 8.0, seeds=3, censored=3)
    assert tables.ratio(reached, beyond) == "at most 0.0625×"  # noqa: RUF001
    assert tables.ratio(beyond, Edge(8.0, 8.0, 8.0, seeds=3, censored=3)) == words.MISSING


def test_negative_losses_get_a_linear_axis() -> None:
    summary = report_example.one()
    norm = replace(
        summary.norms[0], selection=(trial(0.1, 0, "trains", -1.5), trial(0.2, 0, "trains", -1.0)), lr_best=0.1
    )
    figure = rates.figure(replace(summary, norms=(norm,), chance=None))
    assert figure
    assert "type" not in figure.layout["yaxis"]
    assert figure.layout["yaxis"]["range"][0] < -1.5
