"""Which limits of `launch.Limits` are fastest on this GPU: the measurement behind each of its values.

    python -m benchmarks.tune_launch

One limit at a time takes other values, and every layout that follows is checked against float64 and timed on the same
cases, all in turn, with cold caches. Printed is the time of each value over that of the value that `launch.py` has,
the geometric mean and the worst case; the winner is written into `launch.py` by hand. No call of a layer measures
anything.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import environment

if TYPE_CHECKING:
    from benchmarks.gpu.device import Device
    from normwise.bench.cases import Case
    from normwise.bench.timing import Spread
    from normwise.kernels.launch import Limits

FIELDS: Mapping[str, Sequence[int]] = {
    "held": (4096, 8192, 16384, 32768),
    "held_back": (4096, 8192, 16384),
    "divided": (2048, 4096, 8192, 16384),
    "beside": (16, 32, 64),
    "least": (512, 1024, 2048),
    "parts": (32, 64, 128, 256),
    "joined": (1024, 2048, 4096),
    "to_a_thread": (8, 16, 32),
    "turns": (4, 8, 16),
    "share": (2, 4, 8),
}
ROUNDS = 9


@dataclass(frozen=True)
class Try:
    """One limit with another value, on one case.

    Attributes:
        field: The limit.
        value: What it is set to.
        case: The case, in words.
        seconds: Of a call; None if it raised or was wrong.
        ratio: Over the time with the limits as they are, round by round.
        fault: Why there is no time.
    """

    field: str
    value: int
    case: str
    seconds: Spread | None
    ratio: Spread | None
    fault: str | None = None


def tuned_cases() -> list[Case]:
    """Rows that one program holds and rows that many share, images by channel, by group and by pixel."""
    from benchmarks.gpu.cases import IMAGES, rows
    from normwise.bench.cases import LAYOUTS, Case, Pass

    learn, train, evaluate = Pass("training", backward=True), Pass("training"), Pass("evaluation")
    found = [
        Case(name, rows(length), "bfloat16", "contiguous", what)
        for name in ("layer_norm", "add_rms_norm")
        for length in (2**10, 2**13, 2**14, 2**16, 2**18)
        for what in (evaluate, learn)
    ]
    found += [
        Case("batch_norm", shape, "bfloat16", layout, what)
        for shape in IMAGES
        for layout in LAYOUTS
        for what in (train, learn)
    ]
    images = ("layer_norm_2d", "group_norm")
    return found + [Case(name, IMAGES[2], "bfloat16", layout, learn) for name in images for layout in LAYOUTS]


@contextmanager
def limits(value: Limits) -> Iterator[None]:
    """Layouts follow from other limits, of kernels that are made and of calls that are made meanwhile."""
    from normwise.kernels import launch, prepare

    before: Limits = launch.LIMITS
    prepare._prepared.cache_clear()
    launch.LIMITS = value
    try:
        yield
    finally:
        launch.LIMITS = before
        prepare._prepared.cache_clear()


def sweep(case: Case, device: Device, fields: Mapping[str, Sequence[int]]) -> list[Try]:
    """Every value of some limits on a case."""
    from benchmarks.gpu.run import measure, one_case
    from normwise.bench.operations import OURS

    tried = [(field, value) for field, values in fields.items() for value in values]
    with one_case(case, device):
        calls, faults = _calls(case, device, tried)
        if OURS not in calls:
            return [Try(field, value, str(case), None, None, faults[OURS]) for field, value in tried]
        timing = measure(calls, device, ROUNDS)
    found = []
    for field, value in tried:
        name = _name(field, value)
        if name in calls:
            found.append(Try(field, value, str(case), timing.seconds(name), timing.ratio(name, OURS)))
        else:
            found.append(Try(field, value, str(case), None, None, faults[name]))
    return found


def _name(field: str, value: int) -> str:
    return f"{field}={value}"


def _calls(
    case: Case, device: Device, tried: Sequence[tuple[str, int]]
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Calls that are right, by what is changed, and why the others are left out."""
    from benchmarks.gpu import truth
    from benchmarks.gpu.contenders import made, told
    from normwise.bench import gate, layers
    from normwise.bench.operations import OURS, Entrant, call_of, found_by, state_of
    from normwise.kernels.launch import LIMITS

    inputs, gradients = layers.tensors(case, device.where)
    state = state_of(made(layers.ours, case, device))
    true = truth.truth(case, inputs, gradients, state)
    calls: dict[str, Callable[[], object]] = {}
    faults: dict[str, str] = {}
    others = {_name(field, value): LIMITS._replace(**{field: value}) for field, value in tried}
    for name, value in {OURS: LIMITS, **others}.items():
        layer = made(layers.ours, case, device)
        entrant = Entrant(layer, layer, inputs, gradients)
        try:
            with limits(value):
                fault = gate.fault(found_by(case, entrant), true)
        except Exception as error:  # noqa: BLE001 - limits that no kernel can be compiled for, say
            fault = told(error)
        if fault is None:
            calls[name] = _under(value, call_of(case, entrant))
        else:
            faults[name] = fault
    return calls, faults


