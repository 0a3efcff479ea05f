"""The compiled kernels give the same bits with any number of threads, in any company, and in any process."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from normwise import RMS
from tests.compiled import DTYPES, Call, Found, Numbers, compiled, needs_kernels, numbers, plain
from tests.settings import threads

pytestmark = needs_kernels
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Beyond the size from which threads help; rows in one piece and in several, tiles by one thread and by all.
LARGE = (
    ("n [d]", {"n": 300, "d": 257}, "d"),
    ("n [d]", {"n": 4100, "d": 9}, "d"),
    ("n c [l]", {"n": 9, "c": 65, "l": 70}, "c"),
    ("n [h] g [k]", {"n": 3, "h": 50, "g": 3, "k": 99}, "g k"),
    ("[n] c", {"n": 5000, "c": 37}, "c"),
    ("[n] c", {"n": 400, "c": 1100}, "c"),
    ("[n] c", {"n": 1100, "c": 130}, "n"),
    ("[n] c [l]", {"n": 700, "c": 11, "l": 33}, "c"),
    ("[n] c [l]", {"n": 30, "c": 17, "l": 129}, "c"),
    ("n [c] l", {"n": 3, "c": 1030, "l": 49}, "c"),
    ("n [c] l", {"n": 2, "c": 1030, "l": 49}, "l"),
    ("n [h] g [k]", {"n": 2, "h": 1100, "g": 9, "k": 11}, "g k"),
    ("[n d]", {"n": 70, "d": 700}, "d"),
)
every_large = pytest.mark.parametrize(("text", "sizes", "over"), LARGE, ids=str)


def calls(text: str, sizes: dict[str, int], over: str, dtype: torch.dtype = torch.float32) -> list[Call]:
    """With and without a mask, a residual and remembered statistics."""
    call = plain(text, sizes, over, dtype)
    masked = replace(call, masked=tuple(sizes), residual=True, activation="gelu")
    return [call, masked, replace(call, normalizer=RMS(0.01), masked=("n",), recalls=True)]


def bits(found: Found) -> list[Tensor]:
    """All that came out, byte by byte."""
    moments = [] if found.moments is None else [torch.as_tensor(moment) for moment in found.moments]
    tensors = [found.output, *([] if found.total is None else [found.total]), *found.gradients, *moments]
    return [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]


def same(ones: Found, others: Found) -> bool:
    return all(torch.equal(one, other) for one, other in zip(bits(ones), bits(others), strict=True))


@every_dtype
@every_large
def test_any_number_of_threads(text: str, sizes: dict[str, int], over: str, dtype: torch.dtype) -> None:
    for call in calls(text, sizes, over, dtype):
        given = numbers(call)
        with threads(1):
            alone = compiled(call, given)
        assert alone.output.any() or call.masked == ("n",)
        for count in (2, 4, 13):
            with threads(count):
                assert same(compiled(call, given), alone)


def _first(call: Call, given: Numbers, axis: str, count: int) -> tuple[Call, Numbers]:
    """The first columns of a call."""
    sizes = tuple((name, count if name == axis else size) for name, size in call.sizes)
    dim = call.plan.names.index(axis)

    def cut(tensor: Tensor) -> Tensor:
        return tensor if tensor.shape[dim] == 1 else tensor.narrow(dim, 0, count).contiguous()

    parameters = [p[:count].contiguous() if call.over == axis else p for p in given.parameters]
    whole = (None if tensor is None else cut(tensor) for tensor in (given.residual, given.valid))
    residual, valid = whole
    recalled = tuple(cut(statistic) for statistic in given.recalled)
    cut_short = Numbers(cut(given.x), residual, parameters, valid, recalled, cut(given.d_output), cut(given.d_sum))
    return replace(call, sizes=sizes), cut_short


@every_dtype
@pytest.mark.parametrize(
    ("text", "sizes", "over", "axis", "counts"),
    [
        ("n [d]", {"n": 4200, "d": 33}, "d", "n", (1, 2, 3, 4, 31, 64, 4095, 4096)),
        ("n [d]", {"n": 40, "d": 1029}, "d", "n", (1, 2, 3, 31)),
        ("[n] c", {"n": 33, "c": 1030}, "c", "c", (1, 2, 15, 16, 17, 63, 65, 511, 513)),
        ("[n] c", {"n": 1500, "c": 140}, "c", "c", (1, 2, 15, 33, 127, 129)),
        ("[n] c [l]", {"n": 20, "c": 40, "l": 65}, "c", "c", (1, 2, 3, 33)),
        ("[n] c [l]", {"n": 600, "c": 40, "l": 9}, "c", "c", (1, 2, 3, 13, 33)),
        ("n [c] l", {"n": 5, "c": 70, "l": 130}, "c", "l", (1, 2, 15, 33, 65, 129)),
        ("n [c] l", {"n": 5, "c": 700, "l": 13}, "c", "n", (1, 2, 4)),
        ("n [h] g [k]", {"n": 3, "h": 90, "g": 40, "k": 9}, "g", "g", (1, 2, 14, 33)),
        ("n [h] g [k]", {"n": 3, "h": 20, "g": 5, "k": 90}, "g", "g", (1, 2, 3)),
    ],
    ids=str,
)
def test_any_number_of_columns(
    text: str, sizes: dict[str, int], over: str, axis: str, counts: tuple[int, ...], dtype: torch.dtype
) -> None:
    for number, call in enumerate(calls(text, sizes, over, dtype)):
        given = numbers(call)
        with threads(4):
            whole = compiled(call, given)
        dim = call.plan.names.index(axis)
        for count in counts:
            fewer, cut = _first(call, given, axis, count)
            with threads(1 + (number + count) % 4):
                found = compiled(fewer, cut)
            pairs = [(found.output, whole.output), (found.gradients[0], whole.gradients[0])]
            if over == axis:
                pairs += [(a, b) for a, b in zip(found.gradients[-2:], whole.gradients[-2:], strict=True)]
            for one, other in pairs:
                place = dim if one.dim() > 1 else 0
                assert torch.equal(one.nan_to_num(nan=7.5), other.narrow(place, 0, count).nan_to_num(nan=7.5))


def test_several_python_threads_at_once() -> None:
    every = [call for text, sizes, over in LARGE for call in calls(text, sizes, over)]
    given = [numbers(call) for call in every]
    expected = [bits(compiled(call, numbers_)) for call, numbers_ in zip(every, given, strict=True)]
    results: list[bool] = []

    def work(offset: int) -> None:
        for place in range(len(every)):
            at = (place + 7 * offset) % len(every)
            found = _run(every[at], given[at])
            results.append(all(torch.equal(a, b) for a, b in zip(found, expected[at], strict=True)))

    with threads(2), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(results) == 4 * len(every)
    assert all(results)


def _run(call: Call, given: Numbers) -> list[Tensor]:
    return bits(compiled(call, given, alone=False))


def python(code: str) -> str:
    """What code prints in a process of its own, which has a minute."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PREPARED = """
import os, torch, normwise as nw
torch.set_num_threads(2)
layer, x = nw.LayerNorm(512), torch.randn(256, 512, requires_grad=True)
def run():
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y).cumsum(1) / 256)
before = run()
def same(found):
    return all(map(torch.equal, before, found))
"""


def test_a_forked_child_works_on_alone() -> None:
    code = """
child = os.fork()
if child == 0:
    assert torch.get_num_threads() == 2
    with torch.no_grad():
        found = layer(x), layer(x)
    torch.set_num_threads(1)  # torch's own operators wait for threads that are gone
    os._exit(0 if all(torch.equal(y, before[0]) for y in found) else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), same(run()))
"""
    assert python(PREPARED + code).split() == ["0", "True"]


def test_a_worker_of_a_data_loader_can_use_it() -> None:
    code = """
class Normalized(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, at):
        with torch.no_grad():
            return layer(x)
loader = torch.utils.data.DataLoader(Normalized(), batch_size=2, num_workers=2, multiprocessing_context="fork")
print(all(torch.equal(y, before[0]) for batch in loader for y in batch), same(run()))
"""
    assert python(PREPARED + code).split() == ["True", "True"]
