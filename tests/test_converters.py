"""What layers of other libraries mean here: exactly what they compute, or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import normwise as nw
from normwise.surgery import converters
from normwise.surgery.kinds import kind_of
from tests import timm_like
from tests.catalogue import CASES, Case, randomize
from tests.tolerances import DOUBLE, MODEL_OUTPUTS, check

TORCHS = [case for case in CASES if type(case.twin()).__module__.startswith("torch.")]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(converters, "_registered", dict(converters._registered))
    return


def adopted(layer: nn.Module) -> tuple[nn.Module, str]:
    """What becomes of a layer, and why."""
    record = nw.adopt(layer)
    (line,) = record.changed + record.left
    return record.model, line.why


def assert_adopted(layer: nn.Module, x: Tensor) -> nn.Module:
    """The layer becomes one of ours and computes the same in both modes, in float64, memory included."""
    layer.double()
    x, start = x.double(), {name: value.clone() for name, value in layer.state_dict().items()}
    keys = list(layer.state_dict())
    expected = [layer.train(training)(x.clone()).detach() for training in (False, True)]
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.load_state_dict(start)
    ours, why = adopted(layer)
    assert why == "the same declaration, parameters and memory"
    assert isinstance(ours, nw.Norm)
    assert list(ours.state_dict()) == keys
    for training, y in zip((False, True), expected, strict=True):
        check(ours.train(training)(x.clone()).detach(), y, DOUBLE)
    for name, value in ours.state_dict().items():
        check(value, state[name], DOUBLE)
    return ours


@pytest.mark.parametrize("case", TORCHS, ids=str)
def test_torchs_layers_whatever_their_options(case: Case) -> None:
    _, twin = case.pair()
    assert type(assert_adopted(twin, torch.randn(case.shape) * 2 + 1)) is type(case.ours())


TIMM: dict[str, tuple[Callable[[], nn.Module], type[nn.Module] | None, tuple[int, ...]]] = {
    "BatchNormAct2d": (lambda: timm_like.BatchNormAct2d(6, act=nn.GELU()), nw.BatchNorm, (3, 6, 4, 5)),
    "BatchNormAct2d, average": (lambda: timm_like.BatchNormAct2d(6, 1e-3, None), nw.BatchNorm, (3, 6, 4, 5)),
    "GroupNormAct": (lambda: timm_like.GroupNormAct(6, 2, act=nn.SiLU()), nw.GroupNorm, (3, 6, 4, 5)),
    "LayerNormAct": (lambda: timm_like.LayerNormAct(6), nw.LayerNorm, (3, 5, 6)),
    "LayerNormAct2d": (lambda: timm_like.LayerNormAct2d(6, act=nn.Tanh()), nw.LayerNorm2d, (3, 6, 4, 5)),
    "RmsNormAct": (lambda: timm_like.RmsNormAct(6), nw.RMSNorm, (3, 5, 6)),
    "RmsNormAct2d": (lambda: timm_like.RmsNormAct2d(6, eps=0.1), nw.RMSNorm2d, (3, 6, 4, 5)),
    "GroupNorm": (lambda: timm_like.GroupNorm(6, 3), nw.GroupNorm, (3, 6, 4, 5)),
    "GroupNorm1": (lambda: timm_like.GroupNorm1(6), nw.GroupNorm, (3, 6, 4, 5)),
    "LayerNorm": (lambda: timm_like.LayerNorm(6), nw.LayerNorm, (3, 5, 6)),
    "LayerNorm, plain": (lambda: timm_like.LayerNorm(6, affine=False), nw.LayerNorm, (3, 5, 6)),
    "LayerNorm2d": (lambda: timm_like.LayerNorm2d(6), nw.LayerNorm2d, (3, 6, 4, 5)),
    "LayerNorm2dFp32": (lambda: timm_like.LayerNorm2dFp32(6), nw.LayerNorm2d, (3, 6, 4, 5)),
    "RmsNorm": (lambda: timm_like.RmsNorm(6), nw.RMSNorm, (3, 5, 6)),
    "RmsNorm, plain": (lambda: timm_like.RmsNorm(6, affine=False), nw.RMSNorm, (3, 5, 6)),
    "RmsNorm2d": (lambda: timm_like.RmsNorm2d(6), nw.RMSNorm2d, (3, 6, 4, 5)),
    "torchvision's LayerNorm2d": (lambda: timm_like.ConvNextLayerNorm2d(6), nw.LayerNorm2d, (3, 6, 4, 5)),
}


@pytest.mark.parametrize(("make", "kind", "shape"), TIMM.values(), ids=TIMM)
def test_timms_layers_by_name_and_attributes(
    make: Callable[[], nn.Module], kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    layer = make()
    randomize(layer)
    children = dict(layer.named_children())
    ours = assert_adopted(layer, torch.randn(shape) * 2 + 1)
    assert isinstance(ours, kind)
    assert dict(ours.named_children()) == children
    assert kind_of(ours).spec == kind_of(kind_of(layer).converted).spec


def test_a_frozen_batch_norm_is_known_and_folded_but_not_adopted_because_its_keys_are_others() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), timm_like.FrozenBatchNorm2d(6))
    randomize(model[1])
    assert [(found.kind, found.pattern) for found in nw.find(model)] == [("batch", "[n] c [...]")]
    assert nw.adopt(model).left[0].why == KEYS.format(
        "bias, running_mean, running_var, weight", f"bias, {MEMORY}, weight"
    )
    x = torch.randn(3, 3, 7, 8)
    before = model(x)
    assert nw.fold(model).paths == ("1",)
    torch.testing.assert_close(model(x), before)


def test_the_activation_keeps_its_own_mode() -> None:
    """A dropout that was put in evaluation by hand stays so, through adopt and undo."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), timm_like.BatchNormAct2d(6, drop=nn.Dropout(0.5)))
    model[1].drop.eval()
    record = nw.adopt(model)
    assert (model[1].training, model[1].drop.training, model[1].act.training) == (True, False, True)
    record.undo()
    assert (model[1].training, model[1].drop.training, model[1].act.training) == (True, False, True)


