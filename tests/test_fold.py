"""What is folded computes the same, against the original in float64; nothing else of the model changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise import SurgeryError
from normwise.batches import feed, tensors_in
from tests import timm_like
from tests.architectures import ARCHITECTURES, Architecture
from tests.tolerances import DOUBLE, MODEL_OUTPUTS, Tolerance, check

Body = Callable[[Any, Tensor], Any]


class Wired(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, body: Body, **layers: Any) -> None:
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


@torch.no_grad()
def lived(model: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation, with gains of both signs and of 0, and with variances from 1e-10 to 1e10."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if name.endswith("running_var"):
            tensor.copy_(drawn(tensor).exp())
            tensor[1:3] = torch.tensor([1e-10, 1e10][: len(tensor[1:3])])
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.copy_(drawn(tensor))
            tensor[:1] *= not name.endswith("weight")
    return model.eval()


def wired(body: Body, **layers: Any) -> nn.Module:
    return lived(Wired(body, **layers))


def line(*layers: nn.Module) -> nn.Module:
    return lived(nn.Sequential(*layers))


def truth(model: nn.Module, x: Tensor) -> Tensor:
    """The original in float64, with torch's own operations."""
    return copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x).detach()


def check_same(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    """As parts of the largest output, where that is above 1."""
    scale = expected.abs().max().clamp_min(1.0)
    check(actual.detach().double() / scale, expected.double() / scale, tolerance)


def folded(model: nn.Module, x: Tensor, **options: Any) -> nw.Record:
    """Folded, and the same to 1e-5 in float32 or 1e-10 in float64."""
    expected = truth(model, x)
    record = nw.fold(model, x, **options)
    check_same(model(x), expected, DOUBLE if x.dtype == torch.float64 else MODEL_OUTPUTS)
    return record


def changes(record: nw.Record) -> list[tuple[str, str]]:
    return [(line.path, line.why) for line in record.changed]


# ------------------------------------------------------------------------------- BatchNorm into every layer before it

CONV: dict[tuple[bool, int], tuple[type[nn.Module], Callable[..., Tensor]]] = {
    (False, 1): (nn.Conv1d, F.conv1d),
    (False, 2): (nn.Conv2d, F.conv2d),
    (False, 3): (nn.Conv3d, F.conv3d),
    (True, 1): (nn.ConvTranspose1d, F.conv_transpose1d),
    (True, 2): (nn.ConvTranspose2d, F.conv_transpose2d),
    (True, 3): (nn.ConvTranspose3d, F.conv_transpose3d),
}
BN = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def normalized(y: Tensor, bn: nn.Module) -> Tensor:
    """The formula, in float64."""
    parts = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    mean, variance, gain, bias = (p.detach().double().reshape(-1, *[1] * (y.dim() - 2)) for p in parts)
    return (y - mean) / (variance + bn.eps).sqrt() * gain + bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("transposed", "dims"), CONV)
def test_batch_norm_into_a_convolution(transposed: bool, dims: int, groups: int, bias: bool) -> None:
    make, function = CONV[transposed, dims]
    options: dict[str, Any] = {"stride": 2, "padding": 1, "groups": groups}
    options |= {"output_padding": 1} if transposed else {}
    bn = BN[dims](8, eps=1e-3)
    model = line(make(4, 8, 3, bias=bias, **options), bn)
    conv, x = model[0], torch.randn(3, 4, *[5] * dims)
    own = None if conv.bias is None else conv.bias.detach().double()
    expected = normalized(function(x.double(), conv.weight.detach().double(), own, **options), bn)
    record = nw.fold(model, x)
    assert changes(record) == [("1", "into 0 before it")]
    assert type(model[1]) is nn.Identity
    assert not record.left
    check_same(model(x), expected, MODEL_OUTPUTS)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_into_a_linear_layer(bias: bool, eps: float, affine: bool) -> None:
    model, x = line(nn.Linear(4, 6, bias=bias), nn.BatchNorm1d(6, eps, affine=affine)), torch.randn(9, 4)
    assert changes(folded(model, x)) == [("1", "into 0 before it")]
    assert type(model[1]) is nn.Identity


