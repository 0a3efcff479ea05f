"""The definition alone: the four steps as one function."""

from __future__ import annotations

import torch

from normwise import RMS, Affine, Scale, Standardize
from normwise.kernels.reference import Recalled, Steps, four_steps, placed
from normwise.pattern import parse
from normwise.plan import make_plan
from tests.tolerances import DOUBLE, VALUES, check


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
