"""Every lesson is reproduced at the size that CI runs; the page and the command say what the lessons say."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from normwise.commands import app
from normwise.errors import DiagnosisError, StudyError
from normwise.lessons import Chart, Check, Lesson, about, gather, tell
from normwise.lessons.gather import NAMES, measure_of, run, script
from normwise.lessons.page import check_place, render, write
from normwise.lessons.words import grid, text_of
from tests.pages import Text, drawings, own
from tests.settings import threads

LESSONS = Path(__file__).parent.parent / "examples" / "lessons"
LONGEST_SCRIPT = 140


def lesson(
    *, name: str = "sums", measured: float = 2.0, claim: str = "One and one is two.", bars: bool = False
) -> Lesson:
    """A lesson that is reproduced if 2 is measured."""
    chart = Chart("A <b>title</b>", "x", "y", {"<i>one</i>": (["a", "b"] if bars else [1, 2], [3.0, 4.0])}, bars, "y")
    checks = (about("the sum", measured, 2, 1.25, "rounding"), Check("the error", 0.0, high=1e-6))
    return Lesson(name, claim, "paper & pencil", ({"a": 1, "sum": measured},), checks, chart, "small")


# ------------------------------------------------------------------------------------------------------ the lessons


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_lesson_is_reproduced_at_small_size(name: str) -> None:
    with threads(1):
        found = measure_of(name)("small")
    assert found.reproduced, text_of(found)
    assert (found.name, found.size) == (name, "small")
    assert found.table
    assert all(list(row) == list(found.table[0]) for row in found.table)
    assert found.chart.series
    assert all(len(xs) == len(ys) > 0 for xs, ys in found.chart.series.values())
    json.loads(found.to_json())
    assert found.claim in render([found])


def test_the_names_are_those_of_the_scripts_and_of_the_readme() -> None:
    assert set(NAMES) == {path.stem for path in LESSONS.glob("*.py")}
    readme = (LESSONS.parent / "README.md").read_text()
    assert re.findall(r"- `lessons/(\w+)\.py`: ", readme) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_is_a_short_script(name: str) -> None:
    text = script(name).read_text()
    assert len(text.splitlines()) <= LONGEST_SCRIPT
    assert len(text.split('"""')[1].strip().splitlines()) >= 5  # tells a student what and why


