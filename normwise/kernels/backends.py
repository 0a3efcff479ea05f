"""Which backends there are: the definition in torch's operators, and compiled kernels for CPU and GPU, or why not.

The environment variable NORMWISE_BACKEND, read when normwise is imported, asks for one by name: `reference`, `cpu`,
`triton`, or `auto`, which chooses by measurement. One that was asked for by name is never replaced by another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias, cast, get_args

import torch  # brings the threads that the kernels look for when they are loaded

from normwise.errors import NormwiseError

Request: TypeAlias = Literal["auto", "cpu", "triton", "reference"]

_EXTENSION = "normwise.kernels._cpu"
_NOTE = Path(__file__).with_name("_cpu_build.json")
_REQUEST = os.environ.get("NORMWISE_BACKEND") or "auto"


class BackendError(NormwiseError, RuntimeError):
    """A backend was asked for by name that there is not, or that is not available."""


@dataclass(frozen=True)
class Backend:
    """A way to compute the four steps; `str()` is one line, `to_dict()` is plain data.

    Where it is available, `about` says what it is, and otherwise why it is not. Of compiled kernels it is known which
    `instruction_set` this processor runs ("avx512", "avx2", "portable"), for which they were compiled and by which
    compiler, and whose `threads` they use: the name of the OpenMP library that torch brought, or "none".
    """

    name: str
    available: bool
    about: str
    instruction_set: str | None = None
    compiled: tuple[str, ...] = ()
    compiler: str | None = None
    threads: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name:<9}  {'available' if self.available else 'missing':<9}  {self.about}"


def backends() -> tuple[Backend, ...]:
    """Which backends there are, and why one is not available.

    >>> for backend in nw.backends():
    ...     print(backend.name)
    reference
    cpu
    triton
    """
    reference = Backend("reference", True, "torch's operators: the definition, for every pattern on every device")
    return reference, _cpu(_loaded, _read(_NOTE)), _triton()


def compiled() -> Mapping[str, str]:
    """The backend whose kernels are taken, for each type of device that has one.

    Those in Triton are taken when they are asked for by name; on a CPU instead when Triton interprets them, by its own
    switch, TRITON_INTERPRET=1.
    """
    if requested() == "triton":
        return {"cpu": "triton"} if _is_interpreted() else {"cuda": "triton"}
    return {} if extension is None else {"cpu": "cpu"}


def requested() -> Request:
    """The backend that NORMWISE_BACKEND asks for; "auto" if it asks for none.

    Raises:
        BackendError: there is none of that name, or it is not available.
    """
    if _refusal is not None:
        raise BackendError(_refusal)
    return cast("Request", _REQUEST)


def to_json(found: Sequence[Backend]) -> str:
    """The request as it was written, and the backends."""
    return json.dumps({"requested": _REQUEST, "backends": [backend.to_dict() for backend in found]}, indent=2)


def _read(note: Path) -> dict[str, Any]:
    """What the build left to say; nothing if there was none."""
    try:
        return cast("dict[str, Any]", json.loads(note.read_text()))
    except FileNotFoundError:
        return {}


def _cpu(loaded: ModuleType | ImportError, note: dict[str, Any]) -> Backend:
    if isinstance(loaded, ImportError):
        return Backend("cpu", False, _why_not(loaded, note))
    runs, threads = loaded.instruction_set(), loaded.threads()
    compiled, compiler = tuple(note.get("instruction_sets", ())), note.get("compiler")
    made = f"; compiled for {', '.join(compiled)} by {compiler}" if compiled else ""
    team = "one thread" if threads == "none" else f"threads of {threads}"
    about = f"C++ kernels: {runs} on this processor, {team}{made}"
    return Backend("cpu", True, about, runs, compiled, compiler, threads)


def _triton() -> Backend:
    """What there is of the kernels for GPUs."""
    missing = _why_no_triton()
    if missing:
        return Backend("triton", False, missing)
    where = "interpreted on the CPU, for tests" if _is_interpreted() else f"on {torch.cuda.get_device_name()}"
    version = import_module("triton").__version__
    about = f"kernels in Triton {version}, {where}; taken when NORMWISE_BACKEND=triton asks for them"
    return Backend("triton", True, about)


def _why_no_triton() -> str:
    """Why its kernels cannot run, or nothing."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'normwise[gpu]'"
    if _is_interpreted():
        return ""
    if torch.version.hip:
        return "the kernels are for NVIDIA's GPUs, and this torch is for AMD's"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _is_interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU: its own switch."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _why_not(error: ImportError, note: dict[str, Any]) -> str:
    """The loader's reason if there is a module, and otherwise the build's."""
    if not isinstance(error, ModuleNotFoundError):
        return f"compiled, but it cannot be loaded: {error}"
    reason = note.get("reason") or "normwise was not installed by pip, or what pip made was deleted"
    return f"not compiled: {reason}"


def _refused(request: str, loaded: ModuleType | ImportError, note: dict[str, Any]) -> str | None:
    """Why a request cannot be met; None if it can."""
    if request not in get_args(Request):
        return f"NORMWISE_BACKEND={request!r}: there are {', '.join(get_args(Request))}"
    if request == "cpu" and isinstance(loaded, ImportError):
        return f"NORMWISE_BACKEND='cpu': {_why_not(loaded, note)}; 'auto' runs what there is"
    if request == "triton" and _why_no_triton():
        return f"NORMWISE_BACKEND='triton': {_why_no_triton()}; 'auto' runs what there is"
    return None


def _load() -> ModuleType | ImportError:
    try:
        return import_module(_EXTENSION)
    except ImportError as error:
        return error


_loaded = _load()
_refusal = _refused(_REQUEST, _loaded, _read(_NOTE))
extension: ModuleType | None = _loaded if isinstance(_loaded, ModuleType) else None  # the compiled kernels