# --------------------------------------------------------------------------------------------- by data flow, any shape


def linear(width: int = 8, out: int = 8, **options: Any) -> nn.Linear:
    return nn.Linear(width, out, **options)


def hugging_face(width: int = 8) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(width, width)


def gemma() -> nn.Module:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    return GemmaRMSNorm(8)


def offset() -> nn.Module:
    return nw.Norm("... [d]", nw.RMS(1e-6), nw.OffsetScale("d"), d=8)


def padded(mode: str, padding: int | str = 1) -> Callable[[], nn.Module]:
    return lambda: line(nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=padding, padding_mode=mode, groups=2))


def named_twice() -> nn.Module:
    model = wired(lambda m, x: m.b(m.c(x)), c=linear(), b=nn.BatchNorm1d(8))
    model.again = model.b
    return model


def frozen() -> nn.Module:
    model = line(nn.Conv2d(8, 4, 3), nw.BatchNorm(4)).train()
    nw.freeze(model)
    return model


ROWS, TOKENS, IMAGES = (6, 8), (3, 5, 8), (2, 8, 6, 5)
GAIN = "its gain into {} after it"
FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[str, str]]]] = {
    "conv, BN, ReLU": (
        lambda: line(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), IMAGES, [("1", "into 0 before it")]
    ),
    "conv, BN, conv": (
        lambda: line(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), IMAGES,
        [("1", "into 0 before it")],
    ),
    "BN, BN": (
        lambda: line(linear(), nn.BatchNorm1d(8), nn.BatchNorm1d(8)), ROWS,
        [("1", "into 0 before it"), ("2", "into 0 before it")],
    ),
    "BN on either side": (
        lambda: line(nn.BatchNorm1d(8), linear(), nn.BatchNorm1d(8)), ROWS,
        [("0", "into 1 after it"), ("2", "into 1 before it")],
    ),
    "nested": (
        lambda: line(nn.Sequential(nn.Sequential(linear())), nn.Dropout(0.5), nn.Sequential(nn.BatchNorm1d(8))), ROWS,
        [("2.0", "into 0.0.0 before it")],
    ),
    "conv, flatten, BN": (
        lambda: line(nn.Conv2d(8, 4, 3), nn.Flatten(2), nn.BatchNorm1d(4)), IMAGES, [("2", "into 0 before it")]
    ),
    "conv, permute, reshape, BN": (
        lambda: wired(lambda m, x: m.b(m.c(x).permute(0, 2, 3, 1).reshape(-1, 8)), c=nn.Conv2d(8, 8, 3),
                      b=nn.BatchNorm1d(8)), IMAGES, [("b", "into c before it")],
    ),
    "linear, transpose, BN": (
        lambda: wired(lambda m, x: m.b(m.c(x).mT), c=linear(), b=nn.BatchNorm1d(8)), TOKENS, [("b", "into c before it")]
    ),
    "linear, one token, BN": (
        lambda: wired(lambda m, x: m.b(m.c(x)[:, 0]), c=linear(), b=nn.BatchNorm1d(8)), TOKENS,
        [("b", "into c before it")],
    ),
    "as many tokens as features": (
        lambda: wired(lambda m, x: m.b(m.c(x).transpose(1, 2)), c=linear(), b=nn.BatchNorm1d(8)), (8, 8, 8),
        [("b", "into c before it")],
    ),
    "BN, flatten, linear": (
        lambda: line(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), linear()), IMAGES,
        [("1", "into 3 after it")],
    ),
    "BN, several layers": (
        lambda: wired(lambda m, x: (lambda y: m.c(y) * m.d(y))(m.b(x)), c=linear(), d=linear(bias=False),
                      b=nn.BatchNorm1d(8)), ROWS, [("b", "into c, d after it")],
    ),
    "BN before valid padding": (padded("zeros", "valid"), IMAGES, [("0", "into 1 after it")]),
    "BN before reflected padding": (padded("reflect"), IMAGES, [("0", "into 1 after it")]),
    "BN before replicated padding": (padded("replicate"), IMAGES, [("0", "into 1 after it")]),
    "BN before circular padding": (padded("circular", "same"), IMAGES, [("0", "into 1 after it")]),
    "a gain without a bias before zeros": (
        lambda: line(nw.LayerNorm2d(8, bias=False), nn.Conv2d(8, 5, 3, padding=1)), IMAGES, [("0", GAIN.format("1"))]
    ),
    "BN before a transposed convolution of size 1": (
        lambda: line(nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 6, 1, groups=2)), IMAGES, [("0", "into 1 after it")]
    ),
    "called together": (
        lambda: wired(lambda m, x: m.b(m.c(x)) * m.b(m.c(x + 1)), c=linear(), b=nn.BatchNorm1d(8)), ROWS,
        [("b", "into c before it")],
    ),
    "under two names": (named_twice, ROWS, [("b", "into c before it")]),
    "checkpointed": (
        lambda: wired(lambda m, x: checkpoint(lambda z: m.b(m.c(z)), x, use_reentrant=False), c=linear(),
                      b=nn.BatchNorm1d(8)), ROWS, [("b", "into c before it")],
    ),
    "frozen, in training": (frozen, IMAGES, [("1", "into 0 before it")]),
    "FrozenBatchNorm2d": (
        lambda: line(nn.Conv2d(8, 4, 3), timm_like.FrozenBatchNorm2d(4)), IMAGES, [("1", "into 0 before it")]
    ),
    "InstanceNorm with a memory": (
        lambda: line(nn.Conv2d(8, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), IMAGES,
        [("1", "into 0 before it")],
    ),
    "Conv1D, BN": (
        lambda: wired(lambda m, x: m.b(m.c(x).mT), c=hugging_face(), b=nn.BatchNorm1d(8)), TOKENS,
        [("b", "into c before it")],
    ),
    "LN, Conv1D": (lambda: line(nn.LayerNorm(8), hugging_face()), TOKENS, [("0", GAIN.format("1"))]),
    "LN, several layers": (
        lambda: wired(lambda m, x: (lambda y: m.q(y) @ m.k(y).mT @ m.v(y))(m.n(x)), n=nn.LayerNorm(8), q=linear(),
                      k=linear(bias=False), v=linear()), TOKENS, [("n", GAIN.format("q, k, v"))],
    ),
    "LN, one token, head": (
        lambda: wired(lambda m, x: m.c(m.n(x)[:, 0]), n=nn.LayerNorm(8), c=linear(out=3)), TOKENS,
        [("n", GAIN.format("c"))],
    ),
    "LN, permute, conv": (
        lambda: wired(lambda m, x: m.c(m.n(x).permute(0, 2, 1)), n=nn.LayerNorm(8), c=nn.Conv1d(8, 3, 2)), TOKENS,
        [("n", GAIN.format("c"))],
    ),
    "LN2d, conv": (lambda: line(timm_like.LayerNorm2d(8), nn.Conv2d(8, 6, 2)), IMAGES, [("0", GAIN.format("1"))]),
    "RMS": (lambda: line(nn.RMSNorm(8), linear(bias=False)), TOKENS, [("0", GAIN.format("1"))]),
    "a gain of 1 + weight": (lambda: line(offset(), linear(bias=False)), TOKENS, [("0", GAIN.format("1"))]),
    "GroupNorm": (
        lambda: line(nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular", groups=2)), IMAGES,
        [("0", GAIN.format("1"))],
    ),
    "InstanceNorm": (
        lambda: line(nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 6, 3)), IMAGES, [("0", GAIN.format("1"))]
    ),
    "a low-rank addition": (
        lambda: wired(lambda m, x: (lambda y: m.base(y) + m.up(m.down(y)))(m.n(x)), n=nn.LayerNorm(8), base=linear(),
                      down=linear(out=2, bias=False), up=linear(2, bias=False)), TOKENS,
        [("n", GAIN.format("base, down"))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("build", "shape", "expected"), FOLDED.values(), ids=FOLDED)
def test_folded(
    build: Callable[[], nn.Module], shape: tuple[int, ...], expected: list[tuple[str, str]], dtype: torch.dtype
) -> None:
    model, x = build().to(dtype), torch.randn(shape, dtype=dtype)
    record = folded(model, x)
    assert changes(record) == expected
    assert not record.left
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    assert not norms
    again = nw.fold(model, x)
    assert not again.changed


def test_layers_in_a_plain_list() -> None:
    layers = line(linear(), nn.BatchNorm1d(8))
    model, x = Wired(lambda m, x: m.layers[1](m.layers[0](x))).eval(), torch.randn(ROWS)
    model.layers = list(layers)
    expected = truth(layers, x)
    assert changes(nw.fold(model, x)) == [("layers[1]", "into layers[0] before it")]
    check_same(model(x), expected, MODEL_OUTPUTS)
    assert type(model.layers[1]) is nn.Identity


def test_a_gain_that_was_folded_is_one() -> None:
    model = line(nn.LayerNorm(8), linear())
    weight, bias = model[0].weight, model[0].bias
    folded(model, torch.randn(TOKENS))
    assert model[0].weight is weight
    assert model[0].bias is bias
    assert (weight == 1).all()
    assert (bias == 0).all()


def test_the_weight_of_a_gain_of_one_plus_weight_becomes_zero() -> None:
    model = line(gemma(), linear())
    assert changes(folded(model, torch.randn(TOKENS))) == [("0", GAIN.format("1"))]
    assert (model[0].weight == 0).all()


def test_the_activation_of_a_batch_norm_stays() -> None:
    act = nn.PReLU(4, 0.3)
    model = line(nn.Conv2d(8, 4, 3), timm_like.BatchNormAct2d(4, act=act))
    record = folded(model, torch.randn(IMAGES))
    assert changes(record) == [("1", "into 0 before it")]
    assert model[1].act is act
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.act.weight"]


# ------------------------------------------------------------------------------------------------------------- steps


def several() -> nn.Module:
    return line(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LayerNorm(96), linear(96))


@pytest.mark.parametrize(
    ("steps", "paths"),
    [("statistics", ("1",)), (("gain",), ("3",)), (["bias"], ("1",)), ((), ()), (("gain", "statistics"), ("1", "3"))],
)
def test_only_the_steps_that_are_wanted(steps: Any, paths: tuple[str, ...]) -> None:
    record = folded(several(), torch.randn(IMAGES), steps=steps)
    assert record.paths == paths


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(SurgeryError) as error:
        nw.fold(several(), steps=("gain", "gains"))
    assert str(error.value) == "fold knows the steps statistics, gain, bias, center, not 'gains'"


# --------------------------------------------------------------------------------------------------- real architectures


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_real_architectures(architecture: Architecture) -> None:
    model, batch = architecture.model(), architecture.batch()
    before, objects = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    expected = [t.double() for t in tensors_in(feed(copy.deepcopy(model), batch)) if t.is_floating_point()]
    record = nw.fold(model, batch)
    outputs = [t for t in tensors_in(feed(model, batch)) if t.is_floating_point()]
    for output, exact in zip(outputs, expected, strict=True):
        check_same(output, exact.detach(), MODEL_OUTPUTS)
    batch_norms = [layer for layer in model.modules() if isinstance(layer, _NormBase)]
    assert not batch_norms
    assert len({line.path for line in (*record.changed, *record.left)}) == sum(architecture.kinds.values())
    assert record.changed or architecture.name in {"BERT", "Wav2Vec2"}  # a sum after each of their norms reads it
    record.undo()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(one is other for one, other in zip(objects, model.modules(), strict=True))
