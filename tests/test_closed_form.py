"""The derivative in closed form is the definition's: of measured, remembered and corrected statistics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from normwise import RMS, Affine, Frozen, Moving, Norm, Renorm, Scale, Standardize
from normwise.kernels.closed_form import run
from normwise.kernels.reference import Parameters, Recalled, Steps, four_steps
from normwise.normalizers import Normalizer
from normwise.pattern import parse
from normwise.plan import make_plan
from normwise.recoveries import Recovery
from tests.catalogue import randomize
from tests.tolerances import DOUBLE, GRADIENTS, check

SHAPE = (4, 6, 5)
PLANS = {
    "[n] c [...]": make_plan(parse("[n] c [...]"), SHAPE),
    "n c [d]": make_plan(parse("n c [d]"), SHAPE),
    "n (g [k]) [...]": make_plan(parse("n (g [k]) [...]"), SHAPE, (("g", 2),)),
    "n [c] ...": make_plan(parse("n [c] ..."), SHAPE),
}
NORMALIZERS: tuple[Normalizer, ...] = (Standardize(1e-3), RMS(1e-3))
USES = ("measured", "remembered", "corrected", "limited")


def _shapes(pattern: str) -> tuple[list[int], list[int]]:
    """Of a column's statistics, and of a parameter along the axes that are not the batch."""
    plan = PLANS[pattern]
    kept = [1 if dim in plan.reduced else size for dim, size in enumerate(plan.view)]
    return kept, [1, *plan.view[1:-1], 1] if "d" not in pattern else [1, 1, plan.view[-1]]


def _recalled(pattern: str, use: str, normalizer: Normalizer, dtype: torch.dtype) -> Recalled | None:
    if use == "measured":
        return None
    statistics = tuple(torch.rand(_shapes(pattern)[0], dtype=dtype) + 0.5 for _ in normalizer.remembers)
    if use == "remembered":
        return Recalled(statistics)
    bounds = (3.0, 5.0) if use == "corrected" else (1.05, 0.01)
    return Recalled(statistics, "correct", 2, tuple(torch.tensor(bound, dtype=dtype) for bound in bounds))  # type: ignore[arg-type]


def _parameters(pattern: str, recovery: Recovery | None, dtype: torch.dtype) -> list[Tensor]:
    shape = _shapes(pattern)[1]
    return [] if recovery is None else [torch.randn(shape, dtype=dtype) + 2 for _ in recovery.parameters]


def _gradients(how: object, x: Tensor, steps: Steps, parameters: Parameters, wanted: Sequence[bool]) -> list[Tensor]:
    """Output, gradients and moments, with gradients wanted of some of the inputs."""
    leaves = [
        tensor.detach().requires_grad_(is_wanted) if isinstance(tensor, Tensor) else tensor
        for tensor, is_wanted in zip([x, *parameters], wanted, strict=True)
    ]
    result = how(leaves[0], steps, leaves[1:])  # type: ignore[operator]
    torch.manual_seed(1)
    cotangent = torch.randn(x.shape, dtype=x.dtype)
    before = cotangent.clone()
    chosen = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    grads = torch.autograd.grad(result.output, chosen, cotangent)
    assert torch.equal(cotangent, before)
    moments = [] if result.moments is None else [torch.as_tensor(m) for m in result.moments]
    assert not any(m.requires_grad for m in moments)
    return [result.output.detach(), *grads, *moments]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
@pytest.mark.parametrize("pattern", PLANS)
def test_gradients_are_the_definitions(pattern: str, normalizer: Normalizer, use: str, masked: bool) -> None:
    plan = PLANS[pattern]
    for dtype, tolerance in ((torch.float64, DOUBLE), (torch.float32, GRADIENTS)):
        x = torch.randn(SHAPE, dtype=dtype) * 2 + 1
        valid = torch.rand(plan.view) < 0.7 if masked else None
        for recovery in (None, Scale("c"), Affine("c")):
            steps = Steps(plan, normalizer, recovery, valid, _recalled(pattern, use, normalizer, dtype))
            parameters = _parameters(pattern, recovery, dtype)
            for wanted in itertools.product((True, False), repeat=1 + len(parameters)):
                if any(wanted):
                    ours = _gradients(run, x, steps, parameters, wanted)
                    truth = _gradients(four_steps, x, steps, parameters, wanted)
                    assert all(wants.abs().max() > 1e-3 for wants in truth[: 1 + sum(wanted)])
                    for grad, wants in zip(ours, truth, strict=True):
                        check(grad, wants, tolerance)


@pytest.mark.parametrize("use", USES)
def test_a_parameter_that_is_none_is_a_number(use: str) -> None:
    normalizer = Standardize(1e-3)
    x, weight = torch.randn(SHAPE, dtype=torch.double), torch.rand(1, 6, 1, dtype=torch.double) + 1
    steps = Steps(
        PLANS["[n] c [...]"], normalizer, Affine("c"), None, _recalled("[n] c [...]", use, normalizer, x.dtype)
    )
    for parameters in ([weight, 0.0], [1.0, weight], [1.0, 0.0]):
        wanted = [True, *(isinstance(parameter, Tensor) for parameter in parameters)]
        ours, truth = (_gradients(how, x, steps, parameters, wanted) for how in (run, four_steps))
        for grad, wants in zip(ours, truth, strict=True):
            check(grad, wants, DOUBLE)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