def test_a_script_runs_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = [sys.executable, "-W", "error", str(LESSONS / "conditioning.py"), "--small", "--plot", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["verdict: reproduced", f"page: {page}"]
    assert "conditioning.py --small" in page.read_text()


# ------------------------------------------------------------------------------------------------------ the record


@pytest.mark.parametrize(
    ("measured", "low", "high", "holds"),
    [
        (1.0, 1.0, 2.0, True),
        (2.0, 1.0, 2.0, True),
        (0.99, 1.0, 2.0, False),
        (2.01, 1.0, 2.0, False),
        (math.nan, 1.0, math.inf, False),
        (math.inf, 1.0, 2.0, False),
        (-5.0, -math.inf, 0.0, True),
    ],
)
def test_a_check_holds_within_its_range(measured: float, low: float, high: float, holds: bool) -> None:
    assert Check("number", measured, low, high).holds is holds


def test_a_check_without_a_range_is_refused() -> None:
    with pytest.raises(DiagnosisError, match=re.escape("ratio: a range from -inf to inf tells nothing")):
        Check("ratio", 1.0)
    with pytest.raises(DiagnosisError, match=re.escape("ratio: a range from 2 to 1 tells nothing")):
        Check("ratio", 1.0, 2, 1)


def test_one_number_outside_its_range_decides() -> None:
    assert (lesson().verdict, lesson(measured=3.0).verdict) == ("reproduced", "not reproduced")
    assert repr(lesson(measured=3.0)) == (
        "Lesson: One and one is two. Not reproduced: the sum 3 (1.6 to 2.5); the error 0 (at most 1e-06)"
    )


def test_text() -> None:
    assert text_of(lesson(measured=3.0)).splitlines() == [
        "sums: One and one is two.",
        "setting (small): paper & pencil",
        "",
        "a  sum",
        "1    3",
        "",
        "  NOT the sum: 3, expected 1.6 to 2.5",
        "  ok  the error: 0, expected at most 1e-06",
        "verdict: not reproduced",
    ]


def test_grid_aligns_text_left_and_numbers_right() -> None:
    assert grid([{"n": "ab", "x": 1000}, {"n": "c", "x": 0.5}]) == ["n       x", "ab  1,000", "c     0.5"]


def test_plot_and_frame() -> None:
    figure = lesson(bars=True).plot()
    assert [trace.type for trace in figure.data] == ["bar"]
    assert figure.layout.yaxis.type == "log"
    assert list(lesson().to_frame()["sum"]) == [2.0]


def test_a_script_ends_with_1_where_a_claim_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        tell(lambda size: lesson(measured=3.0), ["--small"])
    assert raised.value.code == 1
    tell(lambda size: lesson(), [])
    assert capsys.readouterr().out.endswith("verdict: reproduced\n")


# -------------------------------------------------------------------------------------------------------- the page


def test_the_page_says_claim_setting_number_and_verdict() -> None:
    page = render([lesson(name="one"), lesson(name="two", measured=3.0, claim="<script>alert(1)</script>", bars=True)])
    text = own(page)
    found = Text(text)
    assert found.loaded == []
    assert "<script>alert(1)" not in text
    for words in ("1 of 2 claims reproduced.", "Setting: paper & pencil.", "1.6 to 2.5", "Not reproduced.", "rounding"):
        assert words in found.text
    one, two = drawings(page)
    assert (one["name"], two["name"]) == ("chart-one", "chart-two")
    assert one["data"][-1]["y"] == two["data"][0]["y"] == [3.0, 4.0]
    assert one["data"][0]["name"] == two["data"][0]["name"] == "&lt;i&gt;one&lt;/i&gt;"


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"cannot write the lessons to .*no/page\.html: No such file or directory"):
        write([lesson()], tmp_path / "no" / "page.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StudyError, match=r"cannot write the lessons to .*folder: Is a directory"):
        write([lesson()], tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_place_is_checked_beforehand(tmp_path: Path) -> None:
    check_place(tmp_path / "page.html")
    with pytest.raises(StudyError, match=r"to .*: it is a folder\. Give a file name in a folder that exists\.$"):
        check_place(tmp_path)
    with pytest.raises(StudyError, match=r"to .*: there is no folder .*no\. Give a file name"):
        check_place(tmp_path / "no" / "page.html")


# ------------------------------------------------------------------------------------------------- all of them


def test_unknown_names() -> None:
    with pytest.raises(StudyError, match=r"^no lesson named 'dept'; there are linear, .*; did you mean 'depth'\?$"):
        run(["linear", "dept"], "small")


def test_a_script_that_was_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gather, "_PLACES", (tmp_path,))
    with pytest.raises(StudyError, match=r"^the lesson 'linear' is not in .*: install normwise again$"):
        script("linear")


def stub(folder: Path, **ends: str) -> None:
    """Scripts that take the place of lessons, each with the end of its `measure`."""
    folder.mkdir(exist_ok=True)
    for name, end in ends.items():
        (folder / f"{name}.py").write_text(
            "from normwise.lessons import Chart, Check, Lesson\n"
            "def measure(size):\n"
            "    chart = Chart('t', 'x', 'y', {'one': ([1], [2.0])})\n"
            f"    {end}\n"
            f"    return Lesson({name!r}, 'Claim.', 'here', ({{'a': 1}},), (Check('n', value, 1, 2),), chart, size)\n"
        )


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two lessons that are reproduced, one that is not, one that raises, one that is interrupted."""
    folder = tmp_path / "stubs"
    good, bad, interrupted = "value = 1", "raise ArithmeticError('no number')", "raise KeyboardInterrupt"
    stub(folder, linear=good, conditioning=good, depth="value = 3", inputs=bad, recurrent=interrupted)
    monkeypatch.setattr(gather, "_PLACES", (folder,))
    return tmp_path


def test_lessons_come_in_the_order_asked_for(stubs: Path) -> None:
    seen: list[str] = []
    found = run(["depth", "linear"], "small", workers=0, progress=lambda one: seen.append(one.name))
    assert [one.name for one in found] == seen == ["depth", "linear"]
    assert [one.reproduced for one in found] == [False, True]


@pytest.mark.slow
def test_lessons_run_in_processes() -> None:
    found = run(["conditioning", "linear"], "small", workers=2)
    assert [(one.name, one.reproduced) for one in found] == [("conditioning", True), ("linear", True)]


def invoke(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["lessons", "--workers", "0", *words])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_writes_a_page_and_a_table(stubs: Path) -> None:
    page = stubs / "page.html"
    code, out, err = invoke("--small", "--out", str(page), "linear", "conditioning")
    assert code == 0, err
    assert err.splitlines() == ["1 of 2: linear reproduced", "2 of 2: conditioning reproduced"]
    assert out.splitlines() == [
        "lesson        number  expected  measured  holds",
        "linear        n       1 to 2    1         yes",
        "conditioning  n       1 to 2    1         yes",
        "",
        f"page: {page}",
    ]
    assert "2 of 2 claims reproduced." in page.read_text()


def test_the_command_ends_with_1_where_a_claim_fails_and_still_writes(stubs: Path) -> None:
    page = stubs / "page.html"
    code, out, _ = invoke("--small", "--out", str(page), "depth", "linear")
    assert code == 1
    assert "depth   n       1 to 2    3         NO" in out
    assert "1 of 2 claims reproduced." in page.read_text()


@pytest.mark.parametrize(("name", "code"), [("recurrent", 130), ("inputs", 1)])
def test_the_command_leaves_nothing_half_written(stubs: Path, name: str, code: int) -> None:
    page = stubs / "page.html"
    page.write_text("of yesterday")
    assert invoke("--small", "--out", str(page), "linear", name)[0] == code
    assert page.read_text() == "of yesterday"
    assert sorted(path.name for path in stubs.iterdir()) == ["page.html", "stubs"]


def test_the_command_refuses_before_it_measures(stubs: Path) -> None:
    code, out, err = invoke("--out", str(stubs), "linear")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: cannot write the lessons to {stubs}: it is a folder.")
    assert invoke("--out", str(stubs / "p.html"), "nonsense")[0] == 2
