"""Freeze, hold, domains, accumulation: they nest, survive exceptions, copies and files, and leave nothing behind."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import Affine, Average, BatchNorm, InstanceNorm, Moving, Norm, NormwiseError
from tests.test_memory import bits
from tests.tolerances import COMPILED, DOUBLE, VALUES, check


def network() -> nn.Sequential:
    averaged = Norm("[n] c", recovery=Affine("c"), memory=Average("c"), c=6)
    return nn.Sequential(nn.Linear(4, 6), BatchNorm(6), nn.ReLU(), nn.Linear(6, 6), averaged, nw.LayerNorm(6))


def norms(model: nn.Module) -> list[Norm]:
    return [module for module in model.modules() if isinstance(module, Norm)]


def norm_bits(model: nn.Module) -> list[dict[str, bytes]]:
    return [bits(layer) for layer in norms(model)]


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, strict=True)
    return model


def assigned(model: nn.Module) -> nn.Module:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


ROUTES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it is": lambda model: model,
    "train": lambda model: model.eval().train(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "load": loaded,
    "load, assign": assigned,
    "float": lambda model: model.double().float(),
}
every_route = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)
    y = model(torch.randn(8, 4))
    (y * torch.randn_like(y)).sum().backward()
    optimizer.step()


@every_route
def test_frozen_layers_do_not_move_in_five_steps(route: Callable[[nn.Module], nn.Module]) -> None:
    """Not even by the momentum and the gradients that an optimizer still holds from before, or by weight decay."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        step(model, optimizer)
    nw.freeze(model)
    before = norm_bits(model)
    weight = model[0].weight
    routed = route(model).train()
    if routed[0].weight is not weight:
        optimizer = torch.optim.SGD(routed.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    linear = routed[0].weight.detach().clone()
    for _ in range(5):
        step(routed, optimizer)
    assert norm_bits(routed) == before
    assert all(layer.frozen for layer in norms(routed))
    assert not torch.equal(routed[0].weight, linear)
    nw.unfreeze(routed)
    for _ in range(2):
        step(routed, torch.optim.SGD(routed.parameters(), lr=0.1))
    assert not any(after == old for after, old in zip(norm_bits(routed), before, strict=True))


def test_a_frozen_layer_computes_in_training_what_it_does_in_evaluation() -> None:
    model = network()
    model(torch.randn(8, 4) * 3)
    x = torch.randn(8, 4)
    nw.freeze(model)
    assert torch.equal(model.train()(x), model.eval()(x))
    assert model.train()(x[:1]).isfinite().all()  # and one row needs no statistics of its own


def half_learning() -> tuple[nn.Module, dict[str, bool]]:
    model = network()
    model[1].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    return model, {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_what_took_no_gradient_before_takes_none_after() -> None:
    model, before = half_learning()
    nw.freeze(model)
    nw.freeze(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.weight", "0.bias", "3.weight", "3.bias"}
    nw.unfreeze(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert nw.freeze(model).paths == ("1", "4", "5")
    copied = saved(copy.deepcopy(model))
    nw.unfreeze(copied)
    assert {name: parameter.requires_grad for name, parameter in copied.named_parameters()} == before


def test_freezing_for_a_while_nests_and_survives_an_exception() -> None:
    model, before = half_learning()
    first = model[1]

    def interrupted() -> None:
        with nw.freeze(model):
            with nw.unfreeze(first):
                assert (first.frozen, first.weight.requires_grad, first.bias.requires_grad) == (False, True, False)
            assert (first.frozen, first.weight.requires_grad) == (True, False)
            with nw.freeze(model, parameters=False):
                assert all(layer.frozen for layer in norms(model))
            assert first.frozen
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert not any(layer.frozen for layer in norms(model))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    change = nw.freeze(model)
    change.undo()
    change.undo()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_freezing_the_memory_alone_leaves_the_parameters_learning() -> None:
    model = network()
    nw.freeze(model, parameters=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        step(model, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("running" in name or "num_batches" in name)
    nw.unfreeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_frozen_before_it_has_sizes_is_frozen_after() -> None:
    layer = Norm("[n] c", recovery=Affine("c"), memory=Moving("c", decay=0.9))
    nw.freeze(layer)
    x = torch.randn(8, 3)
    check(layer(x), x / (1 + 1e-5) ** 0.5, VALUES)
    assert layer.num_batches_tracked.item() == 0
    assert not layer.weight.requires_grad
    nw.unfreeze(layer)
    assert layer.weight.requires_grad


def test_a_layer_shared_under_two_names_is_one_layer() -> None:
    shared = BatchNorm(4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared})
    assert nw.freeze(model).paths == ("a.0",)
    nw.unfreeze(model)
    with nw.accumulate(model, 2):
        model["b"](torch.randn(8, 4)), model["a"](torch.randn(8, 4))
    with nw.no_update(model), nw.domain(model, "night"):
        model["a"](torch.randn(8, 4))
    assert (shared.num_batches_tracked.item(), shared.domains) == (1, ())  # no batch entered "night"
    with nw.domain(model, "dawn"):
        model["b"](torch.randn(8, 4))
    assert copy.deepcopy(model)["a"][0].domains == ("dawn",)


def test_within_no_update_nothing_moves_and_training_goes_on() -> None:
    model = network()
    model(torch.randn(8, 4))
    spared, before, x = copy.deepcopy(model), norm_bits(model), torch.randn(8, 4)
    with nw.no_update(model):
        with nw.no_update(model), nw.domain(model, "probe"):
            model(x)
        y = model(x)
    assert torch.equal(y, spared(x))  # normalized by the batch, and not by the memory
    assert not torch.equal(y, spared.eval()(x))
    held = norm_bits(model)
    assert [{k: v for k, v in layer.items() if "_domains" not in k} for layer in held] == before
    assert all(layer._held_by("probe").num_batches_tracked == 0 for layer in norms(model) if layer.domains)
    model(x)
    assert all(layer.num_batches_tracked == 2 for layer in norms(model) if layer.spec.memory)


CONTEXTS: dict[str, Callable[[nn.Module], AbstractContextManager[object]]] = {
    "no_update": nw.no_update,
    "domain": lambda model: nw.domain(model, "night"),
    "accumulate": lambda model: nw.accumulate(model, 3),
}


@pytest.mark.parametrize("enter", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved], ids=["deepcopy", "torch.save"])
def test_a_copy_made_within_a_context_is_not_within_it(enter: Callable, duplicate: Callable) -> None:
    model = network()
    with enter(model):
        model(torch.randn(8, 4))
        copied = duplicate(model)
        twin = copy.deepcopy(copied)
    for other in (copied, twin):
        before = other[1].num_batches_tracked.item()
        other(torch.randn(8, 4))
        assert other[1].num_batches_tracked.item() == before + 1
        assert not any("_pool" in name for name, _ in other.named_buffers())
        with nw.accumulate(other, 2):
            other(torch.randn(8, 4)), other(torch.randn(8, 4))
        assert other[1].num_batches_tracked.item() == before + 2


@pytest.mark.parametrize("enter", CONTEXTS.values(), ids=CONTEXTS)
def test_an_exception_ends_a_context_cleanly(enter: Callable) -> None:
    model = network()
    spared = copy.deepcopy(model)

    def interrupted() -> None:
        with enter(model):
            model(torch.randn(8, 4))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    x = torch.randn(8, 4)
    assert torch.equal(model(x), spared(x))
    own = {name: value for name, value in bits(model).items() if "_domains" not in name}
    assert own == bits(spared)
    assert not any("_pool" in name for name, _ in model.named_buffers())


OPERATIONS: dict[str, Callable[[nn.Module], object]] = {
    "freeze": nw.freeze,
    "unfreeze": nw.unfreeze,
    **{name: lambda model, enter=enter: enter(model).__enter__() for name, enter in CONTEXTS.items()},
}


@pytest.mark.parametrize("operate", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize(
    "theirs", [nn.BatchNorm2d(3), nn.InstanceNorm1d(3, track_running_stats=True)], ids=["batch", "instance"]
)
def test_torchs_own_layers_with_memory_are_refused(operate: Callable, theirs: nn.Module) -> None:
    model = nn.Sequential(BatchNorm(3), nn.ModuleList([nn.InstanceNorm1d(3), theirs]))
    with pytest.raises(NormwiseError) as caught:
        operate(model)
    assert str(caught.value) == (
        f"1.1: the memory of torch.nn.{type(theirs).__name__} is not normwise's to change; "
        "nw.adopt(model) exchanges such layers for normwise's with the same numbers"
    )
    assert (model[0].frozen, model[0]._held, model[0].domains, model[0]._window) == (False, False, (), 0)


@pytest.mark.parametrize("operate", OPERATIONS.values(), ids=OPERATIONS)
def test_the_way_out_that_the_refusal_names_works(operate: Callable) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert nw.adopt(model).paths == ("1",)
    operate(model)


def test_a_domain_has_the_memory_of_a_layer_of_its_own() -> None:
    layer, day, night = BatchNorm(4), BatchNorm(4), BatchNorm(4)
    for _ in range(3):
        x = torch.randn(8, 4)
        layer(x), day(x)
        with nw.domain(layer, "night"):
            layer(x * 5 + 2), night(x * 5 + 2)
            with nw.domain(layer, "dawn"):
                layer(x)
            assert layer._domain == "night"
    own = bits(layer)
    assert {name: value for name, value in own.items() if "_domains" not in name} == bits(day)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert own[f"_domains.night.{name}"] == bits(night)[name]
        assert own[f"_domains.dawn.{name}"] == bits(day)[name]
    x = torch.randn(8, 4)
    with nw.domain(layer.eval(), "night"):
        assert torch.equal(layer(x), night.eval()(x))
    assert torch.equal(layer(x), day.eval()(x))
    layer.reset_running_stats()
    with nw.domain(layer, "night"):
        check(layer(x).detach(), x / (1 + 1e-5) ** 0.5, VALUES)


@pytest.mark.parametrize("name", ["train", "eval", "half", "cpu", "weight", "running_mean", "0", "day and night", "é"])
def test_a_domain_may_have_any_name_without_a_dot(name: str) -> None:
    layer = BatchNorm(4)
    with nw.domain(layer, name):
        layer(torch.randn(8, 4))
    assert layer.domains == (name,)
    other = BatchNorm(4)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert bits(other) == bits(layer)
    assert layer.eval().train().half().domains == (name,)


@pytest.mark.parametrize("name", ["", "a.b", 3, None])
def test_a_name_that_is_no_domain(name: str) -> None:
    message = re.escape(f"a domain's name is text without a dot, not {name!r}")
    with pytest.raises(ValueError, match=f"^{message}$"), nw.domain(network(), name):
        pass


@pytest.mark.parametrize("still", [nn.Module.eval, nw.freeze], ids=["evaluation", "frozen"])
def test_a_domain_that_was_never_trained_is_refused_where_its_memory_would_be_used(still: Callable) -> None:
    model = network()
    with nw.domain(model, "night"):
        model(torch.randn(8, 4))
    still(model)
    with pytest.raises(NormwiseError) as caught, nw.domain(model, "noon"):
        model(torch.randn(8, 4))
    assert str(caught.value) == "1: domain 'noon' was never trained; there are: night"
    assert model[1].domains == ("night",)
    with nw.domain(model, "night"):
        model(torch.randn(8, 4))


def test_a_frozen_layer_keeps_all_its_domains_still() -> None:
    layer = BatchNorm(4)
    with nw.domain(layer, "night"):
        layer(torch.randn(8, 4))
    nw.freeze(layer)
    before = bits(layer)
    with nw.domain(layer, "night"):
        layer(torch.randn(8, 4)), layer(torch.randn(8, 4))
    assert bits(layer) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_calls_follow_every_mode() -> None:
    """Contexts around a compiled call, and within the compiled function."""
    eager = nn.Sequential(BatchNorm(4), Norm("[n] c", memory=Average("c"), c=4))
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")

    def go(model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        outputs = [call(torch.randn(8, 4) * 2 + 1)]
        with nw.no_update(model):
            outputs.append(call(torch.randn(8, 4)))
        with nw.domain(model, "night"):
            outputs.append(call(torch.randn(8, 4) - 3))
        with nw.freeze(model):
            outputs.append(call(torch.randn(8, 4)))
        with nw.accumulate(model, 2):
            outputs += [call(torch.randn(8, 4)), call(torch.randn(8, 4)), call(torch.randn(8, 4))]
        return outputs

    for y, y_compiled in zip(go(eager, eager), go(traced, compiled), strict=True):
        check(y_compiled.detach(), y.detach(), COMPILED)
    for name, value in eager.state_dict().items():
        check(traced.state_dict()[name], value, COMPILED)

    def probe(x: Tensor) -> Tensor:
        with nw.no_update(traced):
            return traced(x)

    before = bits(traced)
    torch.compile(probe, fullgraph=True, backend="aot_eager")(torch.randn(8, 4))
    assert bits(traced) == before


def test_double_precision_of_a_domain_follows_the_layer() -> None:
    layer = BatchNorm(4).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    with nw.domain(layer, "night"):
        layer(x)
    check(layer._held_by("night").running_mean, 0.1 * x.mean(0), DOUBLE)


def test_layers_without_memory_are_left_alone() -> None:
    model = nn.Sequential(nw.LayerNorm(4), InstanceNorm(4), BatchNorm(4, track_running_stats=False))
    for enter in CONTEXTS.values():
        with enter(model):
            pass
    assert all(layer.domains == () for layer in norms(model))
