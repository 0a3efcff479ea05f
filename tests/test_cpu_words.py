"""The compiled kernels, word by word: values, sums, moments and gradients against the formula in float64.

Fresh memory is full of NaN, so that an element that nobody writes shows; padding holds the worst that there is.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from normwise import L2, RMS, Affine, OffsetScale, Scale, Standardize
from normwise.pattern import parse
from tests.compiled import (
    DTYPES,
    INSTRUCTION_SETS,
    TAILS,
    WORDS,
    Call,
    Word,
    check_call,
    compiled,
    drawn,
    identity,
    instruction_set,
    needs_kernels,
    numbers,
    plain,
)
from tests.poisoned import poison

pytestmark = [needs_kernels, pytest.mark.usefixtures("_poison")]
_poison = pytest.fixture(poison)
SAMPLE = 60  # calls of each word in each dtype
every_word = pytest.mark.parametrize("word", WORDS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_instruction_set = pytest.mark.parametrize("name", INSTRUCTION_SETS)


@every_dtype
@every_word
def test_a_random_sample_of_all_calls(word: Word, dtype: torch.dtype) -> None:
    for call in drawn(word, dtype, SAMPLE):
        check_call(call)


def test_the_sample_has_every_feature_with_every_word() -> None:
    for word in WORDS:
        calls = list(drawn(word, torch.float32, SAMPLE))
        assert {type(call.normalizer) for call in calls} == {Standardize, RMS, L2}
        assert {call.recovery for call in calls} == {None, Scale, Affine, OffsetScale}
        assert {call.activation for call in calls} == {None, "relu", "silu", "gelu"}
        assert {call.parameters for call in calls} == set(DTYPES)
        assert {call.unused for call in calls} == {"", "output", "sum"}
        assert {call.over for call in calls} >= set(word.overs)
        for feature in ("residual", "recalls", "strided"):
            assert {getattr(call, feature) for call in calls} == {True, False}
        assert len({call.masked for call in calls}) > len(axes(word))


@every_dtype
@every_word
def test_every_tail_of_every_axis(word: Word, dtype: torch.dtype) -> None:
    for name in (name for name in axes(word) if name not in dict(word.fixed)):
        for number, size in enumerate(TAILS):
            sizes = dict.fromkeys(axes(word), 3) | dict(word.fixed) | {name: size}
            call = Call(word, tuple(sizes.items()), dtype, Standardize(0.01), Affine, word.overs[0])
            if number % 2:
                call = replace(call, masked=tuple(sizes), residual=True, activation="silu")
            check_call(call)


def axes(word: Word) -> tuple[str, ...]:
    return parse(word.text).names


# Sizes at which lanes are summed in several pieces, tiles do not fit the cache, or one thread takes several columns.
LARGE = (
    ("[n] c", {"n": 5000, "c": 37}, "c"),
    ("[n] c", {"n": 1500, "c": 700}, "c"),
    ("[n] c", {"n": 1100, "c": 130}, "n"),
    ("[n] c [l]", {"n": 700, "c": 11, "l": 33}, "c"),
    ("[n] c [l]", {"n": 1300, "c": 3, "l": 63}, "l"),
    ("[n] c [l]", {"n": 9, "c": 17, "l": 1029}, "c"),
    ("n [c] l", {"n": 3, "c": 1030, "l": 49}, "c"),
    ("n [c] l", {"n": 2, "c": 96, "l": 1600}, "c"),
    ("n [h] g [k]", {"n": 2, "h": 1100, "g": 9, "k": 11}, "g k"),
    ("n [h] g [k]", {"n": 2, "h": 40, "g": 5, "k": 300}, "g k"),
    ("n [d]", {"n": 5000, "d": 40}, "d"),
    ("n [d]", {"n": 3, "d": 40001}, "d"),
    ("n c [l]", {"n": 40, "c": 130, "l": 10}, "c"),
)


@every_dtype
@pytest.mark.parametrize(("text", "sizes", "over"), LARGE, ids=str)
def test_large_ones(text: str, sizes: dict[str, int], over: str, dtype: torch.dtype) -> None:
    call = plain(text, sizes, over, dtype)
    check_call(call)
    check_call(replace(call, normalizer=RMS(0.01), recovery=Scale, residual=True, activation="relu"))
    check_call(replace(call, masked=tuple(sizes), residual=True, unused="sum"))
    check_call(replace(call, masked=("n",), recalls=True, activation="gelu"))


@every_instruction_set
@every_dtype
@every_word
def test_every_instruction_set(word: Word, dtype: torch.dtype, name: str) -> None:
    with instruction_set(name):
        for call in drawn(word, dtype, 20):
            check_call(call)


@pytest.mark.parametrize("lanes", [False, True], ids=["runs", "lanes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_instruction_set
def test_every_number_in_half_precision_is_read_and_written(name: str, dtype: torch.dtype, lanes: bool) -> None:
    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
    for count in (2**16, 2**16 - 5):  # whole vectors, and a tail
        with instruction_set(name):
            found = identity(every[:count], 1.0, lanes=lanes)
        assert torch.equal(found.nan_to_num(nan=7.5), every[:count].nan_to_num(nan=7.5))
        assert torch.equal(found.isnan(), every[:count].isnan())


@pytest.mark.parametrize("lanes", [False, True], ids=["runs", "lanes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_instruction_set
def test_rounding_is_to_the_nearest_and_ties_to_even(name: str, dtype: torch.dtype, lanes: bool) -> None:
    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    for weight in (1 + 2.0**-7, 1.5, 1 + 2.0**-10, 1 + 2.0**-20, 2.0**-3, 2.0**-9 * 3, 3.0, 1000.0):
        with instruction_set(name):
            found = identity(every, weight, lanes=lanes)
        assert torch.equal(found, (every.float() * weight).to(dtype))


def test_one_sample_has_no_gradient() -> None:
    for word in WORDS[:3]:
        names = axes(word)
        sizes = tuple((name, 1 if f"[{name}" in word.text or f"{name}]" in word.text else 9) for name in names)
        call = Call(word, sizes, torch.float32, Standardize(1e-5), Affine, word.overs[0])
        gradient, *_ = compiled(call, numbers(call)).gradients
        assert gradient.shape == call.plan.shape
        assert math.prod(gradient.shape) > 1
        assert not gradient.any()


def test_the_gradients_of_input_and_residual_are_two_tensors() -> None:
    call = Call(WORDS[0], (("n", 5), ("d", 40)), residual=True)
    given = numbers(call)
    d_x, d_residual = compiled(call, given).gradients
    assert torch.equal(d_x, d_residual)
