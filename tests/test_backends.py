"""Which backends there are, word for word, and what is said where one is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

import normwise as nw
from normwise.kernels import backends as kinds
from normwise.kernels.backends import BackendError

ABSENT = ModuleNotFoundError("No module named 'normwise.kernels._cpu'", name="normwise.kernels._cpu")
BROKEN = ImportError("/there/_cpu.abi3.so: wrong ELF class: ELFCLASS32")
NOTE = {"instruction_sets": ["avx2", "portable"], "compiler": "g++ 12.2.0", "reason": None}
NO_COMPILER = {"reason": "no C++ compiler was found (c++, g++, clang++; CXX may name another)"}
NAMES = "auto, cpu, triton, reference"


def module(instruction_set: str = "avx2", threads: str = "libgomp.so.1") -> ModuleType:
    """What the extension says of itself."""
    return cast("ModuleType", SimpleNamespace(instruction_set=lambda: instruction_set, threads=lambda: threads))


def cpu(loaded: ModuleType | ImportError, note: dict[str, Any]) -> kinds.Backend:
    return kinds._cpu(loaded, note)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process, without a request unless `environment` has one."""
    clean = {name: value for name, value in os.environ.items() if name != "NORMWISE_BACKEND"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=clean | environment,
    )


def test_the_definition_is_always_there() -> None:
    reference, *others = nw.backends()
    assert reference == kinds.Backend(
        "reference", True, "torch's operators: the definition, for every pattern on every device"
    )
    assert str(reference) == (
        "reference  available  torch's operators: the definition, for every pattern on every device"
    )
    assert [other.name for other in others] == ["cpu", "triton"]


def test_the_extension_of_this_installation_tells_what_it_runs() -> None:
    found = nw.backends()[1]
    assert found.available == (kinds.extension is not None)
    if kinds.extension is not None:
        assert found.instruction_set == kinds.extension.instruction_set()
        assert found.instruction_set in ("avx512", "avx2", "portable")
        assert found.threads == kinds.extension.threads()


def test_a_loaded_extension_word_for_word() -> None:
    found = cpu(module(), NOTE)
    assert found == kinds.Backend(
        "cpu",
        True,
        "C++ kernels: avx2 on this processor, threads of libgomp.so.1; compiled for avx2, portable by g++ 12.2.0",
        "avx2",
        ("avx2", "portable"),
        "g++ 12.2.0",
        "libgomp.so.1",
    )
    assert str(found) == f"cpu        available  {found.about}"


def test_a_loaded_extension_without_a_note() -> None:
    found = cpu(module("portable", "none"), {})
    assert found.about == "C++ kernels: portable on this processor, one thread"
    assert (found.compiled, found.compiler, found.threads) == ((), None, "none")


@pytest.mark.parametrize(
    ("error", "note", "about"),
    [
        (ABSENT, NO_COMPILER, f"not compiled: {NO_COMPILER['reason']}"),
        (ABSENT, {}, "not compiled: normwise was not installed by pip, or what pip made was deleted"),
        (ABSENT, NOTE, "not compiled: normwise was not installed by pip, or what pip made was deleted"),
        (BROKEN, NOTE, "compiled, but it cannot be loaded: /there/_cpu.abi3.so: wrong ELF class: ELFCLASS32"),
        (BROKEN, NO_COMPILER, "compiled, but it cannot be loaded: /there/_cpu.abi3.so: wrong ELF class: ELFCLASS32"),
    ],
)
def test_why_it_is_missing_word_for_word(error: ImportError, note: dict[str, Any], about: str) -> None:
    found = cpu(error, note)
    assert found == kinds.Backend("cpu", False, about)
    assert str(found) == f"cpu        missing    {about}"


TAKEN = "taken when NORMWISE_BACKEND=triton asks for them"


