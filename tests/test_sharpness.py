"""The Hessian's ends against a dense Hessian, and what sharpness says where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

import normwise as nw
from normwise.diagnose.sharpness import Sharpness, sharpness
from normwise.errors import DiagnosisError

Batch = tuple[Tensor, Tensor]


def net(norm: Callable[[int], nn.Module], activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Two hidden layers of 6, with a norm behind each, whose memory and scales have seen some data."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Linear(4, 6), norm(6), activation(), nn.Linear(6, 6), norm(6), activation(), nn.Linear(6, 3)
    )
    model(2 * torch.randn(32, 4) + 1)
    return model


def batches(rows: Sequence[int] = (12, 5, 20), *, labels: bool = True) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator)
    return [(draw(n, 4), torch.arange(n) % 3 if labels else draw(n, 3)) for n in rows]


def value(
    model: nn.Module, given: Sequence[Batch], loss: Callable[..., Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    """The mean loss over all rows, as a function of the parameters alone; buffers are copied, so that none moves."""
    names = [name for name, _ in model.named_parameters()]
    total = torch.zeros(())
    for inputs, targets in given:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        output = functional_call(model, {**dict(zip(names, parameters, strict=True)), **buffers}, inputs)
        total = total + len(inputs) * loss(output, targets)
    return total / sum(len(inputs) for inputs, _ in given)


def dense(model: nn.Module, given: Sequence[Batch], loss: Callable[..., Tensor], mode: str) -> Tensor:
    """The whole Hessian, by torch."""
    before = model.training
    model.train(mode == "train")
    parameters = tuple(p.detach() for p in model.parameters())
    blocks = hessian(lambda *w: value(model, given, loss, w), parameters)
    model.train(before)
    rows = [
        torch.cat([block.reshape(p.numel(), q.numel()) for block, q in zip(row, parameters, strict=True)], dim=1)
        for row, p in zip(blocks, parameters, strict=True)
    ]
    return torch.cat(rows).double()


def gradient(model: nn.Module, given: Sequence[Batch], loss: Callable[..., Tensor], mode: str) -> Tensor:
    before = model.training
    model.train(mode == "train")
    found = torch.autograd.grad(value(model, given, loss, tuple(model.parameters())), tuple(model.parameters()))
    model.train(before)
    return torch.cat([part.reshape(-1) for part in found]).double()


NORMS = {"nw.BatchNorm": nw.BatchNorm, "torch BN": nn.BatchNorm1d, "LN": nn.LayerNorm, "none": lambda n: nn.Identity()}
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
every_mode = pytest.mark.parametrize("mode", ["train", "eval"])
every_loss = pytest.mark.parametrize(("loss", "labels"), [(cross_entropy, True), (mse_loss, False)], ids=["CE", "MSE"])


@every_norm
@every_mode
@every_loss
def test_both_ends_agree_with_the_dense_hessian(
    norm: Callable[[int], nn.Module], mode: Any, loss: Callable[..., Tensor], labels: bool
) -> None:
    model, given = net(norm), batches(labels=labels)
    exact = torch.linalg.eigvalsh(dense(model, given, loss, mode))
    found = sharpness(model, given, loss, mode=mode)
    assert (found.method, found.converged, found.mode) == ("exact", True, mode)
    assert found.largest.value == pytest.approx(float(exact[-1]), rel=0.01)
    assert found.smallest.value == pytest.approx(float(exact[0]), rel=0.01, abs=1e-5 * float(exact[-1]))
    for end in (found.largest, found.smallest):
        assert float((exact - end.value).abs().min()) <= end.bound + 1e-5 * float(exact.abs().max())


@every_norm
@every_mode
def test_along_the_gradient_and_batch_sharpness_by_hand(norm: Callable[[int], nn.Module], mode: Any) -> None:
    model, given = net(norm), batches()

    def along(part: Sequence[Batch]) -> float:
        g, matrix = gradient(model, part, cross_entropy, mode), dense(model, part, cross_entropy, mode)
        return float(g @ matrix @ g / (g @ g))

    found = sharpness(model, given, cross_entropy, mode=mode)
    each = torch.tensor([along([batch]) for batch in given], dtype=torch.float64)
    assert found.along_gradient == pytest.approx(along(given), rel=1e-4)
    assert found.batch == pytest.approx(float(each.mean()), rel=1e-4)
    assert found.batch_error == pytest.approx(float(each.std() / math.sqrt(3)), rel=1e-3)
    assert found.batches == 3
    assert found.gradient_norm == pytest.approx(float(gradient(model, given, cross_entropy, mode).norm()), rel=1e-4)
    squares = [float(p.detach().square().sum()) for p in model.parameters() if p.ndim == 2]
    assert found.weight_norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_one_batch_has_no_standard_error() -> None:
    found = sharpness(net(nn.BatchNorm1d), batches((9,))[0], cross_entropy)
    assert (found.batches, found.batch_error) == (1, None)
    assert found.batch == pytest.approx(found.along_gradient)


@every_norm
def test_blocks_of_single_modules(norm: Callable[[int], nn.Module]) -> None:
    model, given = net(norm), batches()
    matrix = dense(model, given, cross_entropy, "train")
    found = sharpness(model, given, cross_entropy, modules=True)
    paths = [path for path, module in model.named_modules() if list(module.parameters(recurse=False))]
    assert list(found.modules) == paths
    at = 0
    for path in paths:
        size = sum(p.numel() for p in model.get_submodule(path).parameters(recurse=False))
        exact = torch.linalg.eigvalsh(matrix[at : at + size, at : at + size])
        top, bottom = found.modules[path]
        assert top.value == pytest.approx(float(exact[-1]), rel=0.01, abs=1e-6)
        assert bottom.value == pytest.approx(float(exact[0]), rel=0.01, abs=1e-5 * float(exact.abs().max()) + 1e-6)
        at += size
    assert [row["path"] for row in found.rows()] == ["", *paths]


def test_some_modules_by_their_paths() -> None:
    model, given = net(nn.LayerNorm), batches()
    assert list(sharpness(model, given, cross_entropy, modules=["[03]", "6"]).modules) == ["0", "3", "6"]
    with pytest.raises(DiagnosisError) as caught:
        sharpness(model, given, cross_entropy, modules=["layer*"])
    assert str(caught.value) == ("modules: 'layer*' matches no module with parameters of its own that are trained")


def test_frozen_parameters_take_no_part() -> None:
    model, given = net(nn.BatchNorm1d), batches()
    for layer in model[:5]:
        layer.requires_grad_(False)
    size = sum(p.numel() for p in model[6].parameters())
    exact = torch.linalg.eigvalsh(dense(model, given, cross_entropy, "train")[-size:, -size:])
    found = sharpness(model, given, cross_entropy, modules=True)
    assert found.largest.value == pytest.approx(float(exact[-1]), rel=0.01)
    assert list(found.modules) == ["6"]


def negative_end() -> tuple[nn.Module, list[Batch]]:
    """A network with batch normalization whose most negative curvature is larger than its most positive."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    with torch.no_grad():
        model[0].weight.mul_(0.15)
        model[2].weight.mul_(3)
    x = torch.randn(16, 4)
    return model, [(x, torch.full((16, 1), 1.0))]


