"""Settings of all tests, and what every test and every doctested example finds ready.

Random numbers are the same on every run, and every test process uses one thread, because several run side by side.
Examples know `torch`, `nw`, and normwise's public names. Where there is no GPU, kernels for it are interpreted.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import settings

import normwise as nw

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
collect_ignore_glob = [] if find_spec("triton") else ["normwise/kernels/gpu/*", "tests/*gpu*", "tests/interpreted.py"]

settings.register_profile("normwise", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("normwise")
torch.set_num_threads(1)

# Without a GPU the CPU's generator alone draws; torch.manual_seed formats a stack for the others, on every call.
seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _seeded() -> None:
    seed(0)


@cache
def _names() -> dict[str, Any]:
    """What an example knows without importing it."""
    loaded = {name: getattr(nw, name) for name in nw.__all__ if name not in ("Study", "tune")}  # these need packages
    return {**loaded, "torch": torch, "nw": nw}


_COVERED = 2


def pytest_configure(config: pytest.Config) -> None:
    """Let `no_cover` stop all that measures: a worker of pytest-xdist begins twice, and stops the second only."""
    plugin = config.pluginmanager.getplugin("_cov")
    if plugin is not None and plugin.cov_controller is not None and hasattr(config, "workerinput"):
        plugin.cov_controller.pause()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Coverage is taken of a test's first cases: the others run other numbers through the same lines, faster unseen."""
    cases: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        cases[test] += 1
        if cases[test] > _COVERED:
            item.add_marker("no_cover")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give an example its names; a module's own come first."""
    if isinstance(item, pytest.DoctestItem):
        item.dtest.globs = {**_names(), **item.dtest.globs}
