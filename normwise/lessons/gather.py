"""All lessons: where their scripts are, and running them in a few processes at a time."""

from __future__ import annotations

import difflib
import importlib.util
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch

from normwise.errors import StudyError
from normwise.lessons.lesson import Lesson, Measure, Size

NAMES = (  # in the order in which they build on each other
    "linear",
    "conditioning",
    "inputs",
    "depth",
    "convolutions",
    "smoothness",
    "placement",
    "edge_of_stability",
    "small_batches",
    "recalibration",
    "explosion",
    "recurrent",
)
_PACKAGE = Path(__file__).parent.parent
_PLACES = (_PACKAGE / "_lessons", _PACKAGE.parent / "examples" / "lessons")  # of an installed package; of a source tree


def script(name: str) -> Path:
    """The file of a lesson.

    Raises:
        StudyError: there is no such lesson, or it was not installed.

    >>> script("linear").name
    'linear.py'
    """
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise StudyError(f"no lesson named {name!r}; there are {', '.join(NAMES)}{hint}")
    found = next((path for place in _PLACES if (path := place / f"{name}.py").exists()), None)
    if found is None:
        raise StudyError(f"the lesson {name!r} is not in {' or '.join(map(str, _PLACES))}: install normwise again")
    return found


def measure_of(name: str) -> Measure:
    """The function `measure` of a lesson's script."""
    spec = importlib.util.spec_from_file_location(f"normwise_lesson_{name}", script(name))
    if spec is None or spec.loader is None:
        raise StudyError(f"the lesson {name!r} at {script(name)} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Measure, module.measure)


def run(
    names: Sequence[str] = NAMES,
    size: Size = "full",
    *,
    workers: int = 2,
    progress: Callable[[Lesson], object] | None = None,
) -> tuple[Lesson, ...]:
    """Measure lessons, each in a process of its own with one thread, and return them in the order of their names.

    Args:
        names: Which ones.
        size: "small", as in continuous integration, or "full", some minutes.
        workers: How many at a time; 0: in this process.
        progress: Called with every lesson when it has ended.

    Raises:
        StudyError: an unknown name.
    """
    for name in names:
        script(name)
    tell = progress or (lambda lesson: None)
    found = {}
    for name, lesson in _here(names, size) if workers == 0 else _beside(names, size, workers):
        found[name] = lesson
        tell(lesson)
    return tuple(found[name] for name in names)


def _here(names: Sequence[str], size: Size) -> Iterator[tuple[str, Lesson]]:
    for name in names:
        yield name, measure_of(name)(size)


def _beside(names: Sequence[str], size: Size, workers: int) -> Iterator[tuple[str, Lesson]]:
    """In processes that start afresh; Ctrl-C is for this one, which then ends them."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start) as pool, _ended(pool):
        futures = {pool.submit(_measured, name, size): name for name in names}
        for future in as_completed(futures):
            yield futures[future], future.result()


@contextmanager
def _ended(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Nothing goes on in the pool when an exception or an interrupt leaves it."""
    try:
        yield
    except BaseException:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _measured(name: str, size: Size) -> Lesson:
    return measure_of(name)(size)