@pytest.mark.parametrize(
    ("is_installed", "switch", "gpu", "available", "about"),
    [
        (False, "1", None, False, "Triton is not installed: pip install 'normwise[gpu]'"),
        (True, "0", None, False, "torch sees no CUDA device"),
        (True, "1", None, True, f"kernels in Triton 3.7.0, interpreted on the CPU, for tests; {TAKEN}"),
        (True, "0", "NVIDIA H100", True, f"kernels in Triton 3.7.0, on NVIDIA H100; {TAKEN}"),
    ],
)
def test_the_kernels_for_gpus_word_for_word(
    is_installed: bool,
    switch: str,
    gpu: str | None,
    available: bool,
    about: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kinds, "find_spec", lambda _: object() if is_installed else None)
    monkeypatch.setattr(kinds, "import_module", lambda _: SimpleNamespace(__version__="3.7.0"))
    monkeypatch.setenv("TRITON_INTERPRET", switch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    assert nw.backends()[2] == kinds.Backend("triton", available, about)
    refusal = kinds._refused("triton", module(), NOTE)
    assert refusal == (None if available else f"NORMWISE_BACKEND='triton': {about}; 'auto' runs what there is")


@pytest.mark.parametrize(
    ("request_", "switch", "expected"),
    [
        ("auto", "1", {"cpu": "cpu"}),
        ("triton", "1", {"cpu": "triton"}),
        ("triton", "0", {"cuda": "triton"}),
    ],
)
def test_whose_kernels_are_taken(
    request_: str, switch: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "requested", lambda: request_)
    monkeypatch.setattr(kinds, "extension", object())
    monkeypatch.setenv("TRITON_INTERPRET", switch)
    assert kinds.compiled() == expected


def test_the_note_is_read_from_its_file(tmp_path: Path) -> None:
    assert kinds._read(tmp_path / "absent.json") == {}
    (tmp_path / "note.json").write_text(json.dumps(NOTE))
    assert kinds._read(tmp_path / "note.json") == NOTE


def test_records_are_frozen_and_plain_data() -> None:
    found = cpu(module(), NOTE)
    with pytest.raises(FrozenInstanceError):
        found.available = False  # type: ignore[misc]
    assert kinds.Backend(**found.to_dict()) == found


# Requests


@pytest.mark.parametrize("request_", ["auto", "cpu", "reference"])
def test_what_can_be_met_is_not_refused(request_: str) -> None:
    assert kinds._refused(request_, module(), NOTE) is None


@pytest.mark.parametrize("request_", ["auto", "reference"])
@pytest.mark.parametrize("error", [ABSENT, BROKEN], ids=["absent", "broken"])
def test_these_need_no_extension(request_: str, error: ImportError) -> None:
    assert kinds._refused(request_, error, {}) is None


def test_refusals_word_for_word() -> None:
    assert kinds._refused("cuda", module(), NOTE) == f"NORMWISE_BACKEND='cuda': there are {NAMES}"
    assert kinds._refused("cpu", ABSENT, NO_COMPILER) == (
        "NORMWISE_BACKEND='cpu': not compiled: no C++ compiler was found (c++, g++, clang++; CXX may name "
        "another); 'auto' runs what there is"
    )
    assert kinds._refused("cpu", BROKEN, NOTE) == (
        "NORMWISE_BACKEND='cpu': compiled, but it cannot be loaded: /there/_cpu.abi3.so: wrong ELF class: "
        "ELFCLASS32; 'auto' runs what there is"
    )


@pytest.mark.parametrize(("environment", "expected"), [({}, "auto"), ({"NORMWISE_BACKEND": "reference"}, "reference")])
def test_the_environment_is_read_at_import(environment: dict[str, str], expected: str) -> None:
    code = """
import os
from normwise.kernels import backends
os.environ["NORMWISE_BACKEND"] = "too late"
print(backends.requested())
"""
    done = python(code, **environment)
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")


def test_a_bad_request_is_no_error_until_it_is_used() -> None:
    code = """
from normwise.kernels import backends
try:
    backends.requested()
except backends.BackendError as error:
    print(error)
"""
    done = python(code, NORMWISE_BACKEND="gpu")
    assert (done.stdout, done.stderr) == (f"NORMWISE_BACKEND='gpu': there are {NAMES}\n", "")


def test_a_named_backend_never_falls_back() -> None:
    """In a process where the module cannot be found."""
    code = """
import sys
sys.modules["normwise.kernels._cpu"] = None
from normwise.kernels import backends
print(backends.backends()[1].available)
backends.requested()
"""
    done = python(code, NORMWISE_BACKEND="cpu")
    assert done.stdout == "False\n"
    assert "BackendError: NORMWISE_BACKEND='cpu': not compiled: " in done.stderr


def test_the_error_is_one_of_normwises() -> None:
    assert issubclass(BackendError, nw.NormwiseError)
    assert issubclass(BackendError, RuntimeError)


# The command line

COMMAND = "import sys; sys.argv = ['normwise', 'backends', *{words}]; from normwise.cli import main; main()"


def test_the_command_prints_a_line_a_backend() -> None:
    done = python(COMMAND.format(words=[]))
    assert (done.returncode, done.stderr) == (0, "")
    *lines, request = done.stdout.splitlines()
    assert lines == [str(backend) for backend in nw.backends()]
    assert request == "NORMWISE_BACKEND asks for auto: whichever takes a call"


def test_the_command_prints_json() -> None:
    done = python(COMMAND.format(words=["--json"]), NORMWISE_BACKEND="reference")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["requested"] == "reference"
    assert [kinds.Backend(**row | {"compiled": tuple(row["compiled"])}) for row in found["backends"]] == [
        *nw.backends()
    ]


def test_the_command_ends_with_2_where_the_request_cannot_be_met() -> None:
    done = python(COMMAND.format(words=[]), NORMWISE_BACKEND="gpu")
    assert done.returncode == 2
    assert done.stdout.splitlines() == [str(backend) for backend in nw.backends()]
    assert done.stderr == f"error: NORMWISE_BACKEND='gpu': there are {NAMES}\n"


def test_a_call_that_no_kernel_takes_is_refused_by_name() -> None:
    code = """
import torch, normwise as nw
print(nw.LayerNorm(4)(torch.randn(2, 4)).shape)
try:
    nw.LayerNorm(4, dtype=torch.float64)(torch.randn(2, 4, dtype=torch.float64))
except nw.BackendError as error:
    print(error)
"""
    done = python(code, NORMWISE_BACKEND="cpu")
    message = "NORMWISE_BACKEND='cpu': none of its kernels takes this call; norm.explain(x) says why"
    assert done.stdout == f"torch.Size([2, 4])\n{message}\n"
