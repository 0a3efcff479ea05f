"""Real architectures with random weights: every norm is seen, and adopting it changes nothing but its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.batches import feed, tensors_in
from normwise.untouched import seed, untouched
from tests.architectures import ARCHITECTURES, Architecture
from tests.tolerances import MODEL_GRADIENTS, MODEL_OUTPUTS, check

TORCHS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
NO_EQUAL = {"Gemma": (5, "Norm"), "ConvNeXt": (4, "LayerNorm2d")}  # gains of 1 + weight, and channels first
every = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)


@contextmanager
def repeated() -> Iterator[None]:
    """The same random numbers each time, for dropout."""
    with untouched(nn.Module()):
        seed(7)
        yield


def computed(model: nn.Module, batch: object) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What comes out, and every parameter's gradient for a random cotangent."""
    model.zero_grad()
    with repeated():
        outputs = [output for output in tensors_in(feed(model, batch)) if output.requires_grad]
    torch.manual_seed(11)
    torch.stack([(output * torch.randn(output.shape)).sum() for output in outputs]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [output.detach() for output in outputs], gradients


def assert_same(before: tuple[list[Tensor], dict[str, Tensor]], after: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    """Outputs relative to the largest one; gradients too, because one that is zero in exact arithmetic is noise."""
    (outputs, gradients), (outputs_after, gradients_after) = before, after
    assert outputs
    for one, other in zip(outputs, outputs_after, strict=True):
        scale = one.abs().max().clamp_min(1.0)
        check(other / scale, one / scale, MODEL_OUTPUTS)
    assert gradients.keys() == gradients_after.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert largest > 0.1  # there is something to compare
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp_min(1e-3 * largest)
        check(gradients_after[name] / scale, gradient / scale, MODEL_GRADIENTS)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy(force=True).tobytes() for name, value in model.state_dict().items()}


@every
def test_every_normalization_is_found_and_called(architecture: Architecture) -> None:
    model = architecture.model()
    before = bits(model)
    found = nw.find(model, architecture.batch())
    assert Counter(norm.kind for norm in found) == architecture.kinds
    assert {norm.calls for norm in found} == {1}
    assert all(norm.users for norm in found)
    assert all(dict(model.named_modules())[norm.path] is not None for norm in found)
    assert {norm.calls for norm in nw.find(model)} == ({1} if architecture.found else {None})
    assert bits(model) == before


@every
def test_adopted_models_compute_the_same_in_evaluation(architecture: Architecture) -> None:
    model, batch = architecture.model(), architecture.batch()
    before, keys = computed(model, batch), list(model.state_dict())
    parameters, layers, state = list(model.parameters()), list(model.modules()), bits(model)
    record = nw.adopt(model, batch)
    assert not record.left
    assert len(record.changed) == sum(architecture.kinds.values())
    assert record.model is model
    assert len(record.proof) >= 4
    assert all(type(model.get_submodule(path)).__module__.startswith("normwise.") for path in record.paths)
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert_same(before, computed(model, batch))
    record.undo()
    assert bits(model) == state
    assert all(one is other for one, other in zip(layers, model.modules(), strict=True))


@every
def test_adopted_models_compute_the_same_in_training(architecture: Architecture) -> None:
    """In float64, because a deep network in training mode amplifies what float32 rounds."""
    model = architecture.model().double().train()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in architecture.batch().items()}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    before = computed(model, batch)
    memory = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.load_state_dict(start)
    assert not nw.adopt(model, batch).left
    assert_same(before, computed(model, batch))
    for name, buffer in model.named_buffers():
        check(buffer.double(), memory[name].double(), MODEL_OUTPUTS)


@every
def test_torchs_layers_come_back_from_release(architecture: Architecture) -> None:
    model, batch = architecture.model(), architecture.batch()
    before, keys = computed(model, batch), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    nw.adopt(model, batch)
    record = nw.release(model, batch)
    assert list(model.state_dict()) == keys
    assert_same(before, computed(model, batch))
    count, layer = NO_EQUAL.get(architecture.name, (0, ""))
    assert [line.why for line in record.left] == [f"torch has no equal of {layer}"] * count
    kept = {line.path for line in record.left}
    for (path, now), was in zip(model.named_modules(), classes, strict=True):
        assert type(now) is was or path in kept or (type(now) in TORCHS and "norm" in was.__name__.lower())
