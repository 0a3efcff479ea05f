"""Whole trainings within `untouched`: optimizers, loaders, and moments that are gone back to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from normwise import BatchNorm
from normwise.untouched import Moment, seed, untouched
from tests.test_memory import bits
from tests.traces import everything, network, step

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.1),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), 0.01, amsgrad=True),
    "a tensor's rate": lambda model: torch.optim.Adam(model.parameters(), torch.tensor(0.01)),
    "L-BFGS": lambda model: torch.optim.LBFGS(model.parameters(), 0.1, max_iter=2),
}


def optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_training_within_is_taken_back_with_its_optimizer(
    make: Callable[[nn.Module], torch.optim.Optimizer], steps: int
) -> None:
    """The rest of the training is, bit for bit, that of a twin that was left alone."""

    def trained(within: Callable[[nn.Module, torch.optim.Optimizer], None]) -> tuple[object, object]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), BatchNorm(6), nn.Dropout(), nn.Linear(6, 2))
        optimizer = make(model)
        for _ in range(steps):
            optimized(model, optimizer)
        before = everything(model), [id(p) for p in optimizer.state]
        within(model, optimizer)
        assert (everything(model), [id(p) for p in optimizer.state]) == before
        for _ in range(2):
            optimized(model, optimizer)
        return bits(model), repr(optimizer)

    def measured(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        weight = model[0].weight.detach().clone()
        with untouched(model, values=True, optimizer=optimizer):
            for group in optimizer.param_groups:
                group["lr"] = 3.0
                group["new"] = 1
            for _ in range(2):
                optimized(model, optimizer)
            assert not torch.equal(model[0].weight, weight)

    assert trained(measured) == trained(lambda model, optimizer: None)


def test_values_of_parameters_only_when_asked_for() -> None:
    model = network()
    before = bits(model)
    for values in (True, False):
        with untouched(model, values=values), torch.no_grad():
            model[0].weight.add_(1.0)
        assert (bits(model) == before) is values


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_gives_the_batches_it_would_have_given(shuffle: bool) -> None:
    def drawn(looked_at: bool) -> list[object]:
        order = torch.Generator().manual_seed(3)
        loader = DataLoader(torch.arange(20), 4, shuffle=shuffle, generator=order)
        coming = iter(loader)
        seen = [next(coming).tolist()]
        if looked_at:
            with untouched(network(), batches=loader):
                [batch.tolist() for batch in loader]
        seen += [batch.tolist() for batch in coming]
        return [*seen, *(batch.tolist() for batch in loader), order.initial_seed(), order.get_state().tolist()]

    assert drawn(True) == drawn(False)


def test_a_sampler_with_a_generator_of_its_own() -> None:
    own = torch.Generator().manual_seed(3)
    sampler = torch.utils.data.RandomSampler(range(12), generator=own)
    loaders = [
        DataLoader(torch.arange(12), 4, sampler=sampler),
        DataLoader(torch.arange(12), batch_sampler=torch.utils.data.BatchSampler(sampler, 4, drop_last=False)),
    ]
    for loader in loaders:
        before = own.get_state()
        with untouched(network(), batches=loader):
            list(loader)
            assert not torch.equal(own.get_state(), before)
        assert torch.equal(own.get_state(), before)


def test_a_moment_can_be_gone_back_to_any_number_of_times() -> None:
    model, x = network(), torch.randn(8, 4)
    moment = Moment(model)
    first, memory = model(x), bits(model)
    for _ in range(3):
        seed(9)
        step(model)
        model.eval()
        moment.back()
        assert torch.equal(model(x), first)
        assert bits(model) == memory


def test_a_moment_leaves_weights_and_gradients() -> None:
    model = network()
    moment = Moment(model)
    step(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    weight, grad = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    moment.back()
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model[0].weight.grad, grad)
