"""Calls that start a compiled kernel past Triton's look at every argument start the one that it would have found.

In a process of its own, where Triton interprets nothing: see started.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def test_what_is_started_is_what_triton_would_have_found() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.started"]
    found = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    counts = json.loads(found.stdout)
    assert counts["started"] > 1000
    assert counts["found by Triton"] == pytest.approx(counts["variants"], rel=0.01)  # hardly one is found twice
