"""`y, s = norm(x, residual=r)` is the sum and the normalization of the sum, both outputs and all gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from normwise import RMS, Affine, Moving, Norm, Scale, ShapeError
from tests.catalogue import CASES, Case, randomize
from tests.tolerances import DOUBLE, check


def _both(layer: torch.nn.Module, x: Tensor, r: Tensor, d_y: Tensor, d_s: Tensor, **options: object) -> list[Tensor]:
    """Outputs and gradients of the one call."""
    leaves = [x.detach().requires_grad_(), r.detach().requires_grad_()]
    y, s = layer(leaves[0], residual=leaves[1], **options)
    return [y.detach(), s.detach(), *torch.autograd.grad([y, s], [*leaves, *layer.parameters()], [d_y, d_s])]


def _apart(layer: torch.nn.Module, x: Tensor, r: Tensor, d_y: Tensor, d_s: Tensor, **options: object) -> list[Tensor]:
    """The same of two operations."""
    leaves = [x.detach().requires_grad_(), r.detach().requires_grad_()]
    s = leaves[0] + leaves[1]
    y = layer(s, **options)
    return [y.detach(), s.detach(), *torch.autograd.grad([y, s], [*leaves, *layer.parameters()], [d_y, d_s])]


def _assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_outputs_and_all_gradients(case: Case, training: bool) -> None:
    layer = case.pair()[0].train(training)
    twin = copy.deepcopy(layer)
    tensors = [torch.randn(case.shape) for _ in range(4)]
    results = _both(layer, *tensors)
    _assert_same_bits(results, _apart(twin, *tensors))
    assert torch.equal(results[1], tensors[0] + tensors[1])
    assert torch.equal(results[2], results[3])
    _assert_same_bits(list(layer.buffers()), list(twin.buffers()))


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_each_output_alone_has_its_gradient(case: Case) -> None:
    layer, twin = case.pair()
    layer, twin = layer.double(), twin.double()
    x, r, cotangent = (torch.randn(case.shape, dtype=torch.double) for _ in range(3))
    x.requires_grad_()
    r.requires_grad_()
    y, s = layer(x, residual=r)
    assert [torch.equal(grad, cotangent) for grad in torch.autograd.grad(s, [x, r], cotangent)] == [True, True]
    for grad in torch.autograd.grad(y, [x, r], cotangent):
        (wants,) = torch.autograd.grad(twin(x + r), x, cotangent)
        assert wants.abs().max() > 1e-3
        check(grad, wants, DOUBLE)


@pytest.mark.parametrize("padding", [0.0, 1e9, torch.inf, torch.nan])
def test_under_a_mask_the_sum_is_whole_and_carries_the_gradient(padding: float) -> None:
    norm = Norm("[n t] c", recovery=Affine("c"), memory=Moving("c", decay=0.9), c=3)
    randomize(norm)
    lengths = torch.tensor([4, 1, 0, 3])
    valid = torch.arange(4) < lengths.unsqueeze(1)
    x, r, d_y, d_s = (torch.randn(4, 4, 3) for _ in range(4))
    clean, twin = copy.deepcopy(norm), copy.deepcopy(norm)
    wants = _both(clean, x, r, d_y, d_s, valid=valid)
    padded = torch.where(valid.unsqueeze(2), x, padding)
    y, s, d_x, d_r, *d_parameters = _both(
        norm, padded, r, torch.where(valid.unsqueeze(2), d_y, torch.nan), d_s, lengths={"t": lengths}
    )
    assert torch.equal(s.nan_to_num(-7.0), (padded + r).nan_to_num(-7.0))  # everywhere, padding included
    assert not y[~valid].any()
    assert torch.equal(d_x[~valid], d_s[~valid])  # through the sum only
    assert not torch.equal(d_x[valid], d_s[valid])
    _assert_same_bits([y, d_x, d_r, *d_parameters, *norm.buffers()], [wants[0], *wants[2:], *clean.buffers()])
    _assert_same_bits(_apart(twin, x, r, d_y, d_s, valid=valid), wants)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_sum_has_torchs_dtype(dtype: torch.dtype) -> None:
    norm = Norm("n [d]", RMS(1e-6), Scale("d"), d=5)
    x, r = torch.randn(4, 5).to(dtype), torch.randn(4, 5)
    for one, other in ((x, r), (r, x), (x, x)):
        y, s = norm(one, residual=other)
        assert y.dtype == s.dtype == torch.promote_types(one.dtype, other.dtype)
        assert torch.equal(s, one + other)
        assert torch.equal(y, norm(one + other))


def test_memory_is_that_of_the_sum() -> None:
    norm = Norm("[n] c", memory=Moving("c", update_rate=1.0, unbiased=False), c=3)
    x, r = torch.randn(9, 3, dtype=torch.double), torch.randn(9, 3, dtype=torch.double) * 3 + 1
    norm.double()(x, residual=r)
    check(norm.running_mean, (x + r).mean(0), DOUBLE)
    check(norm.running_var, (x + r).var(0, unbiased=False), DOUBLE)


@pytest.mark.parametrize("shape", [(4, 2), (1, 3), (3,), (2, 4, 3)], ids=str)
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError) as caught:
        Norm("[n] c")(torch.zeros(4, 3), residual=torch.zeros(shape))
    assert str(caught.value) == f"the residual has shape {shape}, the input (4, 3)"


def test_an_empty_batch_has_an_empty_sum() -> None:
    y, s = Norm("n [d]")(torch.zeros(0, 3), residual=torch.zeros(0, 3))
    assert y.shape == s.shape == (0, 3)
