"""The first value that is not finite: who made it, forward or backward, and that nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw
from normwise.errors import DiagnosisError
from tests.architectures import ARCHITECTURES, llama
from tests.measured import ResNet, everything_of, labelled


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Between(nn.Module):
    """A function between two layers, in the code of the module that calls them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(3, 3), nn.Linear(3, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


def sequence(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), Applied(function), nn.BatchNorm1d(3), nn.ReLU(inplace=True))


def total(output: Tensor, target: object) -> Tensor:
    return output.sum()


def test_a_healthy_model_has_none() -> None:
    found = nw.first_nonfinite(ResNet(), labelled(), F.cross_entropy)
    assert (found.found, found.backward, found.batches, found.values) == (False, True, 2, 0)
    assert found.rows()[0]["phase"] == ""
    assert repr(found) == "NonFinite: every value is finite: 2 batches, forward and backward"
    forward = nw.first_nonfinite(ResNet(), labelled(), F.cross_entropy, backward=False)
    assert repr(forward).endswith("batches, forward only")


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda x: (x - 100).log(), "log"),
        (lambda x: (x.abs() + 100).exp(), "exp"),
        (lambda x: x / (x - x), "div"),
        (lambda x: torch.where(x.isnan(), x, (x - 100).sqrt()), "sqrt"),
    ],
    ids=["log", "exp", "div", "sqrt"],
)
def test_the_module_that_makes_it_and_not_those_that_pass_it_on(
    function: Callable[[Tensor], Tensor], operation: str
) -> None:
    found = nw.first_nonfinite(sequence(function), [torch.randn(4, 3)], total)
    assert (found.phase, found.path, found.layer, found.call) == ("forward", "1", "Applied", 0)
    assert (found.operation, found.what, found.values, found.size) == (operation, "output", 12, 12)
    assert found.inputs_finite
    assert found.largest_input < 10


def test_the_module_whose_code_makes_it_between_two_layers() -> None:
    model = nn.Sequential(Between(torch.sin), Between(lambda x: (x - 100).log()))
    found = nw.first_nonfinite(model, torch.randn(4, 3))
    assert (found.path, found.layer, found.operation, found.what) == (
        "1",
        "Between",
        "log",
        "what it gives to 1.second",
    )


def test_the_call_and_the_batch() -> None:
    grow = Applied(lambda x: x * 1e20)
    found = nw.first_nonfinite(nn.Sequential(grow, nn.Identity(), grow), [torch.zeros(2, 3), torch.ones(2, 3)])
    assert (found.path, found.call, found.batch, found.batches) == ("0", 1, 1, 2)
    assert repr(found) == (
        "NonFinite: 0 (Applied, call 1) is the first to make 6 inf of 6 values, in its output, in the forward of "
        "batch 1, by mul; what came in is finite, at most 1e+20; float32 ends at 3.4e+38"
    )


def test_half_precision_that_overflows() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).half()
    with torch.no_grad():
        model[0].weight.fill_(100), model[1].weight.fill_(300)
    found = nw.first_nonfinite(model, torch.ones(2, 4).half())
    assert (found.path, found.dtype, found.largest_input, found.nans, found.values) == ("1", "float16", 400.0, 0, 8)
    assert repr(found).endswith("; what came in is finite, at most 400; float16 ends at 65504")


def test_what_was_there_before_comes_first() -> None:
    model = ResNet()
    model.block.conv2.weight.data[0, 0, 0, 0] = torch.nan
    found = nw.first_nonfinite(model, labelled(), F.cross_entropy)
    assert (found.phase, found.path, found.values, found.nans) == ("parameter", "block.conv2.weight", 1, 1)
    assert repr(found) == (
        "NonFinite: parameter block.conv2.weight is not finite before anything is computed: 1 NaN of 576 values"
    )
    model = ResNet()
    model.block.norm2.running_var[3] = torch.inf
    found = nw.first_nonfinite(model, labelled(), F.cross_entropy)
    assert (found.phase, found.path) == ("buffer", "block.norm2.running_var")


