"""Compiles the kernels for the CPU into the package, where there is a C++ compiler. Hatchling calls it.

The result is one extension module for CPython's stable ABI, which serves every Python from 3.11 on and every torch. The
same source is compiled once for each instruction set; which one runs is decided when it is loaded. Nothing is ever
compiled later than this. Beside the module lies a build note: what it was compiled for and by, or why it was not.

In a checkout `python hatch_build.py` compiles in place, as `pip install -e .` does; what is up to date is left alone.

Environment:
    NORMWISE_CPU: `require` makes an error of a failure, `off` leaves the kernels out; otherwise a failure is noted.
    CXX, CXXFLAGS, LDFLAGS: the compiler, and flags after those given here.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

KERNELS = "normwise/kernels"
LIBRARY = "_cpu.abi3.so"
NOTE = "_cpu_build.json"
PYTHON_TAG = "cp311-abi3"  # the oldest Python that has what module.cpp uses

COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    "-ffp-contract=off",  # a product and a sum are one operation where the source says so, and nowhere else
    "-fno-exceptions",  # what unwinds them asks for a new glibc
)
INSTRUCTION_SETS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mavx2", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
LINKING = {  # the C++ library is linked in, and hidden, so that it meets no other version of itself
    "linux": ("-shared", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-ldl"),
    "darwin": ("-bundle", "-undefined", "dynamic_lookup"),
}
OLDEST_GLIBC = 17  # 2.17, the oldest that Python wheels are made for


class BuildError(Exception):
    """Why the kernels could not be compiled."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: how it is called, and the first line of what it says of itself."""

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Unit:
    """A source that is compiled with its own flags."""

    source: str
    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Note:
    """What was compiled, or why nothing was."""

    instruction_sets: tuple[str, ...] = ()
    compiler: str | None = None
    reason: str | None = None
    fingerprint: str | None = None  # of the sources, the compiler and its flags

    def __str__(self) -> str:
        if self.reason is not None:
            return f"kernels for the CPU: not compiled: {self.reason}"
        return f"kernels for the CPU: compiled for {', '.join(self.instruction_sets)} by {self.compiler}"


def build(sources: Path, folder: Path) -> Note:
    """Compile the sources into the folder, unless what is there is up to date, and leave the note beside it.

    Raises:
        BuildError: it failed, and NORMWISE_CPU=require.
        ValueError: NORMWISE_CPU is something else.
    """
    wish = os.environ.get("NORMWISE_CPU", "")
    if wish not in ("", "require", "off"):
        raise ValueError(f"NORMWISE_CPU={wish!r}: it may be 'require' or 'off'")
    try:
        if wish == "off":
            raise BuildError("NORMWISE_CPU=off when normwise was installed")
        note = _build(sources, folder)
    except BuildError as error:
        if wish == "require":
            raise
        (folder / LIBRARY).unlink(missing_ok=True)
        note = Note(reason=str(error))
    (folder / NOTE).write_text(json.dumps(asdict(note), indent=2) + "\n")
    return note


def _build(sources: Path, folder: Path) -> Note:
    if sys.platform not in LINKING:
        raise BuildError(f"they are made for Linux and macOS, and this is {sys.platform}")
    headers = _python_headers()
    compiler = find_compiler()
    sets = tuple(name for name, flags in INSTRUCTION_SETS.items() if _supports(compiler, flags))
    units = translation_units(sets)
    note = Note(sets, compiler.version, None, _fingerprint(compiler, units, sources))
    if not (folder / LIBRARY).exists() or _recorded(folder) != note.fingerprint:
        _compile(compiler, units, sources, headers, folder / LIBRARY)
    return note


