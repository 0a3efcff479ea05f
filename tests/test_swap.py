"""Swapping makes the layer that was asked for, with the old gain and bias, or says why it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normwise as nw
from normwise.batches import feed, tensors_in
from normwise.errors import SurgeryError
from normwise.surgery import converters
from normwise.surgery.kinds import kind_of
from normwise.surgery.swap import features_of
from tests import timm_like
from tests.architectures import ARCHITECTURES, Architecture
from tests.tolerances import DOUBLE, check

CHANNELS = 6


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(converters, "_registered", dict(converters._registered))
    return


def quietly(model: nn.Module, *args: Any, **options: Any) -> nw.Record:
    """A swap of a trained model, whose warning is another test's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nw.swap(model, *args, **options)


def refusal(model: nn.Module, *args: Any, **options: Any) -> str:
    with pytest.raises(SurgeryError) as caught:
        nw.swap(model, *args, **options)
    return str(caught.value)


def disturbed(layer: nn.Module) -> Any:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.double()


# ----------------------------------------------------------------------------------------------- from each to each

OLD: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # and whether channels are last
    "BatchNorm2d": (lambda: nn.BatchNorm2d(CHANNELS, eps=0.2), False),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(CHANNELS, eps=0.2), False),
    "nw.BatchNorm": (lambda: nw.BatchNorm(CHANNELS, eps=0.2), False),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(CHANNELS, eps=0.2, affine=True), False),
    "GroupNorm": (lambda: nn.GroupNorm(1, CHANNELS, eps=0.2), False),
    "LayerNorm2d": (lambda: timm_like.LayerNorm2d(CHANNELS, eps=0.2), False),
    "LayerNorm": (lambda: nn.LayerNorm(CHANNELS, eps=0.2), True),
    "LayerNorm without bias": (lambda: nw.LayerNorm(CHANNELS, eps=0.2, bias=False), True),
    "RMSNorm": (lambda: nn.RMSNorm(CHANNELS, eps=0.2), True),
    "pattern": (lambda: nw.Norm("n t [c]", nw.Standardize(0.2), nw.Affine("c"), c=CHANNELS), True),
}
NEW: dict[str, Callable[[Tensor], Tensor]] = {  # channels first, in torch's words
    "batch": lambda x: F.batch_norm(x, None, None, training=True, eps=0.2),
    "group": lambda x: F.group_norm(x, 3, eps=0.2),
    "group:2": lambda x: F.group_norm(x, 2, eps=0.2),
    "instance": lambda x: F.instance_norm(x, eps=0.2),
    "layer": lambda x: F.layer_norm(x.movedim(1, -1), (CHANNELS,), eps=0.2).movedim(-1, 1),
    "rms": lambda x: F.rms_norm(x.movedim(1, -1), (CHANNELS,), eps=0.2).movedim(-1, 1),
    "none": lambda x: x,
}


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("word", NEW)
def test_the_new_layer_computes_what_its_name_says_with_the_old_gain_and_bias(old: str, word: str) -> None:
    make, last = OLD[old]
    layer = disturbed(make())
    kind = "batch" if isinstance(layer, nn.SyncBatchNorm) else kind_of(layer).name
    record = quietly(layer, type(layer), word)
    if word == kind:
        assert record.model is layer
        assert [line.why for line in record.left] == ["it stays what it is"]
        return
    x = torch.randn(4, CHANNELS, 5, dtype=torch.float64)
    if isinstance(layer, nn.InstanceNorm2d) or "2d" in old:
        x = x[..., None].expand(-1, -1, -1, 3) + torch.randn(3, dtype=torch.float64)
    expected = NEW[word](x)
    wide = (slice(None), *[None] * (x.dim() - 2))
    if word != "none":
        expected = expected * layer.weight[wide].detach()
    if word not in ("none", "rms") and getattr(layer, "bias", None) is not None:
        expected = expected + layer.bias[wide].detach()
    new = record.model
    y = new(x.movedim(1, -1)).movedim(-1, 1) if last else new(x)
    check(y.detach(), expected, DOUBLE)
    if word != "none":
        assert new.weight is layer.weight


