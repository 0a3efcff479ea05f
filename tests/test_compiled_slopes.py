"""What a compiler is shown of a recovery: one slope for each column and weight, with the digits that values keep.

Compiling takes seconds, so a layer is compiled once, for inputs of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.nn import functional as F

import normwise as nw
from normwise import RMS, Affine, OffsetScale, Scale, Standardize
from normwise.kernels import reference
from normwise.kernels.reference import Recalled, Steps, four_steps, placed
from normwise.normalizers import Line, Normalizer
from normwise.pattern import parse, parse_names
from normwise.plan import make_plan
from normwise.recoveries import Recovery
from tests.catalogue import randomize
from tests.tolerances import COMPILED, DOUBLE, check

SHAPE = (4, 6, 8, 16)
STANDARDIZE = Standardize()
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": lambda: nw.GroupNorm(3, 6),
    "InstanceNorm": lambda: nw.InstanceNorm(6, affine=True, activation="silu"),
    "BatchNorm": lambda: nw.BatchNorm(6),
}
COLUMNS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # a view, and its dimensions that run down a column
    "GroupNorm": ((4, 3, 2, 8, 16), (2, 3, 4)),
    "InstanceNorm": (SHAPE, (2, 3)),
    "BatchNorm": (SHAPE, (0, 2, 3)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """Slow, and the compiler's own warnings are not ours."""
    ignored = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    return pytest.mark.slow(ignored(test))


@lru_cache
def _compiled(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A layer with float32 parameters, compiled for inputs of the dtype."""
    layer = LAYERS[name]()
    randomize(layer)
    return layer, torch.compile(layer, fullgraph=True)


def _formula(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The formula in the precision of the input, the mean taken out twice."""
    view, dims = COLUMNS[name]
    left = x.reshape(view)
    for _ in range(2):
        left = left - left.mean(dims, keepdim=True)
    values = (left / (left.square().mean(dims, keepdim=True) + 1e-5).sqrt()).reshape(SHAPE)
    y = values * weight.reshape(6, 1, 1) + bias.reshape(6, 1, 1)
    return F.silu(y) if name == "InstanceNorm" else y


def _results(name: str, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Output and gradients of input, weight and bias for a random cotangent: compiled, and the formula in float64."""
    layer, compiled = _compiled(name, x.dtype)
    cotangent = torch.randn(SHAPE).to(x.dtype)
    leaves = [x.clone().requires_grad_(), layer.weight, layer.bias]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y, expected = compiled(leaves[0]), _formula(name, *wide)
    grads = torch.autograd.grad(y, leaves, cotangent)
    yield y.detach(), expected.detach()
    yield from zip(grads, torch.autograd.grad(expected, wide, cotangent.double()), strict=True)


def _with_outlier() -> Tensor:
    x = torch.randn(SHAPE)
    x[:, :, 0, 0] = 1e6
    return x


HARD: dict[str, Callable[[], Tensor]] = {
    "ordinary": lambda: torch.randn(SHAPE) * torch.arange(1.0, 7.0).reshape(6, 1, 1) - 2,
    "mean 1e4": lambda: torch.randn(SHAPE) + 1e4,
    "mean -1e5": lambda: torch.randn(SHAPE) - 1e5,
    "mean 1e6": lambda: torch.randn(SHAPE) + 1e6,
    "10,000 in steps of 0.001": lambda: 10000 + torch.randint(16, SHAPE) * 1e-3,
    "one of 1e6": _with_outlier,
    "about 1e25": lambda: torch.randn(SHAPE) * 1e25,
    "about 1e-20": lambda: torch.randn(SHAPE) * 1e-20,
}


@compiles
@every_layer
def test_hard_inputs_keep_their_digits_and_gradients(name: str) -> None:
    for make in HARD.values():
        for actual, expected in _results(name, make()):
            largest = expected.abs().max().clamp_max(1)
            check(actual.double() / largest, expected / largest, COMPILED)


@compiles
@pytest.mark.parametrize("name", ["GroupNorm", "BatchNorm"])
@pytest.mark.parametrize("value", [0.0, 1e3 / 3, 1e7 / 3, 3e37, -1e20, 1e-40])
def test_a_constant_column_is_exactly_the_bias(name: str, value: float) -> None:
    layer, compiled = _compiled(name)
    y = compiled(torch.full(SHAPE, value, requires_grad=True))
    d_weight, d_bias = torch.autograd.grad(y, [layer.weight, layer.bias], torch.ones(SHAPE))
    assert torch.equal(y, layer.bias.reshape(6, 1, 1).expand(SHAPE))
    assert not d_weight.any()
    assert torch.equal(d_bias, torch.full((6,), 4.0 * 8 * 16))


@compiles
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_column_that_is_not_finite_spoils_no_other(bad: float) -> None:
    x = torch.randn(SHAPE)
    spoilt = x.clone()
    spoilt[1, 4, 2, 3] = bad  # the last group of the second example
    _, compiled = _compiled("GroupNorm")
    y, found = compiled(x.requires_grad_()), compiled(spoilt.requires_grad_())
    assert found[1, 4:].isnan().all()
    kept = torch.ones(SHAPE, dtype=torch.bool)
    kept[1, 4:] = False
    assert torch.equal(found[kept], y[kept])


@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    torch._dynamo.reset()  # what other tests of this process have compiled counts against its limit
    y, d_x, *d_parameters = _results("GroupNorm", (torch.randn(SHAPE) * 3 + 7).to(dtype))
    for actual, expected in (y, d_x):
        assert actual.dtype == dtype
        bound = torch.finfo(dtype).eps / 2 * expected.abs() + COMPILED.absolute
        assert ((actual.double() - expected).abs() <= bound).all()
    for actual, expected in d_parameters:
        assert actual.dtype == torch.float32
        check(actual.double() / expected.abs().max(), expected / expected.abs().max(), COMPILED)


def _backward_sums(layer: nn.Module) -> set[tuple[int, ...]]:
    """The shapes to which a backward sums tensors of the input's size."""
    found: set[tuple[int, ...]] = set()

    def keep(graph: GraphModule, _: object) -> GraphModule:
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.sum.dim_IntList:
                summed, result = node.args[0].meta["val"], node.meta["val"]
                if summed.numel() == torch.Size(SHAPE).numel():
                    found.add(tuple(size for size in result.shape if size != 1))
        return graph

    backend = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=keep)
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(SHAPE, requires_grad=True))
    torch.autograd.grad(y, list(layer.parameters()), torch.randn(SHAPE))
    return found


