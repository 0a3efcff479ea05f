"""Batch renormalization against the paper's Algorithm 1, written down from scratch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import RMS, Affine, BatchNorm, Moving, Norm, NormwiseError, Renorm, Standardize
from normwise.memory import limits
from tests.test_memory import bits
from tests.tolerances import COMPILED, DOUBLE, MEMORY, VALUES, check

EPS, RATE = 1e-3, 0.25


class AlgorithmOne:
    """Ioffe's Algorithm 1 for a matrix, but with the variance averaged instead of sigma."""

    def __init__(self, columns: int, r_max: float, d_max: float, *, unbiased: bool = True) -> None:
        self.mean, self.var = torch.zeros(columns).double(), torch.ones(columns).double()
        self.r_max, self.d_max, self.unbiased = r_max, d_max, unbiased

    def correction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        remembered = (self.var + EPS).sqrt()
        r = (x.var(0, unbiased=False) + EPS).sqrt() / remembered
        d = (x.mean(0) - self.mean) / remembered
        return r.clamp(1 / self.r_max, self.r_max), d.clamp(-self.d_max, self.d_max)

    def __call__(self, x: Tensor, *, constant: bool = True) -> Tensor:
        r, d = self.correction(x.detach() if constant else x)
        y = (x - x.mean(0)) / (x.var(0, unbiased=False) + EPS).sqrt() * r + d
        self.mean = self.mean + RATE * (x.mean(0).detach() - self.mean)
        self.var = self.var + RATE * (x.var(0, unbiased=self.unbiased).detach() - self.var)
        return y


def renormalized(r_max: float = 3.0, d_max: float = 5.0, **options: object) -> Norm:
    """Limits open from the first batch on."""
    memory = Moving("c", update_rate=RATE, renorm=Renorm(r_max, d_max, 0, 0, 0), **options)
    return Norm("[n] c", Standardize(EPS), Affine("c"), memory, c=4, dtype=torch.float64)


def drifting(step: int, rows: int = 8) -> Tensor:
    """Batches whose means and spreads leave the memory behind, in some columns further than the limits."""
    spread = torch.tensor([1.0, 0.01, 30.0, 2.0], dtype=torch.float64)
    return torch.randn(rows, 4, dtype=torch.float64) * spread + torch.tensor([0.1, -9.0, 2.0, 40.0]) * (step + 1)


@pytest.mark.parametrize("unbiased", [True, False])
def test_ten_batches_follow_algorithm_one(unbiased: bool) -> None:
    layer, algorithm = renormalized(2.0, 1.5, unbiased=unbiased), AlgorithmOne(4, 2.0, 1.5, unbiased=unbiased)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2.0), layer.bias.normal_()
    hit = torch.zeros(4)  # r's lower and upper limit, d's lower and upper limit
    for step in range(10):
        x = drifting(step).requires_grad_()
        r, d = algorithm.correction(x.detach())
        hit += torch.stack([(r <= 0.5).sum(), (r >= 2.0).sum(), (d <= -1.5).sum(), (d >= 1.5).sum()])
        y, expected = layer(x), algorithm(x) * layer.weight + layer.bias
        check(y, expected, DOUBLE)
        leaves, cotangent = [x, layer.weight, layer.bias], torch.randn_like(y)
        grads = torch.autograd.grad(y, leaves, cotangent)
        for grad, wanted in zip(grads, torch.autograd.grad(expected, leaves, cotangent), strict=True):
            check(grad, wanted, DOUBLE)
        check(layer.running_mean, algorithm.mean, DOUBLE)
        check(layer.running_var, algorithm.var, DOUBLE)
    assert hit.min() > 0
    assert layer.num_batches_tracked.item() == 10


def test_images_are_matrices_of_all_their_pixels() -> None:
    memory = Moving("c", update_rate=RATE, renorm=Renorm(3.0, 5.0, 0, 0, 0))
    layer, algorithm = Norm("[n] c [h w]", Standardize(EPS), memory=memory), AlgorithmOne(3, 3.0, 5.0)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 2) * 2 + 3
        expected = algorithm(x.double().movedim(1, -1).reshape(-1, 3)).reshape(4, 5, 2, 3).movedim(-1, 1)
        check(layer(x), expected.float(), VALUES)


