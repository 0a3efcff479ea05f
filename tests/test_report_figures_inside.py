"""What the report draws of the inside of a training: loss, curvature, activations, the gap."""

from __future__ import annotations

from dataclasses import replace

import pytest
import report_example
from drawn_traces import of_label

from normwise.report import axes, curvature, gradient, layers, words
from normwise.tuning.records import ActivationPoint, GapPoint, Measures, SharpnessPoint, SmoothnessPoint, Summary


def looked_into(*measures: Measures) -> Summary:
    """The first normalizations of the example, with these measures."""
    summary = report_example.example()
    norms = tuple(
        replace(norm, measures=own) for norm, own in zip(summary.norms[: len(measures)], measures, strict=True)
    )
    return replace(summary, norms=norms)


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