def disagreeing(output: Tensor, target: Tensor) -> Tensor:
    """Concave in the output, as where a logit is far on the wrong side."""
    return torch.log1p((output - target).square()).mean()


def test_power_iteration_would_have_answered_with_the_negative_end() -> None:
    model, given = negative_end()
    exact = torch.linalg.eigvalsh(matrix := dense(model, given, disagreeing, "train"))
    assert -float(exact[0]) > 1.2 * float(exact[-1]) > 0
    vector = torch.randn(len(matrix), dtype=torch.float64)
    for _ in range(2000):
        vector = matrix @ vector / (matrix @ vector).norm()
    assert float(vector @ matrix @ vector) == pytest.approx(float(exact[0]), rel=1e-3)
    found = sharpness(model, given, disagreeing)
    assert found.largest.value == pytest.approx(float(exact[-1]), rel=0.01)
    assert found.smallest.value == pytest.approx(float(exact[0]), rel=0.01)


def test_training_and_evaluation_have_other_curvatures() -> None:
    model, given = net(nw.BatchNorm), batches()
    train, evaluation = (sharpness(model, given, cross_entropy, mode=mode).largest.value for mode in ("train", "eval"))
    assert abs(train / evaluation - 1) > 0.1
    plain = net(nn.LayerNorm)
    train, evaluation = (sharpness(plain, given, cross_entropy, mode=mode).largest.value for mode in ("train", "eval"))
    assert train == evaluation


