"""The report's page as a reader, a browser and a parser see it, and every state that it is made in."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import report_example

from normwise.report import axes, confirmation, cost, curvature, curves, gradient, heat, layers, rates, stability
from normwise.report.figures import Figure
from normwise.tuning.records import Summary
from tests.pages import own

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


def visible(page: str) -> str:
    """The text a reader sees, with plain spaces."""
    body = re.sub(r"<(script|style).*?</\1>", "", own(page), flags=re.DOTALL)
    return " ".join(Page(body).texts["body"][0].replace("\xa0", " ").split())


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
