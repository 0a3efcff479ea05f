"""Everything that traces a layer rather than runs it: tracers, fake tensors, exporters, and compilers at many sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import normwise as nw
from normwise import Average, BatchNorm, GroupNorm, LayerNorm, Moving, Norm, Renorm, RMSNorm
from tests.tolerances import VALUES, check

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: LayerNorm(6),
    "RMSNorm": lambda: RMSNorm(6),
    "GroupNorm": lambda: GroupNorm(2, 6),
    "BatchNorm": lambda: BatchNorm(6),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@every_layer
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_jit_trace_computes_what_the_layer_does_at_any_magnitude(make: Callable[[], nn.Module], grad: bool) -> None:
    layer = make().eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer, (torch.randn(4, 6),))
        for magnitude in (1.0, 1e30):
            x = torch.randn(4, 6) * magnitude
            check(traced(x), layer(x), VALUES)


@every_layer
def test_fake_tensors_go_through(make: Callable[[], nn.Module]) -> None:
    with FakeTensorMode():
        x = torch.empty(4, 6, requires_grad=True)
        y = make()(x)
        assert y.shape == (4, 6)
        (grad,) = torch.autograd.grad(y, x, torch.empty(4, 6))
        assert grad.shape == (4, 6)


@every_layer
def test_make_fx_gives_a_graph_of_the_same_numbers(make: Callable[[], nn.Module]) -> None:
    layer, x = make().eval(), torch.randn(4, 6)
    graph = make_fx(layer)(x)
    check(graph(x * 3), layer(x * 3).detach(), VALUES)


MEMORIES = {
    "Moving": Moving("c", decay=0.9),
    "Average": Average("c"),
    "renorm": Moving("c", decay=0.9, renorm=Renorm()),
    "degenerate": Moving("c", decay=0.9, degenerate="memory"),
}


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_batch_sizes_do_not_compile_a_training_layer_again(memory: Moving | Average) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(Norm("[n] c", memory=memory, c=3), backend=counter)
    for rows in (8, 9, 10, 11, 12, 13):
        compiled(torch.randn(rows, 3))
    assert counter.frame_count <= 3  # for the first size, for any size, and for the first entry


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_training_layer_is_exported_for_any_batch_size() -> None:
    layer = BatchNorm(3)
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(layer, (torch.randn(8, 3),), dynamic_shapes=({0: rows},), strict=False)
    program = exported.run_decompositions().module(check_guards=False)
    x = torch.randn(5, 3)
    check(program(x).detach(), layer(x).detach(), VALUES)
    check(program.get_buffer("running_mean"), layer.running_mean, VALUES)


def test_statistics_are_mapped_without_gradients() -> None:
    layer = BatchNorm(3).eval()
    x, variances = torch.randn(4, 3), torch.rand(5, 3) + 0.5

    def evaluated(var: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"running_var": var}, (x,))

    with torch.no_grad():
        check(torch.func.vmap(evaluated)(variances), torch.stack([evaluated(var) for var in variances]), VALUES)


def test_a_layer_first_run_in_inference_mode_is_trained_later() -> None:
    norm = Norm("[n] t c", recovery=nw.Affine("c"), memory=Moving("t c", decay=0.9, beyond={"t": "last"}))
    with torch.inference_mode():
        norm(torch.randn(4, 2, 3))
        with nw.domain(norm, "night"):
            norm(torch.randn(4, 5, 3))
    for name in ("night", None):
        x = torch.randn(4, 6, 3)
        if name is None:
            y = norm(x)
        else:
            with nw.domain(norm, name):
                y = norm(x)
        y.square().sum().backward()
    assert norm.weight.grad is not None
    assert norm.num_batches_tracked.tolist() == [2, 2, 1, 1, 1, 1]
