"""Studies that several processes share: a server, an empty database, a folder, and what stands in the storage."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import postgres
import pytest

from normwise import cli
from normwise.study import Study
from normwise.tuning import address
from normwise.tuning.records import Request

LOOP = """
import os, time
from pathlib import Path
import torch

def model(norm):
    return torch.nn.Sequential(torch.nn.Linear(2, 2), norm(2))

def train(model, lr, seed, trial):
    with Path(f"calls-{os.getpid()}").open("a") as file:
        file.write(f"{trial.phase} {lr} {seed}\\n")
    if "STUCK" in os.environ and len(Path(f"calls-{os.getpid()}").read_text().splitlines()) == 3:
        Path("stuck").touch()
        time.sleep(600)
    while "STUCK" not in os.environ and not Path("go").exists():
        time.sleep(0.02)
    return 50 + 10 * lr + torch.rand(1).item()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    with postgres.server() as running:
        yield running


@pytest.fixture
def url(server: postgres.Server, tmp_path: Path) -> str:
    """The address of an empty database."""
    return server.create(f"test_{tmp_path.name[-30:].strip('_').lower()}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "loop.py").write_text(LOOP)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "loop", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> int:
    """Run the command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["normwise", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def outcomes(study: Study) -> list[tuple[Request, float | None]]:
    return [(record.request, record.score) for record in study.records]


def trials(url: str, name: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=address.connect(url)).trials
