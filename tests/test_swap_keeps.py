"""A swap keeps whatever can be kept, says what is lost, and where it fails it has changed nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.places import places
from tests.test_adopt import everything
from tests.test_swap import quietly, refusal

TRAINED = (
    "swap: the weights were trained with other normalizations: train the model before you use it",
    ", and nw.recalibrate(model, batches) before it is evaluated sooner",
)


class Net(nn.Module):
    """Norms as children, under two names, in lists, tuples and dictionaries, and one with a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3)
        self.bn = nn.BatchNorm2d(12)
        self.same = self.bn
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12))])
        self.listed, self.paired = [nn.BatchNorm2d(12)], (nn.BatchNorm2d(12), "text")
        self.named = {"last": [nn.BatchNorm2d(10)]}
        self.head = nn.Conv2d(12, 10, 1)
        self.blocks[0][1].weight = self.bn.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.conv(x)) + self.bn(self.conv(x))
        x = self.paired[0](self.listed[0](self.blocks[0](x)))
        return self.named["last"][0](self.head(x))


PATHS = ("bn", "blocks.0.1", "listed[0]", "paired[0]", "named['last'][0]")


def norms(model: Any) -> list[Any]:
    return [model.bn, model.same, model.blocks[0][1], model.listed[0], model.paired[0], model.named["last"][0]]


def trained() -> Any:
    model = Net()
    for parameter in (p for norm in norms(model) for p in norm.parameters()):
        nn.init.normal_(parameter)
    y = model(torch.randn(4, 3, 7, 7))
    (y * torch.randn(y.shape)).sum().backward()
    return model


def snapshot(model: nn.Module) -> list[object]:
    """Every module, tensor, bit, flag and hook, and what stands in plain attributes."""
    held = [(place.path, place.module) for place in places(model)]
    parts: list[object] = [everything(model), [(path, id(module)) for path, module in held]]
    for _, module in held:
        tensors = [*module._parameters.values(), *module._buffers.values()]
        parts += [(id(t), t.detach().numpy().tobytes(), id(t.grad), t.requires_grad) for t in tensors if t is not None]
        parts += [list(vars(module)), list(module._modules), list(module._forward_hooks)]
    return parts


# ------------------------------------------------------------------------------------------------------- what is kept


def test_every_place_holds_the_new_layer_with_the_same_parameters() -> None:
    model = trained()
    old, random = norms(model), torch.get_rng_state()
    record = quietly(model, "batch", "group")
    new = norms(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert record.paths == PATHS
    assert [type(layer) for layer in new] == [nw.GroupNorm] * 6
    assert [layer.num_groups for layer in new] == [6, 6, 6, 6, 6, 5]
    assert model.same is model.bn
    assert model.paired[1] == "text"
    assert all(a.weight is b.weight and a.bias is b.bias for a, b in zip(new, old, strict=True))
    assert model.blocks[0][1].weight is model.bn.weight  # tied before
    assert [line.why for line in record.changed] == ["keeps gain, bias; also at same", *["keeps gain, bias"] * 4]
    assert record.notes == (TRAINED[0],)  # an optimizer lacks nothing


def test_undo_restores_every_bit_and_a_second_one_does_nothing() -> None:
    model = trained()
    before = snapshot(model)
    record = quietly(model, "batch", "group")
    assert snapshot(model) != before
    assert record.undo() is model
    assert snapshot(model) == before
    record.undo()
    assert snapshot(model) == before


def test_back_by_a_swap_gives_the_same_parameters_and_a_new_memory() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, eps=0.3))
    parameters = dict(model.named_parameters())
    model(torch.randn(4, 3, 5, 5))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    quietly(model, "batch", "group")
    nw.swap(model, "group", "batch")
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert list(model.state_dict()) == list(state)
    fresh = nw.BatchNorm(8).state_dict()
    for name, value in model.state_dict().items():
        kept = name.removeprefix("1.") not in ("running_mean", "running_var", "num_batches_tracked")
        assert torch.equal(value, state[name] if kept else fresh[name[2:]])
    assert model[1].eps == 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("word", ["group", "layer", "rms", "instance", "none"])
def test_dtype_is_kept(dtype: torch.dtype, word: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=word != "rms"), nn.LayerNorm(5, bias=False))
    record = nw.swap(model.to(dtype), ("batch", "layer"), word)
    assert record.model(torch.randn(2, 3, 5, 5, dtype=dtype)).dtype == dtype
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert nw.swap(nn.LayerNorm(4, dtype=dtype), "layer", "batch").model.running_var.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )


def test_a_memory_in_half_precision_is_widened() -> None:
    record = nw.swap(nn.BatchNorm2d(4).half(), "batch", lambda old: nw.BatchNorm(4))
    assert record.model.running_mean.dtype == torch.float32
    assert record.changed[0].why == "keeps gain, bias, memory"


def test_device_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)).to("meta")
    nw.swap(model, "batch", lambda old: nw.GroupNorm(2, 4))
    assert model[1].weight.device.type == "meta"


