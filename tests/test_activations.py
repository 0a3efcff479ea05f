"""Activations: their statistics against numbers by hand, what is seen of a model, and that it stays as it was."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw
from normwise.errors import DiagnosisError
from tests.architectures import ARCHITECTURES
from tests.measured import ResNet, everything_of, labelled


def row(found: object, path: str, call: int = 0) -> object:
    """The row of a path and call."""
    return next(r for r in found.calls if (r.path, r.call) == (path, call))


class Given(nn.Module):
    """Gives what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0


def test_statistics_by_channel_are_those_of_all_rows_joined() -> None:
    x = torch.randn(16, 3, 5, 5) * torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1) + 7
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3).view(3, 3, 1, 1)), model[0].bias.zero_()
    found = row(nw.activations(model, list(x.split([3, 5, 8]))), "0")
    wide = x.double()
    variances = wide.var((0, 2, 3), unbiased=False).sort().values.tolist()
    assert [found.variance_low, found.variance_median, found.variance_high] == pytest.approx(variances, rel=1e-6)
    assert found.mean == pytest.approx(wide.mean().item(), rel=1e-6)
    assert [found.rms, found.input_rms] == pytest.approx([wide.square().mean().sqrt().item()] * 2, rel=1e-6)
    assert (found.channels, found.constant, found.shape) == (3, 0, (3, 3, 5, 5))


def test_a_mean_of_a_million_costs_no_digit() -> None:
    x = torch.randn(64, 4).double()
    large = (x + 1e6).float()
    found = nw.activations(nn.Sequential(Given()), list(large.split(8))).calls[0]
    expected = large.double().var(0, unbiased=False)
    assert found.variance_high == pytest.approx(expected.max().item(), rel=1e-6)
    assert found.variance_low == pytest.approx(expected.min().item(), rel=1e-6)
    assert found.constant == 0


def test_values_of_1e30_and_half_precision() -> None:
    large = nw.activations(Given(), torch.tensor([[1e30], [-1e30]])).calls[0]
    assert (large.rms, large.variance_high) == (pytest.approx(1e30), pytest.approx(1e60))
    half = nw.activations(Given(), torch.tensor([[60000.0], [-60000.0]], dtype=torch.float16)).calls[0]
    assert half.rms == pytest.approx(60000)


def test_constant_channels() -> None:
    x = torch.stack([torch.full((9,), 0.1), torch.full((9,), 1e6), torch.zeros(9), torch.randn(9)], 1)
    x[3, 1] += 0.0625  # one step of float32 there
    found = nw.activations(Given(), [x[:4], x[4:]]).calls[0]
    assert (found.constant, found.channels) == (3, 4)


def test_dead_units_are_those_that_are_0_in_every_batch() -> None:
    x = torch.tensor([[-1.0, -1, -1, 1], [-2, 3, -2, 1]])
    found = nw.activations(nn.ReLU(), list(x.split(1))).calls[0]
    assert (found.path, found.dead, found.saturated) == ("ReLU", 0.5, None)
    maps = torch.tensor([-1.0, 2.0]).view(1, 2, 1, 1) * torch.rand(3, 2, 4, 4)
    assert nw.activations(nn.Sequential(nn.ReLU()), maps).calls[0].dead == 0.5
    assert nw.activations(nn.LeakyReLU(), x).calls[0].dead is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "definition"])
def test_an_activation_that_a_normalization_applies_is_seen_in_what_it_gives(dtype: torch.dtype) -> None:
    norm = nw.BatchNorm(4, activation="relu").to(dtype)
    with torch.no_grad():
        norm.bias[:3] = -100.0
    x = torch.randn(16, 4, dtype=dtype)
    found = nw.activations(nn.Sequential(norm), list(x.split(8)))
    assert [(r.path, r.layer, r.dead, r.saturated) for r in found.calls] == [("0", "BatchNorm", 0.75, None)]
    expected = torch.cat([torch.relu(F.batch_norm(part, None, None, training=True)[:, 3]) for part in x.split(8)])
    assert found.calls[0].mean == pytest.approx(expected.mean().item() / 4, rel=1e-5)
    assert nw.activations(nn.Sequential(nw.BatchNorm(4, activation="gelu")), x.float()).calls[0].dead is None


def test_a_sum_with_a_residual_has_no_dead_units_of_the_activation() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nw.LayerNorm(4, activation="relu")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, residual=-x)[0]

    found = nw.activations(Adds(), torch.randn(8, 4))
    assert [(r.output, r.rms, r.dead) for r in found.calls] == [(0, 0.0, 1.0), (1, 0.0, None)]


