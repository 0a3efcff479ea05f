"""Inputs that have broken normalizations: every layer against float64, forward and backward, and torch's beside it.

A test named `test_torch_...` shows that the bound bites: torch's own layer exceeds it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from tests.catalogue import FAMILIES, LAYOUTS, Family
from tests.hard_inputs import (
    LEVELS,
    LONG,
    MAGNITUDES,
    WIDTHS,
    Make,
    at_either_end,
    every_constant,
    every_level,
    every_magnitude,
    every_precision,
    far_away_in,
    outlier,
)
from tests.tolerances import COMPILED, DOUBLE, ROUNDINGS, SUMMED, VALUES, check
from tests.truth import EVERY, TORCH, errors, is_exact, is_right, is_right_beside_an_outlier, truth

BATCH_NORM = FAMILIES[0]
every_family = pytest.mark.parametrize("family", EVERY, ids=str)
every_centering_family = pytest.mark.parametrize("family", [f for f in EVERY if f.centers], ids=str)


def wrong_in_torch(name: str, matrix: Tensor) -> bool:
    """Whether torch's layer is beyond the bound that ours is held to; ours is not."""
    ours = next(family for family in FAMILIES if family.name == name)
    assert is_right(errors(ours, matrix))
    return not is_right(errors(TORCH[name], matrix))


@every_level
@every_family
def test_large_means_keep_their_digits(family: Family, make: Make) -> None:
    assert is_exact(errors(family, make()))


@every_level
@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.centers])
def test_torch_loses_the_digits_of_large_means(name: str, make: Make) -> None:
    assert wrong_in_torch(name, make())


def _remembered(layer: nn.Module, x: Tensor) -> tuple[float, float]:
    """The relative errors of mean and variance after one batch at momentum 1, in roundings."""
    layer(x)
    wide = x.double()
    pairs = ((layer.running_mean, wide.mean(0)), (layer.running_var, wide.var(0)))
    mean, var = (float(((found - true) / true).abs().max()) * 2**24 for found, true in pairs)
    return mean, var


@every_level
def test_remembered_statistics_of_large_means(make: Make) -> None:
    x = make()
    mean, var = _remembered(nw.BatchNorm(x.shape[1], momentum=1.0), x)
    assert mean <= 2  # one ulp
    assert var <= ROUNDINGS


@pytest.mark.parametrize("name", [name for name in LEVELS if name != "five at 2000"])
def test_torch_remembers_another_variance(name: str) -> None:
    x = LEVELS[name]()
    assert _remembered(nn.BatchNorm1d(x.shape[1], momentum=1.0), x)[1] > ROUNDINGS


@every_level
def test_evaluation_far_from_zero(make: Make) -> None:
    x = make()
    layer = nw.BatchNorm(x.shape[1], momentum=1.0)
    layer(x)
    layer.eval()
    mean, var = layer.running_mean.double(), layer.running_var.double()
    expected = (x.double() - mean) / (var + 1e-5).sqrt()
    assert (layer(x) - expected).abs().max() <= ROUNDINGS * 2**-24 * expected.abs().max()


@every_precision
@every_family
def test_large_means_in_every_precision(family: Family, dtype: torch.dtype) -> None:
    assert is_right(errors(family, far_away_in(dtype)))


@every_magnitude
@every_family
def test_any_magnitude_is_right_and_finite(family: Family, make: Make) -> None:
    assert is_exact(errors(family, make()))


@pytest.mark.parametrize("make", [make for name, make in MAGNITUDES.items() if name != "up to 1e+18"])
@pytest.mark.parametrize("name", TORCH)
def test_torch_fails_at_large_magnitudes(name: str, make: Make) -> None:
    assert wrong_in_torch(name, make())


@pytest.mark.parametrize("magnitude", [1e14, 1e16, 1e17, 9e17, 1.1e18])
@every_family
def test_a_sum_of_many_squares_stays_finite(family: Family, magnitude: float) -> None:
    signs = torch.randn(4096, 4).sign()
    assert is_right(errors(family, signs * magnitude))


