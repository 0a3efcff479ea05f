"""Outputs beyond the last cache are written past it, if their pages are there: the same numbers, bit for bit.

Poisoned memory has been written, so its pages are there.
"""

from __future__ import annotations

import mmap
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.kernels.backends import extension
from tests.compiled import INSTRUCTION_SETS, instruction_set, needs_kernels, poison

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages are there")
pytestmark = [needs_kernels, on_linux]
_poison = pytest.fixture(poison)
kernels: Any = extension
LAST_CACHE = 0 if extension is None else kernels.last_cache()


def address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


@pytest.mark.parametrize(
    ("touched", "size", "streams"), [(1, 1, True), (0, 1, False), (0.5, 1, False), (1, 0.9, False)]
)
def test_only_what_is_large_and_has_its_pages_is_streamed(touched: float, size: float, streams: bool) -> None:
    memory = mmap.mmap(-1, LAST_CACHE)
    for place in range(0, int(LAST_CACHE * touched), mmap.PAGESIZE):
        memory[place] = 1
    assert kernels.streams(address(memory), int(LAST_CACHE * size)) is streams


def test_memory_that_is_not_there_is_not_streamed_to() -> None:
    assert kernels.streams(0, 2 * LAST_CACHE) is False
    assert kernels.streams(mmap.PAGESIZE, 2 * LAST_CACHE) is False


def outcome(layer: nn.Module, x: Tensor, d_output: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    output = layer(x)
    return output.detach(), torch.autograd.grad(output, x, d_output)[0]


def in_parts(layer: nn.Module, x: Tensor, d_output: Tensor) -> tuple[Tensor, Tensor]:
    """The same, of parts that are too small to be streamed."""
    parts = [outcome(layer, *part) for part in zip(x.split(len(x) // 4), d_output.split(len(x) // 4), strict=True)]
    outputs, gradients = zip(*parts, strict=True)
    return torch.cat(outputs), torch.cat(gradients)


LAYERS = {
    "rows": (lambda: nw.LayerNorm(1024), (1024,)),
    "rows that are no whole vectors": (lambda: nw.RMSNorm(1001), (1001,)),
    "rows too short": (lambda: nw.LayerNorm(128), (128,)),
    "runs": (lambda: nw.GroupNorm(2, 4), (4, 16, 32)),
    "given statistics": (lambda: nw.BatchNorm(4, affine=False).eval(), (4, 16, 32)),
    "side by side": (lambda: nw.LayerNorm2d(4), (4, 16, 32)),
}


@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_the_same_bits_as_through_the_caches(make: Any, shape: tuple[int, ...]) -> None:
    check(make, shape, torch.float32)


@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_same_bits_of_each_instruction_set(name: str) -> None:
    with instruction_set(name):
        check(*LAYERS["rows"], torch.bfloat16)


def check(make: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = LAST_CACHE // (torch.empty(shape).numel() * dtype.itemsize) + 4
    x, d_output = (torch.rand(rows // 4 * 4, *shape, dtype=dtype) for _ in range(2))
    layer = make()
    whole = outcome(layer, x, d_output)
    assert kernels.streams(torch.empty_like(whole[0]).data_ptr(), whole[0].nbytes)
    parts = in_parts(layer, x, d_output)
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))
