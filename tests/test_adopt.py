"""Adopting changes the class of a normalization, and nothing else: not a bit, not a hook, not an optimizer's step."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from tests.architectures import disturb
from tests.tolerances import MODEL_GRADIENTS, MODEL_OUTPUTS, VALUES, check


class Net(nn.Module):
    """One normalization of every kind, one that is called twice, one that stands under two names, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)) for _ in range(2)])
        self.again = self.blocks[0][1]
        self.norms = nn.ModuleDict({"in": nn.InstanceNorm2d(8, affine=True, track_running_stats=True)})
        self.ln, self.rms = nn.LayerNorm(8, bias=False), nn.RMSNorm(8)
        self.twice, self.plain = nn.BatchNorm1d(8, momentum=None), nn.BatchNorm1d(8, affine=False)
        self.rms.weight = self.ln.weight
        self.bare = nn.LayerNorm(8, eps=0.1, elementwise_affine=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        x = x.relu() + self.blocks[0](x)
        x = x + self.again(self.blocks[1](x))
        x = self.norms["in"](x).relu().mean((2, 3))
        x = self.twice(self.rms(self.ln(x)))
        return self.head(self.bare(self.plain(self.twice(x).sigmoid())))


def net() -> Net:
    torch.manual_seed(1)
    model = Net()
    disturb(model)
    return model


def images(rows: int = 6) -> Tensor:
    return torch.randn(rows, 3, 9, 8)


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: bytes(value.reshape(-1).view(torch.uint8).tolist()) for name, value in model.state_dict().items()}


def everything(model: nn.Module) -> list[object]:
    """What must be as it was: objects by identity, values by bytes."""
    parts: list[object] = [state(model)]
    for path, module in model.named_modules(remove_duplicate=False):
        parts += [path, id(module), module.training, {k: id(v) for k, v in module.__dict__.items() if k[0] != "_"}]
        parts += [{name: id(tensor) for name, tensor in (module._parameters | module._buffers).items()}]
        parts += [{k: list(v) for k, v in module.__dict__.items() if "hook" in k and isinstance(v, dict)}]
    return parts


def linear_bn(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    y = model(images())
    loss = (y * torch.randn(y.shape)).sum() + y.square().sum()
    loss.backward()
    optimizer.step()
    return loss.detach()


# ------------------------------------------------------------------------------------------------------- what is kept


def test_keys_objects_and_sharing_are_kept() -> None:
    model = net()
    keys, tensors = list(model.state_dict()), dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    record = nw.adopt(model)
    assert not record.left
    assert record.model is model
    assert list(model.state_dict()) == keys
    assert all(tensor is tensors[name] for name, tensor in model.named_parameters(remove_duplicate=False))
    assert all(tensor is buffers[name] for name, tensor in model.named_buffers())
    assert model.again is model.blocks[0][1]
    assert model.rms.weight is model.ln.weight
    assert type(model.twice) is nw.BatchNorm
    assert record.paths == (
        "bn", "blocks.0.1", "blocks.1.1", "norms.in", "ln", "rms", "twice", "plain", "bare",
    )  # fmt: skip
    assert record.changed[1].why == "the same declaration, parameters and memory; also at again"
    assert not record.notes  # no optimizer has lost anything


@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_and_memory_are_those_of_the_original(training: bool) -> None:
    model = net().train(training)
    record = nw.adopt(model, copy=True)
    ours, x = record.model, images()
    y, y_ours = model(x), ours(x)
    check(y_ours, y, MODEL_OUTPUTS)
    cotangent = torch.randn(y.shape)
    y.backward(cotangent)
    y_ours.backward(cotangent)
    for (name, one), other in zip(model.named_parameters(), ours.parameters(), strict=True):
        scale = one.grad.abs().max().clamp_min(0.1)
        check(other.grad / scale, one.grad / scale, MODEL_GRADIENTS), name
    for one, other in zip(model.buffers(), ours.buffers(), strict=True):
        check(other, one, MODEL_OUTPUTS)


def test_ten_steps_of_training_after_adopting_are_those_of_the_original() -> None:
    """The optimizer was made before, and has run: its momenta belong to the same parameters afterwards."""
    model = net()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-3) for m in (model, twin)]
    for seed in range(3):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            step(m, optimizer, seed)
    assert state(model) == state(twin)
    nw.adopt(model)
    for seed in range(3, 13):
        losses = [step(m, optimizer, seed) for m, optimizer in zip((model, twin), optimizers, strict=True)]
        check(losses[0] / losses[1], torch.ones(()), MODEL_GRADIENTS)
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        check(one.double(), other.double(), MODEL_GRADIENTS)


def test_checkpoints_load_strictly_both_ways() -> None:
    original, adopted = net(), nw.adopt(net()).model
    disturb(original)
    adopted.load_state_dict(original.state_dict(), strict=True)
    assert state(adopted) == state(original)
    disturb(adopted)
    original.load_state_dict(adopted.state_dict(), strict=True)
    assert state(adopted) == state(original)