CHANNELS_OF: dict[str, tuple[nw.Norm, tuple[int, int] | None]] = {
    "batch of 2-D": (nw.Norm("[n] c", recovery=nw.Affine("c"), c=4), (4, 1)),
    "steps, shared memory": (nw.Norm("[n] t c", memory=nw.Moving("c", decay=0.9), c=4), (4, -1)),
    "batch and steps": (nw.Norm("[n t] c", recovery=nw.Affine("c"), c=4), (4, -1)),
    "steps, own memory": (
        nw.Norm("[n] t c", recovery=nw.Affine("c"), memory=nw.Moving("t c", decay=0.9), t=2, c=4),
        None,
    ),
    "batch and steps, bare": (nw.Norm("[n t] c", c=4), None),
    "groups": (nw.Norm("n (g [k]) [...]", recovery=nw.Affine("(g k)"), g=2, k=3), (6, 1)),
    "groups, bare": (nw.Norm("n (g [k]) [...]", g=2, k=3), (6, 1)),
    "groups, last": (nw.Norm("n [...] (g [k])", g=2, k=3), (6, -1)),
    "groups without a size": (nw.Norm("n (g [k]) [...]", g=2), None),
    "features": (nw.Norm("... [d]", recovery=nw.Scale("d"), d=5), (5, -1)),
    "features, bare": (nw.Norm("... [d]", d=5), (5, -1)),
    "features first": (nw.Norm("n [c] ...", recovery=nw.Affine("c"), c=5), (5, 1)),
    "instance, bare": (nw.Norm("n c [...]", c=5), (5, 1)),
    "instance over time": (nw.Norm("n [t] c", recovery=nw.Affine("c"), c=5), (5, -1)),
    "several": (nw.Norm("n [c h w]", recovery=nw.Affine("c h w"), c=2, h=3, w=3), None),
    "whole examples": (nw.Norm("n [...]"), None),
    "in the middle": (nw.Norm("n a c [...]", recovery=nw.Affine("c"), a=2, c=5), None),
    "no size": (nw.Norm("... [d]"), None),
}


@pytest.mark.parametrize("name", CHANNELS_OF)
def test_the_channels_of_a_pattern_are_known_or_refused(name: str) -> None:
    norm, expected = CHANNELS_OF[name]
    kind = kind_of(norm)
    if expected is not None:
        assert features_of(kind) == expected
        return
    with pytest.raises(SurgeryError) as caught:
        features_of(kind)
    text = str(caught.value)
    unsized = name in ("groups without a size", "in the middle", "no size")
    assert text == f"'{norm.spec.text}' " + (
        "has no known number of channels on its second or last axis"
        if unsized
        else "has no single dimension that is known to be its channels"
    )
    assert refusal(nn.Sequential(norm), "other" if kind.name == "other" else kind.name, "none") == f"0: {text}"


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4, affine=False), nn.InstanceNorm2d(4), nw.Norm("... [d]", d=4)])
@pytest.mark.parametrize("word", ["group", "rms", "layer"])
def test_a_layer_without_parameters_becomes_one_without(layer: nn.Module, word: str) -> None:
    record = nw.swap(nn.Sequential(layer), type(layer), word)
    assert list(record.model.parameters()) == []
    if record.changed:
        assert record.changed[0].why == "it had no gain and no bias"


def test_gains_of_one_plus_the_weight_stay_the_same_gains() -> None:
    old = nw.Norm("... [d]", nw.RMS(), nw.OffsetScale("d"), d=4).double()
    nn.init.normal_(old.weight)
    x = torch.randn(3, 4, dtype=torch.float64)
    new = quietly(old, "rms", "layer").model
    check(new(x).detach(), F.layer_norm(x, (4,), 1 + old.weight.detach(), eps=new.eps), DOUBLE)
    again = quietly(new, "layer", lambda layer: nw.Norm("... [d]", nw.RMS(), nw.OffsetScale("d"), d=4)).model
    check(again(x).detach(), old(x).detach(), DOUBLE)
    twin = quietly(old, "rms", lambda layer: nw.Norm("... [d]", nw.L2(), nw.OffsetScale("d"), d=4)).model
    assert twin.weight is old.weight


def test_values_that_are_buffers_become_parameters_that_stay() -> None:
    old = timm_like.FrozenBatchNorm2d(4)
    old.weight.normal_(), old.bias.normal_()
    new = quietly(old, "batch", "group").model
    assert torch.equal(new.weight.detach(), old.weight)
    assert torch.equal(new.bias.detach(), old.bias)
    assert not any(parameter.requires_grad for parameter in new.parameters())


# ------------------------------------------------------------------------------------------------ real architectures


