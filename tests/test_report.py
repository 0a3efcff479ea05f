"""The report says what the summary says, in every state a study can end in."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import report_example
from plotly.offline import get_plotlyjs
from report_pages import VARIANTS, Page, cells, figures, visible

from normwise.report import render, tables
from normwise.report.figures import plain
from normwise.tuning.records import Edge
from tests.pages import drawings, own

SECTIONS = [
    "The answer",
    "Each normalization at its best",
    "Choosing the learning rate",
    "Confirmation on fresh seeds",
    "Training at the best learning rates",
    "Stability",
    "Inside the training",
    "Cost against quality",
    "What was fixed",
    "How to reproduce it",
]


@pytest.fixture(scope="module")
def page() -> str:
    return render(report_example.example())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_state_gives_one_complete_page(variant: str) -> None:
    page = own(render(VARIANTS[variant]()))
    parsed = Page(page)
    varied = ["By batch size and optimizer"] if variant == "measured" else []
    assert parsed.open == []
    assert [text.strip() for text in parsed.texts["h2"]] == [*SECTIONS[:-2], *varied, *SECTIONS[-2:]]
    assert not re.search(r"\b(None|nan|NaN|inf|Infinity|Undefined)\b", visible(render(VARIANTS[variant]())))
    identities = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(identities) == len(set(identities))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_refers_to_nothing_outside_itself(variant: str) -> None:
    page = own(render(VARIANTS[variant]()))
    elements = Page(page).elements
    assert [found[name] for _, found in elements for name in ("src", "href") if name in found] == ["data:,"]
    assert not re.search(r"url\(|@import|https?:", page)
    policies = [found["content"] for _, found in elements if "http-equiv" in found]
    assert policies == [
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    ]


def test_size_is_that_of_plotly_and_little_more(page: str) -> None:
    assert len(page.encode()) < len(get_plotlyjs().encode()) + 300_000


def test_leads_with_the_answer_its_evidence_and_the_warnings(page: str) -> None:
    summary = report_example.example()
    text = visible(page)
    places = [
        text.index(part)
        for part in (
            summary.verdict.sentence,
            "batch: mean accuracy 94.58 % [94.27, 94.88] over 10 fresh seeds at learning rate 0.5.",
            "batch over layer: 1.54 points [0.87, 2.21], simultaneous 95 %; margin 0.5 points; better.",
            summary.warnings[0],
            summary.warnings[1],
            "Each normalization at its best",
        )
    ]
    assert places == sorted(places)


def test_overview_has_every_number_of_a_normalization(page: str) -> None:
    assert cells(page, "none") == [
        "80.65\n[62.94, 98.37]",
        "88.27",
        "0.0625",
        "0.3\n(0.212 to 0.424)",
        "0.71\n(0.502 to 1)",
        "2.3",
        "1.71",
        "1 of 10",
        "1.46",
        "36.5",
        "52",
        "–",  # noqa: RUF001
    ]
    assert cells(page, "batch")[4] == "none up to 16"
    assert cells(page, "group (group:10)")[11] == "58,210"


def test_every_column_of_the_overview_is_explained(page: str) -> None:
    columns = tables.overview(report_example.example()).columns
    assert len(columns) == 13
    for column in columns:
        assert column.meaning.endswith(".")
        assert page.count(column.meaning.replace("'", "&#39;")) == 2  # tooltip and legend


def test_states_what_was_fixed_and_how_to_reproduce_it(page: str) -> None:
    summary, text = report_example.example(), visible(page)
    for value in (*summary.facts.values(), *summary.reproduce.values()):
        assert value in text
    assert "At 200 steps batch leads layer by 1.72 points; at 400 steps batch leads layer by 0.94 points." in text


def test_a_reversal_is_told() -> None:
    summary = report_example.example()
    assert summary.horizon
    turned = replace(summary, horizon=replace(summary.horizon, lead_doubled=-0.4, reversed=True))
    told = visible(render(turned))
    assert "at 400 steps layer leads batch by 0.40 points." in told
    assert "The order reverses: train longer before you rely on this answer." in told


def test_says_tolerates_and_gives_no_cause(page: str) -> None:
    text = visible(page)
    assert "Largest learning rate tolerated at half of chance: batch 4 (2.83 to 5.66)" in text
    assert "As a ratio to none: batch 13.3×" in text  # noqa: RUF001
    assert "smooth" not in text.lower()


@pytest.mark.parametrize(
    "label", ["<b>x</b>", "</script><script>alert(1)</script>", '" onmouseover="alert(1)', "a & b"]
)
def test_labels_are_text_everywhere(label: str) -> None:
    page = render(report_example.relabelled(label))
    parsed = Page(own(page))
    assert label in visible(page)
    assert [tag for tag, _ in parsed.elements if tag in {"b", "script"}] == ["script", "script"]
    assert not any("onmouseover" in attributes for _, attributes in parsed.elements)
    legend = next(trace for trace in drawings(page)[0]["data"] if trace.get("legendgroup") == label and "name" in trace)
    assert "<" not in legend["name"]
    described = next(trace for trace in drawings(page)[0]["data"] if trace.get("hovertext"))
    assert described["hovertext"][0].startswith(f"{plain(label)}<br>learning rate 0.00195, seed 0<br>validation loss ")


@pytest.mark.parametrize(("variant", "count"), [("five", 9), ("measured", 15), ("healthy", 13), ("sampled", 6)])
def test_each_figure_has_a_finding_and_its_data_as_a_table(variant: str, count: int) -> None:
    page = render(VARIANTS[variant]())
    elements = Page(own(page)).elements
    plots = [attributes for _, attributes in elements if attributes.get("class") == "plot"]
    assert [plot["id"] for plot in plots] == [drawing["name"] for drawing in drawings(page)]
    drawn = [figure for figure in figures(VARIANTS[variant]()) if figure]
    for plot, figure in zip(plots, drawn, strict=True):
        assert plot["role"] == "img"
        assert plot["aria-label"] == f"{figure.title}. {figure.finding}"
        assert len(figure.table.rows) >= (1 if figure.name == "gap" else 5)
        assert {len(row) for row in figure.table.rows} == {len(figure.table.columns)}
    numbered = re.findall(r"Figure (\d+)\. ", visible(page))
    assert numbered == [str(number) for number in range(1, count + 1)]
    assert sum(tag == "details" for tag, _ in elements) == len(plots) == count


def test_an_own_loop_without_losses_leaves_out_what_needs_them_and_says_why() -> None:
    summary = report_example.own_loop()
    assert [figure.name for figure in figures(summary) if figure] == ["rates", "map", "confirmation", "pairs"]
    text = visible(render(summary))
    assert "Figure 1. Accuracy against learning rate." in text
    assert "The training loop reported no losses, so the score itself is drawn." in text
    assert "Not drawn: the training loop reported no losses. Call trial.log(step, loss) in it" in text
    assert "Edges are not drawn: without losses, a run that trains cannot be told from one that is stuck." in text
    assert "Sensitivity is not drawn: the training loop reported no losses." in text
    assert "Data, batches, loss, optimizer and schedule are those of the training loop that was given." in text
    assert "cross_entropy" not in text
    assert "Nothing was measured inside your own loop: a nw.Monitor in it records the loss along the gradient" in text
    assert "The score is not drawn against cost: the steps of your own loop cannot be timed from outside." in text


def test_the_horizon_names_the_runner_ups_own_steps() -> None:
    full = report_example.example()
    assert full.horizon
    other = replace(full, horizon=replace(full.horizon, runner_up_steps=300))
    assert (
        "At 200 steps (layer at 300 of its own) batch leads layer by 1.72 points; "
        "at twice as many batch leads layer by 0.94 points." in visible(render(other))
    )


def test_a_study_in_which_nothing_trained_says_so() -> None:
    summary = report_example.nothing_trained()
    assert [figure.name for figure in figures(summary) if figure] == ["rates", "edges"]
    text = visible(render(summary))
    assert "batch: no score; no confirmation seed gave one." in text
    assert "No learning rate gave a finite median for any normalization." in text
    assert "No normalization trains to half of chance at any rate that was tried." in text
    assert "Not drawn: no confirmation seed gave a score." in text
    assert "Winner and runner-up were not run again at twice the steps" in text
    assert "Before you rely on it" not in text
    assert "Nothing was measured inside the training: no normalization was confirmed at a best rate." in text


def test_one_normalization_has_no_pair() -> None:
    assert "One normalization was studied, so there is no pair to compare." in visible(render(report_example.one()))


def test_a_study_without_any_trial_still_has_a_page() -> None:
    summary = report_example.nothing_trained()
    norms = tuple(
        replace(norm, selection=(), lr_train={}, lr_diverge=Edge(None, None, None, 0)) for norm in summary.norms
    )
    page = render(replace(summary, norms=norms))
    assert drawings(page) == []
    assert "Not drawn: the study holds no selection trials." in visible(page)
    assert "Edges are not drawn: no seed of any normalization has one." in visible(page)
