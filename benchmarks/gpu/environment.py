"""What has to be so before normwise is imported: it reads the environment then."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

BACKEND, INTERPRET = "NORMWISE_BACKEND", "TRITON_INTERPRET"
_NEEDS = ("triton", "filelock", "jinja2", "plotly", "rich", "typer")


def prepare() -> str | None:
    """Ask for the kernels in Triton; in a sentence why that cannot be, if it cannot."""
    import torch

    missing = [package for package in _NEEDS if find_spec(package) is None]
    refused = refusal(os.environ, missing, has_gpu=torch.cuda.is_available())
    if refused is None:
        os.environ[BACKEND] = "triton"
    return refused


def refusal(environment: Mapping[str, str], missing: Sequence[str], *, has_gpu: bool) -> str | None:
    """Why nothing can be measured here; None if it can.

    >>> refusal({}, [], has_gpu=False)
    'there is no GPU: torch sees no CUDA device'
    """
    if not has_gpu:
        return "there is no GPU: torch sees no CUDA device"
    if missing:
        return f"not installed: {', '.join(missing)}; pip install 'normwise[gpu,tune]'"
    if environment.get(INTERPRET, "0") not in ("", "0"):
        return f"{INTERPRET}={environment[INTERPRET]}: Triton would interpret the kernels on the CPU; unset it"
    asked = environment.get(BACKEND) or "triton"
    if asked != "triton":
        return f"{BACKEND}={asked}: the kernels in Triton are what is measured; unset it"
    return None
