"""Under `torch.compile` large calls run the compiled kernels: the same bits as eager ones, wherever they are taken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise.kernels import operator
from normwise.kernels.choose import LEAST_COMPILED
from normwise.plan import plan_for
from tests.catalogue import randomize
from tests.compiled import needs_kernels
from tests.tolerances import COMPILED, check

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),  # the compiler's own
]

CHANNELS = 32
IMAGES = (LEAST_COMPILED // (CHANNELS * 256) + 1, CHANNELS, 16, 16)
ROWS = (LEAST_COMPILED // 64 + 1, 64)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: nw.LayerNorm(64), ROWS),
    "LayerNorm without parameters": (lambda: nw.LayerNorm(64, elementwise_affine=False), ROWS),
    "RMSNorm": (lambda: nw.RMSNorm(64), ROWS),
    "RMSNorm with silu": (lambda: nw.RMSNorm(64, activation="silu"), ROWS),
    "BatchNorm": (lambda: nw.BatchNorm(CHANNELS), IMAGES),
    "BatchNorm of rows": (lambda: nw.BatchNorm(64), ROWS),
    "GroupNorm": (lambda: nw.GroupNorm(4, CHANNELS), IMAGES),
    "InstanceNorm": (lambda: nw.InstanceNorm(CHANNELS, affine=True), IMAGES),
    "LayerNorm2d": (lambda: nw.LayerNorm2d(CHANNELS), IMAGES),
    "L2": (lambda: nw.Norm("n [c]", nw.L2(), nw.OffsetScale("c"), sizes={"c": 64}), ROWS),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


class Seen:
    """A backend that runs what it is shown as it is, and counts the operators in it."""

    def __init__(self) -> None:
        self.operators = 0

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        targets = [str(node.target) for node in graph.graph.nodes]
        self.operators += sum(target.startswith("normwise.normalize") for target in targets)
        return graph


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A layer, and an input that is just large enough."""
    make, shape = LAYERS[name]
    layer = make()
    randomize(layer)
    return layer, torch.randn(shape)


def operators_in(function: Callable[..., Any], *inputs: Tensor) -> int:
    seen = Seen()
    torch.compile(function, backend=seen)(*inputs)
    return seen.operators