@pytest.mark.parametrize(
    ("function", "far"),
    [(nn.Sigmoid(), 5.0), (nn.Tanh(), 2.5), (nn.Hardtanh(-2, 2), 2.0), (nn.ReLU6(), 5.95), (nn.Hardsigmoid(), 3.0)],
    ids=lambda value: type(value).__name__,
)
def test_saturated_units(function: nn.Module, far: float) -> None:
    x = torch.zeros(40, 4)
    x[:, 1] = far
    x[::2, 2] = far  # half of the time
    x[:39, 3] = far  # nearly always
    found = nw.activations(function, list(x.split(8))).calls[0]
    assert found.saturated == 0.5
    assert found.at_bounds == pytest.approx((40 + 20 + 39) / 160)
    near = nw.activations(function, 0.9 * x).calls[0]
    assert (near.saturated, near.at_bounds) == (0, 0)


def test_a_layer_that_is_called_twice_has_two_rows_in_the_order_of_calls() -> None:
    model = ResNet()
    found = nw.activations(model, labelled())
    block = [(r.path, r.call) for r in found.calls if r.path.startswith("block.")]
    names = ["conv1", "norm1", "relu", "conv2", "norm2", "relu"]
    assert block == [(f"block.{name}", int(at == 5)) for at, name in enumerate(names)]
    first, second = row(found, "block.relu", 0), row(found, "block.relu", 1)
    assert first.rms != second.rms
    assert second.input_rms > row(found, "block.norm2").rms  # the sum with the residual


def test_what_is_changed_in_place_afterwards_was_seen_before() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4)), model[0].bias.zero_()
    x = torch.randn(100, 4)
    found = nw.activations(model, x)
    assert found.calls[0].mean == pytest.approx(x.mean().item(), abs=1e-6)
    assert found.calls[1].input_rms == pytest.approx(x.square().mean().sqrt().item())
    assert found.calls[1].mean == pytest.approx(x.relu().mean().item(), abs=1e-6)


def test_functions_in_a_module_s_own_code() -> None:
    class Gated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sigmoid()  # it is itself an activation function

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gate = nn.Linear(3, 3), Gated()

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.inner(x))
            return torch.tanh(F.relu_(self.gate(x) - 1))

    found = nw.activations(Net(), (torch.randn(8, 3), torch.zeros(8, 3)), F.binary_cross_entropy_with_logits)
    assert [(r.path, r.layer, r.call) for r in found.calls] == [
        ("inner", "Linear", 0),
        ("Net", "relu()", 0),
        ("gate", "Gated", 0),
        ("Net", "relu()", 1),
        ("Net", "tanh()", 0),
    ]
    assert found.calls[1].dead is not None
    assert found.calls[4].saturated is not None
    assert found.calls[3].name == "Net.relu()#1"


def test_gradients_are_those_of_autograd() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 1))
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    found = nw.activations(model, (x, y), F.mse_loss)
    hidden = model[0](x)
    active = hidden.relu()
    output = model[2](active)
    expected = torch.autograd.grad(F.mse_loss(output, y), [hidden, active, output])
    measured = [r.gradient_rms for r in found.calls]
    assert measured == pytest.approx([g.square().mean().sqrt().item() for g in expected])
    assert nw.activations(model, (x, y)).calls[0].gradient_rms is None
    assert nw.activations(model, (x, y), F.mse_loss, gradients=False).calls[0].gradient_rms is None


