"""What every page is made with: the templates, plotly's script, and a file that is written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

from normwise.errors import MissingExtraError, StudyError

try:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs
except ModuleNotFoundError as error:
    raise MissingExtraError("the report", "tune") from error


@cache
def template(name: str, package: str = "normwise.report") -> Template:
    """A template of a package's `assets`, which may build on the report's. Every text in it is escaped."""
    packages = dict.fromkeys((package, "normwise.report"))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(one, "assets") for one in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    return environment.get_template(name)


def script() -> Markup:
    """Plotly, whole, so that a page needs nothing from anywhere."""
    return Markup(get_plotlyjs())  # noqa: S704 - plotly's own script, which no input reaches


def written(page: str, path: str | os.PathLike[str], what: str) -> Path:
    """Write a page to a file, all of it or nothing: a reader never finds half a page.

    Raises:
        StudyError: the file cannot be written.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(page, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        why = f"{error.strerror}. Give a file name in a folder that exists and can be written."
        raise StudyError(f"cannot write the {what} to {target}: {why}") from error
    return target
