"""Results as JSON, as tables of text, and on one page."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import triton

import normwise as nw
from benchmarks.gpu.device import Device
from benchmarks.gpu.floors import Floor
from benchmarks.gpu.host import HostTime
from normwise.bench.results import Results
from normwise.report.tables import Table, table
from normwise.report.words import number
from normwise.tuning.output import write

_OTHERS = ("liger-kernel", "flash-attn", "quack-kernels")


def facts(device: Device) -> dict[str, str | int]:
    """The device, and the versions of what ran on it."""
    installed = {name: version for name in _OTHERS if (version := _version(name))}
    return {
        **device.facts(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **installed,
        "python": platform.python_version(),
        "normwise": nw.__version__,
    }


def file_name(what: str, device: Device) -> str:
    """Where results of a device are kept.

    >>> from types import SimpleNamespace
    >>> file_name("gpu", SimpleNamespace(name="NVIDIA H100 80GB HBM3"))
    'gpu-nvidia-h100-80gb-hbm3.json'
    """
    return f"{what}-{re.sub('[^a-z0-9]+', '-', device.name.lower()).strip('-')}.json"


def save(path: Path, results: Results, hosts: Sequence[HostTime], floors: Sequence[Floor]) -> None:
    """Write what `normwise bench` writes, with host times and floors beside it: all of it or nothing."""
    data = {**json.loads(results.to_json()), "host": _data(hosts), "floors": _data(floors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path.parent, path.name, json.dumps(data, indent=1) + "\n")


def tables(hosts: Sequence[HostTime], floors: Sequence[Floor]) -> Mapping[str, Table]:
    """What stands beside the times of the device."""
    host = [
        (str(one.case), f"{1e6 * one.ours.median:.1f}", f"{1e6 * one.torchs.median:.1f}", number(one.ratio.median))
        for one in hosts
    ]
    floor = [(one.what, one.goal, one.found, "yes" if one.met else "NO") for one in floors]
    return {
        "What a small call costs the host": table("Call", "normwise, µs", "torch, µs", "normwise / torch", rows=host),
        "What is to be reached on an H100": table("Case", "Goal", "Found", "Reached", rows=floor),
    }


def text(of: Table) -> str:
    """A table as lines.

    >>> print(text(table("case", "ms", rows=[("a", "1.5"), ("long", "12")])))
    case  ms
    a     1.5
    long  12
    """
    rows = [tuple(column.name for column in of.columns), *of.rows]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _data(records: Sequence[Any]) -> list[dict[str, Any]]:
    return [asdict(record) for record in records]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