def test_r_and_d_are_constants_to_the_gradient() -> None:
    layer = renormalized(10.0, 10.0)
    layer(drifting(0))
    algorithm = AlgorithmOne(4, 10.0, 10.0)
    algorithm.mean, algorithm.var = layer.running_mean.clone(), layer.running_var.clone()
    x, cotangent = drifting(0).requires_grad_(), torch.randn(8, 4, dtype=torch.float64)
    constant, through = (
        torch.autograd.grad(copy.copy(algorithm)(x, constant=constant), x, cotangent)[0] for constant in (True, False)
    )
    (grad,) = torch.autograd.grad(layer(x), x, cotangent)
    check(grad, constant, DOUBLE)
    assert (grad - through).abs().max() > 1e-2


def test_second_derivatives_hold_r_and_d_constant_as_well() -> None:
    layer, algorithm = renormalized(), AlgorithmOne(4, 3.0, 5.0)
    x, cotangent, direction = drifting(0).requires_grad_(), drifting(1), drifting(2)
    found = []
    for call in (layer, algorithm):
        (first,) = torch.autograd.grad(call(x), x, cotangent, create_graph=True)
        found.append(torch.autograd.grad(first, x, direction)[0])
    assert found[0].abs().max() > 1
    check(found[0], found[1], DOUBLE)


def test_training_equals_evaluation_where_no_limit_is_hit() -> None:
    layer = renormalized(1e6, 1e6)
    for step in range(5):
        x = drifting(step)
        evaluated = copy.deepcopy(layer).eval()(x)
        y = layer(x)
        check(y.detach(), evaluated.detach(), DOUBLE)
    tight = renormalized(1.5, 0.5)
    assert (tight(drifting(0)) - copy.deepcopy(renormalized()).eval()(drifting(0))).abs().max() > 1


PAPER = Renorm()
SCHEDULE = [
    (PAPER, 0, 1.0, 0.0),
    (PAPER, 4_999, 1.0, 0.0),
    (PAPER, 5_000, 1.0, 0.0),
    (PAPER, 15_000, 1 + 2 * 10 / 35, 2.5),
    (PAPER, 25_000, 1 + 2 * 20 / 35, 5.0),  # d is at 5 after 25,000 steps
    (PAPER, 40_000, 3.0, 5.0),  # r is at 3 after 40,000 steps
    (PAPER, 10**9, 3.0, 5.0),
    (Renorm(2.0, 1.0, 0, 0, 0), 0, 2.0, 1.0),
    (Renorm(2.0, 1.0, 3, 0, 4), 2, 1.0, 0.0),
    (Renorm(2.0, 1.0, 3, 0, 4), 3, 2.0, 0.0),
    (Renorm(2.0, 1.0, 3, 0, 4), 5, 2.0, 0.5),
    (Renorm(1.0, 0.0, 0, 0, 0), 9, 1.0, 0.0),
]


@pytest.mark.parametrize(("renorm", "batches", "r_max", "d_max"), SCHEDULE)
def test_the_limits_open_on_schedule(renorm: Renorm, batches: int, r_max: float, d_max: float) -> None:
    opened = limits(renorm, torch.tensor(batches), torch.float64)
    check(torch.stack(opened), torch.tensor([r_max, d_max], dtype=torch.float64), DOUBLE)
    memory = Moving("c", update_rate=RATE, renorm=renorm)
    layer = Norm("[n] c", Standardize(EPS), memory=memory, c=4, dtype=torch.float64)
    layer.num_batches_tracked.fill_(batches)
    x = drifting(3)
    check(layer(x), AlgorithmOne(4, r_max, d_max)(x), DOUBLE)
    assert layer.num_batches_tracked.item() == batches + 1


def test_shut_limits_are_batch_normalization() -> None:
    plain = BatchNorm(4)
    layer = Norm("[n] c", recovery=Affine("c"), memory=Moving("c", update_rate=0.1, renorm=Renorm()), c=4)
    assert list(layer.state_dict()) == list(plain.state_dict())  # so torch's checkpoints load, and ours load there
    for _ in range(5):
        x = torch.randn(8, 4) * 3 + 1
        check(layer(x), plain(x), VALUES)
    for name, value in plain.state_dict().items():
        check(layer.state_dict()[name], value, MEMORY)
    nn.BatchNorm1d(4).load_state_dict(layer.state_dict(), strict=True)


def test_mean_squares_are_corrected_in_scale_only() -> None:
    memory = Moving("c", update_rate=0.5, renorm=Renorm(2.0, 5.0, 0, 0, 0))
    layer = Norm("[n] c", RMS(0.0), memory=memory, c=3, dtype=torch.float64)
    x = torch.randn(8, 3, dtype=torch.float64) * torch.tensor([0.1, 1.2, 9.0]) + 0.5
    root = x.square().mean(0).sqrt()
    check(layer(x), x / root * root.clamp(0.5, 2.0), DOUBLE)


