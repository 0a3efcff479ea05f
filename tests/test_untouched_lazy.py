"""A layer that found its sizes within `untouched` waits for them again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from normwise import Affine, Moving, Norm
from normwise.untouched import untouched
from tests.test_memory import bits
from tests.traces import objects, step


def lazy_torch() -> nn.Sequential:
    return nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2))


def lazy_normwise() -> nn.Sequential:
    norm = Norm("[n] c", recovery=Affine("c"), memory=Moving("c", decay=0.9))
    return nn.Sequential(nn.Linear(4, 6), norm, Norm("n (g [k])", recovery=Affine("(g k)"), g=2))


UNSIZED = {"torch": lazy_torch, "normwise": lazy_normwise}
every_unsized = pytest.mark.parametrize("make", UNSIZED.values(), ids=UNSIZED)


@every_unsized
def test_a_layer_that_found_its_sizes_waits_for_them_again(make: Callable[[], nn.Sequential]) -> None:
    """And then finds others, with the first weights that it would have had without."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin, shown, identities = make(), repr(model), objects(model)
    with untouched(model):
        step(model)
        assert repr(model) != shown
        assert not any(map(nn.parameter.is_lazy, (*model.parameters(), *model.buffers())))
    assert (repr(model), objects(model)) == (shown, identities)
    assert [type(t) for t in (*model.parameters(), *model.buffers())] == [
        type(t) for t in (*twin.parameters(), *twin.buffers())
    ]
    if make is lazy_normwise:
        model[0], twin[0] = nn.Identity(), nn.Identity()
    width = 10
    torch.manual_seed(1)
    y = step(model, width)
    torch.manual_seed(1)
    assert torch.equal(step(twin, width), y)
    assert bits(model) == bits(twin)
    assert repr(model) == repr(twin)
    optimizer.step()
    assert bits(model) != bits(twin)


@every_unsized
def test_a_checkpoint_gives_sizes_after_a_probe_did(make: Callable[[], nn.Sequential]) -> None:
    model, trained = make(), make()
    step(trained)
    with untouched(model):
        step(model)
    model.load_state_dict(trained.state_dict(), strict=True)
    assert bits(model) == bits(trained)
    x = torch.randn(8, 4)
    assert torch.equal(model.eval()(x), trained.eval()(x))


def test_hooks_of_a_lazy_layer_stay_and_their_handles_work() -> None:
    model, calls = nn.LazyLinear(3), []
    handle = model.register_forward_hook(lambda *_: calls.append("mine"))
    with untouched(model):
        model(torch.randn(2, 4))
        model.register_forward_hook(lambda *_: calls.append("a probe's"))
    model(torch.randn(2, 5))
    assert (calls, model.in_features, type(model)) == (["mine", "mine"], 5, nn.Linear)
    handle.remove()
    model(torch.randn(2, 5))
    assert calls == ["mine", "mine"]


def test_a_layer_that_a_probe_does_not_reach_still_waits() -> None:
    model = nn.ModuleList([nn.LazyLinear(3), Norm("[n] c", recovery=Affine("c"))])
    shown = repr(model)
    with untouched(model):
        pass
    assert repr(model) == shown
    assert [p.requires_grad for p in model.parameters()] == [True] * 4