def outcome(layer: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Output, and the gradients of input and parameters for a random cotangent."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], torch.randn_like(y))]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def assert_as_eager(layer: nn.Module, x: Tensor, **options: Any) -> None:
    """Outputs, gradients and memory, bit for bit."""
    twin = copy.deepcopy(layer)
    expected = outcome(layer, x, list(layer.parameters()))
    found = outcome(torch.compile(twin, fullgraph=True, **options), x, list(twin.parameters()))
    assert expected[0].any()
    assert_same(found, expected)
    assert_same(list(twin.buffers()), list(layer.buffers()))


@every_layer
def test_it_is_taken(name: str) -> None:
    layer, x = made(name)
    assert operators_in(layer, x) == 1


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_as_eager(name: str, dtype: torch.dtype) -> None:
    layer, x = made(name)
    assert_as_eager(layer, x.to(dtype), backend="aot_eager")


@pytest.mark.slow
def test_the_same_bits_by_inductor() -> None:
    layer, x = made("BatchNorm")
    assert_as_eager(layer, x)


def test_inputs_in_other_orders() -> None:
    layer, x = made("GroupNorm")
    assert_as_eager(layer, x.contiguous(memory_format=torch.channels_last), backend="aot_eager")
    assert_as_eager(layer, torch.randn(*IMAGES[:3], 20)[..., :16], backend="aot_eager")


def test_batches_of_any_size() -> None:
    layer, x = made("BatchNorm")
    twin = copy.deepcopy(layer)
    seen = Seen()
    compiled = torch.compile(twin, backend=seen, dynamic=True, fullgraph=True)
    for size in (len(x), len(x) + 3, 2 * len(x)):
        batch = torch.randn(size, *x.shape[1:])
        assert torch.equal(compiled(batch), layer(batch))
    assert_same(list(twin.buffers()), list(layer.buffers()))
    assert seen.operators == 1


def test_only_gradients_that_are_wanted() -> None:
    layer, x = made("LayerNorm")
    layer.requires_grad_(False)
    layer.bias.requires_grad_()
    twin = copy.deepcopy(layer)
    results = []
    for run, bias in ((layer, layer.bias), (torch.compile(twin, backend="aot_eager"), twin.bias)):
        torch.manual_seed(1)
        y = run(x)
        results.append(torch.autograd.grad(y, bias, torch.randn_like(y))[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("recovery", [nw.Affine("c"), nw.Scale("c"), nw.OffsetScale("c"), None], ids=str)
def test_an_order_that_no_kernel_knows(recovery: Any) -> None:
    side = round(LEAST_COMPILED ** (1 / 4)) + 1
    normalizer = nw.RMS() if recovery == nw.OffsetScale("c") else nw.Standardize()
    layer = nw.Norm("a [b] c [d]", normalizer, recovery, sizes={"c": side})
    randomize(layer)
    x = torch.randn([side] * 4).permute(1, 0, 3, 2)
    assert layer.explain(x).kernel == "reference"
    assert operators_in(layer, x) == 1
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    expected = outcome(layer, x, list(layer.parameters()))
    for a, b in zip(outcome(compiled, x, list(twin.parameters())), expected, strict=True):
        check(a, b, COMPILED)


DISSOLVES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "small": lambda layer, x: layer(x[:1]),
    "float64": lambda layer, x: layer(x.double()),
    "masked": lambda layer, x: layer(x, valid=x[:, 0] > 0, valid_axes="n"),
    "mapped": lambda layer, x: vmap(layer)(x.unflatten(0, (1, -1))),
    "forward mode": lambda layer, x: jvp(layer, (x,), (x,))[1],
    "a gradient inside": lambda layer, x: grad(lambda x: layer(x).sum())(x),
    "a derivative inside": lambda layer, x: vjp(layer, x)[1](x)[0],
}


@pytest.mark.parametrize("case", DISSOLVES)
def test_what_dissolves(case: str) -> None:
    layer = nw.Norm("n [c]", nw.Standardize(), nw.Affine("c"), sizes={"c": 64})
    randomize(layer)
    x = torch.randn(ROWS)
    call = DISSOLVES[case]
    assert operators_in(lambda x: call(layer, x), x) == 0
    torch.compiler.reset()
    found = torch.compile(lambda x: call(layer, x), backend="aot_eager")(x)
    check(found, call(layer, x), COMPILED)


def test_a_word_that_no_kernel_knows_dissolves() -> None:
    layer = nw.Norm("[a] b [c] d", nw.Standardize(), sizes={"b": 20, "d": 20})
    x = torch.randn(20, 20, 20, 20)
    assert layer.explain(x).kernel == "reference"
    assert operators_in(layer, x) == 0


@every_layer
def test_the_explanation_says_so(name: str) -> None:
    layer, x = made(name)
    explained = layer.explain(x)
    assert (explained.compiled, explained.evaluation_compiled) == (True, "BatchNorm" not in name)
    assert "under torch.compile the same, as one operator" in str(explained)
    assert not layer.explain(x[:1]).compiled


def test_evaluation_with_a_memory_dissolves() -> None:
    layer, x = made("BatchNorm")
    assert operators_in(layer.eval(), x) == 0


def test_a_backend_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made("LayerNorm")
    monkeypatch.setattr(operator, "requested", lambda: "reference")
    assert operators_in(layer, x) == 0


def test_an_exported_program_has_none() -> None:
    layer, x = made("LayerNorm")
    program = torch.export.export(layer, (x,))
    assert not [node for node in program.graph.nodes if "normwise" in str(node.target)]


def test_a_checkpointed_forward_enters_once() -> None:
    layer, x = made("BatchNorm")
    twin = copy.deepcopy(layer)
    compiled = torch.compile(lambda x: checkpoint(twin, x, use_reentrant=False), backend="aot_eager")
    assert_same(outcome(compiled, x, list(twin.parameters())), outcome(layer, x, list(layer.parameters())))
    assert_same(list(twin.buffers()), list(layer.buffers()))


def test_second_derivatives() -> None:
    """Of what a backend runs eagerly; those that trace the backward refuse a second one, whatever is in it."""
    layer, x = made("LayerNorm")
    found = []
    for run in (torch.compile(layer, backend="eager"), layer):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (d_x,) = torch.autograd.grad(y, leaf, torch.randn_like(y), create_graph=True)
        found.append(torch.autograd.grad(d_x, leaf, torch.randn_like(y))[0])
    assert found[1].abs().max() > 1e-3
    check(*found, COMPILED)


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm", "LayerNorm2d"])
def test_torch_finds_nothing_wrong_with_it(name: str) -> None:
    layer, x = made(name)
    plan = plan_for(layer.spec.pattern, x.shape, layer.spec.call_sizes)
    declared = (plan.view, plan.reduced, plan.parts, " ".join(plan.names), "Standardize", 1e-5, "Affine")
    over = layer.spec.recovery.over
    parameters = [parameter.detach().clone().requires_grad_() for parameter in (layer.weight, layer.bias)]
    inputs = (x.requires_grad_(), *parameters, *map(list, declared[:3]), *declared[3:], over, "")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.normwise.normalize.default, inputs, test_utils=tests)
