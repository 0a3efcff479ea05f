"""What is not exact is left as it is, with the reason; and whatever is done can be undone, or is not done at all."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import normwise as nw
from normwise import SurgeryError
from normwise.surgery import fold as folding
from normwise.surgery.proof import Proof
from tests import timm_like
from tests.test_adopt import everything, state
from tests.test_fold import Wired, check_same, folded, hugging_face, line, linear, lived, several, truth, wired
from tests.tolerances import MODEL_OUTPUTS

ROWS, TOKENS, IMAGES = (6, 8), (3, 5, 8), (2, 8, 6, 5)
OUT = "it is read by the model's output"
Build = Callable[[], nn.Module]


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class StandardizedWithin(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


def linear_bn(body: Callable[[Any, Tensor], Any], **more: Any) -> Build:
    return lambda: wired(body, c=linear(), b=nn.BatchNorm1d(8), **more)


def with_hook(path: str) -> Build:
    def build() -> nn.Module:
        model = line(nn.Sequential(linear()), nn.Dropout(), nn.BatchNorm1d(8))
        model.get_submodule(path).register_forward_hook(lambda *_: None)
        return model

    return build


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return line(nn.utils.weight_norm(linear()), nn.BatchNorm1d(8))


def pruned() -> nn.Module:
    model = line(linear(), nn.BatchNorm1d(8))
    prune.random_unstructured(model[0], "weight", 0.5)
    return model


def tied(called: bool) -> Build:
    def build() -> nn.Module:
        model = wired(
            lambda m, x: m.head(m.n(m.e(x))) if called else m.head(m.n(x)),
            e=nn.Embedding(8, 8), n=nn.LayerNorm(8), head=linear(bias=False),
        )  # fmt: skip
        model.head.weight = model.e.weight
        return model

    return build


def kept(m: Any, x: Tensor) -> Tensor:
    m.features = m.c(x)
    return m.b(m.features)


def with_domains() -> nn.Module:
    model = Wired(lambda m, x: m.b(m.c(x)), c=linear(), b=nw.BatchNorm(8))
    model(torch.randn(ROWS))
    with nw.domain(model, "night"):
        model(torch.randn(ROWS) * 3 + 1)
    return model.eval()


REFUSED: dict[str, tuple[Build, tuple[int, ...], dict[str, str]]] = {
    "another axis": (
        lambda: line(linear(), nn.BatchNorm1d(5)), TOKENS,
        {"1": f"0 before it has its channels along dimension 2, and it normalizes dimension 1; {OUT}"},
    ),
    "another axis of the same size": (
        lambda: line(linear(), nn.BatchNorm1d(8)), (3, 8, 8),
        {"1": f"0 before it has its channels along dimension 2, and it normalizes dimension 1; {OUT}"},
    ),
    "zeros around it": (
        lambda: line(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding="same")), IMAGES,
        {"0": "it reads an input of the model; 1 after it pads with zeros, to which the shift would not be added"},
    ),
    "zeros around it, from a layer": (
        lambda: line(nn.BatchNorm2d(8), nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3)), IMAGES,
        {"0": "it reads an input of the model; it is read by constant_pad_nd in 1"},
    ),
    "before a transposed convolution": (
        lambda: line(nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 3)), IMAGES,
        {"0": "it reads an input of the model; 1 after it reaches its edges with fewer taps, where the shift would "
              "count for less"},
    ),
    "a layer called twice": (
        linear_bn(lambda m, x: m.b(m.c(x)) + m.c(x)), ROWS,
        {"b": "c before it is also called elsewhere; it is read by add"},
    ),
    "a norm called on two layers": (
        lambda: wired(lambda m, x: m.b(m.c(x)) + m.b(m.d(x)), c=linear(), d=linear(), b=nn.BatchNorm1d(8)), ROWS,
        {"b": "several layers stand before it: c, d; it is read by add"},
    ),
    "read by another one too": (
        linear_bn(lambda m, x: (lambda y: m.b(y) + y)(m.c(x))), ROWS,
        {"b": "what it reads is also read by add; it is read by add"},
    ),
    "read by another one before": (
        linear_bn(lambda m, x: (lambda y: (y.sin(), m.b(y)))(m.c(x))), ROWS,
        {"b": f"what it reads is also read by sin; {OUT}"},
    ),
    "also returned": (
        linear_bn(lambda m, x: (lambda y: [{"y": y}, m.b(y)])(m.c(x))), ROWS,
        {"b": f"what it reads is also read by the model's output; {OUT}"},
    ),
    "changed in place": (
        linear_bn(lambda m, x: m.b(m.c(x).relu_())), ROWS,
        {"b": f"before it stands relu_, which is no linear layer; {OUT}"},
    ),
    "changed in place by a view": (
        linear_bn(lambda m, x: (lambda y: (y[:2].zero_(), m.b(y))[1])(m.c(x))), ROWS,
        {"b": f"what it reads is also read by slice; {OUT}"},
    ),
    "its weight in a penalty": (
        linear_bn(lambda m, x: (m.b(m.c(x)), m.c.weight.square().sum())), ROWS,
        {"b": f"a parameter of c is also read by pow; {OUT}"},
    ),
    "its gain in a penalty": (
        linear_bn(lambda m, x: (m.b(m.c(x)), m.b.weight.abs().sum())), ROWS,
        {"b": "a parameter of it is also read by abs"},
    ),
    "never reached": (linear_bn(lambda m, x: m.c(x)), ROWS, {"b": "no forward reached it"}),
    "a root": (lambda: lived(nn.BatchNorm2d(8)), IMAGES, {"BatchNorm2d": "it is the model itself"}),
    "a hook on the norm": (with_hook("2"), ROWS, {"2": "it has hooks"}),
    "a hook on the layer": (with_hook("0.0"), ROWS, {"2": f"0.0 has hooks, which would see other values; {OUT}"}),
    "parametrized": (
        lambda: line(parametrizations.weight_norm(linear()), nn.BatchNorm1d(8)), ROWS,
        {"1": f"before it stands 0, which is no linear layer; {OUT}"},
    ),
    "weight_norm of old": (old_weight_norm, ROWS, {"1": f"0 has hooks, which would see other values; {OUT}"}),
    "pruned": (pruned, ROWS, {"1": f"0 has hooks, which would see other values; {OUT}"}),
    "another forward": (
        lambda: line(Standardized(8, 4, 3), nn.BatchNorm2d(4)), IMAGES,
        {"1": f"before it stands 0, which is no linear layer; {OUT}"},
    ),
    "another way to convolve": (
        lambda: line(StandardizedWithin(8, 4, 3), nn.BatchNorm2d(4)), IMAGES,
        {"1": f"before it stands 0, which is no linear layer; {OUT}"},
    ),
    "tied weights": (
        tied(called=True), (),
        {"n": "a parameter of head is also read by e; it keeps a bias, which an RMS norm has not"},
    ),
    "an activation between": (
        lambda: line(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)), IMAGES,
        {"2": f"before it stands relu in 1, which is no linear layer; {OUT}"},
    ),
    "an activation of its own": (
        lambda: line(timm_like.BatchNormAct2d(8), nn.Conv2d(8, 8, 3)), IMAGES,
        {"0": "it reads an input of the model; it also applies an activation"},
    ),
    "a subclass": (
        lambda: line(linear(), type("Doubled", (nn.BatchNorm1d,), {"forward": lambda s, x: 2 * x})(8)), ROWS,
        {"1": "Doubled is a subclass that may do more; say what it means with nw.register_converter"},
    ),
    "a mask": (
        lambda: wired(lambda m, x: m.c(m.b(m.c(x), valid=x[..., 0] > 0)), c=linear(), b=nw.BatchNorm(8)), ROWS,
        {"b": "it is called with a mask, lengths, a gate or a residual"},
    ),
    "an LSTM": (
        lambda: wired(lambda m, x: m.b(m.r(m.b(x).mT.mT)[0]), b=nn.RMSNorm(8), r=nn.LSTM(8, 8)), TOKENS,
        {"b": "it is read by {} in r"},
    ),
    "attention": (
        lambda: wired(lambda m, x: (lambda y: m.a(y, y, y)[0])(m.n(x)), n=nn.LayerNorm(8),
                      a=nn.MultiheadAttention(8, 2)), TOKENS,
        {"n": "it is read by {} in a; it keeps a bias, which an RMS norm has not"},
    ),
    "sizes not known": (
        lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d()).eval(), ROWS,
        {"1": "its sizes are not known yet: run a batch through the model first"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "shape", "expected"), REFUSED.values(), ids=REFUSED)
def test_left_as_it_is(build: Build, shape: tuple[int, ...], expected: dict[str, str]) -> None:
    model, x = build(), torch.randn(shape) if shape else torch.randint(0, 8, (2, 3))
    modules, before = list(model.modules()), {name: bits(value) for name, value in model.state_dict().items()}
    record = nw.fold(model, x)
    assert not record.changed
    assert not record.proof
    left = {line.path: line.why for line in record.left}
    assert left.keys() == expected.keys()
    for path, why in expected.items():
        start, _, end = why.partition("{}")  # torch's own operation, which has another name on another machine
        assert left[path].startswith(start)
        assert left[path].endswith(end)
        assert end or left[path] == why
    assert {name: bits(value) for name, value in model.state_dict().items()} == before
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


def bits(tensor: Tensor) -> object:
    return None if nn.parameter.is_lazy(tensor) else tensor.numpy().tobytes()


def test_a_layer_of_unknown_sizes_still_does_not_know_them() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d()).eval()
    nw.fold(model, torch.randn(ROWS))
    assert model[0].has_uninitialized_params()
    assert model[1].has_uninitialized_params()


# ------------------------------------------------------------- what a forward does not show, or shows only in its way


def assert_fold_changes_nothing(model: nn.Module, x: Tensor) -> None:
    modules, before = list(model.modules()), state(model)
    assert nw.fold(model, x).paths == ()
    assert state(model) == before
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("path", ["0", "1"])
def test_a_hook_on_what_holds_the_layer_sees_its_outputs(path: str) -> None:
    assert_fold_changes_nothing(with_hook(path)(), torch.randn(ROWS))


def test_what_is_kept_for_later_is_read() -> None:
    assert_fold_changes_nothing(linear_bn(kept)(), torch.randn(ROWS))


def test_weights_that_are_tied_to_a_layer_which_this_forward_does_not_reach() -> None:
    assert_fold_changes_nothing(tied(called=False)(), torch.randn(TOKENS))


def test_what_is_in_the_attributes_of_an_output_is_read() -> None:
    assert_fold_changes_nothing(
        linear_bn(lambda m, x: (lambda y: SimpleNamespace(features=y, logits=m.b(y)))(m.c(x)))(), torch.randn(ROWS)
    )


NOTHING_TO_COMPARE = {"none": lambda y: None, "an array": lambda y: y.numpy(), "NaN": lambda y: y * torch.nan}


@pytest.mark.parametrize("make", NOTHING_TO_COMPARE.values(), ids=NOTHING_TO_COMPARE)
def test_an_output_without_finite_numbers_proves_nothing(make: Any) -> None:
    model = linear_bn(lambda m, x: make(m.b(m.c(x)).detach()))()
    x, before = torch.randn(ROWS), everything(model)
    with pytest.raises(SurgeryError, match=r"^fold: what the model returns holds no finite numbers"):
        nw.fold(model, x)
    assert everything(model) == before


def test_every_domain_keeps_its_numbers() -> None:
    model, x = with_domains(), torch.randn(ROWS)
    with nw.domain(model, "night"):
        expected = model(x).detach()
    nw.fold(model, x)
    with nw.domain(model, "night"):
        check_same(model(x), expected, MODEL_OUTPUTS)


def changed_after_it(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = m.b(x)
    x.add_(1)
    return m.c(y) + x


INEXACT: dict[str, tuple[Build, tuple[int, ...]]] = {
    "InstanceNorm of one signal": (
        lambda: line(linear(), nn.InstanceNorm1d(8, affine=True, track_running_stats=True)), (8, 8)
    ),
    "InstanceNorm of one signal, before": (lambda: line(nn.InstanceNorm1d(5, affine=True), linear()), (5, 8)),
    "its input is changed after it": (linear_bn(changed_after_it), ROWS),
    "its memory is read": (linear_bn(lambda m, x: m.b(m.c(x)) + m.b.running_mean), ROWS),
}  # fmt: skip


@pytest.mark.parametrize(("build", "shape"), INEXACT.values(), ids=INEXACT)
def test_what_is_not_exact_does_not_keep_the_rest_from_being_folded(build: Build, shape: tuple[int, ...]) -> None:
    rest = line(linear(), nn.BatchNorm1d(8))
    model, x = Wired(lambda m, x: (m.inner(x), m.rest(x.reshape(-1, 8))), inner=build(), rest=rest), torch.randn(shape)
    expected = [output.detach() for output in copy.deepcopy(model).double()(x.double())]
    record = nw.fold(model.eval(), x)
    assert "rest.1" in record.paths
    for output, exact in zip(model(x), expected, strict=True):
        check_same(output, exact, MODEL_OUTPUTS)


def test_a_bias_that_a_layer_cannot_do_without() -> None:
    model = wired(lambda m, x: m.b(m.c(x).mT), c=hugging_face(), b=nn.InstanceNorm1d(8))
    folded(model, torch.randn(TOKENS))
    assert not nw.fold(model, torch.randn(TOKENS)).changed


# ------------------------------------------------------------------------------------------------ all of it, or nothing


FAILING: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "its eps is read": (
        lambda m, x: m.b(m.c(x)) + m.b.eps,
        "fold: the model then fails on given: 'Identity' object has no attribute 'eps'; everything is as it was",
    ),
    "its output is changed, which is expanded": (
        lambda m, x: m.b(m.c(x)[:, :, None].expand(-1, -1, 3)).relu_(),
        "fold: the model then fails on given: unsupported operation: more than one element of the written-to tensor "
        "refers to a single memory location. Please clone() the tensor before performing the operation.; everything is "
        "as it was",
    ),
    "another way, on another batch": (
        lambda m, x: m.c(x) if x.mean() > 10 else m.b(m.c(x)),
        "fold: the model then computes something else, by {} on a mean of 30 (allowed: 1e-04); everything is as it was",
    ),
}


@pytest.mark.parametrize(("body", "message"), FAILING.values(), ids=FAILING)
def test_what_fails_afterwards_is_undone(body: Callable[[Any, Tensor], Any], message: str) -> None:
    model = linear_bn(body)()
    before = everything(model)
    with pytest.raises(SurgeryError) as raised:
        nw.fold(model, torch.randn(ROWS))
    start, _, end = message.partition("{}")
    assert str(raised.value).startswith(start)
    assert str(raised.value).endswith(end or start)
    assert everything(model) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("at", range(4))
def test_an_exception_anywhere_leaves_every_bit(
    at: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = several(), torch.randn(IMAGES)
    before, calls = everything(model), []

    def interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            calls.append(function)
            if len(calls) > at:
                raise error
            return result

        return call

    monkeypatch.setattr(folding, "_carry_out", interrupted(folding._carry_out))
    monkeypatch.setattr(folding, "centre", interrupted(folding.centre))
    monkeypatch.setattr(Proof, "check", interrupted(Proof.check))
    with pytest.raises(error):
        nw.fold(model, x)
    assert len(calls) == at + 1
    assert everything(model) == before


def test_undo_gives_back_the_very_same_objects() -> None:
    model, x = several().to(memory_format=torch.channels_last), torch.randn(IMAGES)
    before, strides = everything(model), [p.stride() for p in model.parameters()]
    record = nw.fold(model, x)
    assert record.paths == ("1", "3")
    assert everything(model) != before
    assert record.undo() is model
    assert everything(model) == before
    assert [p.stride() for p in model.parameters()] == strides
    assert record.undo() is model
    assert everything(model) == before


def test_a_copy_leaves_the_original_as_it_is() -> None:
    model, x = several(), torch.randn(IMAGES)
    before, expected = everything(model), truth(model, x)
    record = nw.fold(model, x, copy=True)
    assert everything(model) == before
    assert type(record.model[1]) is nn.Identity
    check_same(record.model(x), expected, MODEL_OUTPUTS)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in record.model.parameters()}
