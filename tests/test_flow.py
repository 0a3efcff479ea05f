"""The flow of data in a forward: who reads what, whatever the Python code does, and no trace left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normwise.surgery.flow import Flow, Step, trace

Body = Callable[[nn.Module, Tensor], object]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, d: Tensor) -> Tensor:
        return d * 2


class Model(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.inner, self.drop, self.body = nn.Sequential(nn.LayerNorm(4), nn.ReLU()), nn.Dropout(0.5), body

    def forward(self, x: Tensor) -> object:
        return self.body(self, x)


def traced(body: Body, prepare: Callable[[Model], object] | None = None) -> tuple[Model, Flow]:
    model, x = Model(body), torch.randn(5, 4)
    if prepare is not None:
        prepare(model)
    return model, trace(model, lambda: model(x), [model.norm, model.inner])


def read_by(flow: Flow, layer: nn.Module) -> list[str]:
    (call,) = flow.calls(layer)
    return [str(step) for value in call.writes for step in value.readers]


READERS: dict[str, tuple[Body, list[str]]] = {
    "one layer": (lambda m, x: m.norm(m.a(x)), ["norm"]),
    "an operation of another layer": (lambda m, x: m.drop.train()(m.a(x)), ["empty_like in drop", "mul in drop"]),
    "a function": (lambda m, x: F.gelu(m.a(x)), ["gelu"]),
    "two readers": (lambda m, x: (lambda y: m.b(y) + y)(m.a(x)), ["b", "add"]),
    "twice by one": (lambda m, x: (lambda y: y * y)(m.a(x)), ["mul"]),
    "the output": (lambda m, x: m.a(x), ["the model's output"]),
    "the output and a layer": (lambda m, x: (lambda y: {"y": [y], "z": m.b(y)})(m.a(x)), ["b", "the model's output"]),
    "written over": (lambda m, x: m.norm(m.a(x).mul_(2)), ["mul_"]),
    "through a view": (lambda m, x: m.norm(m.a(x).view(4, 5).view(5, 4)), ["view"]),
    "a custom function": (lambda m, x: Doubled.apply(m.a(x)), ["mul"]),
    "a whole of several layers": (lambda m, x: m.inner(m.a(x)), ["inner"]),
    "mapped": (lambda m, x: torch.func.vmap(torch.sin)(m.a(x)), ["sin"]),
    "nobody": (lambda m, x: (m.a(x), m.b(x))[1], []),
}


@pytest.mark.parametrize(("body", "readers"), READERS.values(), ids=READERS)
def test_readers(body: Body, readers: list[str]) -> None:
    model, flow = traced(body)
    assert read_by(flow, model.a) == readers


def test_a_tensor_that_is_written_into_is_another_value_afterwards() -> None:
    def body(model: nn.Module, x: Tensor) -> Tensor:
        y = model.a(x)
        before = model.norm(y)
        y.add_(1)
        return before + model.b(y)

    model, flow = traced(body)
    assert read_by(flow, model.a) == ["norm", "add_"]
    (value,) = [value for value in flow.calls(model.b)[0].takes if value.tensor.shape == (5, 4)]
    assert str(value.writer) == "add_"


def test_two_calls_are_two_steps() -> None:
    model, flow = traced(lambda m, x: m.norm(m.a(m.norm(m.a(x)))))
    assert [str(step) for step in flow.steps if step.layer] == ["a", "norm", "a", "norm"]
    first, second = flow.calls(model.a)
    assert [str(step) for step in first.writes[0].readers] == ["norm"]
    assert str(second.takes[0].writer) == "norm"
    assert [str(step) for step in second.writes[0].readers] == ["norm"]


def test_a_parameter_that_is_used_outside_of_its_layer() -> None:
    model, flow = traced(lambda m, x: F.linear(m.a(x), m.a.weight, m.b.bias))
    assert flow.elsewhere(model.a) == "is also read by t"
    assert flow.elsewhere(model.b) == "is also read by addmm"
    assert flow.elsewhere(model.norm) is None


def test_a_parameter_of_two_layers() -> None:
    def tie(model: nn.Module) -> None:
        model.b.weight = model.a.weight

    model, flow = traced(lambda m, x: m.a(x), tie)  # b is not called
    assert flow.elsewhere(model.a) == "is also b.weight"


def test_what_a_hook_does_to_the_output_stands_between() -> None:
    model, flow = traced(
        lambda m, x: m.norm(m.a(x)), lambda m: m.a.register_forward_hook(lambda layer, args, y: y.sigmoid())
    )
    assert read_by(flow, model.a) == ["sigmoid"]
    assert str(flow.calls(model.norm)[0].takes[0].writer) == "sigmoid"


def test_a_tensor_that_is_stored_and_used_later() -> None:
    def body(model: nn.Module, x: Tensor) -> Tensor:
        model.kept = model.a(x)
        y = model.b(x)
        return model.norm(y + model.kept)

    model, flow = traced(body)
    assert read_by(flow, model.a) == ["add", "the attribute kept"]


def test_attention_is_read() -> None:
    def body(model: nn.Module, x: Tensor) -> Tensor:
        q, k = (layer(x).view(1, 1, 5, 4) for layer in (model.a, model.b))
        return model.norm(F.scaled_dot_product_attention(q, k, k).view(5, 4))

    model, flow = traced(body)
    writer = flow.calls(model.norm)[0].takes[0].writer
    seen: set[Step] = set()
    while writer is not None and writer not in seen:  # back to the first layer
        seen.add(writer)
        writer = next((value.writer for value in writer.reads if value.writer is not None), None)
    assert flow.calls(model.a)[0] in seen


def test_an_error_that_the_model_catches_does_not_confuse_what_follows() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    def body(model: nn.Module, x: Tensor) -> Tensor:
        try:
            x = model.failing(x)
        except ValueError:
            x = model.a(x)
        return model.norm(model.b(x)).relu()

    model, flow = traced(body, lambda m: m.add_module("failing", Failing(4, 4)))
    assert read_by(flow, model.a) == ["b"]
    assert read_by(flow, model.norm) == ["relu"]
    assert read_by(flow, model.b) == ["norm"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_hook_is_left_after_an_exception_or_without_one(error: type[BaseException]) -> None:
    def fails(model: nn.Module, x: Tensor) -> Tensor:
        model.norm(model.a(x))
        raise error

    model, _ = traced(lambda m, x: m.norm(m.inner(m.a(x))))
    failing = Model(fails)
    with pytest.raises(error):
        trace(failing, lambda: failing(torch.randn(5, 4)), [failing.norm])
    for module in (*model.modules(), *failing.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    y = model(torch.randn(5, 4))
    assert y.requires_grad  # and gradients are on again


def test_the_forward_computes_what_it_would() -> None:
    model, x, seen = Model(lambda m, x: m.norm(m.b(m.a(x)).relu_())), torch.randn(5, 4), []
    trace(model, lambda: seen.append(model(x)), [model.norm])
    assert torch.equal(seen[0], model(x))


def test_the_root_may_be_a_whole() -> None:
    layer = nn.LayerNorm(4)
    flow = trace(layer, lambda: layer(torch.randn(5, 4)), [layer])
    assert [str(step) for step in flow.steps if step.layer] == ["LayerNorm"]
    assert read_by(flow, layer) == ["the model's output"]