def test_inputs_and_targets() -> None:
    good, bad = labelled()
    bad[0][1, 0, 0, 0] = torch.inf
    found = nw.first_nonfinite(ResNet(), [good, bad], F.cross_entropy)
    assert (found.phase, found.path, found.batch) == ("batch", "[0]", 1)
    assert repr(found) == "NonFinite: batch 1[0] is not finite before anything is computed: 1 inf of 768 values"
    target = torch.tensor([[torch.nan], [1.0]])
    found = nw.first_nonfinite(nn.Linear(2, 1), {"input": torch.ones(2, 2), "y": target}, forward=lambda m, b: b)
    assert found.path == "['y']"


def test_the_loss() -> None:
    found = nw.first_nonfinite(nn.Linear(3, 1), torch.randn(4, 3), lambda y, _: (y.sum() * 0).log())
    assert (found.phase, found.operation, found.values, found.call) == ("loss", "log", 1, None)
    assert repr(found).startswith("NonFinite: the loss is the first to make 1 inf of 1 values, in its value")


@pytest.mark.parametrize("inplace", [False, True])
def test_backward_names_the_module_and_the_operation(inplace: bool) -> None:
    model = nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=inplace), Applied(torch.sqrt), nn.Linear(3, 1)
    )
    found = nw.first_nonfinite(model, torch.randn(8, 3), total)
    assert (found.phase, found.path, found.operation) == ("backward", "3", "SqrtBackward0")
    assert found.what == "the gradient of its input 0"
    assert found.inputs_finite
    assert found.backward
    assert not nw.first_nonfinite(model, torch.randn(8, 3), total, backward=False).found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "definition"])
