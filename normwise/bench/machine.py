"""What the benchmark must know of the machine: its facts, its heap, and how long this process waits for a core."""

from __future__ import annotations

import os
import platform
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from normwise.kernels.backends import backends, requested

# Freed memory stays with the process and is found again, so that no call pays for fresh pages. Without the last two, a
# freed block of memory keeps a small neighbour that is never merged with it, and aligned requests pass it by.
_KEEPS = {"mmap_max": 0, "trim_threshold": 1 << 40, "tcache_count": 0, "mxfast": 0}
_WARM = ":".join(f"glibc.malloc.{name}={value}" for name, value in _KEEPS.items())
_TUNABLES = "GLIBC_TUNABLES"
_TASKS = Path("/proc/self/task")


def facts() -> dict[str, str | int]:
    """Processor, cores, threads, versions, and what of the environment changes the numbers."""
    available = [backend.name for backend in backends() if backend.available]
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "heap": "warm" if is_warm() else "default",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "normwise": metadata.version("normwise"),
        "backends": ", ".join(available),
        "NORMWISE_BACKEND": requested(),
        "huge pages by torch": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
    }


def is_warm() -> bool:
    """Whether this process began with a heap that keeps its memory."""
    return _WARM in os.environ.get(_TUNABLES, "")


def can_be_warm() -> bool:
    """Whether the C library knows how."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def restart_warm() -> None:
    """Begin this process again, with the same words, and a heap that keeps its memory: it is set up before `main`."""
    given = os.environ.get(_TUNABLES)
    environment = {**os.environ, _TUNABLES: f"{given}:{_WARM}" if given else _WARM}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - itself, as it was called


def waited() -> float:
    """Seconds that the threads of this process have been ready to run and waited for a core; 0 where nobody counts."""
    return sum(map(_waited, _TASKS.glob("*/schedstat"))) * 1e-9


def faults() -> int:
    """Pages that the system has had to find for this process so far; 0 where nobody counts."""
    return 0 if _resource is None else int(_resource.getrusage(_resource.RUSAGE_SELF).ru_minflt)


def _waited(file: Path) -> int:
    try:
        return int(file.read_text().split()[1])
    except (OSError, IndexError):  # the thread has just ended, or the kernel does not count
        return 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        return None


_resource = _module("resource")  # on Unix