def test_padding_does_not_count() -> None:
    layer, algorithm = renormalized(2.0, 1.5), AlgorithmOne(4, 2.0, 1.5)
    for step in range(4):
        x, valid = drifting(step), torch.arange(8) % 3 != 1
        y = layer(torch.where(valid[:, None], x, torch.nan), valid=valid)
        check(y[valid], algorithm(x[valid]), DOUBLE)
        assert torch.equal(y[~valid], torch.zeros_like(y[~valid]))
    check(layer.running_var, algorithm.var, DOUBLE)


@pytest.mark.parametrize("degenerate", ["raise", "memory"])
def test_a_column_that_a_mask_leaves_one_sample(degenerate: str) -> None:
    """Its value is what evaluation makes of it where that is declared, and 0 otherwise; it does not enter."""
    layer = renormalized(2.0, 1.5, degenerate=degenerate)
    layer(drifting(0))
    before, x = layer.running_mean.clone(), drifting(5)
    valid = torch.ones(8, 4, dtype=torch.bool)
    valid[1:, 3] = False
    evaluated = copy.deepcopy(layer).eval()(x)
    y = layer(x, valid=valid, valid_axes="n c")
    check(y[0, 3], evaluated[0, 3] if degenerate == "memory" else torch.zeros_like(y[0, 3]), DOUBLE)
    assert torch.equal(layer.running_mean == before, torch.tensor([False, False, False, True]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_under_compile() -> None:
    eager = renormalized(2.0, 1.5)
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for step in range(4):
        x, cotangent = drifting(step), torch.randn(8, 4, dtype=torch.float64)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        y, y_compiled = eager(leaves[0]), compiled(leaves[1])
        check(y_compiled.detach(), y.detach(), DOUBLE)
        grads = [torch.autograd.grad(z, leaf, cotangent)[0] for z, leaf in zip((y, y_compiled), leaves, strict=True)]
        check(grads[1], grads[0], DOUBLE)
    for name, value in eager.state_dict().items():
        check(traced.state_dict()[name], value, COMPILED)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd], ids=["jacrev", "jacfwd"])
def test_a_jacobian_holds_r_and_d_constant_and_moves_the_memory_once(transform: Callable) -> None:
    layer, algorithm, x = renormalized(2.0, 1.5), AlgorithmOne(4, 2.0, 1.5), drifting(1)
    found = transform(layer)(x).detach()
    check(found, torch.autograd.functional.jacobian(algorithm, x), DOUBLE)
    assert layer.num_batches_tracked.item() == 1


def test_mapping_over_it_is_refused_and_moves_nothing() -> None:
    layer = renormalized()
    before = bits(layer)
    with pytest.raises(NormwiseError) as caught:
        torch.func.vmap(layer)(torch.randn(5, 8, 4))
    assert str(caught.value) == (
        "Norm: in a loop each example would read the memory after the one before has entered it, which a mapped call "
        "cannot: use a loop, or evaluation mode"
    )
    assert bits(layer) == before


def test_held_and_frozen() -> None:
    layer = renormalized()
    layer(drifting(0))
    before, x = bits(layer), drifting(1)
    trained = copy.deepcopy(layer)(x)
    with nw.no_update(layer):
        assert torch.equal(layer(x), trained)
    with nw.freeze(layer):
        assert torch.equal(layer(x), copy.deepcopy(layer).eval()(x))
    assert bits(layer) == before


def test_formula_and_repr() -> None:
    memory = Moving("c", decay=0.75, renorm=Renorm(2.0, warmup=7))
    assert eval(repr(memory)) == memory
    assert memory.formula() == (
        "moving = 0.75 * moving + 0.25 * batch, unbiased variance; corrected, r <= 2.0, d <= 5.0"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_max": 0.5}, "r_max is a finite number from 1 on, not 0.5"),
        ({"r_max": float("inf")}, "r_max is a finite number from 1 on, not inf"),
        ({"d_max": -1.0}, "d_max is a finite number from 0 on, not -1.0"),
        ({"d_max": float("nan")}, "d_max is a finite number from 0 on, not nan"),
        ({"warmup": -1}, "warmup is a number of batches, from 0 on, not -1"),
        ({"r_ramp": -1}, "r_ramp is a number of batches, from 0 on, not -1"),
        ({"d_ramp": -1}, "d_ramp is a number of batches, from 0 on, not -1"),
    ],
)
def test_limits_that_are_none(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Renorm(**options)