def test_a_normalization_s_backward_is_one_operation(dtype: torch.dtype) -> None:
    """How it is computed is its own business."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nw.RMSNorm(4, eps=0.0), nn.Linear(4, 1)).to(dtype)
    with torch.no_grad():
        model[0].weight.mul_(torch.finfo(dtype).tiny * 1e8)
        model[2].weight.mul_(torch.finfo(dtype).max * 1e-20)
    found = nw.first_nonfinite(model, torch.randn(8, 4, dtype=dtype), total)
    assert (found.phase, found.path, found.layer, found.operation) == ("backward", "1", "RMSNorm", "")
    assert found.what == "the gradient of its input 0"


def test_backward_between_two_layers_in_the_loss_and_of_a_parameter() -> None:
    model = nn.Sequential(Between(torch.sin), Between(lambda x: (x - x).sqrt()))
    found = nw.first_nonfinite(model, torch.randn(4, 3), total)
    assert (found.path, found.layer, found.operation) == ("1", "Between", "SqrtBackward0")
    found = nw.first_nonfinite(nn.Linear(3, 3), torch.randn(4, 3), lambda y, _: (y - y).norm(dim=1).sqrt().sum())
    assert (found.phase, found.path, found.layer, found.call) == ("backward", "the loss", "", None)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.sqrt()

    found = nw.first_nonfinite(nn.Sequential(nn.Identity(), Scale()), torch.ones(4, 3), total)
    assert (found.path, found.what, found.nans) == ("1", "the gradient of 1.scale", 0)


def test_views_residuals_custom_functions_and_checkpoints() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * torch.nan

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.broken = nn.Linear(4, 4), nn.Linear(2, 2), Applied(Broken.apply)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            left, right = x.chunk(2, 1)
            left = torch.utils.checkpoint.checkpoint(self.second, left, use_reentrant=False)
            right = self.broken(right)
            return left.add_(right) + x.clone()[:, :2].relu_()

    found = nw.first_nonfinite(Net(), torch.randn(3, 4), total)
    assert (found.phase, found.path, found.operation) == ("backward", "broken", "BrokenBackward")


def test_masks_are_meant() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.softmax = Applied(self.masked), nn.Softmax(-1)
            self.register_buffer("causal", torch.full((3, 3), -torch.inf).triu(1))
            self.valid = torch.ones(3, 3, dtype=torch.bool)

        def masked(self, x: Tensor) -> Tensor:
            return (x @ x.T + self.causal).masked_fill(~self.valid, -torch.inf)

        def forward(self, x: Tensor) -> Tensor:
            return self.softmax(self.scores(x)) @ x

    model = nn.Sequential(nn.Linear(3, 3), Attention())
    assert not nw.first_nonfinite(model, torch.randn(3, 3), total).found
    model[1].valid[0] = False  # nothing is left in a row
    found = nw.first_nonfinite(model, torch.randn(3, 3), total)
    assert (found.path, found.nans, found.inputs_finite) == ("1.softmax", 3, False)
    assert "; what came in has infinities, as a mask may, at most " in repr(found)


def test_the_mode() -> None:
    model = nn.BatchNorm1d(2)
    model.running_var.fill_(-1.0)
    x = torch.randn(4, 2)
    assert not nw.first_nonfinite(model, x).found
    found = nw.first_nonfinite(model, x, mode="eval")
    assert (found.mode, found.path, found.operation) == ("eval", "BatchNorm1d", "batch_norm")


@pytest.mark.parametrize("function", [torch.sin, lambda x: (x - 100).log(), lambda x: (x - x).sqrt()])
def test_it_leaves_no_trace(function: Callable[[Tensor], Tensor]) -> None:
    model = ResNet()
    model.dropout = nn.Sequential(model.dropout, Applied(function))
    before = everything_of(model)
    found = nw.first_nonfinite(model, labelled(), F.cross_entropy)
    assert everything_of(model) == before
    assert json.loads(found.to_json())["path"] == found.path == ("" if function is torch.sin else "dropout.1")

    def fail(output: Tensor, target: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model.dropout = model.dropout[0]
    before = everything_of(model)
    with pytest.raises(KeyboardInterrupt):
        nw.first_nonfinite(model, labelled(), fail)
    assert everything_of(model) == before


@pytest.mark.parametrize("name", ["RegNet", "BERT", "T5"])
def test_architectures_are_finite(name: str) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model, batch = architecture.model(), architecture.batch()
    before = everything_of(model)
    found = nw.first_nonfinite(model, batch)
    assert (found.found, found.backward) == (False, False)
    assert everything_of(model) == before


def test_a_language_model_with_its_own_loss() -> None:
    ids = torch.randint(1, 50, (2, 7))
    model = llama()
    found = nw.first_nonfinite(model, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    assert (found.found, found.backward) == (False, True)
    model.model.layers[1].mlp.act_fn = Applied(lambda x: x / torch.zeros(()))
    found = nw.first_nonfinite(model, {"input_ids": ids, "labels": ids})
    assert (found.path, found.operation) == ("model.layers.1.mlp.act_fn", "div")


def test_what_it_refuses_and_its_figure() -> None:
    with pytest.raises(DiagnosisError, match=r"^the loss is a tensor of shape \(4, 1\), and has to be one number$"):
        nw.first_nonfinite(nn.Linear(3, 1), torch.randn(4, 3), lambda y, _: y)
    found = nw.first_nonfinite(Applied(torch.log), torch.tensor([-1.0, 0.0, 1.0]))
    assert found.plot().data[0].y == (1, 1, 1)
    assert found.headline() == {"nonfinite": 2.0}


@pytest.mark.parametrize(
    "held",
    [torch.eye(3).to_sparse(), torch.ones(3).to(torch.float8_e4m3fn), torch.ones(3, dtype=torch.complex64)],
    ids=["sparse", "float8", "complex"],
)
def test_buffers_of_every_kind_are_passed_over(held: Tensor) -> None:
    model = nn.Linear(2, 1)
    model.register_buffer("held", held)
    assert not nw.first_nonfinite(model, torch.ones(3, 2)).found
    model.bias.data.fill_(float("nan"))
    assert nw.first_nonfinite(model, torch.ones(3, 2)).path == "bias"
