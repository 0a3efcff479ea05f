from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normwise import Affine, Norm, Scale
from tests.tolerances import VALUES, check

X = torch.tensor([[1.0, -2.0], [0.5, 4.0]])


def test_affine() -> None:
    affine = Affine("c")
    assert affine.parameters == {"weight": 1.0, "bias": 0.0}
    y = affine.recover(X, torch.tensor([2.0, 3.0]), torch.tensor([1.0, -1.0]))
    assert y.tolist() == [[3.0, -7.0], [2.0, 11.0]]
    assert affine.formula() == "weight * x + bias"


def test_scale() -> None:
    scale = Scale("c")
    assert scale.parameters == {"weight": 1.0}
    assert scale.recover(X, torch.tensor([2.0, 3.0])).tolist() == [[2.0, -6.0], [1.0, 12.0]]
    assert scale.formula() == "weight * x"


@pytest.mark.parametrize("part", [Affine("(g k)"), Scale("h w")])
def test_repr_makes_it_again(part: object) -> None:
    assert eval(repr(part)) == part


@pytest.mark.parametrize(
    ("over", "shape", "placed"),
    [
        ("c", (3,), lambda p: p.reshape(3, 1, 1)),
        ("h w", (4, 5), lambda p: p),
        ("w h", (5, 4), lambda p: p.T),
        ("n c", (2, 3), lambda p: p[..., None, None]),
        ("(h w)", (20,), lambda p: p.reshape(4, 5)),
        ("(w h)", (20,), lambda p: p.reshape(5, 4).T),
        ("w (c h)", (5, 12), lambda p: p.reshape(5, 3, 4).permute(1, 2, 0)),
    ],
)
def test_parameters_stand_over_any_axes_kept_or_not(
    over: str, shape: tuple[int, ...], placed: Callable[[Tensor], Tensor]
) -> None:
    norm = Norm("n c [h w]", recovery=Affine(over))
    x = torch.randn(2, 3, 4, 5)
    plain = Norm("n c [h w]")(x)
    check(norm(x).detach(), plain, VALUES)
    assert norm.weight.shape == norm.bias.shape == shape
    weight, bias = torch.randn(shape), torch.randn(shape)
    norm.load_state_dict({"weight": weight, "bias": bias})
    check(norm(x).detach(), plain * placed(weight) + placed(bias), VALUES)