@pytest.mark.parametrize("magnitude", [1e-4, 1e-10, 1e-20, 1e-30, 1e-38, 1e-42])
@pytest.mark.parametrize("eps", [None, 1e-6, 1e-12])
@every_family
def test_eps_keeps_its_meaning_next_to_tiny_variances(family: Family, magnitude: float, eps: float | None) -> None:
    assert is_right(errors(family, torch.randn(64, 4) * magnitude, eps=eps))


@every_constant
@every_centering_family
def test_a_constant_column_is_exactly_zero(family: Family, value: float) -> None:
    y = family.run(torch.full((48, 6), value))
    assert y.shape == (48, 6)
    assert not y.any()


@every_constant
@every_family
def test_the_slope_of_a_constant_column_is_that_of_eps(family: Family, value: float) -> None:
    assert is_right(errors(family, torch.full((48, 6), value)))


@pytest.mark.parametrize("value", [1e3 / 3, 1e7 / 3, 1e10 / 3, 3e37])
@pytest.mark.parametrize("name", ["BatchNorm", "BatchNorm of images", "InstanceNorm"])
def test_torch_makes_something_of_a_constant_column(name: str, value: float) -> None:
    y = TORCH[name].run(torch.full((48, 6), value))
    assert not y.abs().max() <= 1e-3


@pytest.mark.parametrize("value", [1e-12, 1e3, 1e19, 3e37])
def test_a_constant_row_has_root_mean_square_one(value: float) -> None:
    y = nw.RMSNorm(48, eps=0.0)(torch.full((2, 48), value))
    check(y.detach(), torch.ones(2, 48), VALUES)


@at_either_end
@pytest.mark.parametrize("rows", [64, 4096, 200003])
@every_family
def test_one_outlier(family: Family, rows: int, place: str) -> None:
    assert is_right_beside_an_outlier(errors(family, outlier(rows, place)), rows)


@pytest.mark.parametrize("name", ["BatchNorm", "BatchNorm of images"])
def test_torch_is_wrong_beside_one_outlier(name: str) -> None:
    assert wrong_in_torch(name, outlier(4096))


@pytest.mark.parametrize("rows", WIDTHS)
@every_family
def test_any_length_of_a_column(family: Family, rows: int) -> None:
    assert is_right(errors(family, torch.randn(rows, 2) + 3))


@pytest.mark.parametrize("rows", LONG)
@pytest.mark.parametrize("columns", [1, 3])
def test_long_batches(rows: int, columns: int) -> None:
    assert is_right(errors(BATCH_NORM, torch.randn(rows, columns) * 2 - 5))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in ("LayerNorm", "LayerNorm2d")], ids=str)
def test_layer_norm_of_width_one_is_zero(family: Family) -> None:
    x = torch.randn(1, 6, requires_grad=True)
    y = family.run(x)
    (grad,) = torch.autograd.grad(y, x, torch.randn(1, 6))
    assert not y.any()
    assert not grad.any()


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.centers], ids=str)
def test_rms_norm_of_width_one(family: Family) -> None:
    assert is_right(errors(family, torch.randn(1, 6)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [300.0, 7600.0, 60000.0])
@every_family
def test_half_precision_rows_that_overflow_when_squared(family: Family, magnitude: float, dtype: torch.dtype) -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(64).unsqueeze(1).repeat(1, 4)
    x = (signs * magnitude).to(dtype)
    y = family.run(x)
    assert y.dtype == dtype
    assert torch.equal(y.float(), signs)
    assert is_right(errors(family, x))


@every_family
def test_float16_zeros_with_an_eps_below_float16(family: Family) -> None:
    x = torch.zeros(16, 4, dtype=torch.float16, requires_grad=True)
    y = family.run(x, eps=1e-12)
    assert not y.any()
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0**-10).cumsum(0))
    assert grad.isfinite().all()
    assert grad.any()


@pytest.mark.parametrize("name", ["BatchNorm", "BatchNorm of images", "InstanceNorm"])
def test_torch_makes_nan_of_float16_zeros_with_an_eps_below_float16(name: str) -> None:
    x = torch.zeros(16, 4, dtype=torch.float16)
    assert TORCH[name].run(x, eps=1e-12, dtype=torch.float16).isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 9)], ids=str)