def test_dropout_and_activation_are_applied_in_that_order() -> None:
    layer = timm_like.BatchNormAct2d(6, act=nn.Softplus(), drop=nn.Dropout(0.5))
    randomize(layer)
    ours, _ = adopted(layer)
    assert ours.drop is layer.drop
    x = torch.randn(3, 6, 4, 5)
    torch.manual_seed(3)
    expected = layer.train()(x)
    torch.manual_seed(3)
    check(ours.train()(x), expected, MODEL_OUTPUTS)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.BatchNorm1d(6))


def parametrized() -> nn.Module:
    layer = nn.LayerNorm(6)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(6), dim=None)


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.BatchNorm1d(6), "weight", 0.5)


def replaced_forward() -> nn.Module:
    layer = nn.LayerNorm(6)
    layer.forward = lambda x: 2 * nn.LayerNorm.forward(layer, x)
    return layer


def no_bias() -> nn.Module:
    layer = nn.BatchNorm1d(6)
    layer.bias = None
    return layer


def more_state() -> nn.Module:
    layer = nn.BatchNorm1d(6)
    layer.register_buffer("calls", torch.zeros(()))
    return layer


def of_another_width() -> nn.Module:
    layer = nn.BatchNorm1d(8)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(layer, name).data = getattr(layer, name).data[:6]
    return layer


class Activated(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return super().forward(input).relu()


class Doubling:
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return 2 * super().forward(input)


class Mixed(Doubling, nn.LayerNorm):
    pass


class Called(nn.LayerNorm):
    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return super().__call__(input) + 1


class Scaling(nn.LayerNorm):
    @property
    def scale(self) -> float:
        return 2.0


class Helper:
    def halved(self) -> Tensor:
        return self.weight / 2


class Helped(nn.LayerNorm, Helper):
    """The model may call what the mixin adds, and ours would not have it."""


class OursAndMore(nw.LayerNorm):
    def forward(self, x: Tensor, **options: object) -> Tensor:
        return super().forward(x, **options) + 1


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.nn.quantized.BatchNorm2d(6)


SUBCLASS = "{} is a subclass that may do more; say what it means with nw.register_converter"
UNKNOWN = "nothing is known of {}; say what it means with nw.register_converter"
KEYS = "its state has the keys {}, and here it would have {}"
MEMORY = "num_batches_tracked, running_mean, running_var"
PARAMETRIZED = "its parameters are parametrized: torch.nn.utils.parametrize.remove_parametrizations first"

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an activation in forward": (lambda: Activated(6), SUBCLASS.format("Activated")),
    "a mixin that changes forward": (lambda: Mixed(6), SUBCLASS.format("Mixed")),
    "another __call__": (lambda: Called(6), SUBCLASS.format("Called")),
    "a property that others read": (lambda: Scaling(6), SUBCLASS.format("Scaling")),
    "methods of a mixin behind torch's class": (lambda: Helped(6), SUBCLASS.format("Helped")),
    "a subclass of ours": (lambda: OursAndMore(6), SUBCLASS.format("OursAndMore")),
    "forward replaced": (replaced_forward, "its forward was replaced on the layer itself, and may do more"),
    "parametrized": (parametrized, PARAMETRIZED),
    "weight norm": (weight_normed, PARAMETRIZED),
    "pruned": (
        pruned,
        KEYS.format(f"bias, {MEMORY}, weight_mask, weight_orig", f"bias, {MEMORY}, weight"),
    ),
    "lazy": (lambda: nn.LazyBatchNorm1d(), "its sizes are not known yet: run a batch through the model first"),
    "synchronized": (lambda: nn.SyncBatchNorm(6), "its statistics are those of several processes"),
    "synchronized, timm's": (
        lambda: timm_like.SyncBatchNormAct(6),
        "its statistics are those of several processes",
    ),
    "quantized": (quantized, "it is quantized"),
    "a weight without a bias": (no_bias, KEYS.format(f"{MEMORY}, weight", f"bias, {MEMORY}, weight")),
    "more state": (more_state, KEYS.format(f"bias, calls, {MEMORY}, weight", f"bias, {MEMORY}, weight")),
    "of another width than it says": (of_another_width, "its weight has shape (6,), where its settings say (8,)"),
    "local response": (lambda: nn.LocalResponseNorm(2), UNKNOWN.format("LocalResponseNorm")),
    "timm's SimpleNorm": (lambda: timm_like.SimpleNorm(6), UNKNOWN.format("SimpleNorm")),
    "a gate": (lambda: timm_like.GatedRMSNorm(6), UNKNOWN.format("GatedRMSNorm")),
    "an RMS norm with a bias": (lambda: timm_like.BiasedRMSNorm(6), UNKNOWN.format("BiasedRMSNorm")),
}


