"""The kernels in Triton, word by word: values, sums, moments and gradients against the formula in float64.

Each by one program that holds whole columns, and in parts, tiles and groups of blocks. Every access is watched, fresh
memory is full of NaN, and padding holds the worst that there is: see interpreted.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normwise import L2, RMS, Affine, OffsetScale, Scale, Standardize
from normwise import functional as ours
from normwise.kernels.launch import LIMITS, Limits
from normwise.pattern import parse
from tests import compiled as calls
from tests.catalogue import CASES, FAMILIES, LAYOUTS, Case, Family
from tests.compiled import DTYPES, GATES, WORDS, Call, Word, check_call, drawn, numbers, with_gates
from tests.interpreted import DIVIDED, WAYS, every_way, interpreted, layout, needs_interpreter
from tests.memory_order import output_strides
from tests.tolerances import GRADIENTS, VALUES, check
from tests.truth import errors, is_right

pytestmark = [needs_interpreter, pytest.mark.no_cover]  # the interpreter takes twice as long when it is watched
SAMPLE = {"held": 2, "divided": 1}  # calls of each word in each dtype
MOST = 16  # programs of a call: interpreted, each takes some 6 ms
SMALL = 200  # elements of a call
WIDTHS = (1, 2, 3, 5, 17, 65)
DIVISIBLE = tuple(word for word in WORDS if "R" in word.word)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "LARGEST", SMALL)


def sample(way: str, word: Word, dtype: torch.dtype) -> Iterator[Call]:
    """Random calls of few programs, some with a gate; divided ones if that is the way."""

    def suits(call: Call) -> bool:
        found, programs = layout(call, WAYS[way])
        return programs <= MOST and found.is_resident == (way == "held")

    return islice(filter(suits, with_gates(drawn(word, dtype, 1000))), SAMPLE[way])


@every_dtype
@pytest.mark.parametrize(
    ("way", "word"),
    [*(("held", word) for word in WORDS), *(("divided", word) for word in DIVISIBLE)],
    ids=str,
)
def test_a_random_sample_of_all_calls(way: str, word: Word, dtype: torch.dtype) -> None:
    with interpreted(WAYS[way]):
        for call in sample(way, word, dtype):
            check_call(call)


@pytest.mark.parametrize("way", WAYS)
def test_the_sample_has_every_feature(way: str) -> None:
    words = WORDS if way == "held" else DIVISIBLE
    found = [call for word in words for dtype in DTYPES for call in sample(way, word, dtype)]
    assert len(found) == len(words) * len(DTYPES) * SAMPLE[way]
    assert {type(call.normalizer) for call in found} == {Standardize, RMS, L2}
    assert {call.recovery for call in found} == {None, Scale, Affine, OffsetScale}
    assert {call.activation for call in found} == {None, "relu", "silu", "gelu"}
    assert {call.gate for call in found} == {None, *GATES}
    assert {call.wants_gate for call in found if call.gate} == {True, False}
    assert {call.parameters for call in found} == set(DTYPES)
    assert {call.unused for call in found} == {"", "output", "sum"}
    assert {call.wanted[0] for call in found} == {True, False}
    for feature in ("residual", "recalls", "strided"):
        assert {getattr(call, feature) for call in found} == {True, False}
    assert len({call.masked for call in found}) > 5


# Columns in several parts and tiles, and more blocks of them than a group has.
DIVISIONS = (
    ("[n] c", {"n": 83, "c": 5}, "c"),
    ("[n] c", {"n": 83, "c": 5}, "n"),
    ("n [d]", {"n": 5, "d": 83}, "d"),
    ("n [d]", {"n": 5, "d": 67}, "n"),
    ("n g [k l]", {"n": 1, "g": 3, "k": 3, "l": 29}, "g k"),
    ("[n] c [l]", {"n": 7, "c": 3, "l": 11}, "c"),
    ("[n] c [l]", {"n": 3, "c": 3, "l": 35}, "l"),
    ("n [c] l", {"n": 3, "c": 49, "l": 3}, "c"),
    ("n [h] g [k]", {"n": 2, "h": 19, "g": 3, "k": 3}, "g k"),
)


@pytest.mark.parametrize(
    ("text", "sizes", "over", "dtype"),
    [(*division, DTYPES[place % 3]) for place, division in enumerate(DIVISIONS)],
    ids=str,
)
def test_parts_tiles_and_groups(text: str, sizes: dict[str, int], over: str, dtype: torch.dtype) -> None:
    call = calls.plain(text, sizes, over, dtype)
    with interpreted(DIVIDED) as watch:
        check_call(replace(call, residual=True, activation="gelu", gate="silu", masked=tuple(sizes)))
    forward, backward = watch.launches
    assert (forward.kernel, backward.kernel) == ("divided_forward.forward", "divided_backward.backward")
    for launch in watch.launches:
        assert launch.groups > 1
        assert launch.parts > 1
        assert launch.tiles > 1


@pytest.mark.parametrize(("text", "sizes", "over"), [DIVISIONS[2], DIVISIONS[5], DIVISIONS[8]], ids=str)
def test_whichever_program_is_done_first_the_bits_are_the_same(text: str, sizes: dict[str, int], over: str) -> None:
    call = replace(calls.plain(text, sizes, over, torch.float32), masked=(text.split()[0].strip("[]"),))
    given = numbers(call)
    found = []
    for backwards in (False, True):
        with interpreted(DIVIDED, backwards=backwards):
            found.append(calls.compiled(call, given))
    one, other = found
    assert torch.equal(one.output, other.output)
    assert all(torch.equal(a, b) for a, b in zip(one.gradients, other.gradients, strict=True))


def test_a_program_adds_up_several_blocks() -> None:
    for limits, sizes in ((WAYS["held"], {"n": 260, "d": 33}), (DIVIDED, {"n": 17, "d": 35})):
        call = calls.plain("n [d]", sizes, "d", torch.float32)
        with interpreted(limits) as watch:
            check_call(call)
            check_call(replace(call, wanted=(False, True, True, True)))
        assert all(launch.loop > 1 or launch.kernel == "resident.backward" for launch in watch.launches[1::2])
        assert limits is DIVIDED or watch.launches[1].programs < watch.launches[0].programs


WIDE = (
    ("[n] c", {"n": 1023, "c": 2}, "c", torch.float32),
    ("n [d]", {"n": 2, "d": 1023}, "d", torch.float32),
    ("n [d]", {"n": 1, "d": 1023}, "d", torch.bfloat16),
    ("n [c] l", {"n": 1, "c": 2, "l": 65}, "c", torch.float16),
    ("[n] c [l]", {"n": 2, "c": 2, "l": 1023}, "c", torch.bfloat16),
    ("n [h] g [k]", {"n": 1, "h": 1023, "g": 2, "k": 2}, "g k", torch.float16),
)


@pytest.mark.parametrize(("text", "sizes", "over", "dtype"), WIDE, ids=str)
def test_odd_widths(text: str, sizes: dict[str, int], over: str, dtype: torch.dtype) -> None:
    with interpreted():
        check_call(replace(calls.plain(text, sizes, over, dtype), residual=True))


@every_way
@pytest.mark.parametrize("word", WORDS, ids=str)
def test_every_tail_of_every_axis(word: Word, limits: Limits) -> None:
    names = parse(word.text).names
    for place, name in enumerate(name for name in names if name not in dict(word.fixed)):
        for number, size in enumerate(WIDTHS):
            sizes = dict.fromkeys(names, 2) | dict(word.fixed) | {name: size}
            dtype = DTYPES[(number + place) % len(DTYPES)]
            call = Call(word, tuple(sizes.items()), dtype, Standardize(0.01), Affine, word.overs[0])
            if number % 2:
                call = replace(call, masked=tuple(sizes), residual=True, activation="silu")
            found, programs = layout(call, limits)
            if programs <= MOST and found.is_resident == (limits is LIMITS):
                with interpreted(limits):
                    check_call(call)


CENTERED = {"normalizer": Standardize(0.0)}, {"normalizer": RMS(0.0)}, {"normalizer": L2(0.0)}


@every_way
@pytest.mark.parametrize("changes", CENTERED, ids=str)
def test_without_eps(changes: dict[str, Standardize | RMS | L2], limits: Limits) -> None:
    for text, sizes, over in (("n [d]", {"n": 3, "d": 50}, "d"), ("[n] c [l]", {"n": 2, "c": 3, "l": 25}, "c")):
        with interpreted(limits):
            check_call(replace(calls.plain(text, sizes, over, torch.float32), **changes))


@every_way
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
@pytest.mark.parametrize("family", FAMILIES[::2], ids=str)
def test_any_magnitude_without_eps(family: Family, magnitude: float, limits: Limits) -> None:
    with interpreted(limits):
        assert is_right(errors(family, torch.randn(42, 2) * magnitude, eps=0.0))


def of_layers() -> list[tuple[Case, str, Limits]]:
    """Every layer in both layouts, held by one program, and divided ones of each kind."""
    held = {
        (case.name, layout): (case, layout, LIMITS)
        for case in CASES
        for layout in ("contiguous", "channels last")
        if len(case.shape) == 4 or (layout == "contiguous" and len(case.shape) < 4)
    }
    divided = [(case, layout, DIVIDED) for (name, layout), (case, _, _) in held.items() if "," not in name]
    return [*held.values(), *divided]


@pytest.mark.parametrize(("case", "layout", "limits"), of_layers(), ids=lambda value: str(value)[:20])
def test_layers(case: Case, layout: str, limits: Limits) -> None:
    layer, twin = case.pair()
    x = LAYOUTS[layout](torch.randn(case.shape) * 2 + 1).requires_grad_()
    dy = torch.randn(case.shape)
    with interpreted(limits):
        y = layer(x)
        found = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    wide = x.detach().double().contiguous().requires_grad_()
    expected = twin.double()(wide)
    check(y.double(), expected, VALUES)
    assert y.stride() == output_strides(layer, x)
    wanted = torch.autograd.grad(expected, [wide, *twin.parameters()], dy.double())
    for gradient, wants in zip(found, wanted, strict=True):
        check(gradient.double(), wants, GRADIENTS)


# Torch's, without parameters, and where those lie; in eps they agree.
LONE: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "layer_norm": (lambda x, *p: ours.layer_norm(x, (7,), *p), lambda x: F.layer_norm(x, (7,)), (1, 1, 7)),
    "group_norm": (lambda x, *p: ours.group_norm(x, 2, *p), lambda x: F.group_norm(x, 2), (1, 4, 1)),
    "batch_norm": (
        lambda x, *p: ours.batch_norm(x, None, None, *p, True),
        lambda x: F.batch_norm(x, None, None, training=True),
        (1, 4, 1),
    ),
}


@every_way
@pytest.mark.parametrize("parameters", ["weight", "bias", "neither"])
@pytest.mark.parametrize("name", LONE)
def test_one_parameter_alone(name: str, parameters: str, limits: Limits) -> None:
    norm, twin, shape = LONE[name]
    x, dy = torch.randn(2, 6, 4, 7)
    parameter = torch.randn(max(shape))

    def run(dtype: torch.dtype, norm: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, parameter)]
        y = norm(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype), allow_unused=True, materialize_grads=True)]

    as_given: dict[str, Callable[[Tensor], tuple[Tensor | None, Tensor | None]]] = {
        "weight": lambda p: (p, None),
        "bias": lambda p: (None, p),
        "neither": lambda _: (None, None),
    }
    by_hand: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "weight": lambda y, p: y * p.view(shape),
        "bias": lambda y, p: y + p.view(shape),
        "neither": lambda y, _: y,
    }
    with interpreted(limits):
        found = run(torch.float32, lambda x, p: norm(x, *as_given[parameters](p)))
    for one, wants in zip(found, run(torch.float64, lambda x, p: by_hand[parameters](twin(x), p)), strict=True):
        check(one.double(), wants, GRADIENTS)
