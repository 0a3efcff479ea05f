"""Records, their JSON, what moved between two runs, and the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from bench_stubs import IMAGES, LLAMA, MACHINE, ROWS, around, failed, outcome, results

from normwise.bench import page, screen
from normwise.bench.compare import compare
from normwise.bench.results import Results, from_json, read, save
from normwise.errors import StudyError
from tests.pages import Text, drawings, own

# ------------------------------------------------------------------------------------------------------- the records


def test_speed_and_percent_by_hand() -> None:
    found = outcome(ROWS, ours=0.002, copy=0.001)  # forward and backward: 5 tensors of 25,600 bytes, the copy 2
    assert found.speed("normwise") == pytest.approx(5 * 25_600 / 0.002 / 1e9)
    assert found.percent("normwise") == pytest.approx(100 * (5 / 0.002) / (2 / 0.001))
    added = outcome(replace(ROWS, operation="add_layer_norm"), ours=0.004, copy=0.002)  # 8 tensors, the copies 4
    assert added.percent("normwise") == pytest.approx(100 * (8 / 0.004) / (4 / 0.002))
    model = outcome(LLAMA)
    assert (model.speed("normwise"), model.percent("normwise")) == (None, None)


def test_json_and_back() -> None:
    starred = replace(outcome(IMAGES), inexact={"torch": "off"}, excluded={"oneDNN": "RuntimeError: no"})
    found = results(outcome(LLAMA), starred, failed(ROWS), complete=False)
    assert from_json(found.to_json()) == found
    data = json.loads(found.to_json())
    assert (data["schema"], data["complete"], data["machine"]) == (1, False, MACHINE)
    assert [one["name"] for one in data["outcomes"]] == [str(LLAMA), str(IMAGES), str(ROWS)]


def test_a_file_is_written_whole_and_read_back(tmp_path: Path) -> None:
    path = save(results(), tmp_path)
    assert path == tmp_path / "results.json"
    assert read(path) == read(tmp_path) == results()
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_hold_no_results(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(
        StudyError, match=f"^{re.escape(f'cannot read the results {path}: No such file or directory')}$"
    ):
        read(path)
    for text, reason in (
        ('{"schema": 2}', "ValueError: schema 2, and this version reads 1"),
        ("{}", "KeyError: 'schema'"),
        ("[]", "TypeError: list indices must be integers or slices, not str"),
    ):
        path.write_text(text)
        with pytest.raises(StudyError) as caught:
            read(path)
        assert str(caught.value) == f"{path} holds no results of normwise bench: {reason}"


# ---------------------------------------------------------------------------------------------------------- what moved


def test_a_planted_slowdown_is_found_and_named() -> None:
    now = results(outcome(LLAMA), outcome(ROWS, ours=0.003), outcome(IMAGES))
    found = compare(results(), now)
    assert found.compared == 6
    assert found.notes == ()
    assert list(map(str, found.moves)) == [
        "layer_norm 64x100 float32 training forward+backward: normwise is 1.50 times slower (2 -> 3 ms)"
    ]


def test_moves_of_models_and_the_largest_first() -> None:
    now = results(outcome(LLAMA, ours=0.001), outcome(ROWS, torch=0.004), outcome(IMAGES))
    assert list(map(str, compare(results(), now).moves)) == [
        "llama training: normwise is 2.00 times faster (2 -> 1 ms)",
        "layer_norm 64x100 float32 training forward+backward: torch is 1.33 times slower (3 -> 4 ms)",
    ]


def test_noise_does_not_move() -> None:
    slightly = results(outcome(LLAMA), outcome(ROWS, ours=0.002 * 1.15), outcome(IMAGES))
    assert compare(results(), slightly).moves == ()  # quartiles are apart, but two runs differ by as much
    slower_machine = [outcome(case, ours=0.006, torch=0.009, copy=0.003) for case in (LLAMA, ROWS, IMAGES)]
    assert compare(results(), results(*slower_machine)).moves == ()
    other_copy = [outcome(LLAMA), outcome(ROWS, copy=0.003), outcome(IMAGES, copy=0.003)]
    assert compare(results(), results(*other_copy)).moves == ()
    base, wide = outcome(ROWS), outcome(ROWS, ours=0.003)
    blurred = replace(wide.timed["normwise"], share=around(wide.timed["normwise"].share.median, width=0.6))
    overlapping = replace(wide, timed={**wide.timed, "normwise": blurred})
    assert compare(results(base), results(overlapping)).moves == ()


def test_disturbed_cases_are_not_compared() -> None:
    slow = replace(outcome(ROWS, ours=0.009), rounds=5, dirty=6)
    found = compare(results(), results(outcome(LLAMA), slow, outcome(IMAGES)))
    assert (found.moves, found.compared) == ((), 4)
    assert found.notes == ("1 cases were disturbed in one run or the other, and are not compared",)


def test_notes_say_what_makes_two_runs_hard_to_compare() -> None:
    now = Results({**MACHINE, "threads": 1}, True, (outcome(LLAMA), failed(ROWS)))
    assert compare(results(), now).notes == (
        "threads was 2, and is 1",
        "1 cases are only in the earlier run, 0 only in this one",
        "layer_norm 64x100 float32 training forward+backward was right, and is wrong",
    )


# ------------------------------------------------------------------------------------------------------------ on screen


def test_lines() -> None:
    assert screen.line(outcome(ROWS)) == (
        "layer_norm 64x100 float32 training forward+backward: 2 ± 0.04 ms, 125 % of the copy's speed, torch 1.50x"
    )
    disturbed = replace(outcome(LLAMA), dirty=12, inexact={"torch": "off"})
    assert screen.line(disturbed) == "llama training: 2 ± 0.04 ? ms, torch 1.50*x"
    assert screen.remarks([disturbed, outcome(ROWS)]) == [
        "* llama training: torch: off",
        "? most rounds of 1 of 2 cases were disturbed: the machine is busy",
    ]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    screen.show([outcome(LLAMA), replace(outcome(ROWS), inexact={"torch": "off by [b]"}), failed(IMAGES)])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["Whole", "models;", "the", "others'", "times", "as", "multiples", "of", "normwise's"],
        ["case", "normwise,", "ms", "torch"],
        ["llama", "training", "2", "±", "0.04", "1.50"],
        ["Operations;", "the", "others'", "times", "as", "multiples", "of", "normwise's"],
        ["case", "normwise,", "ms", "GB/s", "%", "of", "copy", "torch"],
        [*str(ROWS).split(), "2", "±", "0.04", "0.1", "125", "1.50*"],
        [*str(IMAGES).split(), "FAILED"],
        f"FAILED, not timed: {IMAGES}: the output is off by 0.2 of its largest value".split(),
        f"* {ROWS}: torch: off by [b]".split(),
    ]


def test_the_headline_is_of_whole_models() -> None:
    assert screen.headline([outcome(LLAMA), outcome(ROWS)]) == (
        "A step with torch's layers, over one with normwise's: llama training 1.50."
    )
    assert screen.headline([outcome(ROWS)]) == ""


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    path = page.write(results(outcome(LLAMA), outcome(ROWS), failed(IMAGES), complete=False), tmp_path)
    written = path.read_text()
    text = own(written)
    found = Text(text)
    assert found.loaded == []
    assert "<b>abacus" not in text
    for words in ("<b>abacus</b>", "llama training 1.50", "Interrupted", "FAILED, not timed", "125", "2 ± 0.04"):
        assert words in found.text
    assert [drawing["name"] for drawing in drawings(written)] == ["bars-models", "bars-layer_norm"]


def test_bars_reach_for_the_copy() -> None:
    figure = page._figure("layer_norm", [outcome(ROWS)])
    ours, torch = figure.traces
    assert (ours["name"], ours["orientation"]) == ("normwise", "h")
    assert ours["x"] == pytest.approx([125])  # 5 tensors in 2 ms, where the copy takes 1 ms for 2
    assert torch["x"] == pytest.approx([100 * 5 / 3 / 2])
    assert ours["error_x"]["array"] == pytest.approx([2.5])
    assert ours["text"] == ["normwise, layer_norm 64x100 float32 training forward+backward<br>2 ± 0.04 ms, 0.1 GB/s"]
    assert figure.layout["shapes"][0]["x0"] == 100
    model = page._figure("models", [outcome(LLAMA)])
    assert [trace["x"] for trace in model.traces] == [pytest.approx([150]), pytest.approx([100])]
