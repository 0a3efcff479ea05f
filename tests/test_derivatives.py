"""Derivatives of every order and in every mode: finite differences in double, forward against reverse, maps and loops.

First and second derivatives of the named layers stand in `test_layers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from normwise import RMS, Affine, Frozen, Moving, Norm, Renorm, Scale
from tests.catalogue import CASES, REMEMBERING, Case, randomize
from tests.tolerances import DOUBLE, GRADIENTS, check

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_small_case = pytest.mark.parametrize("case", [c for c in CASES if math.prod(c.shape) <= 120], ids=str)
every_memory = pytest.mark.parametrize("case", REMEMBERING, ids=str)
every_small_memory = pytest.mark.parametrize("case", [c for c in REMEMBERING if math.prod(c.shape) <= 162], ids=str)
either_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use
Function = Callable[..., Tensor]
double = partial(torch.randn, dtype=torch.float64)


def pure(layer: nn.Module, **arguments: Any) -> tuple[Function, tuple[Tensor, ...]]:
    """A layer as a function of its input and parameters, from the same memory at every call, and the parameters."""
    names = [name for name, _ in layer.named_parameters()]
    memory = {name: value.clone() for name, value in layer.named_buffers()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        fresh = {name: value.clone() for name, value in memory.items()}
        result = functional_call(layer, (dict(zip(names, values, strict=True)), fresh), (x,), arguments)
        return torch.stack(result) if isinstance(result, tuple) else result

    return run, tuple(parameter.detach().requires_grad_() for parameter in layer.parameters())


def slope(run: Function) -> Callable[..., tuple[Tensor, ...]]:
    """The first derivative of a function by all its arguments, as a function of them and of the cotangent."""

    def first(cotangent: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*arguments), arguments, cotangent, create_graph=True)

    return first


def layer_of(case: Case, training: bool) -> nn.Module:
    layer = case.ours(dtype=torch.float64)
    randomize(layer)
    return layer.train(training)


@either_mode
@every_case
def test_third_derivatives(case: Case, training: bool) -> None:
    run, parameters = pure(layer_of(case, training))
    cotangent, x = (double(case.shape, requires_grad=True) for _ in range(2))
    assert gradgradcheck(slope(run), (cotangent, x, *parameters), fast_mode=True)


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.LayerNorm], ids=["batch", "layer"])
def test_third_derivatives_of_torch_are_wrong(make: type) -> None:
    run, parameters = pure(make(3, dtype=torch.float64))
    cotangent, x = (double(4, 3, requires_grad=True) for _ in range(2))
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        gradgradcheck(slope(run), (cotangent, x, *parameters))


MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True, False, True, True, False], [True] * 5])
LIMITED = Renorm(r_max=1.5, d_max=0.5, warmup=0, r_ramp=0, d_ramp=0)
BATCH = partial(Norm, "[n t] c", recovery=Affine("c"))
VARIANTS: dict[str, tuple[Callable[..., Norm], dict[str, Any]]] = {
    "mask": (partial(BATCH, memory=Moving("c", decay=0.9)), {"valid": MASK}),
    "lengths": (partial(BATCH, memory=Moving("c", decay=0.9)), {"lengths": {"t": torch.tensor([5, 3, 1, 4])}}),
    "mask over rows": (partial(Norm, "n t [c]", recovery=Affine("c")), {"valid": MASK}),
    "mask within a row": (
        partial(Norm, "n t [c]", RMS(1e-3), Scale("c")),
        {"valid": torch.tensor([True, False, True]), "valid_axes": "c"},
    ),
    "mask and fallback": (
        partial(Norm, "[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9, degenerate="memory"), t=5),
        {"lengths": {"t": torch.tensor([5, 2, 2, 1])}},
    ),
    "beyond": (
        partial(Norm, "[n] t c", memory=Moving("t c", decay=0.9, beyond={"t": "pooled"}), t=3),
        {"lengths": {"t": torch.tensor([3, 3, 2, 3])}},
    ),
    "batch renormalization": (partial(BATCH, memory=Moving("c", decay=0.9, renorm=LIMITED)), {}),
    "renormalization and mask": (partial(BATCH, memory=Moving("c", decay=0.9, renorm=LIMITED)), {"valid": MASK}),
    "ghost batches": (partial(BATCH, memory=Moving("c", decay=0.9, ghost=2)), {}),
    "ghost batches and mask": (partial(BATCH, memory=Moving("c", decay=0.9, ghost=2)), {"valid": MASK}),
    "frozen": (partial(BATCH, memory=Frozen("c")), {}),
    "residual": (BATCH, {}),
    "residual and mask": (BATCH, {"valid": MASK}),
}


def variant(name: str, training: bool) -> tuple[Function, tuple[Tensor, ...]]:
    """A way to call as a function, and its input and parameters."""
    make, arguments = VARIANTS[name]
    layer = make(dtype=torch.float64, c=3).train(training)
    randomize(layer)
    if layer.spec.memory is not None:
        layer.running_mean += 100  # so far away that the limits of a renormalization hold r and d
        layer.running_var *= 100
    x = double(4, dict(layer.spec.sizes).get("t", 5), 3, requires_grad=True)
    given = {"residual": double(x.shape)} if "residual" in name else {}
    run, parameters = pure(layer, **arguments, **given)
    return run, (x, *parameters)


@either_mode
@pytest.mark.parametrize("name", VARIANTS)
def test_first_to_third_derivatives_of_every_way_to_call(name: str, training: bool) -> None:
    run, inputs = variant(name, training)
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)
    cotangent = double(run(*inputs).shape, requires_grad=True)
    assert gradgradcheck(slope(run), (cotangent, *inputs), fast_mode=True)


@pytest.mark.parametrize("order", [1, 2, 3])
@either_mode
@pytest.mark.parametrize("name", VARIANTS)
def test_forward_mode_of_every_way_to_call_equals_reverse_mode(name: str, training: bool, order: int) -> None:
    run, (x, *parameters) = variant(name, training)
    _check_modes(lambda x: run(x, *parameters), x.detach(), order)


def test_the_gradient_of_a_residual_flows_through_both_outputs() -> None:
    layer = BATCH(dtype=torch.float64, c=3)
    randomize(layer)

    def run(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return layer(x, residual=residual)

    inputs = (double(4, 5, 3, requires_grad=True), double(4, 5, 3, requires_grad=True))
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_renormalization_holds_r_and_d_constant_at_every_order(order: int) -> None:
    memory = Moving("c", decay=0.9, renorm=Renorm(r_max=10.0, d_max=10.0, warmup=0, r_ramp=0, d_ramp=0))
    layer = Norm("[n] c", memory=memory, dtype=torch.float64, c=3)
    randomize(layer)
    x = double(6, 3, requires_grad=True)
    mean, deviation = x.detach().mean(0), (x.detach().var(0, unbiased=False) + 1e-5).sqrt()
    remembered = (layer.running_var.clone() + 1e-5).sqrt()
    r, d = deviation / remembered, (mean - layer.running_mean.clone()) / remembered
    run, _ = pure(layer)

    def by_hand(x: Tensor) -> Tensor:
        centered = x - x.mean(0)
        return centered / (centered.square().mean(0) + 1e-5).sqrt() * r + d

    directions = double(order, 6, 3)
    check(_derivative(run, x, directions), _derivative(by_hand, x, directions), DOUBLE)


def _derivative(run: Function, x: Tensor, directions: Tensor) -> Tensor:
    """The gradient of ever another directional derivative, by reverse mode alone."""
    found = run(x)
    for direction in directions:
        (found,) = torch.autograd.grad((found * direction).sum(), x, create_graph=True)
    return found.detach()


def _forward(run: Function, order: int, direction: Tensor) -> Function:
    """The derivative of an order along a direction, by forward mode alone."""
    if order == 0:
        return run
    before = _forward(run, order - 1, direction)
    return lambda x: jvp(before, (x,), (direction,))[1]


def _reverse(run: Callable[[Tensor], Tensor], order: int, direction: Tensor) -> Callable[[Tensor], Tensor]:
    """The same of a scalar function, by reverse mode alone."""
    if order == 0:
        return run
    before = _reverse(run, order - 1, direction)
    return lambda x: (grad(before)(x) * direction).sum()


def _check_modes(run: Callable[[Tensor], Tensor], x: Tensor, order: int) -> None:
    """One derivative by forward mode alone and by reverse mode alone."""
    direction, cotangent = double(x.shape), double(run(x).shape)
    forward = (_forward(run, order, direction)(x) * cotangent).sum()
    reverse = _reverse(lambda x: (run(x) * cotangent).sum(), order, direction)(x)
    check(forward.detach(), reverse.detach(), DOUBLE)


@pytest.mark.parametrize("order", [1, 2, 3])
@either_mode
@every_case
def test_forward_mode_equals_reverse_mode(case: Case, training: bool, order: int) -> None:
    run, parameters = pure(layer_of(case, training))
    _check_modes(lambda x: run(x, *parameters), double(case.shape), order)


def test_forward_mode_twice_is_wrong_in_torch() -> None:
    layer, x = nn.LayerNorm(3, dtype=torch.float64), double(4, 3)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(jacfwd(jacfwd(layer))(x).detach(), jacrev(jacrev(layer))(x).detach(), DOUBLE)


@either_mode
@every_small_case
def test_jacobians_and_hessians_equal_those_of_loops(case: Case, training: bool) -> None:
    run, parameters = pure(layer_of(case, training))
    x, cotangent = double(2, *case.shape)

    def output(x: Tensor) -> Tensor:
        return run(x, *parameters)

    def weighed(x: Tensor) -> Tensor:
        return (output(x) * cotangent).sum()

    looped = torch.autograd.functional.jacobian(output, x)
    for transform in (jacrev, jacfwd):
        check(transform(output)(x).detach(), looped, DOUBLE)
    check(hessian(weighed)(x).detach(), torch.autograd.functional.hessian(weighed, x), DOUBLE)


@either_mode
@every_case
def test_mapped_values_and_gradients_equal_a_loop(case: Case, training: bool) -> None:
    run, parameters = pure(layer_of(case, training))
    xs, cotangent = double(3, *case.shape), double(case.shape)

    def weighed(x: Tensor, *parameters: Tensor) -> Tensor:
        return (run(x, *parameters) * cotangent).sum()

    constant = (None,) * len(parameters)
    everything = tuple(range(1 + len(parameters)))
    looped = torch.stack([run(x, *parameters) for x in xs])
    check(vmap(run, (0, *constant))(xs, *parameters), looped, DOUBLE)
    mapped = vmap(grad(weighed, everything), (0, *constant))(xs, *parameters)
    for found, *expected in zip(mapped, *(grad(weighed, everything)(x, *parameters) for x in xs), strict=True):
        check(found, torch.stack(expected), DOUBLE)


def _total(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x).square().sum()


ONE_PASS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "jvp": lambda layer, x: jvp(layer, (x,), (torch.ones_like(x),)),
    "grad": lambda layer, x: grad(_total(layer))(x),
    "jacrev": lambda layer, x: jacrev(_total(layer))(x),
    "jacfwd": lambda layer, x: jacfwd(_total(layer))(x),
    "hessian": lambda layer, x: hessian(_total(layer))(x),
    "jacfwd of jacfwd": lambda layer, x: jacfwd(jacfwd(_total(layer)))(x),
    "loop": lambda layer, x: torch.autograd.functional.hessian(_total(layer), x),
}


@pytest.mark.parametrize("name", ONE_PASS)
@every_small_memory
def test_the_memory_after_a_derivative_is_that_after_one_call(case: Case, name: str) -> None:
    layer, plain = (layer_of(case, True) for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    x = double(case.shape)
    ONE_PASS[name](layer, x), plain(x)
    for after, expected in zip(layer.buffers(), plain.buffers(), strict=True):
        check(after, expected, DOUBLE)


@every_memory
def test_the_memory_after_a_map_is_that_after_a_loop(case: Case) -> None:
    mapped, looped = (layer_of(case, True) for _ in range(2))
    looped.load_state_dict(mapped.state_dict())
    xs = double(4, *case.shape)
    check(vmap(mapped)(xs), torch.stack([looped(x) for x in xs]), DOUBLE)
    for after, expected in zip(mapped.buffers(), looped.buffers(), strict=True):
        check(after, expected, DOUBLE)


@either_mode
@every_case
def test_functional_call_is_the_layer_bit_for_bit_and_leaves_it_alone(case: Case, training: bool) -> None:
    layer, called = (case.ours().train(training) for _ in range(2))
    randomize(layer)
    called.load_state_dict(layer.state_dict())
    given = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(case.shape)
    before = {name: value.clone() for name, value in called.state_dict().items()}
    assert torch.equal(functional_call(called, given, (x,)), layer(x))
    for name, value in layer.state_dict().items():
        assert torch.equal(given[name], value)
        assert torch.equal(called.state_dict()[name], before[name])


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_torch_cannot_map_a_training_batch_norm(make: type) -> None:
    with pytest.raises(RuntimeError, match="running_mean or running_var, which will be updated in place"):
        vmap(make(3))(torch.randn(2, 4, 3, *((5, 5) if make is nn.BatchNorm2d else ())))


@every_small_case
@either_mode
def test_many_cotangents_at_once(case: Case, training: bool) -> None:
    run, parameters = pure(layer_of(case, training))
    inputs = (double(case.shape, requires_grad=True), *parameters)
    y = run(*inputs)
    cotangents = double(3, *y.shape)
    mapped = torch.autograd.grad(y, inputs, cotangents, retain_graph=True, is_grads_batched=True)
    for place, cotangent in enumerate(cotangents):
        for one, wants in zip(mapped, torch.autograd.grad(y, inputs, cotangent, retain_graph=True), strict=True):
            check(one[place], wants, DOUBLE)


CONNECTED: dict[str, Callable[[Callable[..., Tensor], Tensor], Tensor]] = {
    "twice": lambda norm, x: norm(norm(x).sin()),
    "residual": lambda norm, x: norm(x.sin(), residual=x)[0],
    "by its own gate": lambda norm, x: norm(x, gate=x),
    "by a gate before it": lambda norm, x: norm(x.sin(), gate=x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONNECTED)
def test_inputs_that_are_computed_from_each_other(name: str, dtype: torch.dtype) -> None:
    """Differentiable gradients, and those over many cotangents, go each way once."""
    gate = "silu" if "gate" in name else None
    layer = Norm("n [d]", recovery=Affine("d"), gate=gate, d=8)  # type: ignore[arg-type]
    randomize(layer)

    def by_hand(x: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Any:
        total = x if residual is None else x + residual
        y = nn.functional.layer_norm(total, (8,), layer.weight.double(), layer.bias.double())
        y = y if gate is None else y * nn.functional.silu(gate)
        return y if residual is None else (y, total)

    def found(norm: Callable[..., Any], of: torch.dtype) -> list[Tensor]:
        torch.manual_seed(1)
        x = double(5, 8).to(of).requires_grad_()
        dy, ddx, many = (double(*shape).to(of) for shape in ((5, 8), (5, 8), (3, 5, 8)))
        inputs = [x, *layer.parameters()]
        y = CONNECTED[name](norm, x)
        first = torch.autograd.grad(y, inputs, dy, create_graph=True)
        mapped = torch.autograd.grad(y, inputs, many, retain_graph=True, is_grads_batched=True)
        return [*first, *torch.autograd.grad(first[0], inputs, ddx, materialize_grads=True), *mapped]

    layer.to(dtype)
    for one, wants in zip(found(layer, dtype), found(by_hand, torch.float64), strict=True):
        check(one.double(), wants.double(), GRADIENTS if dtype is torch.float32 else DOUBLE)
