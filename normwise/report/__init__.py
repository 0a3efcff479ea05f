"""From a study's summary to one HTML file that needs nothing else.

`render` returns the page, `write` puts it on disk.
"""

from normwise.report.page import render, write

__all__ = ["render", "write"]
