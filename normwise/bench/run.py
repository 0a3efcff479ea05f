"""One case after another: prepared, checked, timed, recorded."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from normwise.bench import models, operations
from normwise.bench.cases import AnyCase, ModelCase
from normwise.bench.operations import OURS, Prepared
from normwise.bench.results import Outcome, Timed
from normwise.bench.timing import Timing, measure

FULL, QUICK = 1.0, 0.25  # seconds that the rounds of a case take; whole models take four times as long
_MODELS = 4


def run(cases: Sequence[AnyCase], budget: float = FULL) -> Iterator[Outcome]:
    """The outcomes of cases, in turn.

    >>> from normwise.bench.cases import Wanted, cases
    >>> outcome = next(run(cases(Wanted(names=("layer_norm",), shape=(64, 32), compiled="none")), budget=0.01))
    >>> list(outcome.timed), outcome.rounds >= 5
    (['normwise', 'torch', 'oneDNN', 'copy'], True)
    """
    for case in cases:
        with _one_case(case):
            outcome = _outcome(case, budget)
        yield outcome


def _outcome(case: AnyCase, budget: float) -> Outcome:
    if isinstance(case, ModelCase):
        prepared, yardstick, budget = models.prepare(case), None, _MODELS * budget
    else:
        prepared = operations.prepare(case)
        yardstick = prepared.reference
    if OURS in prepared.excluded:
        return Outcome(case, {}, prepared.excluded, prepared.inexact, 0, 0)
    timing = measure(prepared.calls, yardstick, budget)
    timed = {name: _timed(timing, name, prepared) for name in prepared.calls}
    return Outcome(case, timed, prepared.excluded, prepared.inexact, len(timing.rounds), timing.dirty)


def _timed(timing: Timing, name: str, prepared: Prepared) -> Timed:
    share, ratio = timing.ratio(prepared.reference, name), timing.ratio(name, OURS)
    return Timed(timing.seconds(name), share, ratio, timing.faults(name))


@contextmanager
def _one_case(case: AnyCase) -> Iterator[None]:
    """Gradients are recorded in training alone; Python collects no garbage meanwhile; a compiler forgets."""
    mode = case.mode if isinstance(case, ModelCase) else case.what.mode
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.set_grad_enabled(mode == "training"):
            yield
    finally:
        if collects:
            gc.enable()
        if not isinstance(case, ModelCase) and case.compiled:
            torch._dynamo.reset()
