"""The kernels for GPUs, compiled for three that need not be there: nothing is spilled, and elements come by vectors.

`python -m tests.ahead` prints the same of every case. It has a process of its own, where Triton interprets nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent
REGISTERS = 2**16  # of a processor
SHARED = 48 * 2**10  # bytes that every program may have
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
WIDEST = 128  # bits

# Every kernel and every kind of layout, on each processor what differs there: (processor, dtype, cases).
RUNS: dict[str, tuple[int, str, list[str]]] = {
    "short rows": (90, "bf16", ["LayerNorm: 4096", "RMSNorm, added: 4096", "RMSNorm, gated: 4096"]),
    "long rows": (90, "bf16", ["LayerNorm: 131072", "LayerNorm, masked: 4096"]),
    "rows of fp32": (90, "fp32", ["LayerNorm: 8192", "LayerNorm, silu: 4096"]),
    "batch norm": (90, "bf16", ["BatchNorm: 256x256x14x14", "BatchNorm: 8192x512"]),
    "batch norm, fused": (
        90,
        "fp16",
        ["BatchNorm, silu: 256x64x56x56 channels last", "BatchNorm, remembered: 256x64x56x56"],
    ),
    "groups": (90, "bf16", ["GroupNorm: 256x256x14x14", "GroupNorm: 64x256x56x56 channels last"]),
    "images": (90, "fp32", ["InstanceNorm: 256x256x14x14 channels last", "LayerNorm2d: 64x256x56x56"]),
    "sm_80": (80, "fp32", ["BatchNorm, added: 256x64x56x56"]),
    "sm_100": (100, "fp32", ["LayerNorm: 32768"]),
}


def _missing() -> str:
    """What there is not that kernels are compiled and read with."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        return "Triton is not installed"
    read_with = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return "" if read_with.exists() else f"this Triton has no {read_with.name}"


pytestmark = [
    pytest.mark.skipif(bool(_missing()), reason=_missing()),
    pytest.mark.no_cover,  # compiling takes half as long again when it is watched
]


def _compiled(processor: int, dtype: str, cases: list[str]) -> list[dict[str, Any]]:
    """What became of every kernel of some cases."""
    command = ["-m", "tests.ahead", "--cases", *cases, "--dtypes", dtype, "--processors", str(processor), "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_spilled_and_elements_come_by_whole_vectors(name: str) -> None:
    processor, dtype, cases = RUNS[name]
    kernels = _compiled(processor, dtype, cases)
    assert [(kernel["case"], kernel["kernel"].split()[1]) for kernel in kernels] == [
        (case, direction) for case in cases for direction in ("forward", "backward")
    ]
    for kernel in kernels:
        size = kernel["side_by_side"] * ITEMSIZE[dtype] * 8
        assert set(kernel["widths"].values()) == {min(size & -size, WIDEST)}, kernel
        assert {"forward": {"x", "y"}, "backward": {"x", "d_y", "d_x"}}[kernel["kernel"].split()[1]] <= kernel[
            "widths"
        ].keys()
        assert kernel["in_sass"] == kernel["in_ptx"], kernel  # what Triton asks for is what the machine does
        assert kernel["stack"] == kernel["spills"] == 0, kernel
        assert kernel["shared"] <= SHARED, kernel
        by_eights = -(-kernel["registers"] // 8) * 8
        assert 32 * kernel["warps"] * by_eights <= REGISTERS, kernel