def test_torch_counts_a_batch_of_nothing(shape: tuple[int, ...]) -> None:
    ours, twin = nw.BatchNorm(5), nn.BatchNorm1d(5)
    ours(torch.randn(shape)), twin(torch.randn(shape))
    assert (int(ours.num_batches_tracked), int(twin.num_batches_tracked)) == (0, 1)


@every_precision
@every_family
def test_half_and_single_precision_err_by_their_own_rounding_only(family: Family, dtype: torch.dtype) -> None:
    assert is_right(errors(family, (torch.randn(257, 6) * 3 + 7).to(dtype)))


@pytest.mark.parametrize("layout", LAYOUTS)
@every_precision
@every_family
def test_hard_inputs_in_every_layout(family: Family, dtype: torch.dtype, layout: str) -> None:
    x = (torch.randn(64, 6) + torch.tensor([0, 1e4, -3e4, 0, 0, 0])) * torch.tensor([1, 1, 1, 1e-3, 1, 1])
    x[:, 5] = 333.3
    assert is_right(errors(family, x.to(dtype), relay=LAYOUTS[layout]))


@pytest.mark.parametrize(
    ("power", "mean"),
    [(0, 2.0**40), (0, -(2.0**48)), (500, 0.0), (1010, 0.0), (400, 2.0**440), (-40, 1.0), (-300, 0.0)],
)
@every_family
def test_float64_keeps_the_same_promises(family: Family, power: int, mean: float) -> None:
    whole = torch.randint(-8, 9, (64, 4)).double()  # so that x is exact, and its truth that of small whole numbers
    if not family.centers:
        mean = 0.0
    x = (whole * 2.0**power + mean).requires_grad_()
    dy = torch.randn(64, 4, dtype=torch.float64)
    y = family.run(x, eps=1e-5)
    (dx,) = torch.autograd.grad(y, x, dy)
    true = truth(whole, dy, (0,), 1e-5 * 4.0**-power if power < 512 else 0.0, centers=family.centers)
    check(y.detach(), true.y, DOUBLE)
    check(dx * 2.0**power / true.slope, true.dx / true.slope, DOUBLE)


@pytest.mark.parametrize(
    ("layer", "shape", "dims"),
    [
        (nw.BatchNorm(8), (65536, 8), (0,)),
        (nw.LayerNorm(8), (65536, 8), (1,)),
        (nw.RMSNorm(8), (65536, 8), (1,)),
        (nw.GroupNorm(1, 8), (65536, 8), (1,)),
        (nw.LayerNorm2d(8), (16, 8, 64, 64), (1,)),
        (nw.InstanceNorm(8, affine=True), (16, 8, 64, 64), (2, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_parameter_gradients_of_bfloat16_are_summed_in_float32(
    layer: nn.Module, shape: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    x, cotangent = torch.randn(shape).bfloat16() + 3, torch.randn(shape).bfloat16()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = dict(zip(names, torch.autograd.grad(layer(x), parameters, cotangent), strict=True))
    wide = x.double()
    if not isinstance(layer, nw.RMSNorm):
        wide = wide - wide.mean(dims, keepdim=True)
    eps = torch.finfo(torch.bfloat16).eps if layer.eps is None else layer.eps
    y = wide / (wide.square().mean(dims, keepdim=True) + eps).sqrt()
    summed = [dim for dim in range(x.dim()) if dim != (x.dim() - 1 if dims == (1,) and x.dim() == 2 else 1)]
    for name, factor in (("weight", y), ("bias", torch.ones_like(y))):
        terms = factor * cotangent.double()
        if name in grads:
            error = (grads[name] - terms.sum(summed)).abs()
            assert (error <= SUMMED.relative * terms.abs().sum(summed)).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
def test_large_means_under_a_compiler() -> None:
    x = torch.stack([torch.randn(64, 32) + mean for mean in (1e4, 1e6)])
    families = [family for family in EVERY if family.centers]
    layers = [family.layer(64, 32) for family in families]

    def run(x: Tensor) -> Tensor:
        return torch.stack([f.matrix(layer(f.fill(x))) for f, layer in zip(families, layers, strict=True)])

    compiled = torch.compile(run, fullgraph=True)
    for matrix in x:
        for y, family in zip(compiled(matrix), families, strict=True):
            assert (y.double() - family.formula(matrix)).abs().max() <= COMPILED.absolute
