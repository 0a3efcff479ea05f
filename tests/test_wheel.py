"""How the package is built: with a compiler, without one, from a checkout, from a source distribution.

What is built is this project, with a C++ source of a few lines in place of the kernels, so that it takes a second.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import shutil
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parent.parent
LIBRARY, NOTE = "normwise/kernels/_cpu.abi3.so", "normwise/kernels/_cpu_build.json"
NO_COMPILER = "no C++ compiler was found (c++, g++, clang++; CXX may name another)"

KERNELS = """
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
extern "C" const char* JOIN(text_, NW_ISA)() {
#if defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "portable";
#endif
}
"""
MODULE = """
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <string>
extern "C" const char* text_portable();
#ifdef NW_HAS_AVX2
extern "C" const char* text_avx2();
#endif
#ifdef NW_HAS_AVX512
extern "C" const char* text_avx512();
#endif
static PyObject* texts(PyObject*, PyObject*) {
  std::string all;
#ifdef NW_HAS_AVX512
  all += text_avx512() + std::string(" ");
#endif
#ifdef NW_HAS_AVX2
  all += text_avx2() + std::string(" ");
#endif
  all += text_portable();
  return PyUnicode_FromString(all.c_str());
}
static PyMethodDef methods[] = {{"texts", texts, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__cpu() { return PyModuleDef_Init(&module); }
"""


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hatch_build: Any = load("hatch_build", ROOT / "hatch_build.py")
compiled = pytest.mark.skipif(
    sys.platform not in hatch_build.LINKING or not any(map(shutil.which, hatch_build.COMPILERS)),
    reason="needs a C++ compiler",
)
processor = pytest.mark.skipif(
    hatch_build.platform.machine() not in ("x86_64", "AMD64"), reason="the instruction sets are those of x86-64"
)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NORMWISE_CPU", "CXX", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return write_sources(tmp_path / "csrc")


def write_sources(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "kernels.cpp").write_text(KERNELS)
    (folder / "module.cpp").write_text(MODULE)
    return folder


def make_project(root: Path) -> Path:
    root.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    left_out = shutil.ignore_patterns("__pycache__", "csrc", "_cpu.abi3.so", "_cpu_build.json")
    shutil.copytree(ROOT / "normwise", root / "normwise", ignore=left_out)
    shutil.copytree(ROOT / "examples" / "lessons", root / "examples" / "lessons", ignore=left_out)
    write_sources(root / "normwise" / "kernels" / "csrc")
    return root


def make_wheel(project: Path, out: Path) -> Path:
    out.mkdir()
    return Path(next(iter(WheelBuilder(str(project)).build(directory=str(out), versions=["standard"]))))


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which something older was built in place."""
    root = make_project(tmp_path_factory.mktemp("checkout") / "project")
    (root / LIBRARY).write_text("stale")
    (root / NOTE).write_text("{}")
    return root


@pytest.fixture(scope="session")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NORMWISE_CPU", "require")
        return make_wheel(project, tmp_path_factory.mktemp("wheel") / "dist")


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def note(wheel: Path) -> dict[str, Any]:
    return dict(json.loads(zipfile.ZipFile(wheel).read(NOTE)))


def metadata(wheel: Path) -> dict[str, str]:
    (name,) = [name for name in names(wheel) if name.endswith(".dist-info/WHEEL")]
    return dict(Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode()))


# With a compiler


@compiled
def test_one_wheel_for_every_python(wheel: Path) -> None:
    pattern = r"normwise-\d+\.\d+\.\d+-cp311-abi3-(manylinux_2_\d+|musllinux_\d_\d|macosx_\d+_\d+)_\w+\.whl"
    assert re.fullmatch(pattern, wheel.name)
    assert metadata(wheel)["Root-Is-Purelib"] == "false"
    assert metadata(wheel)["Tag"] == wheel.stem.split("-", 2)[2]


@compiled
def test_the_wheel_has_the_module_and_the_note_but_no_source(wheel: Path) -> None:
    lesson = next((ROOT / "examples" / "lessons").glob("*.py")).name
    assert {LIBRARY, NOTE, "normwise/__init__.py", f"normwise/_lessons/{lesson}"} <= names(wheel)
    assert not [name for name in names(wheel) if name.endswith((".cpp", ".h")) or "csrc" in name]


@compiled
@processor
def test_each_instruction_set_is_compiled_with_its_own_flags(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extract(LIBRARY, tmp_path)
    assert load("_cpu", tmp_path / LIBRARY).texts() == "avx512 avx2 portable"
    assert note(wheel)["instruction_sets"] == ["avx512", "avx2", "portable"]
    assert note(wheel)["reason"] is None
    assert note(wheel)["compiler"]


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="about ELF")
def test_the_library_shows_python_one_name_and_needs_glibc_alone(wheel: Path, tmp_path: Path) -> None:
    library = Path(zipfile.ZipFile(wheel).extract(LIBRARY, tmp_path))
    assert ctypes.CDLL(str(library)).PyInit__cpu
    with pytest.raises(AttributeError, match="undefined symbol: text_portable"):
        _ = ctypes.CDLL(str(library)).text_portable
    needed = set(re.findall(rb"\b(lib[\w+-]+)\.so[.\d]*", library.read_bytes()))
    assert needed <= {b"libc", b"libm", b"libdl"}


@compiled
def test_a_source_distribution_builds_the_same_wheel(
    wheel: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (packed,) = SdistBuilder(str(project)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert (unpacked / "hatch_build.py").exists()
    assert not (unpacked / LIBRARY).exists()
    assert not (unpacked / NOTE).exists()
    monkeypatch.setenv("NORMWISE_CPU", "require")
    again = make_wheel(unpacked, tmp_path / "dist")
    assert again.name == wheel.name
    assert names(again) == names(wheel)
    assert note(again) == note(wheel)


# Without


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_wheel_is_pure_and_says_why(project: Path, tmp_path: Path) -> None:
    made = make_wheel(project, tmp_path / "dist")
    assert re.fullmatch(r"normwise-\d+\.\d+\.\d+-py3-none-any\.whl", made.name)
    assert metadata(made)["Root-Is-Purelib"] == "true"
    assert LIBRARY not in names(made)
    assert note(made) == {"instruction_sets": [], "compiler": None, "reason": NO_COMPILER, "fingerprint": None}


@pytest.mark.usefixtures("no_compiler")
def test_a_failure_is_an_error_where_it_is_required(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NORMWISE_CPU", "require")
    with pytest.raises(Exception, match=f"^{re.escape(NO_COMPILER)}$") as raised:
        make_wheel(project, tmp_path / "dist")
    assert type(raised.value).__name__ == "BuildError"
    assert list((tmp_path / "dist").iterdir()) == []


def test_it_can_be_left_out(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMWISE_CPU", "off")
    found = hatch_build.build(sources, tmp_path)
    assert found.reason == "NORMWISE_CPU=off when normwise was installed"
    assert str(found) == "kernels for the CPU: not compiled: NORMWISE_CPU=off when normwise was installed"


def test_another_wish_is_refused(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMWISE_CPU", "yes")
    with pytest.raises(ValueError, match=r"^NORMWISE_CPU='yes': it may be 'require' or 'off'$"):
        hatch_build.build(sources, tmp_path)


def reason(sources: Path, folder: Path) -> str:
    """Why the build fails; nothing is left of an older one, and the note says the same."""
    (folder / "_cpu.abi3.so").write_text("stale")
    found = hatch_build.build(sources, folder)
    assert json.loads((folder / "_cpu_build.json").read_text())["reason"] == found.reason
    assert not (folder / "_cpu.abi3.so").exists()
    assert not (folder / "_cpu.abi3.part").exists()
    return str(found.reason)


@compiled
def test_the_compilers_first_errors_are_kept(sources: Path, tmp_path: Path) -> None:
    (sources / "module.cpp").write_text("#error one\n#error two\n#error three\n#error four\n")
    at = re.escape(str(sources / "module.cpp"))
    errors = "; ".join(
        rf"{at}:{line}:2: error: (#error )?{text}" for line, text in enumerate(("one", "two", "three"), 1)
    )
    assert re.fullmatch(rf"c\+\+ could not compile module\.cpp \(module\): {errors}", reason(sources, tmp_path))


@compiled
def test_a_linker_that_fails_is_a_reason(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDFLAGS", "-lno_such_library")
    said = reason(sources, tmp_path)
    assert said.startswith("c++ could not link _cpu.abi3.so: ")
    assert "no_such_library" in said


@compiled
@pytest.mark.parametrize(
    ("cxx", "expected"),
    [
        ("no-such-c++ -m64", "no C++ compiler was found (CXX=no-such-c++ -m64)"),
        ("false", "false does not work: exit code 1"),
    ],
)
def test_a_compiler_that_is_named_is_the_only_one(
    cxx: str, expected: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", cxx)
    assert reason(sources, tmp_path) == expected


@pytest.mark.skipif(sys.platform not in hatch_build.LINKING, reason="another reason comes first")
def test_pythons_headers_may_be_missing(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hatch_build.sysconfig, "get_path", lambda name: {"include": "/nowhere"}[name])
    assert reason(sources, tmp_path) == (
        "Python.h is not in /nowhere: Python's headers are a package of their own, often python3-dev"
    )


def test_another_system_is_a_reason(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hatch_build.sys, "platform", "win32")
    assert reason(sources, tmp_path) == "they are made for Linux and macOS, and this is win32"


# In place


@compiled
def test_only_a_change_is_compiled_again(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def count(*args: Any) -> None:
        calls.append(1)
        Path(args[-1]).write_text("compiled")

    monkeypatch.setattr(hatch_build, "_compile", count)
    first = hatch_build.build(sources, tmp_path)
    assert hatch_build.build(sources, tmp_path) == first
    assert len(calls) == 1
    (sources / "kernels.cpp").write_text(KERNELS + "// another")
    assert hatch_build.build(sources, tmp_path).fingerprint != first.fingerprint
    assert len(calls) == 2
    monkeypatch.setenv("CXXFLAGS", "-DOTHER")
    hatch_build.build(sources, tmp_path)
    monkeypatch.setenv("LDFLAGS", "-lm")
    hatch_build.build(sources, tmp_path)
    assert len(calls) == 4
    (tmp_path / "_cpu.abi3.so").unlink()
    hatch_build.build(sources, tmp_path)
    assert len(calls) == 5


@compiled
def test_an_editable_installation_builds_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_project(tmp_path / "project")
    monkeypatch.setenv("NORMWISE_CPU", "require")
    builder = WheelBuilder(str(root))
    (made,) = builder.build(directory=str(tmp_path / "dist"), versions=["editable"])
    assert LIBRARY not in names(Path(made))
    assert load("_cpu", root / LIBRARY).texts().split()[-1] == "portable"
    assert json.loads((root / NOTE).read_text())["reason"] is None


# Other machines


@pytest.mark.parametrize("machine", ["arm64", "aarch64"])
def test_other_processors_take_the_portable_path(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hatch_build.platform, "machine", lambda: machine)
    compiler = hatch_build.Compiler(("c++",), "c++ 12")
    sets = [name for name, flags in hatch_build.INSTRUCTION_SETS.items() if hatch_build._supports(compiler, flags)]
    assert sets == ["portable"]
    kernels, module = hatch_build.translation_units(sets)
    assert (kernels.source, kernels.name, kernels.flags) == (
        "kernels.cpp",
        "portable",
        (*hatch_build.FLAGS, "-DNW_ISA=portable"),
    )
    assert (module.source, module.flags) == ("module.cpp", (*hatch_build.FLAGS, "-DNW_HAS_PORTABLE"))


@compiled
@processor
def test_a_compiler_that_lacks_an_instruction_set_leaves_it_out() -> None:
    compiler = hatch_build.find_compiler()
    assert hatch_build._supports(compiler, ("-mavx2",))
    assert not hatch_build._supports(compiler, ("-mavx2", "-mavx9000"))


@pytest.mark.parametrize(
    ("content", "machine", "tag"),
    [
        (b"\0GLIBC_2.2.5\0GLIBC_2.14\0GLIBC_2.34\0", "x86_64", "manylinux_2_34_x86_64"),
        (b"\0GLIBC_2.2.5\0GLIBC_2.14\0", "x86_64", "manylinux_2_17_x86_64"),
        (b"\0GLIBC_2.17\0GLIBC_2.28\0", "aarch64", "manylinux_2_28_aarch64"),
        (b"\0GLIBC_2.17\0", "riscv64", "this_system"),
        (b"no names of glibc", "x86_64", "this_system"),
    ],
)
def test_the_platform_is_the_oldest_glibc_that_serves(
    content: bytes, machine: str, tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hatch_build.sys, "platform", "linux")
    monkeypatch.setattr(hatch_build.platform, "machine", lambda: machine)
    monkeypatch.setattr(hatch_build, "platform_tags", lambda: iter(["this_system"]))
    (tmp_path / "library.so").write_bytes(content)
    assert hatch_build.platform_tag(tmp_path / "library.so") == tag
