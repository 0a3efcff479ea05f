"""The report in a browser: drawn, quiet, offline, and readable on every screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import report_example

from normwise.report import write

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
VARIANTS = {
    "five": report_example.example,
    "twelve": report_example.twelve,
    "own-loop": report_example.own_loop,
    "nothing-trained": report_example.nothing_trained,
    "markup": lambda: report_example.relabelled("<b>mine</b>"),
    "measured": report_example.measured,
}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"Chromium is not installed at {CHROMIUM}"),
]


@dataclass
class Seen:
    """What a page did while it was open."""

    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


Opened = Callable[[str], tuple[Any, Seen]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    return {name: write(build(), folder / f"{name}.html") for name, build in VARIANTS.items()}


def visit(browser: Any, path: Path, **options: Any) -> tuple[Any, Seen]:
    """The page, opened from disk, and everything that it asked for or complained about."""
    context = browser.new_context(**{"viewport": DESKTOP, "color_scheme": "light", **options})
    page, seen = context.new_page(), Seen()
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("console", lambda message: seen.messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.messages.append(str(error)))
    page.goto(path.as_uri())
    return page, seen


@pytest.fixture(scope="module")
def opened(browser: Any, reports: dict[str, Path]) -> Opened:
    """The page of a variant on a desktop, opened once for all tests that only look: a page draws for seconds."""
    return cache(lambda variant: visit(browser, reports[variant]))


def until(page: Any, condition: str) -> None:
    """Wait for a condition. The report's own policy forbids the eval that playwright's waiting needs."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never came true: {condition}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_plot_draws_and_nothing_is_requested_or_complained_of(
    opened: Opened, reports: dict[str, Path], variant: str
) -> None:
    page, seen = opened(variant)
    drawn = page.eval_on_selector_all(
        ".plot",
        "plots => plots.map(p => p.querySelectorAll('svg .point, svg .js-line, svg .bars path, svg .hm image').length)",
    )
    assert drawn
    assert min(drawn) > 0
    assert seen.requests == [reports[variant].as_uri()]
    assert seen.messages == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_phone_scrolls_in_one_direction(browser: Any, reports: dict[str, Path], variant: str) -> None:
    page, seen = visit(browser, reports[variant], viewport=PHONE, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    wide = page.eval_on_selector(".wide .scroll", "box => box.scrollWidth > box.clientWidth")
    plots = page.eval_on_selector_all(".plot svg.main-svg", "all => all.map(svg => svg.getBoundingClientRect().right)")
    page.context.close()
    assert wide
    assert max(plots) <= PHONE["width"]
    assert seen.messages == []


def test_dark_mode_changes_page_and_plots_at_once_and_keeps_what_was_hidden(
    browser: Any, reports: dict[str, Path]
) -> None:
    page, seen = visit(browser, reports["five"])
    page.locator("#rates .legendtoggle").nth(1).click()
    until(page, "document.querySelector('#rates')._fullData[4].visible === 'legendonly'")
    light = _colours(page)
    page.emulate_media(color_scheme="dark")
    until(page, f"getComputedStyle(document.querySelector('#rates .xtick text')).fill !== '{light[1]}'")
    dark = _colours(page)
    hidden = page.evaluate("document.querySelector('#rates')._fullData[4].visible")
    page.context.close()
    assert all(one != other for one, other in zip(light, dark, strict=True))
    assert hidden == "legendonly"
    assert seen.messages == []


def _colours(page: Any) -> list[str]:
    return [
        page.evaluate("getComputedStyle(document.documentElement).backgroundColor"),
        page.eval_on_selector("#rates .xtick text", "text => getComputedStyle(text).fill"),
        page.eval_on_selector("#rates .js-line", "line => getComputedStyle(line).stroke"),
    ]


def test_hovering_shows_values_with_units(opened: Opened) -> None:
    page, _ = opened("markup")
    page.locator("#confirmation").scroll_into_view_if_needed()
    box = page.locator("#confirmation .points path").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#confirmation .hoverlayer .hovertext")
    text = page.locator("#confirmation .hoverlayer").first.text_content().replace("\xa0", " ")
    assert "<b>mine</b>" in text
    assert "learning rate 0.5" in text
    assert " %" in text


def test_the_curves_name_their_seed(opened: Opened) -> None:
    page, _ = opened("five")
    page.locator("#curves").scroll_into_view_if_needed()
    page.evaluate("Plotly.Fx.hover('curves', [{curveNumber: 1, pointNumber: 30}])")
    text = page.locator("#curves .hoverlayer").first.text_content()
    assert "batch, seed 1000" in text
    assert "step 60" in text
    assert "nats" in text


def test_a_table_can_be_read_without_a_mouse(opened: Opened) -> None:
    page, _ = opened("five")
    page.locator("#rates ~ details summary").focus()
    page.keyboard.press("Enter")
    text = page.locator("#rates ~ details table").inner_text()
    assert "3 diverged" in text


def test_code_is_copied_by_keyboard(opened: Opened) -> None:
    page, seen = opened("measured")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#inside ~ .findings .copy").first.focus()
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#inside ~ .findings .copy').textContent === 'Copied'")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == report_example.FINDINGS[0].fix
    assert seen.messages == []


def test_the_map_has_the_colours_of_the_page(browser: Any, reports: dict[str, Path]) -> None:
    page, seen = visit(browser, reports["measured"])
    scale = "document.querySelector('#map')._fullLayout.coloraxis.colorscale.map(stop => stop[1])"
    light = page.evaluate(scale)
    page.emulate_media(color_scheme="dark")
    until(page, f"{scale}[1] !== '{light[1]}'")
    dark = page.evaluate(scale)
    letters = set(page.eval_on_selector_all("#map .textpoint", "all => all.map(text => text.textContent)"))
    page.context.close()
    assert light == ["#eef2f0", "#0a5a8a"]
    assert dark == ["#232a30", "#8fd0f7"]
    assert letters == {"D", "S", "★"}
    assert seen.messages == []


def test_a_click_in_the_legend_hides_a_normalization_in_every_panel(browser: Any, reports: dict[str, Path]) -> None:
    page, _ = visit(browser, reports["measured"])
    shown = "document.querySelector('#gradient')._fullData.filter(t => t.legendgroup === 'none' && t.visible === true)"
    before = page.evaluate(f"{shown}.length")
    page.locator("#gradient .legendtoggle").last.click()
    until(page, f"{shown}.length === 0")
    page.context.close()
    assert before == 5  # the entry, the bars and three lines


def test_print_is_light_and_fits_the_page(browser: Any, reports: dict[str, Path]) -> None:
    page, seen = visit(browser, reports["five"], color_scheme="dark")
    dark = _colours(page)
    page.emulate_media(media="print", color_scheme="dark")
    until(page, "document.documentElement.classList.contains('printing')")
    paper = _colours(page)
    body = page.eval_on_selector("body", "body => body.getBoundingClientRect().right")
    widths = page.eval_on_selector_all(".plot svg.main-svg", "all => all.map(svg => svg.getBoundingClientRect().right)")
    assert all(one != other for one, other in zip(dark, paper, strict=True))
    assert max(widths) <= body + 1
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    page.emulate_media(media="screen", color_scheme="dark")
    until(page, "!document.documentElement.classList.contains('printing')")
    assert _colours(page) == dark
    page.context.close()
    assert seen.messages == []


def test_no_button_sends_the_plot_anywhere(opened: Opened) -> None:
    page, _ = opened("five")
    buttons = page.eval_on_selector_all("#rates .modebar-btn", "all => all.map(b => b.dataset.title)")
    assert len(buttons) == 4
    assert not [title for title in buttons if "cloud" in title.lower() or "link" in title.lower()]
