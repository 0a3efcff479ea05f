"""What the report's figures draw: every seed, every interval, nothing flattened or hidden."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
import report_example

from normwise.report import (
    axes,
    confirmation,
    cost,
    curvature,
    curves,
    gradient,
    heat,
    layers,
    rates,
    stability,
    tables,
    words,
)
from normwise.report.figures import Figure, marks
from normwise.tuning.records import (
    ActivationPoint,
    Comparison,
    Edge,
    GapPoint,
    Measures,
    NormSummary,
    Record,
    Request,
    SharpnessPoint,
    SmoothnessPoint,
    Summary,
    VariantSummary,
)


def drawn(summary: Summary) -> list[Figure | None]:
    confirmed = [confirmation.scores(summary), confirmation.pairs(summary)]
    return [
        rates.figure(summary),
        *confirmed,
        curves.losses(summary),
        curves.weights(summary),
        stability.sensitivity(summary),
    ]


def trial(lr: float, seed: int, outcome: str, loss: float | None, norm: str = "batch") -> Record:
    return Record(Request("select", norm, lr, seed, 100), outcome, val_loss=loss)  # type: ignore[arg-type]


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


def looked_into(*measures: Measures) -> Summary:
    """The first normalizations of the example, with these measures."""
    summary = report_example.example()
    norms = tuple(
        replace(norm, measures=own) for norm, own in zip(summary.norms[: len(measures)], measures, strict=True)
    )
    return replace(summary, norms=norms)


def of_label(figure: Figure, label: str, yaxis: str = "y") -> list[dict[str, Any]]:
    """The traces of a normalization in one panel, the entry of the legend left out."""
    named = [trace for trace in figure.traces if trace.get("legendgroup") == label and "hovertext" in trace]
    return [trace for trace in named if trace.get("yaxis", "y") == yaxis]


def test_a_study_that_measured_nothing_draws_nothing_inside() -> None:
    summary = report_example.example()
    drawn = [gradient.along_gradient, curvature.sharpness, layers.activations, layers.gap]
    assert [draw(summary) for draw in drawn] == [None] * 4
    assert axes.figures(summary) == []


def test_the_range_of_the_loss_is_a_bar_and_an_arrow_where_it_is_infinite() -> None:
    rough = (SmoothnessPoint(0, 1.0, None, None, None, 9.0), SmoothnessPoint(10, 0.5, 2.0, 4.0, 20.0, 9.5))
    calm = (SmoothnessPoint(0, 1.2, 1.5, 2.0, 8.0, 10.0), SmoothnessPoint(10, 0.4, 0.5, 1.0, 4.0, 12.0))
    figure = gradient.along_gradient(looked_into(Measures(0, smoothness=calm), Measures(0, smoothness=rough)))
    assert figure
    (bars,) = of_label(figure, "layer")
    assert bars["y"] == [1.0, 2.0, None, 0.5, 2.0, None]  # the highest that is finite is where the plot ends
    assert bars["marker"]["symbol"][1] == "arrow-up"
    assert bars["marker"]["symbol"][4] == "square"
    assert [round(x, 9) for x in bars["x"]] == [1.5, 1.5, 1.5, 11.5, 11.5, 11.5]
    assert bars["hovertext"][0].startswith("layer<br>step 0<br>loss 1 to infinite")
    assert figure.table.rows[2] == ("layer", "0", "1 to infinite", words.MISSING, words.MISSING, "9")


def test_the_finding_along_the_gradient_has_the_weights_beside_every_beta() -> None:
    calm = (SmoothnessPoint(0, 1.2, 1.5, 2.0, 8.0, 10.0), SmoothnessPoint(10, 0.4, 0.5, 1.0, 4.0, 12.0))
    rough = (SmoothnessPoint(0, 1.0, 4.0, 4.0, 30.0, 9.0), SmoothnessPoint(10, 0.5, 1.5, 4.0, 20.0, 9.5))
    figure = gradient.along_gradient(looked_into(Measures(0, smoothness=rough), Measures(0, smoothness=calm)))
    assert figure
    assert figure.finding.replace("\xa0", " ") == (
        "Medians over the steps: the loss ranges over layer 0.2 nats and batch 2 nats; "
        "β is layer 6 (‖W‖ 11) and batch 25 (‖W‖ 9.25)."
    )
    hovered = of_label(figure, "batch", "y3")[0]
    assert hovered["y"] == [30.0, 20.0]
    assert hovered["hovertext"][1] == "batch<br>step 10<br>Effective β 20<br>‖W‖ 9.5"
    assert of_label(figure, "batch", "y4")[0]["y"] == [9.0, 9.5]


def test_a_loss_far_above_chance_leaves_the_panel_with_an_arrow() -> None:
    spike = (SmoothnessPoint(0, 1.0, 1e6, 1.0, 1.0, 1.0), SmoothnessPoint(5, 0.5, 1.0, 1.0, 1.0, 1.0))
    figure = gradient.along_gradient(looked_into(Measures(0, smoothness=spike)))
    assert figure
    (bars,) = of_label(figure, "batch")
    assert bars["y"][1] == pytest.approx(2 * report_example.CHANCE)
    assert bars["marker"]["symbol"][1] == "arrow-up"
    assert "1 × 10⁶" in bars["hovertext"][1]  # noqa: RUF001
    assert figure.layout["yaxis"]["range"][1] < 10


def test_curvature_is_a_share_of_the_threshold() -> None:
    points = (SharpnessPoint(0, 2.0, -1.0, 0.5, 8.0), SharpnessPoint(10, 8.8, -2.0, 1.0, 8.0))
    sizes = (SmoothnessPoint(0, 1.0, 2.0, 1.0, 1.0, 24.0),)
    figure = curvature.sharpness(looked_into(Measures(0, smoothness=sizes, sharpness=points)))
    assert figure
    limit, line = of_label(figure, "batch")
    assert (limit["y"], limit["line"]["dash"]) == ([8.0, 8.0], "dot")
    assert line["y"] == [2.0, 8.8]
    assert "‖W‖ 24" in line["hovertext"][0]
    assert of_label(figure, "batch", "y2")[0]["y"] == pytest.approx([0.25, 1.1])
    assert figure.finding == "Largest eigenvalue as a share of the threshold when last measured: batch 1.1."
    assert figure.table.rows[0] == ("batch", "0", "2", "−1", "0.5", "8", "0.25", "24")  # noqa: RUF001
    assert "2/λ at the start may train" in figure.reading


def test_an_optimizer_without_a_threshold_has_curvature_alone() -> None:
    points = (SharpnessPoint(0, 2.0, -1.0, 0.5, None), SharpnessPoint(10, 300.0, None, 1.0, None))
    figure = curvature.sharpness(looked_into(Measures(0, sharpness=points)))
    assert figure
    assert figure.finding == "Largest eigenvalue when last measured: batch 300."
    assert figure.reading.endswith("This optimizer has no threshold of the kind 2/lr.")
    assert "yaxis2" not in figure.layout
    assert figure.layout["yaxis"]["type"] == "log"


def test_activations_grow_with_depth_before_and_after() -> None:
    deep = tuple(ActivationPoint(f"l{index}", 0.5 * 2.0**index, 3.0) for index in range(5))
    flat = (ActivationPoint("a", 1.0, 1.0), ActivationPoint("b", None, 0.5))
    figure = layers.activations(looked_into(Measures(0, activations=deep), Measures(0, activations=flat)))
    assert figure
    before, after = of_label(figure, "batch"), of_label(figure, "batch", "y2")
    assert before[0]["x"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert before[0]["y"] == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert after[0]["y"] == [3.0] * 5
    assert figure.finding == (
        "From the first layer to the last the rms changes by: batch 16× before training, 1× after; "  # noqa: RUF001
        f"layer {words.MISSING} before training, 0.5× after."  # noqa: RUF001
    )
    assert before[0]["hovertext"][4] == "batch<br>layer l4, 5 of 5<br>rms 8"


def test_the_gap_has_three_bars_for_what_remembers_statistics() -> None:
    summary = looked_into(Measures(0, gap=GapPoint(1.79, 1.4, 1.58)), Measures(0))
    figure = layers.gap(summary)
    assert figure
    assert [trace["x"] for trace in figure.traces] == [[1.79], [1.4], [1.58]]
    told = [trace["text"][0].replace("\xa0", " ") for trace in figure.traces]
    assert told == ["moving 1.79 nats", "batch 1.4 nats", "recalibrated 1.58 nats"]
    assert figure.finding.replace("\xa0", " ") == (
        "The loss of batch is 0.39 nats higher with moving statistics than with those of a batch; "
        "recalibrated ones give 1.58 nats instead of 1.79 nats."
    )


@pytest.mark.parametrize(
    ("found", "finding"),
    [
        (GapPoint(0.2, 0.2001, 0.2), "The loss of batch is the same in both modes: 0.2 nats."),
        (GapPoint(None, 0.2, 0.3), "batch has no finite loss in one of the two modes."),
        (
            GapPoint(0.1, 0.3, None),
            "The loss of batch is 0.2 nats lower with moving statistics than with those of a batch.",
        ),
    ],
)
def test_gaps_in_words(found: GapPoint, finding: str) -> None:
    figure = layers.gap(looked_into(Measures(0, gap=found)))
    assert figure
    assert figure.finding.replace("\xa0", " ") == finding


def varied(direction: str = "max") -> Summary:
    """One normalization at two batch sizes and two optimizers."""
    summary = report_example.one()
    scores = {(8, "sgd"): 80.0, (8, "adamw"): 85.0, (128, "sgd"): 95.0, (128, "adamw"): None}
    variants = tuple(
        VariantSummary((("batch_size", size), ("optimizer", name)), 0.1, score, Edge(0.4, 0.4, 0.4, seeds=3))
        for (size, name), score in scores.items()
    )
    settings = replace(
        summary.settings,
        direction=direction,  # type: ignore[arg-type]
        axes=(("batch_size", (8, 128)), ("optimizer", ("sgd", "adamw"))),
    )
    norm = replace(summary.norms[0], variant=variants[2].variant, variants=variants)
    return replace(summary, settings=settings, norms=(norm,))


def test_an_axis_shows_the_best_of_the_other_axes() -> None:
    by_size, by_name = axes.figures(varied())
    line, chosen = of_label(by_size, "batch")
    assert line["y"] == [85.0, 95.0]
    assert line["x"] == pytest.approx([0.90309, 2.10721])
    assert chosen["y"] == [95.0]
    assert "batch size 8, optimizer adamw" in line["hovertext"][0]
    assert "tolerates 0.4" in line["hovertext"][0]
    assert by_size.finding.replace("\xa0", " ") == "From batch size 8 to 128: batch 85.00 % to 95.00 %."
    assert len(by_size.table.rows) == 4
    assert of_label(by_name, "batch")[0]["x"] == [0.0, 1.0]
    assert by_name.finding.replace("\xa0", " ") == "By optimizer: batch sgd 95.00 %, adamw 85.00 %."
    assert by_name.name == "axis-optimizer"


def test_where_less_is_better_the_best_of_an_axis_is_the_smallest() -> None:
    by_size, _ = axes.figures(varied("min"))
    assert of_label(by_size, "batch")[0]["y"] == [80.0, 95.0]


def test_a_value_at_which_every_run_diverged_breaks_the_line() -> None:
    figure = axes.figures(report_example.measured())[0]
    assert of_label(figure, "none")[0]["y"][0] is None
    assert f"none {words.MISSING} to 88.10" in figure.finding


def test_only_costs_that_differ_are_drawn() -> None:
    summary = report_example.measured()
    figure = cost.figure(summary)
    assert figure
    titles = [figure.layout[name]["title"]["text"] for name in figure.layout if name.startswith("xaxis")]
    assert titles == ["Time a step (ms)", "Kept a step (MiB)"]
    assert "In parameters they differ by less than 5 %: the table has it." in figure.reading
    assert [column.name for column in figure.table.columns[2:]] == [*titles, "Parameters"]
    batch = next(trace for trace in figure.traces if trace.get("legendgroup") == "batch" and "error_y" in trace)
    norm = summary.norms[0]
    assert (batch["x"], batch["y"]) == ([2.41], [norm.mean])
    assert norm.mean
    assert batch["y"][0] - batch["error_y"]["arrayminus"][0] == pytest.approx(norm.low)
    grown = replace(summary, norms=(*summary.norms[:4], replace(summary.norms[4], parameters=1_000)))
    widened = cost.figure(grown)
    assert widened
    assert "xaxis3" in widened.layout


def test_without_a_cost_that_differs_there_is_no_figure() -> None:
    assert cost.figure(report_example.own_loop()) is None
    assert cost.figure(report_example.one()) is None


def cells_of(*records: Record, **changes: Any) -> tuple[Summary, NormSummary]:
    summary = report_example.one()
    norm = replace(summary.norms[0], selection=records, **changes)
    return replace(summary, norms=(norm,)), norm


def scored(lr: float, seed: int, outcome: str, score: float | None) -> Record:
    return replace(trial(lr, seed, outcome, None), score=score)


def test_the_map_marks_what_failed_by_letter_and_the_best_by_a_star() -> None:
    summary, _ = cells_of(
        *(scored(0.1, seed, "trains", 90.0 + seed) for seed in range(2)),
        *(scored(1.0, 0, "trains", 80.0), scored(1.0, 1, "stuck", 10.0)),
        *(scored(4.0, 0, "diverged", None), scored(4.0, 1, "trains", 70.0)),
        lr_best=0.1,
    )
    figure = heat.figure(summary)
    assert figure
    grid, marked = figure.traces
    assert grid["z"] == [[90.5, 45.0, None]]
    assert marked["text"] == ["★", "S", "D"]
    assert marked["x"] == pytest.approx([-1.0, 0.0, 0.60206])
    assert "1 trains, 1 diverged" in grid["text"][0][2]
    assert figure.finding.replace("\xa0", " ") == (
        "Rates at which more than half of the seeds train: batch 0.1 to 0.1, 90.50 % at 0.1."
    )


def test_a_cell_of_the_map_is_as_wide_as_the_grid_of_its_own_normalization() -> None:
    summary, _ = cells_of(*(scored(lr, 0, "trains", 90.0) for lr in (0.01, 0.1, 10.0)))
    figure = heat.figure(summary)
    assert figure
    assert figure.traces[0]["x"] == pytest.approx([-2.5, -1.5, 0.0, 2.0])


def test_the_colours_of_the_map_span_what_trains_and_turn_where_less_is_better() -> None:
    summary, _ = cells_of(scored(0.1, 0, "trains", 90.0), scored(0.2, 0, "trains", 80.0), scored(1.0, 0, "stuck", 10.0))
    figure = heat.figure(summary)
    turned = heat.figure(replace(summary, settings=replace(summary.settings, direction="min")))
    assert figure
    assert turned
    assert [figure.layout["coloraxis"][name] for name in ("cmin", "cmax", "reversescale")] == [80.0, 90.0, False]
    assert turned.layout["coloraxis"]["reversescale"]


def test_the_marks_of_the_map_stand_out_from_their_cells() -> None:
    weak, strong = scored(0.1, 0, "trains", 60.0), scored(1.0, 0, "trains", 95.0)
    stuck = scored(2.0, 0, "stuck", 94.0)
    for best, colour in ((0.1, "var(--ink)"), (1.0, "var(--paper)")):
        summary, _ = cells_of(weak, strong, stuck, lr_best=best)
        figure = heat.figure(summary)
        assert figure
        assert dict(zip(figure.traces[1]["text"], figure.traces[1]["textfont"]["color"], strict=True)) == {
            "★": colour,
            "S": "var(--paper)",
        }
    nothing, _ = cells_of(stuck, lr_best=2.0)
    figure = heat.figure(nothing)
    assert figure
    assert figure.traces[1]["text"] == ["★S"]


def test_rates_that_a_sampler_drew_are_no_map_and_no_edges() -> None:
    assert heat.figure(report_example.sampled()) is None
    assert stability.edges(report_example.sampled()) is None


def test_the_control_is_drawn_under_each_edge() -> None:
    figure = stability.edges(report_example.measured())
    assert figure
    own = next(trace for trace in figure.traces if trace.get("name") == "0.5 of chance")
    entry, *control = [trace for trace in figure.traces if trace.get("legendgroup") == "control"]
    assert entry["name"] == "control"
    at_half = next(trace for trace in control if trace["marker"]["symbol"] == "circle-open-dot")
    assert at_half["x"] == pytest.approx([4.0 * 0.3, 0.71 * 0.9, 0.71 * 0.9, 0.5 * 0.9, 0.3 * 0.9])
    assert all(0 < above - below < 0.1 for above, below in zip(own["y"], at_half["y"], strict=True))
    assert not any(trace["showlegend"] for trace in control)
    assert "with gamma, beta and the output layer frozen" in at_half["hovertext"][0]
    assert [row[0] for row in figure.table.rows[4:6]] == ["none", "batch, control"]


def test_without_a_control_there_is_none() -> None:
    summary = report_example.example()
    assert stability.control_sentence(summary) is None
    figure = stability.edges(summary)
    assert figure
    assert "control" not in figure.reading
    assert len(tables.tolerance(summary).rows) == 5


def test_the_control_of_a_bound_has_no_octaves() -> None:
    summary = report_example.measured()
    beyond = {"0.5": Edge(8.0, 8.0, 8.0, seeds=3, censored=3)}
    norms = (replace(summary.norms[0], control=beyond), *summary.norms[1:])
    told = stability.control_sentence(replace(summary, norms=norms))
    assert told
    assert "batch 13.3× and at least 29.6×; layer 2.37× and 2.37× (1.2 and 1.2 octaves)" in told  # noqa: RUF001


def test_the_control_of_one_normalization_is_its_rate() -> None:
    full = report_example.measured()
    assert stability.control_sentence(replace(full, norms=full.norms[:1])) == (
        "In the control, batch tolerates 1.2 (0.849 to 1.7) instead of 4 (2.83 to 5.66)."
    )
