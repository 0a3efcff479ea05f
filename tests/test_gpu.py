"""The kernels in Triton on a GPU: every word, full sizes, streams, graphs, and what only many programs at once break.

    pytest -m gpu

What the kernels compute is tested without a GPU as well, where Triton interprets them one program after another. Here
it is their compiled form, their offsets beyond 2^31 elements, and the order in which a device runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from benchmarks.gpu import cases, contenders, truth
from normwise.bench import layers
from normwise.bench.cases import Case
from normwise.bench.operations import Entrant, found_by, state_of
from normwise.kernels import launch, prepare
from normwise.kernels import run as running
from normwise.kernels.launch import LIMITS, Limits
from normwise.moments import Moments
from tests import compiled as calls
from tests.compiled import DTYPES, WORDS, Call, Found, Numbers, Word, compiled
from tests.tolerances import COMPILED, check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

WHERE = torch.device("cuda")
DIVIDED = Limits(held=256, held_back=256, divided=128, beside=4, least=32, parts=5, joined=64, turns=2, share=2**8)
SAMPLE = 4  # calls of each word: every one compiles kernels
SUMS = 5e-5  # float32 sums over all that there is of images or rows, as a part of the largest
LONG, WIDE = (8, 2**18), (2**16 + 1, 2**15)  # rows of many programs; more than 2^31 elements
PHOTOS = (64, 32, 56, 56)
REPETITIONS = 200


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every call goes to the kernels in Triton, and is refused where they do not take it."""
    monkeypatch.setattr(prepare, "compiled", lambda: {WHERE.type: "triton"})
    for module in (prepare, running):
        monkeypatch.setattr(module, "requested", lambda: "triton")
    prepare._prepared.cache_clear()
    yield
    prepare._prepared.cache_clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def step_of(layer: nn.Module, *, residual: bool = False) -> Step:
    """From an input and a cotangent to the output and all gradients."""

    def step(x: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        outputs = layer(leaf, residual=x) if residual else (layer(leaf),)
        found = torch.autograd.grad(outputs, [leaf, *layer.parameters()], [cotangent] * len(outputs))
        return (*(output.detach() for output in outputs), *found)

    return step


def drawn_like(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """An input about 1, and a cotangent."""
    return tuple(torch.randn(shape, device=WHERE, dtype=dtype) + offset for offset in (1, 0))  # type: ignore[return-value]


def last(x: Tensor) -> Tensor:
    """Images, channels last."""
    return x.contiguous(memory_format=torch.channels_last)


# Columns that one program holds, and columns that many share, in every order of axes: layer, shape, and layout.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Tensor], Tensor], bool]] = {
    "rows": (lambda: nw.LayerNorm(4096), (512, 4096), Tensor.contiguous, False),
    "long rows": (lambda: nw.LayerNorm(LONG[1]), LONG, Tensor.contiguous, False),
    "rows with a residual": (lambda: nw.RMSNorm(4096), (512, 4096), Tensor.contiguous, True),
    "long rows with a residual": (lambda: nw.RMSNorm(LONG[1]), LONG, Tensor.contiguous, True),
    "batch, NCHW": (lambda: nw.BatchNorm(PHOTOS[1]), PHOTOS, Tensor.contiguous, False),
    "batch, NHWC": (lambda: nw.BatchNorm(PHOTOS[1]), PHOTOS, last, False),
    "batch and ReLU, NHWC": (lambda: nw.BatchNorm(PHOTOS[1], activation="relu"), PHOTOS, last, False),
    "groups, NCHW": (lambda: nw.GroupNorm(4, PHOTOS[1]), PHOTOS, Tensor.contiguous, False),
    "groups, NHWC": (lambda: nw.GroupNorm(4, PHOTOS[1]), PHOTOS, last, False),
    "channels of NCHW": (lambda: nw.LayerNorm2d(PHOTOS[1]), PHOTOS, Tensor.contiguous, False),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def made(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Step, Tensor, Tensor]:
    """A step of a layer, its input and a cotangent."""
    make, shape, lay, residual = LAYERS[name]
    x, cotangent = drawn_like(*shape, dtype=dtype)
    return step_of(make().to(WHERE), residual=residual), lay(x), lay(cotangent)


# -------------------------------------------------------------------------------------------------- against the formula


def on_device(call: Call, given: Numbers) -> Found:
    """What `compiled` gives of a call's tensors on the device, brought back."""
    some = given.residual, given.valid, given.gate
    residual, valid, gate = (None if tensor is None else tensor.to(WHERE) for tensor in some)
    there = given._replace(
        x=given.x.to(WHERE),
        residual=residual,
        valid=valid,
        parameters=[tensor.to(WHERE) for tensor in given.parameters],
        recalled=tuple(tensor.to(WHERE) for tensor in given.recalled),
        d_output=given.d_output.to(WHERE),
        d_sum=given.d_sum.to(WHERE),
        gate=gate,
    )
    found = compiled(call, there)
    moments = found.moments
    if moments is not None:
        moments = Moments(torch.as_tensor(moments.count).cpu(), moments.mean.cpu(), moments.m2.cpu())
    total = None if found.total is None else found.total.cpu()
    return found._replace(
        output=found.output.cpu(), total=total, moments=moments, gradients=[one.cpu() for one in found.gradients]
    )


@pytest.mark.parametrize("limits", [LIMITS, DIVIDED], ids=["held", "divided"])
@pytest.mark.parametrize("word", WORDS, ids=str)
def test_a_sample_of_all_calls(word: Word, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks with the worst behind them, residuals, remembered statistics, functions, gates, parameters of any dtype."""
    monkeypatch.setattr(launch, "LIMITS", limits)
    dtype = DTYPES[WORDS.index(word) % len(DTYPES)]
    monkeypatch.setattr(calls, "compiled", on_device)
    for call in calls.with_gates(calls.drawn(word, dtype, SAMPLE)):
        calls.check_call(call)


class Where:
    """What `contenders.made` asks of a device."""

    where = WHERE


FULL = [case for case in cases.cases() if case.what.backward and case.dtype == "bfloat16"]


@pytest.mark.parametrize("case", FULL, ids=str)
def test_full_size(case: Case) -> None:
    """Outputs, sums, gradients and memory, within a rounding of what float64 makes of them.

    A sum with a residual is rounded before it is normalized, as torch does it: that is one rounding more of what
    outputs and gradients are made of.
    """
    inputs, gradients = layers.tensors(case, WHERE)
    layer = contenders.made(layers.ours, case, Where())
    state = state_of(layer)
    gradients = truth.settled(case, inputs, gradients, state)
    true = truth.truth(case, inputs, gradients, state)
    found = found_by(case, Entrant(layer, layer, inputs, gradients))
    assert found.keys() == true.keys()
    roundings = 3 if case.adds else 1
    for name, expected in true.items():
        actual = found[name]
        half = 0.0 if actual.dtype is torch.float32 else torch.finfo(actual.dtype).eps / 2
        error = (actual.float() - expected).abs().max() / expected.abs().max()
        assert error <= SUMS + roundings * half, name


@pytest.mark.parametrize("name", ["rows", "images"])
def test_more_than_2_to_the_31_elements(name: str) -> None:
    """The last row is what it is alone, bit for bit; so are the last images' channels."""
    shape = WIDE if name == "rows" else (WIDE[0], WIDE[1] // 64, 8, 8)
    make = (lambda: nw.LayerNorm(shape[1])) if name == "rows" else (lambda: nw.LayerNorm2d(shape[1]))
    needed = 5 * 2 * shape[0] * WIDE[1]
    if WHERE.type == "cuda" and torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free memory")
    layer = make().to(WHERE, torch.bfloat16)
    x = torch.randn(1, *shape[1:], device=WHERE, dtype=torch.bfloat16).expand(shape).contiguous()
    x[-1].add_(torch.linspace(-2, 2, x[-1].numel(), device=WHERE).view(shape[1:]))
    x.requires_grad_()
    y = layer(x)
    (d_x,) = torch.autograd.grad(y, x, x.detach())
    alone = x[-1:].detach().requires_grad_()
    y_alone = layer(alone)
    (d_alone,) = torch.autograd.grad(y_alone, alone, alone.detach())
    assert torch.equal(y[-1:], y_alone)
    assert torch.equal(d_x[-1:], d_alone)
    assert torch.equal(y[:-1:4096], y[:1].expand_as(y[:-1:4096]))  # equal rows are equal wherever they lie
    assert not torch.equal(y[-1], y[0])


@pytest.mark.parametrize("shape", [(64, 512, 256), (8, 64, 4096)], ids=str)
def test_padding_never_counts(shape: tuple[int, ...]) -> None:
    """Whatever is in it: bit for bit what zeros give, and the statistics are those of the rest."""
    layer = nw.Norm("[n t] c", recovery=nw.Affine("c")).to(WHERE)
    x, cotangent = drawn_like(*shape, dtype=torch.float32)
    valid = torch.rand(shape[:2], device=WHERE) < 0.8
    layer(x)  # its sizes are found
    found = []
    for padding in (0.0, torch.nan):
        leaf = torch.where(valid[..., None], x, padding).requires_grad_()
        y = layer(leaf, valid=valid)
        found.append((y, *torch.autograd.grad(y, [leaf, *layer.parameters()], cotangent)))
    assert all(torch.equal(with_zeros, with_nan) for with_zeros, with_nan in zip(*found, strict=True))
    (y, d_x, *_), _ = found
    assert not y[~valid].any()
    assert not d_x[~valid].any()
    rest = x[valid].double()
    expected = (rest - rest.mean(0)) / (rest.var(0, correction=0) + layer.spec.normalizer.eps).sqrt()
    check(y[valid].double(), expected, COMPILED)


@every_layer
def test_a_gradient_that_lies_otherwise(name: str) -> None:
    """It is copied where the input is, and is not changed."""
    step, x, cotangent = made(name)
    other = cotangent.transpose(0, 1).contiguous().transpose(0, 1)
    kept = other.clone()
    assert other.stride() != cotangent.stride()
    assert all(torch.equal(a, b) for a, b in zip(step(x, cotangent), step(x, other), strict=True))
    assert torch.equal(other, kept)


# ------------------------------------------------------------------------------------------------ streams, graphs, host


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_layer
def test_the_current_stream_is_taken(name: str) -> None:
    """The input is written late on a side stream; whoever does not wait there reads what was there before."""
    step, x, cotangent = made(name)
    step(x, cotangent)  # compiled
    expected = step(x, cotangent)
    late = torch.full_like(x, torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(3 * 10**8)
        late.copy_(x)
        found = step(late, cotangent)
    assert not stream.query()  # the host did not wait for it
    stream.synchronize()
    assert_equal(found, expected)


@every_layer
def test_a_graph_is_captured_and_replayed(name: str) -> None:
    """With other numbers, several times: tickets begin anew."""
    step, x, cotangent = made(name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(x, cotangent)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(x, cotangent)
    for scale in (1.0, 0.5, 3.0):
        x.mul_(scale)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(found, step(x, cotangent))


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """torch raises where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_layer
def test_the_host_waits_for_nothing(name: str) -> None:
    step, x, cotangent = made(name)
    step(x, cotangent)  # compiled
    with waiting_is_an_error():
        found = step(x, cotangent)
    assert_equal(found, step(x, cotangent))


def test_the_host_waits_for_nothing_in_evaluation_or_behind_a_mask() -> None:
    norm = nw.BatchNorm(PHOTOS[1]).to(WHERE).eval()
    masked = nw.Norm("[n t] c", recovery=nw.Affine("c"), c=64).to(WHERE)
    x, rows = torch.randn(PHOTOS, device=WHERE), torch.randn(32, 100, 64, device=WHERE)
    valid = torch.rand(32, 100, device=WHERE) < 0.5
    expected = norm(x), masked(rows, valid=valid)  # compiled
    with waiting_is_an_error():
        found = norm(x), masked(rows, valid=valid)
    assert_equal(found, expected)


# ---------------------------------------------------------------------------------------------------------- determinism


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_runs_agree_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    step, x, cotangent = made(name, dtype)
    first = step(x, cotangent)
    assert all(tensor.isfinite().all() for tensor in first)
    assert_equal(step(x, cotangent), first)


@pytest.mark.parametrize(
    "name", ["long rows", "long rows with a residual", "batch, NCHW", "batch, NHWC", "groups, NHWC"]
)
def test_programs_that_wait_for_each_other_agree_under_load(name: str) -> None:
    """Another stream takes processors away, now many, now few, so that tickets are drawn in every order."""
    step, x, cotangent = made(name)
    expected = step(x, cotangent)
    wrong = torch.zeros(len(expected), dtype=torch.int64, device=WHERE)
    load, stream = torch.randn(2048, 2048, device=WHERE), torch.cuda.Stream()
    for turn in range(REPETITIONS):
        with torch.cuda.stream(stream):
            size = 256 * (1 + turn % 8)
            torch.mm(load[:size, :size], load[:size, :size])
        found = step(x, cotangent)
        wrong += torch.stack([(a != b).any() for a, b in zip(found, expected, strict=True)])
    torch.cuda.synchronize()
    assert not wrong.any(), f"outputs and gradients of {REPETITIONS} steps that differ: {wrong.tolist()}"