def test_curvature_falls_with_the_square_of_the_weights_behind_a_norm() -> None:
    model, given = net(nn.BatchNorm1d), batches()
    model[1].eps = model[4].eps = 1e-12
    before = sharpness(model, given, cross_entropy, modules=["0"])
    with torch.no_grad():
        model[0].weight.mul_(10)
    after = sharpness(model, given, cross_entropy, modules=["0"])
    assert after.modules["0"][0].value == pytest.approx(before.modules["0"][0].value / 100, rel=0.02)
    assert after.weight_norm > before.weight_norm


# ---------------------------------------------------------------------------------------------- no second derivative


class Halfway(torch.autograd.Function):
    """x³, whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent


class Cube(nn.Module):
    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        return x**3 if self.twice else Halfway.apply(x)


def cubic(*, twice: bool) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), Cube(twice=twice), nn.Linear(5, 3))


def test_differences_where_there_is_no_second_derivative() -> None:
    given = batches(labels=False)
    exact, found = (sharpness(cubic(twice=twice), given, mse_loss) for twice in (True, False))
    assert (exact.method, exact.why) == ("exact", "")
    assert found.method == "differences"
    assert found.why == "trying to differentiate twice a function that was marked with @once_differentiable"
    assert_close(found, exact)


def test_exact_refuses_where_there_is_none() -> None:
    with pytest.raises(DiagnosisError) as caught:
        sharpness(cubic(twice=False), batches(labels=False), mse_loss, method="exact")
    assert str(caught.value) == (
        "there is no second derivative: "
        "trying to differentiate twice a function that was marked with @once_differentiable"
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2).mean(1))


def test_the_flash_kernel_of_attention_has_no_second_derivative() -> None:
    torch.manual_seed(2)
    model, batch = Attention(), (torch.randn(6, 5, 8), torch.arange(6) % 3)
    found = sharpness(model, batch, cross_entropy)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        exact = sharpness(model, batch, cross_entropy)
    assert (found.method, exact.method) == ("differences", "exact")
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in found.why
    assert_close(found, exact)


@every_norm
@every_mode
def test_differences_agree_with_second_derivatives(norm: Callable[[int], nn.Module], mode: Any) -> None:
    model, given = net(norm), batches()
    assert_close(*(sharpness(model, given, cross_entropy, mode=mode, method=m) for m in ("differences", "exact")))


def assert_close(found: Sharpness, exact: Sharpness) -> None:
    scale = exact.largest.value
    assert found.largest.value == pytest.approx(exact.largest.value, rel=0.01)
    assert found.smallest.value == pytest.approx(exact.smallest.value, rel=0.02, abs=2e-3 * scale)
    assert found.along_gradient == pytest.approx(exact.along_gradient, rel=0.01)


# ------------------------------------------------------------------------------------------- what does not disturb it


def test_dropout_and_memory_do_not_make_two_calls_differ() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 16), nw.BatchNorm(16), nn.Dropout(), nn.Tanh(), nn.Linear(16, 3))
    first, again = (sharpness(model, batches(), cross_entropy) for _ in range(2))
    assert first == again
    torch.rand(1)
    assert sharpness(model, batches(), cross_entropy) != first  # other units are dropped


def test_double_precision() -> None:
    model = net(nn.BatchNorm1d).double()
    given = [(x.double(), y) for x, y in batches()]
    exact = torch.linalg.eigvalsh(dense(model, given, cross_entropy, "train"))
    found = sharpness(model, given, cross_entropy, tolerance=1e-9)
    assert found.largest.value == pytest.approx(float(exact[-1]), rel=1e-7)


def test_a_loss_that_is_linear_is_flat() -> None:
    model = nn.Linear(3, 1)
    found = sharpness(model, torch.ones(4, 3), lambda output, _: output.mean())
    assert (found.largest.value, found.smallest.value, found.along_gradient, found.stable_lr) == (0.0, 0.0, 0.0, None)
    assert "learning rates" not in found.meaning


def test_at_a_minimum_there_is_no_direction() -> None:
    model, x = nn.Linear(2, 1, bias=False), torch.randn(8, 2)
    found = sharpness(model, (x, model(x).detach()), mse_loss)
    assert (found.along_gradient, found.batch, found.gradient_norm) == (None, None, 0.0)
    assert found.largest.value > 0


def test_the_meaning() -> None:
    model, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0]]))
    found = sharpness(model, (x, torch.zeros(2, 1)), mse_loss)
    assert found.meaning.startswith("largest eigenvalue 9 ± ")
    assert found.meaning.endswith(
        " in train mode, gᵀHg/gᵀg 9, ‖W‖ 1; a quadratic of that curvature bears learning rates up to 0.222"
    )
    short = sharpness(net(nn.LayerNorm), batches(), cross_entropy, most=2)
    assert not short.converged
    assert short.meaning.endswith("; the bounds are wider than asked for: allow more products")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "power"}, "method='power': it is one of auto, exact, differences"),
    "mode": ({"mode": "test"}, "mode='test': it is 'train', 'eval' or 'current', which leaves every module in its own"),
    "none": ({"batches": []}, "there are no batches to measure with"),
    "iterator": (
        {"batches": iter([])},
        "batches is a list_iterator, whose batches would be lost: give a list, or the loader itself",
    ),
    "number": ({"batches": 3}, "batches is a int: give a batch, a list of batches or a loader"),
    "no loss": (
        {"loss": None},
        "the model's output, of shape (12, 3), has no loss in it: give loss=, called as loss(output, target)",
    ),
    "many": (
        {"loss": partial(cross_entropy, reduction="none")},
        "the loss is a tensor of shape (12,), and has to be one number",
    ),
    "detached": (
        {"loss": lambda output, target: cross_entropy(output.detach(), target)},
        "the loss has no gradient: it does not depend on the parameters, or was detached",
    ),
    "not finite": (
        {"loss": lambda output, target: output.sum() * math.nan},
        "a Hessian-vector product is not finite: nw.first_nonfinite tells where it begins",
    ),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DiagnosisError) as caught:
        sharpness(net(nn.LayerNorm), **{"batches": batches(), "loss": cross_entropy, **given})
    assert str(caught.value) == message


def test_models_that_cannot_be_measured() -> None:
    frozen = net(nn.LayerNorm).requires_grad_(False)
    with pytest.raises(DiagnosisError) as caught:
        sharpness(frozen, batches(), cross_entropy)
    assert str(caught.value) == "no parameter requires a gradient, so the loss is a function of nothing"
    with pytest.raises(DiagnosisError) as caught:
        sharpness(nn.Sequential(nn.LazyLinear(3)), batches(), cross_entropy)
    assert str(caught.value) == "0.weight has no size yet: run a batch through the model first"


# ------------------------------------------------------------------------------------------------------ huge gradients


@pytest.mark.parametrize("size", [1e18, 1e25])
def test_a_huge_gradient_does_not_overflow_the_product(size: float) -> None:
    """The loss is size * (w - 1)² for each of two weights: second derivative 2 * size whatever the gradient."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    found = nw.sharpness(model, torch.eye(2), lambda output, _: size * (output - 1).square().sum())
    assert size < found.gradient_norm < 10 * size
    assert found.along_gradient == pytest.approx(2 * size)
    assert found.largest.value == pytest.approx(2 * size)
