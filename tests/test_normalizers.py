from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import normwise as nw
from normwise import L2, RMS, Moving, Norm, PatternError, Scale, Standardize
from normwise.moments import STATISTICS, Moments
from normwise.normalizers import Line, Normalized
from tests.tolerances import DOUBLE, EXACT, check

DOUBLE_DTYPE = torch.float64


@pytest.mark.parametrize("eps", [1e-5, 0.5, 0.0])
def test_standardize_equals_its_formula(eps: float) -> None:
    x = torch.randn(6, 4, dtype=DOUBLE_DTYPE) * 3 + 1
    mean, var = x.mean(0, keepdim=True), x.var(0, unbiased=False, keepdim=True)
    normalized = Standardize(eps).normalize(x, (0,), x.dtype)
    check(normalized.values, (x - mean) / (var + eps).sqrt(), DOUBLE)
    check(normalized.line.slope, 1 / (var + eps).sqrt(), DOUBLE)
    check(normalized.line.values(x), normalized.values, DOUBLE)
    check(normalized.moments.mean, mean, DOUBLE)
    check(normalized.moments.m2, var * 6, DOUBLE)
    assert normalized.moments.count == 6
    check(Standardize(eps).recall((mean, var), x.dtype).values(x), normalized.values, DOUBLE)


@pytest.mark.parametrize("eps", [1e-5, 0.5, 0.0])
def test_rms_equals_its_formula(eps: float) -> None:
    x = torch.randn(6, 4, dtype=DOUBLE_DTYPE) * 3 + 1
    mean_square = x.square().mean(0, keepdim=True)
    normalized = RMS(eps).normalize(x, (0,), x.dtype)
    check(normalized.values, x / (mean_square + eps).sqrt(), DOUBLE)
    check(normalized.line.slope, 1 / (mean_square + eps).sqrt(), DOUBLE)
    remembered = STATISTICS["mean_square"](normalized.moments, unbiased=True)
    check(remembered, mean_square, DOUBLE)
    check(RMS(eps).recall((remembered,), x.dtype).values(x), normalized.values, DOUBLE)


def test_l2_equals_torchs_normalize_and_its_formula() -> None:
    x = torch.randn(6, 4, dtype=DOUBLE_DTYPE) * 3 + 1
    check(Norm("n [d]", L2())(x), torch.nn.functional.normalize(x), DOUBLE)
    check(Norm("[n] d", L2(0.5))(x), x / (x.square().sum(0) + 0.5).sqrt(), DOUBLE)


def test_l2_of_zeros_and_of_any_magnitude() -> None:
    """torch's is 0 / 0 in half precision, where its eps is 0, and loses vectors whose squares leave float32."""
    half = torch.zeros(2, 8, dtype=torch.float16)
    assert torch.nn.functional.normalize(half).isnan().all()
    assert torch.equal(Norm("n [d]", L2())(half), half)
    for magnitude in (1e-15, 1e19, 3e38):
        x = torch.rand(4, 100) * magnitude
        check(Norm("n [d]", L2())(x).double(), torch.nn.functional.normalize(x.double()), EXACT)


def test_derivatives_of_l2() -> None:
    x = torch.randn(3, 5, dtype=DOUBLE_DTYPE, requires_grad=True)
    norm = Norm("n [d]", L2(0.3), Scale("d"), d=5, dtype=DOUBLE_DTYPE)
    valid = torch.rand(3, 5) > 0.3
    for call in (norm, lambda x: norm(x, valid=valid)):
        assert torch.autograd.gradcheck(call, (x,))
        assert torch.autograd.gradgradcheck(call, (x,))


def test_l2_has_nothing_to_remember() -> None:
    with pytest.raises(PatternError, match=r"^L2 has no statistics for Moving to remember\n  \[n\] c$"):
        Norm("[n] c", L2(), memory=Moving("c", decay=0.9))
    with pytest.raises(PatternError, match=r"^L2 has no statistics to recall$"):
        L2().recall((), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_eps_of_rms_is_by_default_that_of_the_inputs_dtype(dtype: torch.dtype) -> None:
    tiny = torch.full((2, 8), 1e-3).to(dtype)
    expected = torch.nn.functional.rms_norm(tiny.double(), (8,), eps=torch.finfo(dtype).eps)
    ours = Norm("... [d]", RMS())(tiny)
    assert ours.dtype == dtype
    assert ((ours.double() - expected) / expected).abs().max() <= 2 * torch.finfo(dtype).eps


def test_moments_are_detached() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    for normalizer in (Standardize(), RMS()):
        moments = normalizer.normalize(x, (0,), x.dtype).moments
        assert not moments.mean.requires_grad
        assert not moments.m2.requires_grad


@pytest.mark.parametrize(
    ("normalizer", "formula"),
    [
        (Standardize(), "(x - mean) / sqrt(var + 1e-05), biased variance"),
        (RMS(), "x / sqrt(mean(x^2) + machine epsilon)"),
        (RMS(0.1), "x / sqrt(mean(x^2) + 0.1)"),
        (L2(0.25), "x / sqrt(sum(x^2) + 0.25)"),
    ],
)
def test_formula_and_repr(normalizer: Standardize | RMS | L2, formula: str) -> None:
    assert normalizer.formula() == formula
    assert eval(repr(normalizer)) == normalizer


def test_no_dimension_to_normalize_over_is_each_element_by_itself() -> None:
    y = Norm("n [...]", RMS(eps=0.0))(torch.tensor([3.0, -4.0]))
    assert y.tolist() == [1.0, -1.0]


@dataclass(frozen=True)
class ByLargest:
    """x / max|x|: somebody else's normalizer, by the protocol."""

    centers: ClassVar[bool] = False
    remembers: ClassVar[tuple[str, ...]] = ("mean_square",)
    needs_two: ClassVar[bool] = False

    def normalize(
        self, view: Tensor, dims: tuple[int, ...], dtype: torch.dtype, valid: Tensor | None = None
    ) -> Normalized:
        slope = 1 / view.abs().amax(dims, keepdim=True)
        squares = view.detach().square().sum(dims, keepdim=True)
        return Normalized(view * slope, Line(None, (), slope), Moments(1, torch.zeros_like(squares), squares))

    def recall(self, remembered: tuple[Tensor, ...], dtype: torch.dtype) -> Line:
        return Line(None, (), remembered[0].rsqrt())

    def formula(self) -> str:
        return "x / max|x|"


def test_a_declared_normalizer_of_ones_own_runs() -> None:
    y = Norm("n [d]", ByLargest())(torch.tensor([[1.0, -4.0], [2.0, 1.0]]))
    assert y.tolist() == [[0.25, -1.0], [1.0, 0.5]]


def test_the_gradient_of_a_normalizer_of_ones_own_is_right() -> None:
    x = torch.randn(3, 5, dtype=DOUBLE_DTYPE, requires_grad=True)
    assert torch.autograd.gradcheck(Norm("n [d]", ByLargest()), (x,))


@pytest.mark.parametrize("make", [Standardize, RMS, lambda eps: nw.BatchNorm(3, eps), lambda eps: nw.RMSNorm(3, eps)])
@pytest.mark.parametrize("eps", [-1e-5, float("nan"), float("inf")])
def test_an_eps_that_is_none_is_refused(make: Callable[[float], object], eps: float) -> None:
    with pytest.raises(ValueError, match=f"^eps is a finite number from 0 on, not {eps}$"):
        make(eps)
