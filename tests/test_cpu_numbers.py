"""Inputs that have broken normalizations, through every compiled kernel on every instruction set that is here.

What the columns are made of is in hard_inputs.py; a family lays them out for one engine of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from normwise import L2, RMS, Affine, Norm, Standardize
from tests.catalogue import Family
from tests.compiled import INSTRUCTION_SETS, instruction_set, needs_kernels, only_compiled
from tests.hard_inputs import (
    EXTREMES,
    Make,
    at_either_end,
    every_constant,
    every_level,
    every_magnitude,
    every_precision,
    far_away_in,
    outlier,
)
from tests.tolerances import ROUNDINGS, SUMMED
from tests.truth import errors, is_exact, is_right, is_right_beside_an_outlier, truth

pytestmark = needs_kernels


def _standardize(text: str) -> Callable[..., Norm]:
    return lambda rows, columns, **o: Norm(text, Standardize(**o))


def _runs(m: Tensor) -> Tensor:
    """Runs of a quarter of a column, where that can be."""
    parts = 4 if m.shape[0] % 4 == 0 else 1
    return m.reshape(parts, -1, m.shape[1]).transpose(1, 2)


def _groups(m: Tensor) -> Tensor:
    """(1, h, g, k) of a matrix (h k) x g."""
    k = 4 if m.shape[0] % 4 == 0 else 1
    return m.reshape(1, -1, k, m.shape[1]).transpose(2, 3)


def _sums_of_squares(text: str) -> Callable[..., Norm]:
    return lambda rows, columns, **o: Norm(text, RMS(**o))


def _columns(y: Tensor) -> Tensor:
    """The inverse of `_runs`."""
    return y.transpose(1, 2).reshape(-1, y.shape[1])


def _ungrouped(y: Tensor) -> Tensor:
    """The inverse of `_groups`."""
    return y.transpose(2, 3).reshape(-1, y.shape[2])


def _same(m: Tensor) -> Tensor:
    return m


# contiguous, so that the pattern says which kernel it is
KR = Family("KR", _standardize("n [d]"), lambda m: m.T.contiguous(), lambda y: y.T)
RK = Family("RK", _standardize("[n] c"), Tensor.contiguous, _same)
RKR = Family("RKR", _standardize("[n] c [l]"), lambda m: _runs(m).contiguous(), _columns)
KRK = Family("KRK", _standardize("n [c] l"), lambda m: m[None].contiguous(), lambda y: y[0])
KRKR = Family("KRKR", _standardize("n [h] g [k]"), lambda m: _groups(m).contiguous(), _ungrouped)
RMS_OF_RUNS = Family("RMS of KR", _sums_of_squares("n [d]"), lambda m: m.T.contiguous(), lambda y: y.T, centers=False)
RMS_OF_LANES = Family("RMS of KRK", _sums_of_squares("n [c] l"), lambda m: m[None].contiguous(), lambda y: y[0], False)
CENTERING = (KR, RK, RKR, KRK, KRKR)
EVERY = (*CENTERING, RMS_OF_RUNS, RMS_OF_LANES)
every_family = pytest.mark.parametrize("family", EVERY, ids=str)
every_centering_family = pytest.mark.parametrize("family", CENTERING, ids=str)


@pytest.fixture(autouse=True, params=INSTRUCTION_SETS)
def _compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    with instruction_set(request.param), only_compiled():
        yield


@every_level
@every_family
def test_large_means(family: Family, make: Make) -> None:
    assert is_exact(errors(family, make()))


@every_magnitude
@every_family
def test_any_magnitude(family: Family, make: Make) -> None:
    assert is_exact(errors(family, make()))


@pytest.mark.parametrize("magnitude", [1e13, 1e14, 1e17, 1e19])
@every_family
def test_sums_of_many_squares(family: Family, magnitude: float) -> None:
    assert is_right(errors(family, torch.randn(4096, 4).sign() * magnitude))


@pytest.mark.parametrize("magnitude", [1e-4, 1e-14, 1e-15, 1e-30, 1e-38, 1e-42])
@pytest.mark.parametrize("eps", [1e-5, 1e-12, 1e-24])
@every_family
def test_eps_next_to_tiny_variances(family: Family, magnitude: float, eps: float) -> None:
    assert is_right(errors(family, torch.randn(256, 4) * magnitude, eps=eps))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-15, 1.0, 1e15, 1e30])
@every_family
def test_without_eps(family: Family, magnitude: float) -> None:
    assert is_right(errors(family, torch.randn(256, 4) * magnitude, eps=0.0))


@every_constant
@pytest.mark.parametrize("rows", [2, 48, 129, 1026])
@every_centering_family
def test_constant_columns_are_exactly_zero(family: Family, rows: int, value: float) -> None:
    x = torch.full((rows, 6), value)
    assert not family.run(x).any()
    assert is_right(errors(family, x))


@at_either_end
@pytest.mark.parametrize("rows", [64, 4096, 40003])
@every_family
def test_one_outlier(family: Family, rows: int, place: str) -> None:
    assert is_right_beside_an_outlier(errors(family, outlier(rows, place)), rows)


@every_precision
@every_family
def test_large_means_in_every_precision(family: Family, dtype: torch.dtype) -> None:
    assert is_right(errors(family, far_away_in(dtype)))


@pytest.mark.parametrize("level", [300.0, 7600.0, 60000.0])
@every_family
def test_half_precision_near_its_limit(family: Family, level: float) -> None:
    x = (torch.randn(1024, 4).sign() * level).half()
    assert is_right(errors(family, x))
    assert family.run(x).isfinite().all()


def test_zeros_in_half_precision() -> None:
    zeros = torch.zeros(3, 200, dtype=torch.float16)
    for normalizer in (Standardize(1e-12), RMS(1e-12), L2(), L2(0.0), RMS(0.0), Standardize(0.0)):
        for text in ("n [d]", "[n] d"):
            y = Norm(text, normalizer)(zeros)
            assert y.isfinite().all()
            assert not y.any()


PARAMETERS = (
    ("n [d]", "d", KR.fill),
    ("n [d]", "n", KR.fill),
    ("[n] c", "c", RK.fill),
    ("[n] c", "n", RK.fill),
    ("[n] c [l]", "c", RKR.fill),
    ("[n] c [l]", "l", RKR.fill),
    ("[n] c [l]", "n", RKR.fill),
    ("n [c] l", "c", KRK.fill),
    ("n [h] g [k]", "g k", KRKR.fill),
)


@pytest.mark.parametrize("make", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize(("text", "over", "fill"), PARAMETERS)
def test_gradients_of_parameters(text: str, over: str, fill: Callable[[Tensor], Tensor], make: Make) -> None:
    x = fill(make())
    dy = torch.randn(x.shape)
    layer = Norm(text, Standardize(0.0), Affine(over))
    y = layer(x)
    found = torch.autograd.grad(y, [layer.weight, layer.bias], dy)
    reduced = tuple(dim for dim, name in enumerate(text.split()) if "[" in name)
    others = tuple(dim for dim, name in enumerate(text.split()) if name.strip("[]") not in over.split())
    products = dy.double() * truth(x, dy, reduced, 0.0).y
    for gradient, terms in zip(found, (products, dy.double()), strict=True):
        bound = ROUNDINGS * 2**-24 * terms.abs().sum(others)
        assert ((gradient - terms.sum(others)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("text", "over"), [("n [d]", "d"), ("[n] d", "d"), ("d [n]", "d")])
def test_a_weights_gradient_over_65536_rows(text: str, over: str, dtype: torch.dtype) -> None:
    x = torch.randn(65536, 16).to(dtype)
    x = x.T.contiguous() if text.startswith("d") else x
    dy = (torch.rand(x.shape) + 0.5).to(dtype)
    layer = Norm(text, RMS(0.0), Affine(over))
    _, d_bias = torch.autograd.grad(layer(x), [layer.weight, layer.bias], dy)
    expected = dy.double().sum(1 if text.startswith("d") else 0)
    assert ((d_bias - expected).abs() <= SUMMED.relative * expected).all()


@pytest.mark.parametrize("filler", [torch.nan, torch.inf, -3e38, 1e30])
@every_family
def test_a_column_that_is_not_finite_does_not_touch_the_others(family: Family, filler: float) -> None:
    x = torch.randn(160, 6) + 3
    alone = family.run(x)[:, :4].clone()
    x[7, 4:] = filler
    assert torch.equal(family.run(x)[:, :4], alone)
