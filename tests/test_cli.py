"""The command line: answers, errors in one line, Ctrl-C, and a process that is killed."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

import normwise
from normwise import cli

NORMWISE = [sys.executable, "-c", "from normwise.cli import main; main()"]
QUICK = [
    "--norms",
    "batch,none",
    "--lrs",
    "0.25:1:2",
    "--seeds",
    "1",
    "--confirm",
    "2",
    "--steps",
    "2",
    "--workers",
    "0",
]

LOOP = """
import os, time
import torch

def train(model, lr, seed, trial):
    time.sleep(0.1)
    with open("calls.txt", "a") as file:
        file.write(f"{os.getpid()} {trial.phase} {lr} {seed} {type(model[1]).__name__}\\n")
    return 50 + torch.rand(1).item() * 10

def talking(model, lr, seed, trial):
    print("epoch 1")
    return 50 + torch.rand(1).item() * 10

def failing(model, lr, seed, trial):
    raise RuntimeError("out of luck")

def model(norm):
    return torch.nn.Sequential(torch.nn.Linear(2, 2), norm(2))

def nothing(norm):
    raise ValueError("no such width")

def holes():
    x = torch.zeros(20, 64)
    x[7] = float("nan")
    return (x, torch.zeros(20, dtype=torch.long)), (x, torch.zeros(20, dtype=torch.long))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "loop.py").write_text(LOOP)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "loop", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> int:
    """Run the command in this process; its exit code."""
    before, sys.argv = sys.argv, ["normwise", *words]
    try:
        cli.main()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 0
    finally:
        sys.argv = before
    return 0


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"normwise {normwise.__version__}\n"


def test_tune_answers_and_report_draws_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("tune", *QUICK) == 0
    printed = capsys.readouterr()
    out = Path("runs/mlp-digits")
    summary = json.loads((out / "summary.json").read_text())
    assert printed.out.startswith(summary["verdict"]["sentence"])
    assert printed.out.endswith(f"report: {out / 'report.html'}\n")
    assert all(f"warning: {warning}" in printed.out for warning in summary["warnings"])
    assert "0 of about" in printed.err
    assert summary["reproduce"]["command"] == (
        "normwise tune mlp --data digits --norms batch,none --lrs 0.25:1:2 --seeds 1 --confirm 2 --steps 2 "
        "--out runs/mlp-digits"
    )
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert call("report", str(out)) == 0
    assert (out / "report.html").read_text() == page
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"


def test_json_is_alone_on_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("tune", *QUICK, "--json", "--out", "here") == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["verdict"]["winner"] == "batch"
    assert printed == Path("here/summary.json").read_text()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_json_is_alone_even_when_the_loop_prints(workers: str, folder: Path) -> None:
    (folder / "loud.py").write_text(f"print('imported'){LOOP}")
    words = ["--norms", "batch,none", "--lrs", "0.25:1:2", "--seeds", "1", "--confirm", "2", "--workers", workers]
    process = start(folder, "tune", "loud:model", "--train", "loud:talking", *words, "--json", "--out", "here")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == (folder / "here" / "summary.json").read_text()
    assert err.count("epoch 1") == 2 * 2 * 1 + 2 * 2
    assert err.count("imported") == 1 + int(workers)


def test_a_dry_run_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("tune", *QUICK, "--dry-run") == 0
    assert "trials            about 12" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["loop.py"]


def test_explain_prints_the_four_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("explain", "[n] c [...]", "32,64,56,56") == 0
    assert capsys.readouterr().out == f"{normwise.Norm('[n] c [...]').explain((32, 64, 56, 56))}\n"
    assert call("explain", "n (g [k]) [h w]", "2,6,4,4", "g=2", "w=4") == 0
    assert capsys.readouterr().out == f"{normwise.Norm('n (g [k]) [h w]', g=2, w=4).explain((2, 6, 4, 4))}\n"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            "tune restnet",
            "no model named 'restnet'; there are mlp, cnn, resnet, transformer, lstm, or module:factory for yours; "
            "did you mean 'resnet'?",
        ),
        (
            "tune --data mnist",
            "no data named 'mnist'; there are digits, wine, breast_cancer, fashion, text, sequences, "
            "or module:function or a folder for your own",
        ),
        (
            "tune --norms bach",
            "no normalization named 'bach'; there are none, rms, layer, group, instance, batch, group:G",
        ),
        (
            "tune nowhere_to_be:found",
            "model 'nowhere_to_be:found': the module 'nowhere_to_be' cannot be imported: Module",
        ),
        ("tune loop:nothing", "model 'loop:nothing' raised ValueError: no such width (loop.py:"),
        ("tune --data loop:holes", "training data: 1 of 20 inputs are NaN or infinite, the first at index 7"),
        ("tune --lrs 1:0.1:3", "lrs '1:0.1:3' makes no grid: LOW must be smaller than HIGH"),
        ("tune --out loop.py", "loop.py is a file, not a folder"),
        ("tune --out loop.py/runs", "loop.py/runs cannot be made: "),
        (
            "tune --storage sqlite:////nowhere/s.db",
            "the storage sqlite:////nowhere/s.db cannot be used: unable to open",
        ),
        ("tune --metric loss", "metric 'loss' needs a margin"),
        (
            "tune --train loop:failing --workers 0",
            "trial (batch at learning rate 0.003906, seed 0, select) raised Runtime",
        ),
        ("tune --resume", "runs/mlp-digits has no study to resume: leave --resume out to start one"),
        ("report .", ". holds no finished study: there is no summary.json in it"),
        ("explain [n 3,4", "'[' is never closed\n  [n\n  ^"),
        ("explain [n] 3 n", "size 'n': write the name of an axis and a whole number, as in g=8"),
        ("explain [n] 3 n=-3", "size 'n=-3': write the name of an axis and a whole number, as in g=8"),
        ("explain [n] 3 =3", "size '=3': write the name of an axis and a whole number, as in g=8"),
        ("explain [n] 3,x", "shape '3,x': write whole numbers with commas between them, as in 32,64,56,56"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_leaves_nothing(
    words: str, text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    error = printed.err[printed.err.index("error: ") :]
    assert error.startswith(f"error: {text}")
    assert "Traceback" not in printed.err
    assert len(error.splitlines()) == len(text.splitlines())
    assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == ["loop.py"]


def test_a_study_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/mlp-digits").mkdir(parents=True)
    Path("runs/mlp-digits/report.html").write_text("precious")
    assert call("tune", *QUICK) == 2
    assert capsys.readouterr().err == (
        "error: runs/mlp-digits exists already: --resume goes on with the study in it, --force replaces it, "
        "--out names another folder\n"
    )
    assert Path("runs/mlp-digits/report.html").read_text() == "precious"


def test_without_its_packages_it_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "normwise.commands", raising=False)
    assert call("tune") == 2
    assert capsys.readouterr().err == (
        "error: the command line needs packages that are not installed: pip install 'normwise[tune]' "
        "(typer is missing)\n"
    )


def test_ctrl_c_while_packages_are_imported_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        """An import that Ctrl-C interrupts."""

        def find_spec(self, name: str, *_: object) -> None:
            if name == "normwise.commands":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "normwise.commands", raising=False)
    assert call("tune") == 130
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------- interrupted and killed

