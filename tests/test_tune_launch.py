"""`python -m benchmarks.tune_launch` without a GPU: a sweep on interpreted kernels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import tune_launch
from normwise.kernels import launch
from tests.gpu_stubs import EVALUATE, ROWS, Fake
from tests.interpreted import interpreted, needs_interpreter


def test_every_limit_is_swept_and_the_value_that_it_has_is_among_those() -> None:
    assert tuple(tune_launch.FIELDS) == launch.Limits._fields
    for field, value in launch.LIMITS._asdict().items():
        assert value in tune_launch.FIELDS[field]
    assert len(tune_launch.tuned_cases()) == 36


@needs_interpreter
def test_a_sweep_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    layout_of = launch.layout_of

    def watched(r0: int, r1: int, limits: launch.Limits, *, backward: bool) -> launch.Layout:
        seen.append(limits.held)
        if limits.held == 4096:
            raise ValueError("no room for it")
        return layout_of(r0, r1, limits, backward=backward)

    monkeypatch.setattr("normwise.kernels.gpu.kernel.layout_of", watched)
    monkeypatch.setattr(tune_launch, "FIELDS", {"held": (4096, 8192)})
    monkeypatch.setattr(tune_launch, "ROUNDS", 1)
    before = launch.LIMITS
    case = replace(ROWS, what=EVALUATE)
    path = tmp_path / "new" / "launch.json"
    with interpreted():
        assert tune_launch.carry_out(["--out", str(path)], Fake(), [case]) == 0
    assert launch.LIMITS is before
    assert {4096, 8192, before.held} == set(seen)
    data = json.loads(path.read_text())
    assert data["limits"] == before._asdict()
    refused, kept = data["tries"]
    assert (refused["value"], refused["seconds"], refused["fault"]) == (4096, None, "ValueError: no room for it")
    assert (kept["field"], kept["value"], kept["fault"]) == ("held", 8192, None)
    assert kept["ratio"] == [1.0, 1.0, 1.0]
    printed, told = capsys.readouterr()
    assert told == f"1 of 1: {case}\n"
    assert [line.split() for line in printed.splitlines()[1:]] == [
        ["held", "4096", "-", "-", "-", "1"],
        ["held", "8192", "1.000", "1.00", *str(case).split(), "0"],
    ]


def test_a_limit_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        tune_launch.carry_out(["--limits", "held,warps"], Fake(), [])
    assert capsys.readouterr().err.endswith(
        "error: limits held,warps: there are held, held_back, divided, beside, least, parts, joined, to_a_thread, "
        "turns, share\n"
    )


def test_limits_are_put_back() -> None:
    before = launch.LIMITS

    def interrupted() -> None:
        with tune_launch.limits(before._replace(held=1)):
            assert launch.LIMITS.held == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert launch.LIMITS is before
