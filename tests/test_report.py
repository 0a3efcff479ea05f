"""The report says what the summary says, in every state a study can end in."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_example
from plotly.offline import get_plotlyjs

from normwise.errors import MissingExtraError, StudyError
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
    render,
    stability,
    tables,
    words,
    write,
)
from normwise.report import page as page_module
from normwise.report.figures import Figure, plain
from normwise.tuning.records import Edge, Summary
from normwise.tuning.summary import summary_from_dict

VARIANTS = {
    "five": report_example.example,
    "one": report_example.one,
    "twelve": report_example.twelve,
    "own loop": report_example.own_loop,
    "nothing trained": report_example.nothing_trained,
    "markup": lambda: report_example.relabelled("<img src=x onerror=alert(1)>"),
    "measured": report_example.measured,
    "healthy": report_example.healthy,
    "sampled": report_example.sampled,
}
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
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Text by element, attributes, and a check that every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


def own(page: str) -> str:
    """The page without plotly's script."""
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def visible(page: str) -> str:
    """The text a reader sees, with plain spaces."""
    body = re.sub(r"<(script|style).*?</\1>", "", own(page), flags=re.DOTALL)
    return " ".join(Page(body).texts["body"][0].replace("\xa0", " ").split())


def drawings(page: str) -> list[dict[str, Any]]:
    """The figures' JSON, as the browser would read it."""
    found = re.search(r"const drawings = (.*);\n", own(page))
    assert found
    return json.loads(found[1])


def cells(page: str, heading: str) -> list[str]:
    """The cells of the first table row that starts with a heading."""
    row = re.search(rf'<th scope="row">{re.escape(heading)}</th>(.*?)</tr>', page, flags=re.DOTALL)
    assert row
    return [cell.replace("\xa0", " ") for cell in re.findall(r"<td>(.*?)</td>", row[1], flags=re.DOTALL)]


def figures(summary: Summary) -> list[Figure | None]:
    """Every figure in the order of the page."""
    confirmed = [confirmation.scores(summary), confirmation.pairs(summary)]
    stable = [stability.edges(summary), stability.sensitivity(summary), curves.weights(summary)]
    inside = [gradient.along_gradient(summary), curvature.sharpness(summary), layers.activations(summary)]
    return [
        *(rates.figure(summary), heat.figure(summary)),
        *(*confirmed, curves.losses(summary), *stable),
        *(*inside, layers.gap(summary), cost.figure(summary), *axes.figures(summary)),
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


def test_a_summary_read_back_gives_the_same_page() -> None:
    full = report_example.measured()
    again = summary_from_dict(json.loads(json.dumps(full.to_dict())))
    assert again == full
    assert render(again) == render(full)


def test_a_page_with_everything_is_rendered_in_less_than_a_second() -> None:
    full = report_example.measured()
    render(full)
    start = time.process_time()
    render(full)
    assert time.process_time() - start < 1.0


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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (99999.0, "1 × 10⁵"),  # noqa: RUF001
        (12345.0, "12345"),
        (0.00012, "0.00012"),
        (0.000012, "1.2 × 10⁻⁵"),  # noqa: RUF001
        (-0.5, "−0.5"),  # noqa: RUF001
        (math.nan, "–"),  # noqa: RUF001
        (math.inf, "–"),  # noqa: RUF001
        (None, "–"),  # noqa: RUF001
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert words.number(value) == text


def test_render_is_the_same_twice() -> None:
    assert render(report_example.example()) == render(report_example.example())


def test_write_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write(report_example.one(), path) == path
    assert path.read_text(encoding="utf-8") == render(report_example.one())
    assert list(tmp_path.iterdir()) == [path]


def test_write_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def half(self: Path, text: str, encoding: str) -> int:
        with self.open("w", encoding=encoding) as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(StudyError, match="No space left on device"):
        write(report_example.one(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_names_the_folder_that_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "report.html"
    with pytest.raises(StudyError) as caught:
        write(report_example.one(), path)
    assert str(caught.value) == (
        f"cannot write the report to {path}: No such file or directory. "
        "Give a file name in a folder that exists and can be written."
    )


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError) as caught:
        importlib.reload(page_module)
    assert str(caught.value) == "the report needs packages that are not installed: pip install 'normwise[tune]'"