@pytest.mark.parametrize(
    ("architecture", "word"),
    [(a, "group" if "batch" in a.kinds else "batch") for a in ARCHITECTURES if a.name not in ("SegFormer", "Wav2Vec2")],
    ids=str,
)
def test_real_architectures_are_swapped_train_and_come_back(architecture: Architecture, word: str) -> None:
    model, batch = architecture.model(), architecture.batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (kind,) = architecture.kinds
    record = quietly(model, kind, word, batch=batch)
    assert len(record.changed) == architecture.kinds[kind]
    assert {kind_of(model.get_submodule(path)).name for path in record.paths} == {word}
    model.train()
    outputs = [y for y in tensors_in(feed(model, batch)) if y.requires_grad]
    sum((y * torch.randn(y.shape)).sum() for y in outputs).backward()  # type: ignore[union-attr]
    gradients = [model.get_submodule(path).weight.grad for path in record.paths]
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in gradients) > len(gradients) / 2
    if word == "batch":
        seen = [model.get_submodule(path).num_batches_tracked for path in record.paths]
        assert sum(int(count) > 0 for count in seen) > len(seen) / 2
    record.undo()
    assert {name: value.shape for name, value in model.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_swapped_model_learns() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    nw.swap(model, "batch", "group")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, target = torch.randn(16, 3, 8, 8), torch.arange(16) % 2
    losses, start = [], model[1].weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert not torch.equal(model[1].weight.detach(), start)


# ------------------------------------------------------------------------------------------------- with an activation


@pytest.mark.parametrize(
    "to", ["group", nw.GroupNorm, lambda old: nw.GroupNorm(3, CHANNELS)], ids=["word", "class", "f"]
)
def test_an_activation_within_the_layer_stays(to: object) -> None:
    old = disturbed(timm_like.BatchNormAct2d(CHANNELS, act=nn.Tanh(), drop=nn.Dropout(0.5))).eval()
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), old).double().eval()
    quietly(model, "batch", to)
    x = torch.randn(2, CHANNELS, 3, 3, dtype=torch.float64)
    check(model[1](x).detach(), F.group_norm(x, 3, old.weight, old.bias).tanh().detach(), DOUBLE)
    assert not any(module.training for module in model.modules())
    quietly(model, "group", "batch")
    model.train()
    with torch.no_grad():
        old.drop.p = 0.0
        expected = F.batch_norm(x, None, None, old.weight, old.bias, training=True).tanh()
    check(model[1](x).detach(), expected, DOUBLE)


def test_a_subclass_with_an_activation_is_refused_unless_it_is_registered(registry: None) -> None:
    class Acting(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
            return super().forward(input).relu()

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Acting(4))
    before = list(model)
    reason = "2: Acting is a subclass that may do more; say what it means with nw.register_converter"
    for what in ("batch", nn.BatchNorm2d, nw.BatchNorm, lambda layer: True):
        assert refusal(model, what, "group") == reason
        assert list(model) == before
    assert len(nw.swap(model, "batch", "group", names="1", copy=True).changed) == 1

    class Ours(nw.BatchNorm):
        def forward(self, input: Tensor, **options: Any) -> Any:  # noqa: A002 - torch's name
            return super().forward(input, **options).relu()

    nw.register_converter(Acting, lambda old: Ours(4))
    for what in (Acting, "batch", nw.BatchNorm):
        assert refusal(model, what, "group") == (
            "2: what its converter makes of it does more than normalize: give a function for what it becomes"
        )
        assert list(model) == before
    record = nw.swap(model, "other", lambda old: nn.Sequential(nw.GroupNorm(2, 4), nn.ReLU()))
    assert record.paths == ("2",)


# -------------------------------------------------------------------------------------------------- what, and to what


