"""`make bench-gpu` without a GPU: the whole program at tiny sizes, on interpreted kernels and a clock of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from benchmarks import tune_launch
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import cases, command, contenders, environment, host, others, run
from normwise.bench import layers
from normwise.bench.cases import LAYOUTS, OPERATIONS, Case
from normwise.bench.operations import COPY, CUDNN, OURS, TORCH
from normwise.bench.results import Outcome, read
from tests.gpu_stubs import EVALUATE, IMAGES, LEARN, ROWS, TRAIN, Fake, torchs_alone
from tests.interpreted import interpreted, needs_interpreter
from tests.pages import Text, own


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiny cases, two rounds, no small calls."""
    monkeypatch.setattr(cases, "_all", lambda: iter([ROWS, IMAGES]))
    monkeypatch.setattr(run, "ROUNDS", 2)
    monkeypatch.setattr(contenders, "_WARM_UPS", 1)
    monkeypatch.setattr(host, "SHAPES", ())


def carried_out(device: Fake, folder: Path, *words: str) -> int:
    return command.main(
        [*words, "--out", str(folder / "new" / "r.json"), "--page", str(folder / "p" / "b.html")], device
    )


# ------------------------------------------------------------------------------------------------- before anything runs


@pytest.mark.parametrize("main", [program.main, tune_launch.main])
def test_without_a_gpu_one_sentence_and_2(
    main: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main() == 2
    assert capsys.readouterr() == ("", "there is no GPU: torch sees no CUDA device\n")


@pytest.mark.parametrize(
    ("given", "missing", "refused"),
    [
        ({}, ["triton", "plotly"], "not installed: triton, plotly; pip install 'normwise[gpu,tune]'"),
        (
            {"TRITON_INTERPRET": "1"},
            [],
            "TRITON_INTERPRET=1: Triton would interpret the kernels on the CPU; unset it",
        ),
        (
            {"NORMWISE_BACKEND": "reference"},
            [],
            "NORMWISE_BACKEND=reference: the kernels in Triton are what is measured; unset it",
        ),
        ({"TRITON_INTERPRET": "0", "NORMWISE_BACKEND": "triton"}, [], None),
        ({"NORMWISE_BACKEND": ""}, [], None),
    ],
)
def test_refusals(given: Mapping[str, str], missing: list[str], refused: str | None) -> None:
    assert environment.refusal(given, missing, has_gpu=True) == refused


def test_normwise_is_asked_for_its_kernels_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("NORMWISE_BACKEND", "")
    assert environment.prepare() is None
    assert environment.os.environ["NORMWISE_BACKEND"] == "triton"


def test_nothing_that_is_imported_first_imports_normwise() -> None:
    """It would read the environment too early."""
    for module in (program, environment, tune_launch):
        text = Path(str(module.__file__)).read_text()
        at_once = [line for line in text.splitlines() if re.match(r"(from|import) ", line)]
        assert not [line for line in at_once if "normwise" in line or "command" in line]


# ------------------------------------------------------------------------------------------------------------ the cases


def test_every_case_that_has_a_floor_is_measured() -> None:
    found = cases.cases()
    assert len(set(map(str, found))) == len(found) == 122
    for name in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"):
        of = [case for case in found if case.operation == name and case.dtype == "bfloat16"]
        lengths = sorted({case.shape[-1] for case in of})
        assert lengths == [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144]
        assert {case.what for case in of} == {EVALUATE, LEARN}
    assert all(case.tensor_bytes == 2**28 for case in found if len(case.shape) == 2)
    of = [case for case in found if case.operation == "batch_norm" and case.dtype == "bfloat16"]
    assert {(case.shape, case.layout, case.what) for case in of} == {
        (shape, layout, what)
        for shape in ((256, 64, 56, 56), (256, 256, 14, 14), (64, 256, 56, 56))
        for layout in LAYOUTS
        for what in (EVALUATE, TRAIN, LEARN)
    }
    for name in ("batch_norm_relu", "instance_norm", "group_norm", "layer_norm_2d"):
        assert {(c.layout, c.what.backward) for c in found if c.operation == name} == {
            (layout, backward) for layout in LAYOUTS for backward in (False, True)
        }


def test_one_operation_or_one_that_is_unknown(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {case.operation for case in cases.cases(["group_norm", "rms_norm"])} == {"group_norm", "rms_norm"}
    assert carried_out(fake, tmp_path, "--op", "batchnorm") == 2
    assert capsys.readouterr().err == f"error: op 'batchnorm': there are {', '.join(OPERATIONS)}\n"
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- the whole program


@needs_interpreter
def test_a_tiny_run_from_end_to_end(
    fake: Fake,
    briefly: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "SHAPES", ((2, 16),))
    monkeypatch.setattr(host, "WHAT", (("layer_norm", EVALUATE),))
    monkeypatch.setattr(command, "host_times", lambda device: host.host_times(device, calls=1, rounds=1))
    monkeypatch.setattr(others, "find_spec", lambda package: None)
    with interpreted():
        assert carried_out(fake, tmp_path) == 0
    printed, told = capsys.readouterr()
    assert [line.split(":")[0] for line in told.splitlines()] == ["1 of 2", "2 of 2"]
    found = read(tmp_path / "new" / "r.json")
    assert found.complete
    assert found.machine["gpu"] == fake.name
    assert [one.case for one in found.outcomes] == [ROWS, IMAGES]
    assert [list(one.timed) for one in found.outcomes] == [[OURS, TORCH, COPY]] * 2
    assert list(found.outcomes[1].excluded) == [CUDNN]  # torch for the CPU has none
    data = json.loads((tmp_path / "new" / "r.json").read_text())
    assert [one["case"]["shape"] for one in data["host"]] == [[2, 16]]
    assert [one["goal"] for one in data["floors"]] == [
        "80 % of the copy",
        "faster than torch",
        "1.5 times torch's time",
    ]
    page = own((tmp_path / "p" / "b.html").read_text())
    assert "Abacus &lt;GPU&gt; 9000" in page
    words = Text(page).text
    assert "What is to be reached on an H100" in words
    assert "faster than torch" in words
    assert "Whole models" not in words
    assert printed.endswith(f"results: {tmp_path / 'new' / 'r.json'}\npage: {tmp_path / 'p' / 'b.html'}\n")


def test_a_wrong_layer_is_reported_and_never_timed(
    fake: Fake, briefly: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(layers._OURS, "add_rms_norm", lambda case: layers.Added(nn.RMSNorm(case.shape[-1], 0.3)))
    monkeypatch.setitem(layers._OURS, "batch_norm", layers._TORCHS["batch_norm"])
    assert carried_out(fake, tmp_path) == 1
    first, second = read(tmp_path / "new" / "r.json").outcomes
    assert (first.timed, first.rounds) == ({}, 0)
    assert first.excluded[OURS].startswith("the output is off by 0.")
    assert OURS in second.timed
    assert f"FAILED, not timed: {ROWS}: the output is off by 0." in capsys.readouterr().out


@needs_interpreter
def test_a_kernel_that_is_not_there_is_an_error_and_no_fallback(fake: Fake) -> None:
    case = replace(ROWS, dtype="float64")
    with interpreted():
        (found,) = run.run([case], fake, 1e9)
    reason = "norm: NORMWISE_BACKEND='triton': none of its kernels takes this call; norm.explain(x) says why"
    assert found.excluded == {OURS: f"BackendError: {reason}"}


def test_whatever_one_contender_raises_the_others_are_timed(
    fake: Fake, briefly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchs_alone(monkeypatch)

    def broken(case: Case) -> nn.Module:
        raise AssertionError("rows of 3 are odd\nand even")

    monkeypatch.setitem(layers._TORCHS, "add_rms_norm", broken)
    (found,) = run.run([ROWS], fake, 1e9)
    assert found.excluded == {TORCH: "AssertionError: rows of 3 are odd"}
    assert list(found.timed) == [OURS, COPY]


def test_memory_that_one_case_lacks_does_not_lose_the_others(
    fake: Fake, briefly: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchs_alone(monkeypatch)
    tensors = layers.tensors

    def scarce(case: Case, where: torch.device) -> Any:
        if case == ROWS:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nsee ...")
        return tensors(case, where)

    monkeypatch.setattr(layers, "tensors", scarce)
    assert carried_out(fake, tmp_path) == 1
    first, second = read(tmp_path / "new" / "r.json").outcomes
    assert first == Outcome(ROWS, {}, {OURS: "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"}, {}, 0, 0)
    assert {OURS, TORCH, COPY} == set(second.timed)
    assert torch.is_grad_enabled()


def test_a_device_that_failed_ends_the_run_and_keeps_what_there_is(
    fake: Fake, briefly: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchs_alone(monkeypatch)

    def illegal(case: Case) -> nn.Module:
        fake.broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(layers._OURS, "batch_norm", illegal)
    assert carried_out(fake, tmp_path) == 1
    error = "RuntimeError: CUDA error: an illegal memory access was encountered"
    last = capsys.readouterr().err.splitlines()[-1]
    where = tmp_path / "new" / "r.json"
    assert last == f"the device failed in {IMAGES}, and takes no more work: {error}; 2 of 2 cases are in {where}"
    first, second = read(where).outcomes
    assert {OURS, TORCH, COPY} == set(first.timed)
    assert second.excluded == {OURS: error}


def test_ctrl_c_keeps_what_was_measured(
    fake: Fake, briefly: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchs_alone(monkeypatch)

    def interrupting(case: Case) -> nn.Module:
        raise KeyboardInterrupt

    monkeypatch.setitem(layers._OURS, "batch_norm", interrupting)
    assert carried_out(fake, tmp_path) == 130
    where = tmp_path / "new" / "r.json"
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted; 1 of 2 cases are in {where}"
    found = read(where)
    assert (found.complete, [one.case for one in found.outcomes]) == (False, [ROWS])
    assert "Interrupted: not every case" in (tmp_path / "p" / "b.html").read_text()
    monkeypatch.setitem(layers._OURS, "add_rms_norm", interrupting)
    assert carried_out(fake, tmp_path) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert read(where) == found


def test_when_time_is_up_no_case_begins(
    fake: Fake, briefly: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchs_alone(monkeypatch)
    monkeypatch.setattr(command, "_LAST", 0.0)
    make = layers._TORCHS["add_rms_norm"]

    def slowly(case: Case) -> nn.Module:
        fake.clock += 70.0
        return make(case)

    monkeypatch.setitem(layers._OURS, "add_rms_norm", slowly)
    assert carried_out(fake, tmp_path, "--minutes", "1") == 0
    where = tmp_path / "new" / "r.json"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"time is up: --minutes gives more; 1 of 2 cases are in {where}"
    assert len(read(where).outcomes) == 1
