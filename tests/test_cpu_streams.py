"""Outputs beyond the last cache are written past it, if their pages are there: the same numbers, bit for bit.

Poisoned memory has been written, so its pages are there.
"""

from __future__ import annotations

import math
import mmap
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.kernels.backends import extension
from tests.compiled import INSTRUCTION_SETS, instruction_set, needs_kernels
from tests.poisoned import poison

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages are there")
pytestmark = [needs_kernels, on_linux]
_poison = pytest.fixture(poison)
kernels: Any = extension
LAST_CACHE = 0 if extension is None else kernels.last_cache()
MOST_OF_A_ROW = 2**14  # bytes
PART = LAST_CACHE // 4  # bytes that are not streamed


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


@pytest.mark.usefixtures("_poison")
def test_poisoned_memory_is_streamed_to() -> None:
    assert kernels.streams(torch.empty(LAST_CACHE, dtype=torch.uint8).data_ptr(), LAST_CACHE)


@pytest.fixture(scope="module")
def drawn() -> list[Tensor]:
    """Bytes of two inputs that are large enough. Drawing them, and fresh pages, take longer than the kernels."""
    halves = (LAST_CACHE + MOST_OF_A_ROW) // 2  # two of them, side by side, are a float32 from 0 to 1 as well
    return [torch.rand(halves, dtype=torch.bfloat16) for _ in range(2)]


def tensors_of(drawn: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As many rows as take the size of the last cache, and one more."""
    numbers = math.prod(shape)
    rows = LAST_CACHE // (numbers * dtype.itemsize) + 1
    x, d_output = (memory.view(dtype)[: rows * numbers].view(rows, *shape) for memory in drawn)
    return x, d_output


def outcome(layer: nn.Module, x: Tensor, d_output: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    output = layer(x)
    return output.detach(), torch.autograd.grad(output, x, d_output)[0]


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
def test_the_same_bits_as_through_the_caches(drawn: list[Tensor], make: Any, shape: tuple[int, ...]) -> None:
    assert_same_in_parts(make, tensors_of(drawn, shape, torch.float32))


@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_same_bits_of_each_instruction_set(drawn: list[Tensor], name: str) -> None:
    make, shape = LAYERS["rows"]
    with instruction_set(name):
        assert_same_in_parts(make, tensors_of(drawn, shape, torch.bfloat16))


def assert_same_in_parts(make: Any, inputs: tuple[Tensor, Tensor]) -> None:
    """The outcome of a whole that is streamed, and of parts that are too small for it."""
    layer, size = make(), len(inputs[0]) * PART // inputs[0].nbytes
    whole = outcome(layer, *inputs)
    assert all(tensor.nbytes >= LAST_CACHE and tensor[-1].any() for tensor in whole)
    pieces = zip(*(tensor.split(size) for tensor in (*inputs, *whole)), strict=True)
    for x, d_output, *expected in pieces:
        assert all(map(torch.equal, outcome(layer, x, d_output), expected))
