"""A page of figures: what it says, what it loads, and what it draws, without plotly's script."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

from plotly.offline import get_plotlyjs


class Text(HTMLParser):
    """The text of a page, and what it loads."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.loaded = "", []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value for name, value in attrs if name in ("src", "href") and value != "data:,"]

    def handle_data(self, data: str) -> None:
        self.text += data


def own(page: str) -> str:
    """The page without plotly's script."""
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def drawings(page: str) -> list[dict[str, Any]]:
    """The figures' JSON, as the browser would read it."""
    found = re.search(r"const drawings = (.*);\n", own(page))
    assert found
    return json.loads(found[1])
