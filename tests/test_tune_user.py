"""Finding and calling the user's code, and the one line it is blamed in."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from normwise.errors import StudyError
from normwise.tuning.seeding import one_thread, seeded
from normwise.tuning.user import blame, name_of, one_line, resolve
from tests.settings import threads


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def message(spec: str) -> str:
    with pytest.raises(StudyError) as caught:
        resolve(spec, "model")
    return str(caught.value)


def test_the_working_directory_is_searched(folder: Path) -> None:
    (folder / "found_here.py").write_text("class Nets:\n    def deep(): return 7\n")
    assert resolve("found_here:Nets.deep", "model")() == 7


def test_names_that_lead_nowhere(folder: Path) -> None:
    (folder / "lacking.py").write_text("size = 3\n")
    assert message("lacking") == "model 'lacking' is not of the form module:function"
    assert message("lacking:deep") == "model 'lacking:deep': lacking has no attribute 'deep'"
    assert message("lacking:size") == "model 'lacking:size' is a int, not a function"
    assert message("absent_module:f") == (
        "model 'absent_module:f': the module 'absent_module' cannot be imported: "
        "ModuleNotFoundError: No module named 'absent_module'"
    )


def test_a_module_that_fails_is_named_with_its_line(folder: Path) -> None:
    (folder / "failing.py").write_text("import math\n\nmath.sqrt(-1)\n")
    (folder / "misspelt.py").write_text("x = 1\ndef f(:\n")
    assert message("failing:f").endswith("cannot be imported: ValueError: math domain error (failing.py:3)")
    assert "SyntaxError" in message("misspelt:f")
    assert message("misspelt:f").endswith("(misspelt.py:2)")


def test_an_error_of_the_user_is_one_line_and_one_of_the_study_passes() -> None:
    with (
        pytest.raises(StudyError, match=r"^model raised RuntimeError: a b \(test_tune_user.py:\d+\)$"),
        blame("model raised"),
    ):
        raise RuntimeError("a\n   b")
    with pytest.raises(StudyError, match=r"^known$"), blame("model raised"):
        raise StudyError("known")
    assert len(one_line(ValueError("x" * 1000))) < 350
    assert one_line(KeyError()) == "KeyError"


def test_a_callable_is_named_by_module_and_name() -> None:
    assert name_of(test_a_callable_is_named_by_module_and_name) == (
        f"{__name__}:test_a_callable_is_named_by_module_and_name"
    )


def test_seeded_decides_every_generator_and_restores_it() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with seeded(3):
        first = draw()
    with seeded(3):
        assert draw() == first
    with seeded(4):
        assert draw() != first
    after = random.getstate(), np.random.get_state()[1], torch.get_rng_state()
    assert before[0] == after[0]
    assert (before[1] == after[1]).all()
    assert before[2].equal(after[2])


def test_one_thread_puts_the_number_back() -> None:
    with threads(2):
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