LONG = [
    "tune", "loop:model", "--train", "loop:train", "--norms", "a=batch,b=none", "--lrs", "0.1:1:7", "--seeds", "2",
    "--confirm", "3", "--workers", "2", "--out", "out",
]  # fmt: skip
TRIALS = 2 * 7 * 2 + 2 * 3


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*NORMWISE, *words],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finished(folder: Path) -> int:
    """Finished trials in the study's file."""
    path = folder / "out" / "study.db"
    if not path.exists():
        return 0
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
    try:
        return int(
            connection.execute("select count(*) from trials where state in ('COMPLETE', 'PRUNED')").fetchone()[0]
        )
    except sqlite3.OperationalError:  # its tables are not there yet
        return 0
    finally:
        connection.close()


def wait_for_trials(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while finished(folder) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers(folder: Path) -> set[int]:
    return {int(line.split()[0]) for line in (folder / "calls.txt").read_text().splitlines()}


def alive(pid: int) -> bool:
    """Whether a process runs, zombies aside."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 15
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"workers {pids} survive their parent"
        time.sleep(0.05)


def stored_requests(folder: Path) -> list[str]:
    from normwise.tuning.storage import open_study

    records = open_study(f"sqlite:///{folder / 'out' / 'study.db'}", "normwise").records()
    return [f"{r.request.phase} {r.request.lr} {r.request.seed}" for r in records]


def calls(folder: Path) -> list[str]:
    return [" ".join(line.split()[1:4]) for line in (folder / "calls.txt").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_study_loses_the_trials_in_flight_and_nothing_else(folder: Path) -> None:
    process = start(folder, *LONG)
    wait_for_trials(process, folder, 8)
    os.kill(process.pid, signal.SIGKILL)
    begun = len(calls(folder))
    process.communicate()
    wait_until_gone(workers(folder))
    kept = stored_requests(folder)
    assert 8 <= len(kept) < TRIALS
    assert begun - len(kept) <= 2 + 4  # two in flight, and a few that were just being handed over

    (folder / "calls.txt").rename(folder / "first.txt")
    resumed = start(folder, *LONG, "--resume")
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    again = calls(folder)
    assert not set(kept) & set(again)
    assert len(kept) + len(again) == TRIALS
    assert len(set(stored_requests(folder))) == len(stored_requests(folder)) == TRIALS
    assert "report: out/report.html" in out
    wait_until_gone(workers(folder))


def test_every_default_of_the_command_line_is_the_librarys() -> None:
    from inspect import signature

    from normwise.commands import tune as command
    from normwise.study import tune as function
    from normwise.tuning.options import Options

    here, there = signature(command).parameters, signature(function).parameters
    for name in Options.__dataclass_fields__:
        assert here[name].default == there[name].default == getattr(Options(), name), name


@pytest.mark.slow
def test_ctrl_c_saves_what_is_done_and_exits_with_130(folder: Path) -> None:
    process = start(folder, *LONG)
    wait_for_trials(process, folder, 5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the workers are in the group
    out, err = process.communicate(timeout=60)
    kept = finished(folder)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1] == (
        f"interrupted; {kept} finished trials are kept in out; go on with normwise tune loop:model --train loop:train "
        "--norms a=batch,b=none --lrs 0.1:1:7 --seeds 2 --confirm 3 --out out --resume"
    )
    assert kept >= 5
    assert [path.name for path in (folder / "out").iterdir()] == ["study.db"]
    wait_until_gone(workers(folder))