def test_growth_by_depth() -> None:
    layers = [nn.Linear(8, 8, bias=False) for _ in range(6)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(2 * torch.eye(8))
    found = nw.activations(nn.Sequential(*layers), torch.randn(32, 8))
    assert found.factor == pytest.approx(2)
    assert [r.growth for r in found.calls] == pytest.approx([2.0**at for at in range(6)])
    assert found.headline()["growth"] == found.factor
    assert nw.activations(nn.Sequential(*layers[:2]), torch.randn(32, 8)).factor is None


def test_the_residual_stream_explodes_without_a_norm_and_not_behind_one() -> None:
    class Block(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(32, 32), norm
            nn.init.kaiming_normal_(self.linear.weight)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(self.norm(x)).relu()

    x = torch.randn(64, 32)
    plain, normed = (
        nw.activations(nn.Sequential(*[Block(make()) for _ in range(20)]), x, layers="*").calls
        for make in (nn.Identity, lambda: nw.BatchNorm(32))
    )
    last = [next(r for r in rows if r.path == "19") for rows in (plain, normed)]
    assert last[0].rms ** 2 > 1e5
    assert last[1].rms ** 2 < 100


def test_layers_by_pattern_and_outputs_of_every_kind() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"a": x, "ids": x.long(), "rest": (2 * x, None)}

    found = nw.activations(Two(), torch.ones(3, 2))
    assert [(r.output, r.rms) for r in found.calls] == [(0, 1.0), (1, 2.0)]
    model = ResNet()
    assert [r.path for r in nw.activations(model, labelled(), layers=["block", "st*"]).calls] == ["stem", "block"]
    with pytest.raises(DiagnosisError, match=r"^layers: no module has a path like 'blocks\.\*'$"):
        nw.activations(model, labelled(), layers="blocks.*")


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    x = torch.tensor([[1.0, torch.nan], [3.0, 4.0], [torch.inf, 6.0]])
    found = nw.activations(Given(), [x, x])
    assert (found.calls[0].nonfinite, found.calls[0].mean) == (4, pytest.approx(3.5))
    assert repr(found).endswith("; 4 values in Given are not finite")
    assert nw.activations(Given(), torch.full((2, 2), torch.nan)).calls[0].rms == 0


def test_batches_of_other_lengths() -> None:
    found = nw.activations(Given(), [torch.ones(2, 3, 4), 3 * torch.ones(2, 3, 5)]).calls[0]
    assert (found.channels, found.mean) == (None, pytest.approx((24 + 90) / 54))


def test_a_checkpointed_forward_is_seen_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    found = nw.activations(Checkpointed(), (torch.randn(4, 3), torch.zeros(4, 3)), F.mse_loss)
    assert [(r.path, r.call) for r in found.calls] == [("inner", 0)]
    assert found.calls[0].gradient_rms > 0


@pytest.mark.parametrize("wrapped", [True, False], ids=["torch.compile", "Module.compile"])
def test_a_compiled_model_is_seen_uncompiled(wrapped: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(8, 4)
    compiled = torch.compile(model, backend="eager") if wrapped else model
    if not wrapped:
        model.compile(backend="eager")
    compiled(x)
    found = nw.activations(compiled, x)
    assert [r.path.removeprefix("_orig_mod.") for r in found.calls] == ["0", "1"]
    assert not nw.first_nonfinite(compiled, x, lambda y, _: y.sum()).found


def test_modes_and_a_weight_that_is_computed() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Dropout(0.5))
    x = torch.randn(64, 4)
    evaluated = nw.activations(model, x, mode="eval")
    assert [r.path for r in evaluated.calls] == ["0", "1"]
    assert evaluated.calls[1].rms == evaluated.calls[0].rms
    trained = nw.activations(model, x)
    assert trained.calls[1].rms > 1.1 * trained.calls[0].rms


@pytest.mark.parametrize("loss", [None, F.cross_entropy], ids=["forward", "backward"])
def test_it_leaves_no_trace(loss: object) -> None:
    model = ResNet()
    before = everything_of(model)
    found = nw.activations(model, labelled(), loss)
    assert everything_of(model) == before
    assert json.loads(found.to_json())["calls"][0]["path"] == "stem"

    def fail(output: Tensor, target: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nw.activations(model, labelled(), fail)
    assert everything_of(model) == before


def test_a_returned_parameter_keeps_no_hook() -> None:
    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = nn.Parameter(torch.randn(2, 3))

        def forward(self) -> Tensor:
            return self.prompt

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = Prompt()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.prompt()

    model = Net()
    nw.activations(model, torch.randn(2, 3), lambda y, _: y.sum())
    assert not model.prompt.prompt._backward_hooks


@pytest.mark.parametrize("name", ["RegNet", "Llama", "T5"])
def test_architectures(name: str) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model, batch = architecture.model(), architecture.batch()
    before = everything_of(model)
    found = nw.activations(model, batch)
    assert everything_of(model) == before
    assert all(r.rms > 0 and r.nonfinite == 0 for r in found.calls)
    called = [r for r in found.calls if r.weighted]
    assert len(called) >= 5


def test_what_it_refuses() -> None:
    with pytest.raises(DiagnosisError, match=r"^the loss has no gradient: it does not depend on the parameters"):
        nw.activations(nn.ReLU(), torch.randn(2, 2), lambda y, _: y.sum())
    with pytest.raises(DiagnosisError, match=r"^no module that is watched was called, or none returned a tensor of"):
        nw.activations(nn.Sequential(), [torch.arange(3)])


def test_the_line_it_says_and_its_figure() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sigmoid())
    found = nw.activations(model, torch.tensor([[-1.0, 1.0], [-3.0, 1.0]]))
    assert repr(found) == (
        "Activations: 2 activations in train mode: rms 0.626 (1) to 0.707 (0), 50 % of units dead, "
        "0 % of units saturated"
    )
    assert found.plot().data[0].y == (found.calls[0].rms, found.calls[1].rms)
