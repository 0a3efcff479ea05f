"""What a forward keeps until the backward: the input, and a few numbers for each column."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import Affine, Moving, Norm, Renorm, Standardize
from normwise.kernels.reference import Steps, four_steps
from normwise.pattern import parse
from normwise.plan import make_plan

NUMBERS_A_COLUMN = 16

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # layer, shape, columns
    "BatchNorm": (lambda: nw.BatchNorm(8), (256, 8), 8),
    "BatchNorm of images": (lambda: nw.BatchNorm(8), (16, 8, 12, 12), 8),
    "InstanceNorm": (lambda: nw.InstanceNorm(8, affine=True, track_running_stats=True), (4, 8, 32, 32), 32),
    "LayerNorm": (lambda: nw.LayerNorm(512), (6, 512), 6),
    "LayerNorm2d": (lambda: nw.LayerNorm2d(512), (2, 512, 2, 3), 12),
    "GroupNorm": (lambda: nw.GroupNorm(4, 64), (3, 64, 8, 8), 12),
    "RMSNorm": (lambda: nw.RMSNorm(512), (6, 512), 6),
    "RMSNorm2d": (lambda: nw.RMSNorm2d(512), (2, 512, 2, 3), 12),
    "Norm of time steps": (
        lambda: Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9)),
        (256, 2, 4),
        8,
    ),
    "batch renormalization": (
        lambda: Norm("[n] c", recovery=Affine("c"), memory=Moving("c", decay=0.9, renorm=Renorm(warmup=0, d_ramp=0))),
        (256, 8),
        8,
    ),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
either_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
either_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def saved_bytes(run: Callable[[], object]) -> int:
    """The bytes of all storages that autograd keeps, each counted once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = run()
    assert kept is not None  # the graph was alive until here, so no address was used twice
    return sum(storages.values())


def allowed(layer: nn.Module, x: Tensor, columns: int) -> int:
    parameters = sum(p.numel() * max(p.itemsize, 4) for p in layer.parameters())
    return x.numel() * x.itemsize + 4 * NUMBERS_A_COLUMN * columns + parameters


@either_precision
@either_mode
@every_layer
def test_the_input_and_a_few_numbers_a_column(name: str, training: bool, dtype: torch.dtype) -> None:
    make, shape, columns = LAYERS[name]
    layer, x = make(), torch.randn(shape).to(dtype).requires_grad_()
    layer(x.detach())
    layer.train(training)
    saved = saved_bytes(lambda: layer(x))
    assert x.numel() * x.itemsize <= saved <= allowed(layer, x, columns)


@either_precision
@either_mode
@every_layer
def test_with_a_mask_the_mask_besides(name: str, training: bool, dtype: torch.dtype) -> None:
    make, shape, columns = LAYERS[name]
    layer, x = make(), torch.randn(shape).to(dtype).requires_grad_()
    layer(x.detach())
    layer.train(training)
    valid = torch.rand(shape) < 0.9
    saved = saved_bytes(lambda: layer(x, valid=valid))
    assert saved <= allowed(layer, x, columns) + valid.numel()


@either_precision
@every_layer
def test_with_a_residual_the_sum_in_place_of_the_input(name: str, dtype: torch.dtype) -> None:
    make, shape, columns = LAYERS[name]
    layer, x, residual = make(), *torch.randn(2, *shape).to(dtype).requires_grad_()
    layer(x.detach())
    saved = saved_bytes(lambda: layer(x, residual=residual))
    assert saved <= allowed(layer, x, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autograd_of_the_definition_would_keep_more(dtype: torch.dtype) -> None:
    x = torch.randn(256, 8).to(dtype).requires_grad_()
    layer = nw.BatchNorm(8)
    steps = Steps(make_plan(parse("[n] c"), x.shape), Standardize(), Affine("c"))
    parameters = (layer.weight.reshape(1, 8), layer.bias.reshape(1, 8))
    assert saved_bytes(lambda: four_steps(x, steps, parameters)) > 1.5 * allowed(layer, x, columns=8)


def test_a_forward_without_gradients_keeps_nothing() -> None:
    layer, x = nw.BatchNorm(8), torch.randn(64, 8)
    with torch.no_grad():
        assert saved_bytes(lambda: layer(x.requires_grad_())) == 0
