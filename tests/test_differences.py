"""Hessian-vector products by differences of gradients, in the dtypes that parameters come in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from normwise.diagnose.sharpness import sharpness
from normwise.errors import DiagnosisError


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator), torch.arange(n) % 3) for n in (12, 5, 20)]


def test_differences_are_refused_where_they_drown_in_rounding() -> None:
    model = nn.Linear(4, 3).bfloat16()
    given = [(x.bfloat16(), labels) for x, labels in batches()]
    with pytest.raises(DiagnosisError) as caught:
        sharpness(model, given, cross_entropy, method="differences")
    assert str(caught.value) == (
        "differences of gradients drown in the rounding of bfloat16 parameters: take model.float()"
    )
    assert sharpness(model, given, cross_entropy).method == "exact"


def test_the_distance_of_differences_is_that_of_the_coarsest_parameter() -> None:
    """Off by 6e-6; by 4e-4 at the distance that is for float64."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    model.register_parameter("scale", nn.Parameter(torch.ones((), dtype=torch.float64)))
    found = [
        sharpness(model, batches(), cross_entropy, method=method, forward=lambda m, b: m(b[0]) * m.scale)
        for method in ("exact", "differences")
    ]
    assert found[1].largest.value == pytest.approx(found[0].largest.value, rel=5e-5)
    assert found[1].smallest.value == pytest.approx(found[0].smallest.value, rel=5e-5)
