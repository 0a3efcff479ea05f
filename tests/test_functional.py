from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normwise import functional as NF
from tests.tolerances import DOUBLE, GRADIENTS, VALUES, check

NAMES = ["batch_norm", "instance_norm", "layer_norm", "rms_norm", "group_norm"]


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_torchs(name: str) -> None:
    ours, theirs = inspect.signature(getattr(NF, name)), inspect.signature(getattr(F, name))
    assert list(ours.parameters) == list(theirs.parameters)
    for parameter, twin in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        assert parameter.default == twin.default
        assert parameter.kind == twin.kind


def _assert_equals_torch(name: str, x: Tensor, *args: object, **options: object) -> None:
    tensors = [a for a in (*args, *options.values()) if isinstance(a, Tensor) and a.requires_grad]
    cotangent = torch.randn(x.shape, dtype=x.dtype)
    results = []
    for function in (getattr(NF, name), getattr(F, name)):
        leaf = x.detach().requires_grad_()
        y = function(leaf, *args, **options)
        results.append((y.detach(), torch.autograd.grad(y, [leaf, *tensors], cotangent)))
    (y, grads), (y_twin, grads_twin) = results
    check(y, y_twin, DOUBLE if x.dtype == torch.float64 else VALUES)
    for grad, grad_twin in zip(grads, grads_twin, strict=True):
        check(grad, grad_twin, DOUBLE if x.dtype == torch.float64 else GRADIENTS)


def _parameters(count: int, dtype: torch.dtype) -> list[tuple[Tensor | None, Tensor | None]]:
    weight, bias = ((torch.randn(count, dtype=dtype) + 1).requires_grad_() for _ in range(2))
    return [(weight, bias), (weight, None), (None, bias), (None, None)]


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@dtypes
@pytest.mark.parametrize("shape", [(7, 6), (3, 6, 9), (3, 6, 4, 5), (2, 6, 3, 2, 2)], ids=str)
def test_batch_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype) * 2 + 1
    mean, var = torch.randn(6, dtype=dtype), torch.rand(6, dtype=dtype) + 0.5
    for weight, bias in _parameters(6, dtype):
        _assert_equals_torch("batch_norm", x, mean, var, weight, bias)
        _assert_equals_torch("batch_norm", x, None, None, weight, bias, training=True, eps=0.1)


@dtypes
@pytest.mark.parametrize("shape", [(3, 6, 9), (3, 6, 4, 5), (2, 6, 3, 2, 2)], ids=str)
def test_instance_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype) * 2 + 1
    mean, var = torch.randn(6, dtype=dtype), torch.rand(6, dtype=dtype) + 0.5
    for weight, bias in _parameters(6, dtype):
        _assert_equals_torch("instance_norm", x, weight=weight, bias=bias)
        _assert_equals_torch("instance_norm", x, mean, var, weight, bias, use_input_stats=False)


@dtypes
@pytest.mark.parametrize("shape", [(7, 6), (3, 6, 9), (3, 6, 4, 5)], ids=str)
def test_group_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype) * 2 + 1
    both, only_weight, only_bias, neither = _parameters(6, dtype)
    for weight, bias in (both, neither):
        _assert_equals_torch("group_norm", x, 2, weight, bias, eps=0.01)
    for weight, bias in (only_weight, only_bias):  # torch cannot differentiate these, ours can
        given = bias if weight is None else weight
        y = NF.group_norm(x, 2, weight, bias, eps=0.01)
        check(y.detach(), F.group_norm(x, 2, weight, bias, eps=0.01).detach(), VALUES)
        other = torch.ones(6, dtype=dtype) if weight is None else torch.zeros(6, dtype=dtype)
        twin = F.group_norm(x, 2, *((other, bias) if weight is None else (weight, other)), eps=0.01)
        cotangent = torch.randn_like(y)
        grads = [torch.autograd.grad(output, given, cotangent)[0] for output in (y, twin)]
        check(*grads, GRADIENTS)