def test_mode_requires_grad_and_attributes_are_kept_but_not_settings() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4, bias=False)).train()
    model[1].eval(), model[1].weight.requires_grad_(False), model[2].requires_grad_(False)
    model[1].tag = tag = object()
    record = nw.swap(model, ("batch", "layer"), "group")
    first, second = model[1], model[2]
    assert (first.training, second.training, model.training) == (False, True, True)
    assert [p.requires_grad for p in (first.weight, first.bias)] == [False, True]
    assert [p.requires_grad for p in (second.weight, second.bias)] == [False, False]  # nothing in it was to learn
    assert first.tag is tag
    assert vars(first).keys() - {"tag"} == vars(nw.GroupNorm(2, 4)).keys()
    assert record.notes == ("an optimizer that was made before lacks new parameters: 2.bias",)


def test_hooks_go_on_and_their_handles_stay_valid() -> None:
    model, seen = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), list[object]()
    handle = model[1].register_forward_hook(lambda module, args, output: seen.append(module))
    model[1].register_forward_pre_hook(lambda module, args: seen.append("before"))
    record = nw.swap(model, "batch", "group")
    seen.clear()
    model(torch.randn(4, 3))
    assert seen == ["before", model[1]]
    handle.remove()
    model(torch.randn(4, 3))
    assert seen == ["before", model[1], "before"]
    record.undo()
    model(torch.randn(4, 3))
    assert seen[3:] == ["before"]


def test_hooks_that_the_new_layer_brings_are_kept() -> None:
    def make(old: Any) -> nn.Module:
        new = nw.GroupNorm(2, old.num_features)
        new.register_forward_hook(lambda module, args, output: output + 1)
        return new

    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(4, 3)
    nw.swap(model, "batch", make)
    torch.testing.assert_close(model(x), nw.GroupNorm(2, 4)(model[0](x)) + 1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].register_forward_hook(lambda module, args, output: None)
    before = snapshot(model)
    assert refusal(model, "batch", make) == (
        "1: the layer that is there and the function's both have forward_hooks: keep one's"
    )
    assert snapshot(model) == before


def test_a_layer_around_the_old_one_keeps_it() -> None:
    model, calls = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), list[int]()
    old = model[1]
    old.register_forward_hook(lambda module, args, output: calls.append(1))
    record = nw.swap(model, "batch", lambda layer: nn.Sequential(layer, nn.ReLU()))
    calls.clear()
    assert not any(module.training for module in model.modules())
    x = torch.randn(4, 3)
    assert torch.equal(model(x), old(model[0](x)).relu())
    assert calls == [1, 1]
    assert record.changed[0].why == "the layer itself is kept within"
    assert record.undo()[1] is old  # type: ignore[index]


def test_a_root_is_the_records_model() -> None:
    old = nn.BatchNorm2d(4)
    record = nw.swap(old, "batch", "group")
    assert isinstance(record.model, nw.GroupNorm)
    assert record.model.weight is old.weight
    assert record.undo() is old


def test_a_copy_leaves_the_model() -> None:
    model = trained()
    before = snapshot(model)
    record = quietly(model, "batch", "group", copy=True)
    assert snapshot(model) == before
    assert isinstance(record.model.bn, nw.GroupNorm)
    assert record.model.same is record.model.bn
    assert record.model.bn.weight is not model.bn.weight


def test_an_encoder_layer_does_not_compute_layer_norms_itself_any_more() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        record = nw.swap(model, "layer", "rms")
        y = model(x)
        torch.testing.assert_close(y.square().mean(-1), torch.ones(3, 5), atol=1e-4, rtol=0)
        assert y.mean(-1).abs().max() > 0.01
        record.undo()
        assert model(x).mean(-1).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------- what is lost


def test_what_an_optimizer_holds_in_vain_and_lacks() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4, bias=False))

    gone, lacks = ("an optimizer that was made before " + says for says in ("still holds", "lacks new"))
    assert nw.swap(model(), "batch", "none").notes == (f"{gone} parameters that are gone: 1.weight, 1.bias",)
    assert nw.swap(model(), "batch", "rms").notes == (f"{gone} parameters that are gone: 1.bias",)
    assert nw.swap(model(), "batch", "rms").changed[0].why == "keeps gain; without bias"
    assert nw.swap(model(), "batch", "none").changed[0].why == "without gain, bias"
    assert nw.swap(model(), "layer", "group").notes == (f"{lacks} parameters: 2.bias",)


def test_a_model_that_could_not_be_run_says_so() -> None:
    class Odd(nn.Sequential):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    record = nw.swap(Odd(nn.BatchNorm1d(4)), "batch", "group")
    assert record.notes == ("no input of the model was found, on which to see that it still runs: give a batch",)
    x = torch.randn(3, 4)
    forward = lambda model, batch: model(*batch)  # noqa: E731
    assert nw.swap(Odd(nn.BatchNorm1d(4)), "batch", "group", batch=(x, x), forward=forward).notes == ()


