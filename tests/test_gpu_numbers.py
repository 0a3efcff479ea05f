"""Inputs that have broken normalizations, through the kernels in Triton: columns that are held, and divided ones.

Triton's interpreter runs them where there is no GPU. What the columns are made of is in hard_inputs.py; columns of all
magnitudes lie side by side in one call, so that what one needs must not harm another.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import normwise as nw
from normwise import L2, RMS, Affine, Norm, Standardize
from normwise.kernels.launch import LIMITS, Limits
from tests.catalogue import Family
from tests.hard_inputs import (
    CONSTANTS,
    LEVELS,
    MAGNITUDES,
    at_either_end,
    denormal,
    every_precision,
    far_away_in,
    few,
    outlier,
    tight,
)
from tests.interpreted import interpreted, needs_interpreter
from tests.test_cpu_numbers import KR, KRKR, PARAMETERS, RK, RMS_OF_RUNS
from tests.tolerances import ROUNDINGS, SUMMED
from tests.truth import errors, is_exact, is_right, is_right_beside_an_outlier, truth

# Four columns side by side. Of 512 samples each of two parts has two tiles.
HELD = Limits(held=2**16, held_back=2**16, beside=4, least=2**11)
DIVIDED = Limits(held=8, held_back=8, divided=2**9, beside=4, least=2**11, parts=3)
# For 65,536 samples or columns, in some 30 programs.
MANY_HELD = HELD._replace(least=2**13)
LONG = Limits(held=8, held_back=8, divided=2**13, beside=4, least=4, parts=8)
SAMPLES = 512
CENTERING = (RK, KRKR)  # along r, and along both r and s
every_family = pytest.mark.parametrize("family", [KR, RK, RMS_OF_RUNS], ids=str)
every_centering_family = pytest.mark.parametrize("family", CENTERING, ids=str)
every_way = pytest.mark.parametrize("limits", [HELD, DIVIDED], ids=["held", "divided"])

pytestmark = [needs_interpreter, pytest.mark.no_cover]  # the interpreter takes twice as long when it is watched


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Layouts follow from a test's `limits`."""
    parameters = getattr(request.node, "callspec", None)
    with interpreted(LIMITS if parameters is None else parameters.params.get("limits", LIMITS)):
        yield


def _beside(*matrices: Tensor) -> Tensor:
    """Two columns of each matrix, and the same number of samples, side by side."""
    return torch.cat([matrix[:SAMPLES, -2:] for matrix in matrices], 1)


