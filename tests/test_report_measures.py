"""What the report tells of what was measured inside: the doctor, the axes, the control."""

from __future__ import annotations

from dataclasses import replace

import report_example
from report_pages import Page, cells, visible

from normwise.report import axes, render, words
from normwise.tuning.records import VariantSummary
from tests.pages import own


def test_a_study_that_is_healthy_says_so_and_how_to_see_more() -> None:
    text = visible(render(report_example.healthy()))
    assert "What the doctor finds in batch" in text
    assert "A clean bill: the doctor examined the network at the end of this training and has no finding." in text
    assert "The control, which holds gamma, beta and the output layer still, was not run: --control runs it." in text
    assert "Batch size, optimizer, start and the rest had one value each. Several, as in --batch-size 8,32,128," in text
    assert "Confidence: " not in text
    assert "· control" not in text


def test_what_the_doctor_finds_stands_with_its_code() -> None:
    page = render(report_example.measured())
    text, codes = visible(page), [code.strip() for code in Page(own(page)).texts["code"]]
    assert (
        "Statistics of 8 samples are noisy. In block.1.norm, block.2.norm. "
        "samples a statistic: 8; expected at least 16. Confidence: likely." in text
    )
    for found in report_example.FINDINGS:
        assert found.fix in codes
    assert "A clean bill" not in text


def test_a_doctor_that_was_not_asked_is_not_a_clean_bill() -> None:
    full = report_example.healthy()
    norms = tuple(replace(n, measures=replace(n.measures, findings=None)) for n in full.norms if n.measures)
    text = visible(render(replace(full, norms=norms)))
    assert "clean bill" not in text
    assert "The doctor was not asked about the winner: nw.doctor(model, batches) examines a trained model." in text


def test_what_could_not_be_measured_is_named() -> None:
    full = report_example.healthy()
    norms = tuple(
        replace(norm, measures=replace(norm.measures, sharpness=(), gap=None)) for norm in full.norms if norm.measures
    )
    text = visible(render(replace(full, norms=norms)))
    assert (
        "The curvature could not be computed. There is no gap between training and evaluation to draw: nothing here "
        "remembers statistics." in text
    )
    assert "The activations could not be measured" not in text


def test_measures_are_told_without_a_cause_and_in_their_mode() -> None:
    text = visible(render(report_example.measured()))
    assert "smooth" not in text.lower()
    assert (
        "once more at its own best learning rate, from one seed (1000), and looked into on the way, in training" in text
    )
    assert "It does not say why one scores better than another." in text
    assert "Curvature of training mode: that of evaluation mode is another one." in text
    assert "It bounds no other rate: far more than 2/λ at the start may train" in text


def test_a_sampler_has_dashes_instead_of_edges_and_says_why() -> None:
    page = render(report_example.sampled())
    text = visible(page)
    why = "the tpe sampler drew the learning rates, and drawn rates enclose no edge; --sampler grid finds them."
    assert cells(page, "batch")[3:7] == [words.MISSING] * 4
    assert f"under lr_train, lr_diverge, Margin and Sensitivity: {why}" in text
    assert f"Edges are not drawn: {why}" in text
    assert "Sensitivity is not drawn for the same reason: it is a mean over a grid." in text
    assert "--control" not in text
    assert cells(page, "Sampler") == ["tpe, 14 points a normalization"]


def test_with_axes_the_overview_names_the_best_combination() -> None:
    page = render(report_example.measured())
    assert cells(page, "batch")[2:4] == ["batch size 128\noptimizer sgd", "0.5"]
    assert cells(page, "Batch size") == ["8, 32, 128 (each at its best)"]
    assert cells(page, "Control") == ["gamma, beta and the output layer frozen"]
    assert "had one value each" not in visible(page)


def test_the_control_stands_beside_every_edge() -> None:
    page = render(report_example.measured())
    assert cells(page, "· control") == [
        *("2.28\n(1.61 to 3.22)", "4.44×"),  # noqa: RUF001
        *("1.2\n(0.849 to 1.7)", "4.44×"),  # noqa: RUF001
        *("0.96\n(0.679 to 1.36)", "4.44×"),  # noqa: RUF001
        words.MISSING,
    ]
    assert (
        "As a ratio to none, in the study and in the control: batch 13.3× and 4.44× (3.7 and 2.2 octaves); "  # noqa: RUF001
        in visible(page)
    )


def test_a_combination_with_a_failed_seed_is_not_drawn_as_the_best() -> None:
    whole, broken = (
        VariantSummary((("batch_size", 8), ("optimizer", name)), 0.1, score, None, failed)
        for name, score, failed in (("sgd", 80.0, 0), ("adamw", 90.0, 2))
    )
    found = axes._best((broken, whole), "batch_size", (8, 32), largest=True)
    assert found == {8: whole, 32: None}
