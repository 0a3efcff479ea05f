"""Settings of all tests, and what every test and every doctested example finds ready.

Random numbers are the same on every run, and every test process uses one thread, because several run side by side.
Examples know `torch`, `nw`, and normwise's public names.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings

import normwise as nw

settings.register_profile("normwise", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("normwise")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _example_names(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> None:
    own = getattr(getattr(request.node, "dtest", None), "globs", {})  # a module's own names come first
    loaded = {name: getattr(nw, name) for name in nw.__all__ if name not in ("Study", "tune")}  # these need packages
    doctest_namespace.clear()
    doctest_namespace.update({name: value for name, value in loaded.items() if name not in own}, torch=torch, nw=nw)