@pytest.mark.parametrize(("make", "why"), REFUSED.values(), ids=REFUSED)
def test_what_may_do_more_is_left_with_the_reason(make: Callable[[], nn.Module], why: str) -> None:
    model = nn.Sequential(make())
    layer = model[0]
    record = nw.adopt(model, forward=lambda model, batch: batch)
    assert not record.changed
    assert [(line.path, line.after, line.why) for line in record.left] == [("0", None, why)]
    assert model[0] is layer


def test_a_scripted_layer_is_left_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 6), scripted(), nn.LayerNorm(6))
    record = nw.adopt(model)
    assert record.paths == ("2",)
    assert [(line.path, line.why) for line in record.left] == [("1", "it is scripted")]


def test_torchs_forward_patched_for_all_shows_in_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, input: forward(self, input) * 1.01)  # noqa: A006
    _, why = adopted(nn.LayerNorm(6))
    assert why == "it computes something else than '... [d]' with its settings, in training"


class Plain(nn.BatchNorm1d):
    """A width of its own, and nothing else."""

    def __init__(self) -> None:
        super().__init__(6, eps=0.1)
        self.purpose = "features"

    def extra_repr(self) -> str:
        return "plain"


class Plainer(Plain):
    pass


@pytest.mark.parametrize("kind", [Plain, Plainer])
def test_a_subclass_that_adds_nothing_is_converted(kind: type[nn.Module]) -> None:
    ours = assert_adopted(kind(), torch.randn(7, 6))
    assert (ours.eps, ours.purpose) == (0.1, "features")


class Halved(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return super().forward(input) / 2


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("by", ["class", "name"])
def test_a_registered_converter_is_asked(by: str) -> None:
    class Layer(nw.LayerNorm):
        def forward(self, x: Tensor, **options: object) -> Tensor:
            return super().forward(x, **options) / 2

    nw.register_converter(Halved if by == "class" else f"{__name__}.Halved", lambda old: Layer(6))
    layer, x = Halved(6), torch.randn(4, 6)
    ours, why = adopted(layer)
    assert why == "the same declaration, parameters and memory"
    assert type(ours) is Layer
    assert ours.weight is layer.weight
    check(ours(x).detach(), layer(x).detach(), MODEL_OUTPUTS)


@pytest.mark.usefixtures("registry")
def test_a_registered_converter_that_is_wrong_is_not_believed() -> None:
    nw.register_converter(Halved, lambda old: nw.LayerNorm(6))
    layer = Halved(6)
    ours, why = adopted(layer)
    assert ours is layer
    assert why == "it computes something else than '... [d]' with its settings, in training"


@pytest.mark.usefixtures("registry")
def test_a_registered_converter_does_not_reach_subclasses() -> None:
    nw.register_converter(Halved, lambda old: nw.LayerNorm(6))

    class Quartered(Halved):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
            return super().forward(input) / 2

    assert adopted(Quartered(6))[1] == SUBCLASS.format("Quartered")


def test_what_a_converter_asks_a_layer_no_hook_hears() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layer, heard = LlamaRMSNorm(6), []
    layer.register_forward_hook(lambda module, args, output: heard.append(args))
    nw.find(layer, forward=lambda model, batch: batch)
    assert not heard


def test_a_gain_of_one_plus_the_weight_is_told_from_the_weight() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for weight in (0.0, 0.4, 1.0, -1.0):
        for layer, recovery in ((GemmaRMSNorm(6), nw.OffsetScale), (LlamaRMSNorm(6), nw.Scale)):
            nn.init.constant_(layer.weight, weight)
            kind = kind_of(layer)
            assert kind.name == "rms"
            assert type(kind.spec.recovery) is recovery
