"""Edits: a change is undone bit for bit, in reverse, at any exception, and can be made again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normwise.places import places
from normwise.surgery.edits import Edits


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


def test_values_come_back_bit_for_bit_in_the_same_memory() -> None:
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
        layer.weight[0, 1] = -0.0
    weight, before, memory = layer.weight, bytes_of(layer.weight), layer.weight.data_ptr()
    with Edits() as edits:
        edits.set_values(layer.weight, torch.ones(4, 3))
        edits.set_values(layer.weight, torch.zeros(4, 3))
        assert layer.weight is weight
        assert torch.equal(layer.weight, torch.zeros(4, 3))
    edits.undo()
    assert layer.weight is weight
    assert layer.weight.data_ptr() == memory
    assert bytes_of(layer.weight) == before


def _change_everything_and_raise(model: nn.Sequential, error: type[BaseException]) -> None:
    with Edits() as edits:
        edits.set_values(model[0].weight, torch.randn(2, 2))
        edits.set_parameter(model[0], "bias", None)
        edits.set_attribute(model[0], "in_features", 7)
        edits.exchange(places(model)[2], nn.GELU())
        assert type(model[1]) is nn.GELU
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_any_exception_undoes_everything(error: type[BaseException]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    old, before, bias = list(model), bytes_of(model[0].weight), model[0].bias
    with pytest.raises(error):
        _change_everything_and_raise(model, error)
    assert bytes_of(model[0].weight) == before
    assert model[0].bias is bias
    assert model[0].in_features == 2
    assert list(model) == old


def test_a_change_that_fails_is_undone_with_the_others() -> None:
    seen: list[str] = []

    def fails() -> None:
        seen.append("half done")
        raise ValueError("no")

    def makes(edits: Edits) -> None:
        with edits:
            edits.make(lambda: seen.append("done"), lambda: seen.append("undone"))
            edits.make(fails, lambda: seen.append("half undone"))

    with pytest.raises(ValueError, match=r"^no$"):
        makes(Edits())
    assert seen == ["done", "half done", "half undone", "undone"]


def test_undo_takes_the_last_change_first_and_redo_the_first() -> None:
    layer = nn.Linear(2, 2)
    edits = Edits()
    for value in (1, 2, 3):
        edits.set_attribute(layer, "in_features", value)
    edits.undo()
    assert layer.in_features == 2
    edits.redo()
    assert layer.in_features == 3
    edits.undo()
    edits.undo()
    assert layer.in_features == 2


def test_undo_and_redo_of_values() -> None:
    layer, edits = nn.Linear(2, 2), Edits()
    before, after = layer.weight.detach().clone(), torch.randn(2, 2)
    edits.set_values(layer.weight, after)
    for _ in range(2):
        edits.undo()
        assert torch.equal(layer.weight, before)
        edits.redo()
        assert torch.equal(layer.weight, after)


def test_the_given_values_are_not_tied_to_the_tensor() -> None:
    layer, edits, values = nn.Linear(2, 2), Edits(), torch.ones(2, 2)
    edits.set_values(layer.weight, values)
    layer.weight.data.mul_(3)
    assert torch.equal(values, torch.ones(2, 2))


def test_values_are_brought_to_the_dtype_and_strides_of_the_tensor() -> None:
    layer, edits = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last).double(), Edits()
    strides, values = layer.weight.stride(), torch.randn(4, 3, 2, 2)
    edits.set_values(layer.weight, values)
    assert layer.weight.dtype == torch.float64
    assert layer.weight.stride() == strides
    assert torch.equal(layer.weight, values.double())


def test_gradients_and_optimizers_go_on_with_the_same_parameter() -> None:
    layer, edits = nn.Linear(2, 2), Edits()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    edits.set_values(layer.weight, torch.ones(2, 2))
    x, cotangent = torch.randn(5, 2), torch.randn(5, 2)
    (layer(x) * cotangent).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), 1 - cotangent.T @ x)


def test_a_parameter_comes_and_goes() -> None:
    layer, edits = nn.Linear(2, 3), Edits()
    bias, names = layer.bias, list(layer.state_dict())
    edits.set_parameter(layer, "bias", None)
    assert layer.bias is None
    assert list(layer.state_dict()) == ["weight"]
    edits.undo()
    assert layer.bias is bias
    assert list(layer.state_dict()) == names


def test_an_exchange_keeps_the_order_of_children() -> None:
    model, edits = nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.GELU()), Edits()
    before = list(model.named_children())
    edits.exchange(places(model)[1], nn.Identity())
    assert [name for name, _ in model.named_children()] == ["0", "1", "2"]
    edits.undo()
    assert list(model.named_children()) == before


def test_a_tuple_is_the_same_object_after_undo() -> None:
    model, edits = nn.Module(), Edits()
    model.norms = norms = (nn.ReLU(), (nn.GELU(),))
    for place in places(model)[1:]:
        edits.exchange(place, nn.Identity())
    assert model.norms is not norms
    edits.undo()
    assert model.norms is norms
