"""Both ends of a spectrum, on matrices whose spectrum is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from normwise.diagnose.lanczos import ends
from normwise.errors import DiagnosisError


def matrix(spectrum: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with a spectrum, and no structure besides."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(spectrum.double()) @ basis.T


def power_iteration(multiply: Tensor, steps: int = 500) -> float:
    """What is usually called the sharpness."""
    vector = torch.randn(len(multiply), dtype=multiply.dtype)
    for _ in range(steps):
        vector = multiply @ vector
        vector /= vector.norm()
    return float(vector @ multiply @ vector)


SPECTRA = {
    "indefinite": torch.linspace(-7.5, 3.2, 60),
    "clustered at the top": torch.cat([torch.linspace(0, 1, 50), 10 + 1e-3 * torch.arange(10)]),
    "degenerate at both ends": torch.tensor([-2.0] * 10 + [0.5] * 10 + [4.0] * 10),
    "as a network's": torch.cat([torch.linspace(-0.05, 0.05, 290), torch.logspace(0, 2, 10)]),
    "negative definite": -torch.logspace(0, 3, 40),
    "wide": torch.logspace(-6, 6, 50),
    "a multiple of the unit matrix": torch.full((20,), 3.0),
    "rank one": torch.cat([torch.zeros(99), torch.tensor([5.0])]),
    "of one number": torch.tensor([-4.0]),
    "of two": torch.tensor([-4.0, 1.0]),
}
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)


@every_spectrum
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ends_to_a_percent_and_within_the_bound(spectrum: Tensor, dtype: torch.dtype) -> None:
    dense = matrix(spectrum).to(dtype)
    found = ends(lambda v: dense @ v, torch.zeros(len(dense), dtype=dtype))
    exact = torch.linalg.eigvalsh(dense.double())
    assert found.converged
    scale = float(exact.abs().max())
    rounding = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype] * scale
    for end, value in ((found.largest, exact[-1]), (found.smallest, exact[0])):
        assert end.value == pytest.approx(float(value), rel=0.01, abs=2e-6 * scale + rounding)
        assert float((exact - end.value).abs().min()) <= end.bound + rounding


@pytest.mark.parametrize("products", [1, 2, 5, 8, 12])
def test_the_bound_bounds_long_before_convergence(products: int) -> None:
    spectrum = SPECTRA["indefinite"]
    dense = matrix(spectrum)
    found = ends(lambda v: dense @ v, torch.zeros(len(dense), dtype=torch.float64), most=products)
    assert (found.products, found.converged) == (products, False)
    for end in (found.largest, found.smallest):
        nearest = float((spectrum - end.value).abs().min())
        assert nearest <= end.bound + 1e-6
    assert any(end.bound > 0.01 * abs(end.value) for end in (found.largest, found.smallest))


def test_two_thousand_dimensions() -> None:
    diagonal = torch.cat([torch.linspace(-1, 1, 1998), torch.tensor([-3.0, 2.0])])
    found = ends(lambda v: diagonal * v, torch.zeros(2000))
    assert found.largest.value == pytest.approx(2.0, rel=0.01)
    assert found.smallest.value == pytest.approx(-3.0, rel=0.01)
    assert found.products < 100


def test_a_cluster_at_an_end_is_resolved() -> None:
    """Where the first bound within a percent belongs to another eigenvalue than the last."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(40):
        spectrum = 0.05 * torch.randn(100, generator=generator)
        spectrum[:5] = 1 + 0.05 * torch.rand(5, generator=generator)
        spectrum[5:9] = -0.3 - 0.02 * torch.rand(4, generator=generator)
        found = ends(lambda v, diagonal=spectrum: diagonal * v, torch.zeros(100), seed=seed)
        assert found.largest.value == pytest.approx(float(spectrum.max()), rel=0.005)
        assert found.smallest.value == pytest.approx(float(spectrum.min()), rel=0.005)


def test_zero() -> None:
    found = ends(torch.zeros_like, torch.zeros(7))
    assert (found.largest.value, found.smallest.value, found.largest.bound) == (0.0, 0.0, 0.0)
    assert (found.products, found.converged) == (1, True)


def test_power_iteration_answers_with_the_wrong_end() -> None:
    dense = matrix(SPECTRA["indefinite"])
    assert power_iteration(dense) == pytest.approx(-7.5, rel=1e-3)
    assert ends(lambda v: dense @ v, torch.zeros(60, dtype=torch.float64)).largest.value == pytest.approx(3.2, rel=0.01)


def test_a_tighter_tolerance_takes_more_products_and_is_more_exact() -> None:
    dense = matrix(SPECTRA["indefinite"])
    loose, tight = (ends(lambda v: dense @ v, torch.zeros(60, dtype=torch.float64), tolerance=t) for t in (0.1, 1e-9))
    assert loose.products < tight.products
    assert tight.largest.value == pytest.approx(3.2, rel=1e-6)
    assert tight.largest.bound < loose.largest.bound


def test_the_same_seed_gives_the_same_bits() -> None:
    dense = matrix(SPECTRA["as a network's"]).float()
    first, again, other = (ends(lambda v: dense @ v, torch.zeros(300), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_product_that_is_not_finite(value: float) -> None:
    with pytest.raises(DiagnosisError) as caught:
        ends(lambda v: v * value, torch.zeros(3))
    assert str(caught.value) == ("a Hessian-vector product is not finite: nw.first_nonfinite tells where it begins")