def _under(value: Limits, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with limits(value):
            return call()

    return run


def summary(tries: Sequence[Try]) -> list[tuple[str, ...]]:
    """A row for each value: the geometric mean of its ratios, the worst and its case, and how many failed."""
    rows: list[tuple[str, ...]] = []
    for field, value in dict.fromkeys((one.field, one.value) for one in tries):
        same = [one for one in tries if (one.field, one.value) == (field, value)]
        timed = [(one.ratio.median, one.case) for one in same if one.ratio is not None]
        if not timed:
            rows.append((field, str(value), "-", "-", "-", str(len(same))))
            continue
        mean = math.exp(sum(math.log(ratio) for ratio, _ in timed) / len(timed))
        worst, case = max(timed)
        rows.append((field, str(value), f"{mean:.3f}", f"{worst:.2f}", case, str(len(same) - len(timed))))
    return rows


def save(path: Path, facts: Mapping[str, str | int], now: Mapping[str, int], tries: Sequence[Try]) -> None:
    """Write every measurement, and the limits as they are."""
    from normwise.tuning.output import write

    data: dict[str, Any] = {"machine": dict(facts), "limits": dict(now), "tries": [asdict(one) for one in tries]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path.parent, path.name, json.dumps(data, indent=1) + "\n")


def carry_out(words: Sequence[str], device: Device, cases: Sequence[Case]) -> int:
    """Sweep case by case, save after each, print the table; Ctrl-C keeps what there is."""
    from benchmarks.gpu import output
    from normwise.kernels.launch import LIMITS
    from normwise.report.tables import table

    parser = argparse.ArgumentParser("python -m benchmarks.tune_launch", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file [default: benchmarks/results/launch-<device>.json]")
    parser.add_argument("--limits", help="some of them, as held,parts [default: all]")
    asked = parser.parse_args(words)
    names = asked.limits.split(",") if asked.limits else list(FIELDS)
    if not set(names) <= set(FIELDS):
        parser.error(f"limits {asked.limits}: there are {', '.join(FIELDS)}")
    fields = {name: FIELDS[name] for name in names}
    path = asked.out or Path("benchmarks/results") / output.file_name("launch", device)
    tries: list[Try] = []
    code = 0
    try:
        for at, case in enumerate(cases, 1):
            tries += sweep(case, device, fields)
            save(path, output.facts(device), LIMITS._asdict(), tries)
            print(f"{at} of {len(cases)}: {case}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    heads = ("limit", "value", "time over now's", "worst", "case", "failed")
    print(output.text(table(*heads, rows=summary(tries))))
    return code


def main() -> int:
    """One sentence and exit code 2 where there is no GPU."""
    refused = environment.prepare()
    if refused:
        print(refused, file=sys.stderr)
        return 2
    from benchmarks.gpu.device import Cuda

    return carry_out(sys.argv[1:], Cuda(), tuned_cases())


if __name__ == "__main__":
    raise SystemExit(main())
