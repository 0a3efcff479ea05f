"""The user's own code: finding it by name, calling it, and naming it when it fails."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normwise.errors import NormwiseError, StudyError

_LIBRARIES = ("site-packages", "dist-packages", str(Path(importlib.__file__).parents[1]))
_LONGEST = 300


def resolve(spec: str, role: str) -> Callable[..., Any]:
    """The callable that `module:attribute` names; the working directory is searched first, as `python -m` does.

    `role` is what the user meant it for ("model", "data", ...), for the error text.

    Raises StudyError when the module cannot be imported, lacks the attribute, or the attribute cannot be called.

    >>> resolve("math:prod", "model")([2, 3])
    6
    """
    module_name, colon, path = spec.partition(":")
    if not colon or not module_name or not path:
        raise StudyError(f"{role} {spec!r} is not of the form module:function")
    found = _import(module_name, f"{role} {spec!r}")
    for name in path.split("."):
        if not hasattr(found, name):
            raise StudyError(f"{role} {spec!r}: {module_name} has no attribute {path!r}")
        found = getattr(found, name)
    if not callable(found):
        raise StudyError(f"{role} {spec!r} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def _import(module_name: str, who: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    with blame(f"{who}: the module {module_name!r} cannot be imported:"):
        return importlib.import_module(module_name)


def name_of(function: Callable[..., Any]) -> str:
    """How a callable given in Python is called in the report, as `module:name`.

    >>> name_of(resolve)
    'normwise.tuning.user:resolve'
    """
    function = getattr(function, "func", function)  # functools.partial
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '?')}:{name}"


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn any exception of the user's code into one line: what was called, the exception, its file and line.

    Errors of the study itself pass unchanged.
    """
    try:
        yield
    except StudyError:
        raise
    except Exception as error:
        raise StudyError(f"{what} {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The exception in one line, with the file and line in the user's code that it comes from.

    normwise's own messages keep their lines, because a caret under a pattern needs them.

    >>> one_line(ValueError("no such width"))
    'ValueError: no such width'
    """
    if isinstance(error, NormwiseError):
        return str(error)
    text = " ".join(str(error).split())
    shown = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    message = f"{type(error).__name__}: {shown}" if shown else type(error).__name__
    place = _place(error)
    return f"{message} ({place})" if place else message


def _place(error: BaseException) -> str | None:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else None


def _is_users(filename: str) -> bool:
    own = str(Path(__file__).parents[1])
    return not filename.startswith(("<frozen", own)) and not any(library in filename for library in _LIBRARIES)