def _halves(low: float, high: float) -> Tensor:
    """Columns of two constants, one above the other, so that parts of them are constant."""
    return torch.tensor([low, high]).repeat_interleave(SAMPLES // 2)[:, None].repeat(1, 2)


@every_way
@every_family
def test_large_means(family: Family, limits: Limits) -> None:
    assert is_exact(errors(family, _beside(*(LEVELS[level]() for level in ("mean 1e4", "mean 1e6", "mean -1e6")))))
    assert is_exact(errors(family, tight()))
    assert is_exact(errors(family, few()))


@every_way
@every_family
def test_any_magnitude(family: Family, limits: Limits) -> None:
    assert is_exact(errors(family, _beside(*(make() for make in MAGNITUDES.values()))))


@every_way
@pytest.mark.parametrize("eps", [1e-5, 1e-24])
@every_family
def test_eps_next_to_tiny_variances(family: Family, eps: float, limits: Limits) -> None:
    magnitudes = torch.tensor([1e-4, 1e-14, 1e-15, 1e-30, 1e-38, 1e-42])
    assert is_right(errors(family, torch.randn(SAMPLES, 6) * magnitudes, eps=eps))


@every_way
@every_family
def test_without_eps(family: Family, limits: Limits) -> None:
    magnitudes = torch.tensor([1e-30, 1e-25, 1e-15, 1.0, 1e15, 1e30])
    assert is_right(errors(family, torch.randn(SAMPLES, 6) * magnitudes, eps=0.0))


@every_way
@pytest.mark.parametrize("rows", [600])
@every_centering_family
def test_constant_columns_are_exactly_zero(family: Family, rows: int, limits: Limits) -> None:
    x = torch.tensor([*CONSTANTS, 1e7]).repeat(rows, 1)
    assert not family.run(x).any()
    assert is_right(errors(family, x))


@pytest.mark.parametrize("limits", [DIVIDED], ids=["divided"])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@every_family
def test_parts_that_are_constant_but_differ(family: Family, eps: float, limits: Limits) -> None:
    levels = ((-1e25, 1e25), (-3e38, 3e38), (0.0, 1e18), (0.5, -0.5), (0.0, 1e-25), (10000.0, 10000.001))
    assert is_exact(errors(family, torch.cat([_halves(*level) for level in levels], 1), eps=eps))


@at_either_end
@pytest.mark.parametrize(("limits", "rows"), [(HELD, 64), (DIVIDED, 600)], ids=["held", "divided"])
@every_family
def test_one_outlier(family: Family, rows: int, place: str, limits: Limits) -> None:
    assert is_right_beside_an_outlier(errors(family, outlier(rows, place)), rows)


@every_way
@every_centering_family
def test_a_last_part_of_one_sample_far_away(family: Family, limits: Limits) -> None:
    x = torch.randn(513, 2) - 1e6
    x[-1] = 0
    assert is_right_beside_an_outlier(errors(family, x), len(x))


@every_way
@pytest.mark.parametrize("text", ["n [d]", "[d] n", "m [d] n"])
def test_an_outlier_that_alone_counts_in_its_tile(text: str, limits: Limits) -> None:
    samples = torch.randn(512)
    samples[127] = 1e6
    valid = torch.arange(512) >= 127
    shape = {"n [d]": (1, -1), "[d] n": (-1, 1), "m [d] n": (1, -1, 1)}[text]
    y = Norm(text)(samples.reshape(shape), valid=valid, valid_axes="d").flatten()
    true = truth(samples[valid], torch.zeros(385), (0,), 1e-5).y
    assert not y[~valid].any()
    assert ((y[valid] - true).abs() <= 2e-6 + 1e-6 * true.abs()).all()


@every_way
@every_precision
@every_family
def test_large_means_in_every_precision(family: Family, dtype: torch.dtype, limits: Limits) -> None:
    assert is_right(errors(family, far_away_in(dtype)))


@every_way
@every_family
def test_half_precision_near_its_limit(family: Family, limits: Limits) -> None:
    x = _beside(*((torch.randn(512, 2).sign() * level).half() for level in (300.0, 7600.0, 60000.0)))
    assert is_right(errors(family, x))
    assert family.run(x).isfinite().all()


@every_way
def test_zeros_in_half_precision(limits: Limits) -> None:
    zeros = torch.zeros(3, 12, dtype=torch.float16)
    for normalizer in (Standardize(1e-12), RMS(1e-12), L2(), L2(0.0), RMS(0.0), Standardize(0.0)):
        for text in ("n [d]", "[n] d"):
            y = Norm(text, normalizer)(zeros)
            assert y.isfinite().all()
            assert not y.any()


@every_way
@pytest.mark.parametrize(("text", "over"), [(text, over) for text, over, _ in PARAMETERS])
def test_gradients_of_parameters(text: str, over: str, limits: Limits) -> None:
    fill = next(fill for other, at, fill in PARAMETERS if (other, at) == (text, over))
    x = fill(_beside(*(make() for make in MAGNITUDES.values()), denormal()))
    dy = torch.randn(x.shape)
    layer = Norm(text, Standardize(0.0), Affine(over))
    found = torch.autograd.grad(layer(x), [layer.weight, layer.bias], dy)
    reduced = tuple(dim for dim, name in enumerate(text.split()) if "[" in name)
    others = tuple(dim for dim, name in enumerate(text.split()) if name.strip("[]") not in over.split())
    products = dy.double() * truth(x, dy, reduced, 0.0).y
    for gradient, terms in zip(found, (products, dy.double()), strict=True):
        bound = ROUNDINGS * 2**-24 * terms.abs().sum(others)
        assert ((gradient - terms.sum(others)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("text", "over", "limits"), [("n [d]", "d", MANY_HELD), ("[n] d", "d", LONG), ("d [n]", "d", LONG)]
)
def test_a_weights_gradient_over_65536_rows(text: str, over: str, limits: Limits, dtype: torch.dtype) -> None:
    x = torch.randn(65536, 4).to(dtype)
    x = x.T.contiguous() if text.startswith("d") else x
    dy = (torch.rand(x.shape) + 0.5).to(dtype)
    layer = Norm(text, RMS(0.0), Affine(over))
    _, d_bias = torch.autograd.grad(layer(x), [layer.weight, layer.bias], dy)
    expected = dy.double().sum(1 if text.startswith("d") else 0)
    assert ((d_bias - expected).abs() <= SUMMED.relative * expected).all()


@every_way
@every_family
def test_a_column_that_is_not_finite_does_not_touch_the_others(family: Family, limits: Limits) -> None:
    x = torch.randn(160, 12) + 3
    alone = _with_gradient(family, x)
    x[7, 2:10] = torch.tensor([torch.nan, torch.inf, -torch.inf, -3e38]).repeat(2)
    for found, expected in zip(_with_gradient(family, x), alone, strict=True):
        assert torch.equal(found[:, [0, 1, 10, 11]], expected[:, [0, 1, 10, 11]])
        assert found[:, [2, 3, 4, 6, 7, 8]].isnan().any(0).all()
        assert found[:, [5, 9]].isfinite().all()


def _with_gradient(family: Family, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient, as matrices."""
    leaf = x.clone().requires_grad_()
    y = family.run(leaf)
    (d_x,) = torch.autograd.grad(y, leaf, torch.arange(y.numel()).reshape(y.shape).sin())
    return y.detach(), d_x


@every_way
@every_family
def test_a_column_comes_out_the_same_beside_any_number_of_others(family: Family, limits: Limits) -> None:
    x, dy = torch.randn(160, 10) * 3 + 1, torch.randn(160, 10)
    found = []
    for columns in (2, 6, 10):
        leaf = x[:, :columns].clone().requires_grad_()
        y = family.run(leaf)
        found.append(torch.cat([y, *torch.autograd.grad(y, leaf, dy[:, :columns])])[:, :2])
    assert found[0].any()
    assert all(torch.equal(others, found[0]) for others in found)


@pytest.mark.parametrize("width", [1, 2, 3, 1023, 16385, 32769, 65537])
def test_rows_of_any_width(width: int) -> None:
    family = KR if width > 1 else RMS_OF_RUNS
    assert is_right(errors(family, torch.randn(width, 2)))


@pytest.mark.parametrize("rows", [1023])
@pytest.mark.parametrize("family", CENTERING[1:], ids=str)
def test_columns_of_any_length(family: Family, rows: int) -> None:
    assert is_right(errors(family, torch.randn(rows, 2)))


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 9), (2, 5, 0)], ids=str)
def test_nothing_gives_nothing_and_is_not_counted(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    layer = nw.BatchNorm(5)
    y = layer(x)
    y.sum().backward()
    assert y.shape == shape
    assert x.grad is not None
    assert x.grad.shape == shape
    assert int(layer.num_batches_tracked) == 0