def test_an_input_that_was_found_may_be_too_small_but_not_a_given_one() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    (note,) = nw.swap(model, "batch", "instance", copy=True).notes
    assert note.startswith("an input that was found is too small now: 1: ")
    before = snapshot(model)
    text = refusal(model, "batch", "instance", batch=torch.randn(5, 3))
    assert text.startswith("swap: the model then fails: 1: ")
    assert text.endswith("; it is as it was")
    assert snapshot(model) == before


# ------------------------------------------------------------------------------------------------- where it fails


class Interrupting:
    """Gives new layers until it is asked once too often."""

    def __init__(self, error: BaseException, after: int) -> None:
        self.error, self.after = error, after

    def __call__(self, old: Any) -> nn.Module:
        self.after -= 1
        if self.after < 0:
            raise self.error
        return nw.GroupNorm(2, old.num_features)


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("after", [0, 3, 4])
def test_the_functions_own_exceptions_pass_and_change_nothing(error: BaseException, after: int) -> None:
    model = trained()
    before = snapshot(model)
    with pytest.raises(type(error)) as caught:
        nw.swap(model, "batch", Interrupting(error, after))
    assert caught.value is error
    assert snapshot(model) == before


def _again() -> Callable[[Any], nn.Module]:
    layer = nn.Identity()
    return lambda old: layer


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "groups that do not fit the last": (
        lambda model: "group:6",
        "named['last'][0]: 6 groups do not divide 10 features into two or more each; group counts that work: 1, 2, 5",
    ),
    "no module": (lambda model: lambda old: 3, "bn: the function gave 3, which is no module"),
    "a class": (lambda model: lambda old: nn.Identity, f"bn: the function gave {nn.Identity!r}, which is no module"),
    "a layer of ours that cannot be": (
        lambda model: lambda old: nw.Norm("[n c"),
        "bn: '[' is never closed\n  [n c\n  ^",
    ),
    "a layer of the model": (
        lambda model: lambda old: model.head,
        "bn: the function gave a layer that stands at head already, not a new one",
    ),
    "within another": (
        lambda model: lambda old: nn.Sequential(nn.Identity(), model.blocks[0]),
        "bn: the function gave a layer that stands at blocks.0 already, not a new one",
    ),
    "one for all": (
        lambda model: _again(),
        "blocks.0.1: the function gave a layer that stands at bn already, not a new one",
    ),
    "another width": (
        lambda model: lambda old: nw.GroupNorm(1, 7),
        "swap: the model then fails: bn: ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_changed(name: str) -> None:
    make, expected = REFUSED[name]
    model = trained()
    before = snapshot(model)
    assert refusal(model, "batch", make(model), batch=torch.randn(4, 3, 7, 7)).startswith(expected)
    assert snapshot(model) == before


# --------------------------------------------------------------------------------------------------------- the warning


def test_a_trained_model_needs_training() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.randn(8, 3))
    with pytest.warns(UserWarning, match="^swap: ") as caught:
        record = nw.swap(model, "batch", "layer", copy=True)
    assert [str(warning.message) for warning in caught] == [TRAINED[0]]
    assert caught[0].filename == __file__
    assert record.notes[-1] == TRAINED[0]


@pytest.mark.parametrize("root", [True, False])
def test_a_new_memory_needs_recalibration(root: bool) -> None:
    layer = nn.LayerNorm(4)
    nn.init.normal_(layer.weight)
    with pytest.warns(UserWarning, match="^swap: ") as caught:
        nw.swap(layer if root else nn.Sequential(nn.Linear(3, 4), layer), "layer", "batch")
    assert [str(warning.message) for warning in caught] == ["".join(TRAINED)]


def test_no_warning_where_nothing_was_learned_or_lost() -> None:
    assert nw.swap(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "batch", "group").notes == ()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.LayerNorm(4))
    model(torch.randn(8, 3))
    assert nw.swap(model, "layer", "rms", names="3", copy=True).changed  # the one that was trained is not meant
    record = nw.swap(model, "batch", lambda old: nw.BatchNorm(4, momentum=0.5))
    assert record.notes == ()
    assert record.changed[0].why == "keeps gain, bias, memory"
    assert int(model[1].num_batches_tracked) == 1
    assert not nw.swap(model, "batch", lambda old: old).changed


def test_one_channel_that_has_seen_a_batch_is_trained() -> None:
    model = nn.BatchNorm1d(1)
    model(torch.randn(8, 1, 5))
    with pytest.warns(UserWarning, match="train the model"):
        nw.swap(model, "batch", "instance")


def test_a_path_that_says_memory_does_not_hide_the_warning() -> None:
    model = nn.Module()
    model.norm = model.memory = nn.BatchNorm1d(4)
    model.norm(torch.randn(8, 4))
    with pytest.warns(UserWarning, match="train the model"):
        record = nw.swap(model, "batch", "group")
    assert record.changed[0].why == "keeps gain, bias; also at memory"
