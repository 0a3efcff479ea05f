"""What the report draws to compare: the axes, the costs, the map of rates, the control."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import report_example
from drawn_traces import of_label, trial

from normwise.report import axes, cost, heat, stability, tables, words
from normwise.tuning.records import Edge, NormSummary, Record, Summary, VariantSummary


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
