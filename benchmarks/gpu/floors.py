"""What the kernels are to reach on an H100, and whether they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.gpu.host import HostTime
from normwise.bench.cases import Case
from normwise.bench.operations import COPY, CUDNN, OURS, TORCH, TORCH_COMPILED
from normwise.bench.results import Outcome

LONGEST = 2**15  # of rows that are to reach more
FORWARD, LONG_FORWARD, BACKWARD, GROUPS = 90, 80, 80, 85  # percent of the copy's speed
BATCH = 80  # the same: within 1.25 times of one read and one write
HOST = 1.5  # of torch's time


@dataclass(frozen=True)
class Floor:
    """A number that is to be reached.

    Attributes:
        what: What was measured.
        goal: What is wanted, in words.
        found: What there is, in words.
        met: Whether it is enough.
    """

    what: str
    goal: str
    found: str
    met: bool


def floors(outcomes: Sequence[Outcome], hosts: Sequence[HostTime]) -> list[Floor]:
    """All floors of which something was measured."""
    timed = {str(outcome.case): outcome for outcome in outcomes if OURS in outcome.timed}
    found = [floor for outcome in timed.values() for floor in _of(outcome, timed)]
    return found + [_host(host) for host in hosts]


def _of(outcome: Outcome, timed: Mapping[str, Outcome]) -> Iterator[Floor]:
    case = outcome.case
    if not isinstance(case, Case) or case.dtype != "bfloat16":
        return
    if case.operation in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"):
        yield from _rows(outcome, case, timed)
    elif case.operation in ("group_norm", "layer_norm_2d") and not case.what.backward:
        yield _percent(str(case), outcome.percent(OURS), GROUPS)
    elif case.operation == "batch_norm" and case.what.mode == "training":
        if not case.what.backward:
            yield _percent(str(case), outcome.percent(OURS), BATCH)
        for name in (TORCH, CUDNN, TORCH_COMPILED):
            if name in outcome.timed:
                ratio = outcome.timed[name].ratio.median
                yield Floor(str(case), f"faster than {name}", f"{ratio:.2f} times as fast", ratio > 1)


def _rows(outcome: Outcome, case: Case, timed: Mapping[str, Outcome]) -> Iterator[Floor]:
    is_long = case.shape[-1] > LONGEST
    if not case.what.backward:
        yield _percent(str(case), outcome.percent(OURS), LONG_FORWARD if is_long else FORWARD)
        return
    forward = timed.get(str(case).replace("training forward+backward", "evaluation forward"))
    if forward is not None and not is_long:
        what = str(case).replace("forward+backward", "backward, by difference")
        yield _percent(what, backward_percent(forward, outcome), BACKWARD)


def backward_percent(forward: Outcome, both: Outcome) -> float:
    """The speed of the backward as a part of the copy's, in percent: what both take, without what the forward takes."""
    of, of_both = forward.case, both.case
    if not isinstance(of, Case) or not isinstance(of_both, Case):
        raise TypeError("a model has no bytes to count")
    seconds = both.timed[OURS].seconds.median - forward.timed[OURS].seconds.median
    copied = 2 * of.inputs * of.tensor_bytes / both.timed[COPY].seconds.median
    return 100 * (of_both.bytes - of.bytes) / seconds / copied


def _percent(what: str, found: float | None, goal: float) -> Floor:
    percent = 0.0 if found is None else found
    return Floor(what, f"{goal} % of the copy", f"{percent:.0f} %", percent >= goal)


def _host(host: HostTime) -> Floor:
    ratio = host.ratio.median
    return Floor(f"host, {host.case}", f"{HOST} times torch's time", f"{ratio:.2f} times", ratio <= HOST)