class Several(nn.Module):
    """One layer of every kind, under paths that name them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.first = nn.ModuleDict({"bn": nn.BatchNorm2d(4), "ours": nw.BatchNorm(4), "gn": nn.GroupNorm(2, 4)})
        self.inst, self.ln = nn.InstanceNorm2d(4), nn.LayerNorm(4)
        self.norms = [nn.RMSNorm(4), nn.RMSNorm(4)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for norm in (*self.first.values(), self.inst):
            x = norm(x)
        x = self.ln(x.mean((2, 3)))
        return self.norms[1](self.norms[0](x))


SWAPPED: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "a kind": ("batch", None, ("first.bn", "first.ours")),
    "our class is the kind": (nw.BatchNorm, None, ("first.bn", "first.ours")),
    "torch's class is itself": (nn.BatchNorm2d, None, ("first.bn",)),
    "several": (("group", nn.LayerNorm), None, ("first.gn", "ln")),
    "a list": (["instance", nw.RMSNorm], None, ("inst", "norms[0]", "norms[1]")),
    "a function": (lambda layer: getattr(layer, "num_features", 0) == 4, None, ("first.bn", "first.ours", "inst")),
    "names": ("batch", "first.o*", ("first.ours",)),
    "several names": (("batch", "group"), ["*.gn", "*n"], ("first.bn", "first.gn")),
    "a path in a list": ("rms", "norms[1]", ("norms[1]",)),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_what_is_meant(name: str) -> None:
    what, names, paths = SWAPPED[name]
    assert nw.swap(Several(), what, "none", names=names).paths == paths


def test_what_means_nothing_is_refused_with_what_is_there() -> None:
    there = (
        "first.bn (batch), first.ours (batch), first.gn (group), inst (instance), ln (layer), norms[0] (rms) and 1 more"
    )
    model = Several()
    assert refusal(model, "l2", "none") == f"no normalization is meant by 'l2'; there are: {there}"
    assert refusal(model, nn.Conv2d, "none") == f"no normalization is meant by Conv2d; there are: {there}"
    assert refusal(model, (nn.BatchNorm1d, "l2"), "none", names="conv") == (
        f"no normalization is meant by BatchNorm1d or 'l2' at conv; there are: {there}"
    )
    assert refusal(model, (), "none") == f"no normalization is meant by nothing; there are: {there}"
    assert refusal(model, "rms", "none", names=["a", "b.*"]).startswith(
        "no normalization is meant by 'rms' at a, b.*; there are: "
    )
    assert refusal(nn.Linear(2, 2), "batch", "group") == "no normalization is meant by 'batch'; there are: none"


def test_what_and_to_that_say_nothing_are_refused_before_anything_is_run() -> None:
    model = nn.Linear(2, 2)  # not even a normalization in it
    kinds = "there are batch, instance, group, layer, rms, l2, other"
    assert refusal(model, "bach", "none") == f"no kind of normalization is called 'bach'; {kinds}"
    assert refusal(model, [nn.LayerNorm, "Batch"], "none") == f"no kind of normalization is called 'Batch'; {kinds}"
    says = "means no layers: give a kind, a class, a function of a layer, or several of them"
    assert refusal(model, 3, "none") == f"3 {says}"
    assert refusal(model, nn.BatchNorm1d(2), "none").startswith("BatchNorm1d(2, eps=1e-05, ")
    words = "say one of 'none', 'rms', 'layer', 'group', 'instance', 'batch', or 'group:G'"
    assert refusal(model, "batch", "group:0") == f"no normalization is called 'group:0'; {words}"
    become = "is no layer to become: give a word, one of normwise's named classes, or a function"
    assert refusal(model, "batch", nn.GroupNorm) == f"{nn.GroupNorm!r} {become}"
    assert refusal(model, "batch", nw.GroupNorm(2, 4)) == f"GroupNorm(2, 4, eps=1e-05, affine=True) {become}"
    assert refusal(model, "batch", None) == f"None {become}"
    assert refusal("model", "batch", "none") == "a model is a torch.nn.Module, not str"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("to", "kind"),
    [(nw.GroupNorm, "group"), (nw.LayerNorm2d, "layer"), (nw.RMSNorm, "rms"), (nw.InstanceNorm, "instance")],
)
def test_our_classes_are_the_words(to: type[nn.Module], kind: str) -> None:
    model = nw.swap(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.BatchNorm2d, to).model
    assert kind_of(model[1]).name == kind
    assert isinstance(nw.swap(model, to, nn.Identity).model[1], nn.Identity)


@pytest.mark.parametrize("kind", [nw.RNN, nw.LSTM, nw.GRU])
def test_norms_of_a_recurrent_net_are_refused(kind: Any) -> None:
    model = nn.Sequential(nn.LayerNorm(3), kind(3, 4, norm=nw.Norm("... [c]", recovery=nw.Affine("c"))))
    norms = dict(model[1].norms)
    for to in ("rms", "group", "none", lambda old: nw.LayerNorm(old.spec.sizes[0][1])):
        assert refusal(model, nw.Norm, to) == (
            "1.norms.ih_l0: the recurrent net around it computes with it step by step: make a net with another norm="
        )
        assert dict(model[1].norms) == norms
    assert nw.swap(model, nn.LayerNorm, "rms", names="0").paths == ("0",)


def test_frozen_unsized_and_parametrized_layers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nw.BatchNorm(4))
    with nw.freeze(model):
        before = list(model)
        assert refusal(model, "batch", "group") == "1: it is frozen: nw.unfreeze first"
        assert list(model) == before
    assert nw.swap(model, "batch", "group").changed
    assert refusal(nn.Sequential(nn.LazyBatchNorm1d()), "batch", "group") == (
        "0: its sizes are not known yet: run a batch through the model first"
    )
    layer = nn.LayerNorm(4)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    assert refusal(nn.Sequential(layer), "layer", "rms") == (
        "0: its parameters are parametrized: torch.nn.utils.parametrize.remove_parametrizations first"
    )


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    model(torch.randn(8, 4))
    with pytest.raises(UserWarning, match=r"^swap: the weights were trained with other normalizations"):
        nw.swap(model, "batch", "group")
    assert type(model[1]) is nn.BatchNorm1d
