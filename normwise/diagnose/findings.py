"""What the doctor says: findings, ranked by harm, or a clean bill that lists what was looked at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from textwrap import fill, indent
from typing import Any, Literal, get_args

from normwise.diagnose.results import Result, number
from normwise.errors import DiagnosisError

Harm = Literal["fatal", "severe", "moderate", "minor"]
Confidence = Literal["certain", "likely", "possible"]
_SHOWN = 4  # paths in a text
_WIDTH = 100  # of a line in a text
_EXCHANGING = ("few-samples", "memory-mixes-domains", "mixed-norm-order")
_LAST = ("rate-above-stability",)  # every other fix changes what rate is borne


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a model or with how it is trained.

    ==========  ========================================================================================
    harm        what it costs
    ==========  ========================================================================================
    "fatal"     training or evaluation cannot give a right result: values that are not finite, a crash
    "severe"    training is likely to fail, or evaluation to be far worse than training
    "moderate"  a worse model than the same effort could give
    "minor"     waste, or a habit that may cost later
    ==========  ========================================================================================

    Attributes:
        kind: What it is, one word that never changes.
        what: What it is, in a sentence.
        where: Paths of the modules, or names of the inputs; none, if it is about the training as a whole.
        quantity: What was measured, with its unit.
        measured: The number that shows it.
        expected: The range, both ends included, in which a healthy number lies; `measured` is outside.
        fix: Python that mends it, of `model`, `nw`, `torch`, `batches`, `optimizer` or `lr`.
        confidence: "certain" (it is so), "likely" (it is, but may be meant), "possible" (it may do no harm).
        harm: How bad it is; findings are ranked by it, but the learning rate comes last.
    """

    kind: str
    what: str
    where: tuple[str, ...]
    quantity: str
    measured: float
    expected: tuple[float, float]
    fix: str
    confidence: Confidence
    harm: Harm

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Smaller for what is more harmful, and then for what is more certain; the learning rate is last."""
        harm, confidence = get_args(Harm).index(self.harm), get_args(Confidence).index(self.confidence)
        return self.kind in _LAST, harm, confidence

    @property
    def exchanges(self) -> bool:
        """Whether the fix puts other layers in the place of those that it is about."""
        return self.kind in _EXCHANGING

    @property
    def numbers(self) -> str:
        """What was measured and what is expected, with digits enough to tell them apart."""
        for digits in range(3, 17):
            measured = number(self.measured, digits)
            if self.measured in self.expected or measured not in {number(end, digits) for end in self.expected}:
                break
        return f"{self.quantity}: {measured}, expected {in_range(*self.expected, digits)}"

    def __str__(self) -> str:
        place = f" in {listed(self.where)}" if self.where else ""
        head = f"{self.kind} ({self.harm}, {self.confidence}){place}"
        body = "\n".join((self.what, self.numbers, "fix:", indent(self.fix, "  ")))
        return f"{head}\n{indent(body, '  ')}"


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """What the doctor found; see `doctor`.

    Attributes:
        findings: The most harmful first, but the learning rate last.
        checked: What was looked at.
        unchecked: What could not be looked at, and why.
    """

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    unchecked: Mapping[str, str]

    @property
    def meaning(self) -> str:
        """What was found, in one line."""
        rest = f"{len(self.checked)} things checked, {len(self.unchecked)} not"
        if not self.findings:
            return f"no finding; {rest}"
        kinds = ", ".join(f"{finding.kind} ({finding.harm})" for finding in self.findings)
        return f"{_counted(len(self.findings))}: {kinds}; {rest}"

    def at_least(self, harm: Harm) -> tuple[Finding, ...]:
        """The findings that are so harmful or more, and more than possible."""
        worst = get_args(Harm)[: get_args(Harm).index(harm) + 1]
        return tuple(one for one in self.findings if one.harm in worst and one.confidence != "possible")

    def rows(self) -> list[dict[str, Any]]:
        """One row a finding."""
        return [
            {
                "kind": one.kind,
                "harm": one.harm,
                "confidence": one.confidence,
                "where": ", ".join(one.where),
                "quantity": one.quantity,
                "measured": one.measured,
                "low": one.expected[0],
                "high": one.expected[1],
                "what": one.what,
                "fix": one.fix,
            }
            for one in self.findings
        ]

    def traces(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """A table of the findings."""
        names = ("kind", "harm", "confidence", "where", "what", "fix")
        columns = [[row[name] for row in self.rows()] for name in names]
        table = {"type": "table", "header": {"values": list(names)}, "cells": {"values": columns, "align": "left"}}
        return [table], {}

    def __str__(self) -> str:
        return self.text()

    def text(self, *, names: bool = True) -> str:
        """All of it for people; without `names`, what was checked is only counted."""
        return "\n".join(self._lines(names))

    def _lines(self, names: bool) -> Iterator[str]:
        if self.findings:
            yield f"{_counted(len(self.findings))}{', in the order to mend them' * (len(self.findings) > 1)}"
            for at, finding in enumerate(self.findings, 1):
                yield f"\n{at}. {finding}"
        else:
            yield "no finding"
        checked = ", ".join(self.checked) if names else f"{len(self.checked)} things"
        yield "\n" + fill(f"checked: {checked or 'nothing'}", _WIDTH, subsequent_indent="  ")
        if self.unchecked:
            yield "not checked:"
            yield from (f"  {name}: {why}" for name, why in self.unchecked.items())


def checked_harm(text: str) -> Harm:
    """A level of harm by its name.

    Raises:
        DiagnosisError: there is no such level.
    """
    levels: dict[str, Harm] = {level: level for level in get_args(Harm)}
    if text not in levels:
        raise DiagnosisError(f"no level of harm named {text!r}; there are {', '.join(levels)}")
    return levels[text]


def listed(paths: Iterable[str]) -> str:
    """The first few paths, and how many more there are.

    >>> listed(["a", "b"]), listed(["a", "b", "c", "d", "e", "f"])
    ('a, b', 'a, b, c, d and 2 more')
    """
    paths = list(paths)
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more


def _counted(count: int) -> str:
    return f"{count} finding{'s' * (count != 1)}"


def in_range(low: float, high: float, digits: int = 3) -> str:
    """A range in words.

    >>> in_range(16, math.inf), in_range(0, 0.5), in_range(0.5, 2), in_range(0, 0)
    ('at least 16', 'at most 0.5', '0.5 to 2', '0')
    """
    if low == high:
        return number(low, digits)
    if math.isinf(high):
        return f"at least {number(low, digits)}"
    most = number(high, digits)
    return f"at most {most}" if math.isinf(low) or low == 0 else f"{number(low, digits)} to {most}"
