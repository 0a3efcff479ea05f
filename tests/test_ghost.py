"""Ghost batches against a loop over sub-batches, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise import Affine, Average, Moving, NonFiniteError, Norm, PatternError, Renorm, TooFewSamplesError
from tests.test_memory import bits
from tests.tolerances import COMPILED, GRADIENTS, check

Make = Callable[..., Norm]

OPEN = Renorm(warmup=0, r_ramp=0, d_ramp=0)
LAYERS: dict[str, Make] = {
    "moving": lambda **o: Norm("[n] c h", recovery=Affine("c"), memory=Moving("h c", decay=0.9, **o), c=3, h=2),
    "average": lambda **o: Norm("[n] c [h]", recovery=Affine("c"), memory=Average("c", **o), c=3),
    "kept axes averaged": lambda **o: Norm("[n] c h", recovery=Affine("c"), memory=Moving("c", decay=0.9, **o), c=3),
    "renormalized": lambda **o: Norm(
        "[n] c [h]", recovery=Affine("c"), memory=Moving("c", decay=0.5, renorm=OPEN, **o), c=3
    ),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
# rows, the size that is declared, and the sub-batches that it makes
DIVISIONS = [
    (12, 4, [4, 4, 4]),
    (10, 4, [4, 3, 3]),
    (13, 5, [5, 4, 4]),
    (5, 4, [3, 2]),
    (4, 4, [4]),
    (3, 4, [3]),
    (64, 2, [2] * 32),
]


def pair(make: Make, ghost: int) -> tuple[Norm, Norm]:
    """A layer with ghost batches, and one without, with the same numbers."""
    divided, whole = make(ghost=ghost), make()
    with torch.no_grad():
        divided.weight.uniform_(0.5, 2.0), divided.bias.normal_()
    whole.load_state_dict(divided.state_dict(), strict=True)
    return divided, whole


def loop(layer: Norm, x: Tensor, sizes: list[int], valid: Tensor | None = None) -> Tensor:
    masks = [None] * len(sizes) if valid is None else valid.split(sizes)
    return torch.cat([layer(part, valid=mask) for part, mask in zip(x.split(sizes), masks, strict=True)])


@every_layer
@pytest.mark.parametrize(("rows", "ghost", "sizes"), DIVISIONS)
def test_a_batch_is_a_loop_over_its_sub_batches(make: Make, rows: int, ghost: int, sizes: list[int]) -> None:
    divided, looped = pair(make, ghost)
    assert max(sizes) <= ghost
    for _ in range(3):
        x = (torch.randn(rows, 3, 2) * 2 + 1).requires_grad_()
        y, expected = divided(x), loop(looped, x, sizes)
        assert torch.equal(y, expected)
        assert bits(divided) == bits(looped)
        cotangent, leaves = torch.randn_like(y), [x, divided.weight, divided.bias]
        grads = torch.autograd.grad(y, leaves, cotangent)
        wanted = torch.autograd.grad(expected, [x, looped.weight, looped.bias], cotangent)
        for found, by_loop in zip(grads, wanted, strict=True):
            check(found, by_loop, GRADIENTS)
    assert divided.num_batches_tracked.item() == 3 * len(sizes)


@every_layer
def test_a_mask_is_divided_with_its_batch(make: Make) -> None:
    divided, looped = pair(make, 4)
    x, valid = torch.randn(10, 3, 2), torch.rand(10) > 0.3
    valid[:2] = valid[4:6] = valid[7:9] = True  # two in each
    assert torch.equal(
        divided(x.masked_fill(~valid[:, None, None], torch.nan), valid=valid), loop(looped, x, [4, 3, 3], valid)
    )
    assert bits(divided) == bits(looped)


def test_a_mask_that_is_the_same_for_every_example() -> None:
    divided, looped = pair(LAYERS["average"], 4)
    x, valid = torch.randn(8, 3, 2), torch.tensor([True, False])
    y = divided(x, valid=valid, valid_axes="h")
    assert torch.equal(y, torch.cat([looped(part, valid=valid, valid_axes="h") for part in x.split(4)]))
    assert bits(divided) == bits(looped)


def test_a_residual_is_returned_whole() -> None:
    divided, looped = pair(LAYERS["average"], 4)
    x, residual = torch.randn(10, 3, 2), torch.randn(10, 3, 2)
    y, total = divided(x, residual=residual)
    assert torch.equal(y, loop(looped, x + residual, [4, 3, 3]))
    assert torch.equal(total, x + residual)


@every_layer
@pytest.mark.parametrize("still", [lambda layer: layer.eval(), nw.freeze], ids=["evaluation", "frozen"])
def test_with_remembered_statistics_nothing_is_divided(make: Make, still: Callable[[Norm], object]) -> None:
    divided, whole = pair(make, 2)
    divided(torch.randn(8, 3, 2) + 3)
    whole.load_state_dict(divided.state_dict(), strict=True)
    still(divided), still(whole)
    before, x = bits(divided), torch.randn(7, 3, 2)  # and so an odd number of examples is no matter
    assert torch.equal(divided(x), whole(x))
    assert bits(divided) == before


def test_what_does_not_enter_is_divided_all_the_same() -> None:
    divided, looped = pair(LAYERS["moving"], 4)
    before, x = bits(divided), torch.randn(8, 3, 2)
    with nw.no_update(divided):
        assert torch.equal(divided(x), loop(looped, x, [4, 4]))
    assert bits(divided) == before


@pytest.mark.filterwarnings("ignore:.*statistics are not finite")
def test_a_sub_batch_that_is_not_finite_is_skipped_alone() -> None:
    divided, looped = pair(LAYERS["average"], 4)
    x = torch.randn(12, 3, 2)
    x[5, 1, 1] = torch.inf
    y = divided(x)
    assert torch.equal(y[:4], looped(x[:4]))
    assert torch.equal(y[8:], looped(x[8:]))
    assert bits(divided) == bits(looped)
    assert divided.skipped_batches.item() == 1


def test_raise_lets_no_sub_batch_of_the_batch_enter() -> None:
    layer = LAYERS["moving"](ghost=4, nonfinite="raise")
    before, x = bits(layer), torch.randn(12, 3, 2)
    x[9] = torch.nan
    with pytest.raises(NonFiniteError, match="nothing of it has entered the memory"):
        layer(x)
    assert bits(layer) == before


def test_a_sub_batch_of_one_is_refused_before_anything_enters() -> None:
    layer = LAYERS["moving"](ghost=2)
    before = bits(layer)
    with pytest.raises(TooFewSamplesError, match="leaves 1 sample a column"):
        layer(torch.randn(3, 3, 2))
    assert bits(layer) == before


def test_a_sub_batch_of_one_is_what_memory_makes_of_it_if_that_is_declared() -> None:
    layer, looped = LAYERS["moving"](ghost=2, degenerate="memory"), LAYERS["moving"](degenerate="memory")
    x = torch.randn(3, 3, 2)
    assert torch.equal(layer(x), loop(looped, x, [2, 1]))
    assert bits(layer) == bits(looped)
    assert layer.num_batches_tracked.item() == 1


def test_an_empty_batch() -> None:
    layer = LAYERS["moving"](ghost=2)
    assert layer(torch.randn(0, 3, 2)).shape == (0, 3, 2)
    assert layer.num_batches_tracked.item() == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_each_sub_batch_enters_once(reentrant: bool) -> None:
    plain = pair(LAYERS["moving"], 4)[0]
    recomputed = copy.deepcopy(plain)
    x, cotangent = torch.randn(10, 3, 2, requires_grad=True), torch.randn(10, 3, 2)
    plain(x).backward(cotangent)
    expected, x.grad = x.grad, None
    checkpoint(recomputed, x, use_reentrant=reentrant).backward(cotangent)
    assert torch.equal(x.grad, expected)
    assert bits(recomputed) == bits(plain)
    assert plain.num_batches_tracked.item() == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_under_compile() -> None:
    eager = pair(LAYERS["average"], 4)[0]
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for rows in (8, 10, 3):
        x = torch.randn(rows, 3, 2)
        check(compiled(x).detach(), eager(x).detach(), COMPILED)
    for name, value in eager.state_dict().items():
        check(traced.state_dict()[name], value, COMPILED)
    assert traced.num_batches_tracked.item() == 6


def test_formula_and_repr() -> None:
    memory = Moving("c", decay=0.75, ghost=16)
    assert eval(repr(memory)) == memory
    assert memory.formula() == "moving = 0.75 * moving + 0.25 * batch, unbiased variance; sub-batches of 16"
    assert Average("c", ghost=3).formula() == "average of all batches, unbiased variance; sub-batches of 3"


@pytest.mark.parametrize("ghost", [1, 0, -4, 2.0, True])
def test_sizes_that_are_none(ghost: int) -> None:
    for declare in (lambda: Moving("c", decay=0.9, ghost=ghost), lambda: Average("c", ghost=ghost)):
        with pytest.raises(ValueError, match=f"^ghost is a number of examples, from 2 on, not {ghost!r}$"):
            declare()


def test_a_batch_that_is_not_normalized_over_cannot_be_divided() -> None:
    with pytest.raises(PatternError) as caught:
        Norm("n c [h]", memory=Moving("c", decay=0.9, ghost=4))
    assert str(caught.value) == (
        "Moving divides the batch, the first axis, which is not normalized over\n  n c [h]\n  ^"
    )
