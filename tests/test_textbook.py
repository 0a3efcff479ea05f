from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normwise.errors import ShapeError
from normwise.textbook import batch_norm, layer_norm
from tests.tolerances import DOUBLE, VALUES, check


def _arguments(columns: int, shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (columns,) if shape is None else shape
    return (torch.randn(shape) + 2, torch.randn(shape), torch.randn(shape), torch.rand(shape) + 0.5)


def test_two_columns_by_hand() -> None:
    X = torch.tensor([[1.0, 2.0], [3.0, 6.0]])  # noqa: N806 - means 2 and 4, variances 1 and 4
    gamma, beta = torch.tensor([2.0, 3.0]), torch.tensor([10.0, 20.0])
    mean, var = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])
    Y, moving_mean, moving_var = batch_norm(X, gamma, beta, mean, var, 0.0, 0.75, training=True)  # noqa: N806
    assert Y.tolist() == [[8, 17], [12, 23]]
    assert moving_mean.tolist() == [0.75 + 0.5, 0.75 + 1.0]
    assert moving_var.tolist() == [2.25 + 0.25, 2.25 + 1.0]


def test_prediction_by_hand() -> None:
    X = torch.tensor([[1.0, 2.0], [3.0, 6.0]])  # noqa: N806
    mean, var = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 15.0])
    Y, moving_mean, moving_var = batch_norm(X, torch.ones(2), torch.zeros(2), mean, var, 1.0, 0.9, training=False)  # noqa: N806
    assert Y.tolist() == [[0, 0], [1, 1]]
    assert torch.equal(moving_mean, mean)
    assert torch.equal(moving_var, var)


def test_images_by_hand() -> None:
    X = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]], [[[5.0, 7.0]], [[4.0, 4.0]]]])  # noqa: N806 - (2, 2, 1, 2)
    one, zero = torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    Y, mean, var = batch_norm(X, one, zero, zero, zero, 0.0, 0.0, training=True)  # noqa: N806
    assert mean.tolist() == [[[[4.0]], [[2.0]]]]
    assert var.tolist() == [[[[5.0]], [[4.0]]]]
    check(Y[:, 0], (X[:, 0] - 4) / 5**0.5, VALUES)
    check(Y[:, 1], (X[:, 1] - 2) / 2, VALUES)


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5, 6)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_equals_torch_whose_momentum_is_the_other_one(shape: tuple[int, ...], training: bool) -> None:
    x = torch.randn(shape) * 2 + 1
    gamma, beta, mean, var = _arguments(3)
    theirs = mean.clone(), var.clone()
    Y, moving_mean, moving_var = batch_norm(x, gamma, beta, mean, var, 1e-3, 0.9, training=training)  # noqa: N806
    check(Y, F.batch_norm(x, *theirs, gamma, beta, training, momentum=1 - 0.9, eps=1e-3), VALUES)
    check(moving_mean.flatten(), theirs[0], VALUES)
    if training:
        count = x.numel() // 3
        unbiased = (theirs[1] - 0.9 * var) / 0.1
        check(moving_var.flatten(), 0.9 * var + 0.1 * unbiased * (count - 1) / count, VALUES)
    else:
        check(moving_var.flatten(), theirs[1], VALUES)


@pytest.mark.parametrize("parameter_shape", [(3,), (1, 3), (1, 3, 1, 1), (3, 1, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5, 6)], ids=str)
def test_parameters_and_statistics_come_in_any_shape(shape: tuple[int, ...], parameter_shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    arguments = _arguments(3, parameter_shape)
    for training in (True, False):
        Y, mean, var = batch_norm(x, *arguments, 1e-5, 0.9, training=training)  # noqa: N806
        flat = [argument.flatten() for argument in arguments]
        expected, flat_mean, flat_var = batch_norm(x, *flat, 1e-5, 0.9, training=training)
        assert torch.equal(Y, expected)
        assert Y.shape == x.shape
        assert mean.shape == var.shape == ((1, 3, 1, 1) if len(shape) == 4 else parameter_shape)
        assert torch.equal(mean.flatten(), flat_mean.flatten())
        assert torch.equal(var.flatten(), flat_var.flatten())


def test_prediction_mode_is_gradients_disabled_unless_told() -> None:
    x = torch.randn(8, 3)
    arguments = (*_arguments(3), 1e-5, 0.9)
    trained = batch_norm(x, *arguments, training=True)
    predicted = batch_norm(x, *arguments, training=False)
    assert not torch.equal(trained[0], predicted[0])

    def same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
        return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))

    assert same(batch_norm(x, *arguments), trained)
    with torch.no_grad():
        assert same(batch_norm(x, *arguments), predicted)
        assert same(batch_norm(x, *arguments, training=True), trained)
    with torch.inference_mode():
        assert same(batch_norm(x, *arguments), predicted)