@dtypes
@pytest.mark.parametrize(("shape", "normalized"), [((7, 6), (6,)), ((3, 4, 5), (4, 5)), ((2, 3, 4), (2, 3, 4))])
def test_layer_norm_and_rms_norm(shape: tuple[int, ...], normalized: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype) * 2 + 1
    weight, bias = (torch.randn(normalized, dtype=dtype, requires_grad=True) for _ in range(2))
    for given in ((weight, bias), (weight, None), (None, bias), (None, None)):
        _assert_equals_torch("layer_norm", x, normalized, *given, eps=0.01)
    for one in (weight, None):
        _assert_equals_torch("rms_norm", x, normalized, one)
        _assert_equals_torch("rms_norm", x, list(normalized), one, eps=0.1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("batch_norm", {"training": True}),
        ("instance_norm", {}),
        ("batch_norm", {}),
        ("instance_norm", {"use_input_stats": False}),
    ],
)
@pytest.mark.parametrize("momentum", [0.1, 0.75, 1.0, 0.0])
def test_running_statistics_move_in_place_as_torchs(name: str, options: dict[str, bool], momentum: float) -> None:
    memories = [(torch.full((6,), 0.5), torch.full((6,), 2.0)) for _ in range(2)]
    for _ in range(3):
        x = torch.randn(4, 6, 7) * 3 + 1
        for function, memory in zip((getattr(NF, name), getattr(F, name)), memories, strict=True):
            function(x, *memory, momentum=momentum, **options)
    for ours, theirs in zip(*memories, strict=True):
        check(ours, theirs, VALUES)
    moves = (options.get("training") or (name == "instance_norm" and not options)) and momentum > 0
    assert bool((memories[0][0] != 0.5).all()) == bool(moves)


def test_running_statistics_stay_out_of_autograd() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    NF.batch_norm(torch.randn(4, 3, requires_grad=True), mean, var, training=True).sum().backward()
    assert not mean.requires_grad
    assert mean.any()


@pytest.mark.parametrize("name", NAMES)
def test_empty_input(name: str) -> None:
    x = torch.randn(0, 6, 4, requires_grad=True)
    weight = torch.randn(4 if name in ("layer_norm", "rms_norm") else 6, requires_grad=True)
    mean, var = torch.zeros(6), torch.ones(6)
    arguments = {
        "batch_norm": (mean, var, weight, None, True),
        "instance_norm": (mean, var, weight),
        "layer_norm": ((4,), weight),
        "rms_norm": ((4,), weight),
        "group_norm": (3, weight),
    }[name]
    y = getattr(NF, name)(x, *arguments)
    assert y.shape == x.shape
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    assert not mean.any()


def test_large_means_keep_their_digits() -> None:
    x = torch.randn(64, 512) + 1e6
    wide = x.double()
    expected = (wide - wide.mean(1, keepdim=True)) / (wide.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    check(NF.layer_norm(x, (512,)).double(), expected, VALUES)


def test_momentum_may_be_a_whole_number() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    x = torch.randn(4, 3)
    NF.batch_norm(x, mean, var, training=True, momentum=1)
    check(mean, x.mean(0), VALUES)


def test_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="0"):
        NF.group_norm(torch.randn(2, 6, 4), 0)


WHOLE = torch.tensor([[1, 2], [3, 6], [4, 4]])
WHOLE_NUMBERS = {
    "batch_norm": lambda: NF.batch_norm(WHOLE, None, None, training=True),
    "layer_norm": lambda: NF.layer_norm(WHOLE, (2,)),
    "instance_norm": lambda: NF.instance_norm(WHOLE[None]),
    "group_norm": lambda: NF.group_norm(WHOLE, 1),
    "rms_norm": lambda: NF.rms_norm(WHOLE, (2,), eps=0.1),
}


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_whole_numbers_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="floating-point"):
        WHOLE_NUMBERS[name]()


WRONG_SIZES = {
    "weight": lambda: NF.batch_norm(torch.randn(4, 5), torch.zeros(5), torch.ones(5), weight=torch.ones(3)),
    "running_mean": lambda: NF.batch_norm(torch.randn(4, 5), torch.zeros(3), torch.ones(3)),
    "running_mean in training": lambda: NF.batch_norm(torch.randn(4, 5), torch.zeros(3), torch.ones(3), training=True),
    "the weight of a row": lambda: NF.layer_norm(torch.randn(4, 5), (5,), torch.ones(1)),
}


@pytest.mark.parametrize("what", WRONG_SIZES)
def test_a_parameter_of_another_size_is_named(what: str) -> None:
    with pytest.raises(ValueError, match=r"weight|running_mean"):
        WRONG_SIZES[what]()


def test_half_a_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="running_var"):
        NF.batch_norm(torch.randn(4, 5), torch.zeros(5), None, training=True)
