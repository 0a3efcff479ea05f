"""The program: measure, save after every case, show."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import cases, output
from benchmarks.gpu.device import Device
from benchmarks.gpu.floors import floors
from benchmarks.gpu.host import HostTime, host_times
from benchmarks.gpu.run import run
from normwise.bench import screen
from normwise.bench.cases import Case
from normwise.bench.operations import OURS
from normwise.bench.page import render
from normwise.bench.results import Results
from normwise.errors import NormwiseError, StudyError
from normwise.report.paper import written

RESULTS = Path("benchmarks/results")
_LAST = 20.0  # seconds in which no case begins any more


def main(words: Sequence[str], device: Device) -> int:
    """Measure; the exit code: 1 if a layer was wrong or the device failed, 130 after Ctrl-C."""
    asked = _parser().parse_args(words)
    begin = device.now()
    try:
        wanted = cases.cases(asked.op.split(",") if asked.op else None)
        path = asked.out or RESULTS / output.file_name("gpu", device)
        return _carry_out(wanted, device, path, asked.page, begin + 60 * asked.minutes - _LAST)
    except NormwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description="Measure the kernels for GPUs.")
    parser.add_argument("--op", help="operations, as rms_norm,batch_norm [default: all]")
    parser.add_argument("--minutes", type=float, default=8.0, help="when no case begins any more [default: 8]")
    parser.add_argument("--out", type=Path, help="JSON file [default: benchmarks/results/gpu-<device>.json]")
    parser.add_argument(
        "--page", type=Path, default=Path("runs/bench-gpu.html"), help="HTML page [default: %(default)s]"
    )
    return parser


def _carry_out(wanted: Sequence[Case], device: Device, path: Path, page: Path, until: float) -> int:
    results = Results(output.facts(device), complete=False, outcomes=())
    hosts: list[HostTime] = []
    ended = ""
    try:
        hosts = _host_times(device)
        for outcome in run(wanted, device, until):
            outcomes = (*results.outcomes, outcome)
            results = Results(results.machine, len(outcomes) == len(wanted), outcomes)
            output.save(path, results, hosts, floors(outcomes, hosts))
            print(f"{len(outcomes)} of {len(wanted)}: {screen.line(outcome)}", file=sys.stderr, flush=True)
    except (KeyboardInterrupt, StudyError) as error:
        if not results.outcomes:
            raise
        ended = str(error) or "interrupted"
    _show(results, hosts, path, page)
    if ended or not results.complete:
        why = ended or "time is up: --minutes gives more"
        print(f"{why}; {len(results.outcomes)} of {len(wanted)} cases are in {path}", file=sys.stderr)
    if ended == "interrupted":
        return 130
    return int(bool(ended) or any(OURS not in outcome.timed for outcome in results.outcomes))


def _host_times(device: Device) -> list[HostTime]:
    """None if a small call fails: the cases then say what is wrong."""
    try:
        return host_times(device)
    except (RuntimeError, NormwiseError) as error:
        print(f"host times: {type(error).__name__}: {error}", file=sys.stderr)
        return []


def _show(results: Results, hosts: Sequence[HostTime], path: Path, page: Path) -> None:
    more = output.tables(hosts, floors(results.outcomes, hosts))
    screen.show(results.outcomes)
    for title, table in more.items():
        print(f"\n{title}\n{output.text(table)}")
    print(f"\nresults: {path}")
    page.parent.mkdir(parents=True, exist_ok=True)
    print(f"page: {written(render(results, more), page, 'benchmark')}")