def test_modes_gradients_flags_and_attributes_are_kept() -> None:
    model = net()
    model.bn.eval()
    model.ln.weight.requires_grad_(False)
    model.bn.weight.tag, model.bn.note, model.bn.weight.grad = "gain", {"why": 1}, torch.randn(8)
    note, gradient = model.bn.note, model.bn.weight.grad
    before = [(module.training, path) for path, module in model.named_modules()]
    nw.adopt(model)
    assert [(module.training, path) for path, module in model.named_modules()] == before
    assert not model.ln.weight.requires_grad
    assert model.bn.weight.tag == "gain"
    assert model.bn.note is note
    assert model.bn.weight.grad is gradient


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept_except_that_memory_is_widened(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(2, 6))
    disturb(model.to(dtype))
    before, mean = state(model), model[1].running_mean
    record = nw.adopt(model)
    assert not record.left
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model[1].running_mean.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(model[1].running_mean, mean.to(model[1].running_mean.dtype))
    assert model.eval()(torch.randn(5, 8, dtype=dtype)).dtype == dtype
    record.undo()
    assert model[1].running_mean is mean
    assert state(model) == before


def test_a_model_without_data_is_adopted_too() -> None:
    model = linear_bn().to("meta")
    record = nw.adopt(model)
    assert record.paths == ("1",)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_what_hangs_on_a_layer_need_not_be_copyable() -> None:
    model = linear_bn()
    model[1].lock = lock = threading.Lock()
    model[1].register_forward_hook(lambda layer, args, output: setattr(layer, "last", output))
    model(torch.randn(5, 4))
    last = model[1].last
    assert last.grad_fn is not None
    assert nw.adopt(model).paths == ("1",)
    assert model[1].lock is lock
    assert isinstance(model[1], nw.BatchNorm)


def test_what_a_layer_holds_beside_its_state_is_not_lost() -> None:
    """A child without state, and a buffer that is not saved: kept, or the layer is left."""
    model = linear_bn()
    model[1].act = nn.ReLU()
    model[1].register_buffer("scale", torch.full((), 2.0), persistent=False)
    act = model[1].act
    nw.adopt(model)
    assert model[1].act is act
    assert model[1].scale == 2


def test_plain_lists_and_attributes_are_reached_and_left_untouched_by_the_proof() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)
            self.norms = [nn.BatchNorm1d(6), (nn.LayerNorm(6),)]

        def forward(self, x: Tensor) -> Tensor:
            return self.norms[1][0](self.norms[0](self.linear(x)))

    model = Hidden()
    hidden = model.norms[0]
    before = state(hidden)
    record = nw.adopt(model)
    assert record.paths == ("norms[0]", "norms[1][0]")
    assert [type(norm) for norm in (model.norms[0], model.norms[1][0])] == [nw.BatchNorm, nw.LayerNorm]
    assert state(model.norms[0]) == before
    assert state(hidden) == before


# -------------------------------------------------------------------------------------------------------------- hooks


def test_hooks_go_on_and_their_handles_remove_them() -> None:
    model, heard = linear_bn(), []
    layer = model[1]

    def note(name: str) -> Callable[..., None]:
        return lambda module, *_: heard.append((name, type(module).__name__))

    handles = [
        layer.register_forward_pre_hook(note("before")),
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: note("before, keywords")(module), with_kwargs=True
        ),
        layer.register_forward_hook(note("after")),
        layer.register_forward_hook(note("always"), always_call=True),
        layer.register_full_backward_pre_hook(note("backward, before")),
        layer.register_full_backward_hook(note("backward")),
        layer.register_state_dict_post_hook(note("saved")),
        layer.register_load_state_dict_post_hook(note("loaded")),
    ]
    names = ["before", "before, keywords", "after", "always", "backward, before", "backward", "saved", "loaded"]

    def used() -> list[tuple[str, str]]:
        heard.clear()
        y = model(torch.randn(5, 4))
        (y * torch.randn(y.shape)).sum().backward()
        model.load_state_dict(model.state_dict())
        return list(heard)

    assert used() == [(name, "BatchNorm1d") for name in names]
    record = nw.adopt(model)
    assert used() == [(name, "BatchNorm") for name in names]
    handles.pop(2).remove()
    assert [name for name, _ in used()] == [name for name in names if name != "after"]
    record.undo()
    assert used() == [(name, "BatchNorm1d") for name in names if name != "after"]
    for handle in handles:
        handle.remove()
    assert used() == []


def test_hooks_hear_nothing_of_the_comparison_of_single_layers() -> None:
    model, shapes = linear_bn(), []
    model[1].register_forward_hook(lambda layer, args, output: shapes.append(args[0].shape[1:]))
    nw.adopt(model, torch.randn(7, 4))
    assert set(shapes) == {(6,)}  # those of the model's own forwards


def test_a_hook_that_changes_the_output_goes_on_changing_it() -> None:
    model = linear_bn()
    model[1].register_forward_hook(lambda layer, args, output: output * 3)
    x = torch.randn(5, 4)
    expected = model.eval()(x)
    nw.adopt(model)
    check(model(x), expected, MODEL_OUTPUTS)


def test_a_backward_hook_gets_the_gradients_of_the_whole_layer() -> None:
    model, got = linear_bn(), []
    model[1].register_full_backward_hook(lambda layer, d_input, d_output: got.append((d_input[0], d_output[0])))
    x, cotangent = torch.randn(5, 4), torch.randn(5, 6)
    model(x).backward(cotangent)
    nw.adopt(model)
    model(x).backward(cotangent)
    for one, other in zip(*got, strict=True):
        check(other, one, VALUES)
