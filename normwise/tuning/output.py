"""The output folder: study.db, trials.csv, summary.json, report.html, and what may be done to one that is there."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from normwise.errors import StudyError
from normwise.tuning.records import Record, Summary

STUDY, TRIALS, SUMMARY, REPORT = "study.db", "trials.csv", "summary.json", "report.html"
LOCK = ".lock"  # there while a study is running
_FILES = (STUDY, f"{STUDY}-journal", TRIALS, SUMMARY, REPORT)
_ENDS = {"low": -math.inf, "high": math.inf}  # of a comparison's interval, where too few seeds bound it
_MEASURED = ("outcome", "score", "first_loss", "tail_loss", "val_loss", "test_loss", "weight_norm", "seconds")


def check(out: Path, *, resume: bool, force: bool) -> None:
    """Refuse a folder that cannot be written to, and one that is there and was not asked for.

    Raises StudyError that names the folder and the way out.
    """
    if out.exists() and not out.is_dir():
        raise StudyError(f"{out} is a file, not a folder")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise StudyError(f"{out} cannot be made: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StudyError(f"{out} cannot be written to: no permission in {nearest}")
    if not (resume or force) and out.is_dir() and any(out.iterdir()):
        raise StudyError(
            f"{out} exists already: --resume goes on with the study in it, --force replaces it, "
            "--out names another folder"
        )


class Folder:
    """The folder made and locked; taken away again unless something is kept.

    With `force` an earlier study is set aside, and put back if nothing is kept of the new one. Only the files that a
    study writes are ever touched, and only folders that were made here are removed. `out` may be None: then there is
    nothing to do.

    Raises StudyError when the folder cannot be written to, or another process is at work in it.
    """

    def __init__(self, out: Path | None, *, resume: bool, force: bool) -> None:
        self._out, self._kept = out, resume
        self._made: list[Path] = []
        if out is None:
            return
        self._made = [folder for folder in (out, *out.parents) if not folder.exists()]
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(out / LOCK)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise StudyError(f"{out} is in use: another study is running in it") from None
        except OSError as error:
            raise StudyError(f"{out} cannot be written to: {error.strerror}") from error
        if force:
            _move(out, _plain, _aside)

    def keep(self) -> None:
        """Something worth keeping is in it now."""
        if not self._kept and self._out is not None:
            _clear(self._out, _aside)
        self._kept = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._out is None:
            return
        if not self._kept:
            _clear(self._out, _plain)
            _move(self._out, _aside, _plain)
        self._lock.release()
        (self._out / LOCK).unlink(missing_ok=True)
        for folder in [] if self._kept else self._made:
            with suppress(OSError):  # someone else's file is in it by now
                folder.rmdir()


def _plain(name: str) -> str:
    return name


def _aside(name: str) -> str:
    return f".{name}.replaced"


def _move(out: Path, source: Callable[[str], str], target: Callable[[str], str]) -> None:
    for name in _FILES:
        if (out / source(name)).exists():
            (out / source(name)).replace(out / target(name))


def _clear(out: Path, named: Callable[[str], str]) -> None:
    for name in _FILES:
        (out / named(name)).unlink(missing_ok=True)


def write(out: Path, name: str, text: str) -> Path:
    """Write a file so that it is there in whole or not at all."""
    path = out / name
    part = path.with_name(f".{name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise StudyError(f"{path} cannot be written: {error.strerror}") from error
    return path


def row(record: Record) -> dict[str, Any]:
    """A record as one flat row of trials.csv, with a column for each axis that varies.

    >>> from normwise.tuning.records import Request
    >>> row(Record(Request("select", "batch", 0.1, 0, 200), "trains", score=91.5))["score"]
    91.5
    """
    request = record.request
    asked = {"phase": request.phase, "norm": request.norm, "lr": request.lr, "seed": request.seed}
    measured = {name: getattr(record, name) for name in _MEASURED}
    return {**asked, "steps": request.steps, **dict(request.variant), **measured}


def to_csv(records: Iterable[Record]) -> str:
    """All trials as CSV with a header; a number that does not exist is an empty cell."""
    text = io.StringIO()
    rows = [row(record) for record in records]
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json(summary: Summary) -> str:
    """The summary as JSON, readable by a person. The ends of an unbounded interval are null: JSON has no infinity."""
    data = summary.to_dict()
    for pair in data["verdict"]["comparisons"]:
        pair.update({end: None for end in _ENDS if math.isinf(pair[end])})
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished study, as plain data.

    Raises StudyError when the folder has none, or one that cannot be read.
    """
    path = folder / SUMMARY
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StudyError(f"{folder} holds no finished study: there is no {SUMMARY} in it") from error
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise StudyError(f"{path} is not a study's summary")
    for pair in data.get("verdict", {}).get("comparisons", ()):
        pair.update({end: infinity for end, infinity in _ENDS.items() if pair[end] is None})
    return data