def test_nothing_changes_in_place_and_the_statistics_are_detached() -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    gamma, beta, mean, var = (argument.requires_grad_() for argument in _arguments(3))
    before = [argument.detach().clone() for argument in (x, gamma, beta, mean, var)]
    Y, moving_mean, moving_var = batch_norm(x, gamma, beta, mean, var, 1e-5, 0.5)  # noqa: N806
    assert Y.requires_grad
    assert not moving_mean.requires_grad
    assert not moving_var.requires_grad
    moving_mean.zero_()
    for argument, value in zip((x, gamma, beta, mean, var), before, strict=True):
        assert torch.equal(argument, value)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 2, 2)], ids=str)
def test_derivatives(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: batch_norm(*a, mean, var, 1e-5, 0.9, True)[0], (x, gamma, beta))
    row = torch.randn(shape[1:], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, g: layer_norm(x, g, g, 1e-5), (x, row))


@pytest.mark.parametrize("shape", [(3,), (4, 3, 5), (2, 3, 4, 5, 6)], ids=str)
def test_other_ranks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=rf"not of {len(shape)} dimensions"):
        batch_norm(torch.randn(shape), *_arguments(3), 1e-5, 0.9, training=True)


def test_rows_by_hand() -> None:
    X = torch.tensor([[1.0, 3.0], [2.0, 6.0]])  # noqa: N806
    Y = layer_norm(X, torch.tensor([2.0, 3.0]), torch.tensor([10.0, 20.0]), eps=0.0)  # noqa: N806
    assert Y.tolist() == [[8, 23], [8, 23]]


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5, 6), (2, 3, 4)], ids=str)
def test_layer_norm_equals_torchs_over_whole_examples(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * 2 + 1
    gamma, beta = torch.randn(shape[1:]), torch.randn(shape[1:])
    check(layer_norm(x, gamma, beta, 1e-3), F.layer_norm(x, shape[1:], gamma, beta, 1e-3), VALUES)
    flat = layer_norm(x, gamma.flatten(), beta.flatten(), 1e-3)
    assert torch.equal(flat, layer_norm(x, gamma, beta, 1e-3))


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1, 1), (1,), (5, 6), (3, 5, 6), (90,)], ids=str)
def test_parameters_of_layer_norm_broadcast_against_one_example(shape: tuple[int, ...]) -> None:
    x = torch.randn(4, 3, 5, 6)
    gamma, beta = torch.randn(shape), torch.randn(shape)
    example = [p.reshape(3, 5, 6) if p.numel() == 90 else p.reshape(p.shape[-3:]) for p in (gamma, beta)]
    expected = F.layer_norm(x, (3, 5, 6)) * example[0] + example[1]
    check(layer_norm(x, gamma, beta, 1e-5), expected, VALUES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_output_has_the_inputs_dtype(dtype: torch.dtype) -> None:
    x = (torch.randn(4, 3) * 2 + 1).to(dtype)
    Y, mean, _ = batch_norm(x, *(a.to(dtype) for a in _arguments(3)), 1e-5, 0.9, training=True)  # noqa: N806
    assert Y.dtype == dtype
    assert layer_norm(x, torch.ones(3), torch.zeros(3), 1e-5).dtype == dtype
    if dtype == torch.float64:
        check(mean.double(), mean, DOUBLE)


WHOLE, ONES, ZEROS = torch.tensor([[1, 2], [3, 6], [4, 4]]), torch.ones(2), torch.zeros(2)
WHOLE_NUMBERS = {
    "batch": lambda: batch_norm(WHOLE, ONES, ZEROS, ZEROS, ONES, 1e-5, 0.9, training=True),
    "layer": lambda: layer_norm(WHOLE, ONES, ZEROS, 1e-5),
}


@pytest.mark.parametrize("function", WHOLE_NUMBERS)
def test_whole_numbers_are_refused(function: str) -> None:
    with pytest.raises(TypeError, match="floating-point"):
        WHOLE_NUMBERS[function]()


def test_an_empty_batch_in_prediction() -> None:
    Y, _, _ = batch_norm(torch.randn(0, 3), *_arguments(3), 1e-5, 0.9, training=False)  # noqa: N806
    assert Y.shape == (0, 3)
    assert layer_norm(torch.randn(0, 3), torch.ones(3), torch.zeros(3), 1e-5).shape == (0, 3)