@compiles
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nw.GroupNorm(3, 6), (4, 3, 2)), (nw.InstanceNorm(6, affine=True), (4, 6)), (nw.BatchNorm(6), (6,))],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_backward_sums_over_one_set_of_axes(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert _backward_sums(layer) == {shape}


def _recovered(monkeypatch: pytest.MonkeyPatch, steps: Steps, *, pretends: bool) -> tuple[Tensor, int]:
    """The output of the four steps in float64, and how often a line was multiplied out; a compiler is pretended."""
    torch.manual_seed(0)
    taken: list[Line] = []

    def recovered(line: Line, view: Tensor, weight: Tensor | float, bias: Tensor | float) -> Tensor:
        taken.append(line)
        return multiplied(line, view, weight, bias)

    multiplied = Line.recovered
    plan, recovery = steps.plan, steps.recovery
    assert recovery is not None
    over = parse_names(recovery.over)
    x = torch.randn(SHAPE, dtype=torch.float64) + 3
    own = [torch.randn([plan.size(name) for (name,) in over], dtype=torch.float64) for _ in recovery.parameters]
    with monkeypatch.context() as patch:
        patch.setattr(reference, "is_compiling", lambda: pretends)
        patch.setattr(Line, "recovered", recovered)
        return four_steps(x, steps, placed(recovery, own, over, plan, x)).output, len(taken)


def _steps(text: str, recovery: Recovery, normalizer: Normalizer = STANDARDIZE) -> Steps:
    return Steps(make_plan(parse(text), SHAPE, (("g", 3),)), normalizer, recovery)


ONES = torch.ones(1, 1, 1, 1, dtype=torch.float64)
MASK = torch.arange(8).reshape(1, 1, 8, 1) < 5
BATCH = _steps("[n] c [h w]", Affine("c"))


@pytest.mark.parametrize(
    "steps",
    [
        BATCH,
        _steps("n c [h w]", Affine("c")),
        _steps("n (g [k]) [h w]", Affine("g k")),
        _steps("n [c h] w", Affine("w c")),
    ],
    ids=lambda steps: f"{steps.plan.names} {steps.recovery}",
)
def test_what_is_multiplied_out_is_the_same(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, never = _recovered(monkeypatch, steps, pretends=False)
    y, once = _recovered(monkeypatch, steps, pretends=True)
    assert (never, once) == (0, 1)
    check(y, expected, DOUBLE)


@pytest.mark.parametrize(
    "steps",
    [
        _steps("n c h [w]", Affine("w")),
        _steps("n [c h w]", Affine("c h w")),
        _steps("n [c] h w", Affine("c")),
        _steps("n c [h w]", Scale("c")),
        _steps("n c [h w]", OffsetScale("c")),
        _steps("n c [h w]", Affine("c"), RMS()),
        BATCH._replace(valid=MASK),
        BATCH._replace(recalled=Recalled((3 * ONES, ONES))),
        BATCH._replace(recalled=Recalled((3 * ONES, ONES), "fallback")),
        BATCH._replace(recalled=Recalled((3 * ONES, ONES), "correct", limits=(3 * ONES, 5 * ONES))),
    ],
    ids=[
        "LayerNorm",
        "all axes",
        "LayerNorm2d",
        "Scale",
        "OffsetScale",
        "RMS",
        "mask",
        "instead",
        "fallback",
        "renorm",
    ],
)
def test_what_is_not_multiplied_out(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = _recovered(monkeypatch, steps, pretends=False)
    y, times = _recovered(monkeypatch, steps, pretends=True)
    assert times == 0
    assert torch.equal(y, expected)


def test_a_parameter_that_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(SHAPE, dtype=torch.float64) + 3
    monkeypatch.setattr(reference, "is_compiling", lambda: True)
    y = four_steps(x, BATCH, (2.0, 0.5)).output
    check(y, 2 * F.batch_norm(x, None, None, training=True) + 0.5, DOUBLE)


def test_a_line_multiplied_out() -> None:
    x, weight, bias, rest, inverse = torch.randn(5, 7, 3, dtype=torch.float64)
    for scale in (None, torch.tensor(0.25, dtype=torch.float64)):
        line = Line(scale, (torch.ones(3, dtype=torch.float64), rest), inverse)
        check(line.recovered(x, weight, bias), line.values(x) * weight + bias, DOUBLE)