def test_higher_derivatives_are_the_definitions(normalizer: Normalizer, use: str) -> None:
    plan = PLANS["n (g [k]) [...]"]
    recalled = _recalled("n (g [k]) [...]", use, normalizer, torch.double)
    steps = Steps(plan, normalizer, Affine("c"), None, recalled)
    x = torch.randn(SHAPE, dtype=torch.double)
    parameters = _parameters("n (g [k]) [...]", Affine("c"), torch.double)
    weights = [torch.randn_like(tensor) for tensor in (x, *parameters)]
    cotangent = torch.randn_like(x)

    def thrice(how: object) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *parameters)]
        found: list[Tensor] = []
        value = (how(leaves[0], steps, leaves[1:]).output.sin() * cotangent).sum()  # type: ignore[operator]
        for _ in range(3):
            grads = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
            found += grads
            value = sum((grad.cos() * weight).sum() for grad, weight in zip(grads, weights, strict=True))  # type: ignore[assignment]
        return [grad.detach() for grad in found]

    for grad, wants in zip(thrice(run), thrice(four_steps), strict=True):
        assert wants.any()
        check(grad, wants, DOUBLE)


def _remembering() -> dict[str, Norm]:
    return {
        "evaluation": Norm("[n] c", recovery=Affine("c"), memory=Moving("c", decay=0.9), c=3).eval(),
        "frozen": Norm("[n] c", memory=Frozen("c"), c=3),
        "mean square": Norm("[n] c", RMS(1e-3), memory=Frozen("c"), c=3),
        "steps": Norm("[n] t c", memory=Moving("t c", decay=0.9, beyond={"t": "raise"}), t=2, c=3).eval(),
    }


@pytest.mark.parametrize("name", _remembering())
def test_a_memory_may_move_before_the_backward(name: str) -> None:
    norm = _remembering()[name]
    randomize(norm)
    x = torch.randn((5, 2, 3) if name == "steps" else (5, 3), requires_grad=True)
    cotangent = torch.randn_like(x)
    for statistic in norm.spec.normalizer.remembers:
        (expected,) = torch.autograd.grad(norm(x), x, cotangent)
        y = norm(x)
        with torch.no_grad():
            norm.get_buffer(f"running_{statistic}").add_(1.0)
        assert torch.equal(torch.autograd.grad(y, x, cotangent)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_memory_that_was_copied_may_move_before_the_backward(dtype: torch.dtype) -> None:
    norm = Norm("[n] t c", memory=Moving("t c", decay=0.9, beyond={"t": "last"}), t=2, c=3).eval()
    randomize(norm)
    x, cotangent = torch.randn(5, 4, 3, requires_grad=True, dtype=dtype), torch.randn(5, 4, 3, dtype=dtype)
    (expected,) = torch.autograd.grad(norm(x), x, cotangent)
    y = norm(x)
    norm.reset_running_stats()
    assert torch.equal(torch.autograd.grad(y, x, cotangent)[0], expected)
    assert not torch.equal(torch.autograd.grad(norm(x), x, cotangent)[0], expected)


def test_a_corrected_batch_does_not_mind_the_next_one() -> None:
    norm = Norm("[n] c", memory=Moving("c", decay=0.5, renorm=Renorm(1.2, 0.3, 0, 0, 0)), c=3)
    randomize(norm)
    x, cotangent = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    (alone,) = torch.autograd.grad(norm(x), x, cotangent, retain_graph=True)
    norm.reset_running_stats()
    y = norm(x)
    (expected,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
    norm(torch.randn(8, 3) * 5)
    (after,) = torch.autograd.grad(y, x, cotangent)
    assert torch.equal(after, expected)
    assert not torch.equal(after, alone)


def test_an_input_that_changes_before_the_backward_is_an_error() -> None:
    norm = Norm("[n] c", recovery=Affine("c"))
    x = torch.randn(5, 3)
    y = norm(x)
    for tensor in (x, norm.weight):
        y = norm(x)
        with torch.no_grad():
            tensor.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, list(norm.parameters()), torch.randn(5, 3))


def test_little_is_saved_for_the_backward() -> None:
    norm = Norm("[n] c [h w]", recovery=Affine("c"), memory=Moving("c", decay=0.9), c=4)
    x = torch.randn(16, 4, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = norm(x, valid=torch.ones(16, dtype=torch.bool))
    assert y.requires_grad
    assert x.untyped_storage().data_ptr() in saved
    few_numbers_a_column = 10 * 4 * norm.weight.element_size()
    assert sum(saved.values()) <= x.untyped_storage().nbytes() + 16 + few_numbers_a_column
