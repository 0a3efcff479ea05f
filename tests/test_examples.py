"""The examples run as people run them, and what they print is complete."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *options: str) -> list[str]:
    """The lines that an example prints."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def table(lines: list[str]) -> dict[str, list[float]]:
    """Names of 18 characters, then columns of 11."""
    return {line[:18].strip(): [float(cell.replace(",", "")) for cell in line[18:].split()] for line in lines[1:]}


def test_every_example_has_a_line_in_the_readme() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    for example in EXAMPLES.glob("*.py"):
        assert f"- `{example.name}`: " in readme


@pytest.mark.slow
def test_recurrent() -> None:
    untrained, trained = (table(run("recurrent.py", "--steps", str(steps))) for steps in (0, 40))
    assert list(trained) == list(untrained) == ["none", "layer", "batch, per step", "batch, shared"]
    for name, numbers in trained.items():
        assert len(numbers) == 8
        assert all(math.isfinite(number) for number in numbers + untrained[name])
        assert numbers[3] < untrained[name][3] - 0.5
    remembered = {name: numbers[6] for name, numbers in trained.items()}
    places = 2 * (4 * 64 + 4 * 64 + 64)  # mean and variance at the gates, twice, and at the cell state
    assert remembered == {"none": 0, "layer": 0, "batch, per step": 50 * places, "batch, shared": places}
    assert len({numbers[7] for numbers in trained.values()}) == 2
