"""One case after another: prepared, checked, timed with cold caches in interleaved rounds, recorded."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch

from benchmarks.gpu.contenders import prepare, told
from benchmarks.gpu.device import Device
from normwise.bench.cases import Case
from normwise.bench.operations import COPY, OURS
from normwise.bench.results import Outcome, Timed
from normwise.bench.timing import Call, Round, Timing, clean
from normwise.errors import StudyError

ROUNDS = 21


def run(cases: Sequence[Case], device: Device, until: float) -> Iterator[Outcome]:
    """The outcomes of cases, in turn; of none that would begin after `until`, on the device's clock.

    Raises:
        StudyError: the device failed, and takes no more work.
    """
    for case in cases:
        if device.now() >= until:
            return
        outcome = _outcome(case, device)
        yield outcome
        _check(device, case)


def measure(calls: Mapping[str, Call], device: Device, rounds: int) -> Timing:
    """Time every contender in interleaved rounds, each begun by another; without those in which the copy was slow."""
    names = list(calls)
    found = []
    for turn in range(rounds):
        first = turn % len(names)
        order = names[first:] + names[:first]
        seconds = {name: device.seconds(calls[name]) for name in order}
        found.append(Round(seconds, dict.fromkeys(names, 0.0), 0.0, sum(seconds.values())))
    kept = clean(found, COPY if COPY in calls else None)
    return Timing(tuple(kept), len(found) - len(kept))


def _outcome(case: Case, device: Device) -> Outcome:
    """What became of a case, whatever happens to it."""
    with one_case(case, device):
        try:
            return _measured(case, device)
        except Exception as error:  # noqa: BLE001 - one case, out of memory say, must not lose the others
            return Outcome(case, {}, {OURS: told(error)}, {}, 0, 0)


def _measured(case: Case, device: Device) -> Outcome:
    prepared = prepare(case, device)
    if OURS in prepared.excluded:
        return Outcome(case, {}, prepared.excluded, prepared.inexact, 0, 0)
    timing = measure(prepared.calls, device, ROUNDS)
    timed = {
        name: Timed(timing.seconds(name), timing.ratio(COPY, name), timing.ratio(name, OURS), 0.0)
        for name in prepared.calls
    }
    return Outcome(case, timed, prepared.excluded, prepared.inexact, len(timing.rounds), timing.dirty)


def _check(device: Device, case: Case) -> None:
    try:
        device.synchronize()
    except RuntimeError as error:
        raise StudyError(f"the device failed in {case}, and takes no more work: {told(error)}") from error


@contextmanager
def one_case(case: Case, device: Device) -> Iterator[None]:
    """Gradients are recorded in training alone; Python collects no garbage meanwhile; a compiler forgets."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.set_grad_enabled(case.what.mode == "training"):
            yield
    finally:
        if collects:
            gc.enable()
        if case.compiled:
            cast("Any", torch)._dynamo.reset()
        _release(device)


def _release(device: Device) -> None:
    """Give memory back; a device that has failed has none to give, and `_check` says so."""
    try:
        device.release()
    except RuntimeError:
        return
