"""The definition, and through it every layer, against the formula in float64 on inputs that have broken others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import normwise as nw
from normwise import RMS, Affine, Scale, Standardize
from normwise.kernels.reference import Recalled, Steps, four_steps, placed
from normwise.pattern import parse
from normwise.plan import make_plan
from tests.catalogue import CENTERING, FAMILIES, Family
from tests.hard_inputs import CONSTANTS, LEVELS, MAGNITUDES, WIDTHS
from tests.tolerances import DOUBLE, EXACT, GRADIENTS, OUTLIER, SUMMED, VALUES, Tolerance, check

every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
every_centering_family = pytest.mark.parametrize("family", CENTERING, ids=str)


def exact(family: Family, matrix: Tensor, tolerance: Tolerance = EXACT) -> None:
    y = family.run(matrix).detach()
    assert y.isfinite().all()
    check(y.double(), family.formula(matrix), tolerance)


@pytest.mark.parametrize("make", LEVELS.values(), ids=LEVELS)
@every_family
def test_large_means_keep_their_digits(family: Family, make: Callable[[], Tensor]) -> None:
    exact(family, make())


@pytest.mark.parametrize("make", MAGNITUDES.values(), ids=MAGNITUDES)
@every_family
def test_any_magnitude_is_right_and_finite(family: Family, make: Callable[[], Tensor]) -> None:
    exact(family, make())


@pytest.mark.parametrize("value", CONSTANTS)
@every_centering_family
def test_a_constant_column_is_exactly_zero(family: Family, value: float) -> None:
    y = family.run(torch.full((48, 6), value))
    assert y.shape == (48, 6)
    assert not y.any()


@pytest.mark.parametrize("value", [1e-12, 1e3, 1e19, 3e37])
def test_a_constant_row_has_root_mean_square_one(value: float) -> None:
    y = nw.RMSNorm(48, eps=0.0)(torch.full((2, 48), value))
    check(y.detach(), torch.ones(2, 48), VALUES)


@pytest.mark.parametrize("rows", [64, 4096, 200003])
@every_family
def test_one_outlier(family: Family, rows: int) -> None:
    x = torch.randn(rows, 4)
    x[0] = 1e6
    exact(family, x, OUTLIER)


@pytest.mark.parametrize("rows", WIDTHS)
@every_family
def test_any_length_of_a_column(family: Family, rows: int) -> None:
    exact(family, torch.randn(rows, 2) + 3, Tolerance(EXACT.absolute, 5e-7, "values reach 5"))


@pytest.mark.parametrize("rows", [65535, 65536, 131071, 140000])
@pytest.mark.parametrize("columns", [1, 3])
def test_long_batches(rows: int, columns: int) -> None:
    exact(FAMILIES[0], torch.randn(rows, columns) * 2 - 5, Tolerance(EXACT.absolute, 5e-7, "values reach 5"))


def test_layer_norm_of_width_one_is_zero() -> None:
    x = torch.randn(5, 1, requires_grad=True)
    y = nw.LayerNorm(1, elementwise_affine=False)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not y.any()
    assert not grad.any()


@pytest.mark.parametrize("magnitude", [300.0, 7600.0, 60000.0])
@every_family
def test_float16_rows_that_overflow_when_squared(family: Family, magnitude: float) -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(64).unsqueeze(1).repeat(1, 4)
    y = family.run((signs * magnitude).half())
    assert y.dtype == torch.float16
    assert torch.equal(y.float(), signs)


@every_family
def test_float16_zeros_with_an_eps_below_float16(family: Family) -> None:
    x = torch.zeros(16, 4, dtype=torch.float16, requires_grad=True)
    y = family.run(x, eps=1e-12)
    assert not y.any()
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not grad.isnan().any()


@every_family
def test_eps_keeps_its_meaning_next_to_tiny_variances(family: Family) -> None:
    x = torch.randn(64, 4) * 1e-4
    check(family.run(x, eps=1e-6).detach().double(), family.formula(x, eps=1e-6), EXACT)
    x = torch.randn(64, 4) * 1e-25
    check(family.run(x, eps=1e-6).detach().double(), family.formula(x, eps=1e-6), EXACT)


@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
@every_family
def test_gradients_at_large_means(family: Family, mean: float) -> None:
    if not family.centers:
        mean = min(mean, 10.0)  # without centring, the gradient at a large mean is of size 1 / mean
    matrix = torch.randn(64, 4) + mean
    cotangent = torch.randn(64, 4)
    x = matrix.clone().requires_grad_()
    (ours,) = torch.autograd.grad(family.run(x), x, cotangent)
    wide = matrix.double().requires_grad_()
    default = 1e-5 if family.centers else torch.finfo(torch.float32).eps
    centered = wide - wide.mean(0) if family.centers else wide
    formula = centered / (centered.square().mean(0) + default).sqrt()
    (expected,) = torch.autograd.grad(formula, wide, cotangent.double())
    check(ours.double(), expected, GRADIENTS)


@pytest.mark.parametrize("make", MAGNITUDES.values(), ids=MAGNITUDES)
@every_family
def test_gradients_at_any_magnitude_are_finite(family: Family, make: Callable[[], Tensor]) -> None:
    x = make().requires_grad_()
    y = family.run(x)
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "reduced"), [(lambda: nw.BatchNorm(8), 0), (lambda: nw.LayerNorm(8), 1), (lambda: nw.RMSNorm(8), 1)]
)
def test_parameter_gradients_of_bfloat16_are_summed_in_float32(make: type, reduced: int) -> None:
    x, cotangent = (torch.randn(65536, 8).bfloat16() for _ in range(2))
    layer = make()
    (grad,) = torch.autograd.grad(layer(x), layer.weight, cotangent)
    wide = x.double()
    if not isinstance(layer, nw.RMSNorm):
        wide = wide - wide.mean(reduced, keepdim=True)
    eps = layer.eps if layer.eps is not None else torch.finfo(torch.bfloat16).eps
    normalized = wide / (wide.square().mean(reduced, keepdim=True) + eps).sqrt()
    expected = (normalized * cotangent.double()).sum(0)
    assert (grad - expected).abs().max() <= SUMMED.relative * (normalized * cotangent.double()).abs().sum(0).max()


@pytest.mark.parametrize("rows", [2, 255, 256, 257, 4096])
@pytest.mark.parametrize("make", [nw.LayerNorm, nw.RMSNorm])
def test_a_row_does_not_depend_on_how_many_there_are(make: type, rows: int) -> None:
    layer = make(768)
    x = torch.randn(rows, 768) + 3
    assert torch.equal(layer(x)[0], layer(x[:1])[0])


def test_a_long_row_does_not_depend_on_how_many_there_are_with_two_threads() -> None:
    layer = nw.LayerNorm(65537)
    x = torch.randn(2, 65537) + 3
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(layer(x)[0], layer(x[:1])[0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(300, 64), (8, 64, 9, 9)], ids=str)
def test_a_column_does_not_depend_on_how_many_there_are(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) + 3
    alone = nw.BatchNorm(1)(x[:, :1])[:, 0]
    for columns in (2, 3, 16, 17, 64):
        assert torch.equal(nw.BatchNorm(columns)(x[:, :columns])[:, 0], alone)


@every_family
def test_two_runs_agree_bit_for_bit(family: Family) -> None:
    x = torch.randn(513, 6) + 100
    assert torch.equal(family.run(x), family.run(x.clone()))


def test_four_steps_alone() -> None:
    plan = make_plan(parse("n (g [k]) [...]"), (2, 6, 5), (("g", 3),))
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    weight, bias = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    recovery = Affine("(g k)")
    parameters = placed(recovery, (weight, bias), (("g", "k"),), plan, x)
    y, moments, *_ = four_steps(x, Steps(plan, Standardize(), recovery), parameters)
    check(y, torch.nn.functional.group_norm(x, 3, weight, bias), DOUBLE)
    assert moments is not None
    assert moments.count == 10
    check(moments.mean.flatten(), x.reshape(6, 10).mean(1), DOUBLE)
    check(moments.variance().flatten(), x.reshape(6, 10).var(1, unbiased=False), DOUBLE)


def test_four_steps_with_remembered_statistics_measures_nothing() -> None:
    plan = make_plan(parse("[n] c"), (4, 3))
    x, mean, var = torch.randn(4, 3), torch.randn(1, 3), torch.rand(1, 3) + 0.5
    y, moments, *_ = four_steps(x, Steps(plan, Standardize(), recalled=Recalled((mean, var))))
    check(y, torch.nn.functional.batch_norm(x, mean[0], var[0]), VALUES)
    assert moments is None
    y, moments, *_ = four_steps(x, Steps(plan, RMS(0.5), Scale("c"), recalled=Recalled((var,))), (mean,))
    check(y, mean * x / (var + 0.5).sqrt(), VALUES)
    assert moments is None


def test_four_steps_of_nothing() -> None:
    plan = make_plan(parse("[n] c"), (0, 3))
    y, moments, *_ = four_steps(torch.randn(0, 3), Steps(plan, Standardize(), Affine("c")), (torch.ones(1, 3), 0.0))
    assert y.shape == (0, 3)
    assert moments is None