def find_compiler() -> Compiler:
    """The one that CXX names, or else the first that is there.

    Raises:
        BuildError: there is none, or it does not work.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [[name] for name in COMPILERS]
    command = next((c for c in candidates if shutil.which(c[0])), None)
    if command is None:
        tried = f"CXX={' '.join(named)}" if named else f"{', '.join(COMPILERS)}; CXX may name another"
        raise BuildError(f"no C++ compiler was found ({tried})")
    said = _run([*command, "--version"], f"{command[0]} does not work")
    return Compiler(tuple(command), said.splitlines()[0])


def translation_units(sets: Sequence[str]) -> list[Unit]:
    """The kernels for each instruction set, and the module that chooses among them."""
    extra = tuple(shlex.split(os.environ.get("CXXFLAGS", "")))
    less = ("-O2",) if len(sets) > 1 else ()  # beside others, for old processors: half the time and size
    kernels = [
        Unit(
            "kernels.cpp",
            name,
            (*FLAGS, *INSTRUCTION_SETS[name], *(less if name == "portable" else ()), f"-DNW_ISA={name}", *extra),
        )
        for name in sets
    ]
    present = tuple(f"-DNW_HAS_{name.upper()}" for name in sets)
    return [*kernels, Unit("module.cpp", "module", (*FLAGS, *present, *extra))]


def platform_tag(library: Path) -> str:
    """The platform of a wheel with this library: the oldest glibc that has all it asks for; elsewhere, this system.

    The library depends on glibc alone (the C++ library is linked in), and names the versions of what it takes from it.
    """
    machine = platform.machine()
    asked = [int(minor) for minor in re.findall(rb"\bGLIBC_2\.(\d+)", library.read_bytes())]
    if sys.platform == "linux" and asked and machine in ("x86_64", "aarch64"):
        return f"manylinux_2_{max(OLDEST_GLIBC, *asked)}_{machine}"
    return next(iter(platform_tags()))


def _python_headers() -> str:
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").exists():
        raise BuildError(f"Python.h is not in {folder}: Python's headers are a package of their own, often python3-dev")
    return folder


def _supports(compiler: Compiler, flags: Sequence[str]) -> bool:
    """Whether the processors of this machine's kind and the compiler know the instruction set of these flags."""
    if not flags:
        return True
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    done = _call([*compiler.command, *flags, "-fsyntax-only", "-x", "c++", os.devnull])
    return done.returncode == 0


def _fingerprint(compiler: Compiler, units: Sequence[Unit], sources: Path) -> str:
    found = hashlib.sha256(repr((compiler, units, _linking())).encode())
    for path in sorted(sources.iterdir()):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def _recorded(folder: Path) -> str | None:
    """The fingerprint in the note of an earlier build."""
    try:
        note: dict[str, str | None] = json.loads((folder / NOTE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return note.get("fingerprint")


def _linking() -> tuple[str, ...]:
    return (*LINKING[sys.platform], *shlex.split(os.environ.get("LDFLAGS", "")))


def _compile(compiler: Compiler, units: Sequence[Unit], sources: Path, headers: str, library: Path) -> None:
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compiled(unit: Unit) -> str:
            made = str(Path(scratch, f"{unit.name}.o"))
            command = [*compiler.command, *unit.flags, f"-I{headers}", "-c", str(sources / unit.source), "-o", made]
            _run(command, f"{compiler.command[0]} could not compile {unit.source} ({unit.name})")
            return made

        objects = list(pool.map(compiled, units))
        linked = library.with_suffix(".part")
        command = [*compiler.command, *objects, "-o", str(linked), *_linking()]
        _run(command, f"{compiler.command[0]} could not link {library.name}")
        linked.replace(library)  # at once: another process may have the old one in use


def _run(command: Sequence[str], failure: str) -> str:
    """Standard output of a command.

    Raises:
        BuildError: it failed; with the first errors that have a place in a source, or else the first lines.
    """
    done = _call(command)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = (
            [line for line in lines if re.search(r":\d+: (fatal )?error: ", line)]
            or lines
            or [f"exit code {done.returncode}"]
        )
        raise BuildError(f"{failure}: {'; '.join(said[:3])}")
    return done.stdout


def _call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    english = os.environ | {"LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=english)  # noqa: S603 - a compiler


class KernelBuildHook(BuildHookInterface[Any]):
    """Puts the module and the note into a wheel; for an editable installation, beside the sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before the wheel is written."""
        kernels = Path(self.root, KERNELS)
        if version == "editable":
            self.app.display_info(str(build(kernels / "csrc", kernels)))
            return
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            note = build(kernels / "csrc", folder)
            self._scratch = stack.pop_all()  # the folder is needed until the wheel is written
        self.app.display_info(str(note))
        build_data["force_include"][str(folder / NOTE)] = f"{KERNELS}/{NOTE}"
        if note.reason is None:
            build_data["force_include"][str(folder / LIBRARY)] = f"{KERNELS}/{LIBRARY}"
            build_data["pure_python"] = False
            build_data["tag"] = f"{PYTHON_TAG}-{platform_tag(folder / LIBRARY)}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """After the wheel was written."""
        if version != "editable":
            self._scratch.close()


if __name__ == "__main__":
    here = Path(__file__).parent / KERNELS
    print(build(here / "csrc", here))  # noqa: T201 - this is its answer
