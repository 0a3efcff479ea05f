"""`normwise bench` on the command line: a real run, refusals word for word, Ctrl-C, and a heap that stays warm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench_stubs import IMAGES, ROWS, failed, outcome, results
from torch import nn
from typer.testing import CliRunner

from normwise.bench import layers, machine, run
from normwise.bench.results import read, save
from normwise.commands import app
from tests.settings import threads

TINY = ["--op", "layer_norm,add_rms_norm", "--shape", "16,8", "--compile", "none", "--quick"]


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fewest rounds, and threads as they were."""
    monkeypatch.setattr(run, "QUICK", 0.0)
    with threads(torch.get_num_threads()):
        yield


def invoke(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["bench", *words, "--heap", "default"])
    return done.exit_code, done.stdout, done.stderr


def test_a_tiny_run_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench"
    code, printed, told = invoke(*TINY, "--threads", "1", "--out", str(out))
    assert code == 0, told
    assert [line.split(":")[0] for line in told.splitlines()] == [f"{at} of 4" for at in range(1, 5)]
    assert "layer_norm 16x8 float32 evaluation forward" in printed
    assert printed.endswith(f"page: {out / 'bench.html'}\n")
    found = read(out / "results.json")
    assert found.complete
    assert found.machine["heap"] == "default"
    assert found.machine["threads"] == 1
    assert [str(one.case) for one in found.outcomes] == [
        "layer_norm 16x8 float32 evaluation forward",
        "layer_norm 16x8 float32 training forward+backward",
        "add_rms_norm 16x8 float32 evaluation forward",
        "add_rms_norm 16x8 float32 training forward+backward",
    ]
    for one in found.outcomes:
        assert {"normwise", "torch", "copy"} <= set(one.timed)
        assert all(0 < timed.seconds.low <= timed.seconds.median <= timed.seconds.high for timed in one.timed.values())
        assert one.timed["copy"].share == one.timed["normwise"].ratio == (1, 1, 1)
        assert one.rounds >= 5


def test_what_moved_since_results_that_nobody_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = save(results(outcome(ROWS, ours=0.0005), outcome(IMAGES)), tmp_path)
    monkeypatch.setattr(run, "run", lambda cases, budget: iter([outcome(ROWS), outcome(IMAGES)]))
    words = ["--op", "layer_norm", "--shape", "64,100", "--out", str(tmp_path / "b"), "--against", str(earlier)]
    code, printed, _ = invoke(*words)
    assert code == 0
    assert f"1 of 4 times moved\n{ROWS}: normwise is 4.00 times slower (0.5 -> 2 ms)\n" in printed
    assert "note: processor was <b>abacus</b>, and is " in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--heap", "cold"), "heap 'cold': there are warm, default"),
        (("--dtype", "int8"), "dtype 'int8': there are float32, bfloat16, float16, float64"),
        (
            ("--op", "layer_norm", "--shape", "4x5"),
            "shape '4x5': write whole numbers with commas between them, as in 32,64,56,56",
        ),
        (("--op", "group_norm", "--shape", "4,5"), "group_norm takes inputs of 4 dimensions, and 4,5 has 2"),
        (("--against", "no.json"), "cannot read the results no.json: No such file or directory"),
        (("--out", "file"), "file is a file, not a folder"),
    ],
)
def test_refusals_before_anything_is_measured(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    heap = () if "--heap" in words else ("--heap", "default")
    done = CliRunner().invoke(app, ["bench", *words, *heap])
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"error: {message}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_wrong_layer_ends_with_1_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers._OURS, "layer_norm", lambda case: layers.Plain(nn.LayerNorm(case.shape[-1], 0.1)))
    code, printed, told = invoke(*TINY, "--out", str(tmp_path))
    assert code == 1
    assert "1 of 4: layer_norm 16x8 float32 evaluation forward: FAILED, not timed: the output is off by 0." in told
    assert "FAILED, not timed: layer_norm 16x8 float32 evaluation forward: the output is off by 0." in printed
    assert [bool(one.timed) for one in read(tmp_path / "results.json").outcomes] == [False, False, True, True]


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(cases: object, budget: float) -> Iterator[object]:
        yield outcome(ROWS)
        assert not read(tmp_path / "results.json").complete  # written after every case
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    code, printed, told = invoke(*TINY, "--out", str(tmp_path))
    assert code == 130
    assert told.endswith(f"interrupted: 1 of 4 cases are in {tmp_path}\n")
    assert str(ROWS) in printed
    found = read(tmp_path / "results.json")
    assert (found.complete, found.outcomes) == (False, (outcome(ROWS),))
    assert "Interrupted: not every case" in (tmp_path / "bench.html").read_text()


def test_ctrl_c_before_the_first_case_keeps_the_earlier_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(cases: object, budget: float) -> Iterator[object]:
        raise KeyboardInterrupt
        yield

    save(results(failed()), tmp_path)
    monkeypatch.setattr(run, "run", interrupted)
    assert invoke(*TINY, "--out", str(tmp_path)) == (130, "", "interrupted\n")
    assert read(tmp_path / "results.json") == results(failed())


@pytest.mark.skipif(not machine.can_be_warm(), reason="only glibc can keep the heap warm")
@pytest.mark.slow
def test_a_warm_heap_costs_no_page_faults(tmp_path: Path) -> None:
    words = ["bench", "--op", "layer_norm", "--shape", "4096,2100", "--compile", "none", "--quick", "--threads", "1"]
    command = [sys.executable, "-c", "from normwise.cli import main; main()", *words, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "results.json")
    assert found.machine["heap"] == "warm"
    assert max(timed.faults for one in found.outcomes for timed in one.timed.values()) < 10  # of 34 MB: 8,400 pages


def test_where_the_heap_cannot_be_warm_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "can_be_warm", lambda: False)
    done = CliRunner().invoke(app, ["bench", *TINY, "--out", str(tmp_path)])
    assert done.exit_code == 0
    assert done.stderr.splitlines()[0] == "note: only glibc can keep the heap warm; it is left as it is"


def test_a_warm_start_is_the_same_command_with_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(machine.os, "execve", lambda *words: started.append(words))
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/normwise", "bench", "--quick"])
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    assert not machine.is_warm()
    machine.restart_warm()
    ((program, words, environment),) = started
    assert (program, words[1:]) == (sys.executable, ["/bin/normwise", "bench", "--quick"])
    assert environment["GLIBC_TUNABLES"] == (
        "glibc.malloc.check=0:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:"
        "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
    )
    monkeypatch.setenv("GLIBC_TUNABLES", environment["GLIBC_TUNABLES"])
    assert machine.is_warm()


def test_facts_and_counters_of_this_machine() -> None:
    found = machine.facts()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert str(found["backends"]).startswith("reference")
    before = machine.faults()
    torch.ones(1 << 24)  # 64 MB, fresh
    assert machine.faults() > before
    assert 0 <= machine.waited() <= machine.waited() + 1e-3


def test_waiting_is_summed_over_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task, text in (("1", "5 2000000000 7"), ("2", "5 500000000 7"), ("3", "")):
        (tmp_path / task).mkdir()
        (tmp_path / task / "schedstat").write_text(text)
    monkeypatch.setattr(machine, "_TASKS", tmp_path)
    assert machine.waited() == pytest.approx(2.5)
    monkeypatch.setattr(machine, "_TASKS", tmp_path / "none")
    assert machine.waited() == 0
